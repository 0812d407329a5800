"""What every tracker does, and what it is told: one file a tracker, listed in table.py."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from autoseg.config.passwords import without_passwords

Ending = Literal["finished", "failed", "stopped"]
"""How a run ended; what was stopped goes on later."""
LONGEST_PARAM = 500
"""Characters of a parameter that are shown. The oldest servers of MLflow take no more."""


class TrackingError(Exception):
    """A tracker could not be opened or told something."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """One run of a tracker: a training job, or the run of autoseg that its jobs belong to."""

    id: str
    """Letters and digits, never given twice: a training that is begun anew is another run."""
    name: str
    """As people see it: `segresnet_0`, `round_2/segresnet_0`, `sweep/trial_0003/segresnet_0`, or that of the whole."""
    experiment: str
    """What it is filed under."""
    parent: str = ""
    """`id` of the run that it belongs to; empty: none, or not known."""
    folder: Path
    """`tracking/` in the work_dir, where what needs no server lies."""
    uri: str | None = None
    """The store, with environment variables in the place of passwords; None: in `folder`."""
    params: Mapping[str, str]
    """What it is made from, as text."""


@dataclass(frozen=True, slots=True)
class Epoch:
    """The metrics of one epoch."""

    number: int
    """From 1."""
    metrics: Mapping[str, float]
    """Name -> value."""


class Tracker(Protocol):
    """One run, open. Every method raises `TrackingError` where it cannot do its work."""

    def begin(self, epochs: Sequence[Epoch]) -> None:
        """Make the run hold these epochs, each once, whatever an earlier process of the same run left there."""

    def log(self, epoch: Epoch) -> None:
        """Add an epoch, or further metrics of the one that was added last. A kill costs the last epoch at most."""

    def summarise(self, values: Mapping[str, float]) -> None:
        """Note numbers of the run as a whole; later ones replace earlier ones of the same name."""

    def attach(self, file: Path) -> None:
        """Add a file to the run."""

    def close(self, ending: Ending) -> None:
        """End the work on the run."""


@contextmanager
def faults_of(*kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of a tracker's library, and of the file system, into a `TrackingError` without passwords."""
    expected: tuple[type[Exception], ...] = (*kinds, OSError)
    try:
        yield
    except expected as error:
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise TrackingError(without_passwords(reason)) from error


# -- what is told
def metrics_of(line: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a line of metrics.jsonl, of training or of pretraining.

    Source: Auto3DSeg's names in TensorBoard: train/loss, val/acc (mean Dice), val_class/<name>.
    """
    values = {
        "train/loss": line.get("train_loss"),
        "train/learning_rate": line.get("lr"),
        "val/acc": line.get("val_dice"),
        "val/l1": line.get("val_l1"),
    }
    values |= by_class("val_class", line.get("val_class") or {})
    return {name: float(value) for name, value in values.items() if value is not None}


def by_class(group: str, values: Mapping[str, float | None]) -> dict[str, float]:
    """Values of classes under names that each tracker takes: letters, digits, blanks, _ and - of the class's name.

    MLflow takes no others, and no name that is not a plain path. Two classes that would share a name get a number.
    """
    named: dict[str, float] = {}
    taken: set[str] = set()
    for class_name, value in values.items():
        plain = re.sub(r"[^\w\- ]", "_", class_name)[:200].strip() or "_"
        name, number = plain, 1
        while name in taken:
            number += 1
            name = f"{plain}_{number}"
        taken.add(name)
        if value is not None:
            named[f"{group}/{name}"] = value
    return named


def params_of(data: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Plain data as parameters: keys dotted, values as short text; what is None or empty is left out."""
    params: dict[str, str] = {}
    for key, value in data.items():
        if isinstance(value, Mapping) and all(re.fullmatch(r"\w+", str(inner)) for inner in value):
            params |= params_of(value, f"{prefix}{key}.")
        elif value is not None and value not in ("", [], ()):
            text = str(value)
            params[f"{prefix}{key}"] = text if len(text) <= LONGEST_PARAM else text[: LONGEST_PARAM - 3] + "..."
    return params
