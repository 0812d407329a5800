"""Operations of PyTorch that are repaired or replaced on some processors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn


def repair_bf16(network: nn.Module) -> None:
    """Go round kernels of a CPU that are wrong in bf16; changed in place.

    Convolutions of images that are thinner than their kernel, or than 4 voxels, are computed in fp32, since oneDNN's
    kernels are wrong there. PyTorch 2.13, a CPU with AVX512-BF16, kernels of 3x3x3: where the first axis
    has 2 voxels the gradient of the weights is memory that nobody wrote to, up to infinity; with stride 2 and an axis
    of 1 voxel the process dies of a corrupted heap; 5x5x5 and 7x7x7 fail at up to 4 and 6 voxels (measured against
    fp32). With AMX the forward pass is wrong, too, where a stride leaves one voxel of the last axis
    (pytorch/pytorch#169688).
    Such images are the coarsest of a network, so that fp32 costs no time to speak of.

    Instance normalisation of one sample is handed its gradient in rows of channels: one that comes channels-last is
    read as if it were in rows, and what is handed on points nowhere (PyTorch 2.13, measured: 1.4 of the right
    gradient's length away from it, for every size, two samples or more are right).
    """
    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            module.forward = partial(_convolve_bf16, module)  # type: ignore[method-assign]
        elif type(module) is nn.InstanceNorm3d:
            module.forward = partial(_normalise_bf16, module)  # type: ignore[method-assign]


def _convolve_bf16(layer: nn.Conv3d | nn.ConvTranspose3d, image: torch.Tensor) -> torch.Tensor:
    forward: Callable[..., torch.Tensor] = type(layer).forward
    if min(image.shape[2:]) >= max(4, *layer.kernel_size):
        return forward(layer, image)
    with torch.autocast("cpu", enabled=False):
        return forward(layer, image.float())


def _normalise_bf16(layer: nn.InstanceNorm3d, image: torch.Tensor) -> torch.Tensor:
    normal = nn.InstanceNorm3d.forward(layer, image)
    if len(image) == 1 and normal.requires_grad:
        normal.register_hook(torch.Tensor.contiguous)
    return normal


def take_norms(network: nn.Module) -> None:
    """Have instance normalisation read channels-last voxels as they lie, in fp32 on a CPU; changed in place."""
    for module in network.modules():
        if type(module) is nn.InstanceNorm3d and not module.track_running_stats:
            module.forward = partial(_normalise, module)  # type: ignore[method-assign]


def _normalise(layer: nn.InstanceNorm3d, image: torch.Tensor) -> torch.Tensor:
    normal: torch.Tensor = InstanceNormalise.apply(image, layer.weight, layer.bias, layer.eps)
    return normal


class InstanceNormalise(torch.autograd.Function):
    """Instance normalisation of (B, C, X, Y, Z) without a change of layout.

    PyTorch's own copies channels-last voxels into rows of channels and hands rows on, so that the next layer copies
    them back. Forward is group normalisation with as many groups as channels, whose kernel takes the layout; backward
    of that kernel is slow, so it is written out here. Of (2, 16, 40, 56, 40) on two AVX2 cores: forward 1.9 ms instead
    of 8.6, backward 5.2 instead of 8.7, without what the copies of the next layer take (measured).
    """

    @staticmethod
    def forward(
        ctx: Any, image: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
    ) -> torch.Tensor:
        """Mean 0 and variance 1 of each channel of each sample, times a weight (C,), plus a bias (C,)."""
        batch, channels = image.shape[:2]
        normal, mean, inverse = torch.native_group_norm(
            image, weight, bias, batch, channels, image[0, 0].numel(), channels, eps
        )
        # Not the result: the layer that follows may change it in place.
        ctx.save_for_backward(image, weight, mean.view(batch, 1, channels), inverse.view(batch, 1, channels))
        return normal

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient less its mean and its part along the normal image, over the deviation."""
        image, weight, mean, inverse = ctx.saved_tensors
        batch, channels = image.shape[:2]

        def rows(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.movedim(1, -1).reshape(batch, -1, channels)  # (B, voxels, C), without a copy

        gradient, values = rows(gradients[0]), rows(image)
        ones = gradient.new_ones((batch, 1, gradient.shape[1]))
        total = torch.bmm(ones, gradient)  # (B, 1, C), as all below
        along = (torch.bmm(ones, gradient * values) - mean * total) * inverse
        factor = inverse if weight is None else inverse * weight
        slope = -factor * inverse * along / gradient.shape[1]
        offset = -factor * total / gradient.shape[1] - slope * mean
        image_gradient = torch.addcmul(offset, gradient, factor).addcmul_(values, slope)
        image_gradient = image_gradient.view(batch, *image.shape[2:], channels).movedim(-1, 1)
        if weight is None:
            return image_gradient, None, None, None
        return image_gradient, along.sum((0, 1)), total.sum((0, 1)), None


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
