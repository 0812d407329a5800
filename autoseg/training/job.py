"""One training job from its plan to its scores: the idempotent unit of work that everything else schedules.

    autoseg train --work_dir W --algo A --fold F

on any machine that sees W; torchrun starts it on several devices. A claim with a heartbeat keeps two workers from one
job; the job of a dead worker is taken over and goes on from its checkpoint.
"""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoseg.config.reader import read_model
from autoseg.config.settings import TrackSettings
from autoseg.config.units import format_duration
from autoseg.data.datalists.cases import Case
from autoseg.data.datalists.datalist import read_cases
from autoseg.errors import MACHINES_FAULTS, AutosegError, ConfigError, ResourceError
from autoseg.hardware.device import pick_device, resolve_precision
from autoseg.hardware.memory import MemoryWatch
from autoseg.inference.seals import ChangedJobsError, check_jobs, seal_job
from autoseg.networks import checked_plan
from autoseg.plan import Plan, read_plan
from autoseg.tracking.follow import Follower
from autoseg.tracking.table import check_tracker
from autoseg.tracking.tracker import Ending
from autoseg.training.cache import load_cases, remove_unused, resampling_warnings
from autoseg.training.errors import Diverged, Interrupted, Pruned
from autoseg.training.inputs import (
    cases_for,
    job_inputs,
    only_prediction_changed,
    reasons_to_train,
    training_digest,
    weights_inputs,
)
from autoseg.training.processes import Processes, of_first
from autoseg.training.progress import Progress, TrainResult
from autoseg.training.schedule import LEAST_TRAINING_SHARE
from autoseg.training.scoring import compare_precision, score_validation, time_scoring
from autoseg.training.search import search_for_job, wants_search
from autoseg.training.trainer import DIVERGED_DICE, DIVERGED_STEPS, Trainer
from autoseg.weights.start import log_table, read_start
from autoseg.weights.tables import keep_table
from autoseg.workspace.claims import Busy, Claim, LostClaim
from autoseg.workspace.digests import DIGESTS
from autoseg.workspace.files import digest, log_to
from autoseg.workspace.jobs import Job, JobState
from autoseg.workspace.workspace import Workspace

log = logging.getLogger(__name__)


JOB_SAMPLE_S = 0.05
"""Seconds between two looks at a process' memory while a job trains."""


DEVICE_NAME = "AUTOSEG_DEVICE_NAME"
"""Environment variable in which a launcher says what `autoseg status` is to call the device."""

RESTART_RATE = 0.25
"""A diverged job is tried once more with its learning rate times this. A choice: rates that a factor of two parts are
both fine or both not, as the table of rates in docs/results.md has it."""


ENDINGS: dict[JobState, Ending] = {
    "pending": "stopped",
    "done": "finished",
    "failed": "failed",
    "diverged": "failed",
    "pruned": "finished",
}
"""What a tracker is told of a job's end; a trial that is stopped early has come to its end, too."""

FEWEST_STEPS = 10
"""Of a job with a budget: what was trained for less has learned nothing and is no model. A choice; the shortest
schedule that gave a usable model of phantoms had 60 steps."""


