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
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from autoseg.config.units import format_duration
from autoseg.data.datalists.cases import Case
from autoseg.data.datalists.datalist import read_cases
from autoseg.errors import AutosegError, ResourceError
from autoseg.hardware.device import pick_device, resolve_precision
from autoseg.hardware.limits import available_cores
from autoseg.hardware.memory import MemoryWatch
from autoseg.plan import Plan, read_plan
from autoseg.training.cache import load_cases
from autoseg.training.errors import Diverged, Interrupted, Pruned
from autoseg.training.inputs import cases_for, job_inputs, only_prediction_changed
from autoseg.training.progress import Progress, TrainResult
from autoseg.training.schedule import LEAST_TRAINING_SHARE
from autoseg.training.scoring import _time_scoring, compare_precision, score_validation
from autoseg.training.search import search_for_job, wants_search
from autoseg.training.trainer import DIVERGED_DICE, DIVERGED_STEPS, Trainer
from autoseg.workspace.claims import Busy, Claim, LostClaim
from autoseg.workspace.files import digest, log_to
from autoseg.workspace.jobs import Job, JobState
from autoseg.workspace.workspace import Workspace, changed

log = logging.getLogger(__name__)


JOB_SAMPLE_S = 0.05
"""Seconds between two looks at a process' memory while a job trains."""

Shared = TypeVar("Shared")

DEVICE_NAME = "AUTOSEG_DEVICE_NAME"
"""Environment variable in which a launcher says what `autoseg status` is to call the device."""

