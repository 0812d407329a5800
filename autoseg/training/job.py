"""One training job from its plan to its scores: the idempotent unit of work that everything else schedules.

    autoseg train --work_dir W --algo A --fold F

on any machine that sees W; torchrun starts it on several devices. A claim with a heartbeat keeps two workers from one
job; the job of a dead worker is taken over and goes on from its checkpoint.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoseg.config.reader import read_model
from autoseg.config.settings import TrackSettings
from autoseg.config.units import format_duration
from autoseg.data.datalists.cases import Case, images_digest
from autoseg.data.datalists.datalist import read_cases
from autoseg.errors import AutosegError, counted
from autoseg.hardware.cores import following
from autoseg.inference.seals import check_jobs, seal_job
from autoseg.networks import checked_plan
from autoseg.plan import Plan, read_plan
from autoseg.training.cache import load_cases, remove_unused, resampling_warnings
from autoseg.training.errors import Diverged
from autoseg.training.inputs import (
    cases_for,
    job_inputs,
    only_prediction_changed,
    reasons_to_train,
    training_digest,
    weights_inputs,
)
from autoseg.training.job_run import JobRun, run_claimed
from autoseg.training.processes import of_first
from autoseg.training.progress import Progress, TrainResult
from autoseg.training.scoring import compare_precision, score_validation, time_scoring
from autoseg.training.search import search_for_job, wants_search
from autoseg.training.trainer import DIVERGED_STEPS, Trainer
from autoseg.training.validation import DIVERGED_DICE
from autoseg.weights.start import log_table, read_start
from autoseg.weights.tables import keep_table
from autoseg.workspace.budget import read_afterwards
from autoseg.workspace.files import digest
from autoseg.workspace.jobs import Job
from autoseg.workspace.workspace import Workspace

log = logging.getLogger(__name__)

FEW_STEPS = 60
"""Under which a job with a budget is warned of. Source: the shortest schedule that gave a usable model of phantoms."""


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

    def make(job: Job, **common: Any) -> TrainingRun:
        options: dict[str, Any] = {"dataroot": dataroot, "num_workers": num_workers, "after_epoch": after_epoch}
        return TrainingRun(job, track=track, **options, **common)

    return run_claimed(workspace, algo, fold, make, device=device, wait=wait, started=started)


class TrainingRun(JobRun):
    """One start of a job, by one of its processes."""

    def __init__(
        self,
        job: Job,
        *,
        dataroot: Path,
        num_workers: int | None,
        started: float,
        after_epoch: Callable[[Progress, float], None] | None,
        **common: Any,
    ) -> None:
        """Set up; arguments as `run_job` takes them, the others as `JobRun`."""
        super().__init__(job, started=started, **common)
        self.dataroot, self.num_workers, self.after_epoch = dataroot, num_workers, after_epoch
        self.first_weights = self.workspace.first_weights(job.algo, job.fold)
        self.weights = weights_inputs(self.workspace, job.algo, job.fold)

    # -- what is to be done
    def work(self) -> None:
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
        self._note_images(train_cases)
        self.begin(inputs)
        log.info(
            "%s: training on %s, validating on %d, %s",
            job.name, counted(len(train_cases), "case"), len(val_cases), self.processes.device,
        )  # fmt: skip
        self.follow(plan, len(train_cases), len(val_cases))
        result = self._train(plan, train_cases, val_cases)
        self._finish(plan, val_cases, result)

    def _score_again(self, plan: Plan, val_cases: tuple[Case, ...], inputs: dict[str, str]) -> None:
        """The weights are as wanted, but the model predicts in another way now."""
        check_jobs([self.paths])
        self.note("running")
        if self.processes.is_first:
            log.info("%s: Dice %.4f", self.job.name, self._score(plan, val_cases))
        self.job.inputs = inputs
        self.note("done")

    def _search(self, plan: Plan, train_cases: tuple[Case, ...]) -> Plan:
        """Search the network's topology, by the first process; the plan that has it."""
        self.note("running")
        if self.processes.is_first:
            cached = load_cases(self.workspace.cache, plan, train_cases, num_workers=self.num_workers)
            took_s = search_for_job(plan, cached, self.paths, self.processes.device, self.first_weights)
            # What an earlier start spent on the search counts, too.
            self.started = min(self.started, time.monotonic() - took_s)
        of_first(None)  # the others wait for the topology
        return read_plan(self.paths)

    def _train(self, plan: Plan, train_cases: tuple[Case, ...], val_cases: tuple[Case, ...]) -> TrainResult:
        """Train; after a divergence once more, with a lower learning rate."""
        with self.memory:
            return self._train_watched(plan, train_cases, val_cases)

    def _train_watched(self, plan: Plan, train_cases: tuple[Case, ...], val_cases: tuple[Case, ...]) -> TrainResult:
        job, paths = self.job, self.paths
        if self.processes.is_first:
            tidy_cache(self.workspace, self.dataroot)
        cached = load_cases(self.workspace.cache, plan, (*train_cases, *val_cases), num_workers=self.num_workers)
        self.warn([*resampling_warnings(cached[: len(train_cases)], plan), *self._leaks(val_cases)])

        def make(changes: Mapping[str, Any], started: float) -> Trainer:
            trainer = Trainer(
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
                after_epoch=self.epoch_ended,
                follower=self.follower,
            )
            trainer.validator.later_s = read_afterwards(self.workspace, job.name).seconds
            return trainer

        return self.train_or_restart(plan, make)

    def _start(self, network: nn.Module, plan: Plan) -> Collection[str]:
        """Put the weights that the job starts from, if any, into its fresh network, and account for them.

        Returns:
            Names of the weights that are fine-tuned: those that all come from elsewhere; none of an earlier round.
        """
        if self.first_weights is not None:
            network.load_state_dict(torch.load(self.first_weights, map_location="cpu", weights_only=True))
            return ()
        start = read_start(self.workspace, self.job.algo, self.job.fold)
        table = None if start is None else start.load(network, plan)
        if self.processes.is_first:
            keep_table(self.paths, table)
            if table is not None and not self.paths.checkpoint.exists():  # else it was said when the job began
                log_table(self.job.name, table)
        return () if table is None else table.loaded

    def _leaks(self, val_cases: tuple[Case, ...]) -> list[str]:
        """A warning where the weights that the job starts from have seen cases that it is judged by."""
        start = None if self.first_weights is not None else read_start(self.workspace, self.job.algo, self.job.fold)
        if start is None:
            return []
        warnings = []
        learned = [case for case in val_cases if start.learned_from([training_digest(case), images_digest(case)])]
        seen = [case for case in val_cases if case not in learned and images_digest(case) in start.start.images_seen]
        if learned:
            warnings.append(
                f"{start.start.source} has learned from {len(learned)} of the {len(val_cases)} cases of this fold, so "
                "its Dice here says too much. Start from weights of other cases, or judge by cases that neither has "
                "seen."
            )
        if seen:
            warnings.append(
                f"{start.start.source} has learned from the images of {len(seen)} of the {len(val_cases)} cases of "
                "this fold, without their labels, so its Dice here may say a little too much."
            )
        return warnings

    def _note_images(self, train_cases: tuple[Case, ...]) -> None:
        """Note what is learned from, so that other runs that start from the job are warned of it."""
        start = None if self.first_weights is not None else read_start(self.workspace, self.job.algo, self.job.fold)
        earlier = () if start is None else start.start.trained_on
        self.job.learned_from = tuple(sorted({*earlier, *map(images_digest, train_cases)}))
        self.job.images_seen = () if start is None else start.start.images_seen

    def _warn_of_few_steps(self, plan: Plan, result: TrainResult) -> None:
        """Warn of a model that was trained for under `FEW_STEPS`, where its budget ended it."""
        scheduled = plan.num_epochs * plan.num_steps_per_epoch
        if self.processes.is_first and plan.budget_s is not None and result.steps < min(FEW_STEPS, scheduled):
            log.warning(
                "%s: its %s of the budget were enough for %d steps. Under %d a model is rarely of use: look at its "
                "Dice, and give a longer budget, fewer algos or folds, or leave the machine to this run.",
                *(self.job.name, format_duration(plan.budget_s), result.steps, FEW_STEPS),
            )

    def _finish(self, plan: Plan, val_cases: tuple[Case, ...], result: TrainResult) -> None:
        """Score the trained model.

        Raises:
            ConfigError: Its budget left it `FEWEST_STEPS` or less.
            Diverged: It learned nothing.
        """
        job = self.job
        assert self.trainer is not None
        self.check_length(plan, result)
        self._warn_of_few_steps(plan, result)
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
            steps = counted(result.steps, "step")
            log.info("%s: Dice %.4f after %s, %s", job.name, dice, steps, format_duration(job.seconds))
            if self.follower is not None:
                self.follower.summarise({"final/dice": dice, "final/seconds": job.seconds})
                self.follower.attach([self.paths.plan, self.paths.metrics])
        self.note("done")
        # The other processes are through sooner, and until the scores are there it may be needed again; with average
        # and optimizer it takes up to four times the model.
        self.remove(self.paths.checkpoint)

    def _score(self, plan: Plan, val_cases: tuple[Case, ...]) -> float:
        """Score the model as it will predict; its mean Dice."""
        device = self.processes.device
        compared = compare_precision(plan, self.paths, val_cases[0], device)
        begin = time.monotonic()
        with following(self.trainer.threads) if self.trainer is not None else nullcontext():
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
