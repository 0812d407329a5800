"""One trial of a sweep: its values drawn, its folds trained, the study told how it went."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autoseg.config.networks import AlgoName
from autoseg.config.settings import Settings
from autoseg.data.datalists.cases import Datalist
from autoseg.errors import AutosegError
from autoseg.pipeline.training_jobs import MOST_STARTS
from autoseg.workspace.files import write_text
from autoseg.workspace.jobs import Job
from autoseg.workspace.stored import write_stored
from autoseg.workspace.workspace import Workspace

if TYPE_CHECKING:
    from optuna.trial import Trial

    from autoseg.sweep.study import Study
    from autoseg.training.progress import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep as one of its workers sees it."""

    workspace: Workspace
    """The run's, whose cases and cache all trials share."""
    settings: Settings
    origins: Mapping[str, str]
    datalist: Datalist
    study: Study
    until: float | None
    """Seconds since 1970 at which the trials that run are stopped; None: no end."""

    @property
    def is_over(self) -> bool:
        """Whether its time is up."""
        return self.until is not None and time.time() > self.until


def run_trial(sweep: Sweep, trial: Trial) -> None:
    """Train one trial's folds and tell the study how it went: done, stopped early, or failed."""
    from optuna.trial import TrialState

    algo, values = sweep.study.space.suggest(trial)
    place = _begin(sweep, trial, algo, values)
    jobs: list[Job] = []
    for number, fold in enumerate(sweep.settings.sweep.folds):
        if fault := _plan_fold(sweep, trial, place, algo, fold, values):
            _fail(sweep, trial, fault)
            return
        job = _train_fold(sweep, trial, place, algo, fold, is_first=number == 0)
        jobs.append(job)
        trial.set_user_attr("epochs", sum(_num_epochs(place, j) for j in jobs))
        if job.state == "pruned":
            sweep.study.optuna.tell(trial, state=TrialState.PRUNED)
            log.info("sweep: trial %d is stopped early", trial.number)
            return
        if job.state != "done":
            _fail(sweep, trial, job.error or job.state)
            return
    results = {"dice": _mean([j.dice for j in jobs]), "inference_s": _mean([j.inference_s for j in jobs])}
    sweep.study.optuna.tell(trial, [results[name] for name in sweep.settings.sweep.objectives])
    log.info("sweep: trial %d: Dice %.4f", trial.number, results["dice"])


def with_values(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """Settings with a trial's values, dotted under a network; they win over all others."""
    data = json.loads(settings.model_dump_json())
    for key, value in values.items():
        block, _, name = key.rpartition(".")
        (data[block] if block else data)[name] = value
    return Settings.model_validate(data)


def _begin(sweep: Sweep, trial: Trial, algo: AlgoName, values: Mapping[str, Any]) -> Workspace:
    """Make the trial's folder, with its settings as JSON and as `autoseg run --settings` takes them."""
    from autoseg.sweep.results import TrialFile, settings_text

    place = Workspace(sweep.study.trial_folder(trial.number), data_of=sweep.workspace)
    stored = TrialFile(number=trial.number, algo=algo, settings={"algo": algo, **values})
    write_stored(place.root / "trial.json", stored)
    text = settings_text(algo, values, f"trial {trial.number} of the sweep {sweep.settings.sweep.study}")
    write_text(place.root / "settings.yaml", text)
    shown = ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
    )
    log.info("sweep: trial %d of %d: %s, %s", trial.number + 1, sweep.settings.sweep.trials, algo, shown)
    return place


def _plan_fold(
    sweep: Sweep, trial: Trial, place: Workspace, algo: AlgoName, fold: int, values: Mapping[str, Any]
) -> str:
    """Plan the trial's job of one fold. Returns why it cannot be trained, or an empty text."""
    from autoseg.algos.generate import generate_job
    from autoseg.algos.inputs import planning

    settings = with_values(sweep.settings, values)
    origins = {**sweep.origins, **dict.fromkeys(values, f"sweep trial {trial.number}")}
    try:
        for inputs in planning(sweep.workspace, sweep.datalist, settings, origins, [(algo, fold)]):
            generate_job(place, inputs)
    except AutosegError as error:  # values that do not go together
        return str(error)
    if place.read_job(algo, fold).starts > MOST_STARTS:
        return f"its process died {MOST_STARTS} times before it ended an epoch"
    return ""


def _train_fold(sweep: Sweep, trial: Trial, place: Workspace, algo: AlgoName, fold: int, *, is_first: bool) -> Job:
    """Train the trial's job of one fold; after each epoch it may be stopped."""
    from autoseg.plan import read_plan
    from autoseg.training.job import run_job

    num_epochs = read_plan(place.job_dir(algo, fold)).num_epochs

    def after_epoch(progress: Progress, dice: float) -> None:
        _check_time(sweep)
        if is_first:  # one curve a trial; the other folds would only repeat it
            _report_epoch(sweep, trial, min(1.0, progress.epoch / num_epochs), dice)

    return run_job(
        place,
        sweep.settings.dataroot,
        algo,
        fold,
        device=sweep.settings.device,
        num_workers=sweep.settings.num_workers,
        wait=True,
        after_epoch=after_epoch,
        track=sweep.settings.tracking,
    )


def _check_time(sweep: Sweep) -> None:
    from autoseg.training.errors import Pruned

    if sweep.is_over:
        raise Pruned("the time is up")


def _report_epoch(sweep: Sweep, trial: Trial, share: float, dice: float) -> None:
    """Report an epoch's Dice to the study, where trials may be stopped early.

    Args:
        share: of the schedule that is done, above 0 to 1.
        dice: NaN where the epoch had no validation.

    Raises:
        Pruned: The study stops the trial.
    """
    from autoseg.training.errors import Pruned

    if not sweep.study.is_pruned or math.isnan(dice):
        return
    step = max(1, round(100 * share))
    # A trial that goes on after a stop repeats epochs since its checkpoint; Optuna takes one value a step.
    if step not in sweep.study.optuna.get_trials(deepcopy=False)[trial.number].intermediate_values:
        trial.report(dice, step)
    if trial.should_prune():
        raise Pruned(f"stopped at {step} % of its schedule")


def _fail(sweep: Sweep, trial: Trial, error: str) -> None:
    """Tell the study that the trial failed, and why."""
    from optuna.trial import TrialState

    trial.set_user_attr("error", error)
    sweep.study.optuna.tell(trial, state=TrialState.FAIL)
    log.warning("sweep: trial %d failed: %s", trial.number, error.splitlines()[0])


def _num_epochs(place: Workspace, job: Job) -> int:
    path = place.job_dir(job.algo, job.fold).metrics
    return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0


def _mean(values: list[float | None]) -> float:
    known = [v for v in values if v is not None]
    return sum(known) / len(known)
