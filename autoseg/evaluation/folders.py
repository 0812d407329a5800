"""Scores of a folder of label files against another, by file name."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from autoseg.data.formats.table import SUFFIXES_TEXT, image_files, stem_of
from autoseg.data.grid import Volume
from autoseg.data.labels import LabelMap
from autoseg.data.volumes import read_label
from autoseg.errors import ConfigError, DataError
from autoseg.evaluation.flare23 import TOLERANCES_MM, flare23_scores
from autoseg.evaluation.metrics import TOLERANCE_MM, ClassSummary, Summary, to_plain
from autoseg.evaluation.scores import METRICS, Comparison, Metric
from autoseg.evaluation.tables import format_rows, format_score
from autoseg.workspace.files import write_json

log = logging.getLogger(__name__)

Scoring = Literal["autoseg", "flare23"]
INTERVAL = ("95% low", "high")
"""Columns of the first metric."""
NO_CLASS = frozenset({0, 255})
"""Values that are no class unless asked for: background, and the usual mark of ignored voxels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Scores of a folder."""

    classes: tuple[str, ...]
    scores: dict[str, dict[str, list[float]]]
    """Metric -> case -> value per class, NaN where not counted."""
    missing: tuple[str, ...]
    """Labels without a prediction, scored as if an empty one were there."""
    tolerance_mm: float | None
    """Of the surface Dice; None: each class has its own."""
    scoring: Scoring

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Those that were computed."""
        return tuple(metric for metric in METRICS if metric.name in self.scores)

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Classes that have a mean of their own: FLARE23 ranks by organs and tumor, each for itself."""
        if self.scoring == "autoseg":
            return {}
        return {"organs": tuple(n for n in self.classes if n != "tumor"), "tumor": ("tumor",)}

    def summaries(self, classes: Sequence[str] | None = None) -> dict[str, Summary]:
        """Each metric over cases and some classes; None: all."""
        names = self.classes if classes is None else classes
        places = [self.classes.index(n) for n in names]
        return {
            metric.name: metric.summarise(
                [[row[i] for i in places] for row in self.scores[metric.name].values()], names
            )
            for metric in self.metrics
        }


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
    truths, preds = _label_files(predictions, labels)
    faults: list[str] = []
    label_map = _label_map(classes, scoring, truths, faults)
    by_case: dict[str, dict[str, list[float]]] = {}
    missing = []
    for path in truths:
        try:
            truth = read_label(path)
            pred_path = _match(path, preds)
            pred = np.zeros_like(truth.array[0]) if pred_path is None else _read_on_grid(pred_path, truth, path)
        except DataError as error:
            faults.extend(m for m in error.messages if m not in faults)
            continue
        if pred_path is None:
            missing.append(path.name)
        by_case[stem_of(path)] = _score(pred, truth, label_map, tolerance_mm, scoring)
    if faults:
        raise DataError(faults)
    return Evaluation(
        classes=label_map.names,
        scores={
            metric: {n: scores[metric] for n, scores in by_case.items()} for metric in next(iter(by_case.values()))
        },
        missing=tuple(missing),
        tolerance_mm=tolerance_mm if scoring == "autoseg" else None,
        scoring=scoring,
    )


def _label_files(predictions: Path, labels: Path) -> tuple[list[Path], list[Path]]:
    """The label files and the predictions."""
    for flag, folder in (("--predictions", predictions), ("--labels", labels)):
        if not folder.is_dir():
            raise ConfigError(f"{flag}: {folder} is not a folder. Expected a folder of label files ({SUFFIXES_TEXT}).")
    truths, preds = image_files(labels), image_files(predictions, deep=True)
    for flag, folder, paths in (("--labels", labels, truths), ("--predictions", predictions, preds)):
        if not paths:
            raise ConfigError(f"{flag}: {folder} holds no label files ({SUFFIXES_TEXT}).")
    return truths, preds


def _label_map(classes: Sequence[str] | None, scoring: Scoring, truths: Sequence[Path], faults: list[str]) -> LabelMap:
    """The classes to score: those of the challenge, those that were asked for, or those that occur."""
    if scoring == "flare23":
        if classes is not None:
            raise ConfigError("--classes: no effect together with --scoring flare23, which has its own. Leave it out.")
        return _named(tuple(TOLERANCES_MM))
    return _named(classes) if classes is not None else _occurring(truths, faults)


def _score(
    pred: np.ndarray, truth: Volume, label_map: LabelMap, tolerance_mm: float, scoring: Scoring
) -> dict[str, list[float]]:
    """Metric -> value per class of one case."""
    label = truth.array[0]
    if scoring == "flare23":
        dice, surface = flare23_scores(pred, label, truth.grid)
        return {"dice": dice, "nsd": surface}
    case = Comparison(
        pred=pred, label=label, label_map=label_map, spacing_mm=truth.spacing_mm, tolerance_mm=tolerance_mm
    )
    return {metric.name: metric.score(case) for metric in METRICS}


def _named(classes: Sequence[str]) -> LabelMap:
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
    own = [p for p in preds if stem_of(p) == stem] or [p for p in preds if stem_of(p).startswith(f"{stem}_")]
    if len(own) > 1:
        raise DataError(
            f"{label.name}: {own[0]} and {own[1]} may both be its prediction. Give the folder of one of them."
        )
    return own[0] if own else None


def _read_on_grid(path: Path, truth: Volume, label: Path) -> np.ndarray:
    pred = read_label(path)
    if difference := pred.grid.differs_from(truth.grid):
        raise DataError(
            f"{path}: not on the grid of {label} ({difference}). Resample one of them by nearest neighbour."
        )
    array: np.ndarray = pred.array[0]
    return array


def format_evaluation(evaluation: Evaluation) -> str:
    """The scores as a table: mean and deviation over cases, per class; then of groups of classes and of all.

    The first metric has its 95 % interval, too. A group of one class is that class' row.
    """
    summaries = evaluation.summaries()
    by_class = {}
    for i, name in enumerate(evaluation.classes):
        columns = {metric: (summary.classes[i], summary.classes[i].std) for metric, summary in summaries.items()}
        by_class[name] = _row(name, columns, next(iter(summaries.values())).classes[i].num)
    means = {name: _means(name, evaluation.summaries(classes)) for name, classes in evaluation.groups.items()}
    rows = [row for name, row in by_class.items() if name not in means]
    rows += [by_class.get(name, row) for name, row in means.items()]
    rows.append(_means("mean", summaries))
    header = ["class"]
    for metric in evaluation.metrics:
        header += [metric.heading(evaluation.tolerance_mm), "std", *(INTERVAL if len(header) == 1 else ())]
    lines = [format_rows([*header, "n"], rows)]
    if evaluation.missing:
        lines.append(f"No prediction, scored as an empty one: {', '.join(evaluation.missing)}")
    return "\n".join(lines)


def _means(name: str, summaries: Mapping[str, Summary]) -> list[str]:
    """A row of means over classes."""
    columns = {metric: (summary, math.nan) for metric, summary in summaries.items()}
    return _row(name, columns, next(iter(summaries.values())).num_cases)


def _row(name: str, columns: Mapping[str, tuple[Summary | ClassSummary, float]], num: int) -> list[str]:
    """A row of the table, from each metric's means and its deviation."""
    cells = [name]
    for summary, std in columns.values():
        interval = (summary.low, summary.high) if len(cells) == 1 else ()
        cells += map(format_score, (summary.mean, std, *interval))
    return [*cells, str(num)]


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
    evaluation = evaluate(Path(predictions), Path(labels), classes=classes, tolerance_mm=tolerance_mm, scoring=scoring)
    print(format_evaluation(evaluation))  # noqa: T201 - the command's result
    if output is not None:
        try:
            write_json(Path(output), to_json(evaluation))
        except OSError as error:
            raise ConfigError(f"--output: {output} cannot be written ({error.strerror or error}).") from error
    return 0


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """Every score as plain data."""

    def plain(summaries: Mapping[str, Summary]) -> dict[str, Any]:
        return {metric: summary.to_json() for metric, summary in summaries.items()}

    cases = sorted(next(iter(evaluation.scores.values())))
    return {
        "scoring": evaluation.scoring,
        "classes": list(evaluation.classes),
        "metrics": {m.name: m.to_json() for m in evaluation.metrics},
        "tolerance_mm": evaluation.tolerance_mm,
        **plain(evaluation.summaries()),
        "groups": {name: plain(evaluation.summaries(classes)) for name, classes in evaluation.groups.items()},
        "missing": list(evaluation.missing),
        "cases": {n: {m: to_plain(scores[n]) for m, scores in evaluation.scores.items()} for n in cases},
    }
