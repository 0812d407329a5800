"""UNETR's layers: MONAI's, for windows of any size. They need MONAI alone, since bundles carry a copy of this file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from monai.networks.nets.unetr import UNETR as MonaiUNETR
from torch import nn

PATCH = 16
"""Voxels an edge of what becomes one token; each lies at one place of the table of positions."""
HEAD, MLP = 64, 4
"""Features of an attention head, and of a layer's inside over those outside. Source: the paper's 768 features in 12
heads, 3,072 inside."""
STATES = (3, 6, 9)
"""Layers after which features go to the decoder. Source: the paper."""


class UNETR(MonaiUNETR):
    """MONAI's network, for windows of any size: its table of positions is interpolated to them."""

    def __init__(self, image_size: Sequence[int], **how: Any) -> None:
        """Build it for a window.

        Args:
            image_size: in voxels, multiples of `PATCH`; decides the size of the table.
            how: other arguments of MONAI's.
        """
        super().__init__(img_size=tuple(image_size), **how)
        self.grid = tuple(edge // PATCH for edge in image_size)
        for block in cast(Sequence[Any], self.vit.blocks):
            # For a second input, which there is none of: weights without gradients stop processes that share a job.
            block.norm_cross_attn = nn.Identity()

    def positions(self, grid: Sequence[int]) -> torch.Tensor:
        """The table of positions for a grid of patches: (1, X Y Z, features)."""
        table = cast(torch.Tensor, self.vit.patch_embedding.position_embeddings)
        if tuple(grid) == self.grid:
            return table
        cube = table[0].T.reshape(1, self.hidden_size, *self.grid)
        wanted = nn.functional.interpolate(cube, size=tuple(grid), mode="trilinear", align_corners=False)
        return wanted.flatten(2).transpose(1, 2)

    def forward(self, x_in: torch.Tensor) -> torch.Tensor:
        """(B, C, X, Y, Z) to logits (B, K, X, Y, Z); edges are multiples of `PATCH`."""
        tokens = self.vit.patch_embedding.patch_embeddings(x_in)
        grid = tokens.shape[2:]
        x = tokens.flatten(2).transpose(1, 2) + self.positions(grid)

        def volume(features: torch.Tensor) -> torch.Tensor:
            return features.transpose(1, 2).reshape(len(x_in), self.hidden_size, *grid).contiguous()

        states = []
        for block in cast(Sequence[nn.Module], self.vit.blocks):
            x = block(x)
            states.append(x)
        first, second, third = (volume(states[layer]) for layer in STATES)
        up = self.decoder5(volume(self.vit.norm(x)), self.encoder4(third))
        up = self.decoder4(up, self.encoder3(second))
        up = self.decoder3(up, self.encoder2(first))
        logits: torch.Tensor = self.out(self.decoder2(up, self.encoder1(x_in)))
        return logits


def build(
    in_channels: int, out_channels: int, feature_size: int, hidden_size: int, image_size: Sequence[int]
) -> nn.Module:
    """Build it; one output.

    Args:
        feature_size: of the decoder's finest stage.
        hidden_size: features of the transformer.
        image_size: window that the table of positions is for.

    Raises:
        ValueError: The edges of that window are no multiples of `PATCH`.
    """
    if any(edge % PATCH for edge in image_size):
        raise ValueError(f"image_size: {list(image_size)} are no multiples of {PATCH}")
    return UNETR(
        image_size,
        in_channels=in_channels,
        out_channels=out_channels,
        feature_size=feature_size,
        hidden_size=hidden_size,
        mlp_dim=MLP * hidden_size,
        num_heads=hidden_size // HEAD,
    )
