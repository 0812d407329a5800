"""One start of a job of any kind: its claim, its log, its state at every moment, what became of it.

What a kind of job does stands in a class that derives from `JobRun`: job.py trains networks to segment, the room
`pretraining` on images alone.
"""

from __future__ import annotations

import logging
import os
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch

from autoseg.config.settings import TrackSettings
from autoseg.config.units import format_duration
from autoseg.errors import MACHINES_FAULTS, AutosegError, ConfigError, ResourceError
from autoseg.hardware.device import pick_device, resolve_precision
from autoseg.hardware.limits import DEVICE_NAME
from autoseg.hardware.memory import MemoryWatch
from autoseg.inference.seals import ChangedJobsError
from autoseg.plan import Plan
from autoseg.tracking.follow import Follower
from autoseg.tracking.table import check_tracker
from autoseg.tracking.tracker import Ending
from autoseg.training.errors import Diverged, Interrupted, Pruned
from autoseg.training.processes import Processes, of_first
from autoseg.training.progress import Progress, TrainResult
from autoseg.training.schedule import LEAST_TRAINING_SHARE
from autoseg.training.trainer import Trainer
from autoseg.workspace.claims import Busy, Claim, LostClaim
from autoseg.workspace.digests import DIGESTS
from autoseg.workspace.files import log_to
from autoseg.workspace.jobs import Job, JobState
from autoseg.workspace.workspace import Workspace

log = logging.getLogger(__name__)

JOB_SAMPLE_S = 0.05
"""Seconds between two looks at a process' memory while a job trains."""
RESTART_RATE = 0.25
"""A diverged job is tried once more with its learning rate times this. A choice: rates that a factor of two parts are
both fine or both not, as the table of rates in docs/results.md has it."""
FEWEST_STEPS = 10
"""Of a job with a budget: what was trained for less has learned nothing and is no model. A choice."""


ENDINGS: dict[JobState, Ending] = {
    "pending": "stopped",
    "done": "finished",
    "failed": "failed",
    "diverged": "failed",
    "pruned": "finished",
}
"""What a tracker is told of a job's end; a trial that is stopped early has come to its end, too."""


class MakeRun(Protocol):
    """Makes one start of a job."""

    def __call__(self, job: Job, **common: Any) -> JobRun:
        """Args: as `JobRun`."""


def run_claimed(
    workspace: Workspace,
    algo: str,
    fold: int,
    make: MakeRun,
    *,
    device: str,
    wait: bool = False,
    started: float | None = None,
) -> Job:
    """Work on a job to its end, or go on with it, unless another worker has it.

    Its state is in job.json at every moment. A failure is stored and returned, not raised, so that it never stops
    other jobs.

    Args:
        workspace: that the job lies in.
        device: auto, cpu or cuda.
        wait: wait where another worker has the job, instead of raising `Busy`.
        started: monotonic time from which the job's budget counts; None: now.

    Raises:
        Busy: Another worker has the job.
        ChangedJobsError: It is done, but its weights are not those that training left; nothing was changed.
        Interrupted: A signal came; the job is saved as pending and goes on next time.
    """
    started = time.monotonic() if started is None else started
    paths = workspace.job_dir(algo, fold)
    where = pick_device(device)
    processes = Processes.joined(where)
    DIGESTS.open(workspace.digests)
    with ExitStack() as stack:
        claim = None
        if processes.is_first:
            name = os.environ.get(DEVICE_NAME, str(where))
            asked = time.monotonic()
            claim = stack.enter_context(Claim(paths.claims, f"{algo}_{fold}", device=name, wait=wait))
            started += time.monotonic() - asked  # another worker's time is not this one's
        stack.enter_context(log_to(paths.log))
        job = workspace.read_job(algo, fold)
        run = make(job, workspace=workspace, processes=processes, claim=claim, started=started)
        return run.to_its_end()


