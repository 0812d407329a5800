"""`autoseg plan`: what a run will take, before a day is spent on it; from step times measured on this machine."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from autoseg.config.load import load_settings
from autoseg.config.networks import AlgoName
from autoseg.config.settings import Settings
from autoseg.config.units import format_duration
from autoseg.data.datalists.cases import Datalist
from autoseg.errors import counted
from autoseg.pipeline.job_costs import Cost, Measuring
from autoseg.pipeline.networks import with_networks
from autoseg.pipeline.pretraining_plans import Name, job_plan, left_out, likely_job_s
from autoseg.pipeline.worker import planned_settings
from autoseg.workspace.jobs import Job
from autoseg.workspace.pretraining import lessons
from autoseg.workspace.scratch import scratch_place
from autoseg.workspace.settings import read_settings
from autoseg.workspace.workspace import Workspace

if TYPE_CHECKING:
    from autoseg.plan import Plan

log = logging.getLogger(__name__)

DEVICE_COUNTS = (1, 4, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What the open jobs of a run take together."""

    costs: Mapping[str, Cost]
    """Job -> cost; jobs that are done are left out."""
    pretraining: Mapping[str, Cost] = field(default_factory=dict)
    """The same of jobs of pretraining, all of which come first."""
    done: int
    device: str
    preparing_s: float
    """Seconds to fill the cache on this machine's cores."""
    cache_gib: float
    models_gib: float

    def seconds_on(self, num_devices: int) -> float:
        """Until all is trained with so many devices like this one, a job on each, in the launcher's order."""
        stages = (self.pretraining, self.costs)
        return self.preparing_s + sum(makespan([c.seconds for c in costs.values()], num_devices) for costs in stages)


def makespan(seconds: Sequence[float], num_devices: int) -> float:
    """When the last job ends if each in turn goes to the device that is free first."""
    free = [0.0] * num_devices
    for job_s in seconds:
        heapq.heappush(free, heapq.heappop(free) + job_s)
    return max(free)


def plan_run(input_path: Path, overrides: Mapping[str, str]) -> str:
    """Analyze and plan a run as far as that is not done, measure, and tell what it will take.

    Jobs that start from a pretraining which is not done cannot be planned to the end: they are measured by the plan
    that they would have without it, which is not stored.

    Raises:
        AutosegError: What the user can repair.
    """
    from autoseg.pipeline.run import run_input

    run_input(("analyze", "pretrain"), input_path, overrides, plans_alone=True)
    workspace = Workspace(load_settings(input_path, overrides)[0].work_dir)
    ahead = open_pretrainings(workspace)
    if not ahead:
        run_input(("generate",), input_path, overrides)
    with workspace.lock():
        place = workspace.latest()
        settings = with_networks(place, planned_settings(workspace), anew=False)  # as the plans that were just made
        text = forecast_text(make_forecast(place, settings, ahead), settings)
        if workspace.num_rounds > 1:
            text += f"\nThis is round {place.round} of {workspace.num_rounds}; others take about as long."
        return text


def open_pretrainings(workspace: Workspace) -> list[Name]:
    """Those that the run's settings ask for, and that are planned and not done."""
    from autoseg.pretraining.job import is_done

    settings = with_networks(workspace, planned_settings(workspace), anew=False)
    if left_out(settings):
        return []
    asked = [algo for algo in settings.networks if settings.is_pretrained(algo)]
    planned = [(algo, fold) for name, fold in lessons(workspace) for algo in asked if algo == name]
    return [name for name in planned if not is_done(workspace, settings.dataroot, *name)]


