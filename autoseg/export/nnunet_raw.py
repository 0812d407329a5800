"""A raw data set of nnU-Net v2, with this run's folds, so that both can be compared on equal ones.

nnU-Net wants a file for each channel, all on one grid, and label values 0, 1, 2, ... without gaps. Regions keep their
sets of values; the value to ignore becomes the last one. What a case was not annotated for counts as background there.

Source: nnU-Net's documentation, dataset_format.md, region_based_training.md, ignore_label.md, manual_data_splits.md.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autoseg.data.datalists.cases import Case, Datalist, read_case_label
from autoseg.data.datalists.datalist import read_datalist
from autoseg.data.datalists.listfile import read_licence
from autoseg.data.formats.table import LABEL_SUFFIX
from autoseg.data.grid import Grid
from autoseg.data.labels import LabelMap
from autoseg.data.volumes import read_image, write_volume
from autoseg.errors import ConfigError, WorkspaceError, counted
from autoseg.export.source import ascii_words
from autoseg.export.targets import Request
from autoseg.inference.chosen import run_at
from autoseg.plan import read_plan
from autoseg.workspace.files import write_folder, write_json
from autoseg.workspace.settings import StoredSetting, read_any_settings
from autoseg.workspace.workspace import Workspace

log = logging.getLogger(__name__)

NUMBER = 900
"""Of a data set whose name has none; nnU-Net's own stop far below."""


def write(request: Request) -> list[Path]:
    """Write `Dataset900_<name>/`; all of it or nothing.

    Raises:
        ConfigError: The name is none of nnU-Net's, or the folder is there already.
        DataError: An image or a label cannot be read.
        WorkspaceError: The run has no list of cases or no plan yet.
    """
    run = run_at(request.workspace)
    workspace = run.finished()
    settings = read_any_settings(run)
    datalist = _cases(run, settings)
    label_map = _label_map(workspace)
    folder = request.folder / folder_name(request.name or str(_value(settings, "name") or "autoseg"))
    if folder.exists():
        raise ConfigError(f"--output: {folder} is there already. Remove it, or give another folder or --name.")
    with write_folder(folder) as part:
        _write_cases(part, datalist, label_map)
        write_json(part / "splits_final.json", splits_of(datalist.training))
        licence = read_licence(run.root / str(_value(settings, "datalist") or ""))
        write_json(
            part / "dataset.json", dataset_json(datalist, label_map, _channel_names(datalist, settings), licence)
        )
    return [folder]


def _value(settings: dict[str, StoredSetting], key: str) -> Any:
    return settings[key].value if key in settings else None


def _cases(run: Workspace, settings: dict[str, StoredSetting]) -> Datalist:
    if not run.datalist.exists():
        raise WorkspaceError(f"{run.datalist}: missing. Run `autoseg analyze` first; a packed model holds no cases.")
    return read_datalist(run.datalist, run.root / str(_value(settings, "dataroot") or "."))


def _label_map(workspace: Workspace) -> LabelMap:
    """The classes as the user named them, as every plan of the run has them."""
    names = workspace.job_names()
    if not names:
        raise WorkspaceError(
            f"{workspace.root}: no planned job, which knows the classes. Run `autoseg generate` first."
        )
    return read_plan(workspace.job_dir(*names[0])).label_map.named


def folder_name(name: str) -> str:
    """Name of a data set's folder, as nnU-Net looks for it.

    Raises:
        ConfigError: Nothing of the name can stand in one.
    """
    if whole := re.fullmatch(r"Dataset([0-9]{1,3})_([A-Za-z0-9_-]+)", name):
        return f"Dataset{int(whole[1]):03d}_{whole[2]}"  # nnU-Net finds those of three digits alone
    slug = ascii_words(name, "_")
    if not slug:
        raise ConfigError(f"--name: found {name!r}, expected letters and digits, or a whole name: Dataset123_Liver.")
    return f"Dataset{NUMBER:03d}_{slug}"


# -- cases


