"""Images in other formats, for tests: written by the libraries of each, from an array and its affine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid


def to_itk(array: np.ndarray, affine: np.ndarray) -> sitk.Image:
    """An array (I, J, K), or (I, J, K, C), as an image of ITK, in LPS."""
    many = array.ndim == 4
    image = sitk.GetImageFromArray(np.moveaxis(array.T, 0, 3) if many else array.T, isVector=many)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    return image


def write_itk(path: Path, array: np.ndarray, affine: np.ndarray, *, packed: bool = True) -> None:
    """Write NRRD or MetaImage, as the suffix says."""
    sitk.WriteImage(to_itk(array, affine), str(path), useCompression=packed)


def write_mgh(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    """Write MGZ or MGH, as the suffix says."""
    nib.save(nib.MGHImage(array, affine), path)


def write_pair(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    """Write a NIfTI pair; `path` ends in .hdr."""
    nib.save(nib.Nifti1Pair(array, affine), path)


WRITERS: dict[str, Callable[[Path, np.ndarray, np.ndarray], None]] = {
    ".nrrd": write_itk,
    ".nhdr": write_itk,
    ".mha": write_itk,
    ".mhd": write_itk,
    ".mgz": write_mgh,
    ".mgh": write_mgh,
    ".hdr": write_pair,
}
"""By suffix."""


def write_image(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    """Write an image in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    WRITERS[path.suffix](path, array, affine)
    return path


PATIENT = ("ROE^JANE", "PID4711", "19520229")
"""Name, number and day of birth in every DICOM file of the tests: they must not come up anywhere."""


def slice_of(pixels: np.ndarray, position: np.ndarray, **fields: Any) -> Dataset:
    """A DICOM image of (rows, columns) pixels with a patient's fields, and others as given."""
    data = Dataset()
    data.PatientName, data.PatientID, data.PatientBirthDate = PATIENT
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, generate_uid()
    data.StudyInstanceUID = data.FrameOfReferenceUID = "1.2.826.0.1.3680043.8.498.1"
    data.SeriesInstanceUID = "1.2.826.0.1.3680043.8.498.2"
    data.Modality, data.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 8 * pixels.dtype.itemsize
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(pixels.dtype.kind == "i")
    data.ImagePositionPatient = [f"{v:.10g}" for v in position]
    data.PixelData = pixels.tobytes() + bytes(pixels.nbytes % 2)
    for name, value in fields.items():
        setattr(data, name, value)
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    return data


def slices_of(array: np.ndarray, affine: np.ndarray, **fields: Any) -> list[Dataset]:
    """The slices along the third axis of an array (I, J, K), in their order."""
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    directions = (lps[:3, :2] / spacing[:2]).T.ravel()
    shared = {
        "ImageOrientationPatient": [f"{v:.10f}" for v in directions],
        "PixelSpacing": [f"{spacing[1]:.10g}", f"{spacing[0]:.10g}"],
        "SliceThickness": f"{spacing[2]:.10g}",
    }
    return [
        slice_of(
            np.ascontiguousarray(array[:, :, k].T), (lps @ [0, 0, k, 1])[:3], InstanceNumber=k + 1, **shared | fields
        )
        for k in range(array.shape[2])
    ]


