"""Scores of a folder of label files against another, by file name."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from autoseg.data.datalists.groups import LikelyGroups, likely_groups
from autoseg.data.datalists.names import RULE, Pairing, pair_files
from autoseg.data.formats.label_files import SegmentValues, label_files
from autoseg.data.formats.table import SUFFIXES_TEXT, stem_of
from autoseg.data.grid import Grid, Volume
from autoseg.data.labels import LabelMap
from autoseg.data.volumes import read_label
from autoseg.errors import ConfigError, DataError
from autoseg.evaluation.flare23 import TOLERANCES_MM, flare23_scores
from autoseg.evaluation.folder_scores import Evaluation, Scoring, format_evaluation, to_json
from autoseg.evaluation.label_values import LabelValues, shown
from autoseg.evaluation.scores import Comparison, score_case
from autoseg.evaluation.segmentations import classes_by_name, shared_grid
from autoseg.evaluation.tolerances import TOLERANCE_MM, Tolerance, faults_of, of_classes
from autoseg.terminal import show
from autoseg.workspace.files import json_text, write_output

log = logging.getLogger(__name__)

NO_CLASS = frozenset({0, 255})
"""Values that are no class unless asked for: background, and the usual mark of ignored voxels."""


def evaluate(
    predictions: Path,
    labels: Path,
    *,
    classes: Sequence[str] | None = None,
    tolerance_mm: Tolerance = TOLERANCE_MM,
    scoring: Scoring = "autoseg",
) -> Evaluation:
    """Score every label file's prediction.

    Args:
        predictions: folder, searched with its subfolders; a prediction has the label's file name, or one that
            `pair_files` takes for the same.
        labels: folder of label files, which may be segmentations (DICOM, folders of masks): names then decide.
        classes: names of the label values 1, 2, ...; or label values; None: every value that occurs in `labels`
            but 0 and 255.
        tolerance_mm: of the surface Dice; of every class, or of each that has its own.
        scoring: flare23: by that challenge's rules, classes and tolerances.

    Raises:
        ConfigError: A folder is missing or holds no label files; no prediction goes with a label; classes were given
            that the scoring fixes, or that are no classes.
        DataError: A file cannot be read, is an image, is one of several for a case, or lies on another grid; all at
            once.
    """
    truths, preds = _label_files(predictions, labels)
    pairing = _paired(truths, preds, predictions, labels)
    faults = list(pairing.faults)
    label_values, pred_values = LabelValues(), LabelValues()
    label_map, values = _classes(classes, scoring, truths, pairing, faults)
    _check_tolerance(tolerance_mm, label_map, scoring)
    by_case: dict[str, dict[str, list[float]]] = {}
    missing = []
    for path in truths:
        pred_path = pairing.pairs.get(path)
        try:
            truth, pred = _read_pair(path, pred_path, values, label_values, pred_values)
        except DataError as error:
            faults.extend(m for m in error.messages if m not in faults)
            continue
        if pred_path is None:
            missing.append(path.name)
        if not faults:
            by_case[stem_of(path)] = _score(pred, truth, label_map, tolerance_mm, scoring)
    if faults:
        raise DataError(faults)
    likely = likely_groups(list(by_case))
    notes = [*_pairing_notes(pairing), *_patient_notes(likely)]
    notes += _value_notes(label_map, label_values, pred_values, classes, scoring)
    return Evaluation(
        classes=label_map.names,
        scores=_by_metric(by_case),
        missing=tuple(missing),
        predictions={stem_of(label): pred for label, pred in pairing.pairs.items()},
        notes=tuple(notes),
        patients=dict(likely.of),
        tolerance_mm=of_classes(tolerance_mm, label_map.names) if scoring == "autoseg" else None,
        scoring=scoring,
    )


def _by_metric(by_case: Mapping[str, Mapping[str, list[float]]]) -> dict[str, dict[str, list[float]]]:
    """Metric -> case -> values."""
    return {metric: {n: scores[metric] for n, scores in by_case.items()} for metric in next(iter(by_case.values()))}


def _label_files(predictions: Path, labels: Path) -> tuple[list[Path], list[Path]]:
    """The label files and the predictions."""
    for flag, folder in (("--predictions", predictions), ("--labels", labels)):
        if not folder.is_dir():
            raise ConfigError(f"{flag}: {folder} is not a folder. Expected a folder of label files ({SUFFIXES_TEXT}).")
    truths, preds = label_files(labels), label_files(predictions, deep=True)
    for flag, folder, paths in (("--labels", labels, truths), ("--predictions", predictions, preds)):
        if not paths:
            raise ConfigError(f"{flag}: {folder} holds no label files ({SUFFIXES_TEXT}).")
    return truths, preds


def _classes(
    classes: Sequence[str] | None, scoring: Scoring, truths: Sequence[Path], pairing: Pairing, faults: list[str]
) -> tuple[LabelMap, SegmentValues]:
    """The classes to score, and the values of segments that are known by name."""
    if classes is None and scoring != "flare23" and (named := classes_by_name(pairing.pairs, truths)) is not None:
        return named
    label_map = _label_map(classes, scoring, truths, faults)
    return label_map, tuple(zip(label_map.names, label_map.values, strict=True))


def _label_map(classes: Sequence[str] | None, scoring: Scoring, truths: Sequence[Path], faults: list[str]) -> LabelMap:
    """The classes to score: those of the challenge, those that were asked for, or those that occur."""
    if scoring == "flare23":
        if classes is not None:
            raise ConfigError("--classes: no effect together with --scoring flare23, which has its own. Leave it out.")
        return _named(tuple(TOLERANCES_MM))
    return _named(classes) if classes is not None else _occurring(truths, faults)


def _check_tolerance(tolerance_mm: Tolerance, label_map: LabelMap, scoring: Scoring) -> None:
    """Refuse tolerances of classes that are none, and any where the challenge has its own."""
    if wrong := faults_of(tolerance_mm, label_map.names, "--surface_tolerance_mm"):
        raise ConfigError(wrong)
    if scoring == "flare23" and tolerance_mm != TOLERANCE_MM:
        raise ConfigError("--surface_tolerance_mm: no effect together with --scoring flare23, which has its own.")


def _score(
    pred: np.ndarray, truth: Volume, label_map: LabelMap, tolerance_mm: Tolerance, scoring: Scoring
) -> dict[str, list[float]]:
    """Metric -> value per class of one case."""
    label = truth.array[0]
    if scoring == "flare23":
        dice, surface = flare23_scores(pred, label, truth.grid)
        return {"dice": dice, "nsd": surface}
    case = Comparison(
        pred=pred, label=label, label_map=label_map, spacing_mm=truth.spacing_mm, tolerance_mm=tolerance_mm
    )
    return score_case(case)


def _named(classes: Sequence[str]) -> LabelMap:
    """Classes by their values, or by their names in the order of the values 1, 2, ...

    Raises:
        ConfigError: Neither.
    """
    if not all(name.strip() for name in classes):
        raise ConfigError(f"--classes: {','.join(classes)}: a name is empty. Expected names separated by commas.")
    numbers = [name for name in classes if name.isdecimal()]
    if 0 < len(numbers) < len(classes):
        raise ConfigError(
            f"--classes: {','.join(classes)}: both names and label values. Expected the names of values 1, 2, ... "
            "in their order, or label values alone."
        )
    if all(name.isdecimal() for name in classes):
        return LabelMap(names=tuple(classes), values=tuple((int(name),) for name in classes))
    return LabelMap(names=tuple(classes), values=tuple((i + 1,) for i in range(len(classes))))


def _occurring(truths: Sequence[Path], faults: list[str]) -> LabelMap:
    """One class per value that occurs in the label files."""
    found = LabelValues()
    for path in truths:
        try:
            found.add(path, read_label(path).array[0])
        except DataError as error:
            faults.extend(error.messages)
    classes = sorted({*found.first} - NO_CLASS)
    if not classes:
        raise DataError(faults or [_no_class(truths[0].parent, {*found.first})])
    return LabelMap(names=tuple(str(v) for v in classes), values=tuple((v,) for v in classes))


def _no_class(labels: Path, values: set[int]) -> str:
    """Say that labels hold no class."""
    if marks := sorted(values - {0}):
        return (
            f"{labels}: the labels hold {shown(values)} alone, and {shown(marks)} is the usual mark of voxels to "
            f"ignore, so there is no class to score. If it is a class, give --classes {shown(marks)}."
        )
    return f"{labels}: every voxel of every label is 0, so there is no class to score. Check --labels."


def _paired(truths: Sequence[Path], preds: Sequence[Path], predictions: Path, labels: Path) -> Pairing:
    """Which prediction goes with which label.

    Raises:
        ConfigError: None with any.
        DataError: Two label files are of one name.
    """
    by_name: dict[str, list[Path]] = {}
    for path in truths:
        by_name.setdefault(stem_of(path), []).append(path)
    if twice := [paths for paths in by_name.values() if len(paths) > 1]:
        raise DataError([f"{labels}: {p[0].name} and {p[1].name} are labels of one case. Keep one." for p in twice])
    pairing = pair_files(truths, preds)
    if not pairing.pairs and not pairing.faults:
        raise ConfigError(
            f"--predictions: none of the {len(preds)} files in {predictions} belongs to a label in {labels}: found "
            f"{preds[0].name} and labels such as {truths[0].name}. Expected files of the same names, or {RULE}."
        )
    return pairing


def _read_pair(
    label: Path, prediction: Path | None, values: SegmentValues, label_values: LabelValues, pred_values: LabelValues
) -> tuple[Volume, np.ndarray]:
    """A label, and its prediction on the label's grid; of nothing but background where there is none."""
    grid = shared_grid(label, prediction)
    truth = read_label(label, grid=grid, values=values)
    label_values.add(label, truth.array[0])
    if prediction is None:
        return truth, np.zeros_like(truth.array[0])
    pred = _read_on_grid(prediction, truth, label, grid, values)
    pred_values.add(prediction, pred)
    return truth, pred


