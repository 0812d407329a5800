"""Dice from counts of label values, and how scores of cases are summed up.

A class absent from prediction and label is not counted (NaN); absent from one of the two it scores 0. Classes a
case was not annotated for are not counted. Means are over cases, then over classes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from autoseg.data.labels import IGNORE, LabelMap
from autoseg.errors import DataError
from autoseg.evaluation.intervals import Patients, mean_interval, num_patients

MAX_TABLE = 1 << 20
"""Cells of the largest table of value pairs that is counted directly."""
CHUNK_VOXELS = 1 << 22
"""Voxels whose value pairs are counted at a time: 32 MiB of indices."""


# -- Dice


def pair_counts(pred: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Count how often each value of `label` meets each value of `pred`.

    Args:
        pred, label: non-negative integers of one shape.

    Returns:
        (largest label + 1, largest pred + 1) int64.
    """
    rows, columns = int(label.max(initial=0)) + 1, int(pred.max(initial=0)) + 1
    counts = np.zeros(rows * columns, np.int64)
    flat_pred, flat_label = pred.reshape(-1), label.reshape(-1)
    for first in range(0, flat_pred.size, CHUNK_VOXELS):
        chunk = slice(first, first + CHUNK_VOXELS)
        pairs = flat_label[chunk].astype(np.int64)
        pairs *= columns
        pairs += flat_pred[chunk]
        counts += np.bincount(pairs, minlength=counts.size)
    return counts.reshape(rows, columns)


def _dice_of_counts(counts: np.ndarray, values: Sequence[Collection[int]], ignored: Collection[int]) -> list[float]:
    """Dice of each class, a set of values, from `pair_counts`; rows (label values) in `ignored` are left out."""
    counts = counts.copy()
    counts[[v for v in ignored if v < counts.shape[0]]] = 0
    scores = []
    for of_class in values:
        rows = [v for v in of_class if v < counts.shape[0]]
        columns = [v for v in of_class if v < counts.shape[1]]
        both = counts[np.ix_(rows, columns)].sum()
        total = counts[rows].sum() + counts[:, columns].sum()
        scores.append(float(2 * both / total) if total else math.nan)
    return scores


def _check_shapes(pred: np.ndarray, label: np.ndarray) -> None:
    if pred.shape != label.shape:
        raise DataError(f"the prediction is {pred.shape}, the label {label.shape}. Expected one grid.")


def dice_per_class(
    pred: np.ndarray, label: np.ndarray, label_map: LabelMap, *, annotated: Collection[str] | None = None
) -> list[float]:
    """Dice of each class of a label map, from values as they stand in label files.

    Args:
        pred, label: (X, Y, Z) unsigned integers on one grid. Voxels the label marks as ignored do not count.
        annotated: names of the classes the case was annotated for; None: all.

    Returns:
        One value in [0, 1] per class; NaN where absent from both or not annotated.

    Raises:
        DataError: The shapes differ.
    """
    _check_shapes(pred, label)
    ignored: Collection[int] = () if label_map.ignore_label is None else (label_map.ignore_label,)
    values: Sequence[Collection[int]] = [set(v) for v in label_map.values]
    if (int(label.max(initial=0)) + 1) * (int(pred.max(initial=0)) + 1) > MAX_TABLE:
        # Rare large values: number the ones that occur.
        known, places = np.unique(np.concatenate([label.ravel(), pred.ravel()]), return_inverse=True)
        values = [np.flatnonzero(np.isin(known, list(v))).tolist() for v in values]
        ignored = tuple(np.flatnonzero(np.isin(known, list(ignored))).tolist())
        label, pred = places[: label.size], places[label.size :]
    return _only(label_map.names, _dice_of_counts(pair_counts(pred, label), values, ignored), annotated)


def dice_of_targets(
    pred: np.ndarray, target: np.ndarray, label_map: LabelMap, *, annotated: Collection[str] | None = None
) -> list[float]:
    """Dice of each class from encoded targets, as `LabelMap.encode` returns them.

    Args:
        pred, target: (1 or K, X, Y, Z) uint8; voxels of 255 in `target` do not count.

    Returns, Raises: as `dice_per_class`.
    """
    _check_shapes(pred, target)
    if label_map.sigmoid:
        scores = [_dice_of_counts(pair_counts(p, t), [(1,)], (IGNORE,))[0] for p, t in zip(pred, target, strict=True)]
    else:
        classes = [(i + 1,) for i in range(len(label_map.names))]
        scores = _dice_of_counts(pair_counts(pred, target), classes, (IGNORE,))
    return _only(label_map.names, scores, annotated)


