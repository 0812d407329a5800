"""Images beside their labels, turned into the plain content of a datalist.json: a folder for each case, a tree of BIDS,
or all files in one folder.

Names tell what a file is. A label's ends in a word such as seg, or it is a folder of masks. Several images of a case
are its channels where each case has them: they are called by what is left of their names once that of the case is cut.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from autoseg.data.datalists.channels import CHANNEL, CHANNEL_WORD, in_most, is_channel, name_channels, on_grid
from autoseg.data.datalists.foreign import item_of
from autoseg.data.datalists.groups import group_by_folder
from autoseg.data.datalists.listfile import Plain
from autoseg.data.datalists.names import IMAGE_BEGINNINGS, IMAGE_ENDINGS, base_of_label, is_label_name
from autoseg.data.formats.label_files import MASK_FOLDERS, masks_of
from autoseg.data.formats.table import image_files, stem_of, suffix_of
from autoseg.data.volumes import read_image
from autoseg.errors import DataError, counted, some_of

MOST_NAMED = 5
"""Files that a message names."""
SUBJECT = re.compile(r"(sub-[A-Za-z0-9]+(?:_ses-[A-Za-z0-9]+)?)_(.+)")
"""A name by BIDS: subject and session, then what the file is."""
NOT_RAW = frozenset(("derivatives", "sourcedata", "code"))
"""Folders of BIDS with images made of others; labels are there, too."""
PREDICTION = re.compile(r"(?:^|[_\-. ])(?:preds?|predictions?|probs?|softmax|uncertainty)$", re.IGNORECASE)
"""Names of files that models wrote."""
WEAK = re.compile(r"(?:lesions?|wmh|roi|truth|annotations?)$", re.IGNORECASE)
"""Words for a label that an image may be called by, too: it is one where a folder has a label of another name."""
NO_LABEL = re.compile(r"(?:(?:brain|skull|bet)[_\-. ]?(?:mask|msk|seg|segmentation)|probseg)$", re.IGNORECASE)
"""Names of masks that tools for brains leave, which are no label where there is another."""
NUM_LOOKED_AT = 2
"""Cases whose images are read, to see whether they look like labels."""
MOST_VALUES = 32
"""An image of so few values, all of them whole numbers, is taken for a label."""


@dataclass(slots=True)
class _Case:
    """The files of one case."""

    images: dict[str, Path] = field(default_factory=dict)
    """What is left of the file's name, in lower case -> the file."""
    labels: list[Path] = field(default_factory=list)
    dropped: list[Path] = field(default_factory=list)
    """Labels that are not taken."""
    is_rest: bool = False
    """Images without a label, beside or below some with one: films, other kinds of scans, masks of parts."""

    @property
    def files(self) -> list[Path]:
        return [*self.images.values(), *self.labels]


def beside_to_plain(root: Path) -> tuple[Plain, str, list[str]] | None:
    """Convert a folder of images beside their labels; cases without a label are unlabeled.

    Returns:
        The list, what the layout is, and notes for people; None where no image lies beside a label.

    Raises:
        DataError: Cases have several labels, or several images that are not called alike in all; one folder holds all
            cases; or the highest folders are shares of a data set.
    """
    every = [path for path in image_files(root, deep=True) if path.is_file()]
    files = [path for path in every if not PREDICTION.search(stem_of(path))]
    ways: tuple[tuple[str, Callable[[Path, Sequence[Path]], dict[str, _Case]]], ...] = (
        ("BIDS", _by_subject),
        ("folder of cases", _by_folder),
        ("folder of images beside labels", _in_one),
    )
    found = [(kind, way, way(root, files)) for kind, way in ways]
    kind, way, cases = max(found, key=lambda one: len(_labelled(one[2])))  # the first of those with as many
    labelled = _labelled(cases)
    if not labelled:
        return None
    if way is _by_folder:
        _refuse_one_folder(root, files)
    plain, notes = _to_plain(root, cases)
    if len(every) > len(files):
        notes.append(f"left out, called like predictions: {counted(len(every) - len(files), 'file')}.")
    if way is _by_folder:
        kind += " with masks" if any(case.labels[0].is_dir() for case in labelled) else " with labels"
        notes = [*_group(root, plain), *notes]
    return plain, kind, notes


