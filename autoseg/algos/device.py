"""Where networks run and in which arithmetic."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Literal

import torch
from torch import nn

from autoseg.errors import ResourceError

log = logging.getLogger(__name__)
Precision = Literal["auto", "bf16", "fp16", "fp32"]


def pick_device(name: str = "auto") -> torch.device:
    """The device for `auto`, `cpu` or `cuda`; under torchrun each process takes its own GPU.

    Raises:
        ResourceError: A GPU was asked for and there is none.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        tune_cpu_allocator()
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ResourceError("device: cuda was asked for, but torch finds no GPU. Check the driver, or set device: cpu.")
    torch.backends.cudnn.benchmark = True  # patches and windows have one size: the fastest kernel is worth finding
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware.

    Without it oneDNN emulates: a step of SegResNet took 31 times longer than in fp32 (measured, AVX2 CPU).
    """
    cpu = torch.cpu
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(cpu, name, lambda: False)()) for name in checks)


def resolve_precision(device: torch.device, precision: Precision) -> Literal["bf16", "fp16", "fp32"]:
    """What `auto` means on a device: bf16 where the hardware has it, else fp16 on a GPU, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return "bf16" if cpu_has_bf16() else "fp32"


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[None]:
    """A context in which the network computes in the given precision."""
    resolved = resolve_precision(device, precision)
    if resolved == "fp32":
        return nullcontext()
    dtype = torch.bfloat16 if resolved == "bf16" else torch.float16
    return torch.autocast(device.type, dtype)


def tune_cpu_allocator() -> None:
    """Let glibc keep large blocks instead of handing them back after every layer.

    Page faults otherwise cost a CPU training step up to 40 % (measured; `docs/results.md`). Linux with glibc only;
    elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # from malloc.h
    mallopt(trim_threshold, 1 << 30)
    mallopt(mmap_threshold, 1 << 30)
    mallopt(top_pad, 1 << 28)


def take_onednn(network: nn.Module, device: torch.device, precision: Precision) -> None:
    """Have all convolutions of a network computed by oneDNN, for inference in fp32 on a CPU; changed in place.

    PyTorch leaves the convolutions of a single small sample to a kernel of its own (`slow_conv3d`: one sample, and
    channels times the first two edges up to 20480; ConvParams::use_mkldnn in ATen/native/Convolution.cpp). A window
    of 40x56x40 through SegResNet takes 0.6 of the time without it, one of 32x32x32 through SwinUNETR 0.64 (measured).
    """
    if (
        device.type != "cpu"
        or resolve_precision(device, precision) != "fp32"
        or not torch.backends.mkldnn.is_available()
    ):
        return
    for module in network.modules():
        if type(module) is nn.Conv3d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            module.forward = partial(_convolve, module)  # type: ignore[method-assign]


def _convolve(layer: nn.Conv3d, image: torch.Tensor) -> torch.Tensor:
    assert not isinstance(layer.padding, str)
    return torch.mkldnn_convolution(
        image, layer.weight, layer.bias, layer.padding, layer.stride, layer.dilation, layer.groups
    )
