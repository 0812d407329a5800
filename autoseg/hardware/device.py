"""Where networks run and in which arithmetic."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import nn

from autoseg.errors import ResourceError
from autoseg.hardware.kernels import repair_bf16, take_norms, take_onednn
from autoseg.hardware.limits import own_threads

Precision = Literal["auto", "bf16", "fp16", "fp32"]


def pick_device(name: str = "auto") -> torch.device:
    """The device for `auto`, `cpu` or `cuda`; under torchrun each process takes its own GPU.

    Torch counts the cores of the machine; here it is told how many this process may use, containers' quotas included.

    Raises:
        ResourceError: A GPU was asked for and there is none.
    """
    torch.set_num_threads(min(torch.get_num_threads(), own_threads()))
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

    Page faults otherwise cost a CPU training step up to 40 % (measured). Linux with glibc only;
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


def to_device(network: nn.Module, device: torch.device, precision: Precision, *, trained: bool) -> nn.Module:
    """Bring a network to a device in the layout and with the kernels that are fastest there; weights stay the same.

    Channels-last is what the CPU kernels below take (together 0.7 of the time, docs/results.md) and tensor cores want.

    Args:
        trained: gradients are taken through it.
    """
    network = network.to(device).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    if device.type == "cpu" and resolve_precision(device, precision) == "fp32":
        take_norms(network)
        if not trained:
            take_onednn(network)
    elif device.type == "cpu":
        repair_bf16(network)
    return network
