"""A training job's folder and state."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

JobState = Literal["pending", "running", "done", "failed", "diverged", "pruned"]


@dataclass(kw_only=True)
class Job:
    """What is known of one training job; stored as job.json."""

    algo: str
    fold: int
    state: JobState = "pending"
    inputs: dict[str, str] = field(default_factory=dict)
    """What it was made from: name -> digest; a difference makes it stale."""
    error: str = ""
    dice: float | None = None
    """Mean foreground Dice on the fold's validation cases, original grid."""
    started: float | None = None
    seconds: float = 0.0
    starts: int = 0
    """Starts since an epoch was last ended: more than a few mean that it kills its process."""
    can_retry: bool = True
    """False where it would fail again until the user changes something."""
    memory_gib: float | None = None
    """Most memory it took: of the GPU, or of the process on a CPU."""
    inference_s: float | None = None
    """Seconds to predict a validation case, mean."""
    restart: dict[str, Any] = field(default_factory=dict)
    """What differs from the plan since the job diverged and was started once more."""

    @property
    def name(self) -> str:
        """Name of the job and of its folder."""
        return f"{self.algo}_{self.fold}"


@dataclass(frozen=True)
class JobDir:
    """Paths of one job, a MONAI bundle."""

    root: Path

    @property
    def plan(self) -> Path:
        """Every hyperparameter of the job, editable."""
        return self.root / "configs" / "hyper_parameters.yaml"

    @property
    def origins(self) -> Path:
        """Where each hyperparameter came from, and the value that was derived."""
        return self.root / "configs" / "origins.yaml"

    @property
    def model(self) -> Path:
        """Best weights, a bare state dict."""
        return self.root / "models" / "model.pt"

    @property
    def checkpoint(self) -> Path:
        """All that is needed to go on with training."""
        return self.root / "models" / "checkpoint.pt"

    @property
    def metrics(self) -> Path:
        """One JSON object an epoch."""
        return self.root / "metrics.jsonl"

    @property
    def validation(self) -> Path:
        """Per-case, per-class scores of the best model on its fold."""
        return self.root / "validation.json"

    @property
    def predicted(self) -> Path:
        """Its labels for its fold's held-out cases."""
        return self.root / "validation"

    @property
    def held_out(self) -> Path:
        """What the ensemble needs to know of these predictions besides; made anew with the model."""
        return self.root / "held_out"

    @property
    def log(self) -> Path:
        """The job's log."""
        return self.root / "train.log"

    @property
    def job(self) -> Path:
        """The job's state."""
        return self.root / "job.json"

    @property
    def claims(self) -> Path:
        """Who works on it; see `autoseg.workspace.claims`."""
        return self.root / ".claims"
