"""Every user setting, typed and documented. Hyperparameters are defined in hyperparameters.py and networks.py.

Precedence: defaults < planner < input.yaml < command line < sweep trial. A setting that is None is left to
the planner. Hyperparameters may stand at the top level, for all algorithms, or under an algorithm's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, create_model, model_validator

from autoseg.config.fields import (
    RGB,
    USUAL_NUM_FOLD,
    Concept,
    Count,
    Duration,
    FoldIndex,
    MemorySize,
    NotNegative,
    Positive,
    Share,
    ShareBelowOne,
    Strict,
    check_unique,
)
from autoseg.config.hyperparameters import HyperSettings
from autoseg.config.networks import (
    AUTO,
    NETWORKS,
    RECIPE_ALGO,
    AlgoName,
    EnsembleAlgo,
    RecipeName,
    settings_blocks,
)
from autoseg.config.types import suggest


class ClassSpec(Strict):
    """One class, or a region made of several label values."""

    name: str
    """Shown in tables."""
    index: Annotated[tuple[Annotated[int, Field(ge=0, le=65535)], ...], Field(min_length=1)]
    """Label values that belong to it."""


class ClassCodes(Strict):
    """What a class is, in coded terms. Each is scheme, code and meaning, such as SCT,10200004,Liver, or a name such as
    liver.
    """

    type: Concept
    """What it is, such as SCT,108369006,Neoplasm."""
    category: Concept | None = None
    """What kind of thing that is; null: of the named type, else SCT,123037004,Anatomical Structure."""
    modifier: Concept | None = None
    """left or right."""
    region: Concept | None = None
    """Of something abnormal: where in the body it lies, such as liver."""
    region_modifier: Concept | None = None
    """left or right of that."""


FormatName = Literal["auto", "nifti", "nrrd", "seg.nrrd", "mha", "dicomseg", "rtstruct"]
"""Of label files, as `autoseg predict` writes them; `autoseg.data.formats.table` has a writer of each name."""
SelectBy = Literal[
    "dice",
    "nsd",
    "hd95",
    "asd",
    "volume_error",
    "lesion_f1",
    "lesion_sensitivity",
    "lesion_false",
    "lesion_false_healthy",
    "panoptic_quality",
]
"""Metrics of `autoseg.evaluation.scores` that can decide."""


class EnsembleSettings(Strict):
    """How models are combined."""

    method: Literal["auto", "best_by_fold", "best_n"] = "auto"
    """auto: the combination with the best out-of-fold score, see select_by."""
    num_best: Count = 2
    """Models per fold for best_n."""
    combine: Literal["auto", "mean", "vote"] = "auto"
    """Mean of the probabilities, or majority of the labels."""
    select_by: SelectBy = "dice"
    """Out-of-fold score that decides which models are combined and what is cleaned, such as lesion_f1; docs/metrics.md
    explains them. Which weights of a model are kept goes by Dice."""
    postprocess: Literal["auto", "off"] = "auto"
    """auto: clean the classes whose out-of-fold score that surely raises: largest component, no small parts, no
    holes."""
    robustness: Literal["auto", "off"] = "auto"
    """auto: predict some held-out cases with noise, a bias field, fewer voxels and turned; with what quality is learned
    from in at most 7 % of the time that the jobs trained, or what a budget leaves."""
    max_time: Duration | None = None
    """Time to segment an image, such as 15s, that the chosen models may take; measured on the out-of-fold cases."""
    max_memory: MemorySize | None = None
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
    overlap: ShareBelowOne | None = None
    """Overlap of windows for all models; null: as each was planned."""
    mirror: bool | None = None
    """Average over mirrored images; null: as each model was planned (`tta`), and not with `fast`."""
    anywhere: tuple[str, ...] = ()
    """Classes that may be anywhere in the body, such as tumors: the locator then keeps the body's whole length."""
    slice_run: tuple[str, ...] = ()
    """Classes of which the longest run of slices along the body is kept alone."""
    min_voxels: dict[str, Count] = Field(default_factory=dict)
    """Class -> voxels; a prediction of fewer in all is removed."""
    format: FormatName | None = None
    """Of label files: nifti, nrrd, seg.nrrd, mha, dicomseg, rtstruct, or auto: each image's own. Where it is set, the
    ensemble writes the testing cases' so, too, to ensemble/converted: DICOM holds the patient's name. null: NIfTI alone
    there; `predict` takes auto. `predict --format` wins."""


