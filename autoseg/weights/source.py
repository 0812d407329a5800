"""What weights from elsewhere are: the file, whose layout it has, and what is known of their training.

a file of any training        names and shapes tell the width
Auto3DSeg's                   its configuration tells classes and voxel size
nnU-Net's and nnssl's         what it was started with tells the classes; adaptation_plan.json, which weights count
a MONAI bundle                metadata.json tells the classes
a job's folder                the plan tells all
a work_dir, a packed model    the plan of the best job of the same network
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import Field, JsonValue

from autoseg.config.networks import AlgoName
from autoseg.errors import ConfigError, WorkspaceError
from autoseg.networks import network_file
from autoseg.plan import ChannelPlan, read_plan
from autoseg.weights.checkpoint import Checkpoint, read_checkpoint
from autoseg.weights.fitting import BACKGROUND
from autoseg.weights.layouts import shapes_as_ours
from autoseg.workspace.digests import content_digest
from autoseg.workspace.files import open_regular
from autoseg.workspace.jobs import Job, JobDir
from autoseg.workspace.pretraining import Lesson
from autoseg.workspace.stored import Stored, read_stored
from autoseg.workspace.workspace import Workspace

ADAPTATION_PLAN = "adaptation_plan.json"
OUR_PREFIXES = {"key_to_encoder": "encoder.stages", "key_to_stem": "encoder.stem"}
"""Keys of an adaptation plan -> what they stand for in our residual-encoder U-Net. nnU-Net, too, takes encoder and stem
alone, since the decoder was trained to draw images. Source: nnU-Net's `PretrainedTrainer`."""
DEEP_SUPERVISION = "dsdepth"
"""A network's number of outputs: one in pretraining, and so no fact of its weights."""
MOST_SIDECAR = 10_000_000
"""Bytes of a JSON file beside weights that are read: those of nnU-Net have some thousands."""


class Facts(Stored):
    """What is known of weights besides their numbers."""

    kind: str = ""
    """What they are, in words."""
    classes: tuple[str, ...] | None = None
    """What the outputs are, in their order, without the background; None: nothing says."""
    network: dict[str, JsonValue] = Field(default_factory=dict)
    """The network's own settings, as far as they are told."""
    spacing_mm: tuple[float, float, float] | None = None
    """Voxel size that they were trained at."""
    channels: tuple[ChannelPlan, ...] | None = None
    """Normalisation of their images."""
    trained_on: tuple[str, ...] = ()
    """Digests of the cases that they learned from, and of the images of these alone."""
    images_seen: tuple[str, ...] = ()
    """Digests of images that they learned from without labels."""
    prefixes: dict[str, str] = Field(default_factory=dict)
    """Beginnings of names, theirs -> ours, where only such weights count; empty: all."""

    @property
    def learned_classes(self) -> bool:
        """Whether they have learned from labels, as far as is known; else from images alone."""
        return not self.prefixes and (bool(self.trained_on) or not self.images_seen)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where weights are: one file, and those that tell more of it."""

    weights: Path
    plan: JobDir | None = None
    """The job that they are of, where they are autoseg's."""
    bundle: Path | None = None
    """The metadata.json of a MONAI bundle."""
    adaptation: Path | None = None
    """nnssl's adaptation plan."""

    @property
    def digest(self) -> str:
        """Of the content of all that they are read from.

        Raises:
            ConfigError: A file cannot be read.
        """
        beside = [self.bundle, self.adaptation, self.plan.plan if self.plan else None]
        try:
            return content_digest(self.weights, *(path for path in beside if path is not None))
        except OSError as error:
            raise ConfigError(f"{self.weights}: cannot be read ({error.strerror}). Give a file of weights.") from None

    def read(self, algo: AlgoName) -> tuple[dict[str, torch.Tensor], Facts]:
        """The weights and what is known of them.

        Raises:
            ConfigError: A file is damaged, or holds no weights.
        """
        checkpoint = read_checkpoint(self.weights)
        if self.plan is not None:
            return checkpoint.tensors, self._of_our_job(algo, self.plan)
        facts = self._told(checkpoint)
        shapes = shapes_as_ours(algo, checkpoint.tensors, facts.prefixes)
        try:
            network = network_file(algo).read_shapes(shapes)
        except (IndexError, KeyError):  # names of this network, but not all that it needs
            network = {}
        return checkpoint.tensors, facts.model_copy(update={"network": network})

    def _of_our_job(self, algo: AlgoName, paths: JobDir) -> Facts:
        try:
            plan = read_plan(paths)
            job = read_stored(paths.job, Job) if paths.job.exists() else None
        except WorkspaceError as error:
            raise ConfigError(error.messages) from None
        network = dict(plan.network) if plan.algo == algo else {}
        lesson = read_stored(paths.lesson, Lesson) if paths.lesson.exists() else None
        if lesson is not None:
            network.pop(DEEP_SUPERVISION, None)
        return Facts(
            kind=f"{plan.algo}_{plan.fold} of autoseg" if lesson is None else lesson.words,
            classes=tuple(c.name for c in plan.classes) if lesson is None else None,
            network=network,
            spacing_mm=plan.resample_resolution,
            channels=plan.channels,
            trained_on=_digests(job, "training case ", job.learned_from) if job else (),
            images_seen=lesson_digests(job) if job else (),
        )

    def _told(self, checkpoint: Checkpoint) -> Facts:
        """What a file of others says, itself or in a file beside it."""
        said = checkpoint.facts
        adaptation = said.get("nnssl_adaptation_plan")
        adaptation = json_object(adaptation) if isinstance(adaptation, str) else adaptation
        if self.adaptation is not None:
            adaptation = _read_json(self.adaptation)
        if isinstance(adaptation, Mapping):
            return Facts(kind="nnssl's pretraining", prefixes=_prefixes(adaptation))
        if isinstance(config := said.get("config"), Mapping):
            return Facts(
                kind="Auto3DSeg's",
                classes=_names(config.get("class_names")),
                spacing_mm=_triple(config.get("resample_resolution")),
            )
        if isinstance(started := said.get("init_args"), Mapping):
            labels = started.get("dataset_json")
            return Facts(
                kind="nnU-Net's", classes=_names(labels.get("labels") if isinstance(labels, Mapping) else None)
            )
        if self.bundle is not None:
            return Facts(kind="a MONAI bundle's", classes=_bundle_classes(_read_json(self.bundle)))
        return Facts()


