"""A prediction's way back: probabilities on the network's grid to labels on the image's, slab by slab.

Rows of probabilities are asked for as the image's rows need them, so neither the probabilities nor the labels of a
whole volume exist unless the caller keeps the labels. Axes: K outputs, then X, Y, Z, RAS+; rows lie along one of
these, H and W are the other two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from autoseg.data.labels import LabelMap
from autoseg.data.preprocess import Region
from autoseg.data.resampling import neighbours, resample_rows
from autoseg.inference.probable import most_probable

SLAB_VALUES = 1 << 24
"""Probabilities (float32) of one model held for a slab at a time: 64 MiB."""
SLAB_ROWS = 64
"""Rows of the image in a slab at most."""

Watch = Callable[[int, Region, torch.Tensor], None]


class Rows(Protocol):
    """Probabilities on a network's grid, as `windows.ProbRows` makes them."""

    shape: tuple[int, int, int]
    axis: int
    num_outputs: int

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """(stop - start, K, H, W) float32, on any device; asked for in ascending order."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """What one model, or several with the same preprocessing, say about an image."""

    rows: Rows
    """Probabilities on the network's grid."""
    box: Region
    """The region of the RAS volume they cover; background elsewhere."""
    num_models: int = 1
    """Models that the probabilities are the mean of: its weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slab:
    """One member's rows of probabilities beside a slab of the image."""

    member: Member
    region: Region
    """The slab in the RAS volume."""
    first: int
    """The network's row that `probs` begins with."""
    probs: torch.Tensor | None
    """(rows, K, H, W); None where the member's box does not reach."""

    @property
    def inner(self) -> Region:
        """The part of the slab that the member's box covers, from the slab's corner."""
        inner = []
        for box, here in zip(self.member.box, self.region, strict=True):
            low, high = max(box.start, here.start), min(box.stop, here.stop)
            inner.append(slice(low - here.start, max(low, high) - here.start))
        return inner[0], inner[1], inner[2]


def labels_of_means(
    members: Sequence[Member],
    subsets: Sequence[tuple[int, ...]],
    ras_shape: tuple[int, int, int],
    label_map: LabelMap,
    watch: Watch | None = None,
    slab_values: int | None = None,
) -> list[np.ndarray]:
    """Labels of the means of several subsets of predictions; each prediction is brought back once.

    Args:
        members: the predictions.
        subsets: indices into `members`; a mean for each.
        watch: called with (place in `subsets`, slab of the RAS volume, probabilities (K, X, Y, Z) there), which lie
            where they were made: whoever wants them on the CPU brings them there.
        slab_values: most probabilities of a member for a slab; None: `SLAB_VALUES`.

    Returns:
        One (X, Y, Z) array of label values in RAS per subset.
    """
    results = [np.zeros(ras_shape, label_map.dtype) for _ in subsets]
    for place, slab in labelled_slabs(members, subsets, label_map, watch, slab_values):
        for result, labels in zip(results, slab, strict=True):
            result[place] = labels
    return results


def labelled_slabs(
    members: Sequence[Member],
    subsets: Sequence[tuple[int, ...]],
    label_map: LabelMap,
    watch: Watch | None = None,
    slab_values: int | None = None,
) -> Iterator[tuple[Region, list[np.ndarray]]]:
    """The same, slab by slab along the members' rows.

    Yields:
        Where a slab lies in the RAS volume, and its labels, one array per subset. Places outside every member's box
        are background and left out.
    """
    whole = watch is not None or label_map.sigmoid
    for slabs in _slabs(members, slab_values or SLAB_VALUES):
        region = slabs[0].region
        on_cpu = all(slab.probs is None or slab.probs.device.type == "cpu" for slab in slabs)
        if on_cpu and not whole:
            yield region, _exclusive(slabs, subsets, label_map)
            continue
        pieces = [slabs] if on_cpu else _thinner(slabs)
        chosen = [_chosen(piece, subsets, label_map, watch) for piece in pieces]
        axis = members[0].rows.axis
        encoded = (torch.cat(parts, axis + 1) for parts in zip(*chosen, strict=True))
        yield region, [label_map.decode(each.cpu().numpy()) for each in encoded]


