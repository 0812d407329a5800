"""DICOM: a folder that holds a series, or a file that belongs to one.

A folder is searched with its subfolders and stands for the one volume in it; localizers, reports and what else a study
holds are left out and named. A file stands for its series: the files beside it that have the same series' UID.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autoseg.data.formats import dicom_rtstruct_writer, dicom_seg_writer
from autoseg.data.formats.dicom_files import (
    LOCALIZER,
    SEGMENTATIONS,
    DicomFile,
    check_decoder,
    is_dicom,
    looks_like_dicom,
    need_pydicom,
    patient_digests,
    quiet,
    read_dicom,
    read_pixels,
)
from autoseg.data.formats.dicom_rtstruct import open_rtstruct
from autoseg.data.formats.dicom_rtstruct_writer import write_rtstruct
from autoseg.data.formats.dicom_seg import open_seg
from autoseg.data.formats.dicom_seg_writer import need_highdicom, write_seg
from autoseg.data.formats.dicom_series import Series, judge_series
from autoseg.data.formats.dicom_sources import Sources, check_source, read_sources
from autoseg.data.formats.format import Format, LabelFile, LabelWriter, Origin
from autoseg.data.formats.segmentation import Segmentation
from autoseg.data.formats.stored import FileFaultError, Finding, Header, StoredVolume, scaled
from autoseg.errors import some_of
from autoseg.workspace.files import subfolders

DIRECTORY = "DICOMDIR"
"""A medium's table of contents: it stands for its folder."""
OTHER_SUFFIXES = (
    *(".nii", ".gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".raw", ".zraw", ".mgz", ".mgh", ".hdr", ".img"),
    *(".json", ".txt", ".csv", ".tsv", ".yaml", ".xml", ".png", ".jpg", ".npy", ".npz", ".zip", ".tar"),
)
"""Of files that are not looked into."""
EXPECTED = "Expected a scan; or, as a label, SEG or RTSTRUCT."
MOST_NAMES = 4
"""Series that a message names."""


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
        return f"{self.files[0].modality} {kind} of {self.num_images} image{'s' * (self.num_images != 1)}"


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


def _open(path: Path) -> tuple[Series, tuple[Finding, ...]]:
    """The series that a path stands for, and what was left out.

    Raises:
        FileFaultError: There is none, or more than one, or it makes no volume.
    """
    need_pydicom()
    path = path.parent if path.name == DIRECTORY else path
    if not path.is_dir():
        file = read_dicom(path)
        if not file.frames:
            raise FileFaultError("unreadable", f"a DICOM file of modality {file.modality}", EXPECTED)
        group, damaged = _series_of(file)
        return _judged(group), _damage(damaged, path.parent)
    study = study_of(dicom_files(path))
    if study.damaged:
        fault = _damage(study.damaged, path)[0]
        raise FileFaultError(fault.kind, fault.finding, fault.remedy)
    if len(study.volumes) != 1:
        raise _not_one(path, study)
    chosen = study.volumes[0]
    left = [group.words for group in study.groups if group is not chosen]
    left += [f"{count} {modality} files" for modality, count in study.other_modalities]
    if not left:
        return _judged(chosen), ()
    finding = f"left out beside the {chosen.words}: {', '.join(left)}"
    remedy = "Move them elsewhere to be rid of this warning."
    return _judged(chosen), (Finding("header", finding, remedy, is_fault=False),)


def _series_of(file: DicomFile) -> tuple[Group, tuple[Path, ...]]:
    """The series of a file, from its folder, and files there that are damaged."""
    if file.is_multi:
        return Group(files=(file,)), ()
    study = study_of(dicom_files(file.path.parent, deep=False))
    mine = (g for g in study.groups if not g.files[0].is_multi and g.files[0].series == file.series)
    return next(mine, Group(files=(file,))), study.damaged


def _damage(paths: Sequence[Path], folder: Path) -> tuple[Finding, ...]:
    """Say which files are damaged, if any: a warning, since they may be of another series."""
    if not paths:
        return ()
    names = ", ".join(str(p.relative_to(folder)) for p in paths[:MOST_NAMES])
    return (Finding("unreadable", f"{len(paths)} damaged DICOM files ({names})", "Copy them again.", is_fault=False),)


def _judged(group: Group) -> Series:
    for file in group.files:
        check_decoder(file)
    return judge_series(group.files)


def _not_one(folder: Path, study: Study) -> FileFaultError:
    """Say that a folder holds no series, or several."""
    if not study.groups:
        others = ", ".join(f"{n} {m}" for m, n in study.other_modalities)
        finding = f"a folder without a scan in DICOM{f' ({others} files)' if others else ''}"
        return FileFaultError("unreadable", finding, "Give the folder of the series.")
    names = (f"{group.words} ({group.files[0].path.relative_to(folder)})" for group in study.volumes)
    finding = f"a folder of {len(study.volumes)} DICOM series: {some_of(names, MOST_NAMES)}"
    return FileFaultError("not_3d", finding, "Give a file of the one that is meant: it stands for its series.")


# -- the functions of the table's row


def is_series(path: Path, start: bytes) -> bool:
    """Whether a path is a DICOM file, or a folder that holds one."""
    if path.is_dir():
        return next(dicom_files(path), None) is not None
    return looks_like_dicom(start)


def read_header(path: Path) -> Header:
    """Read the headers of a series."""
    series, left_out = _open(path)
    return _header(series, left_out)


def _header(series: Series, left_out: tuple[Finding, ...]) -> Header:
    return Header(
        grid=series.grid,
        num_channels=1,
        dtype=series.dtype if series.is_evenly_scaled else np.dtype(np.float32),
        warnings=(*series.warnings, *left_out),
    )


def _pixels(series: Series, start: int, stop: int) -> Iterator[np.ndarray]:
    """(columns, rows) of some slices as they are stored; rescaled where their slopes differ."""
    while start < stop:
        frames = series.frames[start:stop]
        # Images of one file that follow each other are read together: finding them takes as long as reading.
        together = 1
        while together < len(frames) and frames[together].path == frames[0].path:
            together += 1
        indices = [frame.index for frame in frames[:together] if frame.index is not None]
        arrays = read_pixels(frames[0].path, indices or None)
        for frame, array in zip(frames[:together], arrays, strict=True):
            if array.shape != series.grid.shape[1::-1]:
                raise FileFaultError("unreadable", f"pixels of shape {array.shape}", "Copy or export it again.")
            yield array.T if series.is_evenly_scaled else scaled(array.T, frame.slope, frame.inter)
        start += together


def _stack(series: Series, dtype: np.dtype, start: int, stop: int) -> np.ndarray:
    """(I, J, stop - start, 1) of some slices."""
    array = np.empty((*series.grid.shape[:2], stop - start, 1), dtype, order="F")
    for number, pixels in enumerate(_pixels(series, start, stop)):
        array[:, :, number, 0] = pixels
    return array


def read(path: Path) -> StoredVolume:
    """Read a series."""
    series, left_out = _open(path)
    header = _header(series, left_out)
    is_even = series.is_evenly_scaled
    return StoredVolume(
        array=_stack(series, header.dtype, 0, len(series.frames)),
        grid=series.grid,
        slope=series.frames[0].slope if is_even else 1.0,
        inter=series.frames[0].inter if is_even else 0.0,
        warnings=header.warnings,
    )


class SeriesSlices:
    """A series whose files are opened as their slices are asked for."""

    def __init__(self, series: Series, header: Header) -> None:
        """Take a series and its header."""
        self._series, self.header = series, header

    def read(self, start: int, stop: int) -> np.ndarray:
        """See `StoredSlices`."""
        array = _stack(self._series, self.header.dtype, start, stop)
        first = self._series.frames[0]
        return scaled(array, first.slope, first.inter) if self._series.is_evenly_scaled else array


def open_slices(path: Path, stack: ExitStack) -> SeriesSlices:
    """Open a series so that its slices can be reached."""
    series, left_out = _open(path)
    return SeriesSlices(series, _header(series, left_out))


def files(path: Path) -> tuple[Path, ...]:
    """The files that decide what is read: all DICOM files of a folder, or the series of a file."""
    path = path.parent if path.name == DIRECTORY else path
    if path.is_dir():
        return tuple(dicom_files(path)) or (path,)
    file = read_dicom(path)
    # A segmentation is one file: the others of its folder need no look.
    return tuple(f.path for f in _series_of(file)[0].files) if file.frames else (path,)


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


def segmentation(path: Path) -> Segmentation | None:
    """The segments of a DICOM-SEG or RTSTRUCT file, or of all such files in a folder together; none of a scan.

    Raises:
        FileFaultError: pydicom is missing, or a file is damaged.
    """
    need_pydicom()
    files = study_of(dicom_files(path)).segmentations if path.is_dir() else (read_dicom(path),)
    parts = [_open_segmentation(file) for file in files if file.modality in SEGMENTATIONS]
    if len(parts) < 2:
        return parts[0] if parts else None
    numbers: dict[str, int] = {}
    for name in (name for part in parts for name in part.numbers):
        numbers.setdefault(name, len(numbers) + 1)
    return Segmentation(
        numbers=numbers,
        is_label_map=False,
        pieces=lambda grid: (piece for part in parts for piece in part.pieces(grid)),
        grid=None,
        warnings=tuple(warning for part in parts for warning in part.warnings),
    )


def _open_segmentation(file: DicomFile) -> Segmentation:
    return (open_seg if file.modality == "SEG" else open_rtstruct)(file.path)


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


def origin(path: Path) -> Origin:
    """Modality and patient of a series, from the first of its images.

    Raises:
        FileFaultError: There is none.
    """
    need_pydicom()
    paths = dicom_files(path) if path.is_dir() else iter((path,))
    file = next((file for file in map(read_dicom, paths) if file.frames), None)
    if file is None:
        raise FileFaultError("unreadable", "a folder without a scan in DICOM", "Give the folder of the series.")
    patient, words = patient_digests(file.path)
    return Origin(modality=file.modality, patient=patient, words=words)


def _sources(label: LabelFile) -> Sources:
    with quiet():
        return read_sources(_open(label.images[0])[0])


def _writer(
    name: str, suffix: str, title: str, need: Callable[[], None], write: Callable[[Path, LabelFile, Sources], None]
) -> LabelWriter:
    """A way to write segmentations of a series.

    Args:
        title: of the format, for messages.
        need: make sure that what writes it is installed.
        write: a file, from the label and the headers of its images.
    """

    def check(images: Sequence[Path]) -> None:
        path = images[0]
        need()
        folder = path.parent if path.name == DIRECTORY else path
        first = next(dicom_files(folder), None) if folder.is_dir() else path if is_dicom(path) else None
        check_source(first or path, title, is_dicom=first is not None)

    return LabelWriter(
        name=name,
        suffixes=(suffix, ".dcm"),
        write=lambda path, label: write(path, label, _sources(label)),
        check=check,
        keeps_overlaps=True,
    )


SEG = _writer("dicomseg", ".seg.dcm", dicom_seg_writer.NAME, need_highdicom, write_seg)
RTSTRUCT = _writer("rtstruct", ".rtstruct.dcm", dicom_rtstruct_writer.NAME, need_pydicom, write_rtstruct)

DICOM = Format(
    name="DICOM",
    suffixes=(),
    recognise=is_series,
    read_header=read_header,
    read=read,
    open_slices=open_slices,
    segmentation=segmentation,
    origin=origin,
    files=files,
    find=find,
    find_labels=find_labels,
    writers=(SEG, RTSTRUCT),
)
