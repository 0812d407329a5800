"""A folder of DICOM of many patients: its scans, and which segmentation belongs to which.

Files say it themselves, so that names of files and folders do not matter: a segmentation names the series that it was
drawn on; where that is not told, it belongs to the one scan of its patient's study in its frame of reference.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoseg.data.formats.dicom_files import (
    naming_damage,
    need_pydicom,
    patient_digests,
    read_fields,
    several,
    value_of,
)
from autoseg.data.formats.dicom_study import Group, dicom_files, stands_for, study_of
from autoseg.data.formats.stored import FileFaultError

PLACE_FIELDS = (
    *("StudyInstanceUID", "FrameOfReferenceUID"),
    *("ReferencedSeriesSequence", "ReferencedFrameOfReferenceSequence"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Whom and what a file is of; digests, to be compared only."""

    patient: str
    """Empty where it is not known."""
    study: str
    frame: str
    """The frame of reference."""
    series: frozenset[str]
    """UIDs of the series that it was drawn on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeScan:
    """A volume of the tree."""

    path: Path
    """What stands for it: its folder or a file."""
    place: Place
    modality: str
    labels: tuple[Path, ...]
    """Files of segmentations that belong to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """What a folder of DICOM holds."""

    scans: tuple[TreeScan, ...]
    """By their paths."""
    homeless: tuple[Path, ...]
    """Files of segmentations whose scan is not there, or not told."""
    left_out: tuple[str, ...]
    """Series that are no volumes, and files that are neither scan nor segmentation, in words."""
    faults: tuple[str, ...]
    """Damaged files, and series that nothing can stand for."""


def read_tree(root: Path) -> Tree | None:
    """Look through a folder with its subfolders; None where it holds no DICOM, or pydicom is missing."""
    paths = list(dicom_files(root))
    try:
        need_pydicom()
    except FileFaultError:
        return None
    if not paths:
        return None
    study = study_of(paths)
    volumes = [group for group in study.groups if group.is_volume]
    faults = [f"{path}: a damaged DICOM file. Copy it again, or remove it." for path in study.damaged]
    scans: dict[str, tuple[Group, Place]] = {}
    for number, group in enumerate(volumes):
        first = group.files[0]
        scans[first.series or str(number)] = (group, _place(first.path))
    labels: dict[str, list[Path]] = {}
    homeless = []
    for file in study.segmentations:
        if (series := _scan_of(_place(file.path), scans)) is None:
            homeless.append(file.path)
        else:
            labels.setdefault(series, []).append(file.path)
    listed = []
    for series, (group, place) in scans.items():
        path = stands_for(group, study.groups, root)
        if not path.is_dir() and not group.files[0].is_multi and len({f.path.parent for f in group.files}) > 1:
            faults.append(f"{path.parent}: its series goes on in folders with others. Give each series a folder.")
        drawn = tuple(labels.get(series, ()))
        listed.append(TreeScan(path=path, place=place, modality=group.files[0].modality, labels=drawn))
    others = [f"{file.modality} file" for file in study.others if file not in study.segmentations]
    return Tree(
        scans=tuple(sorted(listed, key=lambda scan: scan.path)),
        homeless=tuple(homeless),
        left_out=(*(group.words for group in study.groups if not group.is_volume), *others),
        faults=tuple(faults),
    )


def _place(path: Path) -> Place:
    """Read whom and what a file is of."""
    data = read_fields(path, PLACE_FIELDS)
    with naming_damage(f"a damaged DICOM header in {path.name}"):
        study, frame = (str(value_of(data, name) or "") for name in PLACE_FIELDS[:2])
        series = _series_in(several(value_of(data, "ReferencedSeriesSequence")))
        for referenced in several(value_of(data, "ReferencedFrameOfReferenceSequence")):
            frame = frame or str(referenced.get("FrameOfReferenceUID", ""))
            for visit in several(referenced.get("RTReferencedStudySequence")):
                series |= _series_in(several(visit.get("RTReferencedSeriesSequence")))
    patient, _ = patient_digests(path)
    return Place(patient=patient, study=_digest(study), frame=_digest(frame), series=frozenset(series))


def _series_in(items: Sequence[Any]) -> set[str]:
    return {str(item.get("SeriesInstanceUID", "")) for item in items} - {""}


def _digest(uid: str) -> str:
    return hashlib.sha256(uid.encode()).hexdigest() if uid else ""


def _scan_of(place: Place, scans: dict[str, tuple[Group, Place]]) -> str | None:
    """The series that a segmentation belongs to; None where it is not there, or one of several."""
    if place.series:
        named = place.series & {*scans}
        return next(iter(named)) if len(named) == 1 else None
    of_study = {
        series: other
        for series, (_, other) in scans.items()
        if place.study and (other.study, other.patient) == (place.study, place.patient)
    }
    of_frame = [series for series, other in of_study.items() if place.frame and other.frame == place.frame]
    return next((candidates[0] for candidates in (of_frame, [*of_study]) if len(candidates) == 1), None)


def label_path(scan: TreeScan, others: Sequence[Path]) -> Path | None:
    """What stands for the segmentations of a scan: the file, or the folder of several; None where nothing does.

    Args:
        others: files of segmentations of the whole tree.
    """
    if len(scan.labels) == 1:
        return scan.labels[0]
    shared = Path(os.path.commonpath([path.parent for path in scan.labels]))
    strangers = any(path.is_relative_to(shared) for path in others if path not in scan.labels)
    return None if strangers or shared == scan.path else shared
