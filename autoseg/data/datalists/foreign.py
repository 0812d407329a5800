"""Other tools' lists, turned into the plain content of a datalist.json.

Nothing is checked here beyond what is needed to understand the layout: datalist.py reads the result as strictly
as it reads a user's own list.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autoseg.data.datalists.channels import CHANNEL
from autoseg.data.datalists.listfile import Plain
from autoseg.data.formats.table import SUFFIXES, image_files, stem_of, suffix_of
from autoseg.errors import DataError, some_of


def is_nnunet(raw: Any) -> bool:
    """Whether a JSON file's content is nnU-Net v2's dataset.json."""
    return isinstance(raw, dict) and "channel_names" in raw and "labels" in raw and "training" not in raw


def is_msd(raw: Any) -> bool:
    """Whether a JSON file's content is a dataset.json of the Medical Segmentation Decathlon (or nnU-Net v1)."""
    return isinstance(raw, dict) and "training" in raw and (isinstance(raw.get("modality"), dict) or "test" in raw)


def msd_to_plain(raw: dict[str, Any], root: Path) -> Plain:
    """Convert an MSD dataset.json; its paths are relative to `root`.

    Entries for macOS's `._` files are dropped. Where an image is not there but files with nnU-Net v1's channel
    numbers are, those are taken.
    """

    def image(value: Any) -> Any:
        return _with_channels(root, value) if isinstance(value, str) else value

    def items(key: str) -> list[Any]:
        listed = raw.get(key, [])
        if not isinstance(listed, list):
            return listed
        cases = [{**i, "image": image(i.get("image"))} if isinstance(i, dict) else {"image": image(i)} for i in listed]
        return [i for i in cases if not (isinstance(i["image"], str) and Path(i["image"]).name.startswith("._"))]

    plain: Plain = {"training": items("training"), "testing": items("testing" if "testing" in raw else "test")}
    plain |= {k: items(k) for k in ("validation", "unlabeled") if k in raw}
    plain |= {k: raw[k] for k in ("labels", "modality") if k in raw}
    return plain


def _with_channels(root: Path, image: str) -> str | list[str]:
    path = root / image
    if path.exists() or not path.parent.is_dir():
        return image
    stem, suffix = stem_of(path), suffix_of(path)
    channels = [
        p for p in image_files(path.parent) if p.name[: -len(suffix)][:-5] == stem and CHANNEL.search(stem_of(p))
    ]
    return [str(Path(image).parent / p.name) for p in channels] or image


def nnunet_to_plain(raw: dict[str, Any], root: Path) -> Plain:
    """Convert an nnU-Net v2 raw data set: dataset.json, imagesTr with _0000 channels, labelsTr, imagesTs, labelsTs.

    Folds are taken from splits_final.json where it lies beside dataset.json.

    Raises:
        DataError: imagesTr or labelsTr is missing or has no file of the ending, a label has no image, or
            splits_final.json does not fit.
    """
    faults = [
        f"{root / 'dataset.json'}: {key}: {raw[key]!r}. Expected an object such as {example}."
        for key, example in (("channel_names", '{"0": "CT"}'), ("labels", '{"background": 0, "liver": 1}'))
        if not isinstance(raw[key], dict)
    ]
    if faults:
        raise DataError(faults)
    suffix = str(raw.get("file_ending", ".nii.gz"))
    num_channels = len(raw["channel_names"])
    plain: Plain = {"modality": raw["channel_names"], "labels": raw["labels"]}
    if isinstance(raw.get("dataset"), dict):
        listed = {str(k): v for k, v in raw["dataset"].items() if isinstance(v, dict)}
        plain["training"] = [{"image": v.get("images"), "label": v.get("label")} for v in listed.values()]
        names = list(listed)
    else:
        faults = [
            f"{root / name}: no such folder. Expected it in an nnU-Net raw data set."
            for name in ("imagesTr", "labelsTr")
            if not (root / name).is_dir()
        ]
        if faults:
            raise DataError(faults)
        if fault := _no_case(root / "imagesTr", "NAME_0000", suffix) or _no_case(root / "labelsTr", "NAME", suffix):
            raise DataError(fault)
        images = _by_case(root / "imagesTr", suffix)
        labels = {p.name[: -len(suffix)]: p for p in image_files(root / "labelsTr") if p.name.endswith(suffix)}
        if lost := sorted(set(labels) - set(images)):
            raise DataError(
                f"{root / 'labelsTr'}: no image {some_of(lost, most=5)} in imagesTr (expected NAME_0000{suffix})."
            )
        faults = [
            f"{root / 'imagesTr'}: {n} has {len(f)} channels. Expected {num_channels}, as in channel_names."
            for n, f in images.items()
            if len(f) != num_channels
        ]
        if faults:
            raise DataError(faults)
        names = sorted(labels)
        plain["training"] = [item_of(images[n], labels[n], root) for n in names]
        plain["unlabeled"] = [item_of(images[n], None, root) for n in sorted(set(images) - set(labels))]
    if (root / "imagesTs").is_dir():
        if image_files(root / "imagesTs") and (fault := _no_case(root / "imagesTs", "NAME_0000", suffix)):
            raise DataError(fault)
        tests = _by_case(root / "imagesTs", suffix)
        plain["testing"] = [_test_item(n, files, root / "labelsTs", suffix, root) for n, files in tests.items()]
    if (root / "splits_final.json").is_file():
        take_splits(plain, names, root / "splits_final.json")
    return plain


