"""Probabilities of a whole volume in a file: written row by row as a prediction passes by, read back row by row.

A file is a zip archive whose members hold some rows each, named by the first of them. Most voxels are certain: one
output has all the probability, or every independent output is 0 or 1. Of these only the label is stored, of the others
the probabilities in `LEVELS` steps; of exclusive outputs without the first, the background, which is what the others
leave. Axes: R rows, K outputs, H, W, as `restore.Rows` has them.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np
import torch

from autoseg.config.fields import Strict
from autoseg.data.preprocess import Region
from autoseg.hardware.system import let_go, replace
from autoseg.inference.restore import Rows
from autoseg.workspace.files import open_half

LEVELS = 16383
"""Steps from 0 to 1. Labels of a mean of two then differ at 0.3 voxels in a million; with 1023 at 4, with 255 at 20, in
files that are 0.8 and 0.6 times as large (docs/results.md#held-out-cases)."""
CERTAIN = 1 - 1 / 2048
"""Probability that is stored as 1."""
UNCERTAIN_LABEL = 255
"""In the place of the label where probabilities are stored."""
COMPRESSION = 1
"""Level of zlib. Level 6 saves a fifth at most (docs/results.md)."""
MEMBER_VALUES = 1 << 22
"""Probabilities of a member at most, unless a single row has more: 16 MiB as float32."""


DAMAGES = (OSError, EOFError, KeyError, ValueError, IndexError, RuntimeError, zlib.error, zipfile.BadZipFile)
"""What reading a damaged archive or unpacking its bytes may raise."""


class DamagedProbs(Exception):
    """A file of probabilities cannot be read; whoever needs them has to predict them again."""

    def __init__(self, path: Path, fault: object) -> None:
        super().__init__(f"{path}: not readable ({fault})")
        self.path = path


class ProbsGrid(Strict):
    """Which rows a file of probabilities holds."""

    shape: tuple[int, int, int]
    """Voxels along X, Y, Z of the network's grid."""
    axis: int
    """Along which rows lie."""
    num_outputs: int
    independent: bool
    """Whether outputs are independent, so that each has a probability of its own; else they sum to 1."""
    box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    """The region of the RAS image that they cover: start and stop along X, Y, Z."""

    @property
    def region(self) -> Region:
        """`box` as slices."""
        x, y, z = (slice(start, stop) for start, stop in self.box)
        return x, y, z

    @property
    def num_rows(self) -> int:
        """Of the whole volume."""
        return self.shape[self.axis]

    @property
    def plane(self) -> tuple[int, int]:
        """H, W."""
        h, w = (size for a, size in enumerate(self.shape) if a != self.axis)
        return h, w

    @property
    def rows_of_member(self) -> int:
        """Rows that are packed together."""
        return max(1, MEMBER_VALUES // (self.num_outputs * math.prod(self.plane)))


def grid_of(rows: Rows, region: Region, *, independent: bool) -> ProbsGrid:
    """Describe rows of probabilities that cover a region of an image."""
    x, y, z = ((s.start, s.stop) for s in region)
    return ProbsGrid(
        shape=rows.shape, axis=rows.axis, num_outputs=rows.num_outputs, independent=independent, box=(x, y, z)
    )


def pack(probs: torch.Tensor, *, independent: bool) -> bytes:
    """Pack rows of probabilities (R, K, H, W) in 0..1; from a GPU comes what is stored alone."""
    if independent:
        uncertain = ((probs > 1 - CERTAIN) & (probs < CERTAIN)).any(1)  # (R, H, W)
        certain = [np.packbits(each.cpu().numpy()).tobytes() for each in (uncertain, probs > 0.5)]
    else:
        most, labels = probs.max(1)
        uncertain = most < CERTAIN
        certain = [labels.to(torch.uint8).masked_fill_(uncertain, UNCERTAIN_LABEL).cpu().numpy().tobytes()]
    stored = probs.movedim(1, 0)[0 if independent else 1 :, uncertain]  # (K or K - 1, N)
    levels = (stored * LEVELS).round_().to(torch.int16).cpu().numpy()
    # The upper bytes are nearly all alike: by themselves they pack well.
    halves = [(levels >> 8).astype(np.uint8).tobytes(), (levels & 255).astype(np.uint8).tobytes()]
    return zlib.compress(b"".join([*certain, *halves]), COMPRESSION)


def unpack(packed: bytes, shape: Sequence[int], *, independent: bool) -> torch.Tensor:
    """Rows of probabilities (R, K, H, W) float32 as `pack` took them.

    Args:
        packed: what `pack` made.
        shape: R, K, H, W.

    Raises:
        ValueError: These are not the bytes of such rows.
        zlib.error: They cannot be unpacked.
    """
    rows, outputs, *plane = shape
    data = np.frombuffer(zlib.decompress(packed), np.uint8)
    voxels = rows * math.prod(plane)
    if independent:
        first, second = -(-voxels // 8), -(-voxels * outputs // 8)
        uncertain = np.unpackbits(data[:first], count=voxels).reshape(rows, *plane).astype(bool)
        on = np.unpackbits(data[first : first + second], count=voxels * outputs).reshape(rows, outputs, *plane)
        probs = torch.from_numpy(on.astype(np.float32))
        rest = data[first + second :]
    else:
        labels = data[:voxels].reshape(rows, *plane)
        uncertain = labels == UNCERTAIN_LABEL
        index = torch.from_numpy(np.where(uncertain, 0, labels).astype(np.int64))
        probs = torch.zeros((rows, outputs, *plane)).scatter_(1, index[:, None], 1.0)
        rest = data[voxels:]
    num_stored = outputs if independent else outputs - 1
    upper, lower = rest.reshape(2, num_stored, int(uncertain.sum()))
    stored = torch.from_numpy((upper.astype(np.float32) * 256 + lower) / LEVELS)
    if not independent:
        stored = torch.cat([(1 - stored.sum(0, keepdim=True)).clamp_(min=0), stored])
    probs.movedim(1, 0)[:, torch.from_numpy(uncertain)] = stored
    return probs


class RecordedRows:
    """Rows that are written to a file as they are asked for; a context manager that leaves the whole file, or none.

    The prediction comes first: where the file gets too large, or cannot be written, it is given up and rows still pass.
    """

    def __init__(self, rows: Rows, grid: ProbsGrid, path: Path, *, most_bytes: int) -> None:
        """Take rows that nobody has asked for yet.

        Args:
            rows: to hand out and to record.
            grid: what `grid_of` says of them.
            path: of the file.
            most_bytes: size of the file above which it is given up.
        """
        self.shape, self.axis, self.num_outputs = rows.shape, rows.axis, rows.num_outputs
        self._rows, self._grid, self._path, self._most_bytes = rows, grid, path, most_bytes
        self._half: tuple[Path, IO[bytes]] | None = None
        self._pending = list[torch.Tensor]()  # rows (K, H, W) of the next member
        self._num_seen = 0
        self._archive: zipfile.ZipFile | None = None
        self.why_not = ""
        """Why there is no file; empty where there is."""

    def __enter__(self) -> Self:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._half = open_half(self._path)
            self._archive = zipfile.ZipFile(self._half[1], "w", zipfile.ZIP_STORED)
        except OSError as error:
            self.why_not = error.strerror or str(error)
        return self

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """See `restore.Rows`."""
        self._record_until(start)
        probs = self._rows.rows(start, stop)
        for row in range(self._num_seen, stop):
            self._record(probs[row - start])
        return probs

    def _record_until(self, stop: int) -> None:
        """Record rows that were not asked for: an image with coarser rows than the network's has no use for some."""
        while self._num_seen < stop and self._archive is not None:
            self._record(self._rows.rows(self._num_seen, self._num_seen + 1)[0])
        self._num_seen = max(self._num_seen, stop)

    def _record(self, probs: torch.Tensor) -> None:
        self._num_seen += 1
        if self._archive is None:
            return
        self._pending.append(probs.clone())
        if len(self._pending) < self._grid.rows_of_member and self._num_seen < self._grid.num_rows:
            return
        name = str(self._num_seen - len(self._pending))
        packed = pack(torch.stack(self._pending), independent=self._grid.independent)
        self._pending.clear()
        try:
            self._archive.writestr(name, packed)
            if self._half is not None and self._half[1].tell() > self._most_bytes:
                self._give_up(f"larger than the {max(self._most_bytes, 0) / 1e6:.1f} MB that are left for them")
        except OSError as error:
            self._give_up(error.strerror or str(error))

    def _give_up(self, reason: str) -> None:
        self.why_not = reason
        archive, self._archive = self._archive, None
        half, self._half = self._half, None
        try:
            if archive is not None:
                archive.close()
            if half is not None:
                half[1].close()
        except OSError:  # a full disk refuses the archive's end, too
            pass
        if half is not None:
            half[0].unlink(missing_ok=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._record_until(self._grid.num_rows)
        if self._archive is None:
            return
        if kind is not None:
            self._give_up("the prediction failed")
            return
        assert self._half is not None
        half, file = self._half
        try:
            self._archive.close()
            file.flush()
            let_go(file)
            replace(half, self._path)
            file.close()
        except OSError as failure:
            self._give_up(failure.strerror or str(failure))


class StoredRows:
    """Rows of probabilities from a file; a context manager."""

    def __init__(self, path: Path, grid: ProbsGrid) -> None:
        """Name a file that `RecordedRows` wrote."""
        self.shape, self.axis, self.num_outputs = grid.shape, grid.axis, grid.num_outputs
        self._path, self._grid = path, grid
        self._held: tuple[int, torch.Tensor] | None = None  # a member's first row, and its rows

    def __enter__(self) -> Self:
        """Open the file.

        Raises:
            DamagedProbs: It is missing or no archive.
        """
        try:
            self._archive = zipfile.ZipFile(self._path)
        except (OSError, zipfile.BadZipFile) as error:
            raise DamagedProbs(self._path, error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._archive.close()

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """See `restore.Rows`.

        Raises:
            DamagedProbs: The file was damaged.
        """
        deep = self._grid.rows_of_member
        parts = []
        for first in range(start // deep * deep, stop, deep):
            held = self._member(first)
            parts.append(held[max(start - first, 0) : stop - first])
        return torch.cat(parts)

    def _member(self, first: int) -> torch.Tensor:
        if self._held is None or self._held[0] != first:
            num = min(self._grid.rows_of_member, self._grid.num_rows - first)
            shape = (num, self.num_outputs, *self._grid.plane)
            try:
                rows = unpack(self._archive.read(str(first)), shape, independent=self._grid.independent)
            except DAMAGES as error:
                raise DamagedProbs(self._path, error) from error
            self._held = first, rows
        return self._held[1]
