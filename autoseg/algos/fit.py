"""What a step takes on the actual device, in time and memory, and a plan that fits both.

Autoseg plans by published formulas first (planner.py). Here a real step of that plan is measured, and the plan is
changed where memory, or the time of a budget, allow more or less than the formulas say.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

import torch

from autoseg.algos.draft import Fit, recipe_of
from autoseg.algos.inputs import PlanInputs
from autoseg.algos.measurements import Measurements
from autoseg.algos.planner import make_plan
from autoseg.algos.rules.schedule import TRAINING_SHARE
from autoseg.config.units import parse_duration
from autoseg.data.fingerprint import Fingerprint
from autoseg.data.resampling import resampled_shape
from autoseg.networks import divisor, network_file
from autoseg.networks.sizing import shorter_roi
from autoseg.plan import Origin, Plan
from autoseg.training.cache import MEMORY_SHARE
from autoseg.training.measure import StepCost

log = logging.getLogger(__name__)


ENOUGH_STEPS = 2000
"""Steps that a budget must leave for a larger network, patch or batch to be taken.
Source: plain loops on the hippocampus, where 24 filters overtook 16 after about so many steps."""

TOO_FEW_STEPS = {True: 2000, False: 300}
"""On a GPU and on a CPU: steps that a budget must leave, or a smaller network is taken. On a GPU a choice: its networks
have four times the weights, and a smaller patch is what there is to give. Source on a CPU: SegResNet, 13 organs at 4
mm, runs of eight minutes: 86 steps of the usual size 0.629 Dice, 273 of a smaller one 0.803, 616 of the smallest 0.828;
hippocampus, 3 minutes: 226 steps with 16 filters 0.8736, 549 with 8 0.8762."""

MEASURING_SHARE = 0.05
"""Share of a budget in which steps are measured, each algorithm its part of it; a first one always is. A choice."""

LOWER_RUNG = 0.5
"""Time of a step over that of the next larger rung, where it is not measured. Source: SegResNet's five rungs on two
cores, 64^3 or 48^3 voxels: 0.14, 0.26, 0.60, 1.0, 1.5 s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A plan whose step was measured."""

    fit: Fit
    plan: Plan
    cost: StepCost


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitting:
    """A job to be planned, and the device that its steps are measured on."""

    inputs: PlanInputs
    device: torch.device
    measured: Measurements

    @property
    def left_s(self) -> float:
        """Seconds in which further steps may be measured."""
        settings, budget_s = self.inputs.settings, self.inputs.budget_s
        if budget_s is None:
            return math.inf
        own_s = parse_duration(settings.budget) / len(settings.networks) if settings.budget else budget_s
        return MEASURING_SHARE * max(own_s, budget_s) - self.measured.spent_s(self.inputs.algo)

    @property
    def processes(self) -> int:
        """That train the job together."""
        return self.inputs.settings.gpus_per_job

    @property
    def limit_gib(self) -> float:
        """Memory that a step may take."""
        return self.inputs.settings.memory_share * self.inputs.hardware.memory_gib

    @property
    def fixed(self) -> set[str]:
        """Hyperparameters that the user or a recipe fixed."""
        return {*self.inputs.settings.hyper(self.inputs.algo), *recipe_of(self.inputs)}

    def plan(self, fit: Fit) -> Plan:
        """The plan with what measuring changes."""
        return make_plan(self.inputs, fit)[0]

    def cost(self, plan: Plan) -> StepCost | None:
        """What one process' share of a plan's step takes on the device; None where memory does not suffice."""
        return self.measured.of(self._shared(plan), self.device, self.left_s)

    def _shared(self, plan: Plan) -> Plan:
        return plan.model_copy(update={"batch_size": max(1, plan.batch_size // self.processes)})

    def has_measured(self, plan: Plan) -> bool:
        """Whether it is known what a plan's step takes, as where a pretraining was planned alike."""
        return self.measured.has(self._shared(plan), self.device)

    def measure(self, fit: Fit) -> Candidate | None:
        """The plan and its step; None where memory does not suffice."""
        plan = self.plan(fit)
        cost = self.cost(plan)
        return None if cost is None else Candidate(fit=fit, plan=plan, cost=cost)


def fitted_plan(
    device: torch.device, inputs: PlanInputs, measured: Measurements | None = None
) -> tuple[Plan, dict[str, Origin]]:
    """Plan a job, measure a step of it, and change what does not fit.

    1. Memory: where a step takes more than `memory_share` of it, half the batch, then shorter patches.
    2. Time: with a budget, the largest network and patch of the ladder that leaves `ENOUGH_STEPS` steps; where the
       usual one leaves too few (`TOO_FEW_STEPS`), a smaller one. `MEASURING_SHARE` limits the time for finding out.

    What the user or a recipe fixed is not changed; where it does not fit, that is said. A job that starts from earlier
    weights keeps the patch and batch they were trained with.

    Args:
        device: measures the steps.
        inputs: what the job is planned from.
        measured: steps that were measured before, those of this plan to be added; None: none.

    Returns:
        As `make_plan`.
    """
    fitting = Fitting(inputs=inputs, device=device, measured=measured or Measurements())
    begun = Fit()
    if (earlier := inputs.earlier) is not None:
        rule = "as in the round whose weights it starts from"
        begun = Fit(batch_size=earlier.batch_size, roi_size=earlier.roi_size, rule=rule)
    fit, candidate = _in_memory(fitting, begun)
    if candidate is None:
        return make_plan(inputs, fit)
    if candidate.fit == Fit() and inputs.budget_s is not None:
        candidate = _in_time(fitting, candidate, inputs.budget_s)
    cost, memory_gib = candidate.cost, candidate.cost.memory_gib + _kept_gib(inputs, candidate.plan)
    return make_plan(
        inputs, replace(candidate.fit, step_s=cost.step_s, memory_gib=memory_gib, channels_last=cost.channels_last)
    )


