"""What a prediction looks like from within: how sure each model is of each class, and what the image is to it.

All is counted while windows pass through the networks, for each network by itself. A case out of fold is seen by one
fold's models, a new image by those of all folds: the same figures of each model, averaged over models, so mean the same
of both. Axes: B windows, C image channels, K outputs, then X, Y, Z.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from autoseg.config.fields import Strict

FLOOR = 0.05
"""Probability under which a voxel does not speak for a class: nearly all such lie far from it, and their sheer number
would count. As in `autoseg.evaluation.calibration`."""
QUANTILES = (0.01, *(i / 20 for i in range(1, 20)), 0.99)
"""Of an image's intensities."""
SAMPLED_VOXELS = 1 << 17
"""Of an image, whose intensities are looked at."""
DIGITS = 7
"""Significant digits that are kept."""

ClassCounts = tuple[float, float, float, float, float]
"""Of one class: voxels that it has; the sum of its probabilities; of this, in its own voxels; voxels that it has in the
mirrored mean and in the pass that is not mirrored alike; and voxels that it has in that pass. On the network's grid;
the last two are 0 where nothing is mirrored."""
COLUMNS = 5


class SeenChannel(Strict):
    """What a channel looks like to a network: normalised and resampled."""

    quantiles: tuple[float, ...]
    """`QUANTILES` of the intensities."""
    roughness: tuple[float, float, float]
    """Mean difference of neighbours along X, Y, Z (RAS), as a share of the range of the quantiles."""


class Traits(Strict):
    """What one model's prediction of an image looks like."""

    classes: tuple[ClassCounts, ...]
    """Of each of the network's classes."""
    channels: tuple[SeenChannel, ...] | None
    """Of the image; None where a part of it was looked at alone."""


def sampling_step(num_outputs: int) -> int:
    """Of the voxels of a window, every n-th along each axis is counted: with many classes all would take long."""
    return 1 if num_outputs <= 4 else 2 if num_outputs <= 32 else 3


def expected_dice(counts: Sequence[float]) -> float:
    """Dice that a class' probabilities expect of its own labels, were the truth drawn from them; NaN without any.

    Twice what is expected to be right over what is there and what is expected: for more than a few voxels the ratio of
    the means is the mean of the ratio.
    """
    voxels, probability, own = counts[:3]
    return 2 * own / (voxels + probability) if voxels + probability > 0 else math.nan


def mirror_dice(counts: Sequence[float]) -> float:
    """Dice between the labels of the mirrored mean and of the pass that is not mirrored; NaN where there are none."""
    voxels, _, _, alike, unmirrored = counts
    return 2 * alike / (voxels + unmirrored) if unmirrored > 0 else math.nan


class TraitsWatch:
    """Counts while windows pass by."""

    def __init__(self, num_models: int, num_outputs: int, *, independent: bool, sees_image: bool) -> None:
        """Begin with nothing.

        Args:
            num_models: that each window goes through.
            num_outputs: K.
            independent: outputs are independent; else the first is background and they exclude each other.
            sees_image: the image is looked at as a whole.
        """
        self._independent, self._sees_image = independent, sees_image
        self._counts = [torch.zeros((num_outputs - (not independent), COLUMNS), dtype=torch.float64)] * num_models
        self._sampled: list[np.ndarray] = []  # (C, N) each
        self._rough = np.zeros((0, 3, 2))  # per channel and axis: sum of differences, their number
        self._num_rows = 0

    def labels(self, logits: torch.Tensor) -> torch.Tensor:
        """(B, X, Y, Z) class indices, or (B, K, X, Y, Z) bool of independent outputs."""
        return logits > 0 if self._independent else logits.argmax(1)

    def count(self, model: int, logits: torch.Tensor, unmirrored: torch.Tensor | None, weights: torch.Tensor) -> None:
        """Count what one model says of windows.

        Args:
            model: its number.
            logits: (B, K, X, Y, Z) of the sampled voxels, over all mirrorings.
            unmirrored: labels of the pass that is not mirrored, as `labels` has them; None: it is the only one.
            weights: (B, X, Y, Z) of these voxels, where they are; over windows they sum to one for each of the image.
        """
        where = logits.device  # what is counted stays there
        flat = weights.reshape(-1)
        outputs = logits.movedim(1, 0).reshape(logits.shape[1], -1)
        probs = outputs.sigmoid() if self._independent else outputs.softmax(0)
        columns = torch.zeros((COLUMNS, len(self._counts[model])), dtype=torch.float64, device=where)
        speaking = probs * (probs >= FLOOR)
        if self._independent:
            on = probs > 0.5
            columns[0], columns[1], columns[2] = on.float() @ flat, speaking @ flat, (probs * on) @ flat
            if unmirrored is not None:
                first = unmirrored.movedim(1, 0).reshape(on.shape)
                columns[3], columns[4] = (on & first).float() @ flat, first.float() @ flat
        else:
            top, label = probs.max(0)
            columns[1] = (speaking @ flat)[1:]
            exact = flat.double()

            def by_class(labels: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
                # Not bincount, for whose answer a GPU is waited for twice.
                total = torch.zeros(len(probs), dtype=torch.float64, device=where)
                return total.scatter_add_(0, labels, values)[1:]

            columns[0], columns[2] = by_class(label, exact), by_class(label, exact * top)
            if unmirrored is not None:
                first = unmirrored.reshape(-1)
                columns[3], columns[4] = by_class(label, exact * (first == label)), by_class(first, exact)
        self._counts[model] = self._counts[model].to(where, non_blocking=True) + columns.T

    def see(self, part: torch.Tensor, axis: int, shape: Sequence[int]) -> None:
        """Look at the next rows of the prepared image.

        Args:
            part: (C, X, Y, Z).
            axis: that rows lie along.
            shape: of the whole image.
        """
        if not self._sees_image or not part.numel():
            return
        if not len(self._rough):
            self._rough = np.zeros((len(part), 3, 2))
        step = max(1, math.ceil((math.prod(shape) / SAMPLED_VOXELS) ** (1 / 3)))
        cut = [slice(None), *(slice(None, None, step) for _ in range(3))]
        cut[axis + 1] = slice(-self._num_rows % step, None, step)
        self._sampled.append(part[tuple(cut)].reshape(len(part), -1).cpu().numpy().copy())
        self._num_rows += part.shape[axis + 1]
        for a in range(3):
            change = part.diff(dim=a + 1).abs_()
            self._rough[:, a, 0] += change.sum((1, 2, 3), dtype=torch.float64).cpu().numpy()
            self._rough[:, a, 1] += change[0].numel()

    def traits(self) -> list[Traits]:
        """Of each model, once all has passed by."""
        channels = self._channels() if self._sampled else None
        return [
            Traits(
                classes=tuple(tuple(_short(v) for v in row) for row in of_model.tolist()),  # type: ignore[misc]
                channels=channels,
            )
            for of_model in self._counts
        ]

    def _channels(self) -> tuple[SeenChannel, ...]:
        looks = []
        for values, rough in zip(np.concatenate(self._sampled, axis=1), self._rough, strict=True):
            quantiles = np.quantile(values, QUANTILES)
            span = max(float(quantiles[-1] - quantiles[0]), 1e-6)
            x, y, z = (_short(total / max(number, 1) / span) for total, number in rough)
            looks.append(SeenChannel(quantiles=tuple(_short(q) for q in quantiles), roughness=(x, y, z)))
        return tuple(looks)


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
