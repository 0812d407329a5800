"""Scores of a folder of label files against another, by file name."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from autoseg.data.formats.table import SUFFIXES_TEXT, image_files, stem_of
from autoseg.data.grid import Volume
from autoseg.data.labels import LabelMap
from autoseg.data.volumes import read_label
from autoseg.errors import ConfigError, DataError
from autoseg.evaluation.flare23 import TOLERANCES_MM, flare23_scores
from autoseg.evaluation.metrics import TOLERANCE_MM, Summary, dice_per_class, nsd_per_class, summarise, to_plain
from autoseg.evaluation.tables import format_rows, format_score
from autoseg.workspace.files import write_json

log = logging.getLogger(__name__)

Scoring = Literal["autoseg", "flare23"]
NO_CLASS = frozenset({0, 255})
"""Values that are no class unless asked for: background, and the usual mark of ignored voxels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Scores of a folder."""

    classes: tuple[str, ...]
    dice: dict[str, list[float]]
    """Case -> value per class, NaN where not counted."""
    nsd: dict[str, list[float]]
    missing: tuple[str, ...]
    """Labels without a prediction, scored as if an empty one were there."""
    tolerance_mm: float | None
    """Of the surface Dice; None: each class has its own."""
    scoring: Scoring

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Classes whose mean is told apart: FLARE23 ranks by organs and tumor, each for itself."""
        if self.scoring == "autoseg":
            return {}
        return {"organs": tuple(n for n in self.classes if n != "tumor"), "tumor": ("tumor",)}

    def summaries(self, classes: Sequence[str] | None = None) -> tuple[Summary, Summary]:
        """Dice and NSD over cases and some classes; None: all."""
        names = self.classes if classes is None else classes
        places = [self.classes.index(n) for n in names]

        def summary(scores: Mapping[str, Sequence[float]]) -> Summary:
            return summarise([[row[i] for i in places] for row in scores.values()], names)

        return summary(self.dice), summary(self.nsd)


def evaluate(
    predictions: Path,
    labels: Path,
    *,
    classes: Sequence[str] | None = None,
    tolerance_mm: float = TOLERANCE_MM,
    scoring: Scoring = "autoseg",
) -> Evaluation:
    """Score every label file's prediction.

    Args:
        predictions: folder, searched with its subfolders; a prediction has the label's file name, or that and
            an ending after an underscore.
        labels: folder of label files.
        classes: names of the label values 1, 2, ...; or label values; None: every value that occurs in `labels`
            but 0 and 255.
        tolerance_mm: of the surface Dice.
        scoring: flare23: by that challenge's rules, classes and tolerances.

    Raises:
        ConfigError: A folder is missing or holds no label files; classes were given that the scoring fixes.
        DataError: A file cannot be read, is one of several for a case, or lies on another grid; all at once.
    """
    for flag, folder in (("--predictions", predictions), ("--labels", labels)):
        if not folder.is_dir():
            raise ConfigError(f"{flag}: {folder} is not a folder. Expected a folder of label files ({SUFFIXES_TEXT}).")
    truths = image_files(labels)
    if not truths:
        raise ConfigError(f"--labels: {labels} holds no label files ({SUFFIXES_TEXT}).")
    preds = image_files(predictions, deep=True)
    if not preds:
        raise ConfigError(f"--predictions: {predictions} holds no label files ({SUFFIXES_TEXT}).")
    faults: list[str] = []
    if scoring == "flare23":
        if classes is not None:
            raise ConfigError("--classes: no effect together with --scoring flare23, which has its own. Leave it out.")
        label_map = _given(tuple(TOLERANCES_MM))
    elif classes is not None:
        label_map = _given(classes)
    else:
        label_map = _occurring(truths, faults)
    dice: dict[str, list[float]] = {}
    surface: dict[str, list[float]] = {}
    missing = []
    for path in truths:
        try:
            truth = read_label(path)
            found = _match(path, preds)
            if found is None:
                missing.append(path.name)
                pred = np.zeros_like(truth.array[0])
            else:
                pred = _read_on_grid(found, truth, path)
        except DataError as error:
            faults.extend(m for m in error.messages if m not in faults)
            continue
        label, name = truth.array[0], stem_of(path)
        if scoring == "flare23":
            dice[name], surface[name] = flare23_scores(pred, label, truth.grid)
            continue
        dice[name] = dice_per_class(pred, label, label_map)
        surface[name] = nsd_per_class(pred, label, label_map, truth.spacing_mm, tolerance_mm)
    if faults:
        raise DataError(faults)
    return Evaluation(
        classes=label_map.names,
        dice=dice,
        nsd=surface,
        missing=tuple(missing),
        tolerance_mm=tolerance_mm if scoring == "autoseg" else None,
        scoring=scoring,
    )


