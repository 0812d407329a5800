"""Volumes: image files to arrays in RAS+ and back onto the file's own grid.

Axes: C channels, then X (to the right), Y (to the front), Z (up), once read. An affine is 4x4, voxel -> mm.
Orientation maths is nibabel's; files are read and written through the table of formats.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from nibabel.orientations import apply_orientation

from autoseg.data.formats.format import LabelFile
from autoseg.data.formats.label_files import SegmentValues, read_stored_label
from autoseg.data.formats.stored import scaled
from autoseg.data.formats.table import read_stored_volume, write_label
from autoseg.data.grid import Grid, Volume, has_axes, ras_orientation
from autoseg.errors import DataError, counted


def not_finite(path: Path, count: int) -> str:
    """Say that an image has voxels that are no number."""
    return f"{path}: {counted(count, 'voxel is', 'voxels are')} NaN or infinite. Replace them, or leave the case out."


def other_grid(path: Path, first: Path, difference: str) -> str:
    """Say that two files of an image lie on different grids."""
    return f"{path}: not on the grid of {first.name} ({difference}). Channels of a case must share one grid."


def read_image(paths: tuple[Path, ...]) -> Volume:
    """Read a case's image, one file per channel or files with several channels.

    Returns:
        (C, X, Y, Z) float32 in RAS+, the file's scaling applied.

    Raises:
        DataError: A file cannot be read, the files lie on different grids, or voxels are NaN or infinite.
    """
    volumes = [read_stored_volume(path) for path in paths]
    grid = volumes[0].grid
    for path, volume in zip(paths, volumes, strict=True):
        if difference := volume.grid.differs_from(grid):
            raise DataError(other_grid(path, paths[0], difference))
    array = np.empty((sum(v.array.shape[3] for v in volumes), *grid.to_ras().shape), np.float32)
    channel = 0
    while volumes:
        volume = volumes.pop(0)  # each file's voxels are let go when they were taken over
        for stored in np.moveaxis(volume.array, 3, 0):
            array[channel] = _in_ras(scaled(stored, volume.slope, volume.inter), volume.grid)
            channel += 1
    if not np.isfinite(array).all():
        raise DataError(not_finite(paths[0], int(array.size - np.isfinite(array).sum())))
    return Volume(array=array, grid=grid)


def _in_ras(stored: np.ndarray, grid: Grid) -> np.ndarray:
    """A channel as stored, turned to (X, Y, Z) in RAS+; a view."""
    turned: np.ndarray = apply_orientation(stored, ras_orientation(grid.affine))
    return turned


def read_label(path: Path, *, grid: Grid | None = None, values: SegmentValues = ()) -> Volume:
    """Read a label file.

    Args:
        grid, values: of its image and of the classes, where segments are known by name; see `read_stored_label`.

    Returns:
        (1, X, Y, Z) uint8, or uint16 where values exceed 255, in RAS+.

    Raises:
        DataError: The file cannot be read, has channels, or holds values that are no integers of 0..65535.
    """
    volume = read_stored_label(path, grid=grid, values=values)
    num_channels = volume.array.shape[3]
    if num_channels != 1:
        raise DataError(f"{path}: a label with {num_channels} channels. Expected one label map.")
    array = _in_ras(scaled(volume.array[..., 0], volume.slope, volume.inter), volume.grid)[None]
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
    return Volume(array=np.ascontiguousarray(array, np.uint8 if high < 256 else np.uint16), grid=volume.grid)


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
    if not has_axes(affine):
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


def write_volume(
    path: Path, array: np.ndarray, grid: Grid, write: Callable[[Path, LabelFile], None] = write_label
) -> None:
    """Write an array in RAS+ back onto a file's own grid, orientation and affine; all of the file or nothing.

    Args:
        array: (X, Y, Z) in RAS+, of an integer type.
        grid: the grid of the file it belongs to.
        write: the file, from its grid and voxels; as its suffix says unless another is given.

    Raises:
        DataError: The array does not fit the grid.
    """
    ras = grid.to_ras()
    if array.shape != ras.shape:
        raise DataError(
            f"{path}: array of shape {array.shape} for a grid of {ras.shape} in RAS. Give the volume's own grid."
        )
    write(path, LabelFile(grid=grid, array=stored_array(array, grid)))
