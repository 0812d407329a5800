"""What the report says of pretraining, and of what the weights that jobs start from were worth."""

from __future__ import annotations

from functools import partial
from typing import Any

from autoseg.evaluation.from_scratch import compare_with_scratch
from autoseg.evaluation.intervals import PairedTest
from autoseg.report.gather import Run
from autoseg.workspace.pretraining import Lesson, LessonLine, lessons, pretraining_place
from autoseg.workspace.stored import read_stored_lines


def pretrainings(run: Run) -> list[dict[str, Any]]:
    """A row for each job of pretraining, and what its images mean for the scores."""
    none: dict[tuple[str, int], Lesson] = {}
    place = pretraining_place(run.workspace)
    rows = []
    for (algo, fold), lesson in run.read_or(none, partial(lessons, run.workspace)).items():
        job = run.read_or(None, lambda algo=algo, fold=fold: place.current_job(algo, fold)[0])  # type: ignore[misc]
        if job is None:
            continue
        path = place.job_dir(algo, fold).metrics
        lines = run.read_or((), partial(read_stored_lines, path, LessonLine))
        errors = [line.val_l1 for line in lines if line.val_l1 is not None]
        rows.append(
            {
                "algo": algo,
                "folds": "all" if lesson.for_all_folds else str(fold),
                "learned": lesson.words,
                "state": job.state,
                "first": errors[0] if errors else None,
                "best": min(errors, default=None),
                "epochs": lines[-1].epoch if lines else None,
                "steps": lines[-1].step if lines else None,
                "seconds": job.seconds,
                "scores": lesson.fold_words,
                "error": job.error.strip().splitlines()[0] if job.error.strip() else "",
            }
        )
    return rows


def scratch_tests(run: Run) -> list[PairedTest]:
    """Each network against its twins that started from random weights."""
    datalist = run.datalist
    cases = () if datalist is None else datalist.training
    patient_of = {case.name: case.group for case in cases if case.group is not None}
    none: list[PairedTest] = []
    return run.read_or(none, partial(compare_with_scratch, run.workspace, patient_of))
