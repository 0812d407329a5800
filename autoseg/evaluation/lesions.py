"""Which lesions were found: the 26-connected parts of a class, matched one to one between prediction and label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cc3d
import numpy as np

LEAST_IOU = 0.1
"""Intersection over union from which a lesion is found. Source: PI-CAI (Saha et al. 2024) and its picai_eval; lower
than the half that instances of everyday objects need, since small lesions lose much by one voxel's shift."""
PANOPTIC_IOU = 0.5
"""Above it a match counts in panoptic quality; no lesion can have two such. Source: Kirillov et al. 2019."""
SIZES_MM: dict[str, tuple[float, float]] = {"small": (0.0, 5.0), "medium": (5.0, 10.0), "large": (10.0, math.inf)}
"""Diameters, from and below, of balls of a lesion's volume. 10 mm: what RECIST 1.1 takes for measurable."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lesions:
    """The lesions of one class of one case."""

    diameter_mm: np.ndarray
    """(T,) of each true lesion: of a ball of its volume."""
    iou: np.ndarray
    """(T,) with the predicted lesion it is matched with, 0 where with none; at least `LEAST_IOU` otherwise."""
    num_predicted: int

    @property
    def is_found(self) -> np.ndarray:
        """(T,) whether each true lesion is matched."""
        return self.iou > 0

    @property
    def num_false(self) -> int:
        """Predicted lesions that are matched with none."""
        return self.num_predicted - int(self.is_found.sum())

    def f1(self) -> float:
        """Harmonic mean of the share found and the share of the predicted that is right; NaN where there are none."""
        total = len(self.iou) + self.num_predicted
        return 2 * int(self.is_found.sum()) / total if total else math.nan

    def sensitivity(self, from_mm: float = 0.0, below_mm: float = math.inf) -> float:
        """Share of the true lesions with a diameter in a range that is found; NaN where there are none."""
        of_size = (self.diameter_mm >= from_mm) & (self.diameter_mm < below_mm)
        return float(self.is_found[of_size].mean()) if of_size.any() else math.nan

    def panoptic_quality(self) -> float:
        """Sum of the IoU of matches above a half, over the mean number of lesions; NaN where there are none."""
        total = len(self.iou) + self.num_predicted
        return 2 * float(self.iou[self.iou > PANOPTIC_IOU].sum()) / total if total else math.nan


def lesions_of(pred: np.ndarray, label: np.ndarray, spacing_mm: Sequence[float]) -> Lesions:
    """Match the lesions of two masks, those with the highest IoU first, each with one at most.

    Args:
        pred, label: boolean masks (X, Y, Z) on one grid.
        spacing_mm: edge lengths of a voxel.
    """
    of_pred, num_pred = cc3d.connected_components(pred, connectivity=26, return_N=True)
    of_label, num_label = cc3d.connected_components(label, connectivity=26, return_N=True)
    size_pred = np.bincount(of_pred.ravel(), minlength=num_pred + 1)
    size_label = np.bincount(of_label.ravel(), minlength=num_label + 1)
    both = pred & label
    pairs = of_label[both].astype(np.int64) * (num_pred + 1) + of_pred[both]
    pairs, shared = np.unique(pairs, return_counts=True)
    t, p = np.divmod(pairs, num_pred + 1)
    overlap = shared / (size_label[t] + size_pred[p] - shared)
    iou, taken = np.zeros(num_label), np.zeros(num_pred + 1, bool)
    for k in np.argsort(-overlap, kind="stable"):
        if overlap[k] < LEAST_IOU:
            break
        if not iou[t[k] - 1] and not taken[p[k]]:
            iou[t[k] - 1], taken[p[k]] = overlap[k], True
    volume_mm3 = size_label[1:] * math.prod(spacing_mm)
    return Lesions(diameter_mm=np.cbrt(6 * volume_mm3 / math.pi), iou=iou, num_predicted=num_pred)
