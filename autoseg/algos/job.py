"""One training job from its plan to its scores: the idempotent unit of work that everything else schedules.

    autoseg train --work_dir W --algo A --fold F

on any machine that sees W; torchrun starts it on several devices. A claim with a heartbeat keeps two workers from one
job; the job of a dead worker is taken over and goes on from its checkpoint.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from autoseg.algos.cache import load_cases
from autoseg.algos.device import Precision, pick_device, resolve_precision
from autoseg.algos.fit import JOB_SAMPLE_S, MemoryWatch
from autoseg.algos.plan import PREDICTION, Plan
from autoseg.algos.schedule import LEAST_TRAINING_SHARE
from autoseg.algos.search import search_for_job, wants_search
from autoseg.algos.trainer import (
    DIVERGED_DICE,
    DIVERGED_STEPS,
    Diverged,
    Interrupted,
    Progress,
    Pruned,
    Trainer,
    TrainResult,
    save_weights,
)
from autoseg.claims import Busy, Claim, LostClaim
from autoseg.config import LOCATOR, format_duration
from autoseg.data.datalist import Case, files_digest, read_cases
from autoseg.data.volumes import read_image, read_label, write_volume
from autoseg.errors import AutosegError, ResourceError
from autoseg.inference.metrics import dice_per_class, summarise, to_plain
from autoseg.inference.options import Options
from autoseg.inference.predictor import Predictor
from autoseg.machine import available_cores
from autoseg.reader import read_model
from autoseg.workspace import Job, JobDir, JobState, Workspace, changed, digest, file_digest, log_to, write_json

log = logging.getLogger(__name__)
Shared = TypeVar("Shared")

DEVICE_NAME = "AUTOSEG_DEVICE_NAME"
"""Environment variable in which a launcher says what `autoseg status` is to call the device."""

LEAST_EQUAL = 0.999
"""Share of foreground voxels that must keep their label for a model to be used in half precision."""
RESTART_RATE = 0.25
"""A diverged job is tried once more with its learning rate times this. A choice: rates that a factor of two parts are
both fine or both not, as the table of rates in docs/results.md has it."""


def job_inputs(
    plan: Plan, train_cases: tuple[Case, ...], val_cases: tuple[Case, ...], first_weights: Path | None = None
) -> dict[str, str]:
    """What a job is made from: name -> digest. A difference makes it stale."""
    inputs = {f"plan: {key}": digest(value) for key, value in (plan.identity() | plan.prediction()).items()}
    for role, cases in (("training case", train_cases), ("validation case", val_cases)):
        inputs.update({f"{role} {c.name}": _case_digest(c) for c in cases})
    if first_weights is not None:
        inputs["weights of the previous round"] = file_digest(first_weights)
    return inputs


def only_prediction_changed(job: Job, inputs: dict[str, str], paths: JobDir) -> bool:
    """Whether a job was trained to its end, and what changed since is how its model predicts, not its weights."""
    if job.dice is None or not paths.model.exists():
        return False
    differing = {key for key in {*job.inputs, *inputs} if job.inputs.get(key) != inputs.get(key)}
    return bool(differing) and differing <= {f"plan: {key}" for key in PREDICTION}


def cases_for(plan: Plan, cases: tuple[Case, ...]) -> tuple[Case, ...]:
    """The cases that a plan can learn from, annotated for its classes where it merges those of the user.

    A merged class counts as annotated where all that it is made of is. The locator has one alone, so it takes the cases
    that are annotated for all of it; all cases where none is.
    """
    label_map = plan.label_map
    if label_map.origin is None:
        return cases
    mine = tuple(
        replace(c, annotated=label_map.wholly(c.annotated), by_annotators=label_map.wholly(c.by_annotators))
        for c in cases
    )
    if plan.algo != LOCATOR:
        return mine
    whole = tuple(c for c in mine if c.annotated is None or c.annotated)
    return tuple(replace(c, annotated=None) for c in whole or mine)


def _case_digest(case: Case) -> str:
    if case.by_annotators is not None:
        return digest([files_digest(case), case.annotated, case.by_annotators])
    return files_digest(case) if case.annotated is None else digest([files_digest(case), case.annotated])


def read_plan(paths: JobDir) -> Plan:
    """A job's plan, with any edit a user made.

    Raises:
        ConfigError: An edit is not valid; every fault with file and line.
    """
    return read_model(paths.plan, Plan)


def _score_case(predictor: Predictor, case: Case, folder: Path) -> list[float]:
    """Predict a case on its own grid, store the labels, score each class."""
    assert case.label is not None
    image, label = read_image(case.images), read_label(case.label)
    pred = predictor.predict_labels(image)
    write_volume(folder / f"{case.name}.nii.gz", pred, image.grid)
    return dice_per_class(pred, label.array[0], predictor.label_map, annotated=case.annotated)


def compare_precision(plan: Plan, paths: JobDir, case: Case, device: torch.device) -> dict[str, Any] | None:
    """Predict a case in half precision and in fp32, where the plan leaves it to the hardware and that has it.

    Returns:
        What `validation.json` keeps: the share of the foreground voxels of either prediction that have equal labels,
        and whether that is enough; None where there is nothing to compare.
    """
    half = resolve_precision(device, plan.precision)
    if plan.precision != "auto" or half == "fp32":
        return None
    image = read_image(case.images)
    mine, exact = (
        Predictor([paths], device=device, options=Options(precision=p)).predict_labels(image) for p in (half, "fp32")
    )
    either = (mine > 0) | (exact > 0)
    share = float((mine == exact)[either].mean()) if either.any() else 1.0
    if share < LEAST_EQUAL:
        log.warning(
            "%s: %s gives %.2f%% of the foreground voxels of %s the labels of fp32, fewer than %.1f%%; "
            "predicting in fp32.",
            paths.root.name, half, 100 * share, case.name, 100 * LEAST_EQUAL,
        )  # fmt: skip
    return {"precision": half, "equal_labels": share, "is_equal": share >= LEAST_EQUAL}


def score_validation(
    plan: Plan, paths: JobDir, cases: tuple[Case, ...], device: torch.device, compared: dict[str, Any] | None = None
) -> float:
    """Predict the fold's validation cases on their own grids, store labels and scores.

    Args:
        compared: as `compare_precision` returned it.

    Returns:
        Mean foreground Dice: over cases, then classes.
    """
    label_map = plan.label_map
    precision: Precision | None = None
    if compared is not None:
        precision = compared["precision"] if compared["is_equal"] else "fp32"
    predictor = Predictor([paths], device=device, options=Options(precision=precision))
    scores = [_score_case(predictor, case, paths.root / "validation") for case in cases]
    summary = summarise(scores, label_map.names)
    table = {
        case.name: to_plain(dict(zip(label_map.names, row, strict=True)))
        for case, row in zip(cases, scores, strict=True)
    }
    told = {"half_precision": compared} if compared is not None else {}
    write_json(paths.validation, {"summary": summary.to_json(), "dice": table, **told})
    return summary.mean


def _time_scoring(trainer: Trainer, paths: JobDir, case: Case) -> float:
    """Seconds that `score_validation` takes for a case, with the weights as they are now.

    In fp32 where `compare_precision` will choose: time must be left for it, and seldom does half precision pass.
    """
    precision: Precision | None = "fp32" if trainer.plan.precision == "auto" else None
    with tempfile.TemporaryDirectory() as folder:
        scratch = JobDir(Path(folder) / paths.root.name)
        scratch.plan.parent.mkdir(parents=True)
        shutil.copy(paths.plan, scratch.plan)
        save_weights(trainer.average, scratch)
        predictor = Predictor([scratch], device=trainer.device, options=Options(precision=precision))
        begin = time.monotonic()
        _score_case(predictor, case, scratch.root)
        return time.monotonic() - begin


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