def _labelled(cases: Mapping[str, _Case]) -> list[_Case]:
    return [case for case in cases.values() if case.labels and case.images]


def _refuse_one_folder(root: Path, files: Sequence[Path]) -> None:
    """Refuse a folder that holds all cases in one folder: patients' folders, or the files of several cases."""
    highest = {path.relative_to(root).parts[0] for path in files}
    several = len({path.parent for path in files}) > 1 or sum(map(_is_label, files)) > 1
    if len(highest) == 1 and several:
        raise DataError(f"{root}: all cases are in {highest.pop()}/. Give that folder, if those in it are patients.")


# -- the files of each case


def _by_subject(root: Path, files: Sequence[Path]) -> dict[str, _Case]:
    """By BIDS' subject and session, wherever files lie; none where most are not called so, or where names do not tell
    images or labels of one subject apart.
    """
    named = [(match, path) for path in files if (match := SUBJECT.fullmatch(stem_of(path)))]
    cases: defaultdict[str, _Case] = defaultdict(_Case)
    if 2 * len(named) <= len(files):
        return cases
    for match, path in named:
        if _is_label(path):
            cases[match[1]].labels.append(path)
        elif match[2].casefold() in cases[match[1]].images:
            return {}
        elif NOT_RAW.isdisjoint(path.relative_to(root).parts):
            cases[match[1]].images[match[2].casefold()] = path
    if any(len([p for p in case.labels if not _is_of_head(p)]) > 1 for case in cases.values()):
        return {}
    return cases


def _by_folder(root: Path, files: Sequence[Path]) -> dict[str, _Case]:
    """By folder, at any depth."""
    folders: defaultdict[Path, list[Path]] = defaultdict(list)
    for path in files:
        if path.parent != root:
            folders[path.parent].append(path)
    masks = {
        folder / name: folder
        for folder in list(folders)
        for name in MASK_FOLDERS
        if folder / name in folders and masks_of(folder / name)
    }
    cases: dict[str, _Case] = {}
    for folder, paths in folders.items():
        if folder in masks:
            continue
        where = folder.relative_to(root).as_posix()
        called = _called(paths)
        labels = [path for name, path in called.items() if _is_label(path) or is_label_name(name)]
        if len(labels) == len(called) > 1:
            labels = [path for path in labels if not WEAK.search(stem_of(path))] or labels
        images = {name: path for name, path in called.items() if path not in labels}
        inside = [mask for mask, owner in masks.items() if owner == folder][:1]
        cases |= {where: _Case(images, inside, labels)} if inside else _in_folder(where, images, labels)
    labelled = {where for where, case in cases.items() if case.labels and case.images}
    for where, case in cases.items():
        case.is_rest |= not case.labels and not labelled.isdisjoint(map(str, Path(where).parents))
    return cases


def _in_folder(where: str, images: dict[str, Path], labels: list[Path]) -> dict[str, _Case]:
    """The cases of a folder: one with all its images, or one for each label that is called like an image."""
    if len(labels) == 1 and (len(images) == 1 or all(map(is_channel, images))):
        return {where: _Case(images, labels)}
    stems = {stem_of(path): path for path in images.values()}
    pairs = {base: label for label in labels if (base := base_of_label(stem_of(label))) in stems}
    if labels and len(pairs) == len(labels):  # patient001_frame01 and patient001_frame01_gt
        cases = {f"{where}/{base}": _Case({"": stems[base]}, [label]) for base, label in pairs.items()}
        rest = {name: path for name, path in images.items() if stem_of(path) not in pairs}
        return cases | ({where: _Case(rest, is_rest=True)} if rest else {})
    return {where: _Case(images, labels)}