def save_slices(folder: Path, slices: Sequence[Dataset], names: Sequence[str] | None = None) -> Path:
    """Write slices into a folder in an order that says nothing, without suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(len(slices)).permutation(len(slices))
    for number, data in zip(order, slices, strict=True):
        name = names[number] if names else f"IM{number:04d}"
        data.save_as(folder / name, enforce_file_format=True)
    return folder


def write_series(folder: Path, array: np.ndarray, affine: np.ndarray, **fields: Any) -> Path:
    """Write a volume as a DICOM series."""
    return save_slices(folder, slices_of(array, affine, **fields))


def enhanced_of(array: np.ndarray, affine: np.ndarray) -> Dataset:
    """A volume as one file of several images."""
    slices = slices_of(array, affine)
    data = slices[0]
    frames = []
    for one in slices:
        groups, plane, direction = Dataset(), Dataset(), Dataset()
        plane.ImagePositionPatient, direction.ImageOrientationPatient = (
            one.ImagePositionPatient,
            one.ImageOrientationPatient,
        )
        groups.PlanePositionSequence, groups.PlaneOrientationSequence = [plane], [direction]
        frames.append(groups)
    shared, measures = Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = data.PixelSpacing, data.SliceThickness
    shared.PixelMeasuresSequence = [measures]
    data.PerFrameFunctionalGroupsSequence, data.SharedFunctionalGroupsSequence = frames[::-1], [shared]
    data.NumberOfFrames = len(frames)
    data.PixelData = b"".join(one.PixelData for one in slices[::-1])
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        delattr(data, name)
    return data


def _item(**fields: Any) -> Dataset:
    data = Dataset()
    for name, value in fields.items():
        setattr(data, name, value)
    return data


def seg_of(masks: dict[str, np.ndarray], affine: np.ndarray, kind: str = "BINARY", **fields: Any) -> Dataset:
    """A DICOM-SEG of masks (I, J, K), or shares up to 255 if FRACTIONAL; frames without a voxel are left out.

    Frames come in an order that says nothing, as each says where it lies.
    """
    slices = slices_of(next(iter(masks.values())).astype("u1"), affine)
    stacked = np.stack(list(masks.values()))
    if kind == "LABELMAP":
        values = np.arange(1, len(masks) + 1, dtype="u1")[:, None, None, None]
        stacked = (stacked.astype("u1") * values).max(0)[None]
    frames = [(number, k) for number, mask in enumerate(stacked, 1) for k in range(len(slices)) if mask[:, :, k].any()]
    order = np.random.default_rng(len(frames)).permutation(len(frames))
    frames = [frames[n] for n in order]
    data = slices[0]
    data.SOPClassUID = f"1.2.840.10008.5.1.4.1.1.66.{7 if kind == 'LABELMAP' else 4}"
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    data.Modality, data.SegmentationType, data.SeriesInstanceUID = "SEG", kind, generate_uid()
    data.SegmentSequence = [_item(SegmentNumber=n, SegmentLabel=name) for n, name in enumerate(masks, 1)]
    measures = _item(PixelSpacing=data.PixelSpacing, SpacingBetweenSlices=data.SliceThickness)
    plane = _item(ImageOrientationPatient=data.ImageOrientationPatient)
    data.SharedFunctionalGroupsSequence = [_item(PixelMeasuresSequence=[measures], PlaneOrientationSequence=[plane])]
    groups = []
    for number, k in frames:
        group = _item(PlanePositionSequence=[_item(ImagePositionPatient=slices[k].ImagePositionPatient)])
        if kind != "LABELMAP":
            group.SegmentIdentificationSequence = [_item(ReferencedSegmentNumber=number)]
        groups.append(group)
    data.PerFrameFunctionalGroupsSequence, data.NumberOfFrames = groups, len(frames)
    pixels = np.stack([stacked[number - 1][:, :, k].T for number, k in frames])
    if kind == "BINARY":
        data.BitsAllocated = data.BitsStored = 1
        data.HighBit = 0
        packed = np.packbits(pixels.astype(bool).ravel(), bitorder="little").tobytes()
        data.PixelData = packed + bytes(len(packed) % 2)
    else:
        data.PixelData = pixels.astype("u1").tobytes() + bytes(pixels.size % 2)
    if kind == "FRACTIONAL":
        data.SegmentationFractionalType, data.MaximumFractionalValue = "PROBABILITY", 255
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        delattr(data, name)
    for name, value in fields.items():
        setattr(data, name, value)
    return data


def rtstruct_of(contours: dict[str, list[np.ndarray]], **fields: Any) -> Dataset:
    """An RTSTRUCT of closed contours, (n, 3) in mm in RAS+ each."""
    data = slice_of(np.zeros((2, 2), "u1"), np.zeros(3))
    for name in ("Rows", "Columns", "PixelData", "ImagePositionPatient", "BitsAllocated", "PixelRepresentation"):
        delattr(data, name)
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.481.3"
    data.Modality, data.SeriesInstanceUID = "RTSTRUCT", generate_uid()
    data.StructureSetROISequence = [_item(ROINumber=n, ROIName=name) for n, name in enumerate(contours, 1)]
    data.ROIContourSequence = [
        _item(
            ReferencedROINumber=number,
            ContourSequence=[
                _item(
                    ContourGeometricType="CLOSED_PLANAR",
                    NumberOfContourPoints=len(points),
                    ContourData=[f"{v:.8g}" for v in (points * [-1, -1, 1]).ravel()],
                )
                for points in listed
            ],
        )
        for number, listed in enumerate(contours.values(), 1)
    ]
    for name, value in fields.items():
        setattr(data, name, value)
    return data


def save_dicom(path: Path, data: Dataset) -> Path:
    """Write one DICOM file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path