def _no_case(folder: Path, pattern: str, suffix: str) -> str:
    """Why a folder of a raw data set has no file with the ending of its dataset.json; empty where it has some."""
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    if suffix in SUFFIXES and any(name.endswith(suffix) for name in names):
        return ""
    found = f"found {some_of(names, most=3)}" if names else "the folder is empty"
    remedy = (
        "Correct file_ending in dataset.json, or the files' names."
        if suffix in SUFFIXES
        else f"autoseg does not read {suffix}: convert images and labels to {SUFFIXES[0]}, and file_ending with them."
    )
    return f"{folder}: no case: looked for {pattern}{suffix} (file_ending in dataset.json), {found}. {remedy}"


def _by_case(folder: Path, suffix: str) -> dict[str, list[Path]]:
    """Name -> its channels, from files NAME_0000.nii.gz, NAME_0001.nii.gz, ..."""
    by_case: dict[str, list[Path]] = {}
    for path in image_files(folder):
        stem = path.name[: -len(suffix)]
        if path.name.endswith(suffix) and CHANNEL.search(stem):
            by_case.setdefault(stem[:-5], []).append(path)
    return by_case


def _test_item(name: str, images: Sequence[Path], labels: Path, suffix: str, root: Path) -> Plain:
    label = labels / f"{name}{suffix}"
    return item_of(images, label if label.is_file() else None, root)


def take_splits(plain: Plain, names: Sequence[str], path: Path) -> None:
    """Set the folds of nnU-Net's splits_final.json: a list of {train: [names], val: [names]}.

    Args:
        names: nnU-Net's, of each training case in the list.

    Raises:
        DataError: The file cannot be read, or does not put every training case into the val list of one fold.
    """
    try:
        splits = json.loads(path.read_text(encoding="utf-8-sig"))
        fold_of = {str(name): fold for fold, split in enumerate(splits) for name in split["val"]}
        num_val = sum(len(split["val"]) for split in splits)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Expected nnU-Net's splits_final.json.") from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{path}: not a list of {{train, val}} ({error!r}). Correct or remove it.") from None
    odd = sorted(set(fold_of) - set(names))
    rest = sorted(set(names) - set(fold_of))
    if odd or num_val != len(fold_of) or (rest and len(splits) != 1):
        why = (
            f"{some_of(odd, most=5)} not in the data set"
            if odd
            else f"{some_of(rest, most=5)} in no fold"
            if rest
            else "a case in two folds"
        )
        raise DataError(
            f"{path}: {why}. Expected every training case in the val list of one fold. Correct or remove the file."
        )
    if len(splits) == 1:
        pairs = list(zip(plain["training"], names, strict=True))
        plain["validation"] = [item for item, name in pairs if name in fold_of]
        plain["training"] = [item for item, name in pairs if name not in fold_of]
    else:
        plain["training"] = [i | {"fold": fold_of[n]} for i, n in zip(plain["training"], names, strict=True)]


def item_of(images: Sequence[Path], label: Path | None, root: Path) -> Plain:
    """A case of a list from its files and its label."""
    paths = [path.relative_to(root).as_posix() for path in images]
    item: Plain = {"image": paths if len(paths) > 1 else paths[0]}
    return item if label is None else item | {"label": label.relative_to(root).as_posix()}
