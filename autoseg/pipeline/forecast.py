"""`autoseg plan`: what a run will take, before a day is spent on it; from step times measured on this machine."""

from __future__ import annotations

import heapq
import logging
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autoseg.config.load import load_settings
from autoseg.config.settings import Settings
from autoseg.config.units import format_duration
from autoseg.data.datalists.cases import Datalist
from autoseg.data.datalists.datalist import read_cases
from autoseg.data.fingerprint import Fingerprint
from autoseg.errors import counted
from autoseg.hardware.limits import available_cores
from autoseg.pipeline.networks import with_networks
from autoseg.workspace.jobs import JobDir
from autoseg.workspace.workspace import Workspace

if TYPE_CHECKING:
    import torch

    from autoseg.plan import Plan
    from autoseg.training.cache import CachedCase

log = logging.getLogger(__name__)

MEASURE_S = 10.0
"""Seconds of training steps that are measured for each kind of job, three steps at least."""
DEVICE_COUNTS = (1, 4, 32)
SCORING = 1.3
"""The final scores take this much of a validation: reading and writing files come on top of the same predictions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one job takes."""

    step_s: float
    """Seconds of a training step."""
    validation_s: float
    """Seconds of a validation of the fold."""
    memory_gib: float
    """Most memory: of the GPU, or of a process on a CPU."""
    seconds: float
    """Of the whole job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What the open jobs of a run take together."""

    costs: Mapping[str, Cost]
    """Job -> cost; jobs that are done are left out."""
    done: int
    device: str
    preparing_s: float
    """Seconds to fill the cache on this machine's cores."""
    cache_gib: float
    models_gib: float

    def seconds_on(self, num_devices: int) -> float:
        """Until all is trained with so many devices like this one, a job on each, in the launcher's order."""
        return self.preparing_s + makespan([cost.seconds for cost in self.costs.values()], num_devices)


def makespan(seconds: Sequence[float], num_devices: int) -> float:
    """When the last job ends if each in turn goes to the device that is free first."""
    free = [0.0] * num_devices
    for job_s in seconds:
        heapq.heappush(free, heapq.heappop(free) + job_s)
    return max(free)


def plan_run(input_path: Path, overrides: Mapping[str, str]) -> str:
    """Analyze and plan a run as far as that is not done, measure, and tell what it will take.

    Raises:
        AutosegError: What the user can repair.
    """
    from autoseg.pipeline.run import run_input

    run_input(("analyze", "generate"), input_path, overrides)
    settings, _ = load_settings(input_path, overrides)
    workspace = Workspace(settings.work_dir)
    with workspace.lock():
        place = workspace.latest()
        settings = with_networks(place, settings, anew=False)  # as the plans that were just made
        text = forecast_text(make_forecast(place, settings), settings)
        if workspace.num_rounds > 1:
            text += f"\nThis is round {place.round} of {workspace.num_rounds}; others take about as long."
        return text


def make_forecast(workspace: Workspace, settings: Settings) -> Forecast:
    """Measure each kind of job for some seconds, and take the time of those that have run.

    Jobs of one network and plan differ by their fold alone, so one of them is measured.
    """
    from autoseg.algos.fit import cache_gib
    from autoseg.hardware.device import pick_device
    from autoseg.hardware.facts import find_hardware
    from autoseg.plan import read_plan

    device = pick_device(settings.device)
    datalist = read_cases(workspace, settings.dataroot)
    fingerprint = Fingerprint.read(workspace.datastats)
    folds = settings.folds or tuple(range(datalist.num_fold))
    jobs = [workspace.read_job(algo, fold) for fold in folds for algo in settings.networks]
    costs: dict[str, Cost] = {}
    measured: dict[str, tuple[float, float, float]] = {}
    caches: dict[str, float] = {}
    models = prepare_s = 0.0
    for job in jobs:
        plan = read_plan(workspace.job_dir(job.algo, job.fold))
        kind = plan.model_copy(update={"fold": 0, "seed": 0}).model_dump_json()
        caches[repr(plan.preprocessing)] = cache_gib(plan, fingerprint, len(datalist.training))
        if job.state == "done":
            continue
        num_val = len(datalist.val_cases(job.fold))
        if kind not in measured:
            log.info("plan: measuring %s", job.algo)
            step_s, predict_s, memory_gib, size_gib, one_s = _measure(workspace, plan, datalist, device)
            models += size_gib
            measured[kind] = step_s, predict_s, memory_gib
            prepare_s = max(prepare_s, one_s)
        step_s, predict_s, memory_gib = measured[kind]
        costs[job.name] = _cost(plan, step_s, predict_s * num_val, memory_gib)
    per_model = models / max(1, len(measured))
    return Forecast(
        costs=costs,
        done=len(jobs) - len(costs),
        device=find_hardware(device).name,
        preparing_s=prepare_s * len(caches) * len(datalist.training) / (settings.num_workers or available_cores()),
        cache_gib=sum(caches.values()),
        # The model, and while a job runs its checkpoint: model, average, and two moments at most.
        models_gib=5 * per_model * len(jobs),
    )


