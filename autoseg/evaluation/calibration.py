"""How often a class is there when a model gives it a probability: the counts of a reliability diagram."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
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
            probs: (K outputs, X, Y, Z) in 0..1 there, on any device; from a GPU those that count come alone.
        """
        for i in self._classes:
            target = self._target[i if self._sigmoid else 0][place]
            speaking, values = _speaking(probs[i if self._sigmoid else i + 1])
            truth = target[speaking]
            known = truth != IGNORE
            p = values[known].astype(np.float64)
            hit = truth[known] == (1 if self._sigmoid else i + 1)
            bins = np.minimum((p * NUM_BINS).astype(int), NUM_BINS - 1)
            for k, weights in enumerate((None, p, hit)):
                self.counts[i, :, k] += np.bincount(bins, weights=weights, minlength=NUM_BINS)

    def to_json(self) -> list[list[list[float]]]:
        """Plain data: per class and bin, [voxels, sum of probabilities, hits]."""
        return [[[int(n), round(float(p), 3), int(h)] for n, p, h in bins] for bins in self.counts]


def _speaking(probs: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Where probabilities (X, Y, Z) are not of the lowest bin, and those, one after the other."""
    if probs.device.type == "cpu":  # NumPy takes a third of the time of PyTorch there (measured)
        values = probs.numpy()
        return (where := values >= LOWEST / NUM_BINS), values[where]
    speaking = probs >= LOWEST / NUM_BINS
    return speaking.cpu().numpy(), probs[speaking].cpu().numpy()


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


# -- temperature


@dataclass(frozen=True, slots=True, kw_only=True)
class Temperature:
    """One number that logits are divided by, and what that does to the calibration error."""

    value: float
    """Fitted on all cases: what new images would get. Above 1: the models are too sure."""
    by_fold: dict[int, float]
    """Fitted without each fold: what its cases were scored with."""
    error_before: float
    """Expected calibration error over all classes, by voxel."""
    error_after: float
    """The same with each fold's probabilities changed by the temperature of the others."""
    classes_after: tuple[float | None, ...]
    """Of each class; None where no voxel was counted."""


MOST_TEMPERATURE = 10.0
"""Of those that are tried, as far down as up."""


def out_of_fold_temperature(by_fold: Mapping[int, np.ndarray]) -> Temperature | None:
    """Fit a temperature without each fold and judge it there.

    It is fitted on the counts of the diagram, class against the rest: the logit of a bin's mean probability is divided
    by it, and the likelihood of the voxels that are of the class is made as high as it gets.

    Args:
        by_fold: fold -> (K, bins, 3) as `Calibration.counts`, summed over its cases.

    Returns:
        None where there are no two folds with counts.

    Source: Guo et al. 2017, which has one temperature for the softmax; this one is for each class against the rest.
    """
    counts = {fold: np.asarray(table, float) for fold, table in by_fold.items()}
    counts = {fold: table for fold, table in counts.items() if table[..., 0].sum() > 0}
    if len(counts) < 2:
        return None
    total = np.sum([*counts.values()], axis=0)
    fitted = {fold: _fit(total - table) for fold, table in counts.items()}
    after = np.sum([_warmed(table, fitted[fold]) for fold, table in counts.items()], axis=0)
    return Temperature(
        value=_fit(total),
        by_fold=fitted,
        error_before=_error_over(total),
        error_after=_error_over(after),
        classes_after=tuple(expected_error(bins) for bins in after),
    )


def _error_over(counts: np.ndarray) -> float:
    """Expected calibration error of all classes together, by voxel."""
    return float(np.abs(counts[..., 1] - counts[..., 2]).sum() / counts[..., 0].sum())


def _logits(counts: np.ndarray) -> np.ndarray:
    """Of each bin's mean probability; 0 where it has no voxel."""
    num = np.maximum(counts[..., 0], 1)
    p = np.clip(np.where(counts[..., 0] > 0, counts[..., 1] / num, 0.5), 1e-6, 1 - 1e-6)
    logits: np.ndarray = np.log(p / (1 - p))
    return logits


def _fit(counts: np.ndarray) -> float:
    from scipy.optimize import minimize_scalar

    logits, num, hits = _logits(counts), counts[..., 0], counts[..., 2]

    def loss(log_temperature: float) -> float:
        scaled = logits / math.exp(log_temperature)
        return float((num * np.logaddexp(0, scaled) - hits * scaled).sum())

    most = math.log(MOST_TEMPERATURE)
    return round(math.exp(float(minimize_scalar(loss, bounds=(-most, most), method="bounded").x)), 4)


def _warmed(counts: np.ndarray, temperature: float) -> np.ndarray:
    """Counts as they would be with the temperature: each bin's voxels go to the bin of their new mean probability."""
    p = 1 / (1 + np.exp(-_logits(counts) / temperature))
    warmed = np.zeros_like(counts)
    bins = np.minimum((p * NUM_BINS).astype(int), NUM_BINS - 1)
    for i in range(len(counts)):
        for values, k in ((counts[i, :, 0], 0), (counts[i, :, 0] * p[i], 1), (counts[i, :, 2], 2)):
            warmed[i, :, k] = np.bincount(bins[i], weights=values, minlength=NUM_BINS)
    return warmed
