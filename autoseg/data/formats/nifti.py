"""NIfTI files: opening, reading and writing their voxels and geometry."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import apply_orientation, io_orientation
from nibabel.spatialimages import HeaderDataError, HeaderTypeError
from nibabel.wrapstruct import WrapStructError

from autoseg.data.grid import Grid, ras_orientation
from autoseg.errors import DataError

SUFFIXES = (".nii.gz", ".nii")
"""Files that are read without an extra package."""

_UNREADABLE = (OSError, EOFError, ValueError, OverflowError, MemoryError, zlib.error)
"""What a damaged file raises while its voxels are read."""

_MOST_DEFLATED = 1032
"""Bytes that one byte of a gzip file can stand for at most. Source: zlib's technical details, zlib.net."""


def damaged(path: Path, error: BaseException) -> str:
    """Say that a file's voxels cannot be read."""
    return f"{path}: the file ends early or is damaged ({_brief(error)}). Copy or export it again."


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