def make_forecast(workspace: Workspace, settings: Settings, ahead: Sequence[Name] = ()) -> Forecast:
    """Measure each kind of job for some seconds, and take the time of those that have run.

    Args:
        workspace: of the run or a round.
        settings: with `algos` settled.
        ahead: pretrainings that come first.
    """
    from autoseg.hardware.facts import find_hardware

    measuring = Measuring(workspace, settings)
    datalist, twins = measuring.datalist, scratch_place(workspace)
    folds = settings.folds or tuple(range(datalist.num_fold))
    jobs = [workspace.read_job(algo, fold) for fold in folds for algo in settings.networks]
    waiting = {algo for algo, _ in ahead}
    pretraining = {f"pretrain {algo}_{fold}": measuring.pretraining(algo, fold) for algo, fold in ahead}
    plans = _plans(workspace, settings, datalist, jobs, waiting)
    costs: dict[str, Cost] = {}
    done = 0
    for job in jobs:
        plan = plans[job.name]
        measuring.note_cache(plan, len(datalist.training))
        is_done = job.state == "done" and job.algo not in waiting
        done += is_done
        if not is_done:
            costs[job.name] = measuring.training(plan, job.fold)
        starts = settings.is_pretrained(job.algo) or settings.first_weights(job.algo) is not None
        if settings.compare_scratch and starts and twins.read_job(job.algo, job.fold).state != "done":
            costs[f"{job.name} from scratch"] = measuring.training(plan, job.fold)
    return Forecast(
        costs=costs,
        pretraining=pretraining,
        done=done,
        device=find_hardware(measuring.device).name,
        preparing_s=measuring.preparing_s,
        cache_gib=sum(gib for _, gib in measuring.caches.values()),
        # The model, and while a job runs its checkpoint: model, average, and two moments at most.
        models_gib=5 * measuring.model_gib * (len(costs) + done + len(pretraining)),
    )


def _plans(
    workspace: Workspace, settings: Settings, datalist: Datalist, jobs: Sequence[Job], waiting: Collection[AlgoName]
) -> dict[str, Plan]:
    """Job -> its plan: that of its folder, or one for the time that is likely to be left to it.

    Args:
        waiting: networks whose pretraining is not done. Where there are any, all jobs are planned here.
    """
    from autoseg.algos.inputs import planning
    from autoseg.plan import read_plan

    if not waiting:
        return {job.name: read_plan(workspace.job_dir(job.algo, job.fold)) for job in jobs}
    origins = {key: item.origin for key, item in read_settings(Workspace(workspace.run)).items()}
    likely_s = likely_job_s(settings, len(jobs))
    plans = {}
    for waits in (True, False):
        names = [(job.algo, job.fold) for job in jobs if (job.algo in waiting) == waits]
        for inputs in planning(workspace, datalist, settings, origins, names, likely_s, keeps_starts=not waits):
            plans[f"{inputs.algo}_{inputs.fold}"] = job_plan(inputs, workspace)
    return plans


def forecast_text(forecast: Forecast, settings: Settings) -> str:
    """The forecast as a table."""
    if not forecast.costs:
        return f"Nothing to do: {counted(forecast.done, 'job is', 'jobs are')} done."
    rows = [("Job", "s/step", "Validation", "Memory", "Time")]
    for name, cost in {**forecast.pretraining, **forecast.costs}.items():
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
    costs = [*forecast.pretraining.values(), *forecast.costs.values()]
    total = sum(cost.seconds for cost in costs)
    done = f", {forecast.done} done already" if forecast.done else ""
    first = f"{len(forecast.pretraining)} to pretrain, then " if forecast.pretraining else ""
    jobs = f"{first}{counted(len(forecast.costs), 'job')} to train{done}"
    memory = max(cost.memory_gib for cost in costs)
    lines += [
        "",
        f"{jobs}: {format_duration(total)} of {forecast.device} in all",
        f"Memory: up to {memory:.1f} GiB a job; disk: cache {forecast.cache_gib:.2f} GiB, models and checkpoints "
        f"{forecast.models_gib:.2f} GiB",
        f"Filling the cache: about {format_duration(forecast.preparing_s)} on this machine's cores",
        "",
        "Devices like this  Until all is trained",
    ]
    lines += [f"{count:>17}  {format_duration(forecast.seconds_on(count))}" for count in DEVICE_COUNTS]
    lines += ["", "Ensemble and predictions come after that. `--budget 2h` keeps a run within any time."]
    return "\n".join(lines)
