"""Folders of patients turned into the plain content of a datalist.json: DICOM from an archive, or images with masks
or labels.

Pairs are made by what DICOM files say, not by names. Numbers of patients are compared as digests, and patients are
numbered anew where cases belong together: no list, log or report has one.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from autoseg.data.datalists.foreign import LABEL_ENDINGS, Plain, group_by_folder
from autoseg.data.formats.dicom_tree import Tree, TreeScan, label_path, read_tree
from autoseg.data.formats.label_files import MASK_FOLDERS, masks_of
from autoseg.data.formats.table import image_files, stem_of
from autoseg.errors import DataError, some_of
from autoseg.workspace.files import subfolders

MOST_NAMED = 5
"""Files that a message names."""


def dicom_to_plain(root: Path) -> tuple[Plain, list[str]] | None:
    """Convert a folder of DICOM files of patients, with segmentations among them.

    Scans with a segmentation are for training; those of studies without any are unlabeled; others are left out.

    Returns:
        The list and notes for people; None where the folder holds no scan with a segmentation.

    Raises:
        DataError: Files are damaged, or several segmentations of a scan lie among others'.
    """
    tree = read_tree(root)
    if tree is None or not any(scan.labels for scan in tree.scans):
        return None
    faults = list(tree.faults)
    segmentations = [*tree.homeless, *(path for scan in tree.scans for path in scan.labels)]
    groups = _groups(tree)
    labelled = {scan.place.study for scan in tree.scans if scan.labels}
    plain: Plain = {"training": [], "unlabeled": []}
    beside = []
    for scan, group in zip(tree.scans, groups, strict=True):
        item: Plain = {"image": scan.path.relative_to(root).as_posix()} | ({"group": group} if group else {})
        if scan.labels:
            if (label := label_path(scan, segmentations)) is None:
                faults.append(
                    f"{scan.labels[0]}: one of {len(scan.labels)} segmentations of a scan, among other files. "
                    "Keep one, or put those of the scan into a folder of their own."
                )
                continue
            plain["training"].append(item | {"label": label.relative_to(root).as_posix()})
        elif scan.place.study in labelled:
            beside.append(scan)
        else:
            plain["unlabeled"].append(item)
    if faults:
        raise DataError(faults)
    return plain, _notes(root, tree, beside)


def _groups(tree: Tree) -> list[str | None]:
    """A number for each patient of several scans, or for each study where patients are not known; None for others."""
    known = {scan.place.patient for scan in tree.scans}
    studies = {scan.place.study for scan in tree.scans}
    # One number in all files of many studies is what anonymising leaves, and no patient.
    tells = len(known) > 1 or len(studies) == 1
    keys = [(scan.place.patient if tells else "") or scan.place.study for scan in tree.scans]
    counts = Counter(keys)
    numbers = {key: str(n) for n, key in enumerate((k for k in dict.fromkeys(keys) if counts[k] > 1), start=1)}
    return [numbers.get(key) if key else None for key in keys]


def _notes(root: Path, tree: Tree, beside: Sequence[TreeScan]) -> list[str]:
    """What was left out."""
    notes = []
    if beside:
        kinds = _counted([scan.modality for scan in beside])
        notes.append(f"left out, series of studies in which others have the segmentation: {kinds}.")
    if tree.homeless:
        names = some_of((path.relative_to(root).as_posix() for path in tree.homeless), MOST_NAMED)
        notes.append(f"left out, segmentations of scans that are not there: {names}.")
    if tree.left_out:
        notes.append(f"left out, no volumes: {_counted(tree.left_out)}.")
    return notes


def _counted(words: Sequence[str]) -> str:
    return ", ".join(f"{count} {word}" for word, count in sorted(Counter(words).items()))


def masks_to_plain(root: Path) -> tuple[Plain, list[str]] | None:
    """Convert a folder with a folder for each case: an image, and masks in a folder such as segmentations/.

    Cases without masks are unlabeled.

    Returns:
        The list and notes for people; None where no case has both.

    Raises:
        DataError: A case has several images beside its masks.
    """
    plain: Plain = {"training": [], "unlabeled": []}
    faults, left_out = [], []
    for case in subfolders(root):
        masks = next((case / name for name in MASK_FOLDERS if (case / name).is_dir() and masks_of(case / name)), None)
        images = [p for p in image_files(case) if p.parent == case and p.is_file()]
        if masks is not None and len(images) > 1:
            names = some_of((p.name for p in images), MOST_NAMED)
            faults.append(f"{case}: {len(images)} images beside {masks.name}/ ({names}). Expected one.")
        if len(images) == 1:
            item = {"image": images[0].relative_to(root).as_posix()}
            label = {} if masks is None else {"label": masks.relative_to(root).as_posix()}
            plain["unlabeled" if masks is None else "training"].append(item | label)
        elif masks is not None or images:
            left_out.append(case.name)
    if not plain["training"] and not faults:
        return None
    if faults:
        raise DataError(faults)
    listed = some_of(left_out, MOST_NAMED)
    return plain, [f"left out, folders with no image that is read, or several: {listed}."] if left_out else []


def labels_beside_to_plain(root: Path) -> tuple[Plain, list[str]] | None:
    """Convert folders, at any depth, that hold an image and its label each: p1/image.nii.gz and p1/label.nii.gz.

    A label's name ends in a word such as label, seg or mask. Where such folders lie in others, as p1/visit1 does, the
    highest is the patient. Folders of one image alone are unlabeled.

    Returns:
        The list and notes for people; None where no image lies beside a label.

    Raises:
        DataError: A folder holds several images or labels, one folder holds all cases, or the highest folders are
            shares of a data set.
    """
    plain: Plain = {"training": [], "unlabeled": []}
    several, left_out = [], []
    for folder, (images, labels) in _beside(root).items():
        if len(images) == 1 and not labels:
            plain["unlabeled"].append({"image": images[0].relative_to(root).as_posix()})
        elif len(images) == len(labels) == 1:
            image, label = (path.relative_to(root).as_posix() for path in (*images, *labels))
            plain["training"].append({"image": image, "label": label})
        elif images and labels:
            several.append(
                f"{folder.relative_to(root).as_posix()}/ ({some_of((p.name for p in (*images, *labels)), 4)})"
            )
        else:
            left_out.append(folder.relative_to(root).as_posix())
    if several:
        raise DataError(
            f"{root}: more than one image or label in {some_of(several, 3)}. Expected one of each in a folder. Put "
            "masks of one case into a folder masks/; list cases of several channels in a datalist.json."
        )
    if not plain["training"]:
        return None
    items = [*plain["training"], *plain["unlabeled"]]
    highest = [Path(item["image"]).parts[0] for item in items]
    if len(items) > 1 and len(set(highest)) == 1:
        raise DataError(f"{root}: all cases are in {highest[0]}/. Give that folder, if those in it are patients.")
    notes = group_by_folder(root, items, highest)
    if left_out:
        notes.append(f"left out, folders of several images, or of labels alone: {some_of(left_out, MOST_NAMED)}.")
    return plain, notes


def _beside(root: Path) -> dict[Path, tuple[list[Path], list[Path]]]:
    """The images and the labels, by their names, of each folder below one."""
    by_folder: defaultdict[Path, tuple[list[Path], list[Path]]] = defaultdict(lambda: ([], []))
    for path in image_files(root, deep=True):
        if path.is_file() and path.parent != root:
            is_label = re.search(LABEL_ENDINGS, stem_of(path), re.IGNORECASE) is not None
            by_folder[path.parent][is_label].append(path)
    return by_folder
