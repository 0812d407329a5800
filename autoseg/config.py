"""Every user setting, typed and documented, and the one strict YAML reader.

Precedence: defaults < planner < input.yaml < command line < sweep trial. A setting that is None is left to
the planner. Hyperparameters may stand at the top level, for all algorithms, or under an algorithm's name.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from autoseg.annotations import describe_type, suggest
from autoseg.errors import ConfigError
from autoseg.reader import Origins, read_model, read_plain, read_value, read_with_origins, walk_fields

__all__ = [
    "Origins",
    "Settings",
    "Strict",
    "load_settings",
    "parse_duration",
    "read_model",
    "read_value",
    "setting_docs",
]

logger = logging.getLogger(__name__)

EnsembleAlgo = Literal["segresnet", "swinunetr", "dints", "unet"]
AlgoName = Literal["segresnet", "swinunetr", "dints", "unet", "locator"]
ALGOS: tuple[AlgoName, ...] = ("segresnet", "swinunetr", "dints", "unet")
"""All networks that an ensemble may have."""
DEFAULT_ALGOS: tuple[EnsembleAlgo, ...] = ("segresnet", "swinunetr", "dints")
"""Those that a run trains where `algos` does not say."""
RecipeName = Literal["default", "flare23", "spleen", "btcv"]
RECIPE_ALGO: dict[RecipeName, AlgoName] = {"flare23": "segresnet", "spleen": "unet", "btcv": "swinunetr"}
"""The network that each published recipe trained."""
LOCATOR: AlgoName = "locator"
"""The network that finds the region to look at; trained by the same engine, but no part of an ensemble."""
NOT_FOR_LOCATOR = frozenset(
    ("resample_resolution", "roi_size", "crop_foreground", "overlap", "tta", "class_weights", "class_sampling")
)
"""Hyperparameters that the top level sets for the networks of the ensemble alone: the locator looks coarsely."""
Positive3 = tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]
Voxels3 = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]


FoldIndex = Annotated[int, Field(ge=0)]
Depth = Annotated[int, Field(ge=1)]

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(text: str) -> float:
    """Turn a duration such as 90s, 10m, 1.5h, 1h30m or 1d into seconds, > 0.

    Raises:
        ConfigError: It is none; the message does not name the setting.
    """
    parts = re.findall(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([smhd])", text)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if not re.fullmatch(r"(\s*[0-9]{1,9}(\.[0-9]{1,9})?\s*[smhd])+\s*", text) or seconds <= 0:
        raise ConfigError(
            f"expected a time with its unit, such as 90s, 10m, 2h, 1h30m or 1d, found {text or 'nothing'}."
        )
    return seconds


def format_duration(seconds: float) -> str:
    """A time as people say it: 45s, 12m05s, 3h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


_SIZES = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str) -> int:
    """Turn an amount of memory such as 500MB, 4GB or 3.5GiB into bytes, > 0.

    Raises:
        ConfigError: It is none; the message does not name the setting.
    """
    match = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([KMGT]i?B)\s*", text, re.IGNORECASE)
    size = float(match[1]) * _SIZES[match[2].upper()] if match else 0.0
    if size < 1:
        raise ConfigError(
            f"expected an amount of memory with its unit, such as 500MB, 4GB or 3.5GiB, found {text or 'nothing'}."
        )
    return int(size)


def _check_size(text: str) -> str:
    try:
        parse_size(text)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return text


def _check_duration(text: str) -> str:
    try:
        parse_duration(text)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return text


