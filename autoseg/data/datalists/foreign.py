"""Other tools' lists and folders, turned into the plain content of a datalist.json.

Nothing is checked here beyond what is needed to understand the layout: datalist.py reads the result as strictly
as it reads a user's own list.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from autoseg.data.datalists.channels import CHANNEL_WORD, COMMON, channel_words, name_channels, on_grid, split_channel
from autoseg.data.datalists.groups import are_patients
from autoseg.data.datalists.listfile import load_json
from autoseg.data.formats.label_files import label_files
from autoseg.data.formats.table import (
    PATTERNS_TEXT,
    SUFFIXES,
    image_files,
    pictures_instead,
    stem_of,
    suffix_of,
    tell_left_out,
)
from autoseg.errors import DataError, some_of

Plain = dict[str, Any]
"""The content of a datalist.json; paths relative to the data root."""

CHANNEL = re.compile(r"_\d{4}$")
"""nnU-Net's channel number at the end of an image's stem."""

FOLDER_PAIRS = (
    ("imagesTr", "labelsTr"),
    ("images", "labels"),
    ("image", "label"),
    ("images", "masks"),
    ("image", "mask"),
    ("images", "segmentations"),
    ("imgs", "masks"),
    ("img", "mask"),
    ("img", "label"),
    ("imgs", "labels"),
    ("img", "seg"),
    ("volumes", "labels"),
    ("volumes", "segmentations"),
    ("scans", "labels"),
    ("scans", "masks"),
    ("images_structural", "images_segm"),
)
"""Names of the folders of images and labels that are recognised, case ignored."""
TEST_FOLDERS = (("imagesTs", "labelsTs"), ("imagesVa", "labelsVa"), ("imagesVal", "labelsVal"), ("test", ""))
"""Folders of images to predict, and of their labels where there are any."""
UNLABELED_FOLDERS = ("unlabeled", "unlabelled", "imagesUn")
SHARES = frozenset(("train", "training", "tr", "val", "valid", "validation", "va", "test", "testing", "ts"))
"""Names of folders that are a share of a data set, and no patient's."""

IMAGE_ENDINGS = r"[_\-. ]?(image|images|img|volume|scan|ct|mri|mr)$"
LABEL_ENDINGS = (
    r"[_\-. ]?(label|labels|labelmap|lbl|seg|segm|dseg|segmentation|segmentations|mask|masks|msk|gt|truth|groundtruth|"
    r"annotation|annotations|lesion|lesions|wmh|roi)$"
)


LABEL_BEGINNINGS = r"^(label|labels|seg|segmentation|mask|gt)[_\-. ]"
IMAGE_BEGINNINGS = r"^(image|img|volume|scan)[_\-. ]"


def is_label_name(name: str) -> bool:
    """Whether a file's name, or what is left of it, is that of a label."""
    return base_of_label(name) != name or re.fullmatch(LABEL_ENDINGS, name, re.IGNORECASE) is not None


def base_of_label(name: str) -> str:
    """A label's name less the word that says that it is one: 7 of 7_seg and of segmentation-7."""
    for pattern in (LABEL_ENDINGS, LABEL_BEGINNINGS):
        if (base := re.sub(pattern, "", name, flags=re.IGNORECASE)) != name and base:
            return base
    return name


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
        plain["training"] = [{"image": _relative(images[n], root), "label": _one(labels[n], root)} for n in names]
        plain["unlabeled"] = [{"image": _relative(images[n], root)} for n in sorted(set(images) - set(labels))]
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
    return {"image": _relative(images, root)} | ({"label": _one(label, root)} if label.is_file() else {})


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


