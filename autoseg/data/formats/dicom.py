"""DICOM: a folder that holds a series, or a file that belongs to one; and segmentations of it.

A folder is searched with its subfolders and stands for the one volume in it; localizers, reports and what else a study
holds are left out and named. A file stands for its series: the files beside it that have the same series' UID.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from autoseg.data.formats import dicom_rtstruct_writer, dicom_seg_writer
from autoseg.data.formats.dicom_files import (
    SEGMENTATIONS,
    DicomFile,
    is_dicom,
    looks_like_dicom,
    need_pydicom,
    patient_digests,
    quiet,
    read_dicom,
)
from autoseg.data.formats.dicom_rtstruct import open_rtstruct
from autoseg.data.formats.dicom_rtstruct_writer import write_rtstruct
from autoseg.data.formats.dicom_seg import open_seg
from autoseg.data.formats.dicom_seg_writer import need_highdicom, write_seg
from autoseg.data.formats.dicom_sources import Sources, check_source, read_sources
from autoseg.data.formats.dicom_study import DIRECTORY, dicom_files, find, find_labels, study_of
from autoseg.data.formats.dicom_volume import files, open_series, open_slices, read, read_header
from autoseg.data.formats.format import Format, LabelFile, LabelWriter, Origin
from autoseg.data.formats.segmentation import Segmentation, colours_by_name
from autoseg.data.formats.stored import FileFaultError


def is_series(path: Path, start: bytes) -> bool:
    """Whether a path is a DICOM file, or a folder that holds one."""
    if path.is_dir():
        return next(dicom_files(path), None) is not None
    return looks_like_dicom(start)


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
        colours=colours_by_name(row for part in parts for row in part.colours.items()),
    )


def _open_segmentation(file: DicomFile) -> Segmentation:
    return (open_seg if file.modality == "SEG" else open_rtstruct)(file.path)


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
        return read_sources(open_series(label.images[0])[0])


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
