"""NIfTI: `.nii.gz` and `.nii`."""

from __future__ import annotations

import gzip
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import nibabel as nib
import numpy as np

from autoseg.data.formats.format import Format
from autoseg.data.formats.nifti_header import NiftiHeader, write_place
from autoseg.data.formats.nifti_voxels import check_length, open_content, read_nifti, read_nifti_header
from autoseg.data.formats.stored import StoredVolume, scaled
from autoseg.data.grid import Grid
from autoseg.errors import ResourceError
from autoseg.workspace.files import open_regular, write_atomic

HEADER_PIECE_BYTES = 4096
"""Read at a time where the header is enough."""


def is_nifti(path: Path, start: bytes) -> bool:
    """Whether a file's content is NIfTI-1 or NIfTI-2 with its voxels in the same file."""
    return start[344:347] == b"n+1" or start[4:7] == b"n+2"


def read_header(path: Path) -> NiftiHeader:
    """Read a file's header alone."""
    with open_content(path, piece_bytes=HEADER_PIECE_BYTES) as content:
        return read_nifti_header(content)


def read_with_digest(path: Path, free_bytes: int | None) -> StoredVolume:
    """Read a file and digest its bytes in one pass."""
    return read_nifti(path, free_bytes=free_bytes, with_digest=True)


class NiftiSlices:
    """An open, uncompressed NIfTI file."""

    def __init__(self, file: IO[bytes], header: NiftiHeader) -> None:
        """Take a file and its header."""
        self._file, self.header = file, header

    def read(self, start: int, stop: int) -> np.ndarray:
        """See `StoredSlices`."""
        header = self.header
        i, j, k = header.grid.shape
        shape = (i, j, stop - start)
        array = np.empty((*shape, header.num_channels), header.dtype, order="F")
        slice_bytes = i * j * header.dtype.itemsize
        for channel in range(header.num_channels):
            self._file.seek(header.offset + (channel * k + start) * slice_bytes)
            piece = self._file.read(slice_bytes * shape[2])
            check_length(len(piece), slice_bytes * shape[2])
            array[..., channel] = np.ndarray(shape, header.dtype, piece, order="F")
        return scaled(array.astype(header.dtype.newbyteorder("="), copy=False), header.slope, header.inter)


def open_slices(path: Path, stack: ExitStack) -> NiftiSlices:
    """Open a file so that its slices can be reached, unpacked into a temporary file where it is compressed.

    Raises:
        ResourceError: There is no room to unpack it.
    """
    with open_content(path) as content:
        header = read_nifti_header(content)
        if not content.is_gzip:
            return NiftiSlices(stack.enter_context(open_regular(path)), header)
    folder = tempfile.gettempdir()
    needed = header.offset + header.num_bytes
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(
            f"{path}: unpacked it takes {needed / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB. Free space, or "
            "set TMPDIR to a folder on a larger disk."
        )
    # It has no name, so that a killed process leaves nothing.
    flat: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
    with open_content(path) as content:
        for piece in content:
            flat.write(piece)
    check_length(max(0, min(header.num_bytes, flat.tell() - header.offset)), header.num_bytes)
    return NiftiSlices(flat, header)


def write_nifti(path: Path, grid: Grid, dtype: np.dtype, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a file from its voxels in the order they are stored; all of the file or nothing.

    Args:
        path: `.nii.gz`, compressed at level 1 as nibabel does, or `.nii`.
        pieces: first axis running fastest.
    """
    shell = nib.Nifti1Image(np.broadcast_to(np.zeros((), dtype), grid.shape), grid.affine)
    header = shell.header
    header.set_xyzt_units("mm")
    write_place(header, grid)
    header.set_slope_inter(1, 0)
    header["magic"], header["vox_offset"] = b"n+1", header.single_vox_offset

    def write(file: IO[bytes]) -> None:
        packed = path.name.lower().endswith(".gz")
        out = gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) if packed else file
        out.write(header.binaryblock + bytes(4))
        for piece in pieces:
            out.write(piece)
        if packed:
            out.close()

    write_atomic(path, write)


NIFTI = Format(
    name="NIfTI",
    suffixes=(".nii.gz", ".nii"),
    recognise=is_nifti,
    read_header=read_header,
    read=read_nifti,
    read_with_digest=read_with_digest,
    open_slices=open_slices,
    write=write_nifti,
)