def _only(names: Sequence[str], scores: list[float], annotated: Collection[str] | None) -> list[float]:
    if annotated is None:
        return scores
    return [s if n in annotated else math.nan for n, s in zip(names, scores, strict=True)]


# -- summaries


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassSummary:
    """A score of one class over cases."""

    name: str
    num: int
    """Cases that count; the figures are NaN where it is 0."""
    mean: float
    std: float
    """Standard deviation over the cases (NumPy's, of the population)."""
    median: float
    q25: float
    q75: float
    low: float
    """Ends of the 95 % interval of the mean, see `intervals.mean_interval`; NaN where it is not known."""
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A score over cases and classes."""

    classes: tuple[ClassSummary, ...]
    mean: float
    """Mean over the classes of their means over cases; classes without a case left out."""
    low: float
    high: float
    """Ends of its 95 % interval."""
    num_cases: int
    """Cases that count for any class."""
    num_patients: int
    """Of these cases."""

    def to_json(self) -> dict[str, Any]:
        """Plain data; null for NaN, rounded to 6 digits."""
        plain: dict[str, Any] = to_plain(asdict(self))
        return plain


def to_plain(data: Any) -> Any:
    """Floats in nested data rounded to 6 digits, NaN as None, tuples as lists: valid JSON."""
    if isinstance(data, dict):
        return {k: to_plain(v) for k, v in data.items()}
    if isinstance(data, (list, tuple)):
        return [to_plain(v) for v in data]
    if isinstance(data, float):
        return None if math.isnan(data) else round(data, 6)
    return data


def class_means(per_case: Sequence[Sequence[float]]) -> list[float]:
    """Mean over cases of each class; NaN where nothing counts."""
    by_class = [[v for v in column if not math.isnan(v)] for column in zip(*per_case, strict=True)]
    return [sum(column) / len(column) if column else math.nan for column in by_class]


def mean_score(per_case: Sequence[Sequence[float]]) -> float:
    """Mean over cases, then over classes; NaN where nothing counts. As `summarise` gives it, without the rest."""
    means = [mean for mean in class_means(per_case) if not math.isnan(mean)]
    return sum(means) / len(means) if means else math.nan


def summarise(
    per_case: Sequence[Sequence[float]],
    names: Sequence[str],
    *,
    patients: Patients | None = None,
    within: tuple[float, float] = (0.0, 1.0),
) -> Summary:
    """Sum up scores of cases.

    Args:
        per_case: for each case, a value per class; NaN does not count.
        names: of the classes.
        patients: of each case; None: every case is a patient of its own.
        within: range of the values, to which the ends of intervals are cut.
    """
    num_cases = len(per_case)
    scores = np.full((max(1, num_cases), len(names)), np.nan)
    if num_cases:
        scores[:] = per_case
    with warnings.catch_warnings():
        # A class without any case is NaN here, and said to be so by its `num` of 0.
        warnings.filterwarnings("ignore", "Mean of empty slice|All-NaN slice|Degrees of freedom", RuntimeWarning)
        quartiles = np.nanpercentile(scores, [25, 50, 75], axis=0)
        by_class, std = np.nanmean(scores, axis=0), np.nanstd(scores, axis=0)
        mean = float(np.nanmean(by_class))
    of_classes = patients if num_cases else None
    ends = [mean_interval(scores[:, i : i + 1], of_classes, within=within) for i in range(len(names))]
    classes = [
        ClassSummary(
            name=name, num=int((~np.isnan(scores[:, i])).sum()), mean=float(by_class[i]), std=float(std[i]),
            median=float(quartiles[1, i]), q25=float(quartiles[0, i]), q75=float(quartiles[2, i]),
            low=ends[i][0], high=ends[i][1],
        )
        for i, name in enumerate(names)
    ]  # fmt: skip
    low, high = mean_interval(scores, of_classes, within=within)
    counted = [i for i, row in enumerate(scores) if not np.isnan(row).all()]
    return Summary(
        classes=tuple(classes),
        mean=mean,
        low=low,
        high=high,
        num_cases=len(counted),
        num_patients=num_patients([None if of_classes is None else of_classes[i] for i in counted]),
    )
