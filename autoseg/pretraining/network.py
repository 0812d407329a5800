"""A network of segmentation that draws images: its encoder is what pretraining is for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from autoseg.networks import is_encoder, network_file
from autoseg.plan import Plan

PROJECTED = 128
"""Features that views are compared by. Source: SimCLR (arXiv 2002.05709)."""
INNER = "network."
"""What stands before the names of the network's weights."""


class Reconstructor(nn.Module):
    """The plan's network with an output for each channel of the image, and what is compared of two views.

    These are the means of the encoder's coarsest features, by two linear layers. Clara's tutorial compares the drawn
    images instead; here the views are mirrored, each in its own way, so that drawings of one place differ.
    """

    def __init__(self, plan: Plan, *, compares: bool) -> None:
        """Build it with random weights.

        Args:
            plan: of the pretraining: one output alone, at full resolution.
            compares: whether views are compared; else there are no such layers, which would have no gradients.
        """
        super().__init__()
        self.algo = plan.algo
        file = network_file(plan.algo)
        channels = len(plan.channels)
        self.network = file.build(channels, channels, plan.network)
        self.latent = file.LATENT
        self.projection: nn.Module | None = None
        if compares:
            width = self._width(channels, plan.roi_size)
            self.projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, PROJECTED))

    @torch.no_grad()
    def _width(self, channels: int, roi: tuple[int, int, int]) -> int:
        """Features of the encoder's coarsest stage, by passing a patch of zeros through it."""
        self.network.eval()
        _, features = self._pass(torch.zeros(1, channels, *roi))
        self.network.train()
        return features.shape[1]

    def _pass(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kept: list[torch.Tensor] = []

        def keep(module: nn.Module, given: object, features: torch.Tensor | list[torch.Tensor]) -> None:
            # Now, since the decoder may empty the list.
            kept.append(_means(features if isinstance(features, torch.Tensor) else features[-1]))

        handle = self.network.get_submodule(self.latent).register_forward_hook(keep)
        try:
            drawn = self.network(image)
        finally:
            handle.remove()
        return (drawn[0] if isinstance(drawn, list) else drawn), kept[0]

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C, X, Y, Z) to the drawn images (B, C, X, Y, Z) and what is compared (B, F)."""
        if self.projection is None:
            drawn = self.network(image)
            return (drawn[0] if isinstance(drawn, list) else drawn), image.new_zeros(len(image), 0)
        drawn, features = self._pass(image)
        return drawn, self.projection(features)


def _means(features: torch.Tensor) -> torch.Tensor:
    """(B, F, X, Y, Z) or (B, places, F) to (B, F)."""
    return features.mean(1) if features.ndim == 3 else features.flatten(2).mean(2)


def encoder_weights(algo: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of a reconstructor's weights that a job starts from, by their names in its network.

    The decoder's stay behind: it has learned to draw images. Source: nnU-Net and nnssl take encoder and stem alone.
    """
    inside = is_encoder(algo)
    named = {name.removeprefix(INNER): tensor for name, tensor in state.items() if name.startswith(INNER)}
    return {name: tensor for name, tensor in named.items() if inside(name)}
