"""The layers of the residual-encoder U-Net. They need torch alone, since bundles carry a copy of this file.

Source: MIC-DKFZ/nnUNet 2.8.1 and the library that it builds networks with; names of the layers are those of that
library, so that weights trained with it can be read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

MOST_FEATURES = 320
"""Source: nnU-Net (`UNet_max_features_3d`)."""


def build(
    in_channels: int,
    out_channels: int,
    init_features: int,
    blocks: Sequence[int],
    strides: Sequence[Sequence[int]],
    kernels: Sequence[Sequence[int]],
    dsdepth: int,
) -> nn.Module:
    """Build it; training mode returns `dsdepth` outputs, finest first.

    Args:
        init_features: of the first stage; each further one has twice as many, up to `MOST_FEATURES`.
        blocks: residual blocks of each stage.
        strides, kernels: of each stage along X, Y, Z.
        dsdepth: outputs, at most one a stage but the coarsest.
    """
    features = [min(MOST_FEATURES, init_features * 2**i) for i in range(len(blocks))]
    num_heads = min(dsdepth, len(blocks) - 1)
    return ResidualEncoderUNet(in_channels, out_channels, features, blocks, strides, kernels, num_heads)


Triple = tuple[int, int, int]


def _triple(values: Sequence[int]) -> Triple:
    x, y, z = values
    return x, y, z


class ConvNorm(nn.Module):
    """A convolution and instance normalisation."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: Sequence[int], stride: Sequence[int], *, bias: bool = True
    ) -> None:
        """Pad so that a stride of 1 keeps the size."""
        super().__init__()
        x, y, z = kernel
        padding = x // 2, y // 2, z // 2
        self.conv = nn.Conv3d(in_channels, out_channels, (x, y, z), _triple(stride), padding, bias=bias)
        self.norm = nn.InstanceNorm3d(out_channels, eps=1e-5, affine=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, X, Y, Z) to (B, C', X / s, Y / s, Z / s)."""
        normalised: torch.Tensor = self.norm(self.conv(x))
        return normalised


class ConvNormAct(ConvNorm):
    """The same with a leaky ReLU after it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As `ConvNorm.forward`."""
        return nn.functional.leaky_relu(self.norm(self.conv(x)), 0.01, inplace=True)


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut, which is pooled by the stride and projected where channels differ."""

    def __init__(self, in_channels: int, out_channels: int, kernel: Sequence[int], stride: Sequence[int]) -> None:
        """The first convolution has the stride."""
        super().__init__()
        self.conv1 = ConvNormAct(in_channels, out_channels, kernel, stride)
        self.conv2 = ConvNorm(out_channels, out_channels, kernel, (1, 1, 1))
        shortcut: list[nn.Module] = []
        if any(s > 1 for s in stride):
            shortcut.append(nn.AvgPool3d(_triple(stride), _triple(stride)))
        if in_channels != out_channels:
            shortcut.append(ConvNorm(in_channels, out_channels, (1, 1, 1), (1, 1, 1), bias=False))
        self.skip = nn.Sequential(*shortcut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, X, Y, Z) to (B, C', X / s, Y / s, Z / s)."""
        return nn.functional.leaky_relu(self.conv2(self.conv1(x)) + self.skip(x), 0.01, inplace=True)


class Blocks(nn.Module):
    """Residual blocks, the first with the stride."""

    def __init__(self, num: int, in_channels: int, out_channels: int, kernel: Sequence[int], stride: Sequence[int]):
        """One stage of the encoder."""
        super().__init__()
        first = ResidualBlock(in_channels, out_channels, kernel, stride)
        rest = [ResidualBlock(out_channels, out_channels, kernel, (1, 1, 1)) for _ in range(num - 1)]
        self.blocks = nn.Sequential(first, *rest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As its blocks."""
        out: torch.Tensor = self.blocks(x)
        return out


class Encoder(nn.Module):
    """A stem and stages of residual blocks."""

    def __init__(
        self,
        in_channels: int,
        features: Sequence[int],
        blocks: Sequence[int],
        strides: Sequence[Sequence[int]],
        kernels: Sequence[Sequence[int]],
    ) -> None:
        """Each stage after the first has its stride of the topology."""
        super().__init__()
        self.stem = Convolutions(in_channels, features[0], kernels[0])
        before = [features[0], *features[:-1]]
        self.stages = nn.Sequential(
            *(
                Blocks(num, a, b, kernel, stride)
                for num, a, b, kernel, stride in zip(blocks, before, features, kernels, strides, strict=True)
            )
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The features of each stage, finest first."""
        x = self.stem(x)
        skips = []
        for stage in self.stages:
            x = stage(x)
            skips.append(x)
        return skips


class Convolutions(nn.Module):
    """One convolution with normalisation and activation; a list of one, as the library names it."""

    def __init__(self, in_channels: int, out_channels: int, kernel: Sequence[int]) -> None:
        """No stride."""
        super().__init__()
        self.convs = nn.Sequential(ConvNormAct(in_channels, out_channels, kernel, (1, 1, 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, X, Y, Z) to (B, C', X, Y, Z)."""
        out: torch.Tensor = self.convs(x)
        return out


class Decoder(nn.Module):
    """From the coarsest stage up: a transposed convolution, the skip, one convolution; heads at the finest stages."""

    def __init__(
        self,
        out_channels: int,
        features: Sequence[int],
        strides: Sequence[Sequence[int]],
        kernels: Sequence[Sequence[int]],
        num_heads: int,
    ) -> None:
        """`num_heads` heads at the finest resolutions."""
        super().__init__()
        up = range(len(features) - 1, 0, -1)
        up_strides = [_triple(strides[i]) for i in up]
        self.transpconvs = nn.ModuleList(
            nn.ConvTranspose3d(features[i], features[i - 1], stride, stride)
            for i, stride in zip(up, up_strides, strict=True)
        )
        self.stages = nn.ModuleList(Convolutions(2 * features[i - 1], features[i - 1], kernels[i - 1]) for i in up)
        self.first_head = len(up) - num_heads
        self.seg_layers = nn.ModuleList(nn.Conv3d(features[i - 1], out_channels, 1) for i in [*up][self.first_head :])

    def forward(self, skips: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Logits of each head, finest first; outside of training the finest alone."""
        x = skips[-1]
        outputs: list[torch.Tensor] = []
        last = len(self.stages) - 1
        for i, (up, stage) in enumerate(zip(self.transpconvs, self.stages, strict=True)):
            x = stage(torch.cat((up(x), skips[-2 - i]), dim=1))
            if i == last or (self.training and i >= self.first_head):
                outputs.append(self.seg_layers[i - self.first_head](x))
        return outputs[::-1]


class ResidualEncoderUNet(nn.Module):
    """The whole; training mode returns as many outputs as it has heads, finest first."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        features: Sequence[int],
        blocks: Sequence[int],
        strides: Sequence[Sequence[int]],
        kernels: Sequence[Sequence[int]],
        num_heads: int,
    ) -> None:
        """Weights start as He et al. have it for a leaky ReLU of 0.01, biases at zero, as nnU-Net's."""
        super().__init__()
        self.encoder = Encoder(in_channels, features, blocks, strides, kernels)
        self.decoder = Decoder(out_channels, features, strides, kernels, num_heads)
        for module in self.modules():
            if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
                nn.init.kaiming_normal_(module.weight, a=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, ResidualBlock):  # a block starts as its shortcut, as nnU-Net's
                assert module.conv2.norm.weight is not None
                nn.init.zeros_(module.conv2.norm.weight)
                nn.init.zeros_(module.conv2.norm.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """(B, C, X, Y, Z) to logits (B, K, X, Y, Z), or a list of them, the finest first."""
        outputs = self.decoder(self.encoder(x))
        return outputs if self.training and len(outputs) > 1 else outputs[0]