def _check_unique(values: tuple[Any, ...]) -> tuple[Any, ...]:
    twice = sorted({str(v) for v in values if values.count(v) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} is given more than once. Give each value once.")
    return values


def _check_rising(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] >= bounds[1]:
        raise ValueError(f"expected the lower bound first, then a higher one, found [{bounds[0]}, {bounds[1]}].")
    return bounds


class Strict(BaseModel):
    """Base of everything read from a user's YAML: no unknown keys, no changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class HyperSettings(Strict):
    """Hyperparameters a user may fix; None leaves them to the planner."""

    resample_resolution: Positive3 | None = None
    """Voxel size in mm along X, Y, Z (RAS) that images are resampled to."""
    roi_size: Voxels3 | None = None
    """Patch in voxels along X, Y, Z after resampling; rounded up, with a warning, to what the network can halve."""
    batch_size: Annotated[int, Field(ge=1)] | None = None
    """Patches per step, over all devices together."""
    num_epochs: Annotated[int, Field(ge=1)] | None = None
    """Passes over the training folds. With `budget`, the most that are made."""
    num_steps_per_epoch: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps an epoch; the planner takes enough to see every training case once."""
    num_epochs_per_validation: Annotated[int, Field(ge=1)] | None = None
    """Epochs between two validations."""
    budget: Annotated[str, AfterValidator(_check_duration)] | None = None
    """Time for training, such as 10m, 2h or 1d: for each job where set under an algorithm or given to `train`;
    for the whole run, shared out over its jobs, at the top level."""
    optimizer: Literal["muon", "adamw", "adam", "novograd", "sgd"] | None = None
    """What turns gradients into steps. muon: steps of equal length in all directions of a weight matrix; sgd has
    Nesterov momentum 0.99, as nnU-Net's."""
    schedule: Literal["cosine", "poly", "constant"] | None = None
    """Way of the learning rate after warm-up: along a cosine or a polynomial to zero, or constant."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Highest learning rate, after warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """The optimizer's weight decay."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the schedule in which the learning rate rises from a tenth."""
    grad_clip: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the gradient."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Decay of the moving average of the weights that is validated and kept; 0 turns it off."""
    loss: Literal["dice_ce", "dice_focal"] | None = None
    """Dice with cross-entropy or with focal loss."""
    class_weights: dict[str, Annotated[float, Field(gt=0)]] | None = None
    """Weight of a class in the loss, such as {tumor: 10}; the others and the background have 1."""
    class_sampling: dict[str, Annotated[float, Field(ge=0)]] | None = None
    """How often patches are centred on a class, such as {tumor: 3}; the others have 1."""
    normalize_mode: Literal["ct", "mri", "pet", "meanstd", "meanstdtanh", "range", "none"] | None = None
    """How intensities are normalised; from `modality` where not set."""
    intensity_bounds: Annotated[tuple[float, float], AfterValidator(_check_rising)] | None = None
    """Lower and upper intensity for normalize_mode ct or range."""
    crop_foreground: bool | None = None
    """Crop away zero borders before resampling."""
    foreground_fraction: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of patches centred on a voxel of a class drawn at random; the rest lie anywhere."""
    annotators_share: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of a class' patches cut from cases whose annotators drew it, where models filled it in for others."""
    mirror_axes: Annotated[tuple[Literal[0, 1, 2], ...], AfterValidator(_check_unique)] | None = None
    """Axes (0 X, 1 Y, 2 Z) along which patches are mirrored at random; left/right classes are swapped on X."""
    augment: Literal["default", "light", "axial", "none"] | None = None
    """Random changes of the training patches; light: mirroring, brightness and contrast alone; axial: mirroring,
    contrast, histogram shift, and turning and scaling in the axial plane, as the FLARE23 paper."""
    tta: bool | None = None
    """Average the prediction over mirrored images at test time, along mirror_axes."""
    overlap: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Overlap of neighbouring windows in inference, as a share of the patch."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] | None = None
    """Arithmetic of the network; auto: bf16 where the hardware has it, else fp16 on a GPU, else fp32."""
    cache: Literal["ram", "disk", "off"] | None = None
    """Where preprocessed cases are kept: in memory as far as it is free, the rest on disk; on disk alone; nowhere, so
    that each is made anew whenever a patch is cut from it."""
    cache_gib: Annotated[float, Field(ge=0)] | None = None
    """Most that `cache: ram` keeps in memory or `cache: disk` writes, in GiB; planned: half of what is free."""


class SegResNetSettings(HyperSettings):
    """Settings of SegResNet alone."""

    init_filters: Annotated[int, Field(ge=4)] | None = None
    """Filters of the first stage; doubled at each stage."""
    blocks_down: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """Residual blocks of each stage of the encoder; their number is the depth."""
    dsdepth: Annotated[int, Field(ge=1)] | None = None
    """Resolutions that get a loss (deep supervision)."""


class SwinUNETRSettings(HyperSettings):
    """Settings of SwinUNETR alone."""

    feature_size: Annotated[int, Field(ge=12, multiple_of=12)] | None = None
    """Features of the first stage."""
    depths: tuple[Depth, Depth, Depth, Depth] | None = None
    """Transformer layers of each stage."""
    window_size: Annotated[int, Field(ge=2)] | None = None
    """Edge of an attention window."""


class DiNTSSettings(HyperSettings):
    """Settings of DiNTS alone."""

    channel_mul: Annotated[float, Field(gt=0)] | None = None
    """Multiplies the filters 32, 64, 128, ... of the resolutions."""
    use_downsample: bool | None = None
    """Work from half resolution on: cheaper, a little coarser."""
    search: bool | None = None
    """Search the topology on the job's own cases before training, on a share of its time, from the one that comes with
    the template on, whose file says where it is from; false: take that one."""


class UNetSettings(HyperSettings):
    """Settings of UNet alone."""

    features: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=2)] | None = None
    """Filters of each stage; each stage halves the edges."""
    num_res_units: Annotated[int, Field(ge=0)] | None = None
    """Residual units of each stage."""


