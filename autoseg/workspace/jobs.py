"""A training job's folder and state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, JsonValue, TypeAdapter, field_validator
from typing_extensions import TypedDict

from autoseg.workspace.stored import Moment, Score, Seconds, Stored, read_stored

JobState = Literal["pending", "running", "done", "failed", "diverged", "pruned"]


class Restart(TypedDict, total=False):
    """What differs from the plan in a second try."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    learning_rate: float
    precision: str
    budget_s: float


class Job(Stored):
    """What is known of one training job; stored as job.json."""

    model_config = ConfigDict(frozen=False)
    advice: ClassVar[str] = "Undo the edit, or delete the file: the job is then trained again."

    algo: str
    fold: int
    state: JobState = "pending"
    inputs: dict[str, str] = Field(default_factory=dict)
    """What it was made from: name -> digest; a difference makes it stale."""
    learned_from: tuple[str, ...] = ()
    """Digests of the images that it learned from with labels, and of all that the weights learned from that it started
    from. Empty in jobs that were trained before it was noted."""
    images_seen: tuple[str, ...] = ()
    """Digests of the images that these weights learned from without labels."""
    error: str = ""
    warnings: tuple[str, ...] = ()
    """What a person should look at, though the job runs."""
    dice: float | None = None
    """Mean foreground Dice on the fold's validation cases, original grid."""
    started: Moment | None = None
    seconds: Seconds = 0.0
    starts: int = 0
    """Starts since an epoch was last ended: more than a few mean that it kills its process."""
    can_retry: bool = True
    """False where it would fail again until the user changes something."""
    memory_gib: float | None = None
    """Most memory it took: of the GPU, or of the process on a CPU."""
    inference_s: float | None = None
    """Seconds to predict a validation case, mean."""
    restart: dict[str, Any] = Field(default_factory=dict)
    """What differs from the plan since the job diverged and was started once more."""

    @field_validator("restart")
    @classmethod
    def _is_restart(cls, value: dict[str, Any]) -> dict[str, Any]:
        return dict(TypeAdapter(Restart).validate_python(value))

    @property
    def name(self) -> str:
        """Name of the job and of its folder."""
        return f"{self.algo}_{self.fold}"


class StoredOrigin(Stored):
    """Where a value of a plan came from: an entry of origins.yaml."""

    value: JsonValue = None
    """As it was derived, before any edit of the plan."""
    origin: str
    """planner, template, recipe NAME, search, or a place in the user's input."""
    rule: str | None = ""
    """How it was derived, with the numbers that went in."""


class EpochLine(Stored):
    """One line of metrics.jsonl: an epoch of a job."""

    epoch: int = Field(ge=0, le=10**9)
    num_epochs: int | None = Field(default=None, ge=0, le=10**9)
    step: int | None = None
    train_loss: float
    val_dice: Score = None
    """None: no validation in this epoch."""
    val_class: dict[str, Score] = Field(default_factory=dict)
    """The same by class, where there was one."""
    best_dice: Score = None
    lr: float | None = None
    progress: float | None = None
    """Share of the schedule that is done."""
    seconds: Seconds = 0.0
    samples_per_s: float | None = None
    time_left_s: Seconds | None = None


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
    def packed_model(self) -> Path:
        """The same in a packed model, in a format that can hold nothing but tensors."""
        return self.root / "models" / "model.safetensors"

    @property
    def weights(self) -> Path | None:
        """The file of the best weights, in a work_dir or a packed model; None: there is none yet."""
        return next((path for path in (self.model, self.packed_model) if path.exists()), None)

    @property
    def checkpoint(self) -> Path:
        """All that is needed to go on with training."""
        return self.root / "models" / "checkpoint.pt"

    @property
    def metrics(self) -> Path:
        """One JSON object an epoch."""
        return self.root / "metrics.jsonl"

    @property
    def tracking(self) -> Path:
        """The name under which a tracker knows its training; see `autoseg.tracking`."""
        return self.root / "tracking.json"

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
    def seal(self) -> Path:
        """What weights and plan were when training ended; see `autoseg.workspace.seals`."""
        return self.root / "seal.json"

    @property
    def init_weights(self) -> Path:
        """The account of the weights it starts from, where they are not random; see `autoseg.weights.tables`."""
        return self.root / "init_weights.json"

    @property
    def lesson(self) -> Path:
        """Of a job of pretraining: what it learns, and from which images; see `autoseg.workspace.pretraining`."""
        return self.root / "lesson.json"

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


def read_origins(paths: JobDir) -> dict[str, StoredOrigin]:
    """Where each value of a job's plan came from, by key, dotted inside a block.

    Raises:
        WorkspaceError: The file is missing or damaged.
    """
    remedy = "Undo the edit, or delete the job's folder and run `autoseg generate` again."
    return read_stored(paths.origins, dict[str, StoredOrigin], remedy=remedy)
