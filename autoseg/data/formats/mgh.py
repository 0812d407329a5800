"""FreeSurfer's `.mgz` and `.mgh`: a header of 284 bytes, big-endian voxels, then a few figures of the scan.

Source: https://surfer.nmr.mgh.harvard.edu/fswiki/FsTutorial/MghFormat
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
from nibabel.freesurfer.mghformat import MGHHeader
from nibabel.spatialimages import HeaderDataError

from autoseg.data.formats.content import Content, open_content
from autoseg.data.formats.format import Format
from autoseg.data.formats.raw import RawHeader, RawSlices, check_promise, open_raw_slices, take_voxels
from autoseg.data.formats.stored import (
    FileFaultError,
    StoredVolume,
    brief,
    check_axes,
    check_numbers,
    orientation_guessed,
    split_shape,
)
from autoseg.data.grid import Grid

HEADER_BYTES = 284
FIELD_BYTES = 90
"""Of the header that are used."""
HEADER_PIECE_BYTES = 4096
"""Read at a time where the header is enough."""
LARGEST = 1 << 20
"""No axis is longer; tells the format's first bytes from others'."""


def is_mgh(path: Path, start: bytes) -> bool:
    """Whether a file begins with the version, four sizes and a type of voxels."""
    if len(start) < HEADER_BYTES:
        return False
    version, *sizes, kind = np.frombuffer(start, ">i4", 6).tolist()
    return version == 1 and all(0 < size < LARGEST for size in sizes) and 0 <= kind <= 10


def read_header(path: Path) -> RawHeader:
    """Read a file's header alone."""
    with open_content(path, piece_bytes=HEADER_PIECE_BYTES) as content:
        return _judged(content)


def _judged(content: Content) -> RawHeader:
    """Read and judge the header at the beginning of a file's content.

    Raises:
        FileFaultError: Damaged, not 3D, no numbers, without a usable grid, or too short for the voxels.
    """
    raw = content.read(HEADER_BYTES)
    if len(raw) < HEADER_BYTES:
        raise FileFaultError("unreadable", f"{len(raw)} bytes are too few for an MGH header", "Export it again.")
    try:
        header = MGHHeader(raw[:FIELD_BYTES].ljust(MGHHeader.template_dtype.itemsize, b"\0"), check=False)
        if int(header["version"]) != 1:
            raise FileFaultError("unreadable", "not an MGH file (no version 1)", "Export it again.")
        dtype = np.dtype(header.get_data_dtype())
        shape, num_channels = split_shape(tuple(int(s) for s in header["dims"]))
        with np.errstate(all="ignore"):  # of a damaged header; what comes of it is checked below
            affine = np.asarray(header.get_affine(), np.float64)
    except (HeaderDataError, KeyError, ValueError) as error:
        raise FileFaultError("unreadable", f"a damaged MGH header ({brief(error)})", "Export it again.") from None
    check_numbers(dtype)
    check_axes(affine)
    judged = RawHeader(
        grid=Grid(shape=shape, affine=affine),
        num_channels=num_channels,
        dtype=dtype.newbyteorder(">"),
        warnings=() if int(header["goodRASFlag"]) == 1 else (orientation_guessed(),),
        offset=HEADER_BYTES,
        has_tail=True,
    )
    check_promise(judged, content)
    return judged


def read(path: Path) -> StoredVolume:
    """Read a file once."""
    with open_content(path) as content:
        return take_voxels(content, _judged(content))


def open_slices(path: Path, stack: ExitStack) -> RawSlices:
    """Open a file so that its slices can be reached."""
    return open_raw_slices(path, read_header(path), stack)


MGH = Format(
    name="MGH",
    suffixes=(".mgz", ".mgh"),
    recognise=is_mgh,
    read_header=read_header,
    read=read,
    open_slices=open_slices,
)
