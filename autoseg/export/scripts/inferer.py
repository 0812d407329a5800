"""Sliding windows as autoseg places and weights them, for MONAI's engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from monai.data.meta_tensor import MetaTensor
from monai.inferers.inferer import Inferer
from monai.utils.type_conversion import convert_to_dst_type

from autoseg.data.windowing import Shape, fit_window, mirrored_mean, window_starts, window_weights


class WindowInferer(Inferer):
    """Mean logits over windows and mirrored windows.

    MONAI's SlidingWindowInferer moves the last window back; here windows are evenly spread, and a window that is
    little smaller than the image grows to hold it.
    """

    def __init__(
        self,
        roi_size: Sequence[int],
        overlap: float = 0.5,
        divisor: Sequence[int] = (1, 1, 1),
        mirror_axes: Sequence[int] = (),
        mirrored_pairs: Sequence[Sequence[int]] = (),
        sw_batch_size: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        """Set up.

        Args:
            roi_size: window in voxels.
            overlap: of neighbouring windows, as a share of the window, in [0, 1).
            divisor: what the network wants edges of a window to be multiples of.
            mirror_axes: axes (0 X, 1 Y, 2 Z) mirrored in every combination.
            mirrored_pairs: outputs that change places when X is mirrored: left and right.
            sw_batch_size: windows per forward pass.
            device: where the means are kept; None: where the image is.
        """
        super().__init__()
        self.roi_size, self.divisor = _shape(roi_size), _shape(divisor)
        self.overlap, self.sw_batch_size, self.device = overlap, sw_batch_size, device
        self.mirror_axes, self.mirrored_pairs = list(mirror_axes), [(a, b) for a, b in mirrored_pairs]

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """(B, C, X, Y, Z) to logits (B, K, X, Y, Z), float32."""
        image = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        shape = _shape(image.shape[2:])
        roi = fit_window(shape, self.roi_size, self.divisor)
        missing = [max(0, r - s) for r, s in zip(roi, shape, strict=True)]
        before = [m // 2 for m in missing]
        pads = [side for m, b in zip(missing[::-1], before[::-1], strict=True) for side in (b, m - b)]
        image = F.pad(image, pads) if any(pads) else image
        padded = image.shape[2:]
        starts = [window_starts(s, r, self.overlap) for s, r in zip(padded, roi, strict=True)]
        weights = [window_weights(s, r, self.overlap) for s, r in zip(padded, roi, strict=True)]
        places = list(product(*(range(len(s)) for s in starts)))
        total: torch.Tensor | None = None
        for begin in range(0, len(places), self.sw_batch_size):
            chosen = places[begin : begin + self.sw_batch_size]
            cuts = [_cut(starts, place, roi) for place in chosen]
            windows = torch.cat([image[(slice(None), slice(None), *cut)] for cut in cuts])
            logits = mirrored_mean(
                lambda batch: _first(network(batch, *args, **kwargs)), windows, self.mirror_axes, self.mirrored_pairs
            ).float()
            if total is None:
                size = (len(image), logits.shape[1], *padded)
                total = _zeros(size, self.device or image.device)
            for place, cut, part in zip(chosen, cuts, logits.split(len(image)), strict=True):
                x, y, z = (w[i].to(total.device) for w, i in zip(weights, place, strict=True))
                total[(slice(None), slice(None), *cut)] += part.to(total.device) * (x[:, None, None] * y[:, None] * z)
        assert total is not None
        inner = [slice(b, b + s) for b, s in zip(before, shape, strict=True)]
        mean = total[(slice(None), slice(None), *inner)]
        return convert_to_dst_type(mean, inputs, dtype=torch.float32, device=mean.device)[0]


def _zeros(size: tuple[int, ...], device: torch.device | str) -> torch.Tensor:
    """On a device, or beside a GPU whose memory does not hold so many classes of a whole image."""
    try:
        return torch.zeros(size, device=device)
    except torch.cuda.OutOfMemoryError:
        return torch.zeros(size)


def _shape(sizes: Sequence[int]) -> Shape:
    x, y, z = (int(s) for s in sizes)
    return x, y, z


def _first(outputs: Any) -> torch.Tensor:
    """The finest of a network's outputs."""
    finest: torch.Tensor = outputs[0] if isinstance(outputs, (list, tuple)) else outputs
    return finest


def _cut(starts: Sequence[Sequence[int]], place: Sequence[int], roi: Shape) -> tuple[slice, ...]:
    return tuple(slice(s[i], s[i] + r) for s, i, r in zip(starts, place, roi, strict=True))
