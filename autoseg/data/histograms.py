"""Exact statistics from histograms: values that occur, and how often.

One pass over image and label gives, for each label value, the sorted intensities with their counts. Everything
else (percentiles, moments, pooling over classes and over cases) is computed from these few numbers. Volumes of
integers, and of floats with up to two million different (label, intensity) pairs, are exact; beyond, intensities
are rounded to 12 significant bits (0.012 %), which a histogram says of itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from autoseg.data.stray import Usual, usual_of

CHUNK_VOXELS = 1 << 19
"""Voxels handled at a time: their indices fit the cache, counting them is then twice as fast."""
MOST_CELLS = 1 << 22
"""Largest dense table of label times intensity."""
MOST_PAIRS = 1 << 21
"""Different pairs kept exactly."""
ROUNDED_BITS = 12
"""Bits of a float32's 24-bit mantissa dropped beyond that."""
QUANTILES = (0.005, 0.1, 0.9, 0.995)


class Stats(NamedTuple):
    """Auto3DSeg's figures of a set of intensities; percentiles interpolate linearly, as NumPy's."""

    max: float
    mean: float
    median: float
    min: float
    stdev: float
    percentile_00_5: float
    percentile_10_0: float
    percentile_90_0: float
    percentile_99_5: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Histogram:
    """Values in rising order and how often each occurs; the figures are computed once."""

    values: np.ndarray
    """(V,) float64, finite, strictly rising."""
    counts: np.ndarray
    """(V,) int64, positive."""
    is_rounded: bool = False

    @property
    def total(self) -> int:
        """Number of voxels."""
        return int(self.counts.sum())

    def stats(self) -> Stats:
        """The figures of a histogram that is not empty."""
        return self._stats

    @cached_property
    def _stats(self) -> Stats:
        values, counts = self.values, self.counts
        below = np.cumsum(counts)
        total = int(below[-1])
        places = np.array([0.5, *QUANTILES]) * (total - 1)
        lower = np.floor(places).astype(np.int64)
        upper = np.minimum(lower + 1, total - 1)
        # The value at place k, counted from 0, is the first with more than k voxels up to it.
        at = np.searchsorted(below, np.concatenate([lower, upper]), side="right")
        low, high = values[at[:5]], values[at[5:]]
        median, *quantiles = (low + (high - low) * (places - lower)).tolist()
        mean = float(values @ counts) / total
        stdev = float(np.sqrt(((values - mean) ** 2) @ counts / total))
        return Stats(float(values[-1]), mean, median, float(values[0]), stdev, *quantiles)

    def includes(self, part: Histogram) -> bool:
        """Whether every value of a part of it is one of its own: not where one of the two was rounded."""
        at = np.minimum(np.searchsorted(self.values, part.values), len(self.values) - 1)
        return bool((self.values[at] == part.values).all() and (self.counts[at] >= part.counts).all())

    def without(self, part: Histogram) -> Histogram:
        """The voxels that are not in a part of it; `includes` must hold."""
        counts = self.counts.copy()
        counts[np.searchsorted(self.values, part.values)] -= part.counts
        kept = counts > 0
        return Histogram(values=self.values[kept], counts=counts[kept], is_rounded=self.is_rounded)

    def usual(self) -> Usual | None:
        """What is usual, where a few stray voxels decide mean and deviation; None where none do."""
        if not len(self.values):
            return None
        below = np.cumsum(self.counts)
        last = below[-1] - 1
        # Values that occur, rounded outwards: between two of a few values a percentile would be no voxel's.
        places = [math.floor(QUANTILES[0] * last), math.ceil(QUANTILES[-1] * last)]
        low, high = self.values[np.searchsorted(below, places, side="right")].tolist()
        typical = 0.0
        if low == high and (others := self.values != 0).any():
            typical = abs(Histogram(values=self.values[others], counts=self.counts[others]).stats().median)
        return usual_of(low, high, self.stats().stdev, typical)

    def within(self, usual: Usual | None) -> Histogram:
        """The voxels that are not stray; all where none would be left."""
        if usual is None:
            return self
        kept = (self.values >= usual.least) & (self.values <= usual.most)
        if kept.all() or not kept.any():
            return self
        return Histogram(values=self.values[kept], counts=self.counts[kept], is_rounded=self.is_rounded)

    def rounded(self, most: int) -> Histogram:
        """Itself where it has up to `most` values, else with values rounded to 12 significant bits."""
        if len(self.values) <= most:
            return self
        keys = _round_keys(_keys_of(self.values.astype(np.float32)))
        return _merged(_floats_of(keys), self.counts, is_rounded=True)


EMPTY = Histogram(values=np.zeros(0), counts=np.zeros(0, np.int64))


def pool(histograms: Sequence[Histogram]) -> Histogram:
    """The histogram of all voxels together."""
    filled = [h for h in histograms if len(h.values)]
    if len(filled) <= 1:
        return filled[0] if filled else EMPTY
    values = np.concatenate([h.values for h in filled])
    counts = np.concatenate([h.counts for h in filled])
    return _merged(values, counts, is_rounded=any(h.is_rounded for h in filled))


def _merged(values: np.ndarray, counts: np.ndarray, is_rounded: bool = False) -> Histogram:
    order = np.argsort(values, kind="stable")
    values, counts = values[order], counts[order]
    starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
    return Histogram(values=values[starts], counts=np.add.reduceat(counts, starts), is_rounded=is_rounded)


