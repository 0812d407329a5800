"""One training job from its plan to its scores: the idempotent unit of work that everything else schedules.

    autoseg train --work_dir W --algo A --fold F

on any machine that sees W; torchrun starts it on several devices. A claim with a heartbeat keeps two workers from one
job; the job of a dead worker is taken over and goes on from its checkpoint.
"""

from __future__ import annotations

import logging
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from autoseg.algos.cache import load_cases
from autoseg.algos.device import pick_device
from autoseg.algos.hardware import available_cores
from autoseg.algos.plan import Plan
from autoseg.algos.trainer import Diverged, Interrupted, Progress, Pruned, Trainer
from autoseg.claims import Busy, Claim, LostClaim
from autoseg.config import LOCATOR, format_duration
from autoseg.data.datalist import Case, files_digest, read_cases
from autoseg.data.volumes import read_image, read_label, write_volume
from autoseg.errors import AutosegError, ResourceError
from autoseg.inference.metrics import dice_per_class, summarise, to_plain
from autoseg.inference.predictor import Predictor
from autoseg.reader import read_model
from autoseg.workspace import Job, JobDir, JobState, Workspace, changed, digest, file_digest, log_to, write_json

log = logging.getLogger(__name__)

DEVICE_NAME = "AUTOSEG_DEVICE_NAME"
"""Environment variable in which a launcher says what `autoseg status` is to call the device."""


def job_inputs(
    plan: Plan, train_cases: tuple[Case, ...], val_cases: tuple[Case, ...], first_weights: Path | None = None
) -> dict[str, str]:
    """What a job is made from: name -> digest. A difference makes it stale."""
    inputs = {f"plan: {key}": digest(value) for key, value in plan.model_dump(mode="json").items()}
    for role, cases in (("training case", train_cases), ("validation case", val_cases)):
        inputs.update({f"{role} {c.name}": _case_digest(c) for c in cases})
    if first_weights is not None:
        inputs["weights of the previous round"] = file_digest(first_weights)
    return inputs


def cases_for(plan: Plan, cases: tuple[Case, ...]) -> tuple[Case, ...]:
    """The cases that a plan can learn from, annotated for its classes where it merges those of the user.

    A merged class counts as annotated where all that it is made of is. The locator has one alone, so it takes the cases
    that are annotated for all of it; all cases where none is.
    """
    label_map = plan.label_map
    if label_map.origin is None:
        return cases
    mine = tuple(replace(c, annotated=label_map.wholly(c.annotated)) for c in cases)
    if plan.algo != LOCATOR:
        return mine
    whole = tuple(c for c in mine if c.annotated is None or c.annotated)
    return tuple(replace(c, annotated=None) for c in whole or mine)


def _case_digest(case: Case) -> str:
    return files_digest(case) if case.annotated is None else digest([files_digest(case), case.annotated])


def read_plan(paths: JobDir) -> Plan:
    """A job's plan, with any edit a user made.

    Raises:
        ConfigError: An edit is not valid; every fault with file and line.
    """
    return read_model(paths.plan, Plan)


def score_validation(plan: Plan, paths: JobDir, cases: tuple[Case, ...], device: torch.device) -> float:
    """Predict the fold's validation cases on their own grids, store labels and scores.

    Returns:
        Mean foreground Dice: over cases, then classes.
    """
    label_map = plan.label_map
    predictor = Predictor([paths], device=device)
    scores = []
    for case in cases:
        assert case.label is not None
        image, label = read_image(case.images), read_label(case.label)
        pred = predictor.predict_labels(image)
        write_volume(paths.root / "validation" / f"{case.name}.nii.gz", pred, image.grid)
        scores.append(dice_per_class(pred, label.array[0], label_map, annotated=case.annotated))
    summary = summarise(scores, label_map.names)
    table = {
        case.name: to_plain(dict(zip(label_map.names, row, strict=True)))
        for case, row in zip(cases, scores, strict=True)
    }
    write_json(paths.validation, {"summary": summary.to_json(), "dice": table})
    return summary.mean


