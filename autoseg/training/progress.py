"""How far training is, and what it came to."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoseg.tracking.follow import Follower
from autoseg.workspace.files import append_text, write_text
from autoseg.workspace.jobs import EpochLine
from autoseg.workspace.stored import Stored, read_stored_lines


@dataclass(kw_only=True)
class Progress:
    """The counters of a job; stored in its checkpoint."""

    step: int = 0
    epoch: int = 0
    epoch_loss: float = 0.0
    epoch_steps: int = 0
    epoch_s: float = 0.0
    elapsed_s: float = 0.0
    begun_s: float = 0.0
    """Of those, seconds before the first step."""
    voxel_s: float = 0.0
    """Seconds to predict and score a voxel in validation, as last measured; 0: not yet."""
    first_voxel_s: float = 0.0
    """The first such measurement."""
    scoring_voxel_s: float = 0.0
    """Seconds a voxel of the final scores, measured with it: files are read and written, labels brought back."""
    num_validated: int = 0
    """Cases each validation looks at; 0: all."""
    validations: int = 0
    """Marks of the budget's validation plan that have passed."""
    validated_step: int = 0
    best_score: float = -math.inf
    """Highest of the validations; -inf: none yet."""
    best_epoch: int = 0
    last_score: float = math.nan
    ended: bool = False
    """Whether the schedule is through, its last validation included."""

    def take(self, state: Mapping[str, Any]) -> None:
        """Become what a checkpoint holds."""
        for name, value in vars(Progress(**state)).items():
            setattr(self, name, value)


@dataclass(kw_only=True)
class TrainResult:
    """What a job came to."""

    best_score: float
    best_epoch: int
    epochs: int
    steps: int
    seconds: float
    curve: list[dict[str, Any]] = field(default_factory=list)


class Curve:
    """A job's metrics.jsonl: one line an epoch."""

    def __init__(
        self, path: Path, kind: type[Stored] = EpochLine, *, is_written: bool, follower: Follower | None = None
    ) -> None:
        """Give the type of its lines; say whether this process writes the file, and who is told what it holds."""
        self.path, self.kind, self.is_written = path, kind, is_written
        self.follower = follower if is_written else None
        self.lines: list[dict[str, Any]] = []

    def start(self) -> None:
        """Begin the file."""
        self._write([])
        if self.follower is not None:
            self.follower.begin([], anew=True)

    def go_on_after(self, epoch: int) -> None:
        """Begin it with those of its lines that a checkpoint of this epoch knows of."""
        lines = read_stored_lines(self.path, self.kind)[:epoch]
        self._write([line.model_dump(mode="json", exclude_unset=True) for line in lines])
        if self.follower is not None:
            self.follower.begin(self.lines, anew=False)

    def _write(self, lines: list[dict[str, Any]]) -> None:
        self.lines = lines
        if self.is_written:
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def add(self, line: dict[str, Any]) -> None:
        """Add an epoch's line."""
        self.lines.append(line)
        if self.is_written:
            append_text(self.path, json.dumps(line) + "\n")
        if self.follower is not None:
            self.follower.add(line)

    def change_last(self, scores: Mapping[str, Any]) -> None:
        """Give the last line other scores, where it was validated once more."""
        if self.lines:
            self._write([*self.lines[:-1], {**self.lines[-1], **scores}])
            if self.follower is not None:
                self.follower.change_last(self.lines[-1])