def run_job(
    workspace: Workspace,
    dataroot: Path,
    algo: str,
    fold: int,
    *,
    device: str,
    num_workers: int | None,
    wait: bool = False,
    started: float | None = None,
    after_epoch: Callable[[Progress, float], None] | None = None,
    track: TrackSettings | None = None,
) -> Job:
    """Train one job to its end, or go on with it; one that is done is left as it is.

    Its state is in job.json at every moment. A failure is stored and returned, not raised, so that it never stops
    other jobs.

    Args:
        device: auto, cpu or cuda.
        num_workers: threads for preprocessing; None: the job's share of the cores, as far as memory allows.
        wait: wait where another worker has the job, instead of raising `Busy`.
        started: monotonic time from which the job's budget counts; None: now.
        after_epoch: as `Trainer` takes it; may raise `Pruned`.
        track: where its numbers go besides its folder, if anywhere.

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
        run = JobRun(
            workspace,
            dataroot,
            workspace.read_job(algo, fold),
            processes=processes,
            claim=claim,
            num_workers=num_workers,
            started=started,
            after_epoch=after_epoch,
            track=track,
        )
        return run.to_its_end()


class JobRun:
    """One start of a job, by one of its processes: what is to be done, and what became of it."""

    def __init__(
        self,
        workspace: Workspace,
        dataroot: Path,
        job: Job,
        *,
        processes: Processes,
        claim: Claim | None,
        num_workers: int | None,
        started: float,
        after_epoch: Callable[[Progress, float], None] | None,
        track: TrackSettings | None,
    ) -> None:
        """Set up; arguments as `run_job` takes them.

        Args:
            job: its state as it was stored.
            claim: on the job; None in processes but the first, which write nothing.
        """
        self.workspace, self.dataroot, self.job = workspace, dataroot, job
        self.paths = workspace.job_dir(job.algo, job.fold)
        self.processes, self.claim, self.num_workers = processes, claim, num_workers
        self.started, self.after_epoch, self.track = started, after_epoch, track
        self.follower: Follower | None = None
        self.memory = MemoryWatch(processes.device, JOB_SAMPLE_S)
        self.first_weights = workspace.first_weights(job.algo, job.fold)
        self.weights = weights_inputs(workspace, job.algo, job.fold)
        self.trainer: Trainer | None = None

    # -- what becomes of it
    def to_its_end(self) -> Job:
        """Do what is to be done, and store what became of it. Raises: as `run_job`."""
        job = self.job
        try:
            self._work()
        except Interrupted:
            self._note("pending")
            raise
        except (Busy, ChangedJobsError):
            raise
        except LostClaim as error:
            log.error("%s", error)
            return self.workspace.read_job(job.algo, job.fold)  # as the new holder has it
        except Pruned:
            assert self.trainer is not None
            job.seconds = self.trainer.progress.elapsed_s
            self._note("pruned")
            self._remove(self.paths.checkpoint)
        except Diverged as error:
            job.restart = {}
            self._note("diverged", str(error), can_retry=False)
            self._remove(self.paths.checkpoint, self.paths.model)  # of a run that learned nothing
            log.error("%s", error)
        except AutosegError as error:
            self._note("failed", str(error), can_retry=isinstance(error, ResourceError))
            log.error("%s: %s", job.name, error)
        except Exception as error:  # one job's bug or lack of memory must not stop the others; its traceback is kept
            if isinstance(error, OSError) and (advice := MACHINES_FAULTS.get(error.errno or 0)):
                place = error.filename2 or error.filename or self.paths.root
                self._note("failed", f"{place}: {error.strerror}. {advice}")
                log.error("%s: %s", job.name, job.error)
            else:
                self._note("failed", f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
                log.exception("%s failed", job.name)
        return job

    def _note(self, state: JobState, error: str = "", *, can_retry: bool = True) -> None:
        if self.follower is not None and state != "running":
            self.follower.end(ENDINGS[state])
        self.job.state, self.job.error, self.job.can_retry = state, error, can_retry
        if self.claim is not None:
            self.claim.check()
            self.workspace.write_job(self.job)

    def _remove(self, *files: Path) -> None:
        if self.processes.is_first:
            for path in files:
                path.unlink(missing_ok=True)

    # -- what is to be done
    def _work(self) -> None:
        """Find out what is to be done, and do it."""
        job, paths = self.job, self.paths
        plan = checked_plan(paths)
        datalist = read_cases(self.workspace, self.dataroot)
        train_cases = cases_for(plan, datalist.train_cases(job.fold))
        val_cases = cases_for(plan, datalist.val_cases(job.fold))
        inputs = job_inputs(plan, train_cases, val_cases, self.weights)
        reasons = reasons_to_train(job, inputs, paths)
        if of_first(job.state == "done" and not reasons):
            check_jobs([paths])
            log.info("train: %s is done (Dice %.4f)", job.name, job.dice or 0.0)
            return
        if of_first(only_prediction_changed(job, inputs, paths)):
            log.info("%s: %s; scoring its model again", job.name, ", ".join(reasons))
            self._score_again(plan, val_cases, inputs)
            return
        begun = paths.checkpoint.exists() or job.state in ("running", "pending")
        job.restart = of_first(job.restart if begun and not reasons else {})
        if of_first(wants_search(plan, paths)):
            plan = self._search(plan, train_cases)
            inputs = job_inputs(plan, train_cases, val_cases, self.weights)
        self._begin(inputs)
        log.info(
            "%s: training on %d cases, validating on %d, %s",
            job.name, len(train_cases), len(val_cases), self.processes.device,
        )  # fmt: skip
        self._follow(plan, len(train_cases), len(val_cases))
        result = self._train(plan, train_cases, val_cases)
        self._finish(plan, val_cases, result)

    def _score_again(self, plan: Plan, val_cases: tuple[Case, ...], inputs: dict[str, str]) -> None:
        """The weights are as wanted, but the model predicts in another way now."""
        check_jobs([self.paths])
        self._note("running")
        if self.processes.is_first:
            log.info("%s: Dice %.4f", self.job.name, self._score(plan, val_cases))
        self.job.inputs = inputs
        self._note("done")

    def _search(self, plan: Plan, train_cases: tuple[Case, ...]) -> Plan:
        """Search the network's topology, by the first process; the plan that has it."""
        self._note("running")
        if self.processes.is_first:
            cached = load_cases(self.workspace.cache, plan, train_cases, num_workers=self.num_workers)
            took_s = search_for_job(plan, cached, self.paths, self.processes.device, self.first_weights)
            # What an earlier start spent on the search counts, too.
            self.started = min(self.started, time.monotonic() - took_s)
        of_first(None)  # the others wait for the topology
        return read_plan(self.paths)

    def _begin(self, inputs: dict[str, str]) -> None:
        """Note that the job is trained from now on."""
        job, claim = self.job, self.claim
        if claim is not None and claim.before.holder is not None and job.state == "running":
            log.info("%s: taking over from %s, which is gone", job.name, claim.before.holder.name)
        job.inputs, job.started, job.dice, job.memory_gib = inputs, time.time(), None, None
        job.starts += 1
        self._note("running")
        self._remove(self.paths.seal)  # what it covers is about to change

    def _follow(self, plan: Plan, num_train: int, num_val: int) -> None:
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

    def _train(self, plan: Plan, train_cases: tuple[Case, ...], val_cases: tuple[Case, ...]) -> TrainResult:
        """Train; after a divergence once more, with a lower learning rate."""
        with self.memory:
            return self._train_watched(plan, train_cases, val_cases)

    def _train_watched(self, plan: Plan, train_cases: tuple[Case, ...], val_cases: tuple[Case, ...]) -> TrainResult:
        job, paths = self.job, self.paths
        if self.processes.is_first:
            tidy_cache(self.workspace, self.dataroot)
        cached = load_cases(self.workspace.cache, plan, (*train_cases, *val_cases), num_workers=self.num_workers)
        self._warn([*resampling_warnings(cached[: len(train_cases)], plan), *self._leaks(val_cases)])

        def train(changes: Mapping[str, Any], started: float) -> TrainResult:
            self.trainer = trainer = Trainer(
                plan.model_copy(update=dict(changes)),
                cached[: len(train_cases)],
                cached[len(train_cases) :],
                paths,
                device=self.processes.device,
                scoring=lambda index: time_scoring(trainer, paths, val_cases[index]),
                started=started,
                inputs=digest(job.inputs),
                start=lambda network: self._start(network, plan),
                before_write=self.claim.check if self.claim is not None else lambda: None,
                after_epoch=self._epoch_ended,
                follower=self.follower,
            )
            return trainer.run()

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
            self._remove(paths.checkpoint, paths.model)
            self._note("running")
            of_first(None)  # no process looks for the checkpoint before it is gone
            result = train(job.restart, time.monotonic())
        job.seconds, job.memory_gib = lost_s + result.seconds, self.memory.peak_gib
        return result

    def _start(self, network: nn.Module, plan: Plan) -> None:
        """Put the weights that the job starts from, if any, into its fresh network, and account for them."""
        if self.first_weights is not None:
            network.load_state_dict(torch.load(self.first_weights, map_location="cpu", weights_only=True))
            return
        start = read_start(self.workspace, self.job.algo)
        table = None if start is None else start.load(network, plan)
        if self.processes.is_first:
            keep_table(self.paths, table)
            if table is not None and not self.paths.checkpoint.exists():  # else it was said when the job began
                log_table(self.job.name, table)

    def _leaks(self, val_cases: tuple[Case, ...]) -> list[str]:
        """A warning where the weights that the job starts from have seen cases that it is judged by."""
        start = None if self.first_weights is not None else read_start(self.workspace, self.job.algo)
        num = 0 if start is None else start.seen_in_training([training_digest(case) for case in val_cases])
        if start is None or not num:
            return []
        return [
            f"{start.start.source} has learned from {num} of the {len(val_cases)} cases of this fold, so its Dice here "
            "says too much. Start from weights of other cases, or judge by cases that neither has seen."
        ]

    def _warn(self, warnings: Sequence[str]) -> None:
        """Log warnings and keep them for the report."""
        self.job.warnings = tuple(warnings)
        if warnings and self.processes.is_first:
            for warning in warnings:
                log.warning("%s: %s", self.job.name, warning)
            self._note("running")

    def _epoch_ended(self, progress: Progress, dice: float) -> None:
        job = self.job
        if self.claim is not None and (job.starts or job.memory_gib is None):
            job.starts, job.memory_gib = 0, self.memory.peak_gib
            self.workspace.write_job(job)
        if self.after_epoch is not None:
            self.after_epoch(progress, dice)

    def _finish(self, plan: Plan, val_cases: tuple[Case, ...], result: TrainResult) -> None:
        """Score the trained model.

        Raises:
            ConfigError: Its budget left it `FEWEST_STEPS` or less.
            Diverged: It learned nothing.
        """
        job = self.job
        assert self.trainer is not None
        scheduled = plan.num_epochs * plan.num_steps_per_epoch
        if plan.budget_s is not None and result.steps < min(FEWEST_STEPS, scheduled):
            raise ConfigError(
                f"{job.name}: its {format_duration(plan.budget_s)} of the budget were enough for {result.steps} of the "
                f"{FEWEST_STEPS} steps that a model needs at least, so the job is not done. Give a longer budget, "
                "fewer algos or folds, or leave the machine to this run."
            )
        if plan.memory_gib is not None and job.memory_gib is not None:
            log.info("%s: peak memory %.2f GiB, planned %.2f GiB", job.name, job.memory_gib, plan.memory_gib)
        if self.processes.is_first:
            dice = self._score(plan, val_cases)
            job.seconds += time.monotonic() - self.trainer.clock
            if dice < DIVERGED_DICE and result.steps >= DIVERGED_STEPS:
                raise Diverged(
                    f"{job.name}: Dice {dice:.4f} at the end of the schedule: nothing was learned. "
                    f"Lower learning_rate ({plan.learning_rate:g}) in {self.paths.plan.name} and train again."
                )
            seal_job(self.paths)
            log.info("%s: Dice %.4f after %d steps, %s", job.name, dice, result.steps, format_duration(job.seconds))
            if self.follower is not None:
                self.follower.summarise({"final/dice": dice, "final/seconds": job.seconds})
                self.follower.attach([self.paths.plan, self.paths.metrics])
        self._note("done")
        # The other processes are through sooner, and until the scores are there it may be needed again; with average
        # and optimizer it takes up to four times the model.
        self._remove(self.paths.checkpoint)

    def _score(self, plan: Plan, val_cases: tuple[Case, ...]) -> float:
        """Score the model as it will predict; its mean Dice."""
        device = self.processes.device
        compared = compare_precision(plan, self.paths, val_cases[0], device)
        begin = time.monotonic()
        self.job.dice = dice = score_validation(plan, self.paths, val_cases, device, compared)
        self.job.inference_s = (time.monotonic() - begin) / len(val_cases)
        return dice


def tidy_cache(workspace: Workspace, dataroot: Path) -> None:
    """Remove what the cache of a run holds for cases and plans that it has no longer; where in doubt, nothing."""
    run = Workspace(workspace.cache.parent)
    try:
        plans = [read_model(path, Plan) for path in run.root.glob("**/configs/hyper_parameters.yaml")]
        listed = [read_cases(place, dataroot) for place in run.rounds() or [run]]
        cases = [case for datalist in listed for case in datalist.training]
        removed = remove_unused(run.cache, plans, [*cases, *(case.for_training() for case in cases)])
    except (AutosegError, OSError) as error:  # the job that it belongs to says so
        log.debug("the cache is left as it is: %s", error)
        return
    if removed:
        log.info("cache: %d entries removed that no case or plan of the run needs any more", removed)


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