def _pairing_notes(pairing: Pairing) -> list[str]:
    """Which files were paired by more than their names, and which were not scored."""
    notes = []
    if pairing.by_rule:
        pairs = ", ".join(f"{label.name} with {pairing.pairs[label].name}" for label in pairing.by_rule)
        notes.append(f"Paired with a file {RULE}: {pairs}")
    if pairing.rest:
        notes.append(f"No label, not scored: {', '.join(p.name for p in pairing.rest)}")
    return notes


def _patient_notes(likely: LikelyGroups) -> list[str]:
    """How many cases are taken for those of one patient."""
    if not likely.of:
        return []
    return [
        f"By their names {len(likely.of)} cases are {likely.kind} of {len(likely.members)} patients or stacks; the "
        "intervals take them so."
    ]


def _value_notes(
    label_map: LabelMap,
    label_values: LabelValues,
    pred_values: LabelValues,
    classes: Sequence[str] | None,
    scoring: Scoring,
) -> list[str]:
    """Which values are of no class, and which classes nobody has."""
    known = {0, *(v for values in label_map.values for v in values)}
    notes = []
    if rest := label_values.besides(known):
        remedy = " --classes names what to score." if scoring == "autoseg" else ""
        notes.append(f"Labels hold values of no class, not scored: {rest}.{remedy}")
    if rest := pred_values.besides({*known, *label_values.first}):
        notes.append(f"Predictions hold values that no label and no class has, not scored: {rest}.")
    empty = [
        f"{name} ({shown(values)})"
        for name, values in zip(label_map.names, label_map.values, strict=True)
        if not {*label_values.first, *pred_values.first}.intersection(values)
    ]
    if empty and classes is not None:
        notes.append(f"In no label and no prediction: {', '.join(empty)}. Are the classes in the labels' order?")
    return notes


