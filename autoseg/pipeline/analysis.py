"""What the analysis of a run is made from, and the cases as it settled them."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from autoseg.algos.inputs import run_label_map
from autoseg.config.settings import Settings
from autoseg.data.datalists.cases import Case, Datalist, case_digest
from autoseg.data.datalists.datalist import read_datalist
from autoseg.data.datalists.folds import deal_folds
from autoseg.data.fingerprint import Fingerprint
from autoseg.data.labels import LabelMap
from autoseg.errors import ConfigError, DataError, WorkspaceError, some_of
from autoseg.version import __version__
from autoseg.workspace.files import digest
from autoseg.workspace.stored import Stored, read_stored, write_stored
from autoseg.workspace.workspace import Workspace

ANALYSIS_KEYS = (
    "class_names",
    "sigmoid",
    "ignore_label",
    "partial_labels",
    "extra_modalities",
    "on_fault",
    "modality",
    "lateral_pairs",
)
"""Settings that the analysis depends on."""


def analysis_inputs(listed: Datalist, settings: Settings) -> dict[str, str]:
    """What the analysis is made from: name -> digest."""
    inputs = {key: digest(getattr(settings, key)) for key in ANALYSIS_KEYS}
    inputs["version of autoseg"] = __version__
    for case in listed.training:
        inputs[f"case {case.name}"] = digest([_content(case), case.fold, case.annotated, case.group])
    meta = [[c.name, dict(c.meta)] for c in listed.cases if c.meta]
    if meta:  # a run of a list without any is not done again
        inputs["further facts of the cases"] = digest(meta)
    inputs["testing, validation and unlabeled cases"] = digest(
        [[_content(c) for c in cases] for cases in (listed.testing, listed.validation, listed.unlabeled)]
    )
    return inputs


def _content(case: Case) -> str:
    """The case's identity, or why it has none: a file that cannot be read is a fault that the analysis names."""
    try:
        return case_digest(case)
    except OSError as error:
        return f"not readable: {error.strerror}"


def settled_cases(
    listed: Datalist, annotated: Mapping[str, tuple[str, ...]], settings: Settings, *, left_out: Collection[str] = ()
) -> Datalist:
    """The list with the classes that each case was annotated for, by the analysis; its folds balanced over them.

    Args:
        listed: the datalist as it was read.
        annotated: case -> classes; a case that is not there counts as annotated for all.
        left_out: cases with faults. Where a fold lost all of its cases by that, the folds are made anew.

    Raises:
        ConfigError: One patient is left.
        DataError: A fold of the user's own lost all of its cases.
    """
    kept = listed.without(left_out).changed(lambda case: replace(case, annotated=annotated.get(case.name)))
    folds_left = {c.fold for c in kept.training}
    lost = [fold for fold in range(listed.num_fold) if fold not in folds_left]
    if lost and not listed.folds_made:
        what = "validation" if listed.num_fold == 1 else f"fold {lost[0]}"
        names = [c.name for c in listed.training if c.fold == lost[0]]
        raise DataError(
            f"{settings.datalist.name}: {what} has no case left, since on_fault: skip leaves out {some_of(names)}. "
            "Mend one of its cases (on_fault: stop tells what is wrong with them), or leave the folds out of the list, "
            "so that they are made of what is left."
        )
    if listed.folds_made and (lost or settings.partial_labels == "infer"):  # when they were made, this was not known
        dealt = deal_folds(kept.training, num_fold=listed.num_fold, seed=settings.seed, may_be_fewer=True)
        kept = replace(kept, training=dealt)
    return kept


def run_cases(workspace: Workspace, settings: Settings) -> tuple[Datalist, LabelMap]:
    """The run's cases as the analysis settled them, and its classes as the user named them."""
    datalist = read_datalist(workspace.datalist, settings.dataroot)
    return datalist, run_label_map(settings, datalist, Fingerprint.read(workspace.datastats)).named


class DataMarker(Stored):
    """What stands in state/data.json: what tells one data set from another."""

    images: tuple[str, ...]
    """The first image of each training case, from dataroot."""


def _data_path(workspace: Workspace) -> Path:
    return workspace.root / "state" / "data.json"


def remember_data(workspace: Workspace, analyzed: Datalist, settings: Settings) -> None:
    """Store which data set the run belongs to."""
    write_stored(_data_path(workspace), DataMarker(images=tuple(sorted(_first_images(analyzed, settings)))))


def check_same_data(workspace: Workspace, listed: Datalist, settings: Settings) -> None:
    """Refuse a work_dir that holds the run of another data set.

    Raises:
        WorkspaceError: None of its training cases is in the list.
    """
    path = _data_path(workspace)
    if not path.exists():
        return
    known = set(read_stored(path, DataMarker).images)
    if known and not known & _first_images(listed, settings):
        raise WorkspaceError(
            f"{workspace.root}: this work_dir belongs to another data set ({len(known)} training cases, none "
            f"of them in {settings.datalist.name}). Set another work_dir, or delete this one."
        )


def check_num_fold(listed: Datalist, settings: Settings, origins: Mapping[str, str]) -> None:
    """Refuse a number of folds that was set for a list that has its own.

    Raises:
        ConfigError: They differ.
    """
    place = origins.get("num_fold", "default")
    if place != "default" and settings.folds_by is not None:
        raise ConfigError(
            f"{place}: num_fold: no effect together with folds_by: {settings.folds_by}, which makes "
            f"{listed.num_fold} folds. Leave one of the two out."
        )
    if place == "default" or listed.folds_made or settings.num_fold == listed.num_fold:
        return
    if listed.num_fold == 1:
        has, key = "validation cases in place of folds", "`validation`"
    else:
        has, key = f"{listed.num_fold} folds of its own", "each `fold`"
    raise ConfigError(
        f"{place}: num_fold: {settings.num_fold}, but {settings.datalist.name} has {has}. Leave num_fold out to use "
        f"these, or remove {key} from the list to have folds made."
    )


def _first_images(datalist: Datalist, settings: Settings) -> set[str]:
    """The first image of each training case, from dataroot: what tells one data set from another."""
    return {os.path.relpath(case.images[0], settings.dataroot) for case in datalist.training}
