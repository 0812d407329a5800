"""A plan: every hyperparameter of one job, as it stands in `configs/hyper_parameters.yaml`.

Complete, readable and editable: train reads it back and honours an edit. Where each value came from stands
beside it in `configs/origins.yaml`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from autoseg.config.reader import read_model
from autoseg.config.settings import AlgoName, Positive3, Strict, Voxels3
from autoseg.config.types import suggest
from autoseg.data.labels import LabelMap
from autoseg.data.preprocess import ChannelNorm, NormalizeMode, Preprocessing
from autoseg.workspace.jobs import JobDir


def read_plan(paths: JobDir) -> Plan:
    """A job's plan, with any edit a user made.

    Raises:
        ConfigError: An edit is not valid; every fault with file and line.
    """
    return read_model(paths.plan, Plan)


WITHOUT_EFFECT = frozenset(("cache", "cache_gib", "step_s", "memory_gib"))
"""Keys of a plan that change nothing about the model."""

PREDICTION = frozenset(("overlap", "tta"))
"""Keys of a plan that change how a model predicts, and nothing about its weights."""


class ChannelPlan(Strict):
    """Normalisation of one image channel."""

    mode: NormalizeMode
    """ct, mri, pet, meanstd, meanstdtanh, range or none."""
    bounds: tuple[float, float] | None = None
    """Clipped to these intensities (ct, range)."""
    mean: float = 0.0
    """Subtracted after clipping (ct)."""
    std: Annotated[float, Field(gt=0)] = 1.0
    """Divided by after clipping (ct)."""
    nonzero: bool = False
    """Take the statistics of non-zero voxels alone."""


class ClassPlan(Strict):
    """One class and the label values that belong to it."""

    name: str
    """Shown in tables."""
    values: tuple[int, ...]
    """Values in label files."""


class Plan(Strict):
    """Every hyperparameter of one training job."""

    algo: AlgoName
    """Network."""
    fold: Annotated[int, Field(ge=0)]
    """Fold this job validates on."""

    classes: tuple[ClassPlan, ...]
    """Foreground classes in the order of the outputs."""
    user_classes: tuple[ClassPlan, ...] = ()
    """Classes as the user named them, where `classes` holds some of them merged; predictions are split back."""
    sigmoid: bool
    """Regions that may overlap."""
    ignore_label: int | None
    """Label value left out of loss and metrics."""

    channels: tuple[ChannelPlan, ...]
    """Normalisation of each image channel."""
    resample_resolution: Positive3
    """Voxel size in mm the network works at."""
    crop_foreground: bool
    """Crop away zero borders first."""

    network: dict[str, Any]
    """The network's own settings."""

    roi_size: Voxels3
    """Patch in voxels."""
    batch_size: Annotated[int, Field(ge=1)]
    """Patches per step, over all devices."""
    foreground_fraction: Annotated[float, Field(ge=0, le=1)]
    """Share of patches centred on a class drawn at random."""
    annotators_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of a class' patches cut from cases whose annotators drew it, where models filled it in for others."""
    mirror_axes: tuple[Literal[0, 1, 2], ...]
    """Axes mirrored at random."""
    augment: Literal["default", "light", "axial", "none"]
    """Random changes of patches."""

    num_epochs: Annotated[int, Field(ge=1)]
    """Epochs; with a budget, the most."""
    num_steps_per_epoch: Annotated[int, Field(ge=1)]
    """Optimizer steps an epoch."""
    budget_s: Annotated[float, Field(gt=0)] | None
    """Seconds for the whole job; null: num_epochs alone decides."""
    num_epochs_per_validation: Annotated[int, Field(ge=1)]
    """Epochs between validations."""
    optimizer: Literal["muon", "adamw", "adam", "novograd", "sgd"] = "adamw"
    """What turns gradients into steps."""
    schedule: Literal["cosine", "poly", "constant"] = "cosine"
    """Way of the learning rate after warm-up."""
    learning_rate: Annotated[float, Field(gt=0)]
    """Highest learning rate."""
    weight_decay: Annotated[float, Field(ge=0)]
    """The optimizer's weight decay."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)]
    """Share of the schedule for warm-up."""
    grad_clip: Annotated[float, Field(gt=0)]
    """Largest norm of the gradient."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)]
    """Moving average of the weights."""
    loss: Literal["dice_ce", "dice_focal"]
    """Loss of each output resolution."""
    class_weights: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Weight of a class in the loss; 1 where it is not named."""
    class_sampling: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """How often patches are centred on a class; 1 where it is not named."""

    overlap: Annotated[float, Field(ge=0, lt=1)]
    """Overlap of windows in inference."""
    tta: bool
    """Average over mirrored images in inference."""
    precision: Literal["auto", "bf16", "fp16", "fp32"]
    """Arithmetic."""
    cache: Literal["ram", "disk", "off"] = "ram"
    """Where preprocessed cases are kept."""
    cache_gib: Annotated[float, Field(ge=0)] | None = None
    """Most that is kept there; null: as free memory or disk allows."""
    step_s: float | None = None
    """Seconds of a training step, measured on the device that planned; null: not measured."""
    memory_gib: float | None = None
    """Predicted peak of the device's memory, by the same measurement."""
    seed: Annotated[int, Field(ge=0)]
    """Seed of the job."""

    @model_validator(mode="after")
    def _check(self) -> Plan:
        for channel in self.channels:
            if channel.mode in ("ct", "range") and channel.bounds is None:
                raise ValueError(f"channels: mode {channel.mode} needs bounds: [low, high]")
        names = [c.name for c in self.classes]
        for key in ("class_weights", "class_sampling"):
            if unknown := [name for name in getattr(self, key) if name not in names]:
                raise ValueError(f"{key}: no class {unknown[0]}. {suggest(unknown[0], names)}")
        return self

    def identity(self) -> dict[str, Any]:
        """Every value that decides which weights come out; where cases are kept and what was measured do not."""
        return {k: v for k, v in self.model_dump(mode="json").items() if k not in WITHOUT_EFFECT | PREDICTION}

    def prediction(self) -> dict[str, Any]:
        """Every value that decides how those weights predict, and nothing else."""
        return {k: v for k, v in self.model_dump(mode="json").items() if k in PREDICTION}

    def each_class(self, key: Literal["class_weights", "class_sampling"]) -> list[float]:
        """A weight for each class, in their order; 1 where none is given."""
        given: dict[str, float] = getattr(self, key)
        return [given.get(c.name, 1.0) for c in self.classes]

    @property
    def label_map(self) -> LabelMap:
        """Classes as the data code wants them."""

        def made(classes: tuple[ClassPlan, ...], origin: LabelMap | None = None) -> LabelMap:
            return LabelMap(
                names=tuple(c.name for c in classes),
                values=tuple(c.values for c in classes),
                sigmoid=self.sigmoid,
                ignore_label=self.ignore_label,
                origin=origin,
            )

        return made(self.classes, made(self.user_classes) if self.user_classes else None)

    @property
    def preprocessing(self) -> Preprocessing:
        """Preprocessing as the data code wants it."""
        norms = tuple(ChannelNorm(**c.model_dump()) for c in self.channels)
        return Preprocessing(norms=norms, spacing_mm=self.resample_resolution, crop_foreground=self.crop_foreground)

    @property
    def num_outputs(self) -> int:
        """Channels of the network's output."""
        return self.label_map.num_outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a value came from."""

    value: Any
    origin: str
    """planner, template, recipe NAME, search, or a place in the user's input."""
    rule: str = ""
