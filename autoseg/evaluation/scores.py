"""The metrics: one function and one row each. All rows are computed by `autoseg evaluate` and for the ensemble.

A function scores one class of one case by its two masks, which are cropped; surfaces and lesions are measured once for
all rows that need them. Voxels to ignore, and classes that a case was not annotated for, are left out before.
docs/metrics.md explains the rows, what they give where a mask is empty, and where other tools differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
from scipy.ndimage import find_objects

from autoseg.data.labels import LabelMap
from autoseg.errors import DataError
from autoseg.evaluation.intervals import Patients
from autoseg.evaluation.lesions import SIZES_MM, Lesions, lesions_of
from autoseg.evaluation.metrics import Summary, summarise
from autoseg.evaluation.surfaces import Surfaces, surfaces_of
from autoseg.evaluation.tolerances import TOLERANCE_MM, Tolerance, heading_of, of_class, words_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Comparison:
    """A prediction and the label of a case, on one grid."""

    pred: np.ndarray
    """(X, Y, Z) label values."""
    label: np.ndarray
    label_map: LabelMap
    spacing_mm: Sequence[float]
    annotated: Collection[str] | None = None
    """Classes that the case was annotated for; None: all."""
    tolerance_mm: Tolerance = TOLERANCE_MM
    """Accepted deviation of a surface."""


@dataclass(kw_only=True, eq=False)
class ClassMasks:
    """One class of a case."""

    pred: np.ndarray
    """Boolean mask (X, Y, Z), cropped to a box that holds both."""
    label: np.ndarray
    spacing_mm: Sequence[float]
    tolerance_mm: float
    diagonal_mm: float
    """Of the whole image: no two of its points lie further apart."""

    @cached_property
    def surfaces(self) -> Surfaces | None:
        """The two surfaces; None where a mask is empty."""
        return surfaces_of(self.pred, self.label, self.spacing_mm)

    @cached_property
    def lesions(self) -> Lesions:
        """The parts of both masks, matched."""
        return lesions_of(self.pred, self.label, self.spacing_mm)

    @cached_property
    def voxels(self) -> tuple[int, int]:
        """Of the prediction and of the label."""
        return int(np.count_nonzero(self.pred)), int(np.count_nonzero(self.label))

    @property
    def is_empty(self) -> bool:
        """Whether neither has a voxel."""
        return not any(self.voxels)


Family = Literal["whole", "lesions"]
"""Whether a metric looks at a class as a whole or at its parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A row of the table."""

    name: str
    """In JSON files, and above the column of `autoseg evaluate`."""
    score: Callable[[ClassMasks], float]
    """Of one class of one case; NaN where it does not count."""
    short_title: str
    """In the report's text, after "Mean"."""
    title: str = ""
    """Of the report's table, with `{tolerance}` where it needs one; empty: the short one."""
    axis: str = ""
    """Of the report's plot; empty: that of the table."""
    meaning: str = ""
    """What a value is, for the report."""
    unit: str = ""
    """Such as mm."""
    is_share: bool = True
    """Whether values lie in 0..1; others lie above 0."""
    higher_is_better: bool = True
    needs_tolerance: bool = False
    """Whether values depend on the accepted deviation of surfaces."""
    family: Family = "whole"
    is_headline: bool = False
    """Whether its mean stands on top of the report."""

    def summary(
        self, values: Sequence[Sequence[float]], names: Sequence[str], patients: Patients | None = None
    ) -> Summary:
        """Cases and classes averaged.

        Args:
            values: a value per class of each case; NaN does not count.
            names: of the classes.
            patients: of each case; None: every case is a patient of its own.
        """
        return summarise(values, names, patients=patients, within=(0.0, 1.0 if self.is_share else math.inf))

    def is_better(self, first: float, second: float) -> bool:
        """Whether one value is better than another; NaN is worse than all."""
        if math.isnan(first) or math.isnan(second):
            return math.isnan(second) and not math.isnan(first)
        return first > second if self.higher_is_better else first < second

    def heading(self, tolerance_mm: Tolerance | None) -> str:
        """Name with what its values are measured in: `nsd 2 mm`."""
        measure = heading_of(tolerance_mm) if self.needs_tolerance else self.unit
        return f"{self.name} {measure}".rstrip()

    def to_json(self) -> dict[str, Any]:
        """Plain data that says how its values are to be read."""
        return {"unit": self.unit, "higher_is_better": self.higher_is_better}

    def texts(self, tolerance_mm: Tolerance | None) -> tuple[str, str, str]:
        """Title of the report's table, title of its plot's axis, and the plot's caption."""
        unit = f" ({self.unit})" if self.unit else ""
        caption = self.meaning or f"Every case's {self.short_title}."
        title = self.title or f"{self.short_title[:1].upper()}{self.short_title[1:]}"
        if not self.higher_is_better:
            caption += " Lower is better."
        tolerance = words_of(tolerance_mm)
        filled = [text.format(tolerance=tolerance) for text in (title, self.axis or title, caption)]
        return filled[0] + unit, filled[1] + unit, filled[2]


