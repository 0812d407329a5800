"""NIfTI: `.nii.gz` and `.nii`."""

from __future__ import annotations

import gzip
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO

import nibabel as nib
import numpy as np

from autoseg.data.formats.content import Content, open_content
from autoseg.data.formats.format import Format, LabelFile, LabelWriter
from autoseg.data.formats.nifti_header import judge_header, size_of_header, write_place
from autoseg.data.formats.raw import RawHeader, RawSlices, check_promise, open_raw_slices, take_voxels
from autoseg.data.formats.stored import StoredVolume
from autoseg.workspace.files import write_atomic

HEADER_PIECE_BYTES = 4096
"""Read at a time where the header is enough."""


def is_nifti(path: Path, start: bytes) -> bool:
    """Whether a file's content is NIfTI-1 or NIfTI-2 with its voxels in the same file."""
    return start[344:347] == b"n+1" or start[4:7] == b"n+2"


def read_header(path: Path) -> RawHeader:
    """Read a file's header alone."""
    with open_content(path, piece_bytes=HEADER_PIECE_BYTES) as content:
        return read_nifti_header(content)


def read_nifti_header(content: Content) -> RawHeader:
    """Read and judge the header at the beginning of a file's content.

    Raises:
        FileFaultError: As `judge_header`; or the file is too short for the voxels.
    """
    start = content.read(4)
    raw = start + content.read(size_of_header(start) - len(start))
    header = judge_header(raw)
    header = replace(header, offset=max(header.offset, len(raw)))
    check_promise(header, content)
    return header


def read(path: Path) -> StoredVolume:
    """Read a file once."""
    with open_content(path) as content:
        return take_voxels(content, read_nifti_header(content))


def read_with_digest(path: Path, free_bytes: int | None) -> StoredVolume:
    """Read a file and digest its bytes in one pass, which takes a little longer."""
    with open_content(path, with_digest=True) as content:
        volume = take_voxels(content, read_nifti_header(content), free_bytes)
        return replace(volume, digest=content.digest)


def open_slices(path: Path, stack: ExitStack) -> RawSlices:
    """Open a file so that its slices can be reached.

    Raises:
        ResourceError: There is no room to unpack it.
    """
    return open_raw_slices(path, read_header(path), stack)


def write_nifti(path: Path, label: LabelFile) -> None:
    """Write a label file; `path`: `.nii.gz`, compressed at level 1 as nibabel does, or `.nii`."""
    grid = label.grid
    shell = nib.Nifti1Image(np.broadcast_to(np.zeros((), label.array.dtype), grid.shape), grid.affine)
    header = shell.header.as_byteswapped("<")
    header.set_xyzt_units("mm")
    write_place(header, grid)
    header.set_slope_inter(1, 0)
    header["magic"], header["vox_offset"] = b"n+1", header.single_vox_offset

    def write(file: IO[bytes]) -> None:
        packed = path.name.lower().endswith(".gz")
        out = gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) if packed else file
        out.write(header.binaryblock + bytes(4))
        for piece in label.pieces():
            out.write(piece)
        if packed:
            out.close()

    write_atomic(path, write)


NIFTI = Format(
    name="NIfTI",
    suffixes=(".nii.gz", ".nii"),
    recognise=is_nifti,
    read_header=read_header,
    read=read,
    read_with_digest=read_with_digest,
    open_slices=open_slices,
    writers=(LabelWriter(name="nifti", suffixes=(".nii.gz", ".nii"), write=write_nifti),),
)
