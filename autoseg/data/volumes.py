"""Volumes: image files to arrays in RAS+ and back onto the file's own grid.

Axes: C channels, then X (to the right), Y (to the front), Z (up), once read. An affine is 4x4, voxel -> mm.
Orientation maths and NIfTI headers are nibabel's.
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError, HeaderTypeError
from nibabel.wrapstruct import WrapStructError

from autoseg.errors import DataError

SUFFIXES = (".nii.gz", ".nii")
"""Files that are read without an extra package."""
_UNREADABLE = (OSError, EOFError, ValueError, OverflowError, MemoryError, zlib.error)
"""What a damaged file raises while its voxels are read."""
_MOST_DEFLATED = 1032
"""Bytes that one byte of a gzip file can stand for at most. Source: zlib's technical details, zlib.net."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """Where a file's voxels lie, as the file stores them (any orientation)."""

    shape: tuple[int, int, int]
    affine: np.ndarray
    """(4, 4) float64, stored voxel -> mm, RAS+ world."""

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Edge lengths of a voxel along the stored axes."""
        return tuple(float(s) for s in voxel_sizes(self.affine))  # type: ignore[return-value]

    @property
    def orientation(self) -> str:
        """Nearest anatomical directions of the stored axes, such as LPS."""
        return "".join(nib.aff2axcodes(self.affine))

    def to_ras(self) -> Grid:
        """The same voxels with the axes flipped and swapped to the nearest RAS+ order."""
        ornt = ras_orientation(self.affine)
        shape = [0, 0, 0]
        for stored, (ras, _) in enumerate(ornt):
            shape[int(ras)] = self.shape[stored]
        return Grid(shape=tuple(shape), affine=self.affine @ inv_ornt_aff(ornt, self.shape))  # type: ignore[arg-type]

    def differs_from(self, other: Grid, tolerance_mm: float = 1e-2) -> str | None:
        """Say how another grid differs, or None where every corner of both lies within `tolerance_mm`.

        Corners are compared, not matrix entries, so that a rounding error counts by the distance it causes.
        """
        if self.shape != other.shape:
            return f"shape {self.shape} against {other.shape}"
        corners = np.array(np.meshgrid(*[(0, s - 1) for s in self.shape])).reshape(3, -1)
        corners = np.vstack([corners, np.ones(corners.shape[1])])
        away_mm = float(np.abs((self.affine - other.affine) @ corners).max())
        if away_mm <= tolerance_mm:
            return None
        if self.orientation != other.orientation:
            return f"orientation {self.orientation} against {other.orientation}"
        if not np.allclose(self.spacing_mm, other.spacing_mm, rtol=1e-3):
            return f"spacing {_mm(self.spacing_mm)} against {_mm(other.spacing_mm)} mm"
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


def _mm(values: tuple[float, ...]) -> str:
    return "x".join(f"{v:.4g}" for v in values)


def ras_orientation(affine: np.ndarray, *, inverse: bool = False) -> np.ndarray:
    """Which stored axis becomes which of X, Y, Z and is flipped (nibabel's ornt); or the way back."""
    stored, ras = io_orientation(affine), axcodes2ornt(("R", "A", "S"))
    return ornt_transform(ras, stored) if inverse else ornt_transform(stored, ras)


def damaged(path: Path, error: BaseException) -> str:
    """Say that a file's voxels cannot be read."""
    return f"{path}: the file ends early or is damaged ({_brief(error)}). Copy or export it again."


def not_finite(path: Path, count: int) -> str:
    """Say that an image has voxels that are no number."""
    return f"{path}: {count} voxels are NaN or infinite. Replace them, or leave the case out."


def other_grid(path: Path, first: Path, found: str) -> str:
    """Say that two files of an image lie on different grids."""
    return f"{path}: not on the grid of {first.name} ({found}). Channels of a case must share one grid."


def suffix_of(path: Path) -> str:
    """The suffix of an image file, `.nii.gz` as one piece."""
    return ".nii.gz" if path.name.lower().endswith(".nii.gz") else path.suffix.lower()


def stem_of(path: Path) -> str:
    """The file's name without its image suffix."""
    return path.name[: len(path.name) - len(suffix_of(path))]


