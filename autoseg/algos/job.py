"""One training job from its plan to its scores: the idempotent unit of work that everything else schedules.

    python -m torch.distributed.run --standalone --nproc_per_node 2 -m autoseg.algos.job WORK_DIR DATAROOT ALGO FOLD

runs one job on several devices; with one process it is what `autoseg train` calls.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from autoseg.algos.cache import load_cases
from autoseg.algos.device import pick_device
from autoseg.algos.hardware import available_cores
from autoseg.algos.plan import Plan
from autoseg.algos.trainer import Diverged, Interrupted, Trainer
from autoseg.config import format_duration
from autoseg.data.datalist import Case, files_digest, read_datalist
from autoseg.data.volumes import read_image, read_label, write_volume
from autoseg.errors import AutosegError
from autoseg.inference.metrics import dice_per_class, summarise, to_plain
from autoseg.inference.predictor import Predictor
from autoseg.reader import read_model
from autoseg.workspace import Job, JobDir, Workspace, digest, log_to, write_json

log = logging.getLogger(__name__)


def job_inputs(plan: Plan, train_cases: tuple[Case, ...], val_cases: tuple[Case, ...]) -> dict[str, str]:
    """What a job is made from: name -> digest. A difference makes it stale."""
    inputs = {f"plan: {key}": digest(value) for key, value in plan.model_dump(mode="json").items()}
    for role, cases in (("training case", train_cases), ("validation case", val_cases)):
        inputs.update({f"{role} {c.name}": files_digest(c) for c in cases})
    return inputs


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


def run_job(workspace: Workspace, dataroot: Path, algo: str, fold: int, *, device: str, num_workers: int | None) -> Job:
    """Train one job to its end, or go on with it; its state is in job.json at every moment.

    A failure is stored and returned, not raised, so that it never stops other jobs.

    Raises:
        Interrupted: A signal came; the job is saved as pending and goes on next time.
    """
    started = time.monotonic()
    paths = workspace.job_dir(algo, fold)
    rank = dist.get_rank() if dist.is_initialized() else 0
    job = workspace.read_job(algo, fold)

    def note(state: str, error: str = "") -> None:
        job.state, job.error = state, error  # type: ignore[assignment]
        if rank == 0:
            workspace.write_job(job)

    with log_to(paths.log):
        try:
            plan = read_plan(paths)
            datalist = read_datalist(workspace.datalist, dataroot)
            train_cases, val_cases = datalist.train_cases(fold), datalist.val_cases(fold)
            inputs = job_inputs(plan, train_cases, val_cases)
            job.inputs, job.started, job.dice = inputs, time.time(), None
            note("running")
            where = pick_device(device)
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
            )
            result = trainer.run()
            job.seconds = result.seconds
            if rank == 0:
                job.dice = score_validation(plan, paths, val_cases, where)
                job.seconds += time.monotonic() - trainer.clock
                log.info(
                    "%s: Dice %.4f after %d steps, %s", job.name, job.dice, result.steps, format_duration(job.seconds)
                )
            note("done")
            paths.checkpoint.unlink(missing_ok=True)  # with its optimizer it is four times the model
        except Interrupted:
            note("pending")
            raise
        except Diverged as error:
            note("diverged", str(error))
            log.error("%s", error)
        except AutosegError as error:
            note("failed", str(error))
            log.error("%s: %s", job.name, error)
        except Exception as error:  # one job's bug or lack of memory must not stop the others; its traceback is kept
            note("failed", f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
            log.exception("%s failed", job.name)
    return job


def join_processes(device: str) -> None:
    """Join the other processes of torchrun, where this is one of several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        where = pick_device(device)
        if where.type == "cuda":
            torch.cuda.set_device(where)
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")


def main(arguments: list[str]) -> int:
    """Run one job in a process of torchrun's."""
    work_dir, dataroot, algo, fold = arguments
    logging.basicConfig(
        level=logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING, format="%(message)s"
    )
    join_processes("auto")
    try:
        job = run_job(Workspace(Path(work_dir)), Path(dataroot), algo, int(fold), device="auto", num_workers=None)
    except Interrupted:
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0 if job.state == "done" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