def find_source(path: Path, algo: AlgoName) -> Source:
    """The weights that a path stands for.

    Args:
        path: a file, a folder of a job, a bundle or a work_dir.
        algo: the network that starts from them.

    Raises:
        ConfigError: There are none.
    """
    if not path.exists():
        raise ConfigError(f"init_weights: no such file or folder: {path}. Give a file of weights, or a work_dir.")
    if path.is_dir():
        return _in_folder(path, algo)
    home = path.parent.parent
    if path.parent.name == "models" and JobDir(home).plan.exists():
        return Source(weights=path, plan=JobDir(home))
    if path.parent.name == "models" and (home / "configs" / "metadata.json").exists():
        return Source(weights=path, bundle=home / "configs" / "metadata.json")
    beside = [folder / ADAPTATION_PLAN for folder in (path.parent, home)]
    return Source(weights=path, adaptation=next((file for file in beside if file.is_file()), None))


def _in_folder(path: Path, algo: AlgoName) -> Source:
    """The weights that a folder holds."""
    if (own := JobDir(path).weights) is not None:
        return find_source(own, algo)
    for inside in ("fold_all/checkpoint_final.pth", "checkpoint_final.pth"):
        if (path / inside).is_file():
            return find_source(path / inside, algo)
    try:
        place = Workspace(path).finished()
        done = [job for job in place.jobs() if job.algo == algo and place.job_dir(job.algo, job.fold).weights]
    except WorkspaceError as error:
        raise ConfigError(error.messages) from None
    if not done:
        place_inside = path / "work_dir"
        advice = "Give a file of weights, or name the network: init_weights: {NETWORK: FILE}."
        if place_inside.is_dir():
            advice = f"Give {place_inside}, which lies in it."
        raise ConfigError(
            f"init_weights: {path}: holds no weights of {algo}. Expected a work_dir with a trained {algo}, a job's "
            f"folder or a MONAI bundle. {advice}"
        )
    best = max(done, key=lambda job: (job.dice if job.dice is not None else -1.0, -job.fold))
    paths = place.job_dir(best.algo, best.fold)
    return Source(weights=paths.weights or paths.model, plan=paths)


def lesson_digests(job: Job) -> tuple[str, ...]:
    """The images that a job of pretraining, or what one of training started from, learned from without labels."""
    return _digests(job, ("training image ", "validation image "), job.images_seen)


def _digests(job: Job, begins: str | tuple[str, ...], noted: Sequence[str]) -> tuple[str, ...]:
    """Those of a job's inputs whose names begin so, and others."""
    return tuple(sorted({*noted, *(digest for name, digest in job.inputs.items() if name.startswith(begins))}))


def _read_json(path: Path) -> Any:
    """A JSON object beside weights.

    Raises:
        ConfigError: It is none.
    """
    try:
        with open_regular(path) as file:
            content = json_object(file.read(MOST_SIDECAR).decode())
    except (OSError, UnicodeDecodeError):
        content = None
    if content is None:
        raise ConfigError(f"{path}: cut off, damaged or no JSON object. Copy it again, or move it away.")
    return content


def json_object(text: str) -> dict[str, Any] | None:
    """The object that a text of JSON holds; None where it holds none."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _prefixes(adaptation: Mapping[str, Any]) -> dict[str, str]:
    """Which weights an adaptation plan says to take; its defaults are those of the residual-encoder U-Net."""
    given = {key: adaptation.get(key) for key in OUR_PREFIXES}
    return {name if isinstance(name := given[key], str) and name else ours: ours for key, ours in OUR_PREFIXES.items()}


def _names(value: Any) -> tuple[str, ...] | None:
    """Names of classes in the order of their values: a list, or a mapping name -> value or value -> name."""
    if isinstance(value, Mapping):
        pairs = [(k, v) if isinstance(v, str) else (v, k) for k, v in value.items()]
        try:
            value = [name for _, name in sorted((int(number), str(name)) for number, name in pairs)]
        except (TypeError, ValueError):  # regions, whose order of outputs is another's
            return None
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(n, str) for n in value):
        return None
    names = [cast(str, name) for name in value]
    return tuple(names[1:] if names[:1] and names[0].casefold() == BACKGROUND else names) or None


def _triple(value: Any) -> tuple[float, float, float] | None:
    try:
        x, y, z = (float(v) for v in value)
    except (TypeError, ValueError):
        return None
    return (x, y, z) if min(x, y, z) > 0 else None


def _bundle_classes(metadata: Any) -> tuple[str, ...] | None:
    """Names of a bundle's outputs. Source: MONAI's schema of metadata.json."""
    for key in ("network_data_format", "outputs", "pred", "channel_def"):
        metadata = metadata.get(key) if isinstance(metadata, Mapping) else None
    return _names(metadata)