class PseudolabelSettings(Strict):
    """How missing classes are filled in between two rounds of training; see `strategy`."""

    exclude: Annotated[tuple[str, ...], AfterValidator(check_unique)] = ()
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
    confidence: ShareBelowOne = 0.5
    """Probability under which a voxel that the models give a class is unsure: it teaches what annotators said alone."""
    background_confidence: ShareBelowOne = 0.995
    """The same for what they call background: models that learned a class from few cases find too little of it."""
    soft: bool = False
    """Voxels that the models spoke of count by their probability, in the loss of the round that learns from them."""
    max_disagreement: Positive = 1.0
    """Differing over foreground voxels of the folds' models, 0 to 2, above which a class of a case is rejected."""
    reject: ShareBelowOne = 0.04
    """Share of the cases rejected for each class, those with most disagreement."""
    min_dice: Share = 0.3
    """Out-of-fold Dice of the previous round under which a class is not filled at all."""


class SlurmSettings(Strict):
    """What Slurm is to be asked for; each job becomes a task of a job array."""

    partition: str | None = None
    """Partition; null: the cluster's default."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    time: Duration = "24h"
    """Limit for a job, after which it is saved, queued again and goes on."""
    memory_gib: Count | None = None
    """Memory for a job; null: the cluster's default."""
    num_parallel: Count = 64
    """Jobs of the array that may run at once."""
    cluster: Literal["slurm", "local"] = "slurm"
    """local: run the array on this machine, to try it without Slurm."""


TrackerName = Literal["tensorboard", "mlflow", "wandb"]
"""The rows of `autoseg.tracking.table`."""
SQLITE = "sqlite:///"
"""How the address of a database in a file begins; its path follows."""


class TrackSettings(Strict):
    """Where numbers and report of a run go besides work_dir."""

    tool: TrackerName | None = None
    """tensorboard, mlflow or wandb (offline), of the extra `track`; null: none."""
    uri: str | None = None
    """mlflow's store: sqlite:///FILE, relative to the folder of input.yaml, or the address of a server or database, in
    which $NAME stands for an environment variable; null: tracking/mlflow.db in work_dir."""
    experiment: Annotated[str, Field(min_length=1)] | None = None
    """mlflow's experiment, wandb's project; null: `name`, else the folder that work_dir is called or lies in."""
    report: bool = True
    """Whether report.html, which has pictures and names of cases, is added to what mlflow and wandb keep."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.uri is not None and self.tool != "mlflow":
            writes = "without a tool it" if self.tool is None else self.tool
            nothing = "has no effect" if self.tool is None else "writes into work_dir"
            raise ValueError(f"uri: {writes} {nothing}. Leave uri out, or set tool: mlflow.")
        if self.uri is not None and "://" not in self.uri and not self.uri.startswith("$"):
            raise ValueError(
                "uri: expected an address such as sqlite:///mlflow.db or https://mlflow.example.org. "
                "MLflow has given up folders as stores."
            )
        return self


def map_store(uri: str | None, place: Callable[[Path], Path]) -> str | None:
    """`track.uri` with its path, if it has one, in another form."""
    if uri is None or not uri.startswith(SQLITE):
        return uri
    return f"{SQLITE}{place(Path(uri.removeprefix(SQLITE)))}"


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
    step: Positive | None = None
    """Distance between values."""

    @model_validator(mode="after")
    def _check(self) -> Range:
        if (self.choices is None) == (self.low is None and self.high is None):
            raise ValueError("expected either choices: [a, b], or low: and high:.")
        if self.choices is not None:
            if self.log or self.step is not None:
                raise ValueError("log and step have no effect on choices. Leave them out.")
            check_unique(self.choices)
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


class PretrainSettings(Strict):
    """What encoders learn from images alone, before any label is seen."""

    method: Literal["none", "contrastive", "mae"] = "none"
    """mae: draw what is masked; contrastive: repair two damaged views of a patch, and tell them from other patches'."""
    budget: Duration | None = None
    """Time for all of it, such as 1h; null: a quarter of the run's budget; without one, epochs alone decide."""
    all_images: bool = False
    """Learn from the images of cases that models are scored on, too, never from their labels."""
    epochs: Count = 500
    """Passes over the images; with a budget, the most that are made."""
    mask_share: Annotated[float, Field(gt=0, lt=1)] = 0.75
    """Of mae: share of each patch that is masked."""
    mask_block: Count = 16
    """Of mae: edge of the blocks that are masked, in voxels; a quarter of the patch's edge at most."""
    temperature: Positive = 0.05
    """Of contrastive: how sharply the nearest of the other patches count."""