def _given(classes: Sequence[str]) -> LabelMap:
    if all(name.isdigit() for name in classes):
        return LabelMap(names=tuple(classes), values=tuple((int(name),) for name in classes))
    return LabelMap(names=tuple(classes), values=tuple((i + 1,) for i in range(len(classes))))


def _occurring(truths: Sequence[Path], faults: list[str]) -> LabelMap:
    """One class per value that occurs in the label files."""
    values: set[int] = set()
    for path in truths:
        try:
            values |= set(np.unique(read_label(path).array).tolist())
        except DataError as error:
            faults.extend(error.messages)
    classes = sorted(values - NO_CLASS)
    if not classes:
        raise DataError(
            faults or [f"{truths[0].parent}: every label is empty, so there is no class to score. Check --labels."]
        )
    return LabelMap(names=tuple(str(v) for v in classes), values=tuple((v,) for v in classes))


def _match(label: Path, preds: Sequence[Path]) -> Path | None:
    """The prediction of a label: of the same stem, else one that goes on after an underscore.

    Raises:
        DataError: There are several.
    """
    stem = stem_of(label)
    found = [p for p in preds if stem_of(p) == stem] or [p for p in preds if stem_of(p).startswith(f"{stem}_")]
    if len(found) > 1:
        raise DataError(
            f"{label.name}: {found[0]} and {found[1]} may both be its prediction. Give the folder of one of them."
        )
    return found[0] if found else None


def _read_on_grid(path: Path, truth: Volume, label: Path) -> np.ndarray:
    pred = read_label(path)
    if found := pred.grid.differs_from(truth.grid):
        raise DataError(f"{path}: not on the grid of {label} ({found}). Resample one of them by nearest neighbour.")
    array: np.ndarray = pred.array[0]
    return array


def format_evaluation(found: Evaluation) -> str:
    """The scores as a table: mean, deviation and interval over cases, per class; then of groups of classes and of all.

    A group of one class is that class' row.
    """
    dice, surface = found.summaries()
    by_class = {}
    for d, s in zip(dice.classes, surface.classes, strict=True):
        figures = (d.mean, d.std, d.low, d.high, s.mean, s.std)
        by_class[d.name] = [d.name, *map(format_score, figures), str(d.num)]
    means = {name: _means(name, *found.summaries(classes)) for name, classes in found.groups.items()}
    rows = [row for name, row in by_class.items() if name not in means]
    rows += [by_class.get(name, row) for name, row in means.items()]
    rows.append(_means("mean", dice, surface))
    tolerance = "" if found.tolerance_mm is None else f" {found.tolerance_mm:g} mm"
    header = ["class", "dice", "std", "95% low", "high", f"nsd{tolerance}", "std", "n"]
    lines = [format_rows(header, rows)]
    if found.missing:
        lines.append(f"No prediction, scored as an empty one: {', '.join(found.missing)}")
    return "\n".join(lines)


def _means(name: str, dice: Summary, surface: Summary) -> list[str]:
    """A row of means over classes."""
    figures = (dice.mean, math.nan, dice.low, dice.high, surface.mean, math.nan)
    return [name, *map(format_score, figures), str(dice.num_cases)]


def evaluate_folders(
    predictions: Path,
    labels: Path,
    *,
    classes: Sequence[str] | None = None,
    output: Path | None = None,
    tolerance_mm: float = TOLERANCE_MM,
    scoring: Scoring = "autoseg",
) -> int:
    """Score a folder, print the table, and write every score as JSON where asked for.

    Args:
        predictions, labels, classes, tolerance_mm, scoring: as `evaluate` takes them.
        output: JSON file.

    Returns:
        Exit code 0.

    Raises:
        ConfigError, DataError: as `evaluate`; the output cannot be written.
    """
    found = evaluate(Path(predictions), Path(labels), classes=classes, tolerance_mm=tolerance_mm, scoring=scoring)
    print(format_evaluation(found))  # noqa: T201 - the command's result
    if output is not None:
        dice, surface = found.summaries()
        groups = {name: found.summaries(mine) for name, mine in found.groups.items()}
        data = {
            "scoring": found.scoring,
            "classes": list(found.classes),
            "tolerance_mm": found.tolerance_mm,
            "dice": dice.to_json(),
            "nsd": surface.to_json(),
            "groups": {name: {"dice": d.to_json(), "nsd": s.to_json()} for name, (d, s) in groups.items()},
            "missing": list(found.missing),
            "cases": {n: {"dice": to_plain(found.dice[n]), "nsd": to_plain(found.nsd[n])} for n in sorted(found.dice)},
        }
        try:
            write_json(Path(output), data)
        except OSError as error:
            raise ConfigError(f"--output: {output} cannot be written ({error.strerror or error}).") from error
    return 0
