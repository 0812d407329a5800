"""A prediction for which memory did not suffice, made once more with less."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch

from autoseg.errors import ResourceError
from autoseg.hardware.memory import give_back, is_out_of_memory
from autoseg.inference.clock import Clock
from autoseg.inference.options import Options

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Predicting(Protocol):
    """What of a `Predictor` is changed."""

    device: torch.device
    options: Options
    clock: Clock


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shortage:
    """Memory ran out; the error itself, whose traceback holds the tensors of the pass, is gone."""

    said: str


def within_memory(predictors: Iterable[Predicting], name: object, work: Callable[[], Result]) -> Result:
    """Predict; where a GPU's memory runs out, once more with what takes the least of it and gives the same labels.

    One window is then passed at a time, and windows are added up on the CPU.

    Args:
        predictors: that the work is done with; looked at when memory has run out.
        name: of the image.
        work: what is done. It leaves nothing behind where it fails.

    Raises:
        ResourceError: Memory does not suffice for that, either, or it is a CPU's.
    """
    done = _tried(work)
    if not isinstance(done, _Shortage):
        return done
    # The error is let go by now: its traceback held the tensors of the pass that failed.
    give_back()
    changed = [(each, each.options) for each in predictors if each.device.type != "cpu"]
    if not changed:
        raise ResourceError(
            f"{name}: memory did not suffice ({done.said}). End other programs, give --max_ram, which makes do with "
            "less, or take models of smaller patches."
        )
    log.warning("%s: the GPU's memory did not suffice; once more, with windows added up on the CPU", name)
    for each, options in changed:
        each.options = replace(options, on_device=False, window_batch=1)
        each.clock.forget_windows()
    try:
        done = _tried(work)
    finally:
        for each, options in changed:
            each.options = options
    if not isinstance(done, _Shortage):
        return done
    give_back()
    raise ResourceError(
        f"{name}: the GPU's memory does not suffice for one window at a time ({done.said}). End what else runs on it, "
        "give --device cpu, or take models of smaller patches."
    )


def _tried(work: Callable[[], Result]) -> Result | _Shortage:
    """What the work returns, or that memory ran out; any other error passes through."""
    try:
        return work()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return _Shortage(said=lines[0].rstrip(".")[:200])