def _read_on_grid(path: Path, truth: Volume, label: Path, grid: Grid | None, values: SegmentValues) -> np.ndarray:
    pred = read_label(path, grid=grid, values=values)
    if difference := pred.grid.differs_from(truth.grid):
        raise DataError(
            f"{path}: not on the grid of {label} ({difference}). Resample one of them by nearest neighbour."
        )
    array: np.ndarray = pred.array[0]
    return array


def evaluate_folders(
    predictions: Path,
    labels: Path,
    *,
    classes: Sequence[str] | None = None,
    output: Path | None = None,
    tolerance_mm: Tolerance = TOLERANCE_MM,
    scoring: Scoring = "autoseg",
    lesions: bool = False,
) -> int:
    """Score a folder, print the table, and write every score as JSON where asked for.

    Args:
        predictions, labels, classes, tolerance_mm, scoring: as `evaluate` takes them.
        output: JSON file.
        lesions: print the scores of lesions, too.

    Returns:
        Exit code 0.

    Raises:
        ConfigError, DataError: as `evaluate`; the output cannot be written.
    """
    evaluation = evaluate(Path(predictions), Path(labels), classes=classes, tolerance_mm=tolerance_mm, scoring=scoring)
    show(format_evaluation(evaluation, lesions=lesions))
    if output is not None:
        write_output(Path(output), json_text(to_json(evaluation)))
    return 0
