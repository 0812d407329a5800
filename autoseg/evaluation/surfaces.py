"""Distances between the surfaces of two masks, measured once for all scores that are made of them.

A surface runs between voxel centres: each cube of 2 x 2 x 2 voxels that is neither full nor empty holds a piece of it,
whose area depends on which of the eight are inside and on the spacing, and stands at the cube's corner.

Source: Nikolov et al. 2018, Deep learning to achieve clinically applicable segmentation of head and neck anatomy, and
DeepMind's surface-distance; the table of areas is MONAI's copy of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.ndimage import distance_transform_edt

from autoseg.data.components import box_of_label
from autoseg.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Surfaces:
    """The pieces of the surfaces of a prediction and a label, both of which have some."""

    distance_mm: tuple[np.ndarray, np.ndarray]
    """From each piece of the prediction's surface to the label's, and the other way; each rising."""
    area_mm2: tuple[np.ndarray, np.ndarray]
    """Of the pieces."""

    def dice(self, tolerance_mm: float) -> float:
        """The share of both surfaces that is within a tolerance of the other: 0 to 1."""
        near = sum(float(a[d <= tolerance_mm].sum()) for d, a in zip(self.distance_mm, self.area_mm2, strict=True))
        return near / self._area

    def hausdorff_mm(self, share: float = 0.95) -> float:
        """The distance within which a share of each surface lies from the other: the larger of the two."""
        ends = []
        for distance, area in zip(self.distance_mm, self.area_mm2, strict=True):
            sums = np.cumsum(area)
            place = int(np.searchsorted(sums / sums[-1], share))
            ends.append(float(distance[min(place, len(distance) - 1)]))
        return max(ends)

    def average_mm(self) -> float:
        """The mean distance over both surfaces, by area."""
        pairs = zip(self.distance_mm, self.area_mm2, strict=True)
        return sum(float((d * a).sum()) for d, a in pairs) / self._area

    @property
    def _area(self) -> float:
        return sum(float(area.sum()) for area in self.area_mm2)


def surfaces_of(pred: np.ndarray, label: np.ndarray, spacing_mm: Sequence[float]) -> Surfaces | None:
    """Measure two masks.

    Args:
        pred, label: boolean masks (X, Y, Z) on one grid; what lies outside is background.
        spacing_mm: edge lengths of a voxel.

    Returns:
        None where either is empty.

    Raises:
        DataError: The shapes differ.
    """
    if pred.shape != label.shape:
        raise DataError(f"the prediction is {pred.shape}, the label {label.shape}. Expected one grid.")
    box = box_of_label(pred | label)
    pred, label = pred[box], label[box]
    if not pred.any() or not label.any():
        return None
    table = _areas(tuple(float(s) for s in spacing_mm))
    codes = [_codes(mask) for mask in (pred, label)]
    borders = [(code != 0) & (code != 255) for code in codes]
    away = [distance_transform_edt(~border, sampling=spacing_mm) for border in borders]
    distances, areas = [], []
    for i in (0, 1):
        distance, area = away[1 - i][borders[i]], table[codes[i][borders[i]]]
        order = np.argsort(distance, kind="stable")
        distances.append(distance[order])
        areas.append(area[order])
    return Surfaces(distance_mm=(distances[0], distances[1]), area_mm2=(areas[0], areas[1]))


def _codes(mask: np.ndarray) -> np.ndarray:
    """Which of the eight voxels of each cube are inside, as bits; cubes reach one voxel beyond the mask.

    Returns:
        (X + 1, Y + 1, Z + 1) uint8.
    """
    padded = np.pad(mask, 1).astype(np.uint8)
    shape = [size + 1 for size in mask.shape]
    code = np.zeros(shape, np.uint8)
    for bit in range(8):
        x, y, z = bit >> 2 & 1, bit >> 1 & 1, bit & 1
        code |= padded[x : x + shape[0], y : y + shape[1], z : z + shape[2]] << (7 - bit)
    return code


@lru_cache(maxsize=64)
def _areas(spacing_mm: tuple[float, ...]) -> np.ndarray:
    """(256,) area in mm2 of the surface in a cube of each code."""
    from monai.metrics.utils import create_table_neighbour_code_to_surface_area  # it loads torch

    table, _ = create_table_neighbour_code_to_surface_area(spacing_mm)
    areas: np.ndarray = table.numpy().astype(np.float64)
    return areas


def nsd(pred: np.ndarray, label: np.ndarray, spacing_mm: Sequence[float], tolerance_mm: float) -> float:
    """Normalised surface Dice of one class: the share of both surfaces within a tolerance of the other.

    Args:
        pred, label, spacing_mm: as `surfaces_of` takes them.
        tolerance_mm: accepted deviation of the boundary, >= 0.

    Returns:
        Value in [0, 1]; NaN if both are empty, 0 if one is.

    Raises:
        DataError: The shapes differ.
    """
    surfaces = surfaces_of(pred, label, spacing_mm)
    if surfaces is None:
        return 0.0 if pred.any() or label.any() else math.nan
    return surfaces.dice(tolerance_mm)
