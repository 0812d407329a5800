"""Labels as DICOM-SEG, by highdicom: a bit for each voxel and segment, so that segments may overlap.

Source: DICOM PS3.3 A.51 (Segmentation IOD), C.8.20.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from autoseg.data.formats.dicom_sources import (
    DESCRIPTION,
    MANUFACTURER,
    MODEL,
    Sources,
    save,
    saying_faults,
    short_names,
)
from autoseg.data.formats.format import LabelFile
from autoseg.data.segments import Segment, layers_of, mask_of
from autoseg.data.terms import Code
from autoseg.errors import DataError
from autoseg.hardware.packages import install_advice
from autoseg.version import __version__

NAME = "DICOM-SEG"


def need_highdicom() -> None:
    """Make sure that it can be written.

    Raises:
        DataError: highdicom is not installed; the message says how.
    """
    try:
        import highdicom  # noqa: F401
    except ImportError:
        raise DataError(
            f"{NAME} is written by highdicom, which is not installed. {install_advice('formats')}"
        ) from None


def write_seg(path: Path, label: LabelFile, sources: Sources) -> None:
    """Write a segmentation of a series.

    Raises:
        DataError: highdicom is not installed, or cannot make it of the images' fields.
    """
    need_highdicom()
    with saying_faults(label.images[0], NAME):
        save(path, _segmentation(label, sources))


def _segmentation(label: LabelFile, sources: Sources) -> Any:
    import highdicom as hd
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    algorithm = hd.AlgorithmIdentificationSequence(name=MODEL, version=__version__, family=_coded(FAMILY))
    names = short_names(label.segments)
    return hd.seg.Segmentation(
        source_images=list(sources.images),
        pixel_array=sources.by_image(_numbered(label)),
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[
            _description(number, name, segment, algorithm)
            for number, (name, segment) in enumerate(zip(names, label.segments, strict=True), 1)
        ],
        series_instance_uid=generate_uid(),
        series_number=sources.segmentation_number,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=MODEL,
        software_versions=__version__,
        device_serial_number="0",
        content_label="SEGMENTATION",
        content_description="Automatic segmentation",
        series_description=DESCRIPTION,
        transfer_syntax_uid=ExplicitVRLittleEndian,
        omit_empty_frames=bool(label.array.any()),
        specific_character_set="ISO_IR 192",
    )


FAMILY = Code("DCM", "123109", "Artificial Intelligence")
"""Source: CID 7162 "Surface Processing Algorithm Family"."""


def _numbered(label: LabelFile) -> np.ndarray:
    """Segment numbers (I, J, K) where segments do not overlap; else masks (I, J, K, segments)."""
    if len(layers_of(label.array, label.segments)) > 1:
        return _masks(label)
    table = np.zeros(65536, np.uint8 if len(label.segments) < 256 else np.uint16)
    for number, segment in enumerate(label.segments, 1):
        table[list(segment.values)] = number
    return table[label.array]


class _Masks(np.ndarray):
    """Masks whose sum over segments, the last axis, is no larger than one of them.

    highdicom looks by it whether segments overlap; in the 64 bits in which NumPy counts booleans it took eight times
    the memory of a mask.
    """

    def sum(self, axis: Any = None, dtype: Any = None, **options: Any) -> Any:  # type: ignore[override]
        if dtype is None and axis in (-1, self.ndim - 1):
            dtype = np.min_scalar_type(self.shape[-1])
        return np.add.reduce(np.asarray(self), axis=axis, dtype=dtype, **options)


def _masks(label: LabelFile) -> np.ndarray:
    """(I, J, K, segments) bool; each mask in one piece of memory, slice by slice, as it is summed and written."""
    i, j, k = label.array.shape
    masks = np.empty((len(label.segments), k, j, i), bool)
    for mask, segment in zip(masks, label.segments, strict=True):
        for plane in range(k):
            mask[plane] = mask_of(label.array[:, :, plane], segment).T
    return masks.transpose(3, 2, 1, 0).view(_Masks)


def _description(number: int, name: str, segment: Segment, algorithm: Any) -> Any:
    import highdicom as hd

    term = segment.term
    description = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=name,
        segmented_property_category=_coded(term.category),
        segmented_property_type=_coded(term.type),
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
        anatomic_regions=[_coded(term.region)] if term.region else None,
        display_color=hd.color.CIELabColor.from_rgb(*segment.colour),
    )
    if term.modifier:
        description.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [
            _coded(term.modifier)
        ]
    if term.region and term.region_modifier:
        description.AnatomicRegionSequence[0].AnatomicRegionModifierSequence = [_coded(term.region_modifier)]
    return description


def _coded(code: Code) -> Any:
    import highdicom as hd

    return hd.sr.CodedConcept(value=code.value, scheme_designator=code.scheme, meaning=code.meaning)