def run_job(
    workspace: Workspace,
    dataroot: Path,
    algo: str,
    fold: int,
    *,
    device: str,
    num_workers: int | None,
    wait: bool = False,
    after_epoch: Callable[[Progress, float], None] | None = None,
) -> Job:
    """Train one job to its end, or go on with it; one that is done is left as it is.

    Its state is in job.json at every moment. A failure is stored and returned, not raised, so that it never stops
    other jobs.

    Args:
        device: auto, cpu or cuda.
        num_workers: threads for preprocessing; None: one per core.
        wait: wait where another worker has the job, instead of raising `Busy`.
        after_epoch: as `Trainer` takes it; may raise `Pruned`.

    Raises:
        Busy: Another worker has the job.
        Interrupted: A signal came; the job is saved as pending and goes on next time.
    """
    started = time.monotonic()
    paths = workspace.job_dir(algo, fold)
    rank = dist.get_rank() if dist.is_initialized() else 0
    where = pick_device(device)
    with ExitStack() as stack:
        claim = None
        if rank == 0:
            name = os.environ.get(DEVICE_NAME, str(where))
            claim = stack.enter_context(Claim(paths.claims, f"{algo}_{fold}", device=name, wait=wait))
        stack.enter_context(log_to(paths.log))
        job = workspace.read_job(algo, fold)

        def note(state: JobState, error: str = "", *, can_retry: bool = True) -> None:
            job.state, job.error, job.can_retry = state, error, can_retry
            if claim is not None:
                claim.check()
                workspace.write_job(job)

        def epoch_ended(progress: Progress, dice: float) -> None:
            if claim is not None and (job.starts or job.memory_gib is None):
                job.starts, job.memory_gib = 0, memory_gib(where)
                workspace.write_job(job)
            if after_epoch is not None:
                after_epoch(progress, dice)

        try:
            plan = read_plan(paths)
            datalist = read_cases(workspace, dataroot)
            train_cases = cases_for(plan, datalist.train_cases(fold))
            val_cases = cases_for(plan, datalist.val_cases(fold))
            first_weights = workspace.first_weights(algo, fold)
            inputs = job_inputs(plan, train_cases, val_cases, first_weights)
            if _all_agree(job.state == "done" and not changed(job.inputs, inputs)):
                log.info("train: %s is done (Dice %.4f)", job.name, job.dice or 0.0)
                return job
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
            workers = num_workers or available_cores()
            trainer = Trainer(
                plan,
                load_cases(workspace.cache, plan, train_cases, num_workers=workers),
                load_cases(workspace.cache, plan, val_cases, num_workers=workers),
                paths,
                device=where,
                # Reading and writing files comes on top of the same predictions.
                final_s=lambda validation_s: 1.3 * validation_s + 1.0,
                started=started,
                inputs=digest(inputs),
                first_weights=first_weights,
                before_write=claim.check if claim is not None else lambda: None,
                after_epoch=epoch_ended,
            )
            result = trainer.run()
            job.seconds, job.memory_gib = result.seconds, memory_gib(where)
            if rank == 0:
                begin = time.monotonic()
                job.dice = score_validation(plan, paths, val_cases, where)
                job.inference_s = (time.monotonic() - begin) / len(val_cases)
                job.seconds += time.monotonic() - trainer.clock
                log.info(
                    "%s: Dice %.4f after %d steps, %s", job.name, job.dice, result.steps, format_duration(job.seconds)
                )
            note("done")
            paths.checkpoint.unlink(missing_ok=True)  # with its optimizer it is four times the model
        except Interrupted:
            note("pending")
            raise
        except Pruned:
            job.seconds = trainer.progress.elapsed_s
            note("pruned")
            paths.checkpoint.unlink(missing_ok=True)
        except Busy:
            raise
        except LostClaim as error:
            log.error("%s", error)
            return workspace.read_job(algo, fold)  # as the new holder has it
        except Diverged as error:
            note("diverged", str(error), can_retry=False)
            log.error("%s", error)
        except AutosegError as error:
            note("failed", str(error), can_retry=isinstance(error, ResourceError))
            log.error("%s: %s", job.name, error)
        except Exception as error:  # one job's bug or lack of memory must not stop the others; its traceback is kept
            note("failed", f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
            log.exception("%s failed", job.name)
    return job


def _all_agree(verdict: bool) -> bool:
    """The first process' verdict, for all processes of a job."""
    if not dist.is_initialized():
        return verdict
    shared = [verdict]
    dist.broadcast_object_list(shared, 0)
    return shared[0]


def memory_gib(device: torch.device) -> float:
    """Most memory this process took so far: of the GPU, or on a CPU its own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def join_processes(device: str) -> None:
    """Join the other processes of torchrun, where this is one of several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        where = pick_device(device)
        if where.type == "cuda":
            torch.cuda.set_device(where)
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
