"""Reading input.yaml, a file of settings and the command line into `Settings`."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from autoseg.config.docs import setting_docs
from autoseg.config.nodes import NULL_WORDS, json_for_yaml
from autoseg.config.passwords import TRACK_VARIABLE, take_password
from autoseg.config.reader import Origins, read_plain, read_value, read_with_origins
from autoseg.config.settings import PATHS, SQLITE, Settings, TrackSettings, map_store, map_weights
from autoseg.config.types import suggest
from autoseg.errors import ConfigError

logger = logging.getLogger(__name__)


AUTO3DSEG_WITHOUT_EFFECT: dict[str, str] = {
    "analyze": "a stage that is up to date is not redone anyway",
    "algo_gen": "a stage that is up to date is not redone anyway",
    "train": "a job that is done is not redone anyway",
    "hpo": "use `autoseg sweep`",
    "hpo_backend": "use `autoseg sweep`",
    "not_use_cache": "results are reused only while their inputs are unchanged; delete work_dir to start anew",
    "allow_skip": "failed jobs never stop the others",
    "templates_path_or_url": "the templates are part of the package",
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
AUTO3DSEG_TRACKING = {"mlflow_tracking_uri": "track.uri", "mlflow_experiment_name": "track.experiment"}
"""Keys of Auto3DSeg's input files for MLflow -> the settings that say the same here."""
BESIDE_TRACK = {key: f"track is set, which {name} belongs to" for key, name in AUTO3DSEG_TRACKING.items()}
"""Why they do nothing where the file has a block `track` of its own."""


def load_settings(path: Path, overrides: Mapping[str, str] | None = None) -> tuple[Settings, Origins]:
    """Read input.yaml and the settings given on the command line, which win.

    Args:
        path: input.yaml.
        overrides: Key, dotted inside a block (`segresnet.batch_size`) -> text, read as YAML.

    Returns:
        Settings with absolute paths, and the origin of each: `default`, `input.yaml:LINE` or `command line`.
        A path in the file is relative to the file's folder, one from the command line to the current folder.
        Passwords in `sweep.storage` and `track.uri` are moved into the environment, see `autoseg.config.passwords`.

    Raises:
        ConfigError: All that is wrong, one line each: unknown and repeated keys, types, ranges, missing files.
    """
    if not path.exists():
        advice = "Write one with `autoseg init DATA_FOLDER`, or name it with --input FILE."
        raise ConfigError(f"{path}: no such file. {advice}")
    settings, origins, warnings = read_with_origins(
        path, Settings, overrides, AUTO3DSEG_WITHOUT_EFFECT | BESIDE_TRACK, take_auto3dseg_tracking
    )
    places, faults = _places(path, settings, origins)
    if faults:
        raise ConfigError(faults)
    for warning in warnings:
        logger.warning(warning)
    if isinstance(settings.track, TrackSettings) and settings.track.uri is not None:
        places["track"] = places["track"].model_copy(update={"uri": take_password(places["track"].uri, TRACK_VARIABLE)})
    if settings.sweep.storage is not None:
        sweep = settings.sweep.model_copy(update={"storage": take_password(settings.sweep.storage)})
        settings = settings.model_copy(update={"sweep": sweep})
    return settings.model_copy(update=places), origins


def take_auto3dseg_tracking(root: yaml.MappingNode) -> None:
    """Put Auto3DSeg's keys for MLflow into the block `track`, unless there is one. Without an address they say nothing.

    MLflow has given up folders as stores, which Auto3DSeg's files may name: a database in the folder takes their place.
    """
    entries = {key.value: (key, value) for key, value in root.value if isinstance(key, yaml.ScalarNode)}
    uri, experiment = (entries.get(name) for name in AUTO3DSEG_TRACKING)
    if "track" in entries:  # beside it the reader warns of them
        return
    root.value = [(key, value) for key, value in root.value if str(key.value) not in AUTO3DSEG_TRACKING]
    if uri is None or uri[1].value in NULL_WORDS:
        return
    marks = uri[1].start_mark

    def text(value: str) -> yaml.ScalarNode:
        return yaml.ScalarNode("tag:yaml.org,2002:str", value, marks, marks, style="'")

    address = uri[1]
    if isinstance(address, yaml.ScalarNode) and "://" not in address.value and not address.value.startswith("$"):
        address = text(f"{SQLITE}{address.value}/mlflow.db")
    pairs = [(text("tool"), text("mlflow")), (text("uri"), address)]
    if experiment is not None:
        pairs.append((text("experiment"), experiment[1]))
    root.value.append((text("track"), yaml.MappingNode("tag:yaml.org,2002:map", pairs, marks, marks)))


def _places(path: Path, settings: Settings, origins: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """The settings that are paths, made absolute, and what is wrong with them."""
    faults = []

    def resolve(key: str, written: Path) -> tuple[Path, str, str]:
        """A path as it is meant, where it was given, and what it is relative to."""
        if origins[key] == "command line":
            base, name, where = Path.cwd(), "the current folder", f"--{key}"
        else:
            line = origins[key].rpartition(":")[2]
            base, name, where = path.absolute().parent, f"the folder of {path.name}", f"{path}:{line}: {key}"
        written = Path(os.path.expanduser(written))  # a ~ of a user without a home stays, and is not found
        looked = "" if written.is_absolute() else f" {written} is relative to {name}."
        return Path(os.path.normpath(base / written)), where, looked

    places: dict[str, Any] = {}
    for key, kind in zip(PATHS, ("file", "folder", "", "file"), strict=True):
        if getattr(settings, key) is None:
            continue
        places[key], where, looked = resolve(key, getattr(settings, key))
        resolved: Path = places[key]
        if kind and not resolved.exists():
            faults.append(f"{where}: no such {kind}: {resolved}.{looked}")
        elif key == "dataroot" and not resolved.is_dir():
            faults.append(f"{where}: expected a folder, found a file: {resolved}.{looked}")
        elif key == "work_dir" and resolved.exists() and not resolved.is_dir():
            faults.append(f"{where}: expected a folder, found a file: {resolved}. Give another work_dir.")

    def weights(written: Path) -> Path:
        resolved, where, looked = resolve("init_weights", written)
        if not resolved.exists():
            faults.append(f"{where}: no such file or folder: {resolved}.{looked}")
        return resolved

    places["init_weights"] = map_weights(settings.init_weights, weights)
    if isinstance(settings.track, TrackSettings):
        uri = map_store(settings.track.uri, lambda written: resolve("track", written)[0])
        places["track"] = settings.track.model_copy(update={"uri": uri})
    return places, faults


def read_settings_file(path: Path) -> dict[str, str]:
    """Read settings that stand in a file of their own, as if each were given on the command line.

    Returns:
        Key, dotted inside a block -> text.

    Raises:
        ConfigError: Every key that is no setting, and every value it cannot have.
    """
    docs = setting_docs()
    texts: dict[str, str] = {}
    faults = []
    for key, value in read_plain(path).items():
        inner = value if isinstance(value, dict) and key in {doc.block for doc in docs.values()} else None
        for name, item in (inner or {"": value}).items():
            whole = f"{key}.{name}" if inner else key
            texts[whole] = item if isinstance(item, str) else json_for_yaml(item)
            if whole not in docs:
                faults.append(f"{path}: {whole}: unknown setting. {suggest(whole, docs)}")
                continue
            try:
                read_value(whole, texts[whole], docs[whole].annotation)
            except ConfigError as error:
                faults += [f"{path}: {message.removeprefix('--')}" for message in error.messages]
    if faults:
        raise ConfigError(faults)
    return texts
