"""A voxel grid in space, and a volume on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

TOLERANCE_VOXELS = 0.1
"""Distance of corners, as a share of the shortest edge of a voxel, up to which two grids count as one. A choice: it
moves no voxel onto another, where a label is drawn to half a voxel at best, and rounding in headers is far below."""

LEAST_VOLUME = 1e-9
"""Of a box with edges of length 1 along an affine's axes; under it two of them point the same way."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """Where a file's voxels lie, as the file stores them (any orientation)."""

    shape: tuple[int, int, int]
    affine: np.ndarray
    """(4, 4) float64, stored voxel -> mm, RAS+ world."""
    header: Mapping[str, npt.ArrayLike] = field(default_factory=dict)
    """What else a file says of its place: the fields of a NIfTI header with sform, qform, their codes and the unit, so
    that a file that is written on the grid says the same. Empty: it comes from no such file."""

    @cached_property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Edge lengths of a voxel along the stored axes."""
        return tuple(float(s) for s in voxel_sizes(self.affine))  # type: ignore[return-value]

    @property
    def orientation(self) -> str:
        """Nearest anatomical directions of the stored axes, such as LPS."""
        return "".join(nib.orientations.ornt2axcodes(axes_of(self.affine)))

    def to_ras(self) -> Grid:
        """The same voxels with the axes flipped and swapped to the nearest RAS+ order."""
        ornt = ras_orientation(self.affine)
        shape = [0, 0, 0]
        for stored, (ras, _) in enumerate(ornt):
            shape[int(ras)] = self.shape[stored]
        return Grid(shape=tuple(shape), affine=self.affine @ inv_ornt_aff(ornt, self.shape))  # type: ignore[arg-type]

    def differs_from(self, other: Grid) -> str | None:
        """Say how another grid differs, or None where both are one in RAS, to a tenth of a voxel.

        However the axes are stored, voxels of one place count as one, as readers turn all to RAS.
        """
        if self.shape == other.shape and np.array_equal(self.affine, other.affine):
            return None  # as most labels and their images
        own_ras, other_ras = self.to_ras(), other.to_ras()
        if own_ras.shape != other_ras.shape:
            turned = (
                "" if self.orientation == other.orientation else f", {self.orientation} against {other.orientation}"
            )
            return f"shape {self.shape} against {other.shape}{turned}"
        away_mm = corners_apart_mm(own_ras.affine, other_ras.affine, own_ras.shape)
        if away_mm <= TOLERANCE_VOXELS * min(*self.spacing_mm, *other.spacing_mm):
            return None
        if self.orientation != other.orientation:
            return f"orientation {self.orientation} against {other.orientation}"
        if not np.allclose(self.spacing_mm, other.spacing_mm, rtol=1e-3):
            return f"spacing {in_mm(self.spacing_mm)} against {in_mm(other.spacing_mm)} mm"
        return f"corners up to {away_mm:.3g} mm apart"


@dataclass(frozen=True, kw_only=True, eq=False)
class Volume:
    """An image or label in RAS+, and the grid of the file it came from."""

    array: np.ndarray
    """(C, X, Y, Z): float32 for images, an integer type for labels."""
    grid: Grid
    """The file's own grid, to go back to."""

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Edge lengths of a voxel along X, Y, Z."""
        return self.grid.to_ras().spacing_mm


def corners_apart_mm(a: np.ndarray, b: np.ndarray, shape: tuple[int, int, int]) -> float:
    """The largest distance between a corner voxel's place by one affine and by another.

    Corners are compared, not matrix entries, so that a rounding error counts by the distance it causes.
    """
    away = ((a - b) @ corners_of(shape))[:3]
    return float(np.linalg.norm(away, axis=0).max())


def corners_of(shape: Sequence[int]) -> np.ndarray:
    """The indices of a volume's corner voxels, (4, 8), each with a 1 below so that an affine can be applied."""
    i, j, k = (s - 1.0 for s in shape)
    return np.array([[0, 0, 0, 0, i, i, i, i], [0, 0, j, j, 0, 0, j, j], [0, k, 0, k, 0, k, 0, k], [1.0] * 8])


def stored_as(array: np.ndarray, own: Grid, other: Grid) -> np.ndarray:
    """An array (I, J, K, ...) stored on one grid, with the axes of another that is the same one in RAS."""
    own_axes, other_axes = axes_of(own.affine), axes_of(other.affine)
    if (own_axes == other_axes).all():
        return array
    ornt = ornt_transform(own_axes, other_axes)
    return np.asfortranarray(apply_orientation(array, ornt))


def in_mm(values: Iterable[float]) -> str:
    """Lengths as text: 1x1x2.5."""
    return "x".join(f"{v:.4g}" for v in values)


def has_axes(affine: np.ndarray) -> bool:
    """Whether an affine is 4x4, finite, invertible, and each of its axes has a nearest anatomical direction."""
    return (
        affine.shape == (4, 4)
        and bool(np.isfinite(affine).all())
        and _spans_space(affine[:3, :3].astype(np.float64).tobytes())
        and not np.isnan(axes_of(affine)).any()
    )


@lru_cache(maxsize=1024)
def _spans_space(of_axes: bytes) -> bool:
    """Whether three axes are not in one plane: measured at length 1, since a voxel of nanometres is small, too.

    Args:
        of_axes: as `_axes_of` takes it, and kept for the same reason.
    """
    linear = np.frombuffer(of_axes).reshape(3, 3)
    edges = np.linalg.norm(linear, axis=0)
    return bool((edges > 0).all()) and bool(abs(np.linalg.det(linear / edges)) >= LEAST_VOLUME)


def axes_of(affine: np.ndarray) -> np.ndarray:
    """Which world axis each stored axis is nearest to, and its direction (nibabel's ornt), (3, 2); NaN: none."""
    return np.frombuffer(_axes_of(affine[:3, :3].astype(np.float64).tobytes())).reshape(3, 2)


@lru_cache(maxsize=1024)
def _axes_of(linear: bytes) -> bytes:
    """The same of the (3, 3) part of an affine, float64: kept, since a singular value decomposition takes as long as
    reading a small file, and most cases of a data set share one.
    """
    affine = np.eye(4)
    affine[:3, :3] = np.frombuffer(linear).reshape(3, 3)
    return io_orientation(affine).astype(np.float64).tobytes()


def ras_orientation(affine: np.ndarray, *, inverse: bool = False) -> np.ndarray:
    """Which stored axis becomes which of X, Y, Z and is flipped (nibabel's ornt); or the way back."""
    stored, ras = axes_of(affine), axcodes2ornt(("R", "A", "S"))
    return ornt_transform(ras, stored) if inverse else ornt_transform(stored, ras)