NO_WEIGHTS, PRETRAINED = "none", "pretrain"
"""`init_weights` of networks that start with random numbers, and with what `pretrain` taught them."""

InitWeights = str | dict[str, str] | None


def map_weights(value: InitWeights, place: Callable[[Path], Path]) -> InitWeights:
    """`init_weights` with each of its paths in another form."""

    def placed(text: str) -> str:
        return text if text in (NO_WEIGHTS, PRETRAINED) else str(place(Path(text)))

    if isinstance(value, dict):
        return {name: placed(text) for name, text in value.items()}
    return None if value is None else placed(value)


def _check_weights(value: InitWeights) -> InitWeights:
    unknown = [name for name in value if name not in NETWORKS] if isinstance(value, dict) else []
    if unknown:
        raise ValueError(f"no network {unknown[0]}. {suggest(unknown[0], NETWORKS)}")
    return value


RESERVED_NAMES = ("analysis", "cache", "state", "ensemble", "pseudolabels", "report", "init_weights", "tracking") + (
    "pretraining",
    "scratch",
    "learning_curve",
)


def _check_study(name: str) -> str:
    jobs = re.fullmatch(rf"({'|'.join(NETWORKS)})_\d+", name)
    if not re.fullmatch(r"(?!round_)[a-z][a-z0-9_-]*", name) or name in RESERVED_NAMES or jobs:
        taken = ", ".join((*RESERVED_NAMES, "round_*", "<network>_<fold>"))
        raise ValueError(f"expected lower case letters, digits, - and _, and none of {taken}.")
    return name


class SweepSettings(Strict):
    """What `autoseg sweep` looks for."""

    parameters: dict[str, Range] = Field(default_factory=dict)
    """Setting -> {low, high, log, step} or {choices}; one under a network (segresnet.init_filters) is used where a
    trial's network is that one. The network itself is chosen too where `algos` has several."""
    trials: Count = 50
    """Trials to finish, those that are stopped early included."""
    folds: Annotated[tuple[FoldIndex, ...], Field(min_length=1), AfterValidator(check_unique)] = (0,)
    """Folds that each trial trains; its Dice is their mean."""
    objectives: Annotated[
        tuple[Literal["dice", "inference_s"], ...], Field(min_length=1), AfterValidator(check_unique)
    ] = ("dice",)
    """What is best: the highest mean Dice; with inference_s too, all trials that none beats in both."""
    pruner: Literal["halving", "hyperband", "none"] = "halving"
    """Which rule stops trials early, by the Dice of their validations: successive halving, Hyperband, or none."""
    storage: str | None = None
    """Optuna storage URL such as postgresql://user:$PASSWORD@host/db, where $NAME stands for an environment variable;
    null: a journal file in work_dir."""
    study: Annotated[str, AfterValidator(_check_study)] = "sweep"
    """Name of the study and of its folder in work_dir."""
    workers: Count | None = None
    """Trials at once; null: as many as this machine or the Ray cluster has places, one on Slurm."""


def _check_algos(algos: tuple[str, ...] | str) -> tuple[str, ...] | str:
    return algos if isinstance(algos, str) else check_unique(algos)


PATHS = ("datalist", "dataroot", "work_dir", "meta")
"""Settings that are paths; `meta` may be missing."""