def _cost(plan: Plan, step_s: float, validation_s: float, memory_gib: float) -> Cost:
    steps = plan.num_epochs * plan.num_steps_per_epoch
    validations = math.ceil(plan.num_epochs / plan.num_epochs_per_validation)
    seconds = steps * step_s + validations * validation_s + SCORING * validation_s
    if plan.budget_s is not None:
        seconds = min(seconds, plan.budget_s)
    return Cost(step_s=step_s, validation_s=validation_s, memory_gib=memory_gib, seconds=seconds)


def _measure(
    workspace: Workspace, plan: Plan, datalist: Datalist, device: torch.device
) -> tuple[float, float, float, float, float]:
    """Train for some seconds on one case, as a job would.

    Returns:
        Seconds of a step; seconds to predict a case; memory in GiB; the model's size in GiB; seconds to preprocess a
        case on one core, 0 where it was in the cache already.
    """
    from autoseg.hardware.memory import MemoryWatch
    from autoseg.training.cache import load_cases
    from autoseg.training.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder, MemoryWatch(device) as memory:
        begin = time.monotonic()
        case: list[CachedCase] = load_cases(workspace.cache, plan, datalist.val_cases(plan.fold)[:1], num_workers=1)
        prepare_s = time.monotonic() - begin
        trainer = Trainer(plan.model_copy(update={"budget_s": None}), case, case, JobDir(Path(folder)), device=device)
        trainer.train_step()  # the first allocates and chooses kernels
        times: list[float] = []
        while len(times) < 3 or sum(times) < MEASURE_S:
            begin = time.monotonic()
            trainer.train_step()
            times.append(time.monotonic() - begin)
            if len(times) >= 3 and sum(times) > 0.3 * MEASURE_S and max(times) < 1.2 * min(times):
                break
        begin = time.monotonic()
        trainer.validator.score(case[0])
        predict_s = time.monotonic() - begin
        size = sum(t.numel() * t.element_size() for t in trainer.step.network.state_dict().values()) / 2**30
    return sorted(times)[len(times) // 2], predict_s, memory.peak_gib, size, prepare_s


def forecast_text(forecast: Forecast, settings: Settings) -> str:
    """The forecast as a table."""
    if not forecast.costs:
        return f"Nothing to do: {counted(forecast.done, 'job is', 'jobs are')} done."
    rows = [("Job", "s/step", "Validation", "Memory", "Time")]
    for name, cost in forecast.costs.items():
        rows.append(
            (
                name,
                f"{cost.step_s:.3f}",
                format_duration(cost.validation_s),
                f"{cost.memory_gib:.1f} GiB",
                format_duration(cost.seconds),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    total = sum(cost.seconds for cost in forecast.costs.values())
    done = f", {forecast.done} done already" if forecast.done else ""
    memory = max(cost.memory_gib for cost in forecast.costs.values())
    lines += [
        "",
        f"{counted(len(forecast.costs), 'job')} to train{done}: {format_duration(total)} of {forecast.device} in all",
        f"Memory: up to {memory:.1f} GiB a job; disk: cache {forecast.cache_gib:.2f} GiB, models and checkpoints "
        f"{forecast.models_gib:.2f} GiB",
        f"Filling the cache: about {format_duration(forecast.preparing_s)} on this machine's cores",
        "",
        "Devices like this  Until all is trained",
    ]
    lines += [f"{count:>17}  {format_duration(forecast.seconds_on(count))}" for count in DEVICE_COUNTS]
    lines += ["", "Ensemble and predictions come after that. `--budget 2h` keeps a run within any time."]
    return "\n".join(lines)
