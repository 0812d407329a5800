"""Random changes of a batch of patches, on the training device.

Probabilities, ranges and what is drawn for each channel are nnU-Net's (`nnUNetTrainer.get_training_transforms` of
nnunetv2 2.8.1 with the transforms of batchgeneratorsv2 0.3.6) unless a line says otherwise. Parameters are drawn per
sample on the host from the sample's own random state; the voxel work is torch's, for all channels that drew the same
change at once. Axes: (B, C, X, Y, Z).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F

from autoseg.hardware.device import without_wait
from autoseg.training.turning import MAX_ANGLE, MAX_ANGLE_IN_PLANE, Turned, Voxels, draw_matrix, thick_axis, turn

if TYPE_CHECKING:
    from autoseg.plan import Plan

Strength = Literal["default", "light", "axial"]
P_NOISE, MAX_NOISE_SIGMA = 0.1, 0.1
"""One standard deviation for all channels. nnU-Net calls the number a variance, but `GaussianNoiseTransform` takes it
as the deviation, and so were its published models trained."""
P_BLUR, P_BLUR_CHANNEL, BLUR_SIGMA = 0.2, 0.5, (0.5, 1.0)
P_BRIGHTNESS, P_CONTRAST, FACTOR = 0.15, 0.15, (0.75, 1.25)
P_LOW_RESOLUTION, P_LOW_RESOLUTION_CHANNEL, ZOOM = 0.25, 0.5, (0.5, 1.0)
P_GAMMA, P_GAMMA_INVERTED, GAMMA = 0.3, 0.1, (0.7, 1.5)
P_HISTOGRAM, CONTROL_POINTS = 0.1, 10
"""Source: MONAI's RandHistogramShift and its defaults; the FLARE23 paper names it."""
P_MIRROR = 0.5
SHADING = ("brightness", "contrast")
KINDS: dict[Strength, tuple[str, ...]] = {
    "default": ("rotate", "scale", "noise", "blur", *SHADING, "low_resolution", "gamma_inverted", "gamma", "histogram"),
    "light": SHADING,
    "axial": ("rotate", "scale", "contrast", "histogram"),
}
"""Changes besides mirroring. axial: those that the FLARE23 paper names, turned and scaled in the axial plane alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """What one sample drew: the change's parameter, None where it is left as it is."""

    matrix: np.ndarray | None = None
    """(3, 3): where in the case, in voxels from the patch's centre, a voxel of the patch comes from."""
    flips: tuple[int, ...] = ()
    """Axes that are mirrored."""
    noise: tuple[int, float] | None = None
    """Seed and standard deviation."""
    blur: np.ndarray | None = None
    """(C, 3): sigma in voxels along each axis. NaN, here and below: the channel is left as it is."""
    brightness: np.ndarray | None = None
    """(C,)."""
    contrast: np.ndarray | None = None
    """(C,)."""
    low_resolution: np.ndarray | None = None
    """(C, 3): edge lengths are multiplied by it and brought back."""
    gamma_inverted: np.ndarray | None = None
    """(C,)."""
    gamma: np.ndarray | None = None
    """(C,)."""
    histogram: np.ndarray | None = None
    """(CONTROL_POINTS,) rising from 0 to 1: where evenly spaced intensities go."""


def draw(
    rng: np.random.Generator,
    num_channels: int,
    spacing_mm: Sequence[float],
    roi: Voxels,
    mirror_axes: Sequence[int],
    strength: Strength,
) -> Draw:
    """Draw one sample's changes.

    Args:
        spacing_mm, roi: of the patches, which say whether they are turned in a plane alone.
        mirror_axes: axes mirrored with probability 1/2 each.
        strength: default; light: mirroring, brightness and contrast alone; axial: see `KINDS`.
    """
    kinds = KINDS[strength]
    through = 2 if strength == "axial" else thick_axis(spacing_mm, roi)
    max_angle = MAX_ANGLE if strength == "axial" or through is None else MAX_ANGLE_IN_PLANE

    def happens(kind: str, probability: float) -> bool:
        return kind in kinds and rng.random() < probability

    def factors(kind: str, probability: float, low: float, high: float) -> np.ndarray | None:
        drawn = happens(kind, probability)
        return np.array([_draw_factor(rng, low, high) for _ in range(num_channels)]) if drawn else None

    matrix = draw_matrix(rng, spacing_mm, through=through, max_angle=max_angle) if "rotate" in kinds else None
    mirrored = rng.random(3) < P_MIRROR
    noise = (int(rng.integers(2**31)), float(rng.uniform(0, MAX_NOISE_SIGMA))) if happens("noise", P_NOISE) else None
    blur_sigma = low_resolution = None
    if happens("blur", P_BLUR):
        blur_sigma = _of_some_channels(rng, rng.uniform(*BLUR_SIGMA, (num_channels, 3)), P_BLUR_CHANNEL)
    brightness = factors("brightness", P_BRIGHTNESS, *FACTOR)
    contrast = factors("contrast", P_CONTRAST, *FACTOR)
    if happens("low_resolution", P_LOW_RESOLUTION):
        zooms = np.repeat(rng.uniform(*ZOOM, (num_channels, 1)), 3, axis=1)
        if through is not None:
            zooms[:, through] = 1
        low_resolution = _of_some_channels(rng, zooms, P_LOW_RESOLUTION_CHANNEL)
    return Draw(
        matrix=matrix,
        flips=tuple(a for a in mirror_axes if mirrored[a]),
        noise=noise,
        blur=blur_sigma,
        brightness=brightness,
        contrast=contrast,
        low_resolution=low_resolution,
        gamma_inverted=factors("gamma_inverted", P_GAMMA_INVERTED, *GAMMA),
        gamma=factors("gamma", P_GAMMA, *GAMMA),
        histogram=_draw_histogram(rng) if happens("histogram", P_HISTOGRAM) else None,
    )


