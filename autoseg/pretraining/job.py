"""One job of pretraining: the images of a lesson, the trainer, the encoder's weights.

    autoseg pretrain --work_dir W --algo A --fold F

on any machine that sees W, as jobs of training are started; see `autoseg.training.job_run`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoseg.config.settings import TrackSettings
from autoseg.config.units import format_duration
from autoseg.data.datalists.cases import Case, case_digest
from autoseg.data.datalists.datalist import read_datalist
from autoseg.errors import counted
from autoseg.networks import checked_plan
from autoseg.plan import Plan
from autoseg.pretraining.images import images_named
from autoseg.pretraining.tasks import ImageTask
from autoseg.training.cache import load_cases
from autoseg.training.inputs import reasons_to_train
from autoseg.training.job_run import JobRun, run_claimed
from autoseg.training.processes import of_first
from autoseg.training.trainer import Trainer
from autoseg.workspace.files import digest
from autoseg.workspace.jobs import Job, JobDir
from autoseg.workspace.pretraining import Lesson, pretraining_place, read_lesson
from autoseg.workspace.workspace import Workspace

log = logging.getLogger(__name__)


def lesson_inputs(
    plan: Plan, lesson: Lesson, train_cases: tuple[Case, ...], val_cases: tuple[Case, ...]
) -> dict[str, str]:
    """What a pretraining is made from: name -> digest. A difference makes it stale.

    Args:
        train_cases, val_cases: the lesson's, without labels.
    """
    inputs = {f"plan: {key}": digest(value) for key, value in plan.identity().items()}
    how: dict[str, str | float] = {"method": lesson.method}
    how |= {"mask_share": lesson.mask_share, "mask_block": lesson.mask_block} if lesson.method == "mae" else {}
    how |= {"temperature": lesson.temperature} if lesson.method == "contrastive" else {}
    inputs |= {f"pretrain: {key}": digest(value) for key, value in how.items()}
    for role, cases in (("training image", train_cases), ("validation image", val_cases)):
        inputs |= {f"{role} {case.name}": case_digest(case) for case in cases}
    return inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A pretraining as it is planned, and what it is made from now."""

    plan: Plan
    lesson: Lesson
    train_cases: tuple[Case, ...]
    val_cases: tuple[Case, ...]
    inputs: dict[str, str]

    @classmethod
    def read(cls, run: Workspace, dataroot: Path, paths: JobDir) -> Planned:
        """Of one job. Raises: ConfigError: Its plan was edited so that it is not valid, or a case is gone."""
        plan, lesson = checked_plan(paths), read_lesson(paths)
        datalist = read_datalist(run.datalist, dataroot)
        train_cases, val_cases = (images_named(datalist, names) for names in (lesson.training, lesson.validation))
        inputs = lesson_inputs(plan, lesson, train_cases, val_cases)
        return cls(plan=plan, lesson=lesson, train_cases=train_cases, val_cases=val_cases, inputs=inputs)


def is_done(run: Workspace, dataroot: Path, algo: str, fold: int) -> bool:
    """Whether a pretraining was done, and from what it is made from now. Raises: as `Planned.read`."""
    place = pretraining_place(run)
    job, paths = place.read_job(algo, fold), place.job_dir(algo, fold)
    return job.state == "done" and not reasons_to_train(job, Planned.read(run, dataroot, paths).inputs, paths)


def run_pretraining(
    run: Workspace,
    dataroot: Path,
    algo: str,
    fold: int,
    *,
    device: str,
    num_workers: int | None,
    wait: bool = False,
    started: float | None = None,
    track: TrackSettings | None = None,
) -> Job:
    """Pretrain one network, or go on with it; what is done is left as it is.

    Args:
        run: the run's folder.
        fold: of the job's name.
        num_workers: threads for preprocessing; None: the job's share of the cores.
        device, wait, started: as `run_claimed` takes them.
        track: where its numbers go besides its folder, if anywhere.

    Raises:
        Busy, Interrupted: as `run_claimed`.
    """

    def make(job: Job, **common: Any) -> PretrainingRun:
        return PretrainingRun(job, run=run, dataroot=dataroot, num_workers=num_workers, track=track, **common)

    return run_claimed(pretraining_place(run), algo, fold, make, device=device, wait=wait, started=started)


class PretrainingRun(JobRun):
    """One start of a job of pretraining."""

    def __init__(self, job: Job, *, run: Workspace, dataroot: Path, num_workers: int | None, **common: Any) -> None:
        """Set up; arguments as `run_pretraining` takes them, the others as `JobRun`."""
        super().__init__(job, **common)
        self.run, self.dataroot, self.num_workers = run, dataroot, num_workers

    def work(self) -> None:
        """Find out what is to be done, and do it."""
        job, paths = self.job, self.paths
        planned = Planned.read(self.run, self.dataroot, paths)
        reasons = reasons_to_train(job, planned.inputs, paths)
        if of_first(job.state == "done" and not reasons):
            log.info("pretrain: %s is done", job.name)
            return
        begun = paths.checkpoint.exists() or job.state in ("running", "pending")
        job.restart = of_first(job.restart if begun and not reasons else {})
        self.begin(planned.inputs)
        because = f", because {', '.join(reasons)}" if reasons else ""
        log.info("%s: %s, %s%s", job.name, planned.lesson.words, self.processes.device, because)
        self.follow(planned.plan, len(planned.train_cases), len(planned.val_cases))
        with self.memory:
            self._train(planned)
        if self.follower is not None:
            self.follower.attach([paths.plan, paths.metrics])
        self.note("done")
        self.remove(paths.checkpoint)

    def _train(self, planned: Planned) -> None:
        """Train; raises as `train_or_restart` and `check_length`."""
        plan, num_train = planned.plan, len(planned.train_cases)
        cases = (*planned.train_cases, *planned.val_cases)
        cached = load_cases(self.run.cache, plan, cases, num_workers=self.num_workers)

        def make(changes: Mapping[str, Any], started: float) -> Trainer:
            return Trainer(
                plan.model_copy(update=dict(changes)),
                cached[:num_train],
                cached[num_train:],
                self.paths,
                device=self.processes.device,
                task=ImageTask(planned.lesson),
                started=started,
                inputs=digest(self.job.inputs),
                before_write=self.claim.check if self.claim is not None else lambda: None,
                after_epoch=self.epoch_ended,
                follower=self.follower,
            )

        result = self.train_or_restart(plan, make)
        self.check_length(plan, result)
        if self.processes.is_first:
            log.info(
                "%s: L1 %.4f after %s, %s",
                self.job.name, -result.best_score, counted(result.steps, "step"), format_duration(self.job.seconds),
            )  # fmt: skip