def pairs_to_plain(root: Path) -> tuple[Plain, str, list[str]] | None:
    """Convert a pair of folders, such as images/ and labels/, with files in them or a folder for each patient.

    Returns:
        The list, the names of the two folders, and notes for people; None where there is no such pair.

    Raises:
        DataError: There is such a pair, but labels have no image, one of the folders is empty, or folders in it are
            parts of a data set.
    """
    folders = {p.name.lower(): p for p in sorted(root.iterdir()) if p.is_dir()}
    pair = next(((a, b) for a, b in FOLDER_PAIRS if a.lower() in folders and b.lower() in folders), None)
    if pair is None:
        return None
    images, labels = folders[pair[0].lower()], folders[pair[1].lower()]
    matched, rest, below = _match_all(images, labels) or _match_below(images, labels)
    listed = [*(files for files, _ in matched), *rest]
    highest = {files[0]: folder for files, folder in zip(listed, below, strict=False)}
    notes: list[str] = []
    matched, channels = _in_order(matched, labels, root, notes)
    rest = _of_channels(rest, channels, root, notes)
    below = [highest[first] for first in _firsts(matched, rest, highest)] if highest else []
    plain: Plain = {
        "training": _items(matched, root),
        "testing": [],
        "unlabeled": _items([(i, None) for i in rest], root),
    }
    groups = group_by_folder(images, [*plain["training"], *plain["unlabeled"]], below) if any(below) else []
    notes = [*groups, *([name_channels(plain, channels)] if len(channels) > 1 else []), *notes]
    plain |= _names_beside(labels)
    _add_others(plain, folders, root, channels, notes)
    return plain, f"{images.name}/ and {labels.name}/", notes


def _in_order(
    matched: Sequence[tuple[list[Path], Path]], labels: Path, root: Path, notes: list[str]
) -> tuple[list[tuple[list[Path], Path]], tuple[str, ...]]:
    """Cases with the channels that nearly all have, in one order, where their files are several.

    Returns:
        The cases, and the channels' words; none where each case has one file, or files with nnU-Net's numbers.

    Raises:
        DataError: A case has several files of which names do not tell the channel, or no channel is in most cases.
    """
    if not _have_words(matched):
        return list(matched), ()
    named = [{split[1]: p for p in files if (split := split_channel(p))} for files, _ in matched]
    counts = Counter(word for by_word in named for word in by_word)
    words = tuple(sorted(word for word, count in counts.items() if count >= COMMON * len(matched)))
    unclear = [one for one, by_word in zip(matched, named, strict=True) if 1 < len(one[0]) != len(by_word)]
    if unclear or not words:
        files, label = (unclear or [one for one in matched if len(one[0]) > 1])[0]
        raise DataError(
            f"{labels}: several images for {label.name}: {some_of((_one(p, root) for p in files), most=4)}. Expected "
            "one, or channels that all cases have, whose names end in words such as t1 and flair."
        )
    words = tuple(on_grid(root, words, [(n, label) for n, (_, label) in zip(named, matched, strict=True)], notes))
    kept, lost = [], []
    for by_word, (_, label) in zip(named, matched, strict=True):
        if by_word.keys() >= {*words}:
            kept.append(([by_word[w] for w in words], label))
        else:
            lost.append(_one(label, root))
    if lost:
        notes.append(f"left out, cases without all channels ({', '.join(words)}): {some_of(lost, most=5)}.")
    if rare := sorted(counts.keys() - {*words}):
        notes.append(f"left out, images that not all cases have, or of another grid: {some_of(rare, most=5)}.")
    return kept, words


def _have_words(matched: Sequence[tuple[list[Path], Path]]) -> bool:
    """Whether cases have several files, and not all of these nnU-Net's numbers."""
    return any(len(files) > 1 and not all(CHANNEL.search(stem_of(p)) for p in files) for files, _ in matched)


def _of_channels(
    images: Sequence[list[Path]], channels: Sequence[str], root: Path, notes: list[str]
) -> list[list[Path]]:
    """Images without a label that have all channels of training, in their order; all where it has no words for them."""
    if not channels:
        return list(images)
    named = [({split[1]: p for p in files if (split := split_channel(p))}, files) for files in images]
    kept = [[by_word[w] for w in channels] for by_word, _ in named if by_word.keys() >= {*channels}]
    lost = [_one(files[0], root) for by_word, files in named if not by_word.keys() >= {*channels}]
    if lost:
        notes.append(
            f"left out, images without a label that lack channels, or are no channel: {some_of(lost, most=5)}."
        )
    return kept


