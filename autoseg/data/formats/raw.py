"""Voxels that lie in one piece of a file, first axis fastest, packed or not: read whole, or slice by slice.

NIfTI, NRRD, MetaImage, MGH and Analyze store them so; their files describe where. A file is read once, in pieces, and
keeps its stored type, so that it takes the memory of the voxels and little more. What a checksum, the file's length
and the header can tell is checked on the way, by every command alike.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypedDict

import numpy as np

from autoseg.data.formats.content import MOST_INFLATION, Content, check_length, open_content
from autoseg.data.formats.stored import FileFaultError, Finding, Header, StoredSlices, StoredVolume, check_room, scaled
from autoseg.errors import ResourceError
from autoseg.workspace.files import open_regular


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RawHeader(Header):
    """A header, and where the voxels are that it describes."""

    offset: int
    """Bytes of the content before the voxels."""
    slope: float = 1.0
    inter: float = 0.0
    voxel_file: Path | None = None
    """None: the file of the header."""
    start: int = 0
    """Bytes of that file before its content."""
    is_packed: bool | None = None
    """Whether the content is a gzip or zlib stream; None: the content tells."""
    channels_first: bool = False
    """Whether a voxel's channels lie side by side; else each channel is a volume of its own."""
    has_tail: bool = False
    """Whether the format may have more behind the voxels."""


def check_promise(header: RawHeader, content: Content) -> None:
    """Refuse a header that describes more voxels than the file can hold, before memory is taken for them.

    Raises:
        FileFaultError: It does.
    """
    if not content.is_packed:
        check_length(max(0, min(header.num_bytes, content.file_bytes - header.offset)), header.num_bytes)
    elif header.offset + header.num_bytes > content.file_bytes * MOST_INFLATION:
        raise FileFaultError(
            "unreadable",
            f"the header promises {header.num_bytes} bytes of voxels, more than the file can hold",
            "Copy or export it again.",
        )


def checked(path: Path, header: RawHeader) -> RawHeader:
    """A header whose voxels the file can hold.

    Raises:
        FileFaultError: It cannot.
    """
    with open_content(header.voxel_file or path, start=header.start, is_packed=header.is_packed) as content:
        check_promise(header, content)
    return header


def take_voxels(content: Content, header: RawHeader, free_bytes: int | None = None) -> StoredVolume:
    """Read the voxels of a content whose header was judged, to the content's end.

    Raises:
        FileFaultError: The file is too short, or the voxels are too large for the memory.
    """
    check_room(header, free_bytes)
    content.skip(header.offset - content.position)
    buffer = np.empty(header.num_bytes, np.uint8)
    check_length(content.read_into(buffer), header.num_bytes)
    warnings = header.warnings
    # A checksum stands at the end, so that a file is sound only once all of it was read.
    if (extra := sum(len(piece) for piece in content)) and not header.has_tail:
        finding = f"{extra} bytes follow the voxels that the header describes"
        remedy = "The header's size or type may be wrong; export it again if the image looks odd."
        warnings = (*warnings, Finding("header", finding, remedy, is_fault=False))
    return StoredVolume(
        array=_native(_shaped(buffer, header, header.grid.shape[2])),
        slope=header.slope,
        inter=header.inter,
        grid=header.grid,
        digest=content.digest,
        warnings=warnings,
    )


def _shaped(buffer: np.ndarray | bytes, header: RawHeader, num_slices: int) -> np.ndarray:
    """Voxels of some slices as they lie in a file, (I, J, K, C) in stored byte order; a view."""
    shape = (*header.grid.shape[:2], num_slices)
    if header.channels_first:
        by_voxel = np.ndarray((header.num_channels, *shape), header.dtype, buffer, order="F")
        return np.moveaxis(by_voxel, 0, 3)
    return np.ndarray((*shape, header.num_channels), header.dtype, buffer, order="F")


def _native(array: np.ndarray) -> np.ndarray:
    """The same voxels in this machine's byte order, swapped in place."""
    return array if array.dtype.isnative else array.byteswap(inplace=True).view(array.dtype.newbyteorder("="))


def read_voxels(path: Path, header: RawHeader) -> StoredVolume:
    """Read the voxels that a file's header describes.

    Raises:
        FileFaultError: As `take_voxels`.
        OSError, EOFError, zlib.error: The file cannot be read, or its checksum is wrong.
    """
    with open_content(header.voxel_file or path, start=header.start, is_packed=header.is_packed) as content:
        return take_voxels(content, header)


def readers(read_header: Callable[[Path], RawHeader]) -> RawReaders:
    """The ways to a format's voxels that follow from how its header is read."""
    return {
        "read_header": read_header,
        "read": lambda path: read_voxels(path, read_header(path)),
        "open_slices": lambda path, stack: open_raw_slices(path, read_header(path), stack),
    }


class RawReaders(TypedDict):
    """Fields of `Format`."""

    read_header: Callable[[Path], Header]
    read: Callable[[Path], StoredVolume]
    open_slices: Callable[[Path, ExitStack], StoredSlices]


class RawSlices:
    """An open file whose voxels are not packed."""

    def __init__(self, file: IO[bytes], header: RawHeader, start: int) -> None:
        """Take a file, its header, and how many bytes of the file come before its content."""
        self._file, self.header, self._voxels_at = file, header, start + header.offset

    def read(self, start: int, stop: int) -> np.ndarray:
        """See `StoredSlices`."""
        header = self.header
        i, j, k = header.grid.shape
        num_slices = stop - start
        slice_bytes = i * j * header.dtype.itemsize
        if header.channels_first:
            slice_bytes *= header.num_channels
            array = _shaped(self._piece(start * slice_bytes, num_slices * slice_bytes), header, num_slices)
        else:
            array = np.empty((i, j, num_slices, header.num_channels), header.dtype, order="F")
            for channel in range(header.num_channels):
                piece = self._piece((channel * k + start) * slice_bytes, num_slices * slice_bytes)
                array[..., channel] = np.ndarray((i, j, num_slices), header.dtype, piece, order="F")
        return scaled(array.astype(header.dtype.newbyteorder("="), copy=False), header.slope, header.inter)

    def _piece(self, offset: int, size: int) -> bytes:
        self._file.seek(self._voxels_at + offset)
        piece = self._file.read(size)
        check_length(len(piece), size)
        return piece


def open_raw_slices(path: Path, header: RawHeader, stack: ExitStack) -> RawSlices:
    """Open a file so that its slices can be reached, unpacked into a temporary file where it is packed.

    Raises:
        FileFaultError: The file is too short.
        ResourceError: There is no room to unpack it.
    """
    voxel_file = header.voxel_file or path
    with open_content(voxel_file, start=header.start, is_packed=header.is_packed) as content:
        check_promise(header, content)
        if not content.is_packed:
            return RawSlices(stack.enter_context(open_regular(voxel_file)), header, header.start)
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
        for piece in content:
            flat.write(piece)
    check_length(max(0, min(header.num_bytes, flat.tell() - header.offset)), header.num_bytes)
    return RawSlices(flat, header, 0)
