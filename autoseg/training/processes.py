"""The processes that train one job together, and what the first of them decides for all."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

# Holds on to the group that is there when it is imported, as it would be in training: the group's threads would outlive
# Python, and one that frees a tensor then aborts the process (PyTorch 2.13 with gloo).
import torch.distributed.nn
from torch import nn

from autoseg.hardware.device import pick_device

Shared = TypeVar("Shared")
BUCKET_VALUES = 1 << 24
"""Values of gradients that go to the other processes together: 64 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Processes:
    """This process among those of its job."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def joined(cls, device: torch.device) -> Processes:
        """Those that `join_processes` joined; this one alone where it was not called."""
        if not dist.is_initialized():
            return cls(rank=0, world=1, device=device)
        return cls(rank=dist.get_rank(), world=dist.get_world_size(), device=device)

    @property
    def is_first(self) -> bool:
        """Whether this one writes the files."""
        return self.rank == 0

    @property
    def are_several(self) -> bool:
        """Whether there are others."""
        return self.world > 1

    def from_first(self, *values: float) -> tuple[float, ...]:
        """The first process' numbers, for all: one clock and one signal decide, so that none waits for another."""
        if not self.are_several:
            return values
        shared = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(shared, 0)
        return tuple(shared.tolist())

    def any(self, is_so: bool) -> bool:
        """Whether something is so in any process; all get the same answer."""
        if not self.are_several:
            return is_so
        seen = torch.tensor(float(is_so))
        dist.all_reduce(seen, dist.ReduceOp.MAX)
        return bool(seen > 0)

    def share(self, network: nn.Module) -> None:
        """Give all processes the weights and buffers of the first."""
        if self.are_several:
            for tensor in (*network.parameters(), *network.buffers()):
                row = tensor.detach().contiguous()  # as the others have it, whatever the layout
                dist.broadcast(row, 0)
                tensor.detach().copy_(row)

    def average_gradients(self, network: nn.Module) -> None:
        """Give all processes the mean of their gradients; what a network has no use for has none in any of them.

        Apart from the backward pass, as `DistributedDataParallel` is not: there a process that runs out of memory
        leaves the others waiting for its gradients, and a parameter without one ends the training.
        """
        if not self.are_several:
            return
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        while gradients:
            bucket = [gradients.pop()]
            size = bucket[0].numel()
            while gradients and gradients[-1].dtype == bucket[0].dtype and size < BUCKET_VALUES:
                bucket.append(gradients.pop())
                size += bucket[-1].numel()
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat)
            flat /= self.world
            for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view(gradient.shape))

    def add_up(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of all processes' values, where they are; one process' own are returned as they are."""
        if not self.are_several:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total


def of_first(value: Shared) -> Shared:
    """The first process' value, whatever it is, for all processes of a job."""
    if not dist.is_initialized():
        return value
    shared = [value]
    dist.broadcast_object_list(shared, 0)
    return shared[0]


def join_processes(device: str) -> None:
    """Join the other processes of torchrun, where this is one of several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        where = pick_device(device)
        if where.type == "cuda":
            torch.cuda.set_device(where)
        # What processes agree on, such as whether to stop, stays on the CPU: a GPU would have to be waited for.
        backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
        # The others wait for the first while it searches a topology, however long; torchrun ends them if it dies.
        dist.init_process_group(backend, timeout=timedelta(days=7))
