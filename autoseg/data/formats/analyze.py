"""Pairs of `.hdr` and `.img`: NIfTI-1 with its voxels apart, and Analyze 7.5, which SPM used.

Analyze does not say where its axes point. It is read as nibabel and SPM do, with a warning: first axis to the left, and
the origin that SPM left in the header. An affine in SPM's `.mat` file beside it is not read, so such a pair is refused.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from autoseg.data.formats.format import Format
from autoseg.data.formats.nifti_header import SIZE_1, judge_header
from autoseg.data.formats.raw import RawHeader, checked, readers
from autoseg.data.formats.stored import (
    FileFaultError,
    brief,
    check_axes,
    check_numbers,
    orientation_guessed,
    split_shape,
    voxels_beside,
)
from autoseg.data.grid import Grid
from autoseg.workspace.files import open_regular

MAGIC = b"ni1"
"""Of a NIfTI header whose voxels are in another file."""
VOXELS = (".img", ".img.gz", ".IMG")
"""Endings of the file of voxels."""


def header_of(path: Path) -> Path:
    """The file of the header, where one of a pair is given."""
    return path.with_suffix(".hdr") if path.suffix.lower() == ".img" else path


def is_pair(path: Path, start: bytes) -> bool:
    """Whether a file is a header of 348 bytes, or the voxels beside one."""
    if path.suffix.lower() == ".img":
        return path.is_file() and header_of(path).is_file()
    return start[:4] in (b"\x5c\x01\0\0", b"\0\0\x01\x5c") and start[344:347] != b"n+1"


def read_header(path: Path) -> RawHeader:
    """Read and judge a header.

    Raises:
        FileFaultError: Damaged, not 3D, no numbers, without a usable grid, or without voxels.
    """
    path = header_of(path)
    with open_regular(path) as file:
        raw = file.read(SIZE_1)
    names = [path.with_suffix(ending).name for ending in VOXELS]
    voxel_file = voxels_beside(path, next((n for n in names if (path.parent / n).is_file()), names[0]))
    judged = judge_header(raw, (MAGIC,)) if raw[344:347] == MAGIC else _judge_analyze(path, raw)
    return checked(path, replace(judged, voxel_file=voxel_file))


def _judge_analyze(path: Path, raw: bytes) -> RawHeader:
    """Judge a header of Analyze 7.5, with what SPM put into it."""
    if len(raw) < SIZE_1:
        raise FileFaultError("unreadable", f"{len(raw)} bytes are too few for an Analyze header", "Export it again.")
    if (matrix := path.with_suffix(".mat")).is_file():
        finding = f"its affine is in {matrix.name}, which is not read"
        raise FileFaultError("orientation", finding, "Convert the pair to NIfTI, with SPM or nibabel.")
    try:
        header = nib.Spm2AnalyzeImage.header_class(raw, check=False)
        dtype = header.get_data_dtype()
        shape, num_channels = split_shape(tuple(int(s) for s in header.get_data_shape()))
        slope, inter = header.get_slope_inter()
        offset = int(header.get_data_offset())
        affine = np.asarray(header.get_best_affine(), np.float64)
    except (HeaderDataError, ImageFileError, ValueError, OverflowError, TypeError, KeyError) as error:
        raise FileFaultError("unreadable", f"a damaged Analyze header ({brief(error)})", "Export it again.") from None
    check_numbers(dtype)
    check_axes(affine)
    return RawHeader(
        grid=Grid(shape=shape, affine=affine),
        num_channels=num_channels,
        dtype=dtype,
        offset=offset,
        slope=1.0 if slope is None else float(slope),
        inter=0.0 if inter is None else float(inter),
        warnings=(orientation_guessed(),),
    )


def files(path: Path) -> tuple[Path, ...]:
    """Header and voxels."""
    header = header_of(path)
    return (header, *(p for p in map(header.with_suffix, VOXELS) if p.is_file()))


ANALYZE = Format(
    name="Analyze",
    suffixes=(".hdr",),
    recognise=is_pair,
    **readers(read_header),
    files=files,
)
