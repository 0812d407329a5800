"""What a file is: the digest of its bytes, the one identity that all of a run goes by.

A data set or work_dir that was copied, touched or mounted elsewhere is the same; a changed voxel is not. Digests are
remembered by inode, size and times, in this process and in a file of the run, only so that bytes need not be read
again: a file that was copied is read once more, and known by what it holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from autoseg.workspace.files import append_text, open_regular

PIECE = 1 << 20
"""Bytes read at a time: fits a core's cache."""
SETTLED_S = 2.0
"""A file younger than this when it was read may change again within the clock's tick: its digest is not remembered."""
MOST_LINES = 200_000
"""Lines of a store that are kept when it is opened, the last ones: some 30 MB."""

FileSignature = tuple[int, int, int, int]
"""Inode, size, time of the content's and of the entry's last change in ns. The time of the entry's change cannot be set
back by copying or unpacking over a file."""


class Hasher:
    """Digests bytes as they are read."""

    def __init__(self) -> None:
        """Begin with none."""
        self._hash = hashlib.sha256()

    def update(self, piece: bytes) -> None:
        """Take some more bytes."""
        self._hash.update(piece)

    def hexdigest(self) -> str:
        """32 hexadecimal digits."""
        return self._hash.hexdigest()[:32]


def file_signature(*paths: Path) -> FileSignature:
    """What tells without reading that a file is untouched; of several files as if they were one. Raises: OSError."""
    stats = [os.stat(path) for path in paths]
    signatures = [(stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats]
    if len(signatures) == 1:
        return signatures[0]
    _, sizes, changed, entries_changed = zip(*signatures, strict=True)
    inodes = hashlib.sha256(json.dumps(sorted(signatures)).encode()).digest()
    return int.from_bytes(inodes[:7], "little"), sum(sizes), max(changed), max(entries_changed)


def is_settled(signature: FileSignature, now: float) -> bool:
    """Whether a signature that was taken at `now` can be trusted later on."""
    return now - max(signature[2], signature[3]) / 1e9 > SETTLED_S


def _digest_of_bytes(path: Path) -> str:
    hasher = Hasher()
    with open_regular(path) as file:
        while piece := file.read(PIECE):
            hasher.update(piece)
    return hasher.hexdigest()


class DigestStore:
    """Digests by signature: in memory, and in a file that several processes add lines to."""

    def __init__(self) -> None:
        """Nothing is known, and nothing written."""
        self.path: Path | None = None
        self.known: dict[FileSignature, str] = {}
        self._num_recognised = 0
        self._contents: set[str] = set()
        self._lock = threading.Lock()

    def open(self, path: Path) -> None:
        """Know what a run's file knows, and add to it from now on; a damaged line is left out."""
        with self._lock:
            if path == self.path:
                return
            self.path, self._num_recognised = path, 0
            try:
                with open_regular(path) as file:
                    lines = file.read().decode(errors="replace").splitlines()[-MOST_LINES:]
            except OSError:
                lines = []
            for line in lines:
                try:
                    inode, size, changed, entry_changed, digest = json.loads(line)
                    self.known[int(inode), int(size), int(changed), int(entry_changed)] = str(digest)
                except (ValueError, TypeError, RecursionError):
                    continue
            self._contents = set(self.known.values())

    def digest(self, *paths: Path) -> str:
        """The digest of a file's bytes, or of several files in any order. Raises: OSError: one cannot be read."""
        signature = file_signature(*paths)
        with self._lock:
            if signature in self.known:
                return self.known[signature]
        digests = sorted(_digest_of_bytes(path) for path in paths)
        digest = digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()[:32]
        self.add([(signature, digest)])
        return digest

    def take_recognised(self) -> int:
        """How many files were read since this was asked last whose content was known: copied, moved or touched."""
        with self._lock:
            count, self._num_recognised = self._num_recognised, 0
            return count

    def add(self, digests: Iterable[tuple[FileSignature, str]]) -> None:
        """Remember digests of files whose signatures were taken before they were read."""
        now = time.time()
        with self._lock:
            new = [(s, d) for s, d in digests if s not in self.known]
            self._num_recognised += sum(d in self._contents for _, d in new)
            self._contents.update(d for _, d in new)
            new = [(s, d) for s, d in new if is_settled(s, now)]
            self.known.update(new)
            if self.path is None or not new:
                return
            text = "".join(json.dumps([*signature, digest]) + "\n" for signature, digest in new)
            try:
                # One write at the end of the file: lines of several processes do not mix on a local disk, and where
                # they do, they are left out when read.
                append_text(self.path, text)
            except OSError:
                self.path = None  # a folder that cannot be written to: bytes are read again next time


DIGESTS = DigestStore()
"""This process' store. It holds facts about files alone, so it makes no difference which run asked for them first."""


def content_digest(*paths: Path) -> str:
    """The digest of a file's bytes, or of several files in any order, 32 hexadecimal digits.

    Raises:
        OSError: One cannot be read.
    """
    return DIGESTS.digest(*paths)
