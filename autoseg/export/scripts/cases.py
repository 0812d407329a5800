"""Which files a bundle's workflows work on: folders as the Medical Segmentation Decathlon has them, or lists."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PATTERN = "*.nii.gz"
"""Of images in a folder; others are named in a list."""
CHANNEL = re.compile(r"_\d{4}(?=\.nii\.gz$)")
"""nnU-Net's number of a channel."""
HELD_OUT = 5
"""One case in so many is validated on, where nothing says which. Source: as five folds."""

Case = dict[str, Any]
Listed = Sequence[str | Sequence[str] | Mapping[str, Any]]


def images_in(folder: str | Path) -> list[str | list[str]]:
    """Images of a folder by name; files that differ by nnU-Net's number of the channel alone are one image."""
    groups: dict[str, list[str]] = {}
    for path in sorted(Path(folder).glob(PATTERN)):
        groups.setdefault(CHANNEL.sub("", path.name), []).append(str(path))
    return [files[0] if len(files) == 1 else files for files in groups.values()]


def inference_cases(
    dataset_dir: str, datalist: str | Listed | None = None, image_keys: Sequence[str] = ("image",)
) -> list[Case]:
    """The images to segment.

    Args:
        dataset_dir: images lie in its imagesTs, or in itself.
        datalist: instead, paths of images (a list of files where an image has several); or a JSON file, whose
            `testing` or `test` is taken, else all that it lists.
        image_keys: of a case in a JSON file that together are its channels.

    Raises:
        ValueError: There is no image.
    """
    if isinstance(datalist, str | Path):
        listed = _read(datalist)
        chosen = next((listed[key] for key in ("testing", "test") if listed.get(key)), None)
        items = chosen or [item for value in listed.values() if isinstance(value, list) for item in value]
        cases = [_case(item, dataset_dir, image_keys) for item in items if isinstance(item, str | dict)]
    elif datalist is not None:
        cases = [{"image": item["image"]} if isinstance(item, Mapping) else {"image": item} for item in datalist]
    else:
        folder = Path(dataset_dir, "imagesTs")
        cases = [{"image": image} for image in images_in(folder if folder.is_dir() else dataset_dir)]
    if not cases:
        raise ValueError(
            f"{datalist or dataset_dir}: no image. Give a folder of {PATTERN} files by --dataset_dir, or paths by "
            "--datalist."
        )
    return cases


def training_cases(
    dataset_dir: str,
    datalist: str | Listed | None = None,
    fold: int = 0,
    image_keys: Sequence[str] = ("image",),
) -> dict[str, list[Case]]:
    """The cases to train and to validate on, under `training` and `validation`.

    Args:
        dataset_dir: holds imagesTr and labelsTr, in which a case's files have one name but for a channel's number.
        datalist: instead, a JSON file whose `training` has an `image` and a `label` each, relative to dataset_dir, and
            a `fold`; or such a list itself.
        fold: is validated on, where cases have one; else the file's `validation`, else one case in five.
        image_keys: of a case in the list that together are its channels.

    Raises:
        ValueError: There is nothing to train or to validate on, or a label is missing.
    """
    listed: Mapping[str, Any] = {}
    if isinstance(datalist, str | Path):
        listed = _read(datalist)
        items = listed.get("training", [])
    elif datalist is not None:
        items = list(datalist)
    else:
        items = [
            {"image": image, "label": _label_of(image)} for image in images_in(Path(dataset_dir, "imagesTr").absolute())
        ]
    training = [item for item in items if item.get("fold") != fold]
    validation = [item for item in items if item.get("fold") == fold]
    if not validation:
        validation = [item for item in listed.get("validation", []) if isinstance(item, dict) and "label" in item]
    if not validation:
        training = [item for place, item in enumerate(items) if place % HELD_OUT != HELD_OUT - 1]
        validation = [item for place, item in enumerate(items) if place % HELD_OUT == HELD_OUT - 1] or items[-1:]
        training = [item for item in training if item not in validation]
    if not training or not validation:
        raise ValueError(
            f"{datalist or dataset_dir}: {len(training)} cases to train and {len(validation)} to validate on, fold "
            f"{fold}. Give a folder with imagesTr and labelsTr by --dataset_dir, or a datalist.json by --datalist."
        )
    cases = {
        name: [{**_case(item, dataset_dir, image_keys), "label": _in(dataset_dir, item["label"])} for item in part]
        for name, part in (("training", training), ("validation", validation))
    }
    for case in (*cases["training"], *cases["validation"]):
        if not Path(case["label"]).exists():
            raise ValueError(f"{case['label']}: the label of {case['image']} is missing.")
    return cases


def _read(path: str | Path) -> dict[str, Any]:
    with open(path, encoding="utf-8") as file:
        listed: dict[str, Any] = json.load(file)
    return listed


def _label_of(image: str | Sequence[str]) -> str:
    path = Path(image if isinstance(image, str) else image[0])
    return str(path.parent.parent / "labelsTr" / CHANNEL.sub("", path.name))


def _case(item: str | Mapping[str, Any], dataset_dir: str, image_keys: Sequence[str]) -> Case:
    if isinstance(item, str):
        return {"image": _in(dataset_dir, item)}
    files: list[str] = []
    for key in image_keys:
        files += [item[key]] if isinstance(item[key], str) else item[key]
    paths = [_in(dataset_dir, file) for file in files]
    return {"image": paths[0] if len(paths) == 1 else paths}


def _in(dataset_dir: str, path: str) -> str:
    """A path of a list, which starts from the data set's folder; one that is absolute stays."""
    return str(Path(dataset_dir, path))
