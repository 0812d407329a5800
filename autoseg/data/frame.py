"""A data set's own axes, where its slices are oblique, and how an image is turned into them.

Images are turned to the nearest of right, front and up (RAS+) when they are read. Where slices lie near the middle
between two of these, one case's slices come to lie along another axis than the next one's, though both were scanned
alike, and no voxel size suits both. The networks then work in axes of the data set's own: each image is turned to the
nearest of those. All else, from reading to writing, stays in RAS+.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Direction = tuple[float, float, float]
Directions = tuple[Direction, Direction, Direction]

THICK = 2.0
"""Longest edge of a voxel over the next longest from which an image has slices. Source: nnU-Net halves such an axis
later than the others (`get_pool_and_conv_props`)."""
OBLIQUE_DEGREES = 30.0
"""Between slices and the nearest of right, front and up, from which on a data set has axes of its own. A choice: two
scans that are planned alike differ by 10 to 15 degrees, and from 45 on rounding may go another way."""
NEAR_DEGREES = 60.0
"""Between an image's slices and the data set's up to which they are taken for one axis. A choice: beyond it lie scans
of another plane, such as sagittal ones among axial ones."""


@dataclass(frozen=True, slots=True)
class Turn:
    """How axes of an image in RAS+ become those of a network."""

    axes: tuple[int, int, int] = (0, 1, 2)
    """For each of the network's X, Y, Z the axis in RAS+ that it is."""
    flipped: tuple[bool, bool, bool] = (False, False, False)
    """Whether each of the network's runs the other way."""

    @property
    def is_none(self) -> bool:
        """Whether nothing is turned."""
        return self == Turn()

    def triple(self, of_image: tuple[T, T, T]) -> tuple[T, T, T]:
        """Values of the image's X, Y, Z, such as its shape, in the order of the network's."""
        x, y, z = self.axes
        return of_image[x], of_image[y], of_image[z]

    def triple_back(self, of_network: tuple[T, T, T]) -> tuple[T, T, T]:
        """Values of the network's X, Y, Z, such as its patch, in the order of the image's."""
        x, y, z = (self.axes.index(axis) for axis in range(3))
        return of_network[x], of_network[y], of_network[z]

    def apply(self, image: torch.Tensor) -> torch.Tensor:
        """(..., X, Y, Z) of the image as the network has them."""
        if self.is_none:
            return image
        lead = image.ndim - 3
        turned = image.permute(*range(lead), *(lead + axis for axis in self.axes))
        return turned.flip([lead + axis for axis in range(3) if self.flipped[axis]])

    def back(self, turned: torch.Tensor) -> torch.Tensor:
        """(..., X, Y, Z) of the network as the image has them."""
        if self.is_none:
            return turned
        lead = turned.ndim - 3
        image = turned.flip([lead + axis for axis in range(3) if self.flipped[axis]])
        return image.permute(*range(lead), *(lead + self.axes.index(axis) for axis in range(3)))


@dataclass(frozen=True, slots=True)
class Frame:
    """Axes of a data set."""

    axes: Directions
    """Directions of X, Y, Z in the RAS+ world, of length 1, at right angles; each is near the axis of its name."""
    slices: int
    """The axis that slices are stacked along: 0 X, 1 Y, 2 Z."""

    def turn(self, directions: np.ndarray) -> Turn:
        """How an image is turned to these axes.

        Slices become the axis of the slices where they are near it; else, and for the other two axes, those are taken
        that agree best with the image's, as in rounding to RAS+.

        Args:
            directions: (3, 3), a column for each of the image's X, Y, Z in RAS+: a step of one voxel, in mm.
        """
        edges = np.linalg.norm(directions, axis=0)
        alike = np.array(self.axes) @ (directions / edges)  # network's axis x image's axis
        across = slice_axis(edges)
        fixed = across is not None and abs(alike[self.slices, across]) >= math.cos(math.radians(NEAR_DEGREES))
        able = [order for order in permutations(range(3)) if not fixed or order[self.slices] == across]
        x, y, z = max(able, key=lambda order: sum(abs(alike[axis, order[axis]]) for axis in range(3)))
        flipped = bool(alike[0, x] < 0), bool(alike[1, y] < 0), bool(alike[2, z] < 0)
        return Turn((x, y, z), flipped)

    @property
    def lateral_degrees(self) -> float:
        """Angle between X and right."""
        return math.degrees(math.acos(min(1.0, abs(self.axes[0][0]))))


