"""A prediction's way back: probabilities on the network's grid to labels on the image's, slab by slab.

Linear interpolation is separable and local, so a slab of the image needs only the rows of probabilities beside
it. All classes at the image's resolution exist for one slab at a time. Axes: K outputs, then X, Y, Z, RAS+.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from autoseg.data.labels import LabelMap
from autoseg.data.preprocess import Prepared

SLAB_VALUES = 1 << 24
"""Probabilities (float32) of one model held at the image's resolution at a time: 64 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probs:
    """What one model, or several with the same preprocessing, say about an image."""

    values: torch.Tensor
    """(K, X, Y, Z) float32 in 0..1 on the network's grid."""
    box: tuple[slice, slice, slice]
    """The region of the RAS volume they cover; background elsewhere."""
    num_models: int = 1
    """Models that `values` is the mean of: its weight."""


def to_probs(logits: torch.Tensor, *, sigmoid: bool) -> torch.Tensor:
    """Turn logits (K, X, Y, Z) into probabilities in place."""
    if sigmoid:
        return logits.sigmoid_()
    logits -= logits.amax(0, keepdim=True)
    logits.exp_()
    return logits.div_(logits.sum(0, keepdim=True))


def labels_from_probs(probs: torch.Tensor, prepared: Prepared, label_map: LabelMap) -> np.ndarray:
    """Labels of one prediction.

    Args:
        probs: (K, X, Y, Z) on the grid of `prepared.image`.

    Returns:
        (X, Y, Z) label values in RAS on the image's own grid, background outside the crop box.
    """
    return mean_labels([Probs(values=probs, box=prepared.box)], prepared.ras_shape, label_map)


def mean_labels(members: Sequence[Probs], ras_shape: tuple[int, int, int], label_map: LabelMap) -> np.ndarray:
    """Labels of the mean of several predictions, each on a grid of its own.

    Returns:
        (X, Y, Z) label values in RAS.
    """
    return labels_of_means(members, [tuple(range(len(members)))], ras_shape, label_map)[0]


def labels_of_means(
    members: Sequence[Probs],
    subsets: Sequence[tuple[int, ...]],
    ras_shape: tuple[int, int, int],
    label_map: LabelMap,
    watch: Callable[[int, tuple[slice, slice, slice], torch.Tensor], None] | None = None,
) -> list[np.ndarray]:
    """Labels of the means of several subsets of predictions; each prediction is brought back once.

    Args:
        members: the predictions.
        subsets: indices into `members`; a mean for each.
        watch: called with (place in `subsets`, slab of the RAS volume, probabilities (K, X, Y, Z) there).

    Returns:
        One (X, Y, Z) array of label values in RAS per subset.
    """
    results = [np.zeros(ras_shape, label_map.dtype) for _ in subsets]
    for place, slabs in restored_slabs(members, ras_shape, sigmoid=label_map.sigmoid):
        for k, (result, subset) in enumerate(zip(results, subsets, strict=True)):
            total = slabs[subset[0]] * members[subset[0]].num_models if len(subset) > 1 else slabs[subset[0]]
            for i in subset[1:]:
                total.add_(slabs[i], alpha=members[i].num_models)
            num = sum(members[i].num_models for i in subset) if len(subset) > 1 else 1
            result[place] = decide(total, label_map, threshold=0.5 * num)
            if watch is not None:
                watch(k, place, total / num)
    return results


def decide(probs: torch.Tensor, label_map: LabelMap, *, threshold: float = 0.5) -> np.ndarray:
    """Label values of probabilities, or of sums of them with the threshold to match: largest, or above it.

    Args:
        probs: (K, X, Y, Z).

    Returns:
        (X, Y, Z) of the label map's type.
    """
    chosen = probs > threshold if label_map.sigmoid else probs.argmax(0, keepdim=True)
    return label_map.decode(chosen.to(torch.uint8).numpy())


def restored_slabs(
    members: Sequence[Probs], ras_shape: tuple[int, int, int], *, sigmoid: bool
) -> Iterator[tuple[tuple[slice, slice, slice], list[torch.Tensor]]]:
    """Bring predictions back to the image's grid, slab by slab along its longest axis.

    Yields:
        Where the slab lies in the RAS volume, and there (K, X, Y, Z) of each member. Places outside every
        member's box are background and left out.
    """
    low = [min(m.box[a].start for m in members) for a in range(3)]
    high = [max(m.box[a].stop for m in members) for a in range(3)]
    size = [h - b for b, h in zip(low, high, strict=True)]
    axis = size.index(max(size))
    num_outputs = len(members[0].values)
    step = max(1, SLAB_VALUES // max(1, num_outputs * math.prod(size) // size[axis]))
    for start in range(low[axis], high[axis], step):
        place = [slice(b, h) for b, h in zip(low, high, strict=True)]
        place[axis] = slice(start, min(start + step, high[axis]))
        region = (place[0], place[1], place[2])
        yield region, [_restored(m, region, axis, sigmoid) for m in members]


def _restored(member: Probs, region: tuple[slice, slice, slice], axis: int, sigmoid: bool) -> torch.Tensor:
    """One member's probabilities in a region of the RAS volume; background where its box does not reach."""
    box, row = member.box, region[axis]
    at = [slice(b.start - r.start, b.stop - r.start) for b, r in zip(box, region, strict=True)]
    at[axis] = slice(max(at[axis].start, 0), min(at[axis].stop, row.stop - row.start))
    start = row.start - box[axis].start
    inner = None
    if at[axis].start < at[axis].stop:
        inner = interpolate_rows(member.values, _shape(box), axis, start + at[axis].start, start + at[axis].stop)
        if inner.shape[1:] == _shape(region):
            return inner
    whole = torch.zeros((len(member.values), *_shape(region)))
    if not sigmoid:
        whole[0] = 1
    if inner is not None:
        whole[(slice(None), *at)] = inner
    return whole


def _shape(region: tuple[slice, slice, slice]) -> tuple[int, int, int]:
    return tuple(s.stop - s.start for s in region)


def interpolate_rows(
    values: torch.Tensor, shape: tuple[int, int, int], axis: int, start: int, stop: int
) -> torch.Tensor:
    """Rows `start..stop` along one axis of `resample(values, shape)`, without making the others.

    Args:
        values: (K, X, Y, Z) float32.
        shape: (X, Y, Z) of the whole result.
        axis: 0, 1 or 2.

    Returns:
        (K, X, Y, Z) of `shape` but for `stop - start` along `axis`. Equals trilinear interpolation with
        align_corners=False, voxel edges aligned, within rounding.
    """
    size = values.shape[axis + 1]
    rows = values.movedim(axis + 1, 0)  # (rows, K, H, W)
    if size == shape[axis]:
        part = rows[start:stop]
    else:
        # The half-pixel rule of F.interpolate: centres map to centres, clamped at the edges.
        at = ((torch.arange(start, stop, dtype=torch.float64) + 0.5) * (size / shape[axis]) - 0.5).clamp_(min=0)
        below = at.floor().long().clamp_(max=size - 1)
        above = (below + 1).clamp_(max=size - 1)
        share = (at - below).to(values.dtype).reshape(-1, 1, 1, 1)
        part = torch.lerp(rows[below], rows[above], share)
    plane = [s for a, s in enumerate(shape) if a != axis]
    if list(part.shape[2:]) != plane:
        part = F.interpolate(part, size=plane, mode="bilinear", align_corners=False)
    return part.movedim(0, axis + 1)