class ClassSpec(Strict):
    """One class, or a region made of several label values."""

    name: str
    """Shown in tables."""
    index: Annotated[tuple[Annotated[int, Field(ge=0, le=65535)], ...], Field(min_length=1)]
    """Label values that belong to it."""


class EnsembleSettings(Strict):
    """How models are combined."""

    method: Literal["auto", "best_by_fold", "best_n"] = "auto"
    """auto: the combination with the best out-of-fold Dice."""
    num_best: Annotated[int, Field(ge=1)] = 2
    """Models per fold for best_n."""
    combine: Literal["auto", "mean", "vote"] = "auto"
    """Mean of the probabilities, or majority of the labels."""
    postprocess: Literal["auto", "off"] = "auto"
    """auto: clean the classes whose out-of-fold Dice that raises: largest component, no small parts, no holes."""
    max_time: Annotated[str, AfterValidator(_check_duration)] | None = None
    """Time to segment an image, such as 15s, that the chosen models may take; measured on the out-of-fold cases."""
    max_memory: Annotated[str, AfterValidator(_check_size)] | None = None
    """Memory that they may take, such as 4GB: of the GPU, or of the process on a CPU."""


class InferenceSettings(Strict):
    """How new images are segmented."""

    fast: bool = False
    """All of locate, crop_to_first, overlap 0 and no mirroring, where they are not set otherwise."""
    locate: bool | None = None
    """Crop to the region that the locator finds; it is trained by `autoseg train --algo locator`."""
    crop_to_first: bool | None = None
    """Crop the body's length to what the first model finds, for the models after it."""
    skip_empty: bool | None = None
    """Pass one window of nothing but background intensity through the models for all such of an image; null: yes."""
    overlap: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Overlap of windows for all models; null: as each was planned."""
    mirror: bool | None = None
    """Average over mirrored images; null: as each model was planned (`tta`), and not with `fast`."""
    anywhere: tuple[str, ...] = ()
    """Classes that may be anywhere in the body, such as tumors: the locator then keeps the body's whole length."""
    slice_run: tuple[str, ...] = ()
    """Classes of which the longest run of slices along the body is kept alone."""
    min_voxels: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Class -> voxels; a prediction of fewer in all is removed."""


class PseudolabelSettings(Strict):
    """How missing classes are filled in between two rounds of training; see `strategy`."""

    exclude: Annotated[tuple[str, ...], AfterValidator(_check_unique)] = ()
    """Classes that are never filled, such as [tumor]."""
    rounds: Annotated[int, Field(ge=2)] = 2
    """Rounds of training; each but the last labels the cases for the next."""
    start: Literal["scratch", "previous"] | None = None
    """A round after the first trains from scratch, with new folds, or from the previous round's weights, with its
    folds; null: scratch for two_stage, previous for both."""
    unlabeled: bool | None = None
    """Whether unlabeled images join; null: no for two_stage, yes for both."""
    filter: bool | None = None
    """Whether the rules below reject pseudo-labels; null: no for two_stage, yes for both."""
    confidence: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Probability under which a voxel that the models give a class is unsure: it teaches what annotators said alone."""
    background_confidence: Annotated[float, Field(ge=0, lt=1)] = 0.995
    """The same for what they call background: models that learned a class from few cases find too little of it."""
    soft: bool = False
    """Voxels that the models spoke of count by their probability, in the loss of the round that learns from them."""
    max_disagreement: Annotated[float, Field(gt=0)] = 1.0
    """Differing over foreground voxels of the folds' models, 0 to 2, above which a class of a case is rejected."""
    reject: Annotated[float, Field(ge=0, lt=1)] = 0.04
    """Share of the cases rejected for each class, those with most disagreement."""
    min_dice: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Out-of-fold Dice of the previous round under which a class is not filled at all."""


class SlurmSettings(Strict):
    """What Slurm is to be asked for; each job becomes a task of a job array."""

    partition: str | None = None
    """Partition; null: the cluster's default."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    time: Annotated[str, AfterValidator(_check_duration)] = "24h"
    """Limit for a job, after which it is saved, queued again and goes on."""
    memory_gib: Annotated[int, Field(ge=1)] | None = None
    """Memory for a job; null: the cluster's default."""
    num_parallel: Annotated[int, Field(ge=1)] = 64
    """Jobs of the array that may run at once."""
    cluster: Literal["slurm", "local"] = "slurm"
    """local: run the array on this machine, to try it without Slurm."""


