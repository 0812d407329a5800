"""What DICOM files a folder holds: series of images, segmentations, and others; and what stands for each of them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from autoseg.data.formats.dicom_files import (
    LOCALIZER,
    SEGMENTATIONS,
    DicomFile,
    is_dicom,
    need_pydicom,
    quiet,
    read_dicom,
)
from autoseg.data.formats.stored import FileFaultError
from autoseg.errors import counted
from autoseg.workspace.files import subfolders

DIRECTORY = "DICOMDIR"
"""A medium's table of contents: it stands for its folder."""
OTHER_SUFFIXES = (
    *(".nii", ".gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".raw", ".zraw", ".mgz", ".mgh", ".hdr", ".img"),
    *(".json", ".txt", ".csv", ".tsv", ".yaml", ".xml", ".png", ".jpg", ".npy", ".npz", ".zip", ".tar"),
)
"""Of files that are not looked into."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The files of one series, or one file of several images."""

    files: tuple[DicomFile, ...]

    @property
    def num_images(self) -> int:
        """Slices."""
        return sum(len(file.frames) for file in self.files)

    @property
    def is_volume(self) -> bool:
        """Whether it can be a volume: several images that have a position, and no localizer."""
        has_places = all(frame.position for file in self.files for frame in file.frames)
        return self.num_images > 1 and has_places and not any(LOCALIZER in file.image_type for file in self.files)

    @property
    def words(self) -> str:
        """What it is, without a name."""
        kind = "localizer" if any(LOCALIZER in file.image_type for file in self.files) else "series"
        return f"{self.files[0].modality} {kind} of {counted(self.num_images, 'image')}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What DICOM files a folder holds."""

    groups: tuple[Group, ...]
    """By their first file."""
    others: tuple[DicomFile, ...]
    """Files that are no scan."""
    damaged: tuple[Path, ...]

    @property
    def volumes(self) -> tuple[Group, ...]:
        """Those that can be volumes; where none can, all."""
        return tuple(g for g in self.groups if g.is_volume) or self.groups

    @property
    def segmentations(self) -> tuple[DicomFile, ...]:
        """Files that are labels of a scan."""
        return tuple(file for file in self.others if file.modality in SEGMENTATIONS)

    @property
    def other_modalities(self) -> list[tuple[str, int]]:
        """Modality of files that are no scan -> their number."""
        return sorted(Counter(file.modality for file in self.others).items())


def dicom_files(folder: Path, *, deep: bool = True) -> Iterator[Path]:
    """The DICOM files of a folder in the order of their names, with its subfolders; hidden ones are left out."""
    with os.scandir(folder) as entries:
        listed = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    for entry in listed:
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and entry.is_dir() and not _is_loop(path)):
            if deep:
                yield from dicom_files(path)
        elif entry.name != DIRECTORY and not entry.name.lower().endswith(OTHER_SUFFIXES) and is_dicom(path):
            yield path


def _is_loop(path: Path) -> bool:
    """Whether a link leads to a folder that it lies in."""
    target = path.resolve()
    return path.parent.resolve().is_relative_to(target)


def study_of(paths: Iterable[Path]) -> Study:
    """Sort files into series."""
    by_key: dict[tuple[str, str], list[DicomFile]] = {}
    others, damaged = [], []
    with quiet():
        for path in paths:
            try:
                file = read_dicom(path)
            except FileFaultError:
                damaged.append(path)
                continue
            if not file.frames:
                others.append(file)
            else:
                by_key.setdefault((file.series, file.instance if file.is_multi else ""), []).append(file)
    groups = tuple(Group(files=tuple(files)) for files in by_key.values())
    return Study(groups=groups, others=tuple(others), damaged=tuple(damaged))


def find(folder: Path) -> list[Path]:
    """What stands for the series of a folder: a folder of one, else a file of each.

    A folder that holds files itself is one study, with its subfolders; else each subfolder is one. A study in which
    nothing can be read is in the answer, so that reading it says why.
    """
    if next(dicom_files(folder, deep=False), None) is not None:
        return _find_in_study(folder)
    return [path for below in subfolders(folder) for path in _find_in_study(below)]


def _find_in_study(folder: Path) -> list[Path]:
    paths = list(dicom_files(folder))
    try:
        need_pydicom()
    except FileFaultError:
        return [folder] if paths else []
    study = study_of(paths)
    if len(paths) == 1 and study.groups and paths[0].parent == folder:
        return paths
    if len(study.volumes) == 1 or study.damaged:
        return [folder]
    return sorted(stands_for(group, study.volumes, folder) for group in study.volumes)


def stands_for(group: Group, groups: Sequence[Group], folder: Path) -> Path:
    """The folder of a series, where it holds no other; else one of its files."""
    shared = Path(os.path.commonpath([file.path.parent for file in group.files]))
    is_alone = all(other is group or not any(f.path.is_relative_to(shared) for f in other.files) for other in groups)
    return shared if is_alone and shared != folder and len(group.files) > 1 else group.files[0].path


def find_labels(folder: Path) -> list[Path]:
    """What stands for the segmentations of a folder: its own files, and subfolders that hold some."""
    own = list(dicom_files(folder, deep=False))
    below = {path: list(dicom_files(path)) for path in subfolders(folder)}
    if not own and not any(below.values()):
        return []
    try:
        need_pydicom()
    except FileFaultError:
        return []  # the folder is among its images, as reading it will say
    files = [file.path for file in study_of(own).segmentations]
    return files + [p for p, paths in below.items() if study_of(paths).segmentations]
