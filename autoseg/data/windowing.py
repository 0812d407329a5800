"""Where sliding windows lie, what they weigh, and the mean over mirrored ones.

Needs torch alone, since bundles carry a copy of this file: MONAI's clients then place windows as autoseg does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations

import torch

Shape = tuple[int, int, int]

SIGMA_SCALE = 0.125
"""Standard deviation of the Gaussian weights as a share of the window's edge. Source: nnU-Net, MONAI's default."""
STRETCH = 1.5
"""How much larger than the training patch a window may be, in voxels, where it then holds the whole image."""


def window_starts(size: int, roi: int, overlap: float) -> list[int]:
    """Where windows start along an axis of at least their length: as few as keep the overlap, evenly spread.

    Source: nnU-Net's `compute_steps_for_sliding_window`; MONAI moves the last window back instead.
    """
    step = max(1, int(roi * (1 - overlap)))
    num = math.ceil((size - roi) / step) + 1
    return [round(i * (size - roi) / max(1, num - 1)) for i in range(num)]


def window_weights(size: int, roi: int, overlap: float) -> list[torch.Tensor]:
    """Gaussian weights (roi,) of each window along an axis; over every voxel they sum to one.

    A window's weights in a volume are the product of its axes', and sum to one there too.
    """
    at = torch.arange(roi, dtype=torch.float64) - (roi - 1) / 2
    bell = torch.exp(-0.5 * (at / (roi * SIGMA_SCALE)) ** 2)
    starts = window_starts(size, roi, overlap)
    total = torch.zeros(size, dtype=torch.float64)
    for start in starts:
        total[start : start + roi] += bell
    return [(bell / total[start : start + roi]).float() for start in starts]


def fit_window(shape: Shape, roi_size: Shape, divisor: Shape) -> Shape:
    """The window for an image: the training patch, or the image itself where that is little more.

    An image a few voxels over the patch would else take up to eight overlapping windows.

    Args:
        shape: of the image.
        divisor: what the network wants edges to be multiples of.
    """
    whole = [max(r, -(-s // d) * d) for s, r, d in zip(shape, roi_size, divisor, strict=True)]
    return (whole[0], whole[1], whole[2]) if math.prod(whole) <= STRETCH * math.prod(roi_size) else roi_size


def mirrored_mean(
    network: Callable[[torch.Tensor], torch.Tensor],
    batch: torch.Tensor,
    axes: Sequence[int],
    pairs: Sequence[tuple[int, int]],
    watch: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """The mean of a network's logits over a batch and its mirror images, each turned back: 2^n passes.

    Outputs change places by a tensor in pinned memory: for a list in brackets a GPU would be waited for.

    Args:
        batch: (B, C, X, Y, Z).
        axes: axes (0 X, 1 Y, 2 Z) mirrored in every combination.
        pairs: outputs that change places when X is mirrored: left and right.
        watch: is shown the logits of the batch itself, where anything is mirrored.

    Returns:
        (B, K, X, Y, Z); float32 where anything is mirrored.
    """
    mean = network(batch)
    flips = [flip for n in range(1, len(axes) + 1) for flip in combinations(axes, n)]
    if not flips:
        return mean
    if watch is not None:
        watch(mean)
    mean = mean.float()
    order = list(range(mean.shape[1]))
    for a, b in pairs:
        order[a], order[b] = b, a
    swapped = torch.tensor(order, pin_memory=mean.is_cuda).to(mean.device, non_blocking=True)
    for flip in flips:
        dims = [axis + 2 for axis in flip]
        other = network(batch.flip(dims)).flip(dims)
        mean += other.index_select(1, swapped) if 0 in flip and pairs else other
    return mean.div_(len(flips) + 1)
