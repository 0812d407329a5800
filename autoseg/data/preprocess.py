"""A case as the network sees it: cropped, normalised, resampled; and a prediction's way back to the image's grid.

The same functions serve training and inference, so a model always meets the intensities it learned from.
Axes: (C, X, Y, Z), RAS+.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from autoseg.config.hyperparameters import NormalizeMode
from autoseg.data.frame import Frame, Turn
from autoseg.data.grid import Grid, Volume
from autoseg.data.resampling import resample, resample_rows, resampled_shape
from autoseg.data.stray import Usual, usual_of
from autoseg.data.streams import ImageRows, MemoryImage
from autoseg.errors import DataError

SAMPLE_VOXELS = 1 << 20
"""Voxels of a channel, evenly spread, by which its percentiles are judged."""
PART_VOXELS = 1 << 23
"""Voxels of a channel looked at or normalised at a time: 32 MiB."""
Region = tuple[slice, slice, slice]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelNorm:
    """How one image channel is normalised."""

    mode: NormalizeMode
    bounds: tuple[float, float] | None = None
    """Lower and upper intensity, for ct and range."""
    mean: float = 0.0
    std: float = 1.0
    """Mean and standard deviation of the data set's foreground, for ct."""
    nonzero: bool = False
    """Statistics of non-zero voxels alone, zero voxels stay zero, for the per-image modes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """Everything that decides how a file becomes a network's input."""

    norms: tuple[ChannelNorm, ...]
    spacing_mm: tuple[float, float, float]
    """Of the network's X, Y, Z."""
    crop_foreground: bool = False
    frame: Frame | None = None
    """Axes of the networks that are not RAS+."""

    def turn_of(self, grid: Grid) -> Turn:
        """How an image in RAS+ becomes one in the networks' axes."""
        return Turn() if self.frame is None else self.frame.turn(grid.to_ras().affine[:3, :3])


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A preprocessed image and what is needed to go back."""

    image: torch.Tensor
    """(C, X, Y, Z) float32 at the plan's spacing, in the networks' axes."""
    box: Region
    """The cropped region of the RAS volume."""
    turn: Turn
    """From RAS to the networks' axes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelStats:
    """Mean and standard deviation of one channel of an image; None where its mode needs none."""

    mean: float
    std: float
    low: float
    """Smallest value of the whole channel."""
    usual: Usual | None = None
    """Where stray voxels are left out of these: what counts as stray."""


def needs_stats(norm: ChannelNorm) -> bool:
    """Whether a mode normalises by the image's own mean and deviation."""
    return norm.mode not in ("none", "ct", "range")


