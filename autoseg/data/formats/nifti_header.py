"""A NIfTI header: which voxels follow it and where they lie; and what is wrong with it.

Headers are nibabel's; here they are judged, since nibabel repairs some silently.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from autoseg.data.formats.raw import RawHeader
from autoseg.data.formats.stored import (
    FileFaultError,
    Finding,
    brief,
    check_axes,
    check_numbers,
    odd_units,
    orientation_guessed,
    split_shape,
)
from autoseg.data.grid import TOLERANCE_VOXELS, Grid, corners_apart_mm, has_axes, in_mm

SIZE_1, SIZE_2 = 348, 540
"""Bytes of a NIfTI-1 and of a NIfTI-2 header."""
NUMBERS_1, NUMBERS_2 = slice(42, 56), slice(24, 80)
"""Of those bytes, the numbers of voxels along each axis; how many axes there are stands before them."""
MAGICS = (b"n+1", b"n+2")
"""Of headers whose voxels follow in the same file."""
SFORM_FIELDS = ("sform_code", "srow_x", "srow_y", "srow_z", "xyzt_units")
QFORM_FIELDS = ("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z", "pixdim")
"""Of a header: what says where its voxels lie."""
SPATIAL_UNIT = 7
"""Bits of xyzt_units that say the unit of lengths; the others are of time."""
LENGTHS = {1: "metres", 2: "mm", 3: "micrometres"}
"""What they stand for."""


def size_of_header(start: bytes) -> int:
    """Bytes of the header that begins with four bytes: NIfTI-2 or, as everything else is taken for, NIfTI-1."""
    return SIZE_2 if start in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else SIZE_1


def judge_header(raw: bytes, magics: tuple[bytes, ...] = MAGICS) -> RawHeader:
    """Read a header and judge it.

    Args:
        raw: its bytes, NIfTI-2 where they are as many.
        magics: what it may call itself.

    Raises:
        FileFaultError: Not NIfTI, damaged, not 3D, no numbers, or without a usable grid.
    """
    if len(raw) < SIZE_1:
        raise FileFaultError("unreadable", f"{len(raw)} bytes are too few for a NIfTI header", "Export it again.")
    warnings: list[Finding] = []
    try:
        header = _parsed(raw)
        if bytes(header["magic"])[:3] not in magics:
            raise FileFaultError("unreadable", "not a NIfTI file (no magic string)", "Export it again.")
        pixdim = np.array(header["pixdim"][1:4], np.float64)
        header, rest = _repair(raw, header, warnings)
        dtype = header.get_data_dtype()
        full_shape = tuple(int(s) for s in header.get_data_shape())
        offset = int(header.get_data_offset())
        slope, inter = header.get_slope_inter()
    except (HeaderDataError, ImageFileError, ValueError, OverflowError) as error:
        raise FileFaultError("unreadable", f"a damaged NIfTI header ({brief(error)})", "Export it again.") from None
    check_numbers(dtype)
    shape, num_channels = split_shape(full_shape)
    grid = _grid(header, rest, pixdim, shape, warnings)
    return RawHeader(
        dtype=dtype,
        num_channels=num_channels,
        offset=offset,
        slope=1.0 if slope is None else float(slope),
        inter=0.0 if inter is None else float(inter),
        grid=grid,
        warnings=tuple(warnings),
    )


class _Notes(logging.Handler):
    """Keeps what nibabel says while it repairs a header."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _parsed(raw: bytes) -> nib.Nifti1Header:
    return (nib.Nifti2Header if len(raw) == SIZE_2 else nib.Nifti1Header)(raw, check=False)


def _repair(raw: bytes, header: nib.Nifti1Header, warnings: list[Finding]) -> tuple[nib.Nifti1Header, bytes]:
    """Repair a header as `nibabel.load` does, so that every reader sees the same; what it repairs is a warning.

    Returns:
        The header; and its bytes without numbers of voxels.
    """
    numbers = NUMBERS_2 if len(raw) == SIZE_2 else NUMBERS_1
    rest = raw[: numbers.start] + bytes(numbers.stop - numbers.start) + raw[numbers.stop :]
    repaired, texts = _repaired(rest)
    if repaired != rest:
        header = _parsed(repaired[: numbers.start] + raw[numbers] + repaired[numbers.stop :])
    if texts:
        remedy = "The image is read so. Export it again."
        warnings.append(Finding("header", f"a damaged NIfTI header: {'; '.join(texts)}", remedy, is_fault=False))
    return header, repaired


