"""How often a class is there when a model gives it a probability: the counts of a reliability diagram."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from autoseg.data.labels import IGNORE, LabelMap

if TYPE_CHECKING:
    import torch

NUM_BINS = 20
"""Bins of equal width from 0 to 1."""
LOWEST = 1
"""The first bin, p < 0.05, is not counted: nearly all of it is background far from any class, and its sheer number
would make every model look calibrated."""


class Calibration:
    """Counts over the voxels of one case, class against the rest."""

    def __init__(self, target: np.ndarray, label_map: LabelMap, annotated: Collection[str] | None) -> None:
        """Take the truth.

        Args:
            target: (1 or K, X, Y, Z) uint8 in RAS on the image's grid, as `LabelMap.encode` returns it.
            annotated: classes the case was annotated for; None: all. The others stay zero.
        """
        self._target, self._sigmoid = target, label_map.sigmoid
        self._classes = [i for i, name in enumerate(label_map.names) if annotated is None or name in annotated]
        self.counts = np.zeros((len(label_map.names), NUM_BINS, 3))
        """(K, bins, 3): voxels, the sum of their probabilities, voxels that are of the class."""

    def add(self, place: tuple[slice, slice, slice], probs: torch.Tensor) -> None:
        """Count a slab.

        Args:
            place: where it lies in the label.
            probs: (K outputs, X, Y, Z) in 0..1 there.
        """
        for i in self._classes:
            target = self._target[i if self._sigmoid else 0][place]
            values = probs[i if self._sigmoid else i + 1].numpy()
            chosen = (values >= LOWEST / NUM_BINS) & (target != IGNORE)
            p = values[chosen].astype(np.float64)
            hit = target[chosen] == (1 if self._sigmoid else i + 1)
            bins = np.minimum((p * NUM_BINS).astype(int), NUM_BINS - 1)
            for k, weights in enumerate((None, p, hit)):
                self.counts[i, :, k] += np.bincount(bins, weights=weights, minlength=NUM_BINS)

    def to_json(self) -> list[list[list[float]]]:
        """Plain data: per class and bin, [voxels, sum of probabilities, hits]."""
        return [[[int(n), round(float(p), 3), int(h)] for n, p, h in bins] for bins in self.counts]


def expected_error(counts: Sequence[Sequence[float]]) -> float | None:
    """Expected calibration error of one class: the mean distance of probability and frequency, by voxel.

    Args:
        counts: (bins, 3) as `Calibration.counts` has them, summed over cases.

    Returns:
        Value in [0, 1]; None where no voxel was counted.

    Source: Guo et al. 2017, On Calibration of Modern Neural Networks; here class against the rest and without the
    first bin.
    """
    table = np.asarray(counts, float).reshape(-1, 3)
    total = table[:, 0].sum()
    return float(np.abs(table[:, 1] - table[:, 2]).sum() / total) if total else None
