"""Predictions for every training case by the models that never saw it, and their scores; resumable by case.

`ensemble/out_of_fold/<combination>/<case>.nii.gz` are label files on the images' own grids;
`ensemble/records/<case>.json` holds a case's scores and a digest of all they were made from.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from autoseg.data.datalist import Case, Datalist
from autoseg.data.labels import LabelMap
from autoseg.data.streams import MemoryImage
from autoseg.data.volumes import Volume, read_image, read_label, write_volume
from autoseg.ensemble.combine import CaseScore, Combination, combinations_of
from autoseg.ensemble.predict import writing
from autoseg.errors import DataError
from autoseg.inference.calibration import Calibration
from autoseg.inference.metrics import TOLERANCE_MM, dice_per_class, nsd_per_class, to_plain
from autoseg.inference.predictor import Predictor, model_digest, vote
from autoseg.inference.restore import labels_of_means
from autoseg.workspace import Workspace, digest, file_digest, read_json, write_json

log = logging.getLogger(__name__)
Progress = Callable[[int, int, str], None]
"""Called with the number of cases done, of all, and the name of the one just done."""

RECORD_VERSION = 2
"""Raised whenever the meaning of a record changes."""


def case_digest(case: Case, models: Mapping[str, str], combine: str) -> str:
    """A digest of everything a case's prediction and score are made from.

    Raises:
        DataError: A file is missing.
    """
    files = [*case.images, *([case.label] if case.label else [])]
    if lost := [path for path in files if not path.exists()]:
        raise DataError([f"{path}: no such file. Check the path in the datalist and dataroot." for path in lost])
    found = [file_digest(path) for path in files]
    return digest([RECORD_VERSION, found, dict(models), combine, case.annotated])


def read_record(path: Path, key: str, outputs: Sequence[Path]) -> dict[str, Any] | None:
    """A case's record, if it was made from the same and all its files are still there."""
    if not path.exists() or not all(p.exists() for p in outputs):
        return None
    record: dict[str, Any] = read_json(path)
    return record if record.get("made_from") == key else None


def score_of(case: Case, pred: np.ndarray, label: Volume, label_map: LabelMap) -> list[float]:
    """Dice per class of a prediction (X, Y, Z) in RAS."""
    return dice_per_class(pred, label.array[0], label_map, annotated=case.annotated)


def read_case_label(case: Case, image: Volume) -> Volume:
    """Read a case's label.

    Raises:
        DataError: It cannot be read, or lies on another grid than the image.
    """
    assert case.label is not None
    label = read_label(case.label)
    if found := label.grid.differs_from(image.grid):
        raise DataError(f"{case.label}: not on the grid of {case.images[0].name} ({found}). Export the label again.")
    return label


def score_out_of_fold(
    workspace: Workspace,
    datalist: Datalist,
    algos_by_fold: Mapping[int, Sequence[str]],
    *,
    combine: Literal["auto", "mean", "vote"],
    device: str,
    progress: Progress | None = None,
) -> tuple[list[CaseScore], list[str]]:
    """Predict and score every case of the folds that have a trained model.

    Each model is loaded once; a case that was scored before with the same models, files and settings is not
    done again.

    Returns:
        The scores, and a message for each case that could not be scored.
    """
    total = sum(len(datalist.val_cases(fold)) for fold in algos_by_fold)
    done = 0
    scores: list[CaseScore] = []
    failures: list[str] = []
    for fold, algos in sorted(algos_by_fold.items()):
        wanted = combinations_of(algos, combine)
        models = {algo: model_digest(workspace, algo, fold) for algo in algos}
        predictor: Predictor | None = None
        for case in datalist.val_cases(fold):
            try:
                key = case_digest(case, models, combine)
                outputs = [_label_file(workspace, c, case) for c in wanted]
                record = read_record(workspace.ensemble / "records" / f"{case.name}.json", key, outputs)
                if record is None:
                    if predictor is None:
                        predictor = Predictor([workspace.job_dir(a, fold) for a in algos], device=device)
                    found = _score_case(workspace, case, predictor, algos, wanted)
                    record = {"made_from": key, "fold": fold, **found}
                    write_json(workspace.ensemble / "records" / f"{case.name}.json", record)
                scores.append(_from_record(case, record))
            except DataError as error:
                log.error("%s: not scored: %s", case.name, error)
                failures.extend(f"{case.name}: {message}" for message in error.messages)
            done += 1
            if progress is not None:
                progress(done, total, case.name)
    return scores, failures


