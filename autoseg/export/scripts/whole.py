"""A network that takes whole images, for a client whose own windows lie elsewhere than autoseg's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from autoseg.export.scripts.inferer import WindowInferer


def take_whole_images(
    network: nn.Module,
    undo: Callable[[torch.Tensor], torch.Tensor] | None = None,
    crop: bool = False,
    **windows: Any,
) -> nn.Module:
    """Have a network lay windows itself, over an image that its client hands over as one window.

    The network's weights keep their names, so that the client loads them as ever.

    Args:
        undo: turns the client's intensities (1, C, X, Y, Z) into those of the training.
        crop: windows lie over the smallest box of what is not 0; around it is background.
        **windows: as `WindowInferer` takes them.
    """
    inferer, of_window = WindowInferer(**windows), network.forward

    def forward(image: torch.Tensor) -> torch.Tensor:
        box = [slice(None)] * 5
        if crop and bool((image != 0).any()):
            inside = (image != 0).any(1).any(0)
            for axis in range(3):
                line = inside.any(2 if axis < 2 else 1).any(1 if axis < 1 else 0).nonzero()
                box[axis + 2] = slice(int(line[0]), int(line[-1]) + 1)
        part = image[tuple(box)]
        logits = inferer(part if undo is None else undo(part), of_window)
        if part.shape == image.shape:
            return logits
        full = logits.new_zeros((len(logits), logits.shape[1], *image.shape[2:]))
        full[:, 0] = 1
        full[tuple(box)] = logits
        return full

    network.forward = forward
    return network
