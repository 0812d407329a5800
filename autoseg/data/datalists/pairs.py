"""A pair of folders, such as images/ and labels/, turned into the plain content of a datalist.json: the image, or the
channels, of each label are found by names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from autoseg.data.datalists.channels import (
    CHANNEL,
    CHANNEL_WORD,
    by_word,
    channel_words,
    in_most,
    name_channels,
    on_grid,
    split_channel,
)
from autoseg.data.datalists.foreign import item_of
from autoseg.data.datalists.groups import group_by_folder
from autoseg.data.datalists.listfile import Plain, load_json
from autoseg.data.datalists.names import IMAGE_ENDINGS, LABEL_ENDINGS
from autoseg.data.formats.label_files import label_files
from autoseg.data.formats.table import PATTERNS_TEXT, image_files, pictures_instead, stem_of, tell_left_out
from autoseg.errors import DataError, some_of

Pair = tuple[list[Path], Path | None]
"""The files of a case, and its label."""

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
    pairs = _match_all(images, labels) or _match_below(images, labels)
    notes: list[str] = []
    channels, others = _words_of(pairs, labels, root, notes)
    pairs = _with_channels(pairs, channels, root, notes)
    plain: Plain = {
        "training": [item_of(files, label, root) for files, label in pairs if label],
        "testing": [],
        "unlabeled": [item_of(files, None, root) for files, label in pairs if not label],
    }
    groups = []
    if not image_files(images):
        listed = sorted(pairs, key=_has_no_label)
        below = [files[0].relative_to(images).parts[0] for files, _ in listed]
        groups = group_by_folder(images, [*plain["training"], *plain["unlabeled"]], below)
    notes = [*groups, *([name_channels(plain, channels)] if len(channels) > 1 else []), *notes, *others]
    plain |= _names_beside(labels)
    _add_others(plain, folders, root, channels, notes)
    return plain, f"{images.name}/ and {labels.name}/", notes


def _has_no_label(pair: Pair) -> bool:
    return pair[1] is None


def _words_of(pairs: Sequence[Pair], labels: Path, root: Path, notes: list[str]) -> tuple[tuple[str, ...], list[str]]:
    """The words of the channels that nearly all labelled cases have, where their files are several.

    Returns:
        The words; none where each case has one file, or files with nnU-Net's numbers. And a note on other words.

    Raises:
        DataError: A case has several files of which names do not tell the channel, or no channel is in most cases.
    """
    matched = [(files, label) for files, label in pairs if label]
    if not _have_words(matched):
        return (), []
    named = [by_word(files) for files, _ in matched]
    words = in_most(named)
    unclear = [one for one, own in zip(matched, named, strict=True) if 1 < len(one[0]) != len(own)]
    if unclear or not words:
        files, label = (unclear or [one for one in matched if len(one[0]) > 1])[0]
        listed = some_of((p.relative_to(root).as_posix() for p in files), most=4)
        raise DataError(
            f"{labels}: several images for {label.name}: {listed}. Expected one, or channels that all cases have, "
            "whose names end in words such as t1 and flair."
        )
    words = on_grid(root, words, [(own, label) for own, (_, label) in zip(named, matched, strict=True)], notes)
    rare = some_of(sorted({word for own in named for word in own} - {*words}), most=5)
    return tuple(words), [f"left out, images that not all cases have, or of another grid: {rare}."] if rare else []


def _have_words(pairs: Sequence[tuple[list[Path], Path]]) -> bool:
    """Whether cases have several files, and not all of these nnU-Net's numbers."""
    return any(len(files) > 1 and not all(CHANNEL.search(stem_of(p)) for p in files) for files, _ in pairs)