def _in_one(root: Path, files: Sequence[Path]) -> dict[str, _Case]:
    """By what names of one folder's files share, less words for labels, images and channels at their ends."""
    own = [path for path in files if path.parent == root]
    cases: defaultdict[str, _Case] = defaultdict(_Case)
    for path in own:
        if _is_label(path):
            cases[base_of_label(stem_of(path)).casefold()].labels.append(path)
    images = [path for path in own if not _is_label(path)]
    in_pairs = any(stem_of(path).casefold() in cases for path in images)  # case_0007 is no eighth channel then
    labelled = set(cases)
    for path in images:
        stem = stem_of(path)
        word = next((m for pattern in (CHANNEL, CHANNEL_WORD) if (m := pattern.search(stem)) and not in_pairs), None)
        base, name = (stem[: word.start()], word.group().strip("_-. ")) if word else (stem, "")
        if not word and base.casefold() not in labelled:
            base = re.sub(f"{IMAGE_ENDINGS}|{IMAGE_BEGINNINGS}", "", stem, flags=re.IGNORECASE) or stem
        of_case = cases[base.casefold()].images
        of_case[path.name if name.casefold() in of_case else name.casefold()] = path
    with_word = {base: CHANNEL_WORD.sub("", base) for base in cases if CHANNEL_WORD.search(base)}
    wholes = {whole for base, whole in with_word.items() if base in labelled}
    for base, case in cases.items():  # where p1_ct has a label, p1_pet is no case of its own
        case.is_rest = not case.labels and with_word.get(base) in wholes
    return cases


def _is_label(path: Path) -> bool:
    """Whether a file is called like a label."""
    return is_label_name(stem_of(path)) or "seg" in suffix_of(path).split(".")


def _is_of_head(label: Path) -> bool:
    """Whether a label is called like a mask of the brain."""
    return NO_LABEL.search(stem_of(label)) is not None


def _called(paths: Sequence[Path]) -> dict[str, Path]:
    """What is left of a folder's names, in lower case, without what all of them share at both ends."""
    stems = [stem_of(path) for path in paths]
    if len(stems) == 1:
        return {stems[0].casefold(): paths[0]}
    start = re.match(r"(.*[_\-. ])?", os.path.commonprefix(stems))
    begin = len(start.group()) if start else 0
    ending = os.path.commonprefix([stem[begin:][::-1] for stem in stems])[::-1]
    shared = re.search(r"[_\-. ].*", ending)
    stop = len(shared.group()) if shared else 0
    names = [stem[begin : len(stem) - stop].casefold() for stem in stems]
    counts = Counter(names)
    return {n if counts[n] == 1 else path.name: path for n, path in zip(names, paths, strict=True)}


# -- the list


def _to_plain(root: Path, cases: Mapping[str, _Case]) -> tuple[Plain, list[str]]:
    """The list of the cases, and what was left out."""
    for case in cases.values():
        if len(case.labels) > 1:
            kept = [p for p in case.labels if not _is_of_head(p)] or case.labels
            case.labels, case.dropped = kept, [p for p in case.labels if p not in kept]
    labelled = _labelled(cases)
    notes: list[str] = []
    names = _channels(labelled, notes)
    _refuse_several(root, cases, names)
    are_paired = any(case.is_rest for case in cases.values())
    _refuse_masks([c for c in labelled if are_paired or len(c.images) > 1 or _is_of_head(c.labels[0])][:NUM_LOOKED_AT])
    plain: Plain = {"training": [], "unlabeled": []}
    if names:
        names = _without_labels(names, labelled, notes)
        names = on_grid(root, names, [(case.images, case.labels[0]) for case in labelled], notes)
        one = f"of several images of each case, {names[0]} is taken (`image` in datalist.json)."
        notes.insert(0, name_channels(plain, names) if len(names) > 1 else one)
    left_out = _list(root, cases, names, plain)
    return plain, [*notes, *_told(root, cases, names, left_out)]


def _told(root: Path, cases: Mapping[str, _Case], names: Sequence[str], left_out: Sequence[str]) -> list[str]:
    """What was left out."""
    notes = []
    if dropped := [path.relative_to(root).as_posix() for case in cases.values() for path in case.dropped]:
        notes.append(f"left out, labels beside others, such as masks of the brain: {some_of(dropped, MOST_NAMED)}.")
    if rest := [path.relative_to(root).as_posix() for case in cases.values() if case.is_rest for path in case.files]:
        notes.append(f"left out, images without a label, beside or below some with one: {some_of(rest, MOST_NAMED)}.")
    if left_out:
        lack = f"cases without all channels ({', '.join(names)})" if names else "folders of several images"
        notes.append(f"left out, {lack}, or of labels alone: {some_of(left_out, MOST_NAMED)}.")
    return notes


