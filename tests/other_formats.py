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