@lru_cache(maxsize=256)
def _repaired(rest: bytes) -> tuple[bytes, tuple[str, ...]]:
    """The bytes of a header as nibabel repairs them, and what it says of that.

    It looks at all but the numbers of voxels; many cases of a data set share the rest, and looking takes as long as
    unpacking a small file. Voxel sizes of 0 are judged apart: with an sform they do not matter.
    """
    notes = _Notes()
    logger = logging.Logger("header")
    logger.addHandler(notes)
    header = _parsed(rest)
    header.check_fix(logger=logger)
    return header.binaryblock, tuple(t for t in notes.texts if "pixdim[1,2,3]" not in t)


def _grid(
    header: nib.Nifti1Header, rest: bytes, pixdim: np.ndarray, shape: tuple[int, int, int], warnings: list[Finding]
) -> Grid:
    """The stored grid, and warnings where the header contradicts itself; `pixdim` as the file has it."""
    has_sform, has_qform = int(header["sform_code"]) > 0, int(header["qform_code"]) > 0
    if not has_sform and not (np.isfinite(pixdim).all() and (pixdim > 0).all()):
        raise FileFaultError("spacing", f"spacing of {in_mm(pixdim)} mm", "Expected positive sizes. Export it again.")
    try:
        affine = np.asarray(header.get_best_affine(), np.float64)
    except (HeaderDataError, ValueError) as error:
        raise FileFaultError("unreadable", f"a damaged orientation ({brief(error)})", "Export it again.") from None
    check_axes(affine)
    qform, place = _place(rest)
    grid = Grid(shape=shape, affine=affine, header=place)
    if not has_sform and not has_qform:
        warnings.append(orientation_guessed())
    elif finding := _contradiction(header, qform, pixdim, grid):
        remedy = "The affine is used. Export it again if that is wrong."
        warnings.append(Finding("header", finding, remedy, is_fault=False))
    if (unit := LENGTHS.get(int(header["xyzt_units"]) & SPATIAL_UNIT, "mm")) != "mm":
        warnings.append(odd_units(unit))
    return grid


def _qform(header: nib.Nifti1Header) -> np.ndarray | None:
    """The affine of the qform, whatever its code; None where it is damaged."""
    try:
        affine = np.asarray(header.get_qform(), np.float64)
    except (HeaderDataError, ValueError):
        return None
    return affine if has_axes(affine) else None


def _contradiction(header: nib.Nifti1Header, qform: np.ndarray | None, pixdim: np.ndarray, grid: Grid) -> str:
    """How the affine that is used, the sform where there is one, differs from the rest of the header; empty: not."""
    if int(header["sform_code"]) > 0 and int(header["qform_code"]) > 0:
        if qform is None:
            return "a damaged qform beside the sform (its affine)"
        away_mm = corners_apart_mm(qform, grid.affine, grid.shape)
        if away_mm > TOLERANCE_VOXELS * min(grid.spacing_mm):
            voxels = away_mm / min(grid.spacing_mm)
            return f"sform (its affine) and qform put corners {away_mm:.3g} mm ({voxels:.3g} voxels) apart"
    if any(abs(p - s) > 1e-2 * s or p != p for p, s in zip(pixdim.tolist(), grid.spacing_mm, strict=True)):
        return f"voxel sizes {in_mm(pixdim)} mm against {in_mm(grid.spacing_mm)} mm in its affine"
    return ""


@lru_cache(maxsize=256)
def _place(rest: bytes) -> tuple[np.ndarray | None, Mapping[str, np.ndarray]]:
    """What a repaired header without numbers of voxels says of where they lie; kept, as `_repaired` is.

    Returns:
        As `_qform`; and the fields for files written on this grid, those of a damaged qform left out.
    """
    header = _parsed(rest)
    qform = _qform(header)
    names = [*SFORM_FIELDS, *(QFORM_FIELDS if qform is not None else ())]
    fields = {name: header[name].copy() for name in names}
    return qform, {name: value for name, value in fields.items() if np.isfinite(value).all()}


def write_place(header: nib.Nifti1Header, grid: Grid) -> None:
    """Give a new header, which has a grid's affine, what else the grid's own file said of its place, codes and unit."""
    for name, value in grid.header.items():
        if name == "xyzt_units":
            if (unit := int(np.asarray(value)) & SPATIAL_UNIT) in LENGTHS:
                header[name] = unit
        elif name == "pixdim":
            header[name][:4] = np.asarray(value)[:4]  # what follows belongs to axes that a label does not have
        else:
            header[name] = value
