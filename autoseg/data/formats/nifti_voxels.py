"""One pass over a NIfTI file: its voxels as stored, its grid, a digest of its bytes, and what is wrong with it.

A file is read once, in pieces, and keeps its stored type, so that it takes the memory of the voxels and little more.
What a gzip checksum, the file's length and the header can tell is checked on the way, by every command alike.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from autoseg.data.formats.nifti_header import NiftiHeader, judge_header, size_of_header
from autoseg.data.formats.stored import FileFaultError, Finding, StoredVolume, check_room
from autoseg.workspace.digests import Hasher
from autoseg.workspace.files import open_regular

PIECE = 1 << 20
"""Bytes read and inflated at a time: fits a core's cache."""
GZIP = b"\x1f\x8b"
"""The first bytes of a gzip file."""
FIRST_BYTES = 4096
"""Of another gzip member that are inflated first; twice as many each time. zlib copies what it is given and leaves, so
that a file of many short members took the square of its size: 77 s for 500,000 empty ones."""
MOST_EMPTY = 10_000
"""Gzip members without content that may follow each other: tools write one at a file's end, and nobody thousands."""
MOST_INFLATION = 1040
"""Deflate makes at most 1,032 bytes of one. Source: zlib's technical notes."""


class Content:
    """A file's content, inflated where it is gzip, piece by piece; digests the bytes that it reads."""

    def __init__(
        self, file: IO[bytes], file_bytes: int, *, is_gzip: bool, piece_bytes: int = PIECE, with_digest: bool = False
    ) -> None:
        """Take an open file at its beginning.

        Args:
            file_bytes: size of the file.
            piece_bytes: read at a time.
            with_digest: of the bytes that are read.
        """
        self.file, self.file_bytes, self.is_gzip = file, file_bytes, is_gzip
        self._piece_bytes = piece_bytes
        self._digest = Hasher() if with_digest else None
        self.rest = b""
        self._pieces = self._inflated() if is_gzip else self._raw()

    @property
    def digest(self) -> str:
        """Of the bytes read so far; empty where nobody asked for it."""
        return self._digest.hexdigest() if self._digest is not None else ""

    def _raw(self) -> Iterator[bytes]:
        while piece := self.file.read(self._piece_bytes):
            if self._digest is not None:
                self._digest.update(piece)
            yield piece

    def _inflated(self) -> Iterator[bytes]:
        inflater = zlib.decompressobj(wbits=31)
        started = False
        num_empty = 0  # members in a row
        for raw in self._raw():
            packed, take = memoryview(raw), len(raw)
            while packed:
                if inflater.eof:  # another gzip member, or padding with zeros
                    start = bytes(packed[:FIRST_BYTES])
                    if num_zeros := len(start) - len(start.lstrip(b"\0")):
                        packed = packed[num_zeros:]
                        continue
                    inflater, started, take = zlib.decompressobj(wbits=31), False, FIRST_BYTES
                given = packed[:take]
                piece = inflater.decompress(given, self._piece_bytes)
                started = True
                packed = packed[len(given) - len(inflater.unused_data if inflater.eof else inflater.unconsumed_tail) :]
                take *= 2
                num_empty = 0 if piece else num_empty + inflater.eof
                if num_empty > MOST_EMPTY:
                    raise ValueError(f"more than {MOST_EMPTY} gzip members without content follow each other")
                if piece:
                    yield piece
        while started and not inflater.eof:
            piece = inflater.decompress(inflater.unconsumed_tail, self._piece_bytes)
            if not piece:
                break
            yield piece
        if not inflater.eof:
            raise EOFError("the gzip stream ends early")

    def __iter__(self) -> Iterator[bytes]:
        """The rest of the content in pieces; reading to the end verifies the checksum."""
        if self.rest:
            yield self.rest
            self.rest = b""
        yield from self._pieces

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end."""
        while len(self.rest) < size and (piece := next(self._pieces, b"")):
            self.rest += piece
        piece, self.rest = self.rest[:size], self.rest[size:]
        return piece

    def skip(self, size: int) -> None:
        """Pass over `size` bytes."""
        scratch = np.empty(min(size, PIECE), np.uint8)
        while size > 0 and (done := self.read_into(scratch[: min(size, PIECE)])):
            size -= done

    def read_into(self, buffer: np.ndarray) -> int:
        """Fill a uint8 buffer; the number of bytes filled."""
        done = 0
        piece = self.rest
        while piece and done < len(buffer):
            take = min(len(piece), len(buffer) - done)
            buffer[done : done + take] = np.frombuffer(piece, np.uint8, take)
            done += take
            piece = piece[take:] if take < len(piece) else next(self._pieces, b"") if done < len(buffer) else b""
        self.rest = piece
        return done


@contextmanager
def open_content(path: Path, *, piece_bytes: int = PIECE, with_digest: bool = False) -> Iterator[Content]:
    """Open a file's content, inflated where the file is gzip, whatever its name says."""
    with open_regular(path) as file:
        is_gzip = file.read(2) == GZIP
        file_bytes = file.seek(0, io.SEEK_END)
        file.seek(0)
        yield Content(file, file_bytes, is_gzip=is_gzip, piece_bytes=piece_bytes, with_digest=with_digest)