def _write_cases(folder: Path, datalist: Datalist, label_map: LabelMap) -> None:
    partial = sum(c.annotated is not None and {*c.annotated} != {*label_map.names} for c in datalist.training)
    if partial:
        some = counted(partial, "case is", "cases are")
        log.warning("%s annotated for some classes only; nnU-Net takes the others for background", some)
    table = value_table(label_map)
    for cases, images, labels in (
        ([c for c in datalist.training if c.label is not None], "imagesTr", "labelsTr"),
        ((*datalist.validation, *datalist.testing), "imagesTs", "labelsTs"),
    ):
        for number, case in enumerate(cases, 1):
            grid = _write_images(case, folder / images)
            if case.label is not None:
                _write_label(case, grid, folder / labels, table)
            log.info("%d/%d  %s -> %s", number, len(cases), case.name, images)


def _write_images(case: Case, folder: Path) -> Grid:
    """Write each channel of a case on the grid of its first file; returns that."""
    volume = read_image(case.images)
    for channel, values in enumerate(volume.array):
        write_volume(folder / f"{case.name}_{channel:04d}{LABEL_SUFFIX}", values, volume.grid)
    return volume.grid


def _write_label(case: Case, grid: Grid, folder: Path, table: np.ndarray) -> None:
    values = read_case_label(case).array[0]
    write_volume(folder / f"{case.name}{LABEL_SUFFIX}", table[values], grid)


def value_table(label_map: LabelMap) -> np.ndarray:
    """Value in a label file -> nnU-Net's; (65536,) uint8 or uint16. Values of no class are background."""
    table = np.zeros(65536, label_map.dtype)
    for value, new in _new_values(label_map).items():
        table[value] = new
    if label_map.ignore_label is not None:
        table[label_map.ignore_label] = max(_new_values(label_map).values()) + 1
    return table


def _new_values(label_map: LabelMap) -> dict[int, int]:
    """Value in a label file -> its value without gaps: the place of its class, or, of regions, among all values."""
    if not label_map.sigmoid:
        return {v: place for place, values in enumerate(label_map.values, 1) for v in values}
    return {v: place for place, v in enumerate(sorted({v for values in label_map.values for v in values} - {0}), 1)}


# -- what is said of them


def dataset_json(
    datalist: Datalist, label_map: LabelMap, channel_names: Sequence[str], licence: str = ""
) -> dict[str, Any]:
    """The content of dataset.json."""
    new = _new_values(label_map)
    labels: dict[str, Any] = {"background": 0}
    data: dict[str, Any] = {"channel_names": {str(c): name for c, name in enumerate(channel_names)}, "labels": labels}
    if label_map.sigmoid:
        # Of overlapping regions nnU-Net writes the later one's value, so the largest come first.
        for i in label_map.paint_order:
            labels[label_map.names[i]] = sorted(new[v] for v in label_map.values[i] if v)
        data["regions_class_order"] = [new[label_map.painted_values[i]] for i in label_map.paint_order]
    else:
        labels.update({name: place for place, name in enumerate(label_map.names, 1)})
    if label_map.ignore_label is not None:
        labels["ignore"] = max(new.values()) + 1
    data["numTraining"] = sum(case.label is not None for case in datalist.training)
    data["file_ending"] = LABEL_SUFFIX
    return data | ({"licence": licence} if licence else {})


def _channel_names(datalist: Datalist, settings: dict[str, StoredSetting]) -> list[str]:
    """A name for each channel; nnU-Net normalises one called CT as CT, and every other by its mean and deviation."""
    count = len(read_image(datalist.training[0].images).array)
    extra = _value(settings, "extra_modalities")
    kinds = [str(_value(settings, "modality") or "image")]
    if isinstance(extra, dict):
        kinds += ["CT" if str(kind).lower() == "ct" else str(name) for name, kind in extra.items()]
    kinds = [*datalist.channels] if len(datalist.channels) == count else kinds
    kinds = [*([kinds[0]] * (count - len(kinds))), *kinds][:count]
    return ["CT" if kind.upper() == "CT" else kind for kind in kinds]


def splits_of(cases: Sequence[Case]) -> list[dict[str, list[str]]]:
    """The content of splits_final.json: for each fold the names of the cases to learn from and to validate on."""
    named = [(case.name, case.fold) for case in cases if case.label is not None]
    folds = sorted({fold for _, fold in named if fold is not None})
    return [
        {"train": sorted(n for n, f in named if f != fold), "val": sorted(n for n, f in named if f == fold)}
        for fold in folds
    ]