class JobRun(ABC):
    """One start of a job, by one of its processes: what is to be done, and what became of it."""

    def __init__(
        self,
        job: Job,
        *,
        workspace: Workspace,
        processes: Processes,
        claim: Claim | None,
        started: float,
        track: TrackSettings | None,
    ) -> None:
        """Set up.

        Args:
            job: its state as it was stored.
            claim: on the job; None in processes but the first, which write nothing.
            started: monotonic time from which its budget counts.
            track: where its numbers go besides its folder, if anywhere.
        """
        self.workspace, self.job = workspace, job
        self.paths = workspace.job_dir(job.algo, job.fold)
        self.processes, self.claim, self.started = processes, claim, started
        self.after_epoch: Callable[[Progress, float], None] | None = None
        self.memory = MemoryWatch(processes.device, JOB_SAMPLE_S)
        self.trainer: Trainer | None = None
        self._warm_at: int | None = None
        """Step from which on the peak of memory counts; None: not yet."""
        self.track = track
        self.follower: Follower | None = None

    @abstractmethod
    def work(self) -> None:
        """Find out what is to be done, and do it."""

    # -- what becomes of it
    def to_its_end(self) -> Job:
        """Do what is to be done, and store what became of it. Raises: as `run_claimed`."""
        job = self.job
        try:
            self.work()
        except Interrupted:
            self.note("pending")
            raise
        except (Busy, ChangedJobsError):
            raise
        except LostClaim as error:
            log.error("%s", error)
            return self.workspace.read_job(job.algo, job.fold)  # as the new holder has it
        except Pruned:
            assert self.trainer is not None
            job.seconds = self.trainer.progress.elapsed_s
            self.note("pruned")
            self.remove(self.paths.checkpoint)
        except Diverged as error:
            job.restart = {}
            self.note("diverged", str(error), can_retry=False)
            self.remove(self.paths.checkpoint, self.paths.model)  # of a run that learned nothing
            log.error("%s", error)
        except AutosegError as error:
            self.note("failed", str(error), can_retry=isinstance(error, ResourceError))
            log.error("%s: %s", job.name, " ".join(error.messages))
        except Exception as error:  # one job's bug or lack of memory must not stop the others; its traceback is kept
            if isinstance(error, OSError) and (advice := MACHINES_FAULTS.get(error.errno or 0)):
                place = error.filename2 or error.filename or self.paths.root
                self.note("failed", f"{place}: {error.strerror}. {advice}")
                log.error("%s: %s", job.name, job.error)
            else:
                self.note("failed", f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
                log.exception("%s failed", job.name)
        finally:
            if self.trainer is not None:
                self.trainer.threads.restore()
        return job

    def note(self, state: JobState, error: str = "", *, can_retry: bool = True) -> None:
        """Store the job's state; a tracker is told how it ended."""
        if self.follower is not None and state != "running":
            self.follower.end(ENDINGS[state])
        self.job.state, self.job.error, self.job.can_retry = state, error, can_retry
        if self.claim is not None:
            self.claim.check()
            self.workspace.write_job(self.job)

    def remove(self, *files: Path) -> None:
        """Remove files of the job, by its first process."""
        if self.processes.is_first:
            for path in files:
                path.unlink(missing_ok=True)

    # -- parts of the work
    def follow(self, plan: Plan, num_train: int, num_val: int) -> None:
        """Have a tracker told of the training, where the run has one, by the first process.

        Raises:
            ConfigError: What it needs is not installed here.
        """
        if self.track is None or not self.processes.is_first:
            return
        check_tracker(self.track)
        params = {**plan.model_dump(mode="json"), "cases": {"training": num_train, "validation": num_val}}
        name = self.paths.root.relative_to(self.workspace.tracking.parent).as_posix()
        self.follower = Follower(self.track, self.workspace, name, self.paths.tracking, params)

    def begin(self, inputs: dict[str, str]) -> None:
        """Note that the job is trained from now on."""
        job, claim = self.job, self.claim
        if claim is not None and claim.before.holder is not None and job.state == "running":
            log.info("%s: taking over from %s, which is gone", job.name, claim.before.holder.name)
        job.inputs, job.started, job.dice, job.memory_gib = inputs, time.time(), None, None
        job.starts += 1
        self.note("running")
        self.remove(self.paths.seal)  # what it covers is about to change

    def warn(self, warnings: Sequence[str]) -> None:
        """Log warnings and keep them for the report."""
        self.job.warnings = tuple(warnings)
        if warnings and self.processes.is_first:
            for warning in warnings:
                log.warning("%s: %s", self.job.name, warning)
            self.note("running")

    def train_or_restart(self, plan: Plan, make: Callable[[Mapping[str, Any], float], Trainer]) -> TrainResult:
        """Train; after a divergence once more, with a lower learning rate.

        Args:
            make: the trainer for changes of the plan, and the monotonic time from which its budget counts.

        Raises:
            Diverged: It did so again.
        """
        job, paths = self.job, self.paths

        def train(changes: Mapping[str, Any], started: float) -> TrainResult:
            self.trainer = make(changes, started)
            return self.trainer.run()

        lost_s = 0.0
        try:
            result = train(job.restart, self.started)
        except Diverged as error:
            if job.restart:
                raise
            assert self.trainer is not None
            lost_s = self.trainer.progress.elapsed_s
            job.restart = of_first(_restart(plan, lost_s, self.processes.device))
            log.warning(
                "%s Starting once more with learning_rate %g%s.", str(error).split(" Lower")[0],
                job.restart["learning_rate"], " in fp32" if "precision" in job.restart else "",
            )  # fmt: skip
            self.remove(paths.checkpoint, paths.model)
            self.note("running")
            of_first(None)  # no process looks for the checkpoint before it is gone
            result = train(job.restart, time.monotonic())
        job.seconds = lost_s + result.seconds
        if self._warm_at is None or result.steps > self._warm_at:
            job.memory_gib = self.memory.peak_gib
        return result

    def epoch_ended(self, progress: Progress, score: float) -> None:
        """Note that the job gets on; what a GPU's search for kernels took in the first epoch is not in its peak."""
        job = self.job
        if self.claim is not None and (job.starts or job.memory_gib is None):
            job.starts, job.memory_gib = 0, self.memory.peak_gib
            self.workspace.write_job(job)
        if self._warm_at is None and not progress.ended:
            self.memory.forget_warm_up()
            self._warm_at = progress.step
        if self.after_epoch is not None:
            self.after_epoch(progress, score)

    def check_length(self, plan: Plan, result: TrainResult) -> None:
        """Refuse what was hardly trained.

        Raises:
            ConfigError: Its budget left it fewer than `FEWEST_STEPS`.
        """
        scheduled = plan.num_epochs * plan.num_steps_per_epoch
        if plan.budget_s is not None and result.steps < min(FEWEST_STEPS, scheduled):
            raise ConfigError(
                f"{self.job.name}: its {format_duration(plan.budget_s)} of the budget were enough for {result.steps} "
                f"of the {FEWEST_STEPS} steps that a model needs at least, so the job is not done. Give a longer "
                "budget, fewer algos or folds, or leave the machine to this run."
            )


def _restart(plan: Plan, spent_s: float, device: torch.device) -> dict[str, Any]:
    """What a diverged job's second try changes in its plan: a lower learning rate, and the time that is left.

    On a CPU also fp32 instead of bf16, whose kernels have been wrong before (`repair_bf16`).
    """
    changes: dict[str, Any] = {"learning_rate": plan.learning_rate * RESTART_RATE}
    if device.type == "cpu" and resolve_precision(device, plan.precision) == "bf16":
        changes["precision"] = "fp32"
    if plan.budget_s is not None:
        changes["budget_s"] = max(plan.budget_s - spent_s, LEAST_TRAINING_SHARE * plan.budget_s)
    return changes
