"""A job's state on disk: its checkpoint, and the weights it keeps."""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from autoseg.workspace.files import write_atomic
from autoseg.workspace.jobs import JobDir

log = logging.getLogger(__name__)

DAMAGES = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError)
"""What reading a damaged file of tensors ends in."""
CHECKPOINT_S = 60.0
"""Seconds between checkpoints, more where writing one takes over 2 % of that; every 5 minutes at the latest."""
MOST_CHECKPOINT_S, SAVING_SHARE = 300.0, 0.02


def write_tensors(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain data, atomically. Raises: OSError: It cannot be written."""
    write_atomic(path, partial(_save, content))


def _save(content: Mapping[str, Any], file: IO[bytes]) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:  # where the file refuses a write, torch says that the archive's length is wrong
        cause = error.__context__
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise (cause or error) from None


def read_state(path: Path, identity: str) -> dict[str, Any] | None:
    """The state that a training was saved in, on the CPU.

    Args:
        path: of the file.
        identity: digest of all that the state belongs to.

    Returns:
        None where there is none that can be gone on with: it is missing, damaged or of something else; the last two
        are said.
    """
    if not path.exists():
        return None
    try:
        # On the CPU, where the optimizer's counts are to stay; what is loaded goes to its parameter's device.
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if state["identity"] == identity:
            return state
    except DAMAGES as error:
        log.warning("%s: damaged (%s); begun anew", path, str(error).partition("\n")[0][:200])
        return None
    log.info("%s: of another plan or other cases; begun anew", path)
    return None


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
        write_tensors(self.paths.checkpoint, content)
        self.saved_step = step
        self._saved = time.monotonic()
        self._save_s = self._saved - begin

    def read(self) -> dict[str, Any] | None:
        """The state of the checkpoint; None where there is none to go on with."""
        return read_state(self.paths.checkpoint, self.identity)


def on_cpu(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights as they are stored."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def save_weights(network: nn.Module, paths: JobDir) -> None:
    """Write a bare state dict, as a MONAI bundle wants it."""
    write_tensors(paths.model, on_cpu(network.state_dict()))
