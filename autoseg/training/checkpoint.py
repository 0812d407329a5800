"""Weights on disk."""

from __future__ import annotations

import torch
from torch import nn

from autoseg.workspace.files import write_atomic
from autoseg.workspace.jobs import JobDir


def save_weights(network: nn.Module, paths: JobDir) -> None:
    """Write a bare state dict, as a MONAI bundle wants it."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    write_atomic(paths.model, lambda file: torch.save(weights, file))
