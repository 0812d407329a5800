"""Where networks run and in which arithmetic."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from autoseg.errors import ResourceError
from autoseg.hardware.gpus import ORDER
from autoseg.hardware.kernels import repair_bf16, take_norms, take_onednn
from autoseg.hardware.limits import own_threads

Precision = Literal["auto", "bf16", "fp16", "fp32"]


def pick_device(name: str = "auto") -> torch.device:
    """The device for `auto`, `cpu` or `cuda`; under torchrun each process takes its own GPU.

    Torch counts the cores of the machine; here it is told how many this process may use, containers' quotas included.

    Raises:
        ResourceError: A GPU was asked for and there is none.
    """
    for name_of_order, order in ORDER.items():  # before CUDA is first asked
        os.environ.setdefault(name_of_order, order)
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


def finish(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: torch keeps memory for each stream apart."""
    return torch.cuda.Stream(device)


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """Let a GPU do what is asked of it in a block beside its other work, and wait for it at the end."""
    if device.type != "cuda":
        yield
        return
    stream = _side_stream(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def without_wait(
    values: np.ndarray | Sequence[Any], device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Values on a device, from memory that a GPU copies from while it works: else it would end that first."""
    tensor = torch.as_tensor(values, dtype=dtype)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def keep_for_work(tensor: torch.Tensor) -> None:
    """Let a GPU's work use a tensor made `beside` it: its memory is not taken again before that work ends."""
    if tensor.device.type == "cuda":
        tensor.record_stream(torch.cuda.current_stream(tensor.device))


@contextmanager
def searching(on: bool) -> Iterator[None]:
    """Let a GPU search its fastest kernels for new sizes in a block, as `pick_device` has it, or not."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before and on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def layout_of(network: nn.Module) -> torch.memory_format:
    """How the voxels of a network's images are to lie in memory: as the weights of its convolutions."""
    layers = (m for m in network.modules() if isinstance(m, nn.Conv3d))
    # A kernel of one voxel, or of one channel, lies both ways.
    if all(layer.weight.is_contiguous(memory_format=torch.channels_last_3d) for layer in layers):
        return torch.channels_last_3d
    return torch.contiguous_format


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


def to_device(
    network: nn.Module, device: torch.device, precision: Precision, *, trained: bool, channels_last: bool | None = None
) -> nn.Module:
    """Bring a network to a device in the layout and with the kernels that are fastest there; weights stay the same.

    Channels-last is what the CPU kernels below take (together 0.7 of the time, docs/results.md) and tensor cores want;
    but a GPU's instance normalisation copies to the other layout and back (pytorch/pytorch#59168), which may cost more.

    Args:
        trained: gradients are taken through it.
        channels_last: what a measurement says of a GPU; None: there was none, and it is taken for faster.
    """
    if device.type == "cpu" or channels_last is not False:
        network = network.to(device).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    else:
        network = network.to(device)
    if device.type == "cpu":
        take_norms(network)
        if resolve_precision(device, precision) != "fp32":
            repair_bf16(network)
        elif not trained:
            take_onednn(network)
    return network
