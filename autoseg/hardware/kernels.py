"""Operations of PyTorch that are repaired or replaced on some processors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

HALF_VECTOR = 16
"""Values of 16 bits that group normalisation's kernel takes at a time; other numbers of channels take it four times as
long (8 and 24 channels, PyTorch 2.13, measured)."""


def repair_bf16(network: nn.Module) -> None:
    """Go round kernels of a CPU that are wrong in bf16; changed in place.

    Convolutions of images that are thinner than their kernel, or than 4 voxels, are computed in fp32, since oneDNN's
    kernels are wrong there. PyTorch 2.13, a CPU with AVX512-BF16, kernels of 3x3x3: where the first axis
    has 2 voxels the gradient of the weights is memory that nobody wrote to, up to infinity; with stride 2 and an axis
    of 1 voxel the process dies of a corrupted heap; 5x5x5 and 7x7x7 fail at up to 4 and 6 voxels (measured against
    fp32). With AMX the forward pass is wrong, too, where a stride leaves one voxel of the last axis
    (pytorch/pytorch#169688).
    Such images are the coarsest of a network, so that fp32 costs no time to speak of.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            module.forward = partial(_convolve_bf16, module)  # type: ignore[method-assign]


def _convolve_bf16(layer: nn.Conv3d | nn.ConvTranspose3d, image: torch.Tensor) -> torch.Tensor:
    forward: Callable[..., torch.Tensor] = type(layer).forward
    if min(image.shape[2:]) >= max(4, *layer.kernel_size):
        return forward(layer, image)
    with torch.autocast("cpu", enabled=False):
        return forward(layer, image.float())


def take_norms(network: nn.Module) -> None:
    """Have instance normalisation take channels-last voxels as they lie, on a CPU; changed in place.

    Group normalisation of one channel a group is the same, and has a gradient that takes PyTorch 40 times as long where
    voxels lie channels-last in bf16 as where they lie in rows, in fp32 15 times (12 channels, PyTorch 2.13, measured).
    """
    for module in network.modules():
        if (type(module) is nn.InstanceNorm3d and not module.track_running_stats) or (
            type(module) is nn.GroupNorm and module.num_groups == module.num_channels
        ):
            module.forward = partial(_normalise, module)  # type: ignore[method-assign]


def _normalise(layer: nn.InstanceNorm3d | nn.GroupNorm, image: torch.Tensor) -> torch.Tensor:
    normal: torch.Tensor = InstanceNormalise.apply(image, layer.weight, layer.bias, layer.eps)
    return normal


class InstanceNormalise(torch.autograd.Function):
    """Instance normalisation of (B, C, X, Y, Z) without a change of layout.

    PyTorch's own copies channels-last voxels into rows of channels and hands rows on, so that the next layer copies
    them back. Its gradient of one sample is wrong besides: one that comes channels-last is read as if it were in rows
    (PyTorch 2.13, measured: 1.4 of the right gradient's length away from it, for every size).

    Forward is group normalisation with as many groups as channels, whose kernel takes the layout; backward is that of
    batch normalisation, sample by sample, which is the same sum. Of (2, 16, 40, 56, 40) on a core with AVX512-BF16,
    both ways: fp32 4.6 ms instead of 12.7, bf16 3.3 instead of 5.6, the copy for the next layer included (measured).
    """

    @staticmethod
    def forward(
        ctx: Any, image: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
    ) -> torch.Tensor:
        """Mean 0 and variance 1 of each channel of each sample, times a weight (C,), plus a bias (C,)."""
        batch, channels = image.shape[:2]
        image = image.contiguous(memory_format=torch.channels_last_3d)
        given, is_half = (weight, bias), image.itemsize == 2
        if weight is None and is_half:  # so that mean and deviation are kept in fp32
            given = torch.ones(channels), torch.zeros(channels)
        if is_half and channels % HALF_VECTOR:
            parts = [torch.native_batch_norm(one, *given, None, None, True, 0.0, eps) for one in image.split(1)]
            normal, mean, inverse = (_joined(results) for results in zip(*parts, strict=True))
        else:
            normal, mean, inverse = torch.native_group_norm(
                image, *given, batch, channels, image[0, 0].numel(), channels, eps
            )
        # Not the result: the layer that follows may change it in place.
        ctx.save_for_backward(image, given[0], mean.view(batch, channels), inverse.view(batch, channels))
        ctx.eps, ctx.has_weight = eps, weight is not None
        return normal

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of the image, the weight and the bias."""
        image, weight, mean, inverse = ctx.saved_tensors
        wanted = [True, ctx.has_weight, ctx.has_weight]
        # The kernel reads it as if it lay like the image.
        gradient = gradients[0].contiguous(memory_format=torch.channels_last_3d)
        parts = [
            torch.ops.aten.native_batch_norm_backward(
                change, one, weight, None, None, mean[i], inverse[i], True, ctx.eps, wanted
            )
            for i, (change, one) in enumerate(zip(gradient.split(1), image.split(1), strict=True))
        ]
        of_image, of_weight, of_bias = zip(*parts, strict=True)
        if not ctx.has_weight:
            return _joined(of_image), None, None, None
        return _joined(of_image), torch.stack(of_weight).sum(0), torch.stack(of_bias).sum(0), None


def _joined(samples: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return samples[0] if len(samples) == 1 else torch.cat(samples)


def take_onednn(network: nn.Module) -> None:
    """Have all convolutions of a network computed by oneDNN, for inference in fp32 on a CPU; changed in place.

    PyTorch leaves the convolutions of a single small sample to a kernel of its own (`slow_conv3d`: one sample, and
    channels times the first two edges up to 20480; ConvParams::use_mkldnn in ATen/native/Convolution.cpp). A window
    of 40x56x40 through SegResNet takes 0.6 of the time without it, one of 32x32x32 through SwinUNETR 0.64 (measured).
    """
    if not torch.backends.mkldnn.is_available():
        return
    for module in network.modules():
        if type(module) is nn.Conv3d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            module.forward = partial(_convolve, module)  # type: ignore[method-assign]


def _convolve(layer: nn.Conv3d, image: torch.Tensor) -> torch.Tensor:
    assert not isinstance(layer.padding, str)
    return torch.mkldnn_convolution(
        image, layer.weight, layer.bias, layer.padding, layer.stride, layer.dilation, layer.groups
    )
