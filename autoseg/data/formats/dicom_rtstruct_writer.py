"""Labels as RTSTRUCT: contours of each class on the slices of the series, for radiotherapy.

The contours are those of marching squares at one half, so that they pass half way between the centres of voxels inside
and outside, and exactly the voxels of the label lie within them. A hole is joined to what lies around it by a channel
of no width (a keyhole), as the standard says for CLOSED_PLANAR; no voxel's centre lies on a channel.
Source: DICOM PS3.3 A.19 (RT Structure Set IOD), C.8.8.6.3 (representing inner and outer contours)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from autoseg.data.formats.dicom_sources import (
    DESCRIPTION,
    EMPTY,
    MANUFACTURER,
    MODEL,
    Sources,
    lps_affine,
    now,
    save,
    saying_faults,
    short_names,
)
from autoseg.data.formats.format import LabelFile
from autoseg.data.segments import Segment, mask_of
from autoseg.data.terms import CATEGORIES, Code
from autoseg.version import __version__

NAME = "RTSTRUCT"
DIGITS = 6
"""Behind the point of a coordinate in mm: with sign and thousands they keep to the 16 letters of a DS."""


def write_rtstruct(path: Path, label: LabelFile, sources: Sources) -> None:
    """Write a structure set of a series.

    Raises:
        DataError: It cannot be made of the images' fields.
    """
    with saying_faults(label.images[0], NAME):
        save(path, _structure_set(label, sources))


# -- contours


def contours_of(mask: np.ndarray) -> list[np.ndarray]:
    """The outlines of a mask (I, J): polygons (points, 2) of fractions of voxels; holes are joined by keyholes."""
    from contourpy import FillType, contour_generator

    filled = contour_generator(z=np.pad(mask, 1).T.astype(np.float64), fill_type=FillType.OuterOffset).filled(0.5, 2)
    polygons = []
    for points, offsets in zip(*filled, strict=True):
        rings = [points[a : b - 1] - 1 for a, b in zip(offsets[:-1], offsets[1:], strict=True)]  # the last is the first
        polygons.append(_joined(rings[0], rings[1:]) if len(rings) > 1 else rings[0])
    return polygons


def _joined(outer: np.ndarray, holes: list[np.ndarray]) -> np.ndarray:
    """An outline with its holes, each joined upwards from its highest slanting edge to what lies next above it."""
    starts = []
    for hole in holes:
        ends = np.roll(hole, -1, axis=0)
        slanting = np.flatnonzero((hole != ends).all(axis=1))
        middles = (hole[slanting] + ends[slanting]) / 2  # at quarters of a voxel, where no centre lies
        top = int(np.argmin(middles[:, 1]))
        starts.append((middles[top], int(slanting[top]), hole))
    joined = outer
    # From above, so that what lies next above a hole is already part of the outline.
    for start, edge, hole in sorted(starts, key=lambda s: float(s[0][1])):
        at, target = _next_above(joined, start)
        loop = np.roll(hole, -edge - 1, axis=0)
        joined = np.concatenate([joined[: at + 1], [target, start], loop, [start, target], joined[at + 1 :]])
    return joined


def _next_above(ring: np.ndarray, start: np.ndarray) -> tuple[int, np.ndarray]:
    """The edge of a ring that lies next above a point, and where the line upwards from the point meets it."""
    a, b = ring, np.roll(ring, -1, axis=0)
    x, y = start
    crossing = np.flatnonzero((a[:, 0] < x) != (b[:, 0] < x))
    share = (x - a[crossing, 0]) / (b[crossing, 0] - a[crossing, 0])
    heights = a[crossing, 1] + share * (b[crossing, 1] - a[crossing, 1])
    heights[heights >= y] = -np.inf
    best = int(np.argmax(heights))
    return int(crossing[best]), np.array([x, heights[best]])


# -- the file


def _structure_set(label: LabelFile, sources: Sources) -> Any:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid

    first = sources.first
    data = Dataset()
    for name in (*EMPTY, "StudyInstanceUID", "FrameOfReferenceUID"):
        setattr(data, name, first[name].value)
    data.PositionReferenceIndicator = first.get("PositionReferenceIndicator", "")
    data.SOPClassUID, data.SOPInstanceUID = RTStructureSetStorage, generate_uid()
    data.SeriesInstanceUID, data.Modality = generate_uid(), "RTSTRUCT"
    data.SeriesNumber, data.SeriesDescription, data.OperatorsName = sources.segmentation_number, DESCRIPTION, ""
    data.Manufacturer, data.ManufacturerModelName, data.SoftwareVersions = MANUFACTURER, MODEL, __version__
    data.InstanceNumber = 1
    data.StructureSetLabel, data.StructureSetName = "Segmentation", DESCRIPTION
    data.StructureSetDate, data.StructureSetTime = now()
    data.InstanceCreationDate, data.InstanceCreationTime = data.StructureSetDate, data.StructureSetTime
    data.ApprovalStatus = "UNAPPROVED"
    references = [_reference(sources, k) for k in range(len(sources.series.frames))]
    data.ReferencedFrameOfReferenceSequence = [_frame_of_reference(sources, references)]
    rows = [*enumerate(zip(short_names(label.segments), label.segments, strict=True), 1)]
    data.StructureSetROISequence = [_roi(number, name, first.FrameOfReferenceUID) for number, (name, _) in rows]
    data.ROIContourSequence = [_contours(number, label, s, references) for number, (_, s) in rows]
    data.RTROIObservationsSequence = [_observation(number, segment) for number, (_, segment) in rows]
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID, data.file_meta.MediaStorageSOPInstanceUID = (
        data.SOPClassUID,
        data.SOPInstanceUID,
    )
    return data


def _reference(sources: Sources, number: int) -> Any:
    """What refers to the image of a slice."""
    from pydicom.dataset import Dataset

    frame = sources.series.frames[number]
    image = sources.first if frame.index is not None else sources.images[number]
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
    if frame.index is not None:
        item.ReferencedFrameNumber = frame.index + 1
    return item


def _frame_of_reference(sources: Sources, references: list[Any]) -> Any:
    from pydicom.dataset import Dataset

    first = sources.first
    series, study, item = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID, series.ContourImageSequence = first.SeriesInstanceUID, references
    study.ReferencedSOPClassUID = "1.2.840.10008.3.1.2.3.1"  # Detached Study Management, retired, as all write it
    study.ReferencedSOPInstanceUID, study.RTReferencedSeriesSequence = first.StudyInstanceUID, [series]
    item.FrameOfReferenceUID, item.RTReferencedStudySequence = first.FrameOfReferenceUID, [study]
    return item


def _roi(number: int, name: str, frame_of_reference: str) -> Any:
    from pydicom.dataset import Dataset

    item = Dataset()
    item.ROINumber, item.ROIName = number, name
    item.ReferencedFrameOfReferenceUID, item.ROIGenerationAlgorithm = frame_of_reference, "AUTOMATIC"
    return item


def _contours(number: int, label: LabelFile, segment: Segment, references: list[Any]) -> Any:
    from pydicom.dataset import Dataset

    item = Dataset()
    item.ReferencedROINumber, item.ROIDisplayColor = number, list(segment.colour)
    contours = []
    for k, points in _points(label, segment):
        contour = Dataset()
        contour.ContourImageSequence = [references[k]]
        contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", len(points)
        contour.ContourData = [f"{v:.{DIGITS}f}" for v in points.ravel() + 0.0]
        contours.append(contour)
    if contours:
        item.ContourSequence = contours
    return item


def _points(label: LabelFile, segment: Segment) -> Iterator[tuple[int, np.ndarray]]:
    """The slice and the points (N, 3) in mm of each contour of a segment."""
    affine = lps_affine(label.grid)
    for k in range(label.grid.shape[2]):
        mask = mask_of(label.array[:, :, k], segment)
        for polygon in contours_of(mask) if mask.any() else []:
            yield k, polygon @ affine[:3, :2].T + affine[:3, 2] * k + affine[:3, 3]


def _observation(number: int, segment: Segment) -> Any:
    from pydicom.dataset import Dataset

    term, item = segment.term, Dataset()
    item.ObservationNumber = item.ReferencedROINumber = number
    item.RTROIInterpretedType = "ORGAN" if term.category == CATEGORIES["structure"] else ""
    item.ROIInterpreter = ""
    item.SegmentedPropertyCategoryCodeSequence = [_coded(term.category)]
    identification = _coded(term.type)
    if term.modifier:
        identification.SegmentedPropertyTypeModifierCodeSequence = [_coded(term.modifier)]
    item.RTROIIdentificationCodeSequence = [identification]
    return item


def _coded(code: Code) -> Any:
    from pydicom.dataset import Dataset

    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code.value, code.scheme, code.meaning
    return item
