"""Images in other formats, for tests: written by the libraries of each, from an array and its affine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk


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
