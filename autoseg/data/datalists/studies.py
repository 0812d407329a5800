"""A DICOM archive's folders of patients turned into the plain content of a datalist.json.

Pairs are made by what DICOM files say, not by names. Numbers of patients are compared as digests, and patients are
numbered anew where cases belong together: no list, log or report has one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from autoseg.data.datalists.listfile import Plain
from autoseg.data.formats.dicom_tree import Tree, TreeScan, label_path, read_tree
from autoseg.errors import DataError, some_of

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