class Range(Strict):
    """Values that a sweep may try for one setting: choices, or from low to high."""

    choices: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    """The values to choose from."""
    low: float | None = None
    """Lowest value."""
    high: float | None = None
    """Highest value, itself included."""
    log: bool = False
    """Draw evenly over the logarithm."""
    step: Annotated[float, Field(gt=0)] | None = None
    """Distance between values."""

    @model_validator(mode="after")
    def _check(self) -> Range:
        if (self.choices is None) == (self.low is None and self.high is None):
            raise ValueError("expected either choices: [a, b], or low: and high:.")
        if self.choices is not None:
            if self.log or self.step is not None:
                raise ValueError("log and step have no effect on choices. Leave them out.")
            _check_unique(self.choices)
            return self
        if self.low is None or self.high is None:
            missing = "low" if self.low is None else "high"
            raise ValueError(f"{missing} is missing. Give both low and high.")
        if self.low == self.high:
            raise ValueError(f"the range is empty: low and high are both {self.low:g}. Set the value itself instead.")
        if self.low > self.high:
            raise ValueError(f"the range is inverted: low {self.low:g} is above high {self.high:g}. Swap them.")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs low > 0, found {self.low:g}.")
        if self.log and self.step is not None:
            raise ValueError("log and step exclude each other. Leave out one of them.")
        return self


RESERVED_NAMES = ("analysis", "cache", "state", "ensemble", "pseudolabels", "report")


def _check_study(name: str) -> str:
    jobs = re.fullmatch(rf"({'|'.join((*ALGOS, LOCATOR))})_\d+", name)
    if not re.fullmatch(r"(?!round_)[a-z][a-z0-9_-]*", name) or name in RESERVED_NAMES or jobs:
        taken = ", ".join((*RESERVED_NAMES, "round_*", "<network>_<fold>"))
        raise ValueError(f"expected lower case letters, digits, - and _, and none of {taken}.")
    return name


class SweepSettings(Strict):
    """What `autoseg sweep` looks for."""

    parameters: dict[str, Range] = Field(default_factory=dict)
    """Setting -> {low, high, log, step} or {choices}; one under a network (segresnet.init_filters) is used where a
    trial's network is that one. The network itself is chosen too where `algos` has several."""
    trials: Annotated[int, Field(ge=1)] = 50
    """Trials to finish, those that are stopped early included."""
    folds: Annotated[tuple[FoldIndex, ...], Field(min_length=1), AfterValidator(_check_unique)] = (0,)
    """Folds that each trial trains; its Dice is their mean."""
    objectives: Annotated[
        tuple[Literal["dice", "inference_s"], ...], Field(min_length=1), AfterValidator(_check_unique)
    ] = ("dice",)
    """What is best: the highest mean Dice; with inference_s too, all trials that none beats in both."""
    pruner: Literal["halving", "hyperband", "none"] = "halving"
    """Which rule stops trials early, by the Dice of their validations: successive halving, Hyperband, or none."""
    storage: str | None = None
    """Optuna storage URL such as postgresql://user@host/db; null: a journal file in work_dir."""
    study: Annotated[str, AfterValidator(_check_study)] = "sweep"
    """Name of the study and of its folder in work_dir."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Trials at once; null: as many as this machine or the Ray cluster has places, one on Slurm."""


