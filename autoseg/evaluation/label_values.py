"""Which values label files hold, so that what a score leaves out is said."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from autoseg.errors import DataError, some_of

MOST_SHOWN = 8
"""Values that are named in a sentence."""
MANY_VALUES = 64
"""More than these, in one file, are looked at: whole-body models have about 100 classes, images thousands of values."""
LEAST_EQUAL = 0.3
"""Share of neighbouring foreground voxels that are equal, below which a file of many values is an image. Regions of
three voxels across have about two thirds; noise of a deviation of two grey values has a seventh."""


class LabelValues:
    """The values of a folder's label files, each with the first file that holds it."""

    def __init__(self) -> None:
        """None so far."""
        self.first: dict[int, Path] = {}

    def add(self, path: Path, label: np.ndarray) -> None:
        """Take the values of a file.

        Args:
            label: (X, Y, Z) of integers.

        Raises:
            DataError: It is an image.
        """
        values = np.unique(label).tolist()
        if len(values) > MANY_VALUES and _share_equal(label) < LEAST_EQUAL:
            raise DataError(
                f"{path}: {len(values)} different values, and neighbouring voxels are seldom equal: an image, no label "
                "map. Give the folder of the label files."
            )
        for value in values:
            self.first.setdefault(int(value), path)

    def besides(self, known: Collection[int]) -> str:
        """The values but those known, in words; empty where there are none."""
        rest = sorted(set(self.first) - set(known))
        return f"{shown(rest)} (first in {self.first[rest[0]]})" if rest else ""


def shown(values: Collection[int]) -> str:
    """Values in words, at most some of them."""
    return some_of(sorted(values), MOST_SHOWN)


def _share_equal(label: np.ndarray) -> float:
    """Of the pairs of neighbours along the longest axis that are not both background, those of equal values."""
    lines = np.moveaxis(label, int(np.argmax(label.shape)), 0)
    before, after = lines[:-1], lines[1:]
    counted = (before != 0) | (after != 0)
    return float(((before == after) & counted).sum() / max(1, counted.sum()))
