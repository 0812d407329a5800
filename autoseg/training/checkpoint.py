"""A job's state on disk: its checkpoint, and the weights it keeps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from autoseg.workspace.files import write_atomic
from autoseg.workspace.jobs import JobDir

CHECKPOINT_S = 60.0
"""Seconds between checkpoints, more where writing one takes over 2 % of that; every 5 minutes at the latest."""
MOST_CHECKPOINT_S, SAVING_SHARE = 300.0, 0.02


class Checkpointer:
    """Writes a job's checkpoint as often as it is worth the time, and reads it again."""

    def __init__(self, paths: JobDir, identity: str, before_write: Callable[[], None] = lambda: None) -> None:
        """Set up.

        Args:
            identity: digest of all that the state belongs to; a checkpoint of another one is not read.
            before_write: called before the file is written; raises where this process may not any more.
        """
        self.paths, self.identity, self.before_write = paths, identity, before_write
        self.saved_step = -1
        """Step of the checkpoint that this process wrote last; -1: none yet."""
        self._saved, self._save_s = time.monotonic(), 0.0

    def is_due(self) -> bool:
        """Whether the last one is so old that work would be lost."""
        wait_s = max(CHECKPOINT_S, self._save_s / SAVING_SHARE)
        return time.monotonic() - self._saved > min(MOST_CHECKPOINT_S, wait_s)

    def is_cheap_after(self, work_s: float) -> bool:
        """Whether writing one takes a small share of the seconds of work it would keep."""
        return self._save_s < SAVING_SHARE * work_s

    def write(self, state: Callable[[], Mapping[str, Any]], step: int) -> None:
        """Write a checkpoint; what its state takes to be made counts as time of writing."""
        begin = time.monotonic()
        content = {"identity": self.identity, **state()}
        self.before_write()
        write_atomic(self.paths.checkpoint, lambda file: torch.save(content, file))
        self.saved_step = step
        self._saved = time.monotonic()
        self._save_s = self._saved - begin

    def read(self) -> dict[str, Any] | None:
        """The state of the checkpoint; None where there is none, and {} where it belongs to another plan or cases."""
        if not self.paths.checkpoint.exists():
            return None
        # On the CPU, where the optimizer's counts are to stay; what is loaded goes to its parameter's device.
        state: dict[str, Any] = torch.load(self.paths.checkpoint, map_location="cpu", weights_only=True)
        return state if state["identity"] == self.identity else {}


def save_weights(network: nn.Module, paths: JobDir) -> None:
    """Write a bare state dict, as a MONAI bundle wants it."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    write_atomic(paths.model, lambda file: torch.save(weights, file))
