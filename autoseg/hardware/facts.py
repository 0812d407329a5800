"""What the planner may know of the machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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


def find_hardware(device: torch.device) -> Hardware:
    """Describe the device."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return Hardware(
            on_gpu=True,
            num_gpus=torch.cuda.device_count(),
            memory_gib=properties.total_memory / 2**30,
            num_cores=available_cores(),
            name=properties.name,
        )
    cores = available_cores()
    return Hardware(
        on_gpu=False, num_gpus=0, memory_gib=memory_limit_bytes() / 2**30, num_cores=cores, name=f"CPU, {cores} cores"
    )
