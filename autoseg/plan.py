"""A plan: every hyperparameter of one job, as it stands in `configs/hyper_parameters.yaml`.

Complete, readable and editable: train reads it back and honours an edit. Where each value came from stands
beside it in `configs/origins.yaml`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from autoseg.config.fields import Positive, Rising, Strict
from autoseg.config.hyperparameters import PLANNED_AS, Hyperparameters, NormalizeMode, required_twin
from autoseg.config.networks import NETWORKS, AlgoName, NetworkRow
from autoseg.config.reader import read_model
from autoseg.config.types import describe_type, suggest
from autoseg.data.frame import Frame
from autoseg.data.labels import LabelMap
from autoseg.data.preprocess import ChannelNorm, Preprocessing
from autoseg.data.side_names import sided_pairs
from autoseg.errors import ConfigError
from autoseg.workspace.jobs import JobDir


def read_plan(paths: JobDir) -> Plan:
    """A job's plan, with any edit a user made.

    Raises:
        ConfigError: An edit is not valid; every fault with file and line.
    """
    return read_model(paths.plan, Plan)


WITHOUT_EFFECT = frozenset(
    ("cache", "cache_gib", "step_s", "memory_gib", "channels_last", "image_ranges", "channel_names")
)
"""Keys of a plan that change nothing about the model."""

PREDICTION = frozenset(("overlap", "tta"))
"""Keys of a plan that change how a model predicts, and nothing about its weights."""


MODEL = frozenset(
    (
        *("algo", "classes", "user_classes", "sigmoid", "ignore_label", "channels", "resample_resolution"),
        *("crop_foreground", "frame", "network", "roi_size", "mirror_axes"),
    )
)
"""Keys of a plan that trained weights belong to: with others they predict something else."""


Axis = tuple[float, float, float]


class ChannelPlan(Strict):
    """Normalisation of one image channel."""

    mode: NormalizeMode
    """ct, mri, pet, meanstd, meanstdtanh, range or none."""
    bounds: Rising | None = None
    """Clipped to these intensities (ct, range)."""
    mean: float = 0.0
    """Subtracted after clipping (ct)."""
    std: Positive = 1.0
    """Divided by after clipping (ct)."""
    nonzero: bool = False
    """Take the statistics of non-zero voxels alone."""


class ClassPlan(Strict):
    """One class and the label values that belong to it."""

    name: str
    """Shown in tables."""
    values: Annotated[tuple[int, ...], Field(min_length=1)]
    """Values in label files."""


class FramePlan(Strict):
    """Axes of the networks, where they are the data set's own and not right, front and up (RAS+)."""

    axes: tuple[Axis, Axis, Axis]
    """Directions of X, Y, Z in the RAS+ world: of length 1, at right angles."""
    slices: Annotated[int, Field(ge=0, le=2)]
    """The axis that slices are stacked along: 0 X, 1 Y, 2 Z."""

    @model_validator(mode="after")
    def _check(self) -> FramePlan:
        products = [sum(p * q for p, q in zip(a, b, strict=True)) for a in self.axes for b in self.axes]
        if any(abs(product - (place in (0, 4, 8))) > 1e-3 for place, product in enumerate(products)):
            raise ValueError("frame: axes: expected three directions of length 1 at right angles to each other.")
        return self


OLDER_PLANS: dict[str, Any] = {
    "annotators_share": 0.0,
    "optimizer": "adamw",
    "schedule": "cosine",
    "loaded_rate": 1.0,
    "frozen_fraction": 0.0,
    "class_weights": {},
    "class_sampling": {},
    "lateral_pairs": None,
    "cache": "ram",
    "cache_gib": None,
}
"""Hyperparameters that plans of the first versions lack -> how jobs were trained then."""

if TYPE_CHECKING:
    # To a type checker a plan has those of `PLANNED_AS`, too: it cannot take a field away.
    PlannedHyperparameters = Hyperparameters
else:
    PlannedHyperparameters = required_twin(
        "PlannedHyperparameters",
        Hyperparameters,
        "The hyperparameters that a plan holds as the settings do.",
        without=PLANNED_AS,
        defaults=OLDER_PLANS,
    )


OLDER_NETWORKS = frozenset(("search",))
"""Keys of a network that plans of the first versions lack."""


def _network_faults(row: NetworkRow, network: dict[str, Any]) -> list[str]:
    """What is wrong with a plan's `network`: keys that are none, that are missing, and values of another type."""
    fields = {**row.own.model_fields, **row.planned.model_fields}
    faults = [f"{key}: unknown key. {suggest(key, fields)}" for key in network if key not in fields]
    faults += [
        f"{key}: missing. Expected {describe_type(field.annotation, field.metadata)}."
        for key, field in fields.items()
        if field.is_required() and key not in network and key not in OLDER_NETWORKS
    ]
    for model in (row.own, row.planned):
        values = {key: network[key] for key in model.model_fields if key in network}
        try:
            model.model_validate_json(json.dumps(values), strict=True)  # as JSON, where a list may be a tuple
        except ValidationError as error:
            keys = dict.fromkeys(str(fault["loc"][0]) for fault in error.errors() if fault["type"] != "missing")
            for key in keys:
                expected = describe_type(fields[key].annotation, fields[key].metadata)
                found = str(values[key]) if len(str(values[key])) <= 60 else f"{str(values[key])[:57]}..."
                faults.append(f"{key}: expected {expected}, found {found}.")
    return faults