def read_nifti(path: Path, *, free_bytes: int | None = None, with_digest: bool = False) -> StoredVolume:
    """Read a NIfTI file once.

    Args:
        free_bytes: memory the voxels may take; None: no limit.
        with_digest: also of the bytes read, which takes a little longer.

    Raises:
        FileFaultError: Damaged, truncated, not 3D, without a usable grid, or too large.
        OSError, EOFError, zlib.error: The file cannot be read, or its checksum is wrong.
    """
    with open_content(path, with_digest=with_digest) as content:
        header = read_nifti_header(content)
        check_room(header, free_bytes)
        content.skip(header.skip)
        buffer = np.empty(header.num_bytes, np.uint8)
        check_length(content.read_into(buffer), header.num_bytes)
        warnings = header.warnings
        # The checksum stands at the end, so that a file is sound only once all of it was read.
        if extra := sum(len(piece) for piece in content):
            finding = f"{extra} bytes follow the voxels that the header describes"
            remedy = "The header's size or type may be wrong; export it again if the image looks odd."
            warnings = (*warnings, Finding("header", finding, remedy, is_fault=False))
    array = np.ndarray((*header.grid.shape, header.num_channels), header.dtype, buffer, order="F")
    if not header.dtype.isnative:
        array = array.byteswap(inplace=True).view(header.dtype.newbyteorder("="))
    return StoredVolume(
        array=array,
        slope=header.slope,
        inter=header.inter,
        grid=header.grid,
        digest=content.digest,
        warnings=warnings,
    )


def read_nifti_header(content: Content) -> NiftiHeader:
    """Read and judge the header at the beginning of a file's content.

    Raises:
        FileFaultError: As `judge_header`; or the file is too short for the voxels.
    """
    start = content.read(4)
    header = judge_header(start + content.read(size_of_header(start) - len(start)))
    if not content.is_gzip:
        check_length(max(0, min(header.num_bytes, content.file_bytes - header.offset)), header.num_bytes)
    elif header.offset + header.num_bytes > content.file_bytes * MOST_INFLATION:
        raise FileFaultError(
            "unreadable",
            f"the header promises {header.num_bytes} bytes of voxels, more than the file can hold",
            "Copy or export it again.",
        )
    return header


def check_length(num_bytes: int, promised: int) -> None:
    """Refuse a file that ends within its voxels.

    Raises:
        FileFaultError: It does.
    """
    if num_bytes < promised:
        finding = f"the file ends after {num_bytes} of {promised} bytes of voxels"
        raise FileFaultError("unreadable", finding, "Copy or export it again.")
