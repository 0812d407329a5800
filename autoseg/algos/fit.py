"""What a step takes on the actual device, in time and memory, and a plan that fits both.

Autoseg plans by published formulas first (planner.py). Here a real step of that plan is measured, and the plan is
changed where memory, or the time of a budget, allow more or less than the formulas say.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import nn

from autoseg.algos.cache import MEMORY_SHARE
from autoseg.algos.device import autocast, resolve_precision, to_device
from autoseg.algos.losses import supervised_loss
from autoseg.algos.networks import build_network, divisor, network_module
from autoseg.algos.plan import Plan
from autoseg.algos.planner import TRAINING_SHARE, Fit, Origin, make_plan, recipe_values
from autoseg.algos.trainer import is_out_of_memory, make_optimizer
from autoseg.data.fingerprint import Fingerprint
from autoseg.data.resampling import resampled_shape

log = logging.getLogger(__name__)

TIMED_STEPS = 2
"""Steps that are timed after one that allocates and chooses kernels; the faster counts."""
LEAST_STEPS = 2000
"""Steps that a budget must leave for a larger network, patch or batch to be taken.
Source: plain loops on the hippocampus, where 24 filters overtook 16 after about so many steps."""
TOO_FEW_STEPS = 300
"""Steps that a budget must leave, or a smaller network is taken. Source: SegResNet, 13 organs at 4 mm in the same seven
minutes: 86 steps of the usual size 0.629 Dice, 273 of a smaller one 0.803, 616 of the smallest 0.828; hippocampus, 3
minutes: 226 steps with 16 filters 0.8736, 549 with 8 0.8762."""
DATA_SHARE = 0.05
"""Share of all voxels that a batch may hold at most. Source: nnU-Net."""
SAMPLE_S = 0.005
"""Seconds between two looks at a process' memory."""
MOST_TIMED_S = 5.0
"""A step that takes longer than this is timed once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """What one training step takes."""

    step_s: float
    """Seconds: forward, loss, backward, optimizer; patches at hand."""
    memory_gib: float
    """Peak: of the GPU as torch reserved it, or of this process on a CPU."""


def reset_peak_memory(device: torch.device) -> None:
    """Let a GPU's peak count from here on; that of a process cannot be reset without others who watch it noticing."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory taken: of the GPU, or on a CPU by this process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