class Plan(PlannedHyperparameters):
    """Every hyperparameter of one training job: those of the settings, and what the planner alone decides."""

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
    """Normalisation of each image channel; from normalize_mode and intensity_bounds where the user set them."""
    image_ranges: tuple[tuple[float, float], ...] | None = None
    """Intensities of each channel between which the training images lie (the lowest 0.5 and the highest 99.5
    percentile of any of them); prediction warns of an image that lies outside. null: not known."""
    channel_names: tuple[str, ...] = ()
    """What the names of each channel's files end in, in lower case, such as flair of a_FLAIR.nii.gz; prediction knows
    the files of an image by them. Empty: one channel, or names that say nothing."""
    frame: FramePlan | None = None
    """Axes of the networks, which the planner takes from the data; null: right, front and up (RAS+)."""
    network: dict[str, Any]
    """The network's own settings."""
    budget_s: Positive | None
    """Seconds for the whole job, from `budget`; null: num_epochs alone decides."""
    step_s: float | None = None
    """Seconds of a training step, measured on the device that planned; null: not measured."""
    memory_gib: float | None = None
    """Predicted peak of the device's memory, by the same measurement."""
    channels_last: bool | None = None
    """Whether a step is faster where a voxel's channels lie side by side; None: not measured, and taken for granted."""
    seed: Annotated[int, Field(ge=0)]
    """Seed of the job."""

    @field_validator("network")
    @classmethod
    def _check_network(cls, network: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """Refuse an edit that takes a value from the network, or gives it one that it cannot have or does not know."""
        if (row := NETWORKS.get(info.data.get("algo", ""))) is None:
            return network  # that is a fault of its own
        if faults := _network_faults(row, network):
            raise ValueError(" ".join(faults))
        return network

    @model_validator(mode="after")
    def _check(self) -> Plan:
        for channel in self.channels:
            if channel.mode in ("ct", "range") and channel.bounds is None:
                raise ValueError(f"channels: mode {channel.mode} needs bounds: [low, high]")
        if self.channel_names and len(self.channel_names) != len(self.channels):
            raise ValueError(f"channel_names: {len(self.channel_names)} for {len(self.channels)} channels")
        if self.image_ranges is not None and len(self.image_ranges) != len(self.channels):
            raise ValueError(f"image_ranges: {len(self.image_ranges)} for {len(self.channels)} channels")
        names = [c.name for c in self.classes]
        named = {key: list(getattr(self, key)) for key in ("class_weights", "class_sampling")}
        named["lateral_pairs"] = [name for pair in self.lateral_pairs or () for name in pair]
        for key, listed in named.items():
            if unknown := [name for name in listed if name not in names]:
                raise ValueError(f"{key}: no class {unknown[0]}. {suggest(unknown[0], names)}")
        try:
            _ = self.label_map
        except ConfigError as error:
            raise ValueError(" ".join(error.messages)) from None
        return self

    def identity(self) -> dict[str, Any]:
        """Every value that decides which weights come out; where cases are kept and what was measured do not."""
        return {k: v for k, v in self.model_dump(mode="json").items() if k not in WITHOUT_EFFECT | PREDICTION}

    def prediction(self) -> dict[str, Any]:
        """Every value that decides how those weights predict, and nothing else."""
        return {k: v for k, v in self.model_dump(mode="json").items() if k in PREDICTION}

    def each_class(self, key: Literal["class_weights", "class_sampling"]) -> list[float]:
        """A weight for each class, in their order; 1 where the plan names none."""
        weights: dict[str, float] = getattr(self, key)
        return [weights.get(c.name, 1.0) for c in self.classes]

    @property
    def mirrored_classes(self) -> tuple[tuple[int, int], ...]:
        """Pairs of classes, as places in `classes`, that change places in an image mirrored along X."""
        names = [c.name for c in self.classes]
        if self.lateral_pairs is None:  # a plan of version 0.1, when names alone decided
            return tuple((pair.left, pair.right) for pair in sided_pairs(names))
        return tuple((names.index(a), names.index(b)) for a, b in self.lateral_pairs)

    @property
    def label_map(self) -> LabelMap:
        """Classes as the data code wants them."""

        def as_map(classes: tuple[ClassPlan, ...], origin: LabelMap | None = None) -> LabelMap:
            return LabelMap(
                names=tuple(c.name for c in classes),
                values=tuple(c.values for c in classes),
                sigmoid=self.sigmoid,
                ignore_label=self.ignore_label,
                origin=origin,
            )

        return as_map(self.classes, as_map(self.user_classes) if self.user_classes else None)

    @property
    def preprocessing(self) -> Preprocessing:
        """Preprocessing as the data code wants it."""
        norms = tuple(ChannelNorm(**c.model_dump()) for c in self.channels)
        return Preprocessing(
            norms=norms,
            spacing_mm=self.resample_resolution,
            crop_foreground=self.crop_foreground,
            frame=None if self.frame is None else Frame(self.frame.axes, self.frame.slices),
        )

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
