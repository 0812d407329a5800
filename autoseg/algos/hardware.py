"""What the planner may know of the machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """The device jobs run on."""

    on_gpu: bool
    num_gpus: int
    memory_gib: float
    """Memory of one GPU, or what a process may use on a CPU."""
    num_cores: int
    name: str


def available_cores() -> int:
    """Cores this process may use: affinity counts, not what the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_limit_bytes() -> int:
    """Memory of the machine or of the container, whichever is smaller."""
    total = int(psutil.virtual_memory().total)
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total


def available_memory_bytes() -> int:
    """Memory a process may still take: what the machine has free, or what its container leaves, whichever is less."""
    free = int(psutil.virtual_memory().available)
    pairs = (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    )
    for limit_path, used_path in pairs:
        try:
            limit, used = Path(limit_path).read_text().strip(), Path(used_path).read_text().strip()
        except OSError:
            continue
        if limit.isdigit() and used.isdigit():
            free = min(free, max(0, int(limit) - int(used)))
    return free


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