class Settings(HyperSettings):
    """All of input.yaml."""

    modality: Annotated[str, Field(min_length=1)]
    """CT, MRI, or another name; CT and MRI choose the normalisation."""
    datalist: Path
    """datalist.json, or a foreign data set's own list; relative to the folder of input.yaml."""
    dataroot: Path
    """Folder the paths in the datalist are relative to; relative to the folder of input.yaml."""
    work_dir: Path = Path("work_dir")
    """Everything the run writes lies here; relative to the folder of input.yaml."""
    name: str = ""
    """A name for the run, shown in the report."""
    task: Literal["segmentation"] = "segmentation"
    """Nothing else is done; Auto3DSeg's files carry the key."""
    algos: Annotated[tuple[EnsembleAlgo, ...], Field(min_length=1), AfterValidator(_check_unique)] = DEFAULT_ALGOS
    """Networks to train; a recipe's own where `recipe` is given and this is not."""
    recipe: RecipeName = "default"
    """Published training to follow instead of the planner: flare23 (SegResNet), spleen (UNet), btcv (SwinUNETR)."""
    num_fold: Annotated[int, Field(ge=2)] = 5
    """Folds made where the datalist has none."""
    folds: Annotated[tuple[FoldIndex, ...], Field(min_length=1), AfterValidator(_check_unique)] | None = None
    """Train these folds only; null: all."""
    class_names: Annotated[tuple[str | ClassSpec, ...], Field(min_length=1)] | None = None
    """Names for label values 1, 2, ...; or {name, index: [values]} for merged and overlapping regions."""
    sigmoid: bool | None = None
    """True for regions that overlap; null: as class_names say."""
    ignore_label: Annotated[int, Field(ge=1, le=65534)] | None = None
    """Label value of voxels to leave out of loss and metrics, such as 255."""
    extra_modalities: dict[str, str] = Field(default_factory=dict)
    """More images of a case: key in the datalist -> normalisation (ct, mri, pet, meanstd, ...)."""
    merge_left_right: bool = False
    """Train classes that differ in left and right alone as one; predictions are split again."""
    partial_labels: Literal["off", "infer", "declared"] = "off"
    """Which classes a case was annotated for: all of them; those that occur in it; or as the datalist declares."""
    strategy: Literal["two_stage", "marginal", "both"] = "both"
    """What is done about classes that cases are not annotated for, where partial_labels says so. two_stage: the fully
    annotated cases train models that fill the missing classes of the others, then all train; marginal: all train at
    once, each case for the classes it has; both: marginal, then pseudo-labels that pass a filter, and again."""
    pseudolabel: PseudolabelSettings = PseudolabelSettings()
    """How missing classes are filled in."""
    on_fault: Literal["stop", "skip"] = "stop"
    """A faulty case stops the run, or is set aside and listed."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of folds, patches, augmentation and weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where networks run; auto: a GPU where there is one."""
    num_workers: Annotated[int, Field(ge=1)] | None = None
    """Processes and threads of data work; null: one per core."""
    memory_share: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of the device's memory that a training step may take by measurement; on a GPU it is filled up to that."""
    launcher: Literal["local", "ray", "slurm"] = "local"
    """Where jobs run: this machine's devices, a Ray cluster, or Slurm."""
    address: str = "auto"
    """Ray cluster to join; auto: the one that runs on this machine; local: start one here."""
    retries: Annotated[int, Field(ge=0)] = 2
    """Times a failed job is tried again in one run before it is given up."""
    jobs_per_device: Annotated[int, Field(ge=1)] = 1
    """Most jobs at once on a device; on a GPU a further one starts once the others' measured memory leaves room."""
    gpus_per_job: Annotated[int, Field(ge=1)] = 1
    """GPUs that train one job together; batch_size must be a multiple of it."""
    cpus_per_job: Annotated[int, Field(ge=1)] | None = None
    """CPU threads of one job; null: this machine's shared out, 8 per GPU or 1 without on Ray and Slurm."""
    slurm: SlurmSettings = SlurmSettings()
    """What Slurm is to be asked for."""
    sweep: SweepSettings = SweepSettings()
    """The search that `autoseg sweep` makes."""
    ensemble: EnsembleSettings | bool = EnsembleSettings()
    """How models are combined; false leaves the stage out."""
    inference: InferenceSettings = InferenceSettings()
    """What is given up for speed when new images are segmented, and how their labels are cleaned."""
    segresnet: SegResNetSettings = SegResNetSettings()
    """Settings of SegResNet alone; any hyperparameter, and its own."""
    swinunetr: SwinUNETRSettings = SwinUNETRSettings()
    """Settings of SwinUNETR alone; any hyperparameter, and its own."""
    dints: DiNTSSettings = DiNTSSettings()
    """Settings of DiNTS alone; any hyperparameter, and its own."""
    unet: UNetSettings = UNetSettings()
    """Settings of UNet alone; any hyperparameter, and its own."""

    locator: SegResNetSettings = SegResNetSettings()
    """Settings of the locator alone; any hyperparameter, and SegResNet's own. The top level's voxel size, patch,
    overlap and mirroring are not for it."""

    @model_validator(mode="before")
    @classmethod
    def _take_recipes_network(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("recipe") in RECIPE_ALGO and data.get("algos") is None:
            return {**data, "algos": (RECIPE_ALGO[data["recipe"]],)}
        return data

    @model_validator(mode="after")
    def _check_recipe(self) -> Settings:
        algo = RECIPE_ALGO.get(self.recipe)
        if algo is not None and algo not in self.algos:
            raise ValueError(
                f"recipe {self.recipe} is for {algo}, which is not among algos. Add it, or leave algos out."
            )
        return self

    def hyper(self, algo: AlgoName) -> dict[str, object]:
        """What the user fixed for one algorithm: its own block over the top level; None left out."""
        own: HyperSettings = getattr(self, algo)
        top = {k: getattr(self, k) for k in HyperSettings.model_fields if k != "budget"}
        if algo == LOCATOR:
            top = {k: v for k, v in top.items() if k not in NOT_FOR_LOCATOR}
        return {k: v for k, v in {**top, **{k: v for k, v in own if v is not None}}.items() if v is not None}


AUTO3DSEG_WITHOUT_EFFECT: dict[str, str] = {
    "analyze": "a stage that is up to date is not redone anyway",
    "algo_gen": "a stage that is up to date is not redone anyway",
    "train": "a job that is done is not redone anyway",
    "hpo": "use `autoseg sweep`",
    "hpo_backend": "use `autoseg sweep`",
    "not_use_cache": "results are reused only while their inputs are unchanged; delete work_dir to start anew",
    "allow_skip": "failed jobs never stop the others",
    "templates_path_or_url": "the templates are part of the package",
    "mlflow_tracking_uri": "numbers go to metrics.jsonl",
    "mlflow_experiment_name": "numbers go to metrics.jsonl",
    "multigpu": "all GPUs are used",
    "resample": "images are always resampled to resample_resolution",
    "resample_mode": "the planner chooses the voxel size; resample_resolution fixes it",
    "anisotropic_scales": "the planner looks at the spacing itself",
    "image_size": "the planner takes it from the data; roi_size fixes the patch",
    "image_size_mm_90": "the planner takes it from the data",
    "augment_mode": "set augment",
    "augment_flips": "set mirror_axes",
    "augment_rots": "set augment",
    "crop_ratios": "set foreground_fraction; the classes are drawn evenly",
    "num_images_per_batch": "set batch_size",
    "num_crops_per_image": "set batch_size",
    "amp": "set precision",
    "determ": "set seed",
    "cache_rate": "memory is measured; set cache and cache_gib",
}
"""Keys that Auto3DSeg's input files may carry and that need no counterpart here: accepted with a warning."""


def load_settings(path: Path, overrides: Mapping[str, str] | None = None) -> tuple[Settings, Origins]:
    """Read input.yaml and the settings given on the command line, which win.

    Args:
        path: input.yaml.
        overrides: Key, dotted inside a block (`segresnet.batch_size`) -> text, read as YAML.

    Returns:
        Settings with absolute paths, and the origin of each: `default`, `input.yaml:LINE` or `command line`.
        A path in the file is relative to the file's folder, one from the command line to the current folder.

    Raises:
        ConfigError: All that is wrong, one line each: unknown and repeated keys, types, ranges, missing files.
    """
    if not path.exists():
        advice = "Write one with `autoseg init DATA_FOLDER`, or name it with --input FILE."
        raise ConfigError(f"{path}: no such file. {advice}")
    settings, origins, warnings = read_with_origins(path, Settings, overrides, AUTO3DSEG_WITHOUT_EFFECT)
    folder = path.absolute().parent
    places = {}
    faults = []
    for key, kind in (("datalist", "file"), ("dataroot", "folder"), ("work_dir", "")):
        given: Path = getattr(settings, key).expanduser()
        on_command_line = origins[key] == "command line"
        base, name = (Path.cwd(), "the current folder") if on_command_line else (folder, f"the folder of {path.name}")
        where = f"--{key}" if on_command_line else f"{path}:{origins[key].rpartition(':')[2]}: {key}"
        places[key] = found = Path(os.path.normpath(base / given))
        looked = "" if given.is_absolute() else f" {given} is relative to {name}."
        if kind and not found.exists():
            faults.append(f"{where}: no such {kind}: {found}.{looked}")
        elif key == "dataroot" and not found.is_dir():
            faults.append(f"{where}: expected a folder, found a file: {found}.{looked}")
        elif key == "work_dir" and found.exists() and not found.is_dir():
            faults.append(f"{where}: expected a folder, found a file: {found}. Give another work_dir.")
    if faults:
        raise ConfigError(faults)
    for warning in warnings:
        logger.warning(warning)
    return settings.model_copy(update=places), origins


def read_settings_file(path: Path) -> dict[str, str]:
    """Read settings that stand in a file of their own, as if each were given on the command line.

    Returns:
        Key, dotted inside a block -> text.

    Raises:
        ConfigError: Every key that is no setting, and every value it cannot have.
    """
    docs = setting_docs()
    found: dict[str, str] = {}
    faults = []
    for key, value in read_plain(path).items():
        inner = value if isinstance(value, dict) and key in {doc.block for doc in docs.values()} else None
        for name, item in (inner or {"": value}).items():
            whole = f"{key}.{name}" if inner else key
            found[whole] = item if isinstance(item, str) else json.dumps(item)
            if whole not in docs:
                faults.append(f"{path}: {whole}: unknown setting. {suggest(whole, docs)}")
                continue
            try:
                read_value(whole, found[whole], docs[whole].annotation)
            except ConfigError as error:
                faults += [f"{path}: {message.removeprefix('--')}" for message in error.messages]
    if faults:
        raise ConfigError(faults)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingDoc:
    """What the help and the manual say of one setting."""

    key: str
    """Dotted inside a block."""
    block: str
    """The block it stands in; empty at the top level."""
    type: str
    """Its values, in words."""
    default: str
    """As it would be written in input.yaml; `planned` where the planner decides; else empty."""
    required: bool
    doc: str
    annotation: Any


def setting_docs() -> dict[str, SettingDoc]:
    """All settings by key: those of the data and the run, the hyperparameters, then each block's."""
    docs = {}
    for block, name, annotation, info in sorted(walk_fields(Settings), key=_rank):
        key = f"{block}.{name}" if block else name
        default = None if info.is_required() else info.get_default(call_default_factory=True)
        unset = "planned" if block in (*ALGOS, LOCATOR) or key in HyperSettings.model_fields else ""
        docs[key] = SettingDoc(
            key=key,
            block=block,
            type=describe_type(annotation, info.metadata),
            default=unset if default is None else _default_text(default),
            required=info.is_required(),
            doc=" ".join((info.description or "").split()),
            annotation=annotation,
        )
    return docs


def _rank(entry: tuple[str, str, Any, Any]) -> int:
    """Place of a setting in help and manual; the order within a place is that of the models."""
    block, name, _, _ = entry
    blocks = (*ALGOS, LOCATOR, "ensemble", "inference", "slurm", "sweep", "pseudolabel")
    return 2 if block or name in blocks else int(name in HyperSettings.model_fields)


def _default_text(value: Any) -> str:
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return (
        "[" + ", ".join(str(v) for v in value) + "]"
        if isinstance(value, tuple)
        else str(value)
        if value != ""
        else '""'
    )
