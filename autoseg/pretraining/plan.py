"""How long and how a network is pretrained: the plan of a job that it is pretrained for, bent to images alone.

All that makes an image what the network sees stays as it is: voxel size, normalisation, axes, patch; and the network.
"""

from __future__ import annotations

import math
from typing import Any

from autoseg.config.settings import PretrainSettings
from autoseg.plan import Plan
from autoseg.weights.source import DEEP_SUPERVISION

NUM_EPOCHS_PER_VALIDATION = 5
"""Source: Clara's configuration."""
CLARAS_RATE = 1e-4
"""Of Adam, on a GPU. Source: Clara's configuration, and MONAI's tutorial."""
LEAST_PAIRS = 2
"""Patches of a process whose views are compared: of one alone there is nothing to be unlike."""
MINUTES_PER_CPU_JOB = 60
"""Without a budget a pretraining on a CPU gets at most about this long, as a job of training does. A choice."""


def pretraining_plan(
    plan: Plan,
    settings: PretrainSettings,
    *,
    num_images: int,
    budget_s: float | None,
    on_gpu: bool,
    processes: int = 1,
    step_s: float | None = None,
) -> Plan:
    """The plan of a pretraining.

    Args:
        plan: of a job that starts from it.
        num_images: that are learned from.
        budget_s: its seconds; None: its epochs alone decide.
        on_gpu: whether it is trained there, where Clara's numbers are from.
        processes: that train it together.
        step_s: seconds of a training step of `plan`; None: not known.
    """
    compares = settings.method == "contrastive"
    batch = plan.batch_size
    if compares:  # two views each
        least = LEAST_PAIRS * processes
        batch = max(least, batch // 2 // processes * processes)
    steps = max(1, math.ceil(num_images / batch))
    epochs = settings.epochs
    if budget_s is None and not on_gpu and step_s is not None:
        epoch_s = steps * step_s * batch * (2 if compares else 1) / plan.batch_size
        epochs = max(1, min(epochs, int(60 * MINUTES_PER_CPU_JOB / epoch_s)))
    network = {**plan.network, **({DEEP_SUPERVISION: 1} if DEEP_SUPERVISION in plan.network else {})}
    changes: dict[str, Any] = {
        "network": network,
        "batch_size": batch,
        "num_epochs": epochs,
        "num_steps_per_epoch": steps,
        "num_epochs_per_validation": min(NUM_EPOCHS_PER_VALIDATION, epochs),
        "budget_s": budget_s,
        "augment": "none",
        "loaded_rate": 1.0,
        "frozen_fraction": 0.0,
        "image_ranges": None,
        "step_s": None,
        "memory_gib": None,
    }
    if compares and on_gpu:
        changes |= {"optimizer": "adam", "learning_rate": CLARAS_RATE}
    return Plan.model_validate({**plan.model_dump(mode="json"), **changes})
