"""Every user setting, typed and documented, and the one strict YAML reader.

Precedence: defaults < planner < input.yaml < command line < sweep trial. A setting that is None is left to
the planner. Hyperparameters may stand at the top level, for all algorithms, or under an algorithm's name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from autoseg.config.units import parse_duration, parse_size
from autoseg.errors import ConfigError

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
