"""What a step takes on the actual device, in time and memory, and a plan that fits both.

Autoseg plans by published formulas first (planner.py). Here a real step of that plan is measured, and the plan is
changed where memory, or the time of a budget, allow more or less than the formulas say.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from autoseg.algos.planner import TRAINING_SHARE, Fit, make_plan, recipe_values
from autoseg.data.fingerprint import Fingerprint
from autoseg.data.resampling import resampled_shape
from autoseg.networks import divisor, network_module
from autoseg.networks.sizing import shorter_roi
from autoseg.plan import Origin, Plan
from autoseg.training.cache import MEMORY_SHARE
from autoseg.training.step import StepCost, measure_step

log = logging.getLogger(__name__)


LEAST_STEPS = 2000
"""Steps that a budget must leave for a larger network, patch or batch to be taken.
Source: plain loops on the hippocampus, where 24 filters overtook 16 after about so many steps."""

TOO_FEW_STEPS = 300
"""Steps that a budget must leave, or a smaller network is taken. Source: SegResNet, 13 organs at 4 mm, runs of eight
minutes: 86 steps of the usual size 0.629 Dice, 273 of a smaller one 0.803, 616 of the smallest 0.828; hippocampus, 3
minutes: 226 steps with 16 filters 0.8736, 549 with 8 0.8762."""

DATA_SHARE = 0.05
"""Share of all voxels that a batch may hold at most. Source: nnU-Net."""


CostOf = Callable[[Plan], StepCost | None]
"""What a step of a plan takes on the device at hand; None where memory does not suffice."""

_measured: dict[str, StepCost | None] = {}


def _cost(plan: Plan, device: torch.device, processes: int) -> StepCost | None:
    """As `measure_step` for one process' share of the batch; plans that a step cannot tell apart are measured once."""
    plan = plan.model_copy(update={"batch_size": max(1, plan.batch_size // processes)})
    keys = ("algo", "network", "roi_size", "batch_size", "precision", "loss", "optimizer", "sigmoid")
    values = plan.model_dump(mode="json")
    known = json.dumps([str(device), len(plan.channels), plan.num_outputs, *(values[key] for key in keys)])
    if known not in _measured:
        _measured[known] = measure_step(plan, device)
    return _measured[known]


def fitted_plan(device: torch.device, **known: Any) -> tuple[Plan, dict[str, Origin]]:
    """Plan a job, measure a step of it, and change what does not fit; arguments as `make_plan`'s.

    1. Memory: where a step takes more than `memory_share` of it, half the batch, then shorter patches.
    2. Time: with a budget on a CPU, the largest network and patch of the ladder that leaves `LEAST_STEPS` steps; where
       the usual one leaves fewer than `TOO_FEW_STEPS`, a smaller one.
    3. On a GPU, patches are added until memory is filled to `memory_share`, up to nnU-Net's 5 % of all voxels a batch.

    What the user or a recipe fixed is not changed; where it does not fit, that is said. A job that starts from earlier
    weights keeps the patch and batch they were trained with.
    """
    algo, settings, hardware, budget_s = (known[k] for k in ("algo", "settings", "hardware", "budget_s"))
    earlier: Plan | None = known.get("earlier")
    processes: int = settings.gpus_per_job
    given = {*settings.hyper(algo), *recipe_values(settings, algo)}
    limit_gib = settings.memory_share * hardware.memory_gib
    cost_of = partial(_cost, device=device, processes=processes)
    fit = Fit()
    if earlier is not None:
        rule = "as in the round whose weights it starts from"
        fit = Fit(batch_size=earlier.batch_size, roi_size=earlier.roi_size, rule=rule)
    plan, _ = make_plan(**known, fit=fit)
    cost = cost_of(plan)
    while cost is None or cost.memory_gib > limit_gib:
        rule = f"a step of more takes over {settings.memory_share:.0%} of {hardware.memory_gib:.1f} GiB (measured)"
        less = _smaller(plan, fit, given, rule, processes)
        if less is None:
            takes = "more memory than there is" if cost is None else f"{cost.memory_gib:.1f} GiB"
            log.warning(
                "%s: a step takes %s, and %s are fixed. Give a smaller batch_size or roi_size.",
                algo, takes, " and ".join(sorted(given & {"batch_size", "roi_size"})) or "patch and batch",
            )  # fmt: skip
            break
        fit = less
        plan, _ = make_plan(**known, fit=fit)
        cost = cost_of(plan)
    if cost is not None and fit == Fit():
        if not hardware.on_gpu and budget_s is not None:
            fit, plan, cost = _in_time(cost_of, known, plan, cost, limit_gib)
        elif hardware.on_gpu and "batch_size" not in given:
            fit, plan, cost = _filled(cost_of, known, plan, cost, limit_gib)
    if cost is None:
        return make_plan(**known, fit=fit)
    cached = 0.0
    if not hardware.on_gpu and plan.cache == "ram":
        cached = cache_gib(plan, known["fingerprint"], known["fingerprint"].num_cases)
        cached = min(cached, plan.cache_gib if plan.cache_gib is not None else MEMORY_SHARE * hardware.memory_gib)
    return make_plan(**known, fit=replace(fit, step_s=cost.step_s, memory_gib=cost.memory_gib + cached))


def cache_gib(plan: Plan, fingerprint: Fingerprint, num_cases: int) -> float:
    """The cache of one preprocessing: float16 images and uint8 labels at the median size."""
    shape = resampled_shape((1, 1, 1), fingerprint.size_mm_median, plan.resample_resolution)
    per_voxel = 2 * len(plan.channels) + (len(plan.classes) if plan.sigmoid else 1)
    return math.prod(shape) * per_voxel * num_cases / 2**30


def _smaller(plan: Plan, fit: Fit, given: set[str], rule: str, processes: int) -> Fit | None:
    """Half the batch, then a patch shorter along its longest axis; None: nothing is left to make smaller."""
    if plan.batch_size > processes and "batch_size" not in given:
        return replace(fit, batch_size=math.ceil(plan.batch_size / 2), rule=rule)
    roi = None if "roi_size" in given else shorter_roi(plan.roi_size, divisor(plan))
    return None if roi is None else replace(fit, roi_size=roi, rule=rule)


def _in_time(
    cost_of: CostOf, known: dict[str, Any], plan: Plan, cost: StepCost, limit_gib: float
) -> tuple[Fit, Plan, StepCost]:
    """The rung of the network's ladder that leaves enough steps of the budget."""
    training_s = TRAINING_SHARE * known["budget_s"]
    rungs = network_module(plan.algo).RUNGS
    fit = Fit()

    def differs(other: Plan) -> bool:
        return (other.network, other.roi_size) != (plan.network, plan.roi_size)

    for size in range(-1, rungs.start - 1, -1):
        if training_s >= TOO_FEW_STEPS * cost.step_s:
            break
        smaller, _ = make_plan(**known, fit=Fit(size=size))
        if differs(smaller) and (found := cost_of(smaller)) is not None:
            fit, plan, cost = Fit(size=size), smaller, found
    for size in range(1, rungs.stop):
        # A larger network takes no less time: without spare time it need not be measured.
        if training_s < LEAST_STEPS * cost.step_s:
            break
        larger, _ = make_plan(**known, fit=Fit(size=size))
        if not differs(larger):
            continue
        found = cost_of(larger)
        if found is None or found.memory_gib > limit_gib or training_s < LEAST_STEPS * found.step_s:
            break
        fit, plan, cost = Fit(size=size), larger, found
    return fit, plan, cost


def _filled(
    cost_of: CostOf, known: dict[str, Any], plan: Plan, cost: StepCost, limit_gib: float
) -> tuple[Fit, Plan, StepCost]:
    """As many patches as memory, the size of the data set and a budget allow; never fewer than the formula's."""
    processes = known["settings"].gpus_per_job
    num = plan.batch_size // processes  # patches of one process
    other = 1 if num > 1 else 2
    compared, _ = make_plan(**known, fit=Fit(batch_size=other * processes, rule="to measure"))
    measured = cost_of(compared)
    if measured is None:
        return Fit(), plan, cost
    each_gib = (cost.memory_gib - measured.memory_gib) / (num - other)
    each_s = (cost.step_s - measured.step_s) / (num - other)
    fits = num + int((limit_gib - cost.memory_gib) / max(each_gib, 1e-3))
    shape = resampled_shape((1, 1, 1), known["fingerprint"].size_mm_median, plan.resample_resolution)
    voxels = DATA_SHARE * math.prod(shape) * known["num_train"]
    wanted = min(fits, int(voxels / math.prod(plan.roi_size)) // processes)
    if known["budget_s"] is not None and each_s > 0:
        spare_s = TRAINING_SHARE * known["budget_s"] / LEAST_STEPS - cost.step_s
        wanted = min(wanted, num + int(spare_s / each_s))
    while wanted > num:
        rule = (
            f"fills memory to {known['settings'].memory_share:.0%} by measurement, with at most 5 % of all voxels "
            "a batch (nnU-Net) and enough steps in the budget"
        )
        fit = Fit(batch_size=wanted * processes, rule=rule)
        larger, _ = make_plan(**known, fit=fit)
        found = cost_of(larger)
        if found is not None and found.memory_gib <= limit_gib:
            return fit, larger, found
        wanted = (wanted + num) // 2
    return Fit(), plan, cost