def _draw_factor(rng: np.random.Generator, low: float, high: float) -> float:
    """A factor that is as often below 1 as above. Source: batchgeneratorsv2's BGContrast."""
    return float(rng.uniform(low, 1.0) if rng.random() < 0.5 else rng.uniform(1.0, high))


def _of_some_channels(rng: np.random.Generator, values: np.ndarray, probability: float) -> np.ndarray | None:
    """Values (C, ...) with NaN for the channels that are left as they are; None where all are."""
    changed = rng.random(len(values)) < probability
    values[~changed] = math.nan
    return values if changed.any() else None


def _draw_histogram(rng: np.random.Generator) -> np.ndarray:
    points = np.linspace(0, 1, CONTROL_POINTS)
    for i in range(1, CONTROL_POINTS - 1):
        points[i] = rng.uniform(points[i - 1], points[i + 1])
    return points


def draw_sample(plan: Plan, rng: np.random.Generator, unannotated: np.ndarray, filled: np.ndarray) -> Draw:
    """Draw a sample's changes as the plan has them.

    Args:
        unannotated: (K,) bool, the classes that the sample was not annotated for. One that is annotated for one side of
            a pair alone is not mirrored along X: it would come to show the side that is not annotated.
        filled: (K,) bool, the classes that models filled in; of a pair both or none, for the same reason.
    """
    if plan.augment == "none":
        return Draw()
    one_sided = any(unannotated[a] != unannotated[b] or filled[a] != filled[b] for a, b in plan.mirrored_classes)
    axes = [a for a in plan.mirror_axes if a != 0 or not one_sided]
    return draw(rng, len(plan.channels), plan.resample_resolution, plan.roi_size, axes, plan.augment)


def augment_batch(
    images: torch.Tensor,
    targets: torch.Tensor,
    draws: Sequence[Draw],
    turned: Mapping[int, Turned],
    *,
    lateral_pairs: Sequence[tuple[int, int]],
    sigmoid: bool,
) -> None:
    """Make the drawn changes, in place.

    Args:
        images: (B, C, X, Y, Z) float32; the samples that are turned are filled in.
        targets: (B, 1 or K, X, Y, Z) uint8; one channel more of voxels' weights may follow.
        draws: one per sample.
        turned: of the samples that drew a matrix, by their place in the batch; on the images' device.
        lateral_pairs: pairs of classes, from 0, that are swapped where a sample is mirrored along X.
    """
    x, y, z = images.shape[2:]
    for i, one in turned.items():
        images[i], targets[i] = turn(one, (x, y, z))
    for flips in {d.flips for d in draws if d.flips}:
        chosen = without_wait([i for i, d in enumerate(draws) if d.flips == flips], images.device)
        dims = [a + 2 for a in flips]
        images[chosen], mirrored = images[chosen].flip(dims), targets[chosen].flip(dims)
        if 0 in flips and lateral_pairs:
            mirrored = swap_sides(mirrored, lateral_pairs, sigmoid=sigmoid)
        targets[chosen] = mirrored
    for i, drawn in enumerate(draws):
        if drawn.noise is not None:
            seed, sigma = drawn.noise
            generator = torch.Generator(images.device).manual_seed(seed)
            images[i] += torch.randn(images[i].shape, generator=generator, device=images.device) * sigma
    _change(images, [d.blur for d in draws], blur)
    _change(images, [d.brightness for d in draws], torch.mul)
    _change(images, [d.contrast for d in draws], _contrast)
    for i, drawn in enumerate(draws):
        for c, zooms in enumerate([] if drawn.low_resolution is None else drawn.low_resolution):
            if not np.isnan(zooms).any():
                images[i, c] = _coarsen(images[i, c], zooms)
    _change(images, [d.gamma_inverted for d in draws], lambda volumes, gamma: -_gamma(-volumes, gamma))
    _change(images, [d.gamma for d in draws], _gamma)
    for i, drawn in enumerate(draws):
        if drawn.histogram is not None:
            images[i] = shift_histogram(images[i], drawn.histogram)