# -- the functions


def overlap(masks: ClassMasks) -> float:
    """Dice: twice the shared voxels over all of both; NaN where both are empty."""
    both = int(np.count_nonzero(masks.pred & masks.label))
    return math.nan if masks.is_empty else 2 * both / sum(masks.voxels)


def surface_dice(masks: ClassMasks) -> float:
    """The share of both surfaces within the tolerance; NaN where both masks are empty, 0 where one is."""
    if masks.surfaces is None:
        return math.nan if masks.is_empty else 0.0
    return masks.surfaces.dice(masks.tolerance_mm)


def _distance(measure: Callable[[Surfaces], float], masks: ClassMasks) -> float:
    """A distance of the surfaces in mm; NaN where both masks are empty, the image's diagonal where one is."""
    if masks.surfaces is None:
        return math.nan if masks.is_empty else masks.diagonal_mm
    return measure(masks.surfaces)


def volume_error(masks: ClassMasks) -> float:
    """Difference of the volumes over the label's; NaN where the label is empty, whatever was predicted."""
    pred, label = masks.voxels
    return abs(pred - label) / label if label else math.nan


def false_lesions(masks: ClassMasks, *, is_healthy: bool) -> float:
    """Predicted lesions that match none, in a scan without any, or in one with some; NaN in the other kind."""
    return float(masks.lesions.num_false) if is_healthy == (not masks.voxels[1]) else math.nan


# -- the table