def histograms_by_label(
    image: np.ndarray, label: np.ndarray | None, slope: float = 1.0, inter: float = 0.0
) -> dict[int, Histogram]:
    """Count the intensities of each label value.

    Args:
        image: (I, J, K) of any integer or float type, finite.
        label: (I, J, K) integers from 0, or None: all voxels count as 0.
        slope: other than 0; intensity = slope * image + inter.

    Returns:
        Label value -> histogram, rising; only values that occur.
    """
    low, high = image.min(), image.max()
    top = 0 if label is None else int(label.max())
    if image.dtype.kind == "f" and not _is_integral(image, float(low), float(high)):
        labels, values, counts, is_rounded = _count_floats(image, label)
    else:
        start, width = int(low), int(high) - int(low) + 1
        if (top + 1) * width <= MOST_CELLS:
            labels, values, counts = _count_integers(image, label, start, width, top + 1)
            is_rounded = False
        else:
            labels, values, counts, is_rounded = _count_floats(image, label)
    scaled = values * slope + inter
    bounds = np.flatnonzero(np.concatenate([[True], labels[1:] != labels[:-1], [True]]))
    by_label: dict[int, Histogram] = {}
    for first, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        v, c = scaled[first:end], counts[first:end]
        if slope < 0:
            v, c = v[::-1], c[::-1]
        by_label[int(labels[first])] = Histogram(values=v, counts=c, is_rounded=is_rounded)
    return by_label


def chunks(shape: tuple[int, ...]) -> list[slice]:
    """Slices along the last axis of about CHUNK_VOXELS each."""
    step = max(1, CHUNK_VOXELS // max(1, shape[0] * shape[1]))
    return [slice(k, min(k + step, shape[2])) for k in range(0, shape[2], step)]


def _flat(array: np.ndarray, part: slice) -> np.ndarray:
    return array[:, :, part].ravel(order="F")


def _is_integral(image: np.ndarray, low: float, high: float) -> bool:
    """Whether floats hold integers alone, in a range that can be counted in a table."""
    if high - low >= MOST_CELLS or max(abs(low), abs(high)) >= 2**31:
        return False
    for part in chunks(image.shape):
        piece = _flat(image, part)
        if not np.array_equal(piece.astype(np.int32), piece):
            return False
    return True


def _count_integers(
    image: np.ndarray, label: np.ndarray | None, start: int, width: int, num_labels: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(labels, values, counts) of the pairs that occur, sorted; through one dense table."""
    table = np.zeros(num_labels * width, np.int64)
    for part in chunks(image.shape):
        index = _flat(image, part).astype(np.int64)
        index -= start
        if label is not None:
            index += np.multiply(_flat(label, part), width, dtype=np.int64)
        counts = np.bincount(index)
        table[: len(counts)] += counts
    cells = np.flatnonzero(table)
    return cells // width, (cells % width + start).astype(np.float64), table[cells]


def _count_floats(image: np.ndarray, label: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """As `_count_integers`, for float32 precision: sorted chunk by chunk, then merged."""
    pairs, counts = np.zeros(0, np.uint64), np.zeros(0, np.int64)
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    num_waiting = 0
    is_rounded = False
    parts = chunks(image.shape)
    for number, part in enumerate(parts):
        keys = _keys_of(_flat(image, part).astype(np.float32))
        if is_rounded:
            keys = _round_keys(keys)
        chunk = keys.astype(np.uint64)
        if label is not None:
            chunk |= _flat(label, part).astype(np.uint64) << np.uint64(32)
        chunk.sort()
        waiting.append(_runs(chunk, np.ones(1, np.int64)))
        num_waiting += len(waiting[-1][0])
        if num_waiting > MOST_PAIRS or number == len(parts) - 1:
            pairs, counts = _merge_runs([(pairs, counts), *waiting])
            if len(pairs) > MOST_PAIRS and not is_rounded:
                is_rounded = True
                high = pairs >> np.uint64(32) << np.uint64(32)
                pairs = high | _round_keys((pairs & np.uint64(0xFFFFFFFF)).astype(np.uint32)).astype(np.uint64)
                pairs, counts = _merge_runs([(pairs, counts)])
            waiting, num_waiting = [], 0
    labels = (pairs >> np.uint64(32)).astype(np.int64)
    values = _floats_of((pairs & np.uint64(0xFFFFFFFF)).astype(np.uint32))
    return labels, values, counts, is_rounded


def _merge_runs(runs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.concatenate([p for p, _ in runs])
    counts = np.concatenate([c for _, c in runs])
    order = np.argsort(pairs, kind="stable")
    return _runs(pairs[order], counts[order])


def _runs(pairs: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Join equal neighbours; `counts` of length 1 counts each once."""
    if not len(pairs):
        return pairs, np.zeros(0, np.int64)
    starts = np.flatnonzero(np.concatenate([[True], pairs[1:] != pairs[:-1]]))
    if len(counts) == len(pairs) and len(pairs) > 1:
        return pairs[starts], np.add.reduceat(counts, starts)
    return pairs[starts], np.diff(np.concatenate([starts, [len(pairs)]])).astype(np.int64) * int(counts[0])


def _keys_of(values: np.ndarray) -> np.ndarray:
    """float32 -> uint32 in the same order; -0.0 counts as 0.0."""
    bits = (values + np.float32(0)).view(np.uint32)
    sign = np.uint32(0x80000000)
    return np.where(bits & sign, ~bits, bits | sign)


def _round_keys(keys: np.ndarray) -> np.ndarray:
    half = np.uint32(1 << (ROUNDED_BITS - 1))
    limit = np.uint32(0xFFFFFFFF) - half
    return (np.minimum(keys, limit) + half) >> np.uint32(ROUNDED_BITS) << np.uint32(ROUNDED_BITS)


def _floats_of(keys: np.ndarray) -> np.ndarray:
    """uint32 keys -> float64 values."""
    sign = np.uint32(0x80000000)
    bits = np.where(keys & sign, keys & ~sign, ~keys)
    values: np.ndarray = bits.view(np.float32).astype(np.float64)
    return values
