"""One pass over an image file: its voxels as stored, its grid, a digest of its bytes, and what is wrong with it.

The analysis reads each file once, in pieces, and keeps the stored type, so that it needs the memory of the voxels
and little more. What a gzip checksum, the file's length and the header can tell is checked on the way.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from autoseg.data.formats.nifti import SUFFIXES, suffix_of
from autoseg.data.formats.nifti_header import FileFaultError, Finding, brief, judge_header, size_of_header
from autoseg.data.grid import Grid
from autoseg.workspace.digests import Hasher

PIECE = 1 << 20
"""Bytes read and inflated at a time: fits a core's cache."""
MOST_INFLATION = 1040
"""Deflate makes at most 1,032 bytes of one. Source: zlib's technical notes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredVolume:
    """A file's voxels as they are stored."""

    array: np.ndarray
    """(I, J, K, C) in stored orientation, stored type, native byte order, first axis fastest."""
    slope: float
    inter: float
    """Intensity = slope * stored + inter."""
    grid: Grid
    digest: str
    """Of the file's bytes, as `autoseg.workspace.digests.content_digest` has it."""
    warnings: tuple[Finding, ...]


class _Pieces:
    """A file's content, inflated where it is gzip, piece by piece; digests the bytes that it reads."""

    def __init__(self, file: BinaryIO, is_gzip: bool) -> None:
        self.file = file
        self.digest = Hasher()
        self.rest = b""
        self._pieces = self._inflated() if is_gzip else self._raw()

    def _raw(self) -> Iterator[bytes]:
        while piece := self.file.read(PIECE):
            self.digest.update(piece)
            yield piece

    def _inflated(self) -> Iterator[bytes]:
        inflater = zlib.decompressobj(wbits=31)
        started = False
        for packed in self._raw():
            while packed:
                if inflater.eof:  # another gzip member, or padding with zeros
                    packed = packed.lstrip(b"\0")
                    if not packed:
                        break
                    inflater, started = zlib.decompressobj(wbits=31), False
                piece = inflater.decompress(packed, PIECE)
                started = True
                packed = inflater.unused_data if inflater.eof else inflater.unconsumed_tail
                if piece:
                    yield piece
        while started and not inflater.eof and (piece := inflater.decompress(inflater.unconsumed_tail, PIECE)):
            yield piece
        if not inflater.eof:
            raise EOFError("the gzip stream ends early")

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

    def count_rest(self) -> int:
        """Read to the end, which verifies the checksum; the number of bytes."""
        count = len(self.rest)
        for piece in self._pieces:
            count += len(piece)
        return count


def read_stored(path: Path, free_bytes: int | None = None) -> StoredVolume:
    """Read a NIfTI file once.

    Args:
        free_bytes: memory the voxels may take; None: no limit.

    Raises:
        FileFaultError: Missing, unreadable, truncated, not 3D, without a usable grid, or too large.
    """
    if suffix_of(path) not in SUFFIXES:
        raise FileFaultError(
            "unreadable", f"unknown image format {path.suffix!r}", f"Convert it to one of {', '.join(SUFFIXES)}."
        )
    try:
        with open(path, "rb") as file:
            is_gzip = file.read(2) == b"\x1f\x8b"
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            return _read(_Pieces(file, is_gzip), size * (MOST_INFLATION if is_gzip else 1), free_bytes)
    except FileNotFoundError:
        raise FileFaultError("missing", "no such file", "Check the path in the datalist and dataroot.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise FileFaultError(
            "unreadable", f"the file ends early or is damaged ({brief(error)})", "Copy or export it again."
        ) from None


def _read(pieces: _Pieces, most_bytes: int, free_bytes: int | None) -> StoredVolume:
    start = pieces.read(4)
    header = judge_header(start + pieces.read(size_of_header(start) - len(start)))
    num_bytes = header.num_bytes
    if num_bytes + header.skip > most_bytes:
        raise FileFaultError(
            "unreadable",
            f"the header promises {num_bytes} bytes of voxels, more than the file can hold",
            "Copy or export it again.",
        )
    if free_bytes is not None and num_bytes > free_bytes:
        raise FileFaultError(
            "too_large",
            f"its voxels take {num_bytes / 2**30:.1f} GiB and {free_bytes / 2**30:.1f} GiB of memory are free",
            "Analyse it on a machine with more memory, or crop it.",
        )
    pieces.skip(header.skip)
    buffer = np.empty(num_bytes, np.uint8)
    done = pieces.read_into(buffer)
    if done < num_bytes:
        raise FileFaultError(
            "unreadable", f"the file ends after {done} of {num_bytes} bytes of voxels", "Copy or export it again."
        )
    warnings = header.warnings
    if extra := pieces.count_rest():
        finding = f"{extra} bytes follow the voxels that the header describes"
        remedy = "The header's size or type may be wrong; export it again if the image looks odd."
        warnings = (*warnings, Finding("header", finding, remedy, is_fault=False))
    array = np.ndarray((*header.shape, header.num_channels), header.dtype, buffer, order="F")
    if not header.dtype.isnative:
        array = array.byteswap(inplace=True).view(header.dtype.newbyteorder("="))
    return StoredVolume(
        array=array,
        slope=header.slope,
        inter=header.inter,
        grid=header.grid,
        digest=pieces.digest.hexdigest(),
        warnings=warnings,
    )
