"""The planner: statistics and hardware to hyperparameters, each value with the rule that made it.

Rules are Auto3DSeg's or nnU-Net's, whichever did better where both were measured; each names its source.
"""

from __future__ import annotations

from collections.abc import Callable

from autoseg.algos.draft import Draft, Fit
from autoseg.algos.inputs import PlanInputs
from autoseg.algos.rules import images, machine, patches, schedule, start
from autoseg.hardware.facts import Hardware
from autoseg.plan import Origin, Plan

RULES: tuple[Callable[[Draft], None], ...] = (
    images.check_class_names,
    images.fold,
    images.classes,
    images.channels,
    start.channels,
    images.image_ranges,
    images.channel_names,
    images.frame,
    images.resample_resolution,
    start.resample_resolution,
    images.crop_foreground,
    patches.network,
    patches.roi_size,
    patches.batch_size,
    patches.foreground_fraction,
    patches.annotators_share,
    patches.lateral_pairs,
    schedule.num_steps_per_epoch,
    schedule.num_epochs,
    schedule.augment,
    patches.mirror_axes,
    patches.tta,
    schedule.budget,
    schedule.num_epochs_per_validation,
    schedule.optimizer,
    schedule.learning_rate,
    start.fine_tuning,
    machine.cache,
    machine.measured_cost,
    machine.seed,
)
"""In their order: a rule may look at what those before it set, the user's values included."""


def make_plan(inputs: PlanInputs, fit: Fit | None = None) -> tuple[Plan, dict[str, Origin]]:
    """Fill an algorithm's template for one fold.

    Args:
        inputs: what the job is planned from.
        fit: what measuring on the device changes; None: nothing.

    Returns:
        The plan, and for each of its keys where it came from.

    Raises:
        ConfigError: A weight is given to a class that there is not, a patch is too small for the network, or a batch
            cannot be shared by the processes of a job.
    """
    draft = Draft.begin(inputs, fit or Fit())
    for rule in RULES:
        rule(draft)
    return draft.finish(), draft.origins


def expected_seconds(plan: Plan, hardware: Hardware) -> float | None:
    """How long a job will train: its budget, or what its steps take on a CPU; None: not known before it runs."""
    if plan.budget_s is not None:
        return plan.budget_s
    if hardware.on_gpu and plan.step_s is None:
        return None
    steps = plan.num_epochs * plan.num_steps_per_epoch
    return steps * (plan.step_s or schedule.step_seconds(plan.algo, plan.batch_size, plan.roi_size, hardware.num_cores))
