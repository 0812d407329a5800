"""What the reader of a format gives: a file's header, its voxels as they are stored, and what is wrong with it.

Stored axes are I, J, K and channels C, in any orientation; `Grid.affine` says where they lie.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from autoseg.data.grid import Grid, has_axes
from autoseg.errors import DataError

FARTHEST_MM = 1e9
"""No voxel lies as far from the origin; larger numbers are damage, and overflow."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong with a file or a case, before it is known what the case is called."""

    kind: str
    finding: str
    remedy: str
    is_fault: bool = True
    """False: a warning."""
    file: int = -1
    """Which of the case's files: the image's number, or LABEL_FILE; -1: the case as a whole."""


class FileFaultError(DataError):
    """A file that cannot be read, or not as it must be. The analysis collects the finding, others show the message."""

    def __init__(self, kind: str, finding: str, remedy: str, path: Path | None = None) -> None:
        """Say what is wrong; `path` is filled in by the table of formats."""
        self.fault, self.path = Finding(kind, finding, remedy), path
        super().__init__(f"{finding}. {remedy}" if path is None else f"{path}: {finding}. {remedy}")

    def __reduce__(self) -> tuple[type[FileFaultError], tuple[str, str, str, Path | None]]:
        # Exceptions are remade from their message alone otherwise, and this one must come back from other processes.
        return FileFaultError, (self.fault.kind, self.fault.finding, self.fault.remedy, self.path)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Header:
    """What is known of a file before its voxels are read."""

    grid: Grid
    """As stored."""
    num_channels: int
    dtype: np.dtype[Any]
    """Of the stored voxels."""
    warnings: tuple[Finding, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Size of the voxels."""
        return math.prod(self.grid.shape) * self.num_channels * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredVolume:
    """A file's voxels as they are stored."""

    array: np.ndarray
    """(I, J, K, C) in stored orientation and stored type, native byte order."""
    grid: Grid
    slope: float = 1.0
    inter: float = 0.0
    """Intensity = slope * stored + inter."""
    digest: str = ""
    """Of the file's bytes, as `autoseg.workspace.digests.content_digest` has it; empty where nobody asked for it."""
    warnings: tuple[Finding, ...] = ()


class StoredSlices(Protocol):
    """An open file whose slices along the last stored axis can be read one after the other."""

    @property
    def header(self) -> Header:
        """What the file says of itself."""
        ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """(I, J, stop - start, C): intensities, of the stored type where the file scales nothing."""
        ...


def scaled(array: np.ndarray, slope: float, inter: float) -> np.ndarray:
    """Intensities of stored voxels, in 64-bit floats where there is anything to compute; as nibabel has them."""
    if slope != 1:
        array = array * np.float64(slope)
    return array if inter == 0 else array + np.float64(inter)


def check_room(header: Header, free_bytes: int | None) -> None:
    """Refuse a file whose voxels do not fit into memory; `free_bytes` None: no limit.

    Raises:
        FileFaultError: They do not.
    """
    if free_bytes is not None and header.num_bytes > free_bytes:
        raise FileFaultError(
            "too_large",
            f"its voxels take {header.num_bytes / 2**30:.1f} GiB and {free_bytes / 2**30:.1f} GiB of memory are free",
            "Analyse it on a machine with more memory, or crop it.",
        )


def split_shape(full_shape: tuple[int, ...]) -> tuple[tuple[int, int, int], int]:
    """Split a stored shape into (I, J, K) and channels: (I, J, K), (I, J, K, C) or (I, J, K, 1, C).

    Raises:
        FileFaultError: It is neither.
    """
    channels = [s for s in full_shape[3:] if s != 1]
    if len(full_shape) < 3 or any(s < 1 for s in full_shape) or len(channels) > 1:
        raise FileFaultError(
            "not_3d",
            f"shape {full_shape} has {len(full_shape)} axes",
            "Expected a 3D volume, or 4D with channels last. Convert it.",
        )
    i, j, k = (int(s) for s in full_shape[:3])
    return (i, j, k), int(channels[0]) if channels else 1


def check_numbers(dtype: np.dtype[Any]) -> None:
    """Refuse voxels that are no plain numbers, such as colours and complex numbers.

    Raises:
        FileFaultError: They are not.
    """
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise no_numbers(str(dtype))


def no_numbers(kind: str) -> FileFaultError:
    """Say that a voxel is no number, or not one by itself; `kind`: what it is instead."""
    return FileFaultError("unreadable", f"voxels of type {kind}", "Expected numbers. Export as int16 or float32.")


def check_axes(affine: np.ndarray) -> None:
    """Refuse an affine whose axes do not span a volume.

    Raises:
        FileFaultError: They do not.
    """
    if not (np.abs(affine) < FARTHEST_MM).all() or not has_axes(affine):
        raise FileFaultError("spacing", "an affine that is not invertible", "Expected three axes. Export it again.")


def orientation_guessed() -> Finding:
    """Warn that a file does not say where its axes point."""
    remedy = "Left and right are guessed. Export it with an affine."
    return Finding("orientation", "no orientation in the header", remedy, is_fault=False)


def odd_units(unit: str) -> Finding:
    """Warn of sizes that are given in another unit than mm."""
    remedy = "They are read as mm, as everywhere. Export it again in mm."
    return Finding("spacing", f"sizes in {unit}", remedy, is_fault=False)


def lps_to_ras(affine: np.ndarray) -> np.ndarray:
    """Turn an affine into the world of DICOM and ITK (left, posterior, superior) into one into RAS+, and back."""
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def named_voxels(path: Path, name: str) -> Path:
    """The file of voxels that the text of a header names: NRRD and MetaImage write lists and patterns alike.

    Raises:
        FileFaultError: There are several; or as `voxels_beside`.
    """
    if name.split(" ")[0] == "LIST" or "%" in name:
        raise FileFaultError("unreadable", "its voxels are in several files", "Save it as one.")
    return voxels_beside(path, name)


def voxels_beside(path: Path, name: str) -> Path:
    """The file of voxels that belongs to a header.

    Only files beside the header or below are taken, so that a header cannot have any file of the machine read.

    Raises:
        FileFaultError: It lies elsewhere, or is not there.
    """
    beside = path.parent / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        remedy = "Expected a file beside the header. Move it there and correct the header."
        raise FileFaultError("unreadable", f"its voxels are said to be in {name}", remedy)
    if not beside.is_file():
        raise FileFaultError("missing", f"its voxels, {name}, are not there", "Copy them beside the header.")
    return beside


def brief(error: BaseException) -> str:
    """An error's first line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120] or type(error).__name__