def _list(root: Path, cases: Mapping[str, _Case], names: Sequence[str], plain: Plain) -> list[str]:
    """Write the cases into the list.

    Returns:
        Those that have no image, several that are no channels, or not all channels.
    """
    left_out = []
    for where, case in cases.items():
        images = list(case.images.values()) if not names else [case.images[n] for n in names if n in case.images]
        if case.is_rest:
            continue
        if len(images) != max(1, len(names)):
            left_out.append(where)
            continue
        label = next(iter(case.labels), None)
        plain["training" if label else "unlabeled"].append(item_of(images, label, root))
    return left_out


def _refuse_several(root: Path, cases: Mapping[str, _Case], names: Sequence[str]) -> None:
    """Refuse cases of several labels, or of several images that are no channels."""
    several = [
        f"{where}/ ({some_of((p.name for p in case.files), 4)})"
        for where, case in cases.items()
        if case.labels and case.images and (len(case.labels) > 1 or (not names and len(case.images) > 1))
    ]
    if several:
        raise DataError(
            f"{root}: more than one image or label of a case: {some_of(several, 3)}. Expected one label, and one image "
            "or images that are called alike in all cases, such as t1 and flair. Put masks of one case into a folder "
            "masks/; list other cases in a datalist.json."
        )


def _refuse_masks(labelled: Sequence[_Case]) -> None:
    """Refuse cases of which every image looks like a label, as liver has where liver_mask lies beside it and a ct."""
    for case in labelled:
        image = next(iter(case.images.values()))
        if all(map(_looks_like_label, case.images.values())):
            raise DataError(
                f"{image}: its label would be {case.labels[0].name}, by its name, but it looks like a label itself: it "
                "holds few whole numbers. List the cases in a datalist.json."
            )


def _channels(labelled: Sequence[_Case], notes: list[str]) -> list[str]:
    """What the images are called that nearly all labelled cases have; none where most have a single image."""
    if 2 * sum(len(case.images) == 1 for case in labelled) > len(labelled):
        return []
    counts = Counter(name for case in labelled for name in case.images)
    common = in_most([case.images for case in labelled])
    rare = [f"{name} ({counted(count, 'case')})" for name, count in sorted(counts.items()) if name not in common]
    if common and rare:
        notes.append(f"left out, images that not all cases have: {some_of(rare, MOST_NAMED)}.")
    # T1_brain and T1_bias are made of T1.
    taken = [n for n in common if is_channel(n) or not any(n.startswith(f"{other}_") for other in common)]
    if len(known := [name for name in taken if is_channel(name)]) > 1:
        taken = known
    if others := [name for name in common if name not in taken]:
        listed = some_of(others, MOST_NAMED)
        notes.append(f"left out, images of no known kind: {listed}. To learn from them, list them in datalist.json.")
    return taken


def _without_labels(names: Sequence[str], labelled: Sequence[_Case], notes: list[str]) -> list[str]:
    """The channels but for those, of no known word, that look like labels: they would give the answer away."""
    unknown = [name for name in names if not is_channel(name)]
    looks = [
        name
        for name in unknown
        if any(_looks_like_label(c.images[name]) for c in labelled[:NUM_LOOKED_AT] if name in c.images)
    ]
    if not looks or len(looks) == len(names):
        return list(names)
    notes.append(
        f"left out, images that hold few whole numbers, as labels do: {some_of(looks, MOST_NAMED)}. If they are masks "
        "of classes, put all of a case into a folder masks/."
    )
    return [name for name in names if name not in looks]


def _looks_like_label(path: Path) -> bool:
    """Whether an image has few values, all of them whole numbers; not where it cannot be read."""
    try:
        values = np.unique(read_image((path,)).array)
    except (DataError, OSError):
        return False
    return len(values) <= MOST_VALUES and bool((values == np.round(values)).all())


def _group(root: Path, plain: Plain) -> list[str]:
    """Give cases of one highest folder their group."""
    items = [*plain["training"], *plain["unlabeled"]]
    first = [item["image"] if isinstance(item["image"], str) else item["image"][0] for item in items]
    return group_by_folder(root, items, [Path(path).parts[0] for path in first])