def _change(
    images: torch.Tensor,
    values: Sequence[np.ndarray | None],
    change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    """Apply a change to the channels that drew it, all at once, in place.

    Args:
        images: (B, C, X, Y, Z).
        values: of each sample (C, ...), NaN where a channel is left as it is; None where all are.
        change: of volumes (N, X, Y, Z) and what each drew, (N, ..., 1, 1, 1).
    """
    drawn = [(i, c, value) for i, row in enumerate(values) if row is not None for c, value in enumerate(row)]
    drawn = [(i, c, value) for i, c, value in drawn if not np.isnan(value).any()]
    if drawn:
        samples, channels, rows = zip(*drawn, strict=True)
        parameter = without_wait(np.array(rows), images.device, images.dtype)
        chosen = (without_wait(samples, images.device), without_wait(channels, images.device))
        images[chosen] = change(images[chosen], parameter[..., None, None, None])


def swap_sides(target: torch.Tensor, pairs: Sequence[tuple[int, int]], *, sigmoid: bool) -> torch.Tensor:
    """Exchange the left and right class of each pair in encoded targets (..., 1 or K, X, Y, Z), and weights after."""
    if sigmoid:
        order = list(range(target.shape[-4]))
        for a, b in pairs:
            order[a], order[b] = b, a
        return target.index_select(-4, without_wait(order, target.device))
    values = np.arange(256, dtype=np.uint8)
    for a, b in pairs:
        values[[a + 1, b + 1]] = b + 1, a + 1
    table = without_wait(values, target.device)
    return torch.cat([table[target[..., :1, :, :, :].long()], target[..., 1:, :, :, :]], -4)


BLUR_RADIUS = math.ceil(3 * BLUR_SIGMA[1])
"""Voxels to each side that a blur looks at: three times the widest sigma."""


def blur(volumes: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Gaussian blur of (N, X, Y, Z) by three passes of shifted sums; sigma (N, 3, 1, 1, 1) in voxels of each axis."""
    offsets = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, dtype=volumes.dtype, device=volumes.device)
    kernel = torch.exp(-0.5 * (offsets.view(-1, 1, 1, 1, 1, 1) / sigma) ** 2)
    kernel = kernel / kernel.sum(0)
    for axis in range(3):
        pad = [0] * 6
        pad[2 * (2 - axis)] = pad[2 * (2 - axis) + 1] = BLUR_RADIUS
        padded, size = F.pad(volumes[None], pad, mode="replicate")[0], volumes.shape[axis + 1]
        along = kernel[:, :, axis]
        volumes = along[0] * padded.narrow(axis + 1, 0, size)
        for k in range(1, 2 * BLUR_RADIUS + 1):
            volumes = volumes.addcmul_(along[k].expand_as(volumes), padded.narrow(axis + 1, k, size))
    return volumes


def _coarsen(volume: torch.Tensor, zooms: np.ndarray) -> torch.Tensor:
    small = [max(1, round(s * zoom)) for s, zoom in zip(volume.shape, zooms, strict=True)]
    low = F.interpolate(volume[None, None], size=small, mode="nearest-exact")
    return F.interpolate(low, size=volume.shape, mode="trilinear", align_corners=False)[0, 0]


def _contrast(volumes: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    dims = (1, 2, 3)
    mean = volumes.mean(dims, keepdim=True)
    return ((volumes - mean) * factor + mean).clamp(volumes.amin(dims, keepdim=True), volumes.amax(dims, keepdim=True))


def _gamma(volumes: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """Gamma on volumes (N, X, Y, Z) scaled to 0..1; mean and deviation are kept."""
    dims = (1, 2, 3)
    mean, std = volumes.mean(dims, keepdim=True), volumes.std(dims, keepdim=True)
    low = volumes.amin(dims, keepdim=True)
    span = (volumes.amax(dims, keepdim=True) - low).clamp(min=1e-7)
    bent = ((volumes - low) / span) ** gamma * span + low
    return (bent - bent.mean(dims, keepdim=True)) / bent.std(dims, keepdim=True).clamp(min=1e-7) * std + mean


def shift_histogram(image: torch.Tensor, points: np.ndarray) -> torch.Tensor:
    """Send evenly spaced intensities of (C, X, Y, Z) to the given ones, linearly between them; the ends stay."""
    low, high = image.min(), image.max()
    span = (high - low).clamp(min=1e-7)
    goal = without_wait(points, image.device, image.dtype)
    place = (image - low) / span * (len(points) - 1)
    left = place.floor().clamp(0, len(points) - 2)
    index = left.long()
    return (goal[index] + (place - left) * (goal[index + 1] - goal[index])) * span + low
