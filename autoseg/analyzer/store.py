"""Results of earlier analyses, by content: what was read once is not read again.

A line of JSON per case in one file that only grows, so that a killed run keeps every case it had finished; a last
line that is cut short is ignored. A case is known by the digests of its files (see `autoseg.workspace.digests`):
copied, moved or touched data are hashed at most, not analysed.
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autoseg.analyzer.case import CaseStats, ClassStats
from autoseg.data.formats.stored import Finding
from autoseg.data.histograms import Histogram, Stats
from autoseg.workspace.files import append_text, open_regular, write_text

VERSION = 4
"""Of the statistics; results of another version are not used."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the store."""

    kind: str
    """Which files are what, and what else the result depends on."""
    sizes: tuple[int, ...]
    digests: tuple[str, ...]
    stats: dict[str, Any]
    """Plain; turned into CaseStats when used."""


class Store:
    """The file of results below a work_dir."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[Entry] = []
        self.by_digests: dict[tuple[str, tuple[str, ...]], Entry] = {}
        self.by_sizes: dict[tuple[str, tuple[int, ...]], set[tuple[str, ...]]] = {}
        self.used: set[int] = set()
        if path.exists():
            with open_regular(path) as file:
                for line in file:
                    self._take(line.decode(errors="replace"))

    def _take(self, line: str) -> None:
        try:
            data = json.loads(line)
            if data["version"] != VERSION:
                return
            entry = Entry(data["kind"], tuple(data["sizes"]), tuple(data["digests"]), data["stats"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return
        self._index(entry)

    def _index(self, entry: Entry) -> None:
        self.entries.append(entry)
        self.by_digests[entry.kind, entry.digests] = entry
        self.by_sizes.setdefault((entry.kind, entry.sizes), set()).add(entry.digests)

    def find(self, kind: str, digests: tuple[str, ...]) -> CaseStats | None:
        """A case whose files hold the same bytes as those that were analysed."""
        return self._use(self.by_digests.get((kind, digests)))

    def candidates(self, kind: str, sizes: tuple[int, ...]) -> frozenset[tuple[str, ...]]:
        """Digests of known cases whose files are of these sizes: hashing the files can be worth it."""
        return frozenset(self.by_sizes.get((kind, sizes), ()))

    def _use(self, entry: Entry | None) -> CaseStats | None:
        if entry is None:
            return None
        try:
            stats = from_plain(entry.stats)
        except (KeyError, TypeError, ValueError):
            return None
        self.used.add(id(entry))
        return stats

    def add(self, kind: str, sizes: tuple[int, ...], digests: tuple[str, ...], stats: CaseStats) -> None:
        """Keep a result; on disk at once, so that a killed run loses nothing."""
        entry = Entry(kind, sizes, digests, to_plain(stats))
        self._index(entry)
        self.used.add(id(entry))
        # A line that a killed run left unfinished must not swallow this one.
        append_text(self.path, ("" if self._ends_whole() else "\n") + _line(entry))

    def _ends_whole(self) -> bool:
        """Whether the file is missing, empty, or ends with a whole line."""
        try:
            with open_regular(self.path) as file:
                if file.seek(0, os.SEEK_END) == 0:
                    return True
                file.seek(-1, os.SEEK_END)
                return file.read(1) == b"\n"
        except FileNotFoundError:
            return True

    def tidy(self) -> None:
        """Drop results that no case of the data set needs, once they are the larger part."""
        kept = [e for e in self.entries if id(e) in self.used]
        if len(self.entries) > 2 * len(kept):
            write_text(self.path, "".join(_line(e) for e in kept))


def _line(entry: Entry) -> str:
    data = {"version": VERSION, **{name: getattr(entry, name) for name in Entry.__dataclass_fields__}}
    return json.dumps(data) + "\n"


def pack(histogram: Histogram) -> dict[str, Any]:
    """A histogram as plain data."""
    raw = histogram.values.astype("<f8").tobytes() + histogram.counts.astype("<i8").tobytes()
    return {"rounded": histogram.is_rounded, "data": base64.b64encode(zlib.compress(raw, 1)).decode()}


def unpack(data: dict[str, Any]) -> Histogram:
    """A histogram from plain data."""
    raw = zlib.decompress(base64.b64decode(data["data"]))
    half = len(raw) // 2
    values = np.frombuffer(raw[:half], "<f8")
    return Histogram(values=values, counts=np.frombuffer(raw[half:], "<i8"), is_rounded=bool(data["rounded"]))


def to_plain(stats: CaseStats) -> dict[str, Any]:
    """A case's statistics as plain data, for JSON."""
    plain = {name: getattr(stats, name) for name in CaseStats.__dataclass_fields__}
    plain["findings"] = [[getattr(f, n) for n in Finding.__dataclass_fields__] for f in stats.findings]
    plain["classes"] = [[getattr(c, n) for n in ClassStats.__dataclass_fields__] for c in stats.classes]
    plain["pooled"] = [pack(h) for h in stats.pooled]
    return plain


def from_plain(plain: dict[str, Any]) -> CaseStats:
    """A case's statistics from what `to_plain` made.

    Raises:
        KeyError, TypeError, ValueError: It is something else.
    """
    data = dict(plain)
    data["findings"] = tuple(Finding(*f) for f in data["findings"])
    data["classes"] = tuple(
        ClassStats(
            value=value,
            voxels=voxels,
            intensity=tuple(Stats(*s) for s in intensity),
            num_components=num,
            component_shapes=tuple(tuple(s) for s in shapes),
            centre_mm=tuple(centre),
        )
        for value, voxels, intensity, num, shapes, centre in data["classes"]
    )
    data["pooled"] = tuple(unpack(h) for h in data["pooled"])
    for key in ("intensity", "foreground", "background"):
        data[key] = tuple(Stats(*s) for s in data[key])
    for key in ("digests", "shape", "spacing_mm", "nonzero_shape"):
        data[key] = tuple(data[key])
    for key in ("cropped_shapes", "directions", "outside"):
        data[key] = tuple(tuple(s) for s in data[key])
    return CaseStats(**data)