def cache_gib(plan: Plan, fingerprint: Fingerprint, num_cases: int) -> float:
    """The cache of one preprocessing: float16 images and uint8 labels at the median size."""
    shape = resampled_shape((1, 1, 1), fingerprint.size_mm_seen(cropped=plan.crop_foreground), plan.resample_resolution)
    per_voxel = 2 * len(plan.channels) + (len(plan.classes) if plan.sigmoid else 1)
    return math.prod(shape) * per_voxel * num_cases / 2**30


def _kept_gib(inputs: PlanInputs, plan: Plan) -> float:
    """Memory that the cached cases of a job take from its steps: on a CPU both are the process' own."""
    if inputs.hardware.on_gpu or plan.cache != "ram":
        return 0.0
    most_gib = plan.cache_gib if plan.cache_gib is not None else MEMORY_SHARE * inputs.hardware.memory_gib
    return min(cache_gib(plan, inputs.fingerprint, inputs.fingerprint.num_cases), most_gib)


def _in_memory(fitting: Fitting, fit: Fit) -> tuple[Fit, Candidate | None]:
    """Make a plan smaller until a step fits memory.

    Returns:
        What had to be changed, and the plan that fits, or that is fixed though it is too large; None: not even a step
        of that could be made.
    """
    inputs, limit_gib = fitting.inputs, fitting.limit_gib
    memory_gib = inputs.hardware.memory_gib
    rule = f"a step of more takes over {inputs.settings.memory_share:.0%} of {memory_gib:.1f} GiB (measured)"
    while True:
        plan = fitting.plan(fit)
        cost = fitting.cost(plan)
        candidate = None if cost is None else Candidate(fit=fit, plan=plan, cost=cost)
        if cost is not None and cost.memory_gib <= limit_gib:
            return fit, candidate
        less = _smaller(fitting, plan, fit, rule)
        if less is None:
            takes = "more memory than there is" if cost is None else f"{cost.memory_gib:.1f} GiB"
            fixed = " and ".join(sorted(fitting.fixed & {"batch_size", "roi_size"})) or "patch and batch"
            text = "%s: a step takes %s, and %s are fixed. Give a smaller batch_size or roi_size."
            log.warning(text, inputs.algo, takes, fixed)
            return fit, candidate
        fit = less


def _smaller(fitting: Fitting, plan: Plan, fit: Fit, rule: str) -> Fit | None:
    """Half the batch, then a patch shorter along its longest axis; None: nothing is left to make smaller."""
    if plan.batch_size > fitting.processes and "batch_size" not in fitting.fixed:
        return replace(fit, batch_size=math.ceil(plan.batch_size / 2), rule=rule)
    roi = None if "roi_size" in fitting.fixed else shorter_roi(plan.roi_size, divisor(plan))
    return None if roi is None else replace(fit, roi_size=roi, rule=rule)


def _time_of_lower(fitting: Fitting, taken: Plan, lower: Plan) -> float:
    """A guess at the time of a lower rung's step over that of the one above.

    A network whose width is that of the weights it starts from is made no smaller: its patches alone are.
    """
    voxels = math.prod(lower.roi_size) * lower.batch_size / (math.prod(taken.roi_size) * taken.batch_size)
    return min(1.0, voxels) if fitting.inputs.start is not None else LOWER_RUNG


def _in_time(fitting: Fitting, usual: Candidate, budget_s: float) -> Candidate:
    """The rung of the network's ladder that leaves enough steps of the budget."""
    training_s = TRAINING_SHARE * budget_s
    on_gpu = fitting.inputs.hardware.on_gpu
    rungs = network_file(usual.plan.algo).GPU_RUNGS if on_gpu else network_file(usual.plan.algo).RUNGS
    taken = usual

    def differs(other: Plan) -> bool:
        """Whether a rung's plan is another than the one taken, for all that the user fixed."""
        return (other.network, other.roi_size) != (taken.plan.network, taken.plan.roi_size)

    for size in range(-1, rungs.start - 1, -1):
        if training_s >= TOO_FEW_STEPS[on_gpu] * taken.cost.step_s:
            break
        fit = Fit(size=size)
        plan = fitting.plan(fit)
        if not differs(plan):
            continue
        if fitting.left_s > 0 or fitting.has_measured(plan):
            taken = fitting.measure(fit) or taken
        elif (share := _time_of_lower(fitting, taken.plan, plan)) < 1:
            cost = replace(taken.cost, step_s=share * taken.cost.step_s)
            taken = Candidate(fit=fit, plan=plan, cost=cost)
    for size in range(1, rungs.stop):
        # A larger network takes no less time: without spare time it need not be measured.
        if training_s < ENOUGH_STEPS * taken.cost.step_s or fitting.left_s <= 0:
            break
        if not differs(fitting.plan(Fit(size=size))):
            continue
        larger = fitting.measure(Fit(size=size))
        if larger is None or larger.cost.memory_gib > fitting.limit_gib:
            break
        if training_s < ENOUGH_STEPS * larger.cost.step_s:
            break
        taken = larger
    return taken