@contextmanager
def watched_memory(device: torch.device) -> Iterator[list[float]]:
    """Measure the peak of memory in a block, in GiB; the list holds it afterwards."""
    found: list[float] = []
    if device.type == "cuda":
        reset_peak_memory(device)
        yield found
        found.append(peak_memory_gib(device))
        return
    process, ended = psutil.Process(), threading.Event()
    most = process.memory_info().rss

    def watch() -> None:
        nonlocal most
        while not ended.wait(SAMPLE_S):
            most = max(most, process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()
        found.append(max(most, process.memory_info().rss) / 2**30)


def bare_step(plan: Plan, device: torch.device) -> Callable[[], None]:
    """A training step of a plan on one fixed batch of noise: no data work, no averaging, no waiting.

    Returns:
        A function that does one step and waits until the device has done it.
    """
    torch.manual_seed(plan.seed)
    network = to_device(build_network(plan).train(), device, plan.precision, trained=True)
    optimizer = make_optimizer(network, plan)
    scaler = torch.amp.GradScaler(device.type, enabled=resolve_precision(device, plan.precision) == "fp16")
    image = torch.randn(plan.batch_size, len(plan.channels), *plan.roi_size, device=device)
    image = image.to(memory_format=torch.channels_last_3d)
    outputs = len(plan.classes) if plan.sigmoid else 1
    highest = 2 if plan.sigmoid else plan.num_outputs
    target = torch.randint(0, highest, (plan.batch_size, outputs, *plan.roi_size), device=device, dtype=torch.uint8)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, plan.precision):
            found = network(image)
        loss = supervised_loss(found, target, sigmoid=plan.sigmoid, loss=plan.loss)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(network.parameters(), plan.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step


def measure_step(plan: Plan, device: torch.device) -> StepCost | None:
    """Time a step and take the peak of memory; None where memory does not suffice."""
    times: list[float] = []
    try:
        with watched_memory(device) as peak:
            step = bare_step(plan, device)
            step()
            while len(times) < TIMED_STEPS and sum(times) < MOST_TIMED_S:
                begin = time.perf_counter()
                step()
                times.append(time.perf_counter() - begin)
        return StepCost(step_s=min(times), memory_gib=peak[0])
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


_measured: dict[str, StepCost | None] = {}


def _cost(plan: Plan, device: torch.device) -> StepCost | None:
    """As `measure_step`; plans that differ in nothing a step notices are measured once."""
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

    What the user or a recipe fixed is not changed; where it does not fit, that is said.
    """
    algo, settings, hardware, budget_s = (known[k] for k in ("algo", "settings", "hardware", "budget_s"))
    given = {*settings.hyper(algo), *recipe_values(settings, algo)}
    limit_gib = settings.memory_share * hardware.memory_gib
    fit = Fit()
    plan, _ = make_plan(**known, fit=fit)
    cost = _cost(plan, device)
    while cost is None or cost.memory_gib > limit_gib:
        rule = f"a step of more takes over {settings.memory_share:.0%} of {hardware.memory_gib:.1f} GiB (measured)"
        less = _smaller(plan, fit, given, rule)
        if less is None:
            takes = "more memory than there is" if cost is None else f"{cost.memory_gib:.1f} GiB"
            log.warning(
                "%s: a step takes %s, and %s are fixed. Give a smaller batch_size or roi_size.",
                algo, takes, " and ".join(sorted(given & {"batch_size", "roi_size"})) or "patch and batch",
            )  # fmt: skip
            break
        fit = less
        plan, _ = make_plan(**known, fit=fit)
        cost = _cost(plan, device)
    if cost is not None and fit == Fit():
        if not hardware.on_gpu and budget_s is not None:
            fit, plan, cost = _in_time(device, known, plan, cost, limit_gib)
        elif hardware.on_gpu and "batch_size" not in given:
            fit, plan, cost = _filled(device, known, plan, cost, limit_gib)
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


def _smaller(plan: Plan, fit: Fit, given: set[str], rule: str) -> Fit | None:
    """Half the batch, then a patch shorter along its longest axis; None: nothing is left to make smaller."""
    if plan.batch_size > 1 and "batch_size" not in given:
        return replace(fit, batch_size=math.ceil(plan.batch_size / 2), rule=rule)
    steps, roi = divisor(plan), list(plan.roi_size)
    wide = [a for a in range(3) if roi[a] > steps[a]]
    if not wide or "roi_size" in given:
        return None
    axis = max(wide, key=lambda a: roi[a])
    roi[axis] -= steps[axis]
    return replace(fit, roi_size=(roi[0], roi[1], roi[2]), rule=rule)


def _in_time(
    device: torch.device, known: dict[str, Any], plan: Plan, cost: StepCost, limit_gib: float
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
        if differs(smaller) and (found := _cost(smaller, device)) is not None:
            fit, plan, cost = Fit(size=size), smaller, found
    for size in range(1, rungs.stop):
        # A larger network takes no less time: without spare time it need not be measured.
        if training_s < LEAST_STEPS * cost.step_s:
            break
        larger, _ = make_plan(**known, fit=Fit(size=size))
        if not differs(larger):
            continue
        found = _cost(larger, device)
        if found is None or found.memory_gib > limit_gib or training_s < LEAST_STEPS * found.step_s:
            break
        fit, plan, cost = Fit(size=size), larger, found
    return fit, plan, cost


def _filled(
    device: torch.device, known: dict[str, Any], plan: Plan, cost: StepCost, limit_gib: float
) -> tuple[Fit, Plan, StepCost]:
    """As many patches as memory, the size of the data set and a budget allow; never fewer than the formula's."""
    one, _ = make_plan(**known, fit=Fit(batch_size=1, rule="to measure"))
    least = _cost(one, device)
    if least is None or plan.batch_size == 1:
        return Fit(), plan, cost
    each_gib = (cost.memory_gib - least.memory_gib) / (plan.batch_size - 1)
    each_s = (cost.step_s - least.step_s) / (plan.batch_size - 1)
    fits = plan.batch_size + int((limit_gib - cost.memory_gib) / max(each_gib, 1e-3))
    shape = resampled_shape((1, 1, 1), known["fingerprint"].size_mm_median, plan.resample_resolution)
    voxels = DATA_SHARE * math.prod(shape) * known["num_train"]
    wanted = min(fits, int(voxels / math.prod(plan.roi_size)))
    if known["budget_s"] is not None and each_s > 0:
        spare_s = TRAINING_SHARE * known["budget_s"] / LEAST_STEPS - cost.step_s
        wanted = min(wanted, plan.batch_size + int(spare_s / each_s))
    while wanted > plan.batch_size:
        rule = (
            f"fills memory to {known['settings'].memory_share:.0%} by measurement, with at most 5 % of all voxels "
            "a batch (nnU-Net) and enough steps in the budget"
        )
        fit = Fit(batch_size=wanted, rule=rule)
        larger, _ = make_plan(**known, fit=fit)
        found = _cost(larger, device)
        if found is not None and found.memory_gib <= limit_gib:
            return fit, larger, found
        wanted = (wanted + plan.batch_size) // 2
    return Fit(), plan, cost
