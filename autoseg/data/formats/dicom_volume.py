"""A volume in DICOM: the one series of a folder, or the series of a file; read whole, or slice by slice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from autoseg.data.formats.dicom_files import DicomFile, check_decoder, need_pydicom, read_dicom, read_pixels
from autoseg.data.formats.dicom_series import Series, judge_series
from autoseg.data.formats.dicom_study import DIRECTORY, Group, Study, dicom_files, study_of
from autoseg.data.formats.stored import FileFaultError, Finding, Header, StoredVolume, scaled
from autoseg.errors import some_of

EXPECTED = "Expected a scan; or, as a label, SEG or RTSTRUCT."
MOST_NAMES = 4
"""Series that a message names."""


def open_series(path: Path) -> tuple[Series, tuple[Finding, ...]]:
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


def read_header(path: Path) -> Header:
    """Read the headers of a series."""
    series, left_out = open_series(path)
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
    series, left_out = open_series(path)
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
    series, left_out = open_series(path)
    return SeriesSlices(series, _header(series, left_out))


def files(path: Path) -> tuple[Path, ...]:
    """The files that decide what is read: all DICOM files of a folder, or the series of a file."""
    path = path.parent if path.name == DIRECTORY else path
    if path.is_dir():
        return tuple(dicom_files(path)) or (path,)
    file = read_dicom(path)
    # A segmentation is one file: the others of its folder need no look.
    return tuple(f.path for f in _series_of(file)[0].files) if file.frames else (path,)