def _firsts(
    matched: Sequence[tuple[list[Path], Path]], rest: Sequence[list[Path]], highest: Mapping[Path, str]
) -> list[Path]:
    """Of each case a file whose folder is known."""
    return [next(p for p in sorted(highest) if p.parent == f[0].parent) for f in (*(i for i, _ in matched), *rest)]


def _add_others(
    plain: Plain, folders: Mapping[str, Path], root: Path, channels: Sequence[str], notes: list[str]
) -> None:
    """Add the cases of folders for testing and of those without labels.

    Args:
        folders: name in lower case -> folder.
        channels: words for those of training.
    """
    for image_name, label_name in TEST_FOLDERS:
        # What lies in folders of test/ may be labels, too.
        if (folder := folders.get(image_name.lower())) and image_files(folder, deep=bool(label_name)):
            answers = folders.get(label_name.lower())
            fit = answers if answers and _fit(folder, answers) else None
            pairs, alone, _ = _match_below(folder, fit, channels)
            labelled = {files[0]: label for files, label in pairs}
            of_all = _of_channels([*(i for i, _ in pairs), *alone], channels, root, notes)
            owners = {p: labelled.get(files[0]) for files in (*(i for i, _ in pairs), *alone) for p in files}
            plain["testing"] += _items([(files, owners[files[0]]) for files in of_all], root)
    for name in UNLABELED_FOLDERS:
        if folder := folders.get(name.lower()):
            of_all = _of_channels(_match_below(folder, None, channels)[1], channels, root, notes)
            plain["unlabeled"] += _items([(files, None) for files in of_all], root)


def _match_below(
    images: Path, labels: Path | None, channels: Sequence[str] | None = None
) -> tuple[list[tuple[list[Path], Path]], list[list[Path]], list[str]]:
    """`match_files` of two folders, or, where `images` holds none itself, of each folder below it and the one of the
    same name below `labels`.

    Returns:
        (files, label) of every label; the images without a label; and for each of these and those the highest
        folder below `images` that it lies in, none of them where `images` holds the files itself.

    Raises:
        DataError: As `match_files`; or folders do not have the same names.
    """
    places = [images] if image_files(images) else sorted({p.parent for p in image_files(images, deep=True)}) or [images]
    is_below = places != [images]
    matched: list[tuple[list[Path], Path]] = []
    rest: list[list[Path]] = []
    faults = _unlike(images, labels, places) if labels is not None and is_below else []
    for place in places:
        answers = labels / place.relative_to(images) if labels is not None else None
        if answers is None or (is_below and not _has_labels(answers)):
            rest += _grouped(place, channels)
            continue
        own, alone = image_files(place), label_files(answers)
        if is_below and len(alone) == 1 and (len(own) == 1 or channel_words([own])):  # image.nii.gz and label.nii.gz
            matched.append((own, alone[0]))
            continue
        try:
            pairs, without = match_files(place, answers)
        except DataError as error:
            faults += error.messages
        else:
            matched, rest = [*matched, *pairs], [*rest, *without]
    if faults:
        raise DataError(faults)
    listed = [*(i for i, _ in matched), *rest] if is_below else []
    return matched, rest, [i[0].relative_to(images).parts[0] for i in listed]


def _match_all(images: Path, labels: Path) -> tuple[list[tuple[list[Path], Path]], list[list[Path]], list[str]] | None:
    """As `_match_below`, of images in folders and labels in one, as PI-CAI has them; None where names do not tell."""
    below, own = image_files(images, deep=True), label_files(labels)
    if image_files(images) or not own or any(not p.is_file() for p in own):
        return None
    try:
        matched, rest = match_paths(images, labels, below, own)
    except DataError:
        return None
    return matched, rest, [i[0].relative_to(images).parts[0] for i in (*(i for i, _ in matched), *rest)]


def _fit(images: Path, labels: Path) -> bool:
    """Whether labels of test images lie as these do; they are optional."""
    if image_files(images):
        return bool(label_files(labels))
    return any(_has_labels(labels / p.parent.relative_to(images)) for p in image_files(images, deep=True))