def slice_axis(edges_mm: Sequence[float] | np.ndarray) -> int | None:
    """The axis along which voxels are so long that it is that of slices; None where there is none."""
    by_length = sorted(range(3), key=lambda axis: -float(edges_mm[axis]))
    return by_length[0] if edges_mm[by_length[0]] > THICK * edges_mm[by_length[1]] else None


def find_frame(cases: Sequence[Directions]) -> Frame | None:
    """The axes of a data set, where it needs some of its own: slices are thick, oblique, and alike in most cases.

    Args:
        cases: of each case a step of one voxel along X, Y, Z in RAS+, in mm.

    Returns:
        The mean direction of the slices, and the mean of the rows and columns in their plane; None where RAS+ will do.
    """
    columns = [np.array(directions).T for directions in cases]
    found = [(c, axis) for c in columns if (axis := slice_axis(np.linalg.norm(c, axis=0))) is not None]
    normals = np.array([c[:, axis] / np.linalg.norm(c[:, axis]) for c, axis in found]).reshape(-1, 3)
    upright = math.cos(math.radians(OBLIQUE_DEGREES))
    if all(abs(normal[axis]) >= upright for normal, (_, axis) in zip(normals, found, strict=True)):
        return None
    mean = np.linalg.eigh(normals.T @ normals)[1][:, -1]  # a direction and its opposite are the same slices
    if np.median(np.abs(normals @ mean)) < upright:
        return None  # scans of several planes: no axis is that of most
    slices = int(np.abs(mean).argmax())
    mean = mean * np.sign(mean[slices])
    axes = _least_turn(slices, mean)
    rows, cols = (a for a in range(3) if a != slices)
    angle = _mean_angle(found, axes[:, rows], axes[:, cols])
    turned = axes.copy()
    turned[:, rows] = math.cos(angle) * axes[:, rows] + math.sin(angle) * axes[:, cols]
    turned[:, cols] = math.cos(angle) * axes[:, cols] - math.sin(angle) * axes[:, rows]
    x, y, z = (tuple(round(float(value), 6) for value in turned[:, axis]) for axis in range(3))
    return Frame((x, y, z), slices)  # type: ignore[arg-type]  # of three values each


def _least_turn(axis: int, direction: np.ndarray) -> np.ndarray:
    """Right, front and up (columns) after the smallest turn that brings one of them to a direction (Rodrigues)."""
    start = np.eye(3)[axis]
    cross, cosine = np.cross(start, direction), float(start @ direction)
    skew = np.array([[0, -cross[2], cross[1]], [cross[2], 0, -cross[0]], [-cross[1], cross[0], 0]])
    return np.eye(3) + skew + skew @ skew / (1 + cosine)


def _mean_angle(found: Sequence[tuple[np.ndarray, int]], first: np.ndarray, second: np.ndarray) -> float:
    """Mean angle, in -45 to 45 degrees, of the images' rows and columns from two directions in the plane of slices.

    A quarter of a turn changes rows into columns, so angles are averaged over four times themselves.
    """
    total = 0j
    for directions, across in found:
        row = directions[:, next(a for a in range(3) if a != across)]
        angle = math.atan2(float(row @ second), float(row @ first))
        total += complex(math.cos(4 * angle), math.sin(4 * angle))
    return math.atan2(total.imag, total.real) / 4