def channel_stats(
    chunks: Callable[[], Iterable[np.ndarray]], norm: ChannelNorm, num_voxels: int
) -> ChannelStats | None:
    """Statistics of a channel that comes in pieces; of non-zero voxels where the norm says so, without stray ones.

    Args:
        chunks: gives the channel's pieces; asked a second time where stray voxels decide the deviation.
        norm: how it is normalised.
        num_voxels: of the channel.
    """
    step = max(1, num_voxels // SAMPLE_VOXELS)
    sample: list[np.ndarray] = []

    def sampled() -> Iterator[np.ndarray]:
        for chunk in chunks():
            sample.append(np.asarray(chunk.flat[::step], np.float32))
            yield chunk

    stats = _moments(sampled(), norm)
    if stats is None:
        return None
    values = np.concatenate(sample)
    others = values[values != 0]
    if norm.nonzero and others.size:
        values = others
    low = float(np.percentile(values, 0.5, method="lower"))
    high = float(np.percentile(values, 99.5, method="higher"))
    typical = abs(float(np.median(others))) if others.size else 0.0
    usual = usual_of(low, high, stats.std, typical)
    if usual is None:
        return stats
    kept = _moments((chunk[(chunk >= usual.least) & (chunk <= usual.most)] for chunk in chunks()), norm)
    return stats if kept is None else replace(kept, usual=usual)


def _moments(chunks: Iterable[np.ndarray], norm: ChannelNorm) -> ChannelStats | None:
    """Mean, deviation and least value of a channel in pieces.

    Pieces are merged as Chan et al. 1983 do, in float64: a float32 sum over 10^8 voxels of a CT drifts.
    """
    count, mean, squares, low = 0, 0.0, 0.0, math.inf
    for chunk in chunks:
        low = min(low, float(chunk.min(initial=math.inf)))
        inside = chunk[chunk != 0] if norm.nonzero else chunk
        if inside.size == 0:
            continue
        here = float(inside.mean(dtype=np.float64))
        spread = float(inside.var(dtype=np.float64)) * inside.size
        total = count + inside.size
        squares += spread + (here - mean) ** 2 * count * inside.size / total
        mean += (here - mean) * inside.size / total
        count = total
    return ChannelStats(mean=mean, std=math.sqrt(squares / count), low=low) if count else None


def normalize(channel: np.ndarray, norm: ChannelNorm, stats: ChannelStats | None) -> np.ndarray:
    """Normalise one channel, or a part of it.

    Args:
        channel: (X, Y, Z) float32.
        stats: of the whole channel, for the modes that need them; None: no voxel to count, the result is 0.

    Returns:
        float32 of the same shape.

    Source: ct clips to the foreground's 0.5 and 99.5 percentiles and divides by its deviation, the others take
    mean and deviation of each image, as nnU-Net does; meanstdtanh squeezes outliers to -3..3 and range scales
    bounds to 0..1, as Auto3DSeg does.
    """
    if norm.mode == "none":
        return channel
    if norm.mode in ("ct", "range"):
        if norm.bounds is None:
            raise DataError(f"normalize_mode {norm.mode} needs intensity_bounds. Set them, or choose another mode.")
        low, high = norm.bounds
        clipped = np.clip(channel, low, high)
        if norm.mode == "range":
            return (clipped - low) / max(high - low, 1e-6)
        return (clipped - norm.mean) / max(norm.std, 1e-6)
    if stats is None:
        return np.zeros_like(channel)
    if stats.usual is not None:
        channel = stats.usual.clip(channel)
    out = (channel - np.float32(stats.mean)) / np.float32(max(stats.std, 1e-6))
    if norm.nonzero:
        out[channel == 0] = 0
    if norm.mode == "meanstdtanh":
        out = 3 * np.tanh(out / 3)
    return out.astype(np.float32, copy=False)


CPU = torch.device("cpu")


class PreparedRows:
    """An image as the network sees it, made row by row: cropped, normalised, resampled; still with the axes of RAS."""

    def __init__(self, image: ImageRows, how: Preprocessing, region: Region | None = None) -> None:
        """Look at the whole image once, piece by piece, where its crop or normalisation needs that.

        Args:
            region: of the image to make alone; normalisation is that of the whole image all the same.

        Raises:
            DataError: The number of channels is not the one the model was trained with.
        """
        if image.num_channels != len(how.norms):
            raise DataError(
                f"the image has {image.num_channels} channels, the model was trained with {len(how.norms)}."
            )
        self._image, self._norms = image, how.norms
        self.axis = image.axis
        everything = (slice(0, image.shape[0]), slice(0, image.shape[1]), slice(0, image.shape[2]))
        self.box = _nonzero_box(image) if how.crop_foreground else everything
        self._box_shape = _shape_of(self.box)
        num_voxels = math.prod(self._box_shape)
        self._stats = [
            channel_stats(partial(self._channel, c), norm, num_voxels) if needs_stats(norm) else None
            for c, norm in enumerate(how.norms)
        ]
        if region is not None:
            self.box = _common(self.box, region)
            self._box_shape = _shape_of(self.box)
        self.turn = how.turn_of(image.grid)
        """From RAS to the networks' axes."""
        self.shape = resampled_shape(self._box_shape, image.spacing_mm, self.turn.triple_back(how.spacing_mm))
        """(X, Y, Z) on the network's grid."""

    @property
    def usual(self) -> tuple[Usual | None, ...]:
        """What is usual in each channel that has stray voxels; None where it has none, or is clipped to bounds."""
        return tuple(stats.usual if stats is not None else None for stats in self._stats)

    @property
    def background(self) -> tuple[float, ...] | None:
        """What nothing looks like to the network in each channel: the normalised intensity of a place without body.

        The lower bound where intensities are clipped, 0 where zero voxels stay zero, else the image's smallest
        value; None where a channel is not normalised, so that it is not known.
        """
        values = []
        for norm, stats in zip(self._norms, self._stats, strict=True):
            raw = norm.bounds[0] if norm.bounds is not None and norm.mode in ("ct", "range") else 0.0
            if needs_stats(norm) and not norm.nonzero:
                raw = stats.low if stats is not None else 0.0
            if norm.mode == "none":
                return None
            values.append(float(normalize(np.full((1, 1, 1), raw, np.float32), norm, stats)[0, 0, 0]))
        return tuple(values)

    def _parts(self) -> Iterator[tuple[int, int]]:
        length = self._box_shape[self.axis]
        step = max(1, PART_VOXELS * length // math.prod(self._box_shape))
        return ((start, min(start + step, length)) for start in range(0, length, step))

    def _channel(self, index: int) -> Iterator[np.ndarray]:
        """A channel of the crop, piece by piece."""
        return (self._cropped(*part)[index] for part in self._parts())

    def _cropped(self, start: int, stop: int) -> np.ndarray:
        """Rows of the crop, as they are in the file: (C, X, Y, Z)."""
        offset = self.box[self.axis].start
        cut = [slice(None), *self.box]
        cut[self.axis + 1] = slice(None)
        return self._image.rows(offset + start, offset + stop)[tuple(cut)]

    def _normalized(self, start: int, stop: int) -> torch.Tensor:
        part = self._cropped(start, stop)
        channels = [normalize(c, norm, stats) for c, norm, stats in zip(part, self._norms, self._stats, strict=True)]
        return torch.from_numpy(np.ascontiguousarray(np.stack(channels), np.float32))

    def rows(self, start: int, stop: int, device: torch.device = CPU) -> torch.Tensor:
        """Rows of the prepared image along `axis`: (C, X, Y, Z) float32.

        Args:
            device: where they are resampled, and wanted.
        """

        def fetch(first: int, last: int) -> torch.Tensor:
            rows = self._normalized(first, last)
            return (rows.pin_memory() if device.type == "cuda" else rows).to(device, non_blocking=True)

        return resample_rows(fetch, self._box_shape[self.axis], self.shape, self.axis, start, stop)


def _shape_of(box: Region) -> tuple[int, int, int]:
    x, y, z = box
    return x.stop - x.start, y.stop - y.start, z.stop - z.start


def _common(a: Region, b: Region) -> Region:
    """What two regions share; the first one along an axis where they share nothing."""
    common = []
    for own, other in zip(a, b, strict=True):
        low, high = max(own.start, other.start), min(own.stop, other.stop)
        common.append(slice(low, high) if low < high else own)
    return common[0], common[1], common[2]


def _nonzero_box(image: ImageRows) -> Region:
    """The smallest box that holds every voxel with a value other than 0 in any channel; the whole where none has."""
    lines = [np.zeros(size, bool) for size in image.shape]
    step = max(1, PART_VOXELS * image.shape[image.axis] // math.prod(image.shape))
    for start in range(0, image.shape[image.axis], step):
        stop = min(start + step, image.shape[image.axis])
        nonzero: np.ndarray = np.any(image.rows(start, stop) != 0, axis=0)
        for axis in range(3):
            line = np.moveaxis(nonzero, axis, 0).reshape(nonzero.shape[axis], -1).any(axis=1)
            if axis == image.axis:
                lines[axis][start:stop] = line
            else:
                lines[axis] |= line
    box = []
    for line in lines:
        nonzero = np.flatnonzero(line)
        box.append(slice(int(nonzero[0]), int(nonzero[-1]) + 1) if nonzero.size else slice(0, len(line)))
    return box[0], box[1], box[2]


def prepare_image(volume: Volume, how: Preprocessing) -> Prepared:
    """Crop, normalise and resample a whole image.

    Raises:
        DataError: The number of channels is not the one the model was trained with.
    """
    rows = PreparedRows(MemoryImage(volume), how)
    image = rows.turn.apply(rows.rows(0, rows.shape[rows.axis]))
    return Prepared(image=image.contiguous(), box=rows.box, turn=rows.turn)


def prepare_label(target: np.ndarray, prepared: Prepared) -> torch.Tensor:
    """Bring an encoded target onto a prepared image's grid.

    Args:
        target: (1 or K, X, Y, Z) uint8 in RAS, as `LabelMap.encode` returns it.

    Returns:
        The same, cropped, resampled by nearest neighbour and turned.
    """
    box, turn = prepared.box, prepared.turn
    cropped = np.ascontiguousarray(target[:, box[0], box[1], box[2]])
    x, y, z = prepared.image.shape[1:]
    return turn.apply(resample(torch.from_numpy(cropped), turn.triple_back((x, y, z)), nearest=True)).contiguous()