def open_nifti(path: Path) -> nib.Nifti1Image:
    """Open a file and check its header; no voxel is read.

    Raises:
        DataError: Missing, not NIfTI, cut short, or with an affine that is not invertible.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file. Check the path in the datalist and dataroot.")
    if suffix_of(path) not in SUFFIXES:
        raise DataError(f"{path}: unknown image format {path.suffix!r}. Expected one of {', '.join(SUFFIXES)}.")
    try:
        image = nib.load(path)
    except (*_UNREADABLE, HeaderDataError, HeaderTypeError, WrapStructError, ImageFileError) as error:
        raise DataError(f"{path}: not a readable NIfTI file ({_brief(error)}). Export it again.") from error
    kind = image.get_data_dtype().kind
    if kind not in "iufb":
        raise DataError(
            f"{path}: voxels of type {image.get_data_dtype()}. Expected numbers. Export it as int16 or float32."
        )
    promised = int(image.dataobj.offset) + math.prod(map(int, image.shape)) * image.get_data_dtype().itemsize
    size = path.stat().st_size
    if promised > size * (_MOST_DEFLATED if suffix_of(path) == ".nii.gz" else 1):
        raise DataError(
            f"{path}: the file ends early or is damaged (the header of shape {tuple(image.shape)} promises {promised} "
            f"bytes, the file has {size}). Copy or export it again."
        )
    affine = np.asarray(image.affine, np.float64)
    if not _has_axes(affine):
        raise DataError(
            f"{path}: the header's affine is not invertible. Expected a valid sform or qform. Export it again."
        )
    return image


def _has_axes(affine: np.ndarray) -> bool:
    """Whether an affine is 4x4, finite, invertible, and each of its axes has a nearest anatomical direction."""
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        return False
    return not np.isnan(io_orientation(affine)).any()


def _brief(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def spatial_and_channels(path: Path, shape: tuple[int, ...]) -> tuple[tuple[int, int, int], int]:
    """Split a stored shape into (X, Y, Z) and channels: (X, Y, Z), (X, Y, Z, C) or (X, Y, Z, 1, C)."""
    if len(shape) < 3 or any(s < 1 for s in shape):
        raise DataError(f"{path}: shape {shape} has {len(shape)} axes. Expected a 3D volume, or 4D with channels last.")
    channels = [s for s in shape[3:] if s != 1]
    if len(channels) > 1:
        raise DataError(f"{path}: shape {shape} has {len(shape)} axes. Expected a 3D volume, or 4D with channels last.")
    return tuple(int(s) for s in shape[:3]), int(channels[0]) if channels else 1  # type: ignore[return-value]


def read_grid(path: Path) -> tuple[Grid, int]:
    """Read a file's header alone.

    Returns:
        The grid as stored, and the number of channels.

    Raises:
        DataError: Missing, unreadable, not 3D (or 4D with channels), or with an affine that is not invertible.
    """
    image = open_nifti(path)
    shape, channels = spatial_and_channels(path, image.shape)
    return Grid(shape=shape, affine=np.asarray(image.affine, np.float64)), channels


def _read_array(path: Path, dtype: type | None) -> tuple[np.ndarray, Grid]:
    """Read one file: (C, X, Y, Z) in RAS+ and its stored grid; `dtype` None keeps the stored type."""
    image = open_nifti(path)
    shape, channels = spatial_and_channels(path, image.shape)
    try:
        array = np.asanyarray(image.dataobj) if dtype is None else np.asarray(image.dataobj, dtype=dtype)
    except _UNREADABLE as error:
        raise DataError(damaged(path, error)) from error
    grid = Grid(shape=shape, affine=np.asarray(image.affine, np.float64))
    array = array.reshape(*shape, channels)
    array = np.stack([apply_orientation(array[..., c], ras_orientation(grid.affine)) for c in range(channels)])
    return array, grid


def read_image(paths: tuple[Path, ...]) -> Volume:
    """Read a case's image, one file per channel or files with several channels.

    Returns:
        (C, X, Y, Z) float32 in RAS+, NIfTI scaling applied.

    Raises:
        DataError: A file cannot be read, the files lie on different grids, or voxels are NaN or infinite.
    """
    arrays: list[np.ndarray] = []
    first: Grid | None = None
    for path in paths:
        array, grid = _read_array(path, np.float32)
        if first is not None and (found := grid.differs_from(first)):
            raise DataError(other_grid(path, paths[0], found))
        first = first or grid
        arrays.append(array)
    joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    if not np.isfinite(joined).all():
        raise DataError(not_finite(paths[0], int(joined.size - np.isfinite(joined).sum())))
    assert first is not None
    return Volume(array=np.ascontiguousarray(joined), grid=first)


def read_label(path: Path) -> Volume:
    """Read a label file.

    Returns:
        (1, X, Y, Z) uint8, or uint16 where values exceed 255, in RAS+.

    Raises:
        DataError: The file cannot be read, has channels, or holds values that are no integers of 0..65535.
    """
    array, grid = _read_array(path, None)
    if len(array) != 1:
        raise DataError(f"{path}: a label with {len(array)} channels. Expected one label map.")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise DataError(f"{path}: the label has NaN or infinite voxels. Expected integers. Export it again.")
        rounded = np.rint(array)
        if np.abs(rounded - array).max() > 1e-3:
            odd = float(array[np.abs(rounded - array) > 1e-3][0])
            raise DataError(
                f"{path}: label value {odd:.6g} is not an integer. Was it interpolated? Resample by nearest neighbour."
            )
        array = rounded
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 65535:
        raise DataError(f"{path}: label values from {low} to {high}. Expected integers from 0 to 65535.")
    return Volume(array=np.ascontiguousarray(array, np.uint8 if high < 256 else np.uint16), grid=grid)


def volume_of(array: np.ndarray, affine: np.ndarray) -> Volume:
    """An array in memory as a volume.

    Args:
        array: (X, Y, Z) or (C, X, Y, Z), axes as the affine says; labels keep their type, floats become float32.
        affine: (4, 4), voxel -> mm in RAS+.

    Raises:
        DataError: The shape or the affine is none of a volume, or voxels are NaN or infinite.
    """
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise DataError(f"image: an array of shape {array.shape}. Expected (X, Y, Z) or (C, X, Y, Z).")
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or not _has_axes(affine):
        raise DataError(f"affine: expected a 4x4 matrix, voxel to mm, with three axes, found {affine.tolist()}.")
    if array.dtype.kind == "f":
        array = array.astype(np.float32, copy=False)
        if not np.isfinite(array).all():
            raise DataError("image: voxels are NaN or infinite. Replace them.")
    channels = array[None] if array.ndim == 3 else array
    x, y, z = channels.shape[1:]
    turned = np.stack([apply_orientation(channel, ras_orientation(affine)) for channel in channels])
    return Volume(array=np.ascontiguousarray(turned), grid=Grid(shape=(x, y, z), affine=affine))


def stored_array(array: np.ndarray, grid: Grid) -> np.ndarray:
    """An array (X, Y, Z) in RAS+ with the axes of a grid, as its file has them."""
    return np.ascontiguousarray(apply_orientation(array, ras_orientation(grid.affine, inverse=True)))


def write_volume(path: Path, array: np.ndarray, grid: Grid) -> None:
    """Write an array in RAS+ back onto a file's own grid, orientation and affine; all of the file or nothing.

    Args:
        array: (X, Y, Z) in RAS+, of any NumPy type NIfTI knows.
        grid: the grid of the file it belongs to.

    Raises:
        DataError: The array does not fit the grid.
    """
    ras = grid.to_ras()
    if array.shape != ras.shape:
        raise DataError(
            f"{path}: array of shape {array.shape} for a grid of {ras.shape} in RAS. Give the volume's own grid."
        )
    stored = stored_array(array, grid)
    write_stored(path, grid, array.dtype, (np.ascontiguousarray(s.T).data for s in np.moveaxis(stored, 2, 0)))


def write_stored(path: Path, grid: Grid, dtype: np.dtype, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a NIfTI file from its voxels in the order they are stored; all of the file or nothing.

    Args:
        path: `.nii.gz`, compressed at level 1 as nibabel does, or `.nii`.
        pieces: X running fastest, Z slowest.
    """
    shell = nib.Nifti1Image(np.broadcast_to(np.zeros((), dtype), grid.shape), grid.affine)
    header = shell.header
    header.set_xyzt_units("mm")
    header.set_slope_inter(1, 0)
    header["magic"], header["vox_offset"] = b"n+1", header.single_vox_offset
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        with open(part, "wb") as file:
            packed = suffix_of(path) == ".nii.gz"
            out = gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) if packed else file
            out.write(header.binaryblock + bytes(4))
            for piece in pieces:
                out.write(piece)
            if packed:
                out.close()
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
