"""How far training is, and what it came to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


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
    best_dice: float = -1.0
    best_epoch: int = 0
    last_dice: float = math.nan
    ended: bool = False
    """Whether the schedule is through, its last validation included."""


@dataclass(kw_only=True)
class TrainResult:
    """What a job came to."""

    best_dice: float
    best_epoch: int
    epochs: int
    steps: int
    seconds: float
    curve: list[dict[str, Any]] = field(default_factory=list)
