"""A case as the network sees it: cropped, normalised, resampled; and a prediction's way back to the image's grid.

The same functions serve training and inference, so a model always meets the intensities it learned from.
Axes: (C, X, Y, Z), RAS+.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from autoseg.data.resampling import resample, resampled_shape
from autoseg.data.volumes import Volume
from autoseg.errors import DataError

NormalizeMode = Literal["ct", "mri", "pet", "meanstd", "meanstdtanh", "range", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelNorm:
    """How one image channel is normalised."""

    mode: NormalizeMode
    bounds: tuple[float, float] | None = None
    """Lower and upper intensity, for ct and range."""
    mean: float = 0.0
    std: float = 1.0
    """Mean and standard deviation of the data set's foreground, for ct."""
    nonzero: bool = False
    """Statistics of non-zero voxels alone, zero voxels stay zero, for the per-image modes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """Everything that decides how a file becomes a network's input."""

    norms: tuple[ChannelNorm, ...]
    spacing_mm: tuple[float, float, float]
    crop_foreground: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A preprocessed image and what is needed to go back."""

    image: torch.Tensor
    """(C, X, Y, Z) float32 at the plan's spacing."""
    ras_shape: tuple[int, int, int]
    """Shape in RAS before cropping."""
    box: tuple[slice, slice, slice]
    """The cropped region of the RAS volume."""

    @property
    def box_shape(self) -> tuple[int, int, int]:
        """Shape of the cropped region before resampling."""
        x, y, z = self.box
        return x.stop - x.start, y.stop - y.start, z.stop - z.start


def normalize(channel: np.ndarray, norm: ChannelNorm) -> np.ndarray:
    """Normalise one channel.

    Args:
        channel: (X, Y, Z) float32.

    Returns:
        float32 of the same shape.

    Source: ct clips to the foreground's 0.5 and 99.5 percentiles and divides by its deviation, the others take
    mean and deviation of each image, as nnU-Net does; meanstdtanh squeezes outliers to -3..3 and range scales
    bounds to 0..1, as Auto3DSeg does.
    """
    if norm.mode == "none":
        return channel
    if norm.mode in ("ct", "range"):
        if norm.bounds is None:
            raise DataError(f"normalize_mode {norm.mode} needs intensity_bounds. Set them, or choose another mode.")
        low, high = norm.bounds
        clipped = np.clip(channel, low, high)
        if norm.mode == "range":
            return (clipped - low) / max(high - low, 1e-6)
        return (clipped - norm.mean) / max(norm.std, 1e-6)
    inside = channel[channel != 0] if norm.nonzero else channel
    if inside.size == 0:
        return np.zeros_like(channel)
    # float64: a float32 sum over 10^8 voxels of a CT drifts.
    mean, std = float(inside.mean(dtype=np.float64)), float(inside.std(dtype=np.float64))
    out = (channel - np.float32(mean)) / np.float32(max(std, 1e-6))
    if norm.nonzero:
        out[channel == 0] = 0
    if norm.mode == "meanstdtanh":
        out = 3 * np.tanh(out / 3)
    return out.astype(np.float32, copy=False)


def nonzero_box(array: np.ndarray) -> tuple[slice, slice, slice]:
    """The smallest box that holds every voxel with a value above 0 in any channel; the whole where none has."""
    above: np.ndarray = np.any(array > 0, axis=0)
    box = []
    for axis in range(3):
        line = np.flatnonzero(np.moveaxis(above, axis, 0).reshape(above.shape[axis], -1).any(axis=1))
        box.append(slice(int(line[0]), int(line[-1]) + 1) if line.size else slice(0, above.shape[axis]))
    return tuple(box)  # type: ignore[return-value]


def prepare_image(volume: Volume, how: Preprocessing) -> Prepared:
    """Crop, normalise and resample an image.

    Raises:
        DataError: The number of channels is not the one the model was trained with.
    """
    array = volume.array
    if len(array) != len(how.norms):
        raise DataError(f"the image has {len(array)} channels, the model was trained with {len(how.norms)}.")
    shape: tuple[int, int, int] = array.shape[1:]
    box = nonzero_box(array) if how.crop_foreground else tuple(slice(0, s) for s in shape)
    cropped = np.stack([normalize(array[c][box], norm) for c, norm in enumerate(how.norms)])
    target = resampled_shape(cropped.shape[1:], volume.spacing_mm, how.spacing_mm)
    image = resample(torch.from_numpy(np.ascontiguousarray(cropped, np.float32)), target)
    return Prepared(image=image, ras_shape=shape, box=box)  # type: ignore[arg-type]


def prepare_label(target: np.ndarray, prepared: Prepared) -> torch.Tensor:
    """Bring an encoded target onto a prepared image's grid.

    Args:
        target: (1 or K, X, Y, Z) uint8 in RAS, as `LabelMap.encode` returns it.

    Returns:
        The same, cropped and resampled by nearest neighbour.
    """
    box = prepared.box
    cropped = np.ascontiguousarray(target[:, box[0], box[1], box[2]])
    shape: tuple[int, int, int] = tuple(prepared.image.shape[1:])  # type: ignore[assignment]
    return resample(torch.from_numpy(cropped), shape, nearest=True)
