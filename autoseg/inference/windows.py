"""Sliding windows: a network's logits for a volume of any size.

Axes: B windows, C image channels, K outputs, then X, Y, Z.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, combinations

import torch
import torch.nn.functional as F
from monai.data.utils import compute_importance_map, dense_patch_slices
from torch import nn

from autoseg.algos.device import Precision, autocast

Shape = tuple[int, int, int]

SIGMA_SCALE = 0.125
"""Standard deviation of the Gaussian weights as a share of the window's edge. Source: nnU-Net, MONAI's default."""


def window_slices(shape: Shape, roi_size: Shape, overlap: float) -> list[tuple[slice, ...]]:
    """Lay windows over a volume at least as large as one; the last of each axis is moved back to fit."""
    steps = [max(1, int(roi * (1 - overlap))) for roi in roi_size]
    return dense_patch_slices(shape, roi_size, steps)


STRETCH = 1.5
"""How much larger than the training patch a window may be, in voxels, where it then holds the whole image."""


def fit_window(shape: Shape, roi_size: Shape, divisor: Shape) -> Shape:
    """The window for an image: the training patch, or the image itself where that is little more.

    An image a few voxels over the patch would else take up to eight overlapping windows.

    Args:
        shape: of the image.
        divisor: what the network wants edges to be multiples of.
    """
    whole = [max(r, -(-s // d) * d) for s, r, d in zip(shape, roi_size, divisor, strict=True)]
    return (whole[0], whole[1], whole[2]) if math.prod(whole) <= STRETCH * math.prod(roi_size) else roi_size


def predict_logits(
    network: nn.Module,
    image: torch.Tensor,
    *,
    roi_size: Shape,
    overlap: float,
    num_outputs: int,
    device: torch.device,
    precision: Precision,
    divisor: Shape | None = None,
    mirror_axes: Sequence[int] = (),
    mirrored_pairs: Sequence[tuple[int, int]] = (),
    window_batch: int = 1,
) -> torch.Tensor:
    """Run a network over a volume in windows, weighted by a Gaussian where they overlap.

    A volume that fits one window costs one forward pass (and one per mirroring) and no blending; a smaller one
    is padded with 0 on both sides and cropped back. Only the windows at hand are on the device.

    Args:
        network: on `device`; maps (B, C, X, Y, Z) to (B, K, X, Y, Z).
        image: (C, X, Y, Z) float32, preprocessed.
        roi_size: window in voxels.
        overlap: of neighbouring windows, as a share of the window, in [0, 1).
        num_outputs: K.
        divisor: what the network wants edges to be multiples of; given, the window may stretch (`fit_window`).
        mirror_axes: axes (0 X, 1 Y, 2 Z) mirrored in every combination, 2^n passes; their logits are averaged.
        mirrored_pairs: outputs that change places when X is mirrored: left and right.
        window_batch: windows per forward pass.

    Returns:
        (K, X, Y, Z) float32 logits on the CPU.

    Source: nnU-Net pads symmetrically and averages the logits of all mirrorings (`predict_from_raw_data.py`).
    """
    shape: Shape = tuple(image.shape[1:])  # type: ignore[assignment]
    if divisor is not None:
        roi_size = fit_window(shape, roi_size, divisor)
    missing = [max(0, roi - size) for roi, size in zip(roi_size, shape, strict=True)]
    before = [m // 2 for m in missing]
    if any(missing):
        pads = list(chain.from_iterable((b, m - b) for b, m in zip(reversed(before), reversed(missing), strict=True)))
        image = F.pad(image, pads)
    padded: Shape = tuple(image.shape[1:])  # type: ignore[assignment]
    inner = (slice(None), *(slice(b, b + s) for b, s in zip(before, shape, strict=True)))
    windows = window_slices(padded, roi_size, overlap)

    def forward(batch: torch.Tensor) -> torch.Tensor:
        moved = batch.to(device, memory_format=torch.channels_last_3d)
        with torch.inference_mode(), autocast(device, precision):
            return _mirrored_mean(network, moved, mirror_axes, mirrored_pairs)

    # Allocated outside inference_mode, so that callers may change the logits in place.
    with _evaluating(network):
        if len(windows) == 1:
            return torch.empty((num_outputs, *shape)).copy_(forward(image[None])[0][inner])
        weight = compute_importance_map(roi_size, mode="gaussian", sigma_scale=SIGMA_SCALE)
        total = torch.zeros((num_outputs, *padded))
        weights = torch.zeros(padded)
        for first in range(0, len(windows), window_batch):
            chosen = windows[first : first + window_batch]
            logits = forward(torch.stack([image[(slice(None), *w)] for w in chosen])).float().cpu()
            for window, part in zip(chosen, logits, strict=True):
                total[(slice(None), *window)].addcmul_(part, weight)
                weights[window] += weight
        return total.div_(weights)[inner].contiguous()


def _mirrored_mean(
    network: nn.Module, batch: torch.Tensor, axes: Sequence[int], pairs: Sequence[tuple[int, int]]
) -> torch.Tensor:
    mean: torch.Tensor = network(batch)
    flips = [flip for n in range(1, len(axes) + 1) for flip in combinations(axes, n)]
    if not flips:
        return mean
    mean = mean.float()
    order = list(range(mean.shape[1]))
    for a, b in pairs:
        order[a], order[b] = b, a
    for flip in flips:
        dims = [axis + 2 for axis in flip]
        other = network(batch.flip(dims)).flip(dims)
        mean += other[:, order] if 0 in flip and pairs else other
    return mean.div_(len(flips) + 1)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        if was_training:
            network.train()
