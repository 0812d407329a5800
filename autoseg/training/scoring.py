"""Scoring a trained model on its fold's validation cases."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from autoseg.data.datalists.cases import Case
from autoseg.data.volumes import read_image, read_label, write_volume
from autoseg.evaluation.metrics import dice_per_class, summarise, to_plain
from autoseg.hardware.device import Precision, resolve_precision
from autoseg.inference.options import Options
from autoseg.inference.predictor import Predictor
from autoseg.plan import Plan
from autoseg.training.checkpoint import save_weights
from autoseg.training.trainer import Trainer
from autoseg.workspace.files import write_json
from autoseg.workspace.jobs import JobDir

log = logging.getLogger(__name__)


LEAST_EQUAL = 0.999
"""Share of foreground voxels that must keep their label for a model to be used in half precision."""


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


def time_scoring(trainer: Trainer, paths: JobDir, case: Case) -> float:
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
