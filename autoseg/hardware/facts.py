"""What the planner may know of the machine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from autoseg.errors import ResourceError
from autoseg.hardware.gpus import Gpu, list_gpus
from autoseg.hardware.limits import available_cores, memory_limit_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """The device jobs run on."""

    on_gpu: bool
    num_gpus: int
    memory_gib: float
    """Memory of one GPU, or what a process may use on a CPU."""
    num_cores: int
    name: str


@cache
def _gpus() -> list[Gpu]:
    """Looked up once: what the planner asks of them does not change."""
    return list_gpus()


def find_hardware(device: torch.device) -> Hardware:
    """Describe the device; this process takes none of a GPU's memory for it.

    Raises:
        ResourceError: A GPU cannot be asked.
    """
    if device.type == "cuda":
        gpus = _gpus()
        if not gpus:
            raise ResourceError("device: torch finds a GPU, but another process does not. Check the driver.")
        gpu = gpus[min(device.index or 0, len(gpus) - 1)]
        cores = available_cores()
        return Hardware(on_gpu=True, num_gpus=len(gpus), memory_gib=gpu.total_gib, num_cores=cores, name=gpu.name)
    cores = available_cores()
    return Hardware(
        on_gpu=False, num_gpus=0, memory_gib=memory_limit_bytes() / 2**30, num_cores=cores, name=f"CPU, {cores} cores"
    )