def _with_channels(pairs: Sequence[Pair], words: Sequence[str], root: Path, notes: list[str]) -> list[Pair]:
    """The cases that have all channels, in their order; all as they are where training has no words for channels."""
    if not words:
        return list(pairs)
    kept: list[Pair] = []
    lost: dict[bool, list[str]] = {True: [], False: []}
    for files, label in pairs:
        own = by_word(files)
        if own.keys() >= {*words}:
            kept.append(([own[word] for word in words], label))
        else:
            lost[label is not None].append((label or files[0]).relative_to(root).as_posix())
    if lost[True]:
        notes.append(f"left out, cases without all channels ({', '.join(words)}): {some_of(lost[True], most=5)}.")
    if lost[False]:
        listed = some_of(lost[False], most=5)
        notes.append(f"left out, images without a label that lack channels, or are no channel: {listed}.")
    return kept


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
            pairs = _with_channels(_match_below(folder, fit, channels), channels, root, notes)
            plain["testing"] += [item_of(*pair, root) for pair in sorted(pairs, key=_has_no_label)]
    for name in UNLABELED_FOLDERS:
        if folder := folders.get(name.lower()):
            pairs = _with_channels(_match_below(folder, None, channels), channels, root, notes)
            plain["unlabeled"] += [item_of(*pair, root) for pair in pairs]


def _match_below(images: Path, labels: Path | None, words: Sequence[str] | None = None) -> list[Pair]:
    """`match_files` of two folders, or, where `images` holds none itself, of each folder below it and the one of the
    same name below `labels`.

    Args:
        words: as `_grouped` takes them.

    Raises:
        DataError: As `match_files`; or folders do not have the same names.
    """
    places = [images] if image_files(images) else sorted({p.parent for p in image_files(images, deep=True)}) or [images]
    is_below = places != [images]
    pairs: list[Pair] = []
    faults = _unlike(images, labels, places) if labels is not None and is_below else []
    for place in places:
        answers = labels / place.relative_to(images) if labels is not None else None
        if answers is None or (is_below and not _has_labels(answers)):
            pairs += [(files, None) for files in _grouped(place, words)]
            continue
        own, alone = image_files(place), label_files(answers)
        if is_below and len(alone) == 1 and (len(own) == 1 or channel_words([own])):  # image.nii.gz and label.nii.gz
            pairs.append((own, alone[0]))
            continue
        try:
            pairs += match_files(place, answers)
        except DataError as error:
            faults += error.messages
    if faults:
        raise DataError(faults)
    return pairs


def _match_all(images: Path, labels: Path) -> list[Pair]:
    """Images in folders and labels in one, as PI-CAI has them; nothing where names do not tell."""
    below, own = image_files(images, deep=True), label_files(labels)
    if image_files(images) or not own or any(not p.is_file() for p in own):
        return []
    try:
        return match_paths(images, labels, below, own)
    except DataError:
        return []


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


def _names_beside(labels: Path) -> Plain:
    """`labels` of a list where labels.json is what `autoseg merge_masks` writes, {"1": "liver"}; else nothing."""
    path = labels / "labels.json"
    raw = load_json(path) if path.is_file() else None
    if not isinstance(raw, dict) or not all(key.isdecimal() and isinstance(name, str) for key, name in raw.items()):
        return {}
    return {"labels": raw} if raw else {}


def match_files(images: Path, labels: Path) -> list[Pair]:
    """Find the image of every label by its name.

    Tried in turn, and the way that finds most is taken: the same name; the label's name and a channel number
    (_0000, _0001, ...); the same name but for endings such as _image and _label, or a channel's word such as _t1; the
    same name but for a beginning that all images, or all labels, share (img0001 and label0001).

    Returns:
        Every label with its files, by name; then the images without a label.

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


def match_paths(images: Path, labels: Path, image_paths: Sequence[Path], label_paths: Sequence[Path]) -> list[Pair]:
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
    rest = sorted(set(by_image) - set(by_label))
    return [*((by_image[k], by_label[k][0]) for k in sorted(by_label)), *((by_image[k], None) for k in rest)]


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
