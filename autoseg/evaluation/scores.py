"""The metrics: one function and one row each. All rows are computed by `autoseg evaluate` and for the ensemble.

A function scores a whole case: `per_class` makes one from a function of two masks. Voxels to ignore, and classes that a
case was not annotated for, are left out before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autoseg.data.labels import LabelMap
from autoseg.evaluation.intervals import Patients
from autoseg.evaluation.metrics import TOLERANCE_MM, Summary, dice_per_class, nsd, scores_of_masks, summarise


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
    tolerance_mm: float = TOLERANCE_MM
    """Accepted deviation of a surface."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A row of the table."""

    name: str
    """In JSON files, and above the column of `autoseg evaluate`."""
    score: Callable[[Comparison], list[float]]
    """A value for each class of the label map; NaN where a class does not count."""
    short_title: str
    """In the report's text, after "Mean"."""
    title: str = ""
    """Of the report's table, with `{tolerance:g}` where it needs one; empty: the short one."""
    axis: str = ""
    """Of the report's plot; empty: that of the table."""
    meaning: str = ""
    """What a value is, for the report."""
    unit: str = ""
    """Such as mm."""
    is_share: bool = True
    """Whether values lie in 0..1."""
    higher_is_better: bool = True
    needs_tolerance: bool = False
    """Whether values depend on the accepted deviation of surfaces."""
    least: float = 0.0
    """No value lies below it."""

    def summary(
        self, values: Sequence[Sequence[float]], names: Sequence[str], patients: Patients | None = None
    ) -> Summary:
        """Cases and classes averaged.

        Args:
            values: a value per class of each case; NaN does not count.
            names: of the classes.
            patients: of each case; None: every case is a patient of its own.
        """
        return summarise(values, names, patients=patients, within=(self.least, 1.0 if self.is_share else math.inf))

    def heading(self, tolerance_mm: float | None) -> str:
        """Name with what its values are measured in: `nsd 2 mm`."""
        measure = f"{tolerance_mm:g} mm" if self.needs_tolerance and tolerance_mm is not None else self.unit
        return f"{self.name} {measure}".rstrip()

    def to_json(self) -> dict[str, Any]:
        """Plain data that says how its values are to be read."""
        return {"unit": self.unit, "higher_is_better": self.higher_is_better}

    def texts(self, tolerance_mm: float | None) -> tuple[str, str, str]:
        """Title of the report's table, title of its plot's axis, and the plot's caption."""
        unit = f" ({self.unit})" if self.unit else ""
        caption = self.meaning or f"Every case's {self.short_title}."
        title = self.title or f"{self.short_title[:1].upper()}{self.short_title[1:]}"
        if not self.higher_is_better:
            caption += " Lower is better."
        filled = [text.format(tolerance=tolerance_mm) for text in (title, self.axis or title, caption)]
        return filled[0] + unit, filled[1] + unit, filled[2]


def per_class(function: Callable[[np.ndarray, np.ndarray, Comparison], float]) -> Callable[[Comparison], list[float]]:
    """Score each class of a case by a function of its two boolean masks (X, Y, Z): prediction, then label."""

    def score(case: Comparison) -> list[float]:
        return scores_of_masks(
            lambda pred, label: function(pred, label, case),
            case.pred,
            case.label,
            case.label_map,
            annotated=case.annotated,
        )

    return score


def dice_of(case: Comparison) -> list[float]:
    """Dice of each class: see `dice_per_class`, which counts all classes at once."""
    return dice_per_class(case.pred, case.label, case.label_map, annotated=case.annotated)


def surface_dice(pred: np.ndarray, label: np.ndarray, case: Comparison) -> float:
    """Surface Dice of one class: see `nsd`."""
    return nsd(pred, label, case.spacing_mm, case.tolerance_mm)


DICE = Metric(name="dice", score=dice_of, short_title="Dice", meaning="Every case's Dice on data its models never saw.")
"""Decides everywhere: which weights are kept, which networks are combined. Validation during training has it alone."""
METRICS: tuple[Metric, ...] = (
    DICE,
    Metric(
        name="nsd",
        score=per_class(surface_dice),
        short_title="surface Dice",
        title="Surface Dice (NSD, {tolerance:g} mm)",
        axis="Surface Dice within {tolerance:g} mm",
        meaning="Every case's surface Dice: the share of both surfaces within {tolerance:g} mm.",
        needs_tolerance=True,
    ),
)
"""In the order of their columns; Dice stays the first."""