RESTART_RATE = 0.25
"""A diverged job is tried once more with its learning rate times this. A choice: rates that a factor of two parts are
both fine or both not, as the table of rates in docs/results.md has it."""


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
) -> Job:
    """Train one job to its end, or go on with it; one that is done is left as it is.

    Its state is in job.json at every moment. A failure is stored and returned, not raised, so that it never stops
    other jobs.

    Args:
        device: auto, cpu or cuda.
        num_workers: threads for preprocessing; None: one per core.
        wait: wait where another worker has the job, instead of raising `Busy`.
        started: monotonic time from which the job's budget counts; None: now.
        after_epoch: as `Trainer` takes it; may raise `Pruned`.

    Raises:
        Busy: Another worker has the job.
        Interrupted: A signal came; the job is saved as pending and goes on next time.
    """
    started = time.monotonic() if started is None else started
    trainer: Trainer
    paths = workspace.job_dir(algo, fold)
    rank = dist.get_rank() if dist.is_initialized() else 0
    where = pick_device(device)
    with ExitStack() as stack:
        claim = None
        if rank == 0:
            name = os.environ.get(DEVICE_NAME, str(where))
            asked = time.monotonic()
            claim = stack.enter_context(Claim(paths.claims, f"{algo}_{fold}", device=name, wait=wait))
            started += time.monotonic() - asked  # another worker's time is not this one's
        stack.enter_context(log_to(paths.log))
        job = workspace.read_job(algo, fold)
        memory = MemoryWatch(where, JOB_SAMPLE_S)

        def note(state: JobState, error: str = "", *, can_retry: bool = True) -> None:
            job.state, job.error, job.can_retry = state, error, can_retry
            if claim is not None:
                claim.check()
                workspace.write_job(job)

        def epoch_ended(progress: Progress, dice: float) -> None:
            if claim is not None and (job.starts or job.memory_gib is None):
                job.starts, job.memory_gib = 0, memory.peak_gib
                workspace.write_job(job)
            if after_epoch is not None:
                after_epoch(progress, dice)

        def score(plan: Plan, val_cases: tuple[Case, ...]) -> float:
            compared = compare_precision(plan, paths, val_cases[0], where)
            begin = time.monotonic()
            job.dice = dice = score_validation(plan, paths, val_cases, where, compared)
            job.inference_s = (time.monotonic() - begin) / len(val_cases)
            return dice

        try:
            plan = read_plan(paths)
            datalist = read_cases(workspace, dataroot)
            train_cases = cases_for(plan, datalist.train_cases(fold))
            val_cases = cases_for(plan, datalist.val_cases(fold))
            first_weights = workspace.first_weights(algo, fold)
            inputs = job_inputs(plan, train_cases, val_cases, first_weights)
            reasons = changed(job.inputs, inputs)
            if _of_first(job.state == "done" and not reasons):
                log.info("train: %s is done (Dice %.4f)", job.name, job.dice or 0.0)
                return job
            if _of_first(only_prediction_changed(job, inputs, paths)):
                log.info("%s: %s; scoring its model again", job.name, ", ".join(reasons))
                note("running")
                if rank == 0:
                    score(plan, val_cases)
                    log.info("%s: Dice %.4f", job.name, job.dice)
                job.inputs = inputs
                note("done")
                return job
            begun = paths.checkpoint.exists() or job.state in ("running", "pending")
            job.restart = _of_first(job.restart if begun and not reasons else {})
            workers = num_workers or available_cores()
            if _of_first(wants_search(plan, paths)):
                note("running")
                if rank == 0:
                    cached = load_cases(workspace.cache, plan, train_cases, num_workers=workers)
                    # What an earlier start spent on the search counts, too.
                    started = min(started, time.monotonic() - search_for_job(plan, cached, paths, where, first_weights))
                _of_first(None)
                plan = read_plan(paths)
                inputs = job_inputs(plan, train_cases, val_cases, first_weights)
            if claim is not None and claim.before.holder is not None and job.state == "running":
                log.info("%s: taking over from %s, which is gone", job.name, claim.before.holder.name)
            job.inputs, job.started, job.dice, job.starts, job.memory_gib = (
                inputs,
                time.time(),
                None,
                job.starts + 1,
                None,
            )
            note("running")
            log.info(
                "%s: training on %d cases, validating on %d, %s", job.name, len(train_cases), len(val_cases), where
            )
            stack.enter_context(memory)
            cached = load_cases(workspace.cache, plan, (*train_cases, *val_cases), num_workers=workers)

            def train(plan: Plan, started: float) -> TrainResult:
                nonlocal trainer
                trainer = Trainer(
                    plan,
                    cached[: len(train_cases)],
                    cached[len(train_cases) :],
                    paths,
                    device=where,
                    scoring=lambda index: _time_scoring(trainer, paths, val_cases[index]),
                    started=started,
                    inputs=digest(inputs),
                    first_weights=first_weights,
                    before_write=claim.check if claim is not None else lambda: None,
                    after_epoch=epoch_ended,
                )
                return trainer.run()

            try:
                result = train(plan.model_copy(update=job.restart), started)
                lost_s = 0.0
            except Diverged as error:
                if job.restart:
                    raise
                lost_s = trainer.progress.elapsed_s
                job.restart = _of_first(_restart(plan, lost_s, where))
                log.warning(
                    "%s Starting once more with learning_rate %g%s.", str(error).split(" Lower")[0],
                    job.restart["learning_rate"], " in fp32" if "precision" in job.restart else "",
                )  # fmt: skip
                if rank == 0:
                    for path in (paths.checkpoint, paths.model):
                        path.unlink(missing_ok=True)
                note("running")
                _of_first(None)  # no process looks for the checkpoint before it is gone
                result = train(plan.model_copy(update=job.restart), time.monotonic())
            job.seconds, job.memory_gib = lost_s + result.seconds, memory.peak_gib
            if plan.memory_gib is not None:
                log.info("%s: peak memory %.2f GiB, planned %.2f GiB", job.name, job.memory_gib, plan.memory_gib)
            if rank == 0:
                dice = score(plan, val_cases)
                job.seconds += time.monotonic() - trainer.clock
                if dice < DIVERGED_DICE and result.steps >= DIVERGED_STEPS:
                    raise Diverged(
                        f"{job.name}: Dice {dice:.4f} at the end of the schedule: nothing was learned. "
                        f"Lower learning_rate ({plan.learning_rate:g}) in {paths.plan.name} and train again."
                    )
                log.info(
                    "%s: Dice %.4f after %d steps, %s", job.name, job.dice, result.steps, format_duration(job.seconds)
                )
            note("done")
            if rank == 0:  # the others are through sooner, and until the scores are there it may be needed again
                paths.checkpoint.unlink(missing_ok=True)  # with average and optimizer up to four times the model
        except Interrupted:
            note("pending")
            raise
        except Pruned:
            job.seconds = trainer.progress.elapsed_s
            note("pruned")
            if rank == 0:
                paths.checkpoint.unlink(missing_ok=True)
        except Busy:
            raise
        except LostClaim as error:
            log.error("%s", error)
            return workspace.read_job(algo, fold)  # as the new holder has it
        except Diverged as error:
            job.restart = {}
            note("diverged", str(error), can_retry=False)
            if rank == 0:  # what a run that learned nothing has kept is no model
                for path in (paths.checkpoint, paths.model):
                    path.unlink(missing_ok=True)
            log.error("%s", error)
        except AutosegError as error:
            note("failed", str(error), can_retry=isinstance(error, ResourceError))
            log.error("%s: %s", job.name, error)
        except Exception as error:  # one job's bug or lack of memory must not stop the others; its traceback is kept
            note("failed", f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
            log.exception("%s failed", job.name)
    return job


def _restart(plan: Plan, spent_s: float, device: torch.device) -> dict[str, Any]:
    """What a diverged job's second try changes in its plan: a lower learning rate, and the time that is left.

    On a CPU also fp32 instead of bf16, whose kernels have been wrong before (`mend_bf16`).
    """
    changes: dict[str, Any] = {"learning_rate": plan.learning_rate * RESTART_RATE}
    if device.type == "cpu" and resolve_precision(device, plan.precision) == "bf16":
        changes["precision"] = "fp32"
    if plan.budget_s is not None:
        changes["budget_s"] = max(plan.budget_s - spent_s, LEAST_TRAINING_SHARE * plan.budget_s)
    return changes


def _of_first(value: Shared) -> Shared:
    """The first process' value, for all processes of a job."""
    if not dist.is_initialized():
        return value
    shared = [value]
    dist.broadcast_object_list(shared, 0)
    return shared[0]


def join_processes(device: str) -> None:
    """Join the other processes of torchrun, where this is one of several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        where = pick_device(device)
        if where.type == "cuda":
            torch.cuda.set_device(where)
        # The others wait for the first while it searches a topology, however long; torchrun ends them if it dies.
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo", timeout=timedelta(days=7))
