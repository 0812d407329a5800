"""What a network is trained for: all that the trainer asks of it.

Segmentation is here; the room `pretraining` has the tasks that need no labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from autoseg.networks import build_network
from autoseg.plan import Plan
from autoseg.training.batches import Batches, LabelledBatches
from autoseg.training.cache import CachedCase
from autoseg.training.checkpoint import on_cpu
from autoseg.training.patches import make_sampler
from autoseg.training.processes import Processes
from autoseg.training.progress import Progress
from autoseg.training.step import Loss, segmentation_loss
from autoseg.training.validation import DiceValidator, Validator
from autoseg.workspace.jobs import EpochLine
from autoseg.workspace.stored import Stored


class Task(Protocol):
    """What a network is trained for."""

    @property
    def epoch_line(self) -> type[Stored]:
        """What the lines of its metrics.jsonl are."""

    @property
    def least_patches(self) -> int:
        """Patches that must be passed through the network at once, for want of memory, too: fewer teach it less."""

    def network(self, plan: Plan) -> nn.Module:
        """What is trained, with random weights."""

    def batches(self, plan: Plan, cases: Sequence[CachedCase], device: torch.device, indices: range) -> Batches[Any]:
        """What its steps learn from.

        Args:
            indices: of the batch, the samples that this process cuts.
        """

    def loss(self, plan: Plan, device: torch.device) -> Loss:
        """What its steps make smaller."""

    def validator(
        self,
        plan: Plan,
        cases: Sequence[CachedCase],
        network: nn.Module,
        progress: Progress,
        processes: Processes,
        roi: tuple[int, int, int],
        name: str,
    ) -> Validator:
        """What tells its best weights. Args: as `Validator`."""

    def weights(self, network: nn.Module) -> Mapping[str, torch.Tensor]:
        """What of its best weights is kept, on the CPU."""


class Segmentation:
    """To segment, by labels."""

    epoch_line: type[Stored] = EpochLine
    least_patches = 1

    def network(self, plan: Plan) -> nn.Module:
        """The plan's."""
        return build_network(plan)

    def batches(self, plan: Plan, cases: Sequence[CachedCase], device: torch.device, indices: range) -> LabelledBatches:
        """Patches and their labels."""
        return LabelledBatches(
            plan,
            make_sampler(cases, plan),
            device,
            indices=indices,
            batch_size=plan.batch_size,
            roi=plan.roi_size,
            ahead=device.type == "cuda",
        )

    def loss(self, plan: Plan, device: torch.device) -> Loss:
        """The plan's."""
        return segmentation_loss(plan, device)

    def validator(
        self,
        plan: Plan,
        cases: Sequence[CachedCase],
        network: nn.Module,
        progress: Progress,
        processes: Processes,
        roi: tuple[int, int, int],
        name: str,
    ) -> DiceValidator:
        """Dice on the held-out cases."""
        return DiceValidator(plan, cases, network, progress, processes, roi, name)

    def weights(self, network: nn.Module) -> dict[str, torch.Tensor]:
        """All of them, as a MONAI bundle wants them."""
        return on_cpu(network.state_dict())


SEGMENTATION = Segmentation()
