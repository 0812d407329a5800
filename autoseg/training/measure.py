"""What a training step takes on a device: its time and its peak of memory."""

from __future__ import annotations

import gc
import json
import logging
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch

from autoseg.errors import ResourceError
from autoseg.hardware.device import finish, pick_device
from autoseg.hardware.memory import MemoryWatch
from autoseg.plan import Plan
from autoseg.training.step import bare_step, lacks_memory

log = logging.getLogger(__name__)

TIMED_STEPS = 2
"""Steps that are timed after one that allocates and chooses kernels; the faster counts."""
MOST_TIMED_S = 5.0
"""A step that takes longer than this is timed once."""
BUSY = 1.5
"""On a CPU a step's time over its own work on the threads it has, from which on other work is said to have slowed it.
Alone both are equal within a tenth; beside one busy process for each core it is 2 to 2.5 (SegResNet, SwinUNETR)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """What one training step takes."""

    step_s: float
    """Seconds: forward, loss, backward, optimizer; patches at hand. On a CPU that other work slowed: those it takes
    alone, as far as its own processor time tells."""
    memory_gib: float
    """Peak: of the GPU's tensors once kernels are chosen, or of this process on a CPU."""
    channels_last: bool | None = None
    """Whether that layout was the faster one of a GPU; None: there was no choice."""
    slowed: float = 1.0
    """Times that other work made the step longer while it was measured; 1: not so that it could be told."""
    start_s: float = 0.0
    """Seconds until the process that measured it could begin: Python, its packages and CUDA started."""


def measure_step(plan: Plan, device: torch.device, most_s: float = math.inf) -> StepCost | None:
    """Time a step and take the peak of memory; None where memory does not suffice.

    On a GPU another process does it, so that neither its context nor its memory stays with this one while jobs train.

    Args:
        plan: whose step it is.
        device: where.
        most_s: no further step is begun after so many seconds. On a CPU the first, which also allocates, then counts;
            on a GPU one more is timed in any case, since the first starts libraries and searches kernels for seconds.

    Raises:
        ResourceError: The process that measures on a GPU failed.
    """
    if device.type == "cuda":
        return _measured_apart(plan, device, most_s)
    return measured_here(plan, device, most_s)


def _measured_apart(plan: Plan, device: torch.device, most_s: float) -> StepCost | None:
    """As `measured_here`, by another process, whose start is no part of `most_s`."""
    question = json.dumps({"plan": plan.model_dump(mode="json"), "device": str(device), "most_s": most_s})
    words = [sys.executable, "-m", "autoseg.training.measure"]
    begin = time.perf_counter()
    done = subprocess.run(words, input=question, capture_output=True, text=True, check=False)
    took_s = time.perf_counter() - begin
    if done.returncode != 0:
        # Not tried here: what broke CUDA there would break it in the process that goes on with the run.
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        log.error("%s: measuring a step on %s failed:\n%s", plan.algo, device, done.stderr.strip())
        raise ResourceError(
            f"{plan.algo}: the process that measures a step on {device} ended with code {done.returncode}: "
            f"{said[-1].rstrip('.') if said else 'it said nothing'}. Look at the GPU with `autoseg doctor`, or give "
            "--device cpu."
        )
    answer = json.loads(done.stdout.splitlines()[-1])
    if answer["cost"] is None:
        return None
    return replace(StepCost(**answer["cost"]), start_s=max(0.0, took_s - answer["took_s"]))


def measured_here(plan: Plan, device: torch.device, most_s: float = math.inf) -> StepCost | None:
    """As `measure_step`, by this process; on a GPU the faster of both layouts, where there is time for both."""
    if device.type == "cpu":
        return _measured(plan, device, most_s, None)
    begin, costs = time.perf_counter(), list[StepCost | None]()
    for channels_last in (True, False):
        left_s = most_s - (time.perf_counter() - begin)
        if not costs or left_s > 0:
            costs.append(_measured(plan, device, left_s, channels_last))
    best = min((cost for cost in costs if cost is not None), key=lambda cost: cost.step_s, default=None)
    return best if best is None or len(costs) > 1 else replace(best, channels_last=None)  # there was nothing to compare


def _measured(plan: Plan, device: torch.device, most_s: float, channels_last: bool | None) -> StepCost | None:
    times: list[tuple[float, float]] = []
    memory = MemoryWatch(device)
    begin = time.perf_counter()

    def timed(step: Callable[[], None]) -> tuple[float, float]:
        """Seconds of a step, and this process' processor time in it for each thread."""
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        step()
        finish(device)
        return time.perf_counter() - wall_s, (time.process_time() - cpu_s) / torch.get_num_threads()

    def measure() -> None:
        with memory:
            step = bare_step(plan, device, channels_last)
            first = timed(step)
            memory.forget_warm_up()
            while (
                len(times) < TIMED_STEPS
                and sum(wall_s for wall_s, _ in times) < MOST_TIMED_S
                and (time.perf_counter() - begin < most_s or (device.type == "cuda" and not times))
            ):
                times.append(timed(step))
            if not times:
                times.append(first)

    try:
        lacked = lacks_memory(measure)
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if lacked:
        return None
    wall_s, cpu_s = min(times)
    slowed = wall_s / cpu_s if device.type == "cpu" and wall_s > BUSY * cpu_s > 0 else 1.0
    return StepCost(step_s=wall_s / slowed, memory_gib=memory.peak_gib, channels_last=channels_last, slowed=slowed)


def _answer() -> None:
    """Read a plan from standard input, measure its step, and write what it takes to standard output, as JSON."""
    question = json.load(sys.stdin)
    device = torch.device(question["device"])
    pick_device(device.type)  # computes as jobs do: kernels searched for, TF32, as many threads
    if device.type == "cuda":
        torch.cuda.init()
    begin = time.perf_counter()
    cost = measured_here(Plan.model_validate(question["plan"]), device, question["most_s"])
    took_s = time.perf_counter() - begin
    print(json.dumps({"cost": cost and asdict(cost), "took_s": took_s}))  # noqa: T201 - the answer


if __name__ == "__main__":
    _answer()