DICE = Metric(name="dice", score=overlap, short_title="Dice", meaning="Every case's Dice on data its models never saw.")
"""Decides which weights are kept; validation during training has it alone. What else is decided: `select_by`."""
METRICS: tuple[Metric, ...] = (
    DICE,
    Metric(
        name="nsd",
        score=surface_dice,
        short_title="surface Dice",
        title="Surface Dice (NSD, {tolerance})",
        axis="Surface Dice within {tolerance}",
        meaning="Every case's surface Dice: the share of both surfaces within {tolerance}.",
        needs_tolerance=True,
        is_headline=True,
    ),
    Metric(
        name="hd95",
        score=partial(_distance, Surfaces.hausdorff_mm),
        short_title="95 % Hausdorff distance",
        meaning="The distance within which 95 % of each surface lies from the other.",
        is_headline=True,
        unit="mm",
        is_share=False,
        higher_is_better=False,
    ),
    Metric(
        name="asd",
        score=partial(_distance, Surfaces.average_mm),
        short_title="average surface distance",
        unit="mm",
        is_share=False,
        higher_is_better=False,
    ),
    Metric(
        name="volume_error",
        score=volume_error,
        short_title="relative volume error",
        meaning="Difference of predicted and true volume over the true one.",
        is_share=False,
        higher_is_better=False,
    ),
    Metric(
        name="lesion_f1",
        score=lambda masks: masks.lesions.f1(),
        short_title="lesion F1",
        meaning="F1 of finding lesions: connected parts that overlap by a tenth of their union or more.",
        family="lesions",
    ),
    Metric(
        name="lesion_sensitivity",
        score=lambda masks: masks.lesions.sensitivity(),
        short_title="lesion sensitivity",
        meaning="Share of the true lesions that is found.",
        family="lesions",
    ),
    *(
        Metric(
            name=f"lesion_sensitivity_{size}",
            score=lambda masks, ends=ends: masks.lesions.sensitivity(*ends),  # type: ignore[misc]
            short_title=f"sensitivity for {size} lesions",
            meaning=f"Share of the true lesions {words} that is found.",
            family="lesions",
        )
        for (size, ends), words in zip(
            SIZES_MM.items(), ("under 5 mm", "of 5 to 10 mm", "of 10 mm and more"), strict=True
        )
    ),
    Metric(
        name="lesion_false",
        score=partial(false_lesions, is_healthy=False),
        short_title="false lesions per scan with lesions",
        is_share=False,
        higher_is_better=False,
        family="lesions",
    ),
    Metric(
        name="lesion_false_healthy",
        score=partial(false_lesions, is_healthy=True),
        short_title="false lesions per healthy scan",
        is_share=False,
        higher_is_better=False,
        family="lesions",
    ),
    Metric(
        name="panoptic_quality",
        score=lambda masks: masks.lesions.panoptic_quality(),
        short_title="panoptic quality",
        meaning="How many lesions match by more than half of their union, and how well.",
        family="lesions",
    ),
)
"""In the order of their columns; Dice stays the first."""


def metric_named(name: str) -> Metric:
    """A row of the table."""
    return next(metric for metric in METRICS if metric.name == name)


# -- a case


def score_case(
    case: Comparison, metrics: Sequence[Metric] = METRICS, classes: Collection[str] | None = None
) -> dict[str, list[float]]:
    """Score every class of a case.

    Args:
        metrics: to compute.
        classes: to look at; None: all. The others are NaN.

    Returns:
        Metric -> value per class; NaN where a class does not count or was not annotated.

    Raises:
        DataError: The shapes differ.
    """
    scores: dict[str, list[float]] = {metric.name: [] for metric in metrics}
    for masks in _classes(case, classes):
        for metric in metrics:
            scores[metric.name].append(math.nan if masks is None else metric.score(masks))
    return scores


def _classes(case: Comparison, classes: Collection[str] | None) -> Iterator[ClassMasks | None]:
    """The masks of each class, one at a time; None for those that do not count."""
    pred, label, label_map = case.pred, case.label, case.label_map
    if pred.shape != label.shape:
        raise DataError(f"the prediction is {pred.shape}, the label {label.shape}. Expected one grid.")
    if label_map.ignore_label is not None:
        pred = np.where(label == label_map.ignore_label, 0, pred)
    boxes = [dict(enumerate(find_objects(array), 1)) for array in (pred, label)]
    diagonal_mm = math.dist([0, 0, 0], [n * s for n, s in zip(pred.shape, case.spacing_mm, strict=True)])
    for name, values in zip(label_map.names, label_map.values, strict=True):
        if any(known is not None and name not in known for known in (case.annotated, classes)):
            yield None
            continue
        box = _joined([boxes_of.get(value) for boxes_of in boxes for value in values])
        yield ClassMasks(
            pred=np.isin(pred[box], values),
            label=np.isin(label[box], values),
            spacing_mm=case.spacing_mm,
            tolerance_mm=of_class(case.tolerance_mm, name),
            diagonal_mm=diagonal_mm,
        )


def _joined(boxes: Sequence[tuple[slice, ...] | None]) -> tuple[slice, ...]:
    """The smallest box that holds all of some; of length 0 where there is none."""
    known = [box for box in boxes if box is not None]
    if not known:
        return (slice(0, 0),) * 3
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*known, strict=True))
