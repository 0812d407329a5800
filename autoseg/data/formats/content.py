"""A file's content in pieces, inflated where it is packed, with a digest of the bytes that are read."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from autoseg.data.formats.stored import FileFaultError
from autoseg.workspace.digests import Hasher
from autoseg.workspace.files import open_regular

PIECE = 1 << 20
"""Bytes read and inflated at a time: fits a core's cache."""
GZIP = b"\x1f\x8b"
"""The first bytes of a gzip file."""
GZIP_OR_ZLIB = 47
"""For `wbits`: the stream's own header says which it is, and its checksum is checked."""
FIRST_BYTES = 4096
"""Of another gzip member that are inflated first; twice as many each time. zlib copies what it is given and leaves, so
that a file of many short members took the square of its size: 77 s for 500,000 empty ones."""
MOST_EMPTY = 10_000
"""Gzip members without content that may follow each other: tools write one at a file's end, and nobody thousands."""
MOST_INFLATION = 1040
"""Deflate makes at most 1,032 bytes of one. Source: zlib's technical notes."""


class BytesRead:
    """How many bytes of files this process has read, as they lie on disk; `add` may be replaced to tell another."""

    def __init__(self) -> None:
        """Nobody listens."""
        self.add: Callable[[int], object] = lambda count: None


BYTES_READ = BytesRead()


class Content:
    """A file's content, inflated where it is packed, piece by piece; digests the bytes that it reads."""

    def __init__(
        self, file: IO[bytes], file_bytes: int, *, is_packed: bool, piece_bytes: int = PIECE, with_digest: bool = False
    ) -> None:
        """Take an open file where its content begins.

        Args:
            file_bytes: size of the content as it is in the file.
            is_packed: whether it is a gzip or zlib stream.
            piece_bytes: read at a time.
            with_digest: of the bytes that are read.
        """
        self.file, self.file_bytes, self.is_packed = file, file_bytes, is_packed
        self.position = 0
        """Bytes of the content that were taken."""
        self._piece_bytes = piece_bytes
        self._digest = Hasher() if with_digest else None
        self.rest = b""
        self._pieces = self._inflated() if is_packed else self._raw()

    @property
    def digest(self) -> str:
        """Of the bytes read so far; empty where nobody asked for it."""
        return self._digest.hexdigest() if self._digest is not None else ""

    def _raw(self) -> Iterator[bytes]:
        while piece := self.file.read(self._piece_bytes):
            if self._digest is not None:
                self._digest.update(piece)
            BYTES_READ.add(len(piece))
            yield piece

    def _inflated(self) -> Iterator[bytes]:
        inflater = zlib.decompressobj(wbits=GZIP_OR_ZLIB)
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
                    inflater, started, take = zlib.decompressobj(wbits=GZIP_OR_ZLIB), False, FIRST_BYTES
                part = packed[:take]
                piece = inflater.decompress(part, self._piece_bytes)
                started = True
                packed = packed[len(part) - len(inflater.unused_data if inflater.eof else inflater.unconsumed_tail) :]
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
        self.position += len(piece)
        return piece

    def skip(self, size: int) -> None:
        """Pass over `size` bytes."""
        scratch = np.empty(min(size, PIECE), np.uint8)
        while size > 0 and (done := self.read_into(scratch[: min(size, PIECE)])):
            size -= done

    def read_into(self, buffer: np.ndarray) -> int:
        """Fill a uint8 buffer; the number of bytes filled."""
        done = 0
        piece = self.rest or (next(self._pieces, b"") if len(buffer) else b"")
        while piece and done < len(buffer):
            take = min(len(piece), len(buffer) - done)
            buffer[done : done + take] = np.frombuffer(piece, np.uint8, take)
            done += take
            piece = piece[take:] if take < len(piece) else next(self._pieces, b"") if done < len(buffer) else b""
        self.rest = piece
        self.position += done
        return done


@contextmanager
def open_content(
    path: Path, *, start: int = 0, is_packed: bool | None = None, piece_bytes: int = PIECE, with_digest: bool = False
) -> Iterator[Content]:
    """Open a file's content.

    Args:
        start: bytes of the file before it.
        is_packed: whether it is a gzip or zlib stream; None: where it begins as gzip does, whatever the file's name.
    """
    with open_regular(path) as file:
        file_bytes = max(0, file.seek(0, io.SEEK_END) - start)
        file.seek(start)
        if is_packed is None:
            is_packed = file.read(2) == GZIP
            file.seek(start)
        yield Content(file, file_bytes, is_packed=is_packed, piece_bytes=piece_bytes, with_digest=with_digest)


def check_length(num_bytes: int, promised: int) -> None:
    """Refuse a file that ends within its voxels.

    Raises:
        FileFaultError: It does.
    """
    if num_bytes < promised:
        finding = f"the file ends after {num_bytes} of {promised} bytes of voxels"
        raise FileFaultError("unreadable", finding, "Copy or export it again.")