def _has_labels(folder: Path) -> bool:
    return folder.is_dir() and bool(label_files(folder))


def _unlike(images: Path, labels: Path, places: Sequence[Path]) -> list[str]:
    """How the folders below two folders differ, where labels have no images, or none has labels."""
    below = dict.fromkeys(place.relative_to(images) for place in places)
    holding = sorted({p.parent.relative_to(labels) for p in image_files(labels, deep=True)} - {Path()})
    # A folder below that of an image may hold its masks.
    if lost := [path.as_posix() for path in holding if below.keys().isdisjoint((path, *path.parents))]:
        return [f"{labels}: no images in {images.name}/ for the folders {some_of(lost, most=5)}."]
    if any(_has_labels(labels / path) for path in below):
        return []
    first = next(iter(below)).as_posix()
    return [
        f"{images}: images lie in folders such as {first}/, and {labels.name}/{first}/ holds no label. "
        "Expected the same folders in both, or files in both."
    ]


def group_by_folder(root: Path, items: Sequence[Plain], folders: Sequence[str]) -> list[str]:
    """Give cases of one patient's folder their `group`, where folders hold several.

    Args:
        root: the folder that patients' folders lie in.
        items: cases of a list, which are changed.
        folders: name of the patient's folder of each.

    Returns:
        Notes for people: what was done, or why folders are not taken for patients.

    Raises:
        DataError: Folders are shares of a data set, such as train/.
    """
    counts = Counter(folders)
    if shares := sorted(name for name in counts if name.lower() in SHARES):
        raise DataError(
            f"{root}: the folders {some_of((f'{n}/' for n in shares), most=5)} look like shares of a data set, not "
            "like patients. List the cases in a datalist.json, with the keys `validation` and `testing`."
        )
    example, most = counts.most_common(1)[0]
    if most == 1:
        return []
    if not are_patients(counts):
        return [
            f"the folders {some_of((f'{name}/' for name in counts), most=3)} are not taken for patients, by their "
            "names or since they hold many cases each. If they are, give their cases a `group` in datalist.json."
        ]
    for item, folder in zip(items, folders, strict=True):
        item["group"] = folder
    return [
        f"{len(items)} cases lie in the folders of {len(counts)} patients, such as {most} in {example}/: no fold "
        "splits one (`group` in datalist.json). Remove `group` and `fold` there if each case stands alone."
    ]


def _items(pairs: Sequence[tuple[list[Path], Path | None]], root: Path) -> list[Plain]:
    """Cases of a list from their channels and label."""
    return [
        {"image": _relative(images, root)} | ({} if label is None else {"label": _one(label, root)})
        for images, label in pairs
    ]


def _names_beside(labels: Path) -> Plain:
    """`labels` of a list where labels.json is what `autoseg merge_masks` writes, {"1": "liver"}; else nothing."""
    path = labels / "labels.json"
    raw = load_json(path) if path.is_file() else None
    if not isinstance(raw, dict) or not all(key.isdecimal() and isinstance(name, str) for key, name in raw.items()):
        return {}
    return {"labels": raw} if raw else {}


def match_files(images: Path, labels: Path) -> tuple[list[tuple[list[Path], Path]], list[list[Path]]]:
    """Find the image of every label by its name.

    Tried in turn, and the way that finds most is taken: the same name; the label's name and a channel number
    (_0000, _0001, ...); the same name but for endings such as _image and _label, or a channel's word such as _t1; the
    same name but for a beginning that all images, or all labels, share (img0001 and label0001).

    Returns:
        (channels, label) of every label by name, and the images without a label.

    Raises:
        DataError: A folder is empty, or a label's image was not found or is not the only one.
    """
    image_paths, label_paths = image_files(images), label_files(labels)
    if faults := [
        f"{f}: no image files ({PATTERNS_TEXT}).{pictures_instead(f)}"
        for f, p in ((images, image_paths), (labels, label_paths))
        if not p
    ]:
        raise DataError(faults)
    tell_left_out(images, image_paths)
    tell_left_out(labels, label_paths)
    return match_paths(images, labels, image_paths, label_paths)