def _label_file(workspace: Workspace, combination: Combination, case: Case) -> Path:
    return workspace.out_of_fold / combination.name / f"{case.name}.nii.gz"


def _from_record(case: Case, record: Mapping[str, Any]) -> CaseScore:
    dice = {n: [math.nan if v is None else float(v) for v in values] for n, values in record["dice"].items()}
    return CaseScore(name=case.name, fold=record["fold"], dice=dice)


def _score_case(
    workspace: Workspace,
    case: Case,
    predictor: Predictor,
    algos: Sequence[str],
    wanted: Sequence[Combination],
) -> dict[str, Any]:
    """Predict a case with each algorithm, merge them in every way, write the labels and score them.

    Args:
        predictor: one model for each of `algos`.
        wanted: each algorithm alone first, in their order.

    Returns:
        Plain data: `dice`, a value per class for each combination; `calibration`, counts for each mean.
    """
    image = read_image(case.images)
    label = read_case_label(case, image)
    label_map = predictor.label_map
    places = {c: tuple(algos.index(algo) for algo in c.algos) for c in wanted}
    means = [c for c in wanted if c.combine == "mean"]
    shape: tuple[int, int, int] = image.array.shape[1:]
    try:
        each = predictor.each(MemoryImage(image))
    except DataError as error:
        raise DataError([f"{case.images[0]}: {message}" for message in error.messages]) from error
    target = label_map.encode(label.array[0])
    counts = [Calibration(target, label_map, case.annotated) for _ in means]
    found = labels_of_means(
        each, [places[c] for c in means], shape, label_map, watch=lambda k, place, probs: counts[k].add(place, probs)
    )
    labels = dict(zip(means, found, strict=True))
    for combination in wanted:
        if combination.combine == "vote":
            labels[combination] = vote([found[i] for i in places[combination]], label_map)
    dice = {}
    for combination, pred in labels.items():
        path = _label_file(workspace, combination, case)
        with writing(path):
            write_volume(path, pred, image.grid)
        dice[combination.name] = score_of(case, pred, label, label_map)
    calibration = {c.name: count.to_json() for c, count in zip(means, counts, strict=True)}
    return {"dice": to_plain(dice), "calibration": calibration}


def measure_surfaces(
    workspace: Workspace, cases: Mapping[str, tuple[Case, str]], label_map: LabelMap
) -> dict[str, dict[str, Any]]:
    """Surface Dice of the chosen combination's labels, and what else the record of each case says of it.

    Kept in the case's record, so that it is measured once for each combination.

    Args:
        cases: name -> the case, and the combination that speaks in its fold.

    Returns:
        Case -> `dice` and `nsd`, a value per class, null where not counted, and `calibration`, null for a vote.
    """
    found = {}
    for name, (case, combination) in cases.items():
        path = workspace.ensemble / "records" / f"{name}.json"
        record = read_json(path)
        surface = record.setdefault("nsd", {})
        if combination not in surface:
            assert case.label is not None
            label = read_label(case.label)
            pred = read_label(workspace.out_of_fold / combination / f"{name}.nii.gz").array[0]
            scores = nsd_per_class(
                pred, label.array[0], label_map, label.spacing_mm, TOLERANCE_MM, annotated=case.annotated
            )
            surface[combination] = to_plain(scores)
            write_json(path, record)
        found[name] = {
            "dice": record["dice"][combination],
            "nsd": surface[combination],
            "calibration": record["calibration"].get(combination),
        }
    return found
