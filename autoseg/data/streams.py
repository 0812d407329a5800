"""Images read and labels written row by row, so that a volume of any length passes through constant memory.

Rows lie along one axis of the RAS volume. For an image in memory that is its longest; for a large file the one its
file is stored by, slice after slice. Axes: (C, X, Y, Z), RAS+.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from nibabel.orientations import apply_orientation

from autoseg.data.formats.format import LabelFile
from autoseg.data.formats.table import can_stream, open_slices, read_header, reading, write_label
from autoseg.data.grid import Grid, Volume, ras_orientation
from autoseg.data.volumes import not_finite, other_grid, read_image
from autoseg.errors import DataError

STREAM_VOXELS = 1 << 26
"""Voxels over all channels from which an image is read piece by piece: 256 MiB as float32, a CT of 512x512x256."""


class ImageRows(Protocol):
    """An image whose rows can be had one after the other."""

    grid: Grid
    """The file's own grid."""
    shape: tuple[int, int, int]
    """In RAS."""
    num_channels: int
    axis: int
    """Along which rows lie: 0 X, 1 Y, 2 Z."""

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Edge lengths of a voxel along X, Y, Z."""
        ...

    def rows(self, start: int, stop: int) -> np.ndarray:
        """(C, X, Y, Z) float32 of some rows, all of the other two axes."""
        ...


class MemoryImage:
    """An image held in memory."""

    def __init__(self, volume: Volume) -> None:
        """Take a volume; rows are views of it."""
        self.grid, self._array = volume.grid, volume.array
        self.shape: tuple[int, int, int] = volume.array.shape[1:]
        self.num_channels = len(volume.array)
        self.axis = self.shape.index(max(self.shape))
        self.spacing_mm = volume.spacing_mm

    def rows(self, start: int, stop: int) -> np.ndarray:
        """See `ImageRows`."""
        return np.moveaxis(np.moveaxis(self._array, self.axis + 1, 0)[start:stop], 0, self.axis + 1)


class FileImage:
    """An image in files, read as its rows are asked for; a context manager.

    A compressed file may be unpacked into a temporary file first, since its slices cannot be reached otherwise.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Open the files.

        Raises:
            DataError: A file cannot be read, or the files lie on different grids.
            ResourceError: There is no room to unpack one.
        """
        with ExitStack() as stack:
            self._parts = [(path, open_slices(path, stack)) for path in paths]
            self.grid = self._parts[0][1].header.grid
            for path, slices in self._parts:
                if difference := slices.header.grid.differs_from(self.grid):
                    raise DataError(other_grid(path, paths[0], difference))
            self._stack = stack.pop_all()
        self.num_channels = sum(slices.header.num_channels for _, slices in self._parts)
        ras = self.grid.to_ras()
        self.shape, self.spacing_mm = ras.shape, ras.spacing_mm
        self._ornt = ras_orientation(self.grid.affine)
        self.axis = int(self._ornt[2, 0])
        self._flipped = bool(self._ornt[2, 1] < 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def rows(self, start: int, stop: int) -> np.ndarray:
        """See `ImageRows`.

        Raises:
            DataError: The file is damaged, or voxels are NaN or infinite.
        """
        if self._flipped:
            start, stop = self.shape[self.axis] - stop, self.shape[self.axis] - start
        channels = []
        for path, slices in self._parts:
            with reading(path):
                part = slices.read(start, stop).astype(np.float32, copy=False)
            if not np.isfinite(part).all():
                raise DataError(not_finite(path, int(part.size - np.isfinite(part).sum())))
            channels += [apply_orientation(channel, self._ornt) for channel in np.moveaxis(part, 3, 0)]
        return np.stack(channels)


def is_streamed(paths: Sequence[Path]) -> bool:
    """Whether an image is read piece by piece: it is large, its files' formats can be, and all are stored alike.

    Raises:
        DataError: A file cannot be read.
    """
    headers = [read_header(path) for path in paths]
    num_voxels = sum(math.prod(header.grid.shape) * header.num_channels for header in headers)
    stored_alike = len({header.grid.orientation for header in headers}) == 1
    return num_voxels > STREAM_VOXELS and stored_alike and all(can_stream(path) for path in paths)


def open_image(paths: Sequence[Path]) -> MemoryImage | FileImage:
    """Open an image: in memory where it is small, piece by piece where it is large.

    Raises:
        DataError, ResourceError: as `read_image` and `FileImage`.
    """
    return FileImage(paths) if is_streamed(paths) else MemoryImage(read_image(tuple(paths)))


class LabelRows:
    """A label file that is written row by row; a context manager that leaves the whole file, or none.

    Rows are kept uncompressed in a temporary file beside the target, since a flipped file's last rows come first.
    """

    def __init__(
        self, path: Path, grid: Grid, dtype: np.dtype, write: Callable[[Path, LabelFile], None] = write_label
    ) -> None:
        """Begin a file on an image's own grid, filled with background.

        Args:
            path: to write.
            dtype: of the labels.
            write: the file, from its grid and voxels; as its suffix says unless another is given.
        """
        self._path, self._grid, self._dtype, self._write = path, grid, np.dtype(dtype), write
        self._back = ras_orientation(grid.affine, inverse=True)
        to_ras = ras_orientation(grid.affine)
        self._axis, self._flipped = int(to_ras[2, 0]), bool(to_ras[2, 1] < 0)

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=self._path.parent, prefix=".part-")
        self._file.truncate(math.prod(self._grid.shape) * self._dtype.itemsize)
        return self

    def write(self, start: int, labels: np.ndarray) -> None:
        """Write rows.

        Args:
            start: the first row along the axis the file is stored by, in RAS.
            labels: (X, Y, Z) in RAS, all of the other two axes.
        """
        stored = apply_orientation(labels.astype(self._dtype, copy=False), self._back)
        if self._flipped:
            start = self._grid.shape[2] - start - stored.shape[2]
        self._file.seek(start * stored.shape[0] * stored.shape[1] * self._dtype.itemsize)
        self._file.write(stored.tobytes(order="F"))

    def volume(self) -> np.ndarray:
        """What was written so far, (X, Y, Z) in RAS, to be changed in place: mapped from the file, not in memory."""
        return apply_orientation(self._stored(), ras_orientation(self._grid.affine))

    def _stored(self) -> np.ndarray:
        self._file.flush()
        return np.memmap(self._file, self._dtype, "r+", shape=self._grid.shape, order="F")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                self._write(self._path, LabelFile(grid=self._grid, array=self._stored()))
