"""The DICOM images that a label was made from: what a segmentation of them must repeat, and how it is written.

A segmentation is a part of the patient's record: the standard has it carry the patient's and the study's fields, which
nothing else that autoseg writes has. Messages hold no field's value.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from autoseg.data.formats.dicom_files import damages, naming_damage, quiet
from autoseg.data.formats.dicom_series import Series
from autoseg.data.formats.stored import lps_to_ras
from autoseg.data.grid import Grid
from autoseg.data.segments import Segment
from autoseg.errors import DataError
from autoseg.workspace.files import open_regular, write_atomic

MANUFACTURER, MODEL = "autoseg", "autoseg3d"
DESCRIPTION = "Segmentation by autoseg"
"""Of the series."""
NEEDED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "FrameOfReferenceUID")
"""Fields without which nothing can refer to an image."""
EMPTY = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber"),
    *("StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"),
)
"""Fields that a record must have, but may have empty where nobody knows them (type 2 of the standard)."""
SOUND = {
    **dict.fromkeys(("StudyDate", "PatientBirthDate"), re.compile(r"(\d{8})?").fullmatch),
    "StudyTime": re.compile(r"(([01]\d|2[0-3])([0-5]\d([0-5]\d(\.\d{1,6})?)?)?)?").fullmatch,
}
"""What dates and times look like that highdicom can take; others count as not known."""
SEXES = {"M": "M", "F": "F", "O": "O"}
MOST_LETTERS = 64
"""Of a name in DICOM (LO)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sources:
    """The images of a series."""

    series: Series
    images: tuple[Any, ...]
    """Headers as pydicom has them, without pixels: one for each slice, or one of a file of several images."""

    @property
    def first(self) -> Any:
        """The header that stands for all."""
        return self.images[0]

    @property
    def segmentation_number(self) -> int:
        """Of the segmentation's series: beyond those that scanners give, so that viewers list it behind its images."""
        return 1000 + int(self.first.get("SeriesNumber") or 0) % 1000

    def by_image(self, array: np.ndarray) -> np.ndarray:
        """(images, rows, columns): the slices (I, J, K) of a label in the order of the images' frames."""
        planes = np.moveaxis(array, 2, 0).swapaxes(1, 2)
        indices = [frame.index for frame in self.series.frames]
        return planes if None in indices else planes[np.argsort(indices)]  # type: ignore[arg-type]


def check_source(path: Path, format_name: str, *, is_dicom: bool) -> None:
    """Refuse an image that no DICOM file can refer to, from its first file.

    Args:
        path: of a file of the image.
        format_name: what is to be written, for messages.
        is_dicom: whether it is DICOM at all.

    Raises:
        DataError: With the reason.
    """
    other = "Choose another --format, such as nifti or seg.nrrd."
    if not is_dicom:
        raise DataError(
            f"{path}: no DICOM series, and {format_name} refers to the DICOM images it was made from. {other}"
        )
    lost = [name for name in NEEDED if not _read(path).get(name)]
    if lost:
        raise DataError(f"{path}: {format_name} needs {', '.join(lost)}, which the images do not have. {other}")


def _read(path: Path) -> Any:
    from pydicom import dcmread

    with naming_damage(f"{path}: a damaged DICOM header"), open_regular(path) as file:
        data = dcmread(file, stop_before_pixels=True, force=True)
        data.decode()
        return data


def read_sources(series: Series) -> Sources:
    """Read the headers of a series.

    Raises:
        DataError: One is damaged, or of another study or place in space; or copies were left out of a file of several
            images.
    """
    paths = tuple(dict.fromkeys(frame.path for frame in series.frames))
    images = tuple(_read(path) for path in paths)
    first = images[0]
    for path, data in zip(paths, images, strict=True):
        for name in NEEDED:
            if not data.get(name):
                raise DataError(f"{path}: no {name}, to which a segmentation refers. Choose another --format.")
            if name not in ("SOPInstanceUID", "SOPClassUID") and data[name].value != first[name].value:
                raise DataError(f"{path}: another {name} than {paths[0].name}. Choose another --format.")
        for name in EMPTY:
            if name not in data:
                setattr(data, name, "")
        for name, is_sound in SOUND.items():
            if not is_sound(str(data[name].value or "")):
                setattr(data, name, "")
        data.PatientSex = SEXES.get(str(data.PatientSex or "")[:1].upper(), "")
        if not data.get("SliceThickness"):
            data.SliceThickness = round(series.grid.spacing_mm[2], 6)
    if series.frames[0].index is not None:
        if int(first.NumberOfFrames) != len(series.frames):
            raise DataError(f"{paths[0]}: some of its images are there twice. Choose another --format.")
        _share_groups(first)
    return Sources(series=series, images=images)


def _share_groups(data: Any) -> None:
    """Say once for all images of a file what each says by itself, as highdicom wants it; reading found them equal."""
    shared, own = data.SharedFunctionalGroupsSequence[0], data.PerFrameFunctionalGroupsSequence[0]
    for name in ("PlaneOrientationSequence", "PixelMeasuresSequence"):
        if name not in shared and name in own:
            setattr(shared, name, own[name].value)


def short_names(segments: Sequence[Segment]) -> list[str]:
    """The names of segments as DICOM can have them.

    Raises:
        DataError: Names that differ only beyond what it can have.
    """
    names = [segment.name.replace("\\", "/")[:MOST_LETTERS].strip() for segment in segments]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(
            f"class {twice[0]}: two names of classes have their first {MOST_LETTERS} letters in common, and DICOM has "
            "no more. Choose another --format, or shorter names."
        )
    return names


@contextmanager
def saying_faults(path: Path, format_name: str) -> Iterator[None]:
    """Say that a library cannot make a file of some images; its own words might quote a field of the patient.

    Raises:
        DataError: It cannot.
    """
    logger = logging.getLogger("highdicom")
    level = logger.level
    try:
        logger.setLevel(logging.CRITICAL)  # it logs the images' UIDs
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except DataError:
        raise
    except damages() as error:
        raise DataError(
            f"{path}: {format_name} cannot be made of the fields of these images ({type(error).__name__}). "
            "Choose another --format."
        ) from None
    finally:
        logger.setLevel(level)


def now() -> tuple[str, str]:
    """Date and time as DICOM has them."""
    moment = datetime.now()
    return moment.strftime("%Y%m%d"), moment.strftime("%H%M%S")


def save(path: Path, data: Any) -> None:
    """Write a file; all of it or nothing. Text is in UTF-8."""
    data.SpecificCharacterSet = "ISO_IR 192"
    write_atomic(path, lambda file: data.save_as(file, enforce_file_format=True))


def lps_affine(grid: Grid) -> np.ndarray:
    """The grid's affine into the world of DICOM."""
    return lps_to_ras(grid.affine)
