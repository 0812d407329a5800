"""The list of cases on disk: Auto3DSeg's datalist.json, read and written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from autoseg.config.fields import USUAL_NUM_FOLD
from autoseg.data.datalists import foreign, metadata
from autoseg.data.datalists.cases import Case, Completed, Datalist, case_digest
from autoseg.data.datalists.completed import read_completed
from autoseg.data.datalists.listfile import load_json
from autoseg.data.datalists.listreader import build_datalist
from autoseg.errors import ConfigError
from autoseg.workspace.files import write_json
from autoseg.workspace.workspace import Workspace

__all__ = ["Case", "Completed", "Datalist", "case_digest", "read_cases", "read_datalist", "write_datalist"]


def read_datalist(
    path: Path,
    dataroot: Path,
    *,
    num_fold: int = USUAL_NUM_FOLD,
    may_be_fewer: bool = False,
    seed: int = 0,
    extra_modalities: Sequence[str] = (),
    meta: Path | None = None,
    folds_by: str | None = None,
) -> Datalist:
    """Read a datalist.json, or the dataset.json of MSD or nnU-Net, strictly.

    Args:
        path: the file.
        dataroot: folder its paths are relative to.
        num_fold: folds made where the file has none; they are balanced over the cases' annotated classes.
        may_be_fewer: whether so many folds are not needed where there are fewer patients.
        seed: of those folds.
        extra_modalities: keys of a case's further images; they follow `image` as channels, in this order.
        meta: a table of further facts of the cases; see `metadata.add_table`.
        folds_by: a key of the cases, each value of which becomes a fold; instead of `num_fold`.

    Raises:
        ConfigError: The file or anything in it is wrong; all faults at once.
        DataError: The folder of an nnU-Net data set does not hold what its dataset.json says.
    """
    raw = load_json(path)
    root = Path(os.path.abspath(dataroot))
    if not root.is_dir():
        raise ConfigError(
            f"dataroot: {root} is not a folder. Expected the folder that the paths in {path.name} start from."
        )
    if foreign.is_nnunet(raw):
        raw = foreign.nnunet_to_plain(raw, root)
    elif foreign.is_msd(raw):
        raw = foreign.msd_to_plain(raw, root)
    datalist = build_datalist(
        raw,
        root,
        path=path,
        num_fold=None if folds_by else num_fold,
        may_be_fewer=may_be_fewer,
        seed=seed,
        extra_modalities=extra_modalities,
    )
    if meta is not None:
        datalist = metadata.add_table(datalist, meta, extra_modalities=extra_modalities)
    if folds_by is not None:
        datalist = replace(datalist, training=metadata.folds_by(datalist.training, folds_by, path=path))
    return datalist


def read_cases(workspace: Workspace, dataroot: Path) -> Datalist:
    """The cases of a run or of one of its rounds, with the labels that were completed for it.

    Raises:
        ConfigError: As `read_datalist`.
        WorkspaceError: The list of completed labels is damaged.
    """
    datalist = read_datalist(workspace.datalist, dataroot)
    if not workspace.completed.exists():
        return datalist
    completed = {
        name: Completed(
            label=workspace.completed.parent / item.file,
            annotated=item.annotated,
            weight=None if item.weight is None else workspace.completed.parent / item.weight,
        )
        for name, item in read_completed(workspace).items()
    }
    training = [replace(c, completed=completed.get(c.name)) for c in datalist.training]
    # A model must not learn from another scan of a patient that it is validated on.
    fold_of = {c.group: c.fold for c in datalist.training if c.group is not None}
    joined = [
        replace(c, completed=completed[c.name], fold=None if c.group is None else fold_of.get(c.group))
        for c in datalist.unlabeled
        if c.name in completed
    ]
    rest = tuple(c for c in datalist.unlabeled if c.name not in completed)
    return replace(datalist, training=(*training, *joined), unlabeled=rest)


def write_datalist(datalist: Datalist, path: Path, dataroot: Path, *, extra_modalities: Sequence[str] = ()) -> None:
    """Write a datalist.json that reads back as an equal Datalist; all of the file or nothing.

    Args:
        dataroot: the paths in the file are relative to it.
        extra_modalities: keys for the last images of each case; the first ones stay under `image`.

    Raises:
        ConfigError: An image lies outside dataroot.
    """
    root = Path(os.path.abspath(dataroot))

    def items(cases: Sequence[Case], *, with_fold: bool = True) -> list[dict[str, Any]]:
        return [_item(case, path, root, extra_modalities, with_fold=with_fold) for case in cases]

    data: dict[str, Any] = {}
    if datalist.channels:
        data["channel_names"] = list(datalist.channels)
    elif datalist.modality is not None:
        data["modality"] = datalist.modality
    if labels := _labels(datalist):
        data["labels"] = labels
    folds = {c.fold for c in datalist.training}
    if None in folds and len(folds) > 1:
        # The list named validation cases, which are fold 0 once read.
        data["training"] = items(datalist.train_cases(0), with_fold=False)
        data["validation"] = items(datalist.val_cases(0), with_fold=False)
    else:
        data["training"], data["validation"] = items(datalist.training), items(datalist.validation)
    data["testing"], data["unlabeled"] = items(datalist.testing), items(datalist.unlabeled)
    write_json(path, {k: v for k, v in data.items() if v != [] or k == "training"})


def _item(case: Case, path: Path, root: Path, extra_modalities: Sequence[str], *, with_fold: bool) -> dict[str, Any]:
    """A case as the file has it."""
    files = [_relative(image, path, root) for image in case.images]
    main = files[: len(files) - len(extra_modalities)]
    item: dict[str, Any] = {"image": main[0] if len(main) == 1 else main}
    item |= dict(zip(extra_modalities, files[len(main) :], strict=True))
    if case.label is not None:
        item["label"] = _relative(case.label, path, root)
    if with_fold and case.fold is not None:
        item["fold"] = case.fold
    if case.annotated is not None:
        item["annotated"] = list(case.annotated)
    if case.group is not None:
        item["group"] = case.group
    return {**item, **case.meta}


def _relative(file: Path, path: Path, root: Path) -> str:
    """A file's path as the list at `path` has it."""
    if not file.is_relative_to(root):
        raise ConfigError(
            f"{path}: {file} lies outside dataroot {root}. Give a folder that holds all images and labels."
        )
    return file.relative_to(root).as_posix()


def _labels(datalist: Datalist) -> dict[str, Any]:
    """The table of classes: value -> name; or name -> values, as nnU-Net has it, where that does not say all."""
    if not datalist.regions and datalist.ignore_label is None:
        return {str(value): name for value, name in datalist.labels.items()}
    named: dict[str, Any] = {"background": 0, **{name: value for value, name in datalist.labels.items()}}
    named |= {name: list(values) for name, values in datalist.regions.items()}
    return named if datalist.ignore_label is None else {**named, "ignore": datalist.ignore_label}