def _thinner(slabs: Sequence[Slab]) -> Iterator[list[Slab]]:
    """Parts of a slab, of as many of the image's rows as `SLAB_VALUES` probabilities are: a GPU interpolates them all.

    The finest image has many times the voxels of the network's grid, which a slab is measured by.
    """
    region, rows = slabs[0].region, slabs[0].member.rows
    here = region[rows.axis]
    plane = math.prod(_shape(region)) // (here.stop - here.start)
    step = max(1, SLAB_VALUES // (rows.num_outputs * plane))
    for start in range(here.start, here.stop, step):
        part = list(region)
        part[rows.axis] = slice(start, min(start + step, here.stop))
        yield [replace(slab, region=(part[0], part[1], part[2])) for slab in slabs]


def _chosen(
    slabs: Sequence[Slab], subsets: Sequence[tuple[int, ...]], label_map: LabelMap, watch: Watch | None
) -> list[torch.Tensor]:
    """Encoded labels (1 or K, X, Y, Z) uint8 of a slab for each subset; every voxel is interpolated."""
    device = next(
        (slab.probs.device for slab in slabs if slab.probs is not None and slab.probs.device.type != "cpu"), None
    )
    each = [_restored(slab, label_map.sigmoid, device) for slab in slabs]
    chosen = []
    for k, subset in enumerate(subsets):
        probs = _mean(each, [slabs[i].member.num_models for i in subset], subset)
        if watch is not None:
            watch(k, slabs[0].region, probs)
        chosen.append((probs > 0.5).to(torch.uint8) if label_map.sigmoid else most_probable(probs, 0)[None])
    return chosen


def _mean(each: Sequence[torch.Tensor], weights: Sequence[int], subset: Sequence[int]) -> torch.Tensor:
    if len(subset) == 1:
        return each[subset[0]]
    total = each[subset[0]] * weights[0]
    for i, weight in zip(subset[1:], weights[1:], strict=True):
        total.add_(each[i], alpha=weight)
    return total.div_(sum(weights))


def _slabs(members: Sequence[Member], slab_values: int) -> Iterator[list[Slab]]:
    """Go through the image, giving each member's rows beside a slab."""
    axis = members[0].rows.axis
    low = [min(m.box[a].start for m in members) for a in range(3)]
    high = [max(m.box[a].stop for m in members) for a in range(3)]
    step = SLAB_ROWS
    for member in members:
        size, rows = member.box[axis].stop - member.box[axis].start, member.rows
        per_row = rows.num_outputs * math.prod(s for a, s in enumerate(rows.shape) if a != axis)
        finer = max(1.0, size / rows.shape[axis])
        step = min(step, int(slab_values / per_row * finer))
    step = max(1, step)
    for start in range(low[axis], high[axis], step):
        place = [slice(b, h) for b, h in zip(low, high, strict=True)]
        place[axis] = slice(start, min(start + step, high[axis]))
        region = (place[0], place[1], place[2])
        yield [_slab(member, region) for member in members]


def _slab(member: Member, region: Region) -> Slab:
    rows, axis = member.rows, member.rows.axis
    box, here = member.box[axis], region[axis]
    start, stop = max(here.start, box.start) - box.start, min(here.stop, box.stop) - box.start
    if start >= stop:
        return Slab(member=member, region=region, first=0, probs=None)
    below, above, _ = neighbours(rows.shape[axis], box.stop - box.start, start, stop)
    first, last = int(below[0]), int(above[-1]) + 1
    return Slab(member=member, region=region, first=first, probs=rows.rows(first, last))


def _shape(region: Sequence[slice]) -> tuple[int, int, int]:
    x, y, z = (s.stop - s.start for s in region)
    return x, y, z


def _restored(slab: Slab, sigmoid: bool, device: torch.device | None = None) -> torch.Tensor:
    """One member's probabilities (K, X, Y, Z) in a slab of the image; background where its box does not reach.

    Args:
        device: where they are wanted; None: where they are.
    """
    member, region = slab.member, slab.region
    rows, axis, box = member.rows, member.rows.axis, member.box
    inner = None
    covered = slab.inner[axis]
    if slab.probs is not None and covered.start < covered.stop:
        held, first = slab.probs.to(device or slab.probs.device).movedim(0, axis + 1), slab.first
        start = slab.inner[axis].start + region[axis].start - box[axis].start
        stop = slab.inner[axis].stop + region[axis].start - box[axis].start
        inner = resample_rows(
            lambda low, high: held.narrow(axis + 1, low - first, high - low),
            rows.shape[axis],
            _shape(box),
            axis,
            start,
            stop,
        )
        if tuple(inner.shape[1:]) == _shape(region):
            return inner
    whole = torch.zeros((rows.num_outputs, *_shape(region)), device=device)
    if not sigmoid:
        whole[0] = 1
    if inner is not None:
        whole[(slice(None), *slab.inner)] = inner
    return whole


# -- exclusive classes: interpolate only where it decides anything


@dataclass(slots=True, kw_only=True)
class _Axis:
    """How the image's rows or columns lie between the network's, along one axis of the plane."""

    below: torch.Tensor
    above: torch.Tensor
    share: torch.Tensor
    inside: slice
    """The part of the image's axis that the member covers."""


def _exclusive(slabs: Sequence[Slab], subsets: Sequence[tuple[int, ...]], label_map: LabelMap) -> list[np.ndarray]:
    """Labels of a slab, for classes that exclude each other.

    Where the same class is the most probable at all corners that a voxel is interpolated from, it is the most
    probable there too, since the weights are positive and sum to one. So probabilities are interpolated only at the
    other voxels: along the surfaces of the structures, a few in a hundred. The result is the same.
    """
    region = slabs[0].region
    axis = slabs[0].member.rows.axis
    plane = [a for a in range(3) if a != axis]
    prepared = [_Interpolated(slab, plane) for slab in slabs]
    size = [region[a].stop - region[a].start for a in plane]
    num_rows = region[axis].stop - region[axis].start
    results = torch.zeros((len(subsets), num_rows, *size), dtype=torch.uint8)
    for row in range(num_rows):
        agreed = [p.agreed(row) for p in prepared]
        for k, subset in enumerate(subsets):
            unanimous = agreed[subset[0]]
            for i in subset[1:]:
                unanimous = torch.where(unanimous == agreed[i], unanimous, -1)
            open_h, open_w = torch.nonzero(unanimous < 0, as_tuple=True)
            results[k, row] = unanimous.clamp(min=0).to(torch.uint8)
            if len(open_h):
                total = None
                for i in subset:
                    part = prepared[i].at(row, open_h, open_w)
                    if len(subset) > 1:
                        part = part * slabs[i].member.num_models
                    total = part if total is None else total.add_(part)
                assert total is not None
                results[k, row, open_h, open_w] = most_probable(total, 0)
    return [label_map.decode(np.moveaxis(labels.numpy(), 0, axis)[None]) for labels in results]


class _Interpolated:
    """One member's probabilities in a slab of the image, interpolated where they are asked for."""

    def __init__(self, slab: Slab, plane: Sequence[int]) -> None:
        member, region = slab.member, slab.region
        rows, axis, box = member.rows, member.rows.axis, member.box
        self.probs, self.num_outputs = slab.probs, rows.num_outputs
        self.size = [region[a].stop - region[a].start for a in plane]
        if slab.probs is None:
            return
        # Row by row, for the processor's cache.
        self.labels = torch.stack([most_probable(row, 0).to(torch.int16) for row in slab.probs])  # (rows, H, W)
        self.inside_rows = slab.inner[axis]
        start = slab.inner[axis].start + region[axis].start - box[axis].start
        stop = slab.inner[axis].stop + region[axis].start - box[axis].start
        below, above, share = neighbours(rows.shape[axis], box[axis].stop - box[axis].start, start, stop)
        self.below, self.above, self.share = (
            (below - slab.first).tolist(),
            (above - slab.first).tolist(),
            share.tolist(),
        )
        self.axes = []
        for a in plane:
            length = box[a].stop - box[a].start
            low, high, part = neighbours(rows.shape[a], length, 0, length)
            self.axes.append(_Axis(below=low, above=high, share=part.float(), inside=slab.inner[a]))
        self.same_plane = all(rows.shape[a] == box[a].stop - box[a].start for a in plane)
        self.whole = all(axis.inside == slice(0, s) for axis, s in zip(self.axes, self.size, strict=True))
        self._mixed: tuple[int, torch.Tensor] | None = None

    def _covers(self, row: int) -> bool:
        return self.probs is not None and self.inside_rows.start <= row < self.inside_rows.stop

    def agreed(self, row: int) -> torch.Tensor:
        """(H, W) of the image: the class that is certain to be the most probable, or -1; int16."""
        if not self._covers(row):
            return torch.zeros(self.size, dtype=torch.int16)
        i = row - self.inside_rows.start
        labels = self.labels[self.below[i]]
        if self.share[i] > 0 and self.above[i] != self.below[i]:
            labels = torch.where(labels == self.labels[self.above[i]], labels, -1)
        if not self.same_plane:
            h, w = self.axes
            low, high = labels[h.below], labels[h.above]
            labels = torch.where(low == high, low, -1)
            low, high = labels[:, w.below], labels[:, w.above]
            labels = torch.where(low == high, low, -1)
        if self.whole:
            return labels
        plane = torch.zeros(self.size, dtype=torch.int16)
        plane[self.axes[0].inside, self.axes[1].inside] = labels
        return plane

    def at(self, row: int, h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """(K, points): the probabilities at some voxels of a row of the image."""
        background = torch.zeros((self.num_outputs, len(h)))
        background[0] = 1
        if not self._covers(row):
            return background
        if self.whole:
            return self._interpolate(row, h, w)
        across, along = self.axes
        inside = (h >= across.inside.start) & (h < across.inside.stop)
        inside &= (w >= along.inside.start) & (w < along.inside.stop)
        background[:, inside] = self._interpolate(row, h[inside] - across.inside.start, w[inside] - along.inside.start)
        return background

    def _interpolate(self, row: int, h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if self._mixed is None or self._mixed[0] != row:
            i = row - self.inside_rows.start
            assert self.probs is not None
            mixed = self.probs[self.below[i]]
            if self.share[i] > 0:
                mixed = torch.lerp(mixed, self.probs[self.above[i]], self.share[i])
            self._mixed = (row, mixed)
        mixed = self._mixed[1]
        columns = mixed.shape[2]
        flat = mixed.reshape(self.num_outputs, -1)
        if self.same_plane:
            return flat.index_select(1, h * columns + w)
        across, along = self.axes
        top, bottom, down = across.below[h] * columns, across.above[h] * columns, across.share[h]
        left, right, over = along.below[w], along.above[w], along.share[w]
        upper = torch.lerp(flat.index_select(1, top + left), flat.index_select(1, top + right), over)
        lower = torch.lerp(flat.index_select(1, bottom + left), flat.index_select(1, bottom + right), over)
        return torch.lerp(upper, lower, down)