class RunSettings(HyperSettings):
    """All of input.yaml but the networks' blocks."""

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
    algos: Annotated[
        Literal["auto"] | Annotated[tuple[EnsembleAlgo, ...], Field(min_length=1)], AfterValidator(_check_algos)
    ] = AUTO
    """Networks to train. auto: up to three out of segresnet, resenc, swinunetr and dints, by the data, the device and
    the budget, once the data are analyzed; a recipe's own with `recipe`. `autoseg explain algos` says why."""
    recipe: RecipeName = Field(
        default="default",
        description="Published training to follow instead of the planner: "
        + ", ".join(f"{recipe} ({NETWORKS[algo].own.__name__})" for recipe, algo in RECIPE_ALGO.items())
        + ".",
    )
    meta: Path | None = None
    """CSV with further facts of the cases, such as site, scanner, sex or age, one row a case; relative to the folder of
    input.yaml. Scores are shown by group of each. Further keys of a case in the datalist do the same."""
    num_fold: Annotated[int, Field(ge=2)] = USUAL_NUM_FOLD
    """Folds made where the datalist has none; if it is not set, fewer where there are fewer patients."""
    folds_by: str | None = None
    """Key of the cases, such as site, each value of which becomes a fold: models are scored on sites they never saw."""
    folds: Annotated[tuple[FoldIndex, ...], Field(min_length=1), AfterValidator(check_unique)] | None = None
    """Train these folds only; null: all."""
    class_names: Annotated[tuple[str | ClassSpec, ...], Field(min_length=1)] | None = None
    """Names for label values 1, 2, ...; or {name, index: [values]} for merged and overlapping regions."""
    sigmoid: bool | None = None
    """True for regions that overlap; null: as class_names say."""
    ignore_label: Annotated[int, Field(ge=1, le=65534)] | None = None
    """Label value of voxels to leave out of loss and metrics, such as 255."""
    extra_modalities: dict[str, str] = Field(default_factory=dict)
    """More images of a case: key in the datalist -> normalisation (ct, mri, pet, meanstd, ...)."""
    surface_tolerance_mm: NotNegative | dict[str, NotNegative] = 2.0
    """Deviation of a surface, mm, that surface Dice accepts: of all classes, or class -> its own, the others' 2."""
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
    codes: dict[str, Concept | ClassCodes] = Field(default_factory=dict)
    """Class -> what DICOM and Slicer segmentations say that it is: scheme, code and meaning, a known name, or {type,
    category, modifier, region, region_modifier}; classes that are not listed are found by their names."""
    colours: dict[str, RGB] = Field(default_factory=dict)
    """Class -> red, green and blue, each 0 to 255, in DICOM and Slicer segmentations and pictures; classes that are not
    listed get colours that are told apart. `autoseg init` writes those that the segments of label files have."""
    on_fault: Literal["stop", "skip"] = "stop"
    """A faulty case stops the run, or is set aside and listed."""
    init_weights: Annotated[InitWeights, AfterValidator(_check_weights)] = None
    """Weights to start from: a file, the folder of a job, a bundle or a work_dir, for all networks or for some
    ({segresnet: FILE}); relative to the folder of input.yaml. none: random ones; pretrain: what `pretrain` taught them;
    null: that where it has a method."""
    pretrain: PretrainSettings = PretrainSettings()
    """Whether and how encoders learn from images alone, before any label is seen."""
    compare_scratch: bool = False
    """Train each job that starts from weights from random ones, too, by the same plan, and test the difference on the
    same cases."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of folds, patches, augmentation and weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where networks run; auto: a GPU where there is one."""
    num_workers: Count | None = None
    """Processes and threads of data work; null: one per core."""
    memory_share: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of the device's memory that a training step may take; where it takes more, batch and patch shrink."""
    launcher: Literal["local", "ray", "slurm"] = "local"
    """Where jobs run: this machine's devices, a Ray cluster, or Slurm."""
    address: str = "auto"
    """Ray cluster to join; auto: the one that runs on this machine; local: start one here."""
    retries: Annotated[int, Field(ge=0)] = 2
    """Times a failed job is tried again in one run before it is given up."""
    jobs_per_device: Count = 1
    """Most jobs at once on a device; on a GPU a further one starts once the others' measured memory leaves room."""
    gpus_per_job: Count = 1
    """GPUs that train one job together; batch_size must be a multiple of it."""
    cpus_per_job: Count | None = None
    """CPU threads of one job; null: this machine's shared out, 8 per GPU or 1 without on Ray and Slurm."""
    track: TrackerName | TrackSettings = TrackSettings()
    """Where numbers and report of the run go besides work_dir: a tool, or a block of settings."""
    slurm: SlurmSettings = SlurmSettings()
    """What Slurm is to be asked for."""
    sweep: SweepSettings = SweepSettings()
    """The search that `autoseg sweep` makes."""
    ensemble: EnsembleSettings | bool = EnsembleSettings()
    """How models are combined; false leaves the stage out."""
    inference: InferenceSettings = InferenceSettings()
    """What is given up for speed when new images are segmented, and how their labels are cleaned."""

    @model_validator(mode="before")
    @classmethod
    def _take_recipes_network(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("recipe") in RECIPE_ALGO and data.get("algos") in (None, AUTO):
            return {**data, "algos": (RECIPE_ALGO[data["recipe"]],)}
        return data

    @model_validator(mode="after")
    def _check_recipe(self) -> Self:
        algo = RECIPE_ALGO.get(self.recipe)
        if algo is not None and algo not in self.algos:
            raise ValueError(
                f"recipe {self.recipe} is for {algo}, which is not among algos. Add it, or leave algos out."
            )
        return self

    @model_validator(mode="after")
    def _check_pretrained(self) -> Self:
        named = self.init_weights
        values = named.values() if isinstance(named, dict) else (named,)
        if PRETRAINED in values and self.pretrain.method == "none":
            raise ValueError(
                "init_weights: pretrain needs a way to pretrain. Set pretrain.method: mae or contrastive, or leave "
                "init_weights out."
            )
        return self

    def _weights_of(self, algo: AlgoName) -> str:
        """`init_weights` of one network.

        One for all networks is for those of an ensemble; the locator, which finds a region alone, has to be named.
        """
        named = self.init_weights
        if named is None:
            named = NO_WEIGHTS if self.pretrain.method == "none" else PRETRAINED
        if not isinstance(named, dict):
            named = {algo: named} if NETWORKS[algo].in_ensemble else {}
        return named.get(algo, NO_WEIGHTS)

    def first_weights(self, algo: AlgoName) -> Path | None:
        """The file or folder that a network's first weights come from; None: they are random, or of `pretrain`."""
        text = self._weights_of(algo)
        return None if text in (NO_WEIGHTS, PRETRAINED) else Path(text)

    def is_pretrained(self, algo: AlgoName) -> bool:
        """Whether a network is to start with what `pretrain` teaches it; see `autoseg.weights.pretrained`."""
        return self._weights_of(algo) == PRETRAINED

    def with_paths(self, place: Callable[[Path], Path]) -> Self:
        """The settings with each of their paths in another form."""
        places: dict[str, Any] = {key: place(path) for key in PATHS if (path := getattr(self, key)) is not None}
        if isinstance(self.track, TrackSettings):
            places["track"] = self.track.model_copy(update={"uri": map_store(self.track.uri, place)})
        return self.model_copy(update={**places, "init_weights": map_weights(self.init_weights, place)})

    @property
    def networks(self) -> tuple[AlgoName, ...]:
        """The networks to train; where `algos` is auto, `autoseg.pipeline.networks` has to settle it first."""
        assert not isinstance(self.algos, str), "algos is auto, and nobody has settled it for the data"
        return self.algos

    @property
    def combining(self) -> EnsembleSettings:
        """How models are combined; the defaults where `ensemble` is true or false."""
        return self.ensemble if isinstance(self.ensemble, EnsembleSettings) else EnsembleSettings()

    @property
    def tracking(self) -> TrackSettings | None:
        """Where numbers of the run go besides work_dir, as a block; its experiment is the run's name, if it has one."""
        block = TrackSettings(tool=self.track) if isinstance(self.track, str) else self.track
        if block.tool is None:
            return None
        return block.model_copy(update={"experiment": block.experiment or self.name or None})

    def network(self, algo: AlgoName) -> HyperSettings:
        """A network's own block."""
        block: HyperSettings = getattr(self, algo)
        return block

    def hyper(self, algo: AlgoName) -> dict[str, Any]:
        """What the user fixed for one algorithm: its own block over the top level; None left out.

        The top level's budget is the whole run's, so it is not among them.
        """
        apart = {"budget", *NETWORKS[algo].not_from_top}
        top = {key: getattr(self, key) for key in HyperSettings.model_fields if key not in apart}
        own = {key: value for key, value in self.network(algo) if value is not None}
        return {key: value for key, value in {**top, **own}.items() if value is not None}


if TYPE_CHECKING:

    class Settings(RunSettings):
        """All of input.yaml, to a type checker; `network` gives the networks' blocks."""

else:
    Settings = create_model(
        "Settings",
        __base__=RunSettings,
        __doc__="All of input.yaml.",
        __module__=__name__,
        **{name: (block, Field(default=block(), description=doc)) for name, (block, doc) in settings_blocks().items()},
    )