def match_paths(
    images: Path, labels: Path, image_paths: Sequence[Path], label_paths: Sequence[Path]
) -> tuple[list[tuple[list[Path], Path]], list[list[Path]]]:
    """As `match_files`, of files that are known."""
    image_start = _shared_start([stem_of(p) for p in image_paths])
    label_start = _shared_start([stem_of(p) for p in label_paths])
    ways: list[tuple[Callable[[str], str], Callable[[str], str], bool]] = [
        (lambda s: s, lambda s: s, False),
        (lambda s: CHANNEL.sub("", s), lambda s: s, True),
        (lambda s: _without(IMAGE_ENDINGS, CHANNEL.sub("", s)), lambda s: _without(LABEL_ENDINGS, s), True),
        (lambda s: CHANNEL_WORD.sub("", s), lambda s: _without(LABEL_ENDINGS, s), True),
        (
            lambda s: _without(IMAGE_ENDINGS, s[len(image_start) :]).lower(),
            lambda s: _without(LABEL_ENDINGS, s[len(label_start) :]).lower(),
            False,
        ),
    ]
    best: tuple[dict[str, list[Path]], dict[str, list[Path]]] | None = None
    most = (-1, -1)
    for image_key, label_key, has_channels in ways:
        by_image, by_label = _keyed(image_paths, image_key), _keyed(label_paths, label_key)
        if not has_channels and any(len(v) > 1 for v in by_image.values()):
            continue
        if any(len(v) > 1 for v in by_label.values()):
            continue
        both = set(by_image) & set(by_label)
        if (num := (len(both), sum(len(by_image[key]) for key in both))) > most:
            most, best = num, (by_image, by_label)
    assert best is not None, "file names differ, so the first way is always possible"
    by_image, by_label = best
    if lost := [by_label[k][0].name for k in sorted(set(by_label) - set(by_image))]:
        raise DataError(
            f"{labels}: no image in {images.name}/ for {some_of(lost, most=5)}. Expected the same file name in both, "
            f"but for endings such as _image and _seg; found images such as {image_paths[0].name}."
        )
    matched = [(by_image[k], by_label[k][0]) for k in sorted(by_label)]
    return matched, [by_image[k] for k in sorted(set(by_image) - set(by_label))]


def _grouped(folder: Path, words: Sequence[str] | None) -> list[list[Path]]:
    """The images of a folder, files that differ by a channel's number or word alone taken together.

    Args:
        words: of training, which alone count; None: all that are known.
    """
    paths = image_files(folder)
    by_base = _keyed(paths, partial(CHANNEL.sub, ""))
    # Numbers such as case_0000, case_0001, case_0017 are cases; channels start from 0000 everywhere and are few.
    channels = {tuple(stem_of(p)[-5:] for p in group) for group in by_base.values()}
    if len(channels) == 1 and len(by_base) > 1 and all(CHANNEL.search(stem_of(p)) for p in paths):
        return list(by_base.values())
    groups: dict[str, list[Path]] = {}
    for path in paths:
        split = split_channel(path)
        is_one = split is not None and (words is None or split[1] in words)
        groups.setdefault(f"{split[0]} " if split and is_one else path.name, []).append(path)
    return list(groups.values())


def _keyed(paths: Sequence[Path], key: Callable[[str], str]) -> dict[str, list[Path]]:
    by_key: dict[str, list[Path]] = {}
    for path in paths:
        by_key.setdefault(key(stem_of(path)), []).append(path)
    return by_key


def _shared_start(stems: Sequence[str]) -> str:
    """The beginning all stems share, up to the first digit."""
    match = re.match(r"\D*", os.path.commonprefix(list(stems)))
    return match.group() if match and len(stems) > 1 else ""


def _without(ending: str, stem: str) -> str:
    return re.sub(ending, "", stem, flags=re.IGNORECASE) or stem


def _one(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _relative(paths: Sequence[Path], root: Path) -> str | list[str]:
    relative = [_one(p, root) for p in paths]
    return relative[0] if len(relative) == 1 else relative
