"""A NIfTI header: which voxels follow it and where they lie; and what is wrong with it.

Headers are nibabel's; here they are judged, since nibabel mends some without telling the caller.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from autoseg.data.formats.nifti import spatial_and_channels
from autoseg.data.grid import Grid
from autoseg.errors import DataError

SIZE_1, SIZE_2 = 348, 540
"""Bytes of a NIfTI-1 and of a NIfTI-2 header."""
SPACING_LIMITS_MM = (0.005, 50.0)
"""Voxel edges outside are taken for an error of units: finer than micro-CT, or thicker than any slice."""


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


class FileFaultError(Exception):
    """A file that cannot be analysed; never leaves the analyzer."""

    def __init__(self, kind: str, finding: str, remedy: str) -> None:
        self.found = Finding(kind, finding, remedy)
        super().__init__(finding)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Header:
    """What a header says, judged."""

    dtype: np.dtype[Any]
    shape: tuple[int, int, int]
    num_channels: int
    skip: int
    """Bytes between the header and the voxels."""
    slope: float
    inter: float
    grid: Grid
    warnings: tuple[Finding, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the voxels."""
        return math.prod(self.shape) * self.num_channels * self.dtype.itemsize


def size_of_header(start: bytes) -> int:
    """Bytes of the header that begins with four bytes: NIfTI-2 or, as everything else is taken for, NIfTI-1."""
    return SIZE_2 if start in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else SIZE_1


def judge_header(raw: bytes) -> Header:
    """Read a header and judge it.

    Raises:
        FileFaultError: Not NIfTI, damaged, not 3D, no numbers, or without a usable grid.
    """
    if len(raw) < SIZE_1:
        raise FileFaultError("unreadable", f"{len(raw)} bytes are too few for a NIfTI header", "Export it again.")
    kind = nib.Nifti2Header if len(raw) == SIZE_2 else nib.Nifti1Header
    warnings: list[Finding] = []
    try:
        header = kind(raw, check=False)
        if bytes(header["magic"])[:3] not in (b"n+1", b"n+2"):
            raise FileFaultError("unreadable", "not a NIfTI file (no magic string)", "Export it again.")
        pixdim = np.array(header["pixdim"][1:4], np.float64)
        _mend(header, warnings)
        dtype = header.get_data_dtype()
        full_shape = tuple(int(s) for s in header.get_data_shape())
        skip = int(header.get_data_offset()) - len(raw)
        slope, inter = header.get_slope_inter()
    except (HeaderDataError, ImageFileError, ValueError, OverflowError) as error:
        raise FileFaultError("unreadable", f"a damaged NIfTI header ({brief(error)})", "Export it again.") from None
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise FileFaultError("unreadable", f"voxels of type {dtype}", "Expected numbers. Export as int16 or float32.")
    shape, channels = _shape(full_shape)
    grid = _grid(header, pixdim, shape, warnings)
    return Header(
        dtype=dtype,
        shape=shape,
        num_channels=channels,
        skip=max(0, skip),
        slope=1.0 if slope is None else float(slope),
        inter=0.0 if inter is None else float(inter),
        grid=grid,
        warnings=tuple(warnings),
    )


class _Notes(logging.Handler):
    """Keeps what nibabel says while it mends a header."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _mend(header: nib.Nifti1Header, warnings: list[Finding]) -> None:
    """Mend a header as `nibabel.load` does, so that every reader sees the same; what it mends is a warning.

    Voxel sizes of 0 are judged apart: with an sform they do not matter.
    """
    notes = _Notes()
    logger = logging.Logger("header")
    logger.addHandler(notes)
    header.check_fix(logger=logger)
    texts = [t for t in notes.texts if "pixdim[1,2,3]" not in t]
    if texts:
        remedy = "The image is read so. Export it again."
        warnings.append(Finding("header", f"a damaged NIfTI header: {'; '.join(texts)}", remedy, is_fault=False))


def _shape(full_shape: tuple[int, ...]) -> tuple[tuple[int, int, int], int]:
    try:
        shape, channels = spatial_and_channels(Path(), full_shape)
    except DataError:
        raise FileFaultError(
            "not_3d",
            f"shape {full_shape} has {len(full_shape)} axes",
            "Expected a 3D volume, or 4D with channels last. Convert it.",
        ) from None
    if min(shape) == 1:
        raise FileFaultError(
            "not_3d", f"shape {shape} is a single slice", "Expected a volume. Stack the slices of a scan into one file."
        )
    return shape, channels


def _grid(header: nib.Nifti1Header, pixdim: np.ndarray, shape: tuple[int, int, int], warnings: list[Finding]) -> Grid:
    """The stored grid, and warnings where the header contradicts itself; `pixdim` as the file has it."""
    has_sform, has_qform = int(header["sform_code"]) > 0, int(header["qform_code"]) > 0
    if not has_sform and not (np.isfinite(pixdim).all() and (pixdim > 0).all()):
        raise FileFaultError("spacing", f"spacing of {_mm(pixdim)} mm", "Expected positive sizes. Export it again.")
    try:
        affine = np.asarray(header.get_best_affine(), np.float64)
    except (HeaderDataError, ValueError) as error:
        raise FileFaultError("unreadable", f"a damaged orientation ({brief(error)})", "Export it again.") from None
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise FileFaultError("spacing", "an affine that is not invertible", "Expected a valid sform. Export it again.")
    grid = Grid(shape=shape, affine=affine)
    low, high = SPACING_LIMITS_MM
    if not all(low <= s <= high for s in grid.spacing_mm):
        raise FileFaultError(
            "spacing",
            f"spacing of {_mm(grid.spacing_mm)} mm",
            f"Expected {low:g} to {high:g} mm. Correct the units, or export it again.",
        )
    if not has_sform and not has_qform:
        remedy = "Left and right are guessed. Export it with an affine."
        warnings.append(Finding("orientation", "no orientation in the header", remedy, is_fault=False))
    elif any(abs(p - s) > 1e-2 * s or p != p for p, s in zip(pixdim.tolist(), grid.spacing_mm, strict=True)):
        warnings.append(
            Finding(
                "header",
                f"voxel sizes {_mm(pixdim)} mm against {_mm(grid.spacing_mm)} mm in its affine",
                "The affine is used. Export it again if that is wrong.",
                is_fault=False,
            )
        )
    if (unit := int(header["xyzt_units"]) & 7) in (1, 3):
        warnings.append(
            Finding(
                "spacing",
                f"sizes in {'metres' if unit == 1 else 'micrometres'}",
                "They are read as mm, as everywhere. Export it again in mm.",
                is_fault=False,
            )
        )
    return grid


def _mm(values: np.ndarray | tuple[float, ...]) -> str:
    return "x".join(f"{v:.4g}" for v in values)


def brief(error: BaseException) -> str:
    """An error's first line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120] or type(error).__name__
