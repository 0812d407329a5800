"""Random changes of a batch of patches, on the training device.

Probabilities and ranges are nnU-Net's (Isensee et al. 2021, supplement; batchgeneratorsv2) unless a line says
otherwise. Parameters are drawn per sample on the host from the sample's own random state; the voxel work is
torch's. Axes: (B, C, X, Y, Z).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

P_ROTATE, P_SCALE, MAX_ANGLE, SCALE = 0.2, 0.2, math.radians(30), (0.7, 1.4)
P_NOISE, MAX_NOISE_VARIANCE = 0.1, 0.1
P_BLUR, BLUR_SIGMA = 0.2, (0.5, 1.0)
P_BRIGHTNESS, P_CONTRAST, FACTOR = 0.15, 0.15, (0.75, 1.25)
P_LOW_RESOLUTION, ZOOM = 0.25, (0.5, 1.0)
P_GAMMA, P_GAMMA_INVERTED, GAMMA = 0.3, 0.1, (0.7, 1.5)
P_MIRROR = 0.5
ANISOTROPY = 3.0
"""Above this ratio of spacings, rotation stays in the plane of the two fine axes (nnU-Net)."""


def augment_batch(
    images: torch.Tensor,
    targets: torch.Tensor,
    rngs: Sequence[np.random.Generator],
    *,
    spacing_mm: Sequence[float],
    mirror_axes: Sequence[int],
    left_right_pairs: Sequence[tuple[int, int]],
    sigmoid: bool,
    light: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Augment a batch.

    Args:
        images: (B, C, X, Y, Z) float32.
        targets: (B, 1 or K, X, Y, Z) uint8.
        rngs: one per sample.
        spacing_mm: voxel size, so that rotation does not shear.
        mirror_axes: axes mirrored with probability 1/2 each; X swaps the left/right classes.
        left_right_pairs: pairs of classes, from 0.
        light: mirror and change brightness and contrast, no more.

    Returns:
        New images and targets of the same shapes.
    """
    out_images, out_targets = [], []
    for image, target, rng in zip(images, targets, rngs, strict=True):
        if not light:
            image, target = _affine(image, target, rng, spacing_mm)
        image, target = _mirror(image, target, rng, mirror_axes, left_right_pairs, sigmoid)
        out_images.append(_shading(image, rng) if light else _intensity(image, rng))
        out_targets.append(target)
    return torch.stack(out_images), torch.stack(out_targets)


def _affine(
    image: torch.Tensor, target: torch.Tensor, rng: np.random.Generator, spacing_mm: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    rotate, scale = rng.random() < P_ROTATE, rng.random() < P_SCALE
    angles, factor = rng.uniform(-MAX_ANGLE, MAX_ANGLE, 3), rng.uniform(*SCALE)
    if not (rotate or scale):
        return image, target
    if max(spacing_mm) > ANISOTROPY * min(spacing_mm):
        coarse = int(np.argmax(spacing_mm))
        angles[[a for a in range(3) if a != coarse]] = 0
    matrix = rotation(angles) if rotate else np.eye(3)
    if scale:
        matrix = matrix / factor
    # Normalised coordinates run -1..1 along each axis: go to mm, turn, and come back.
    half_mm = np.array(image.shape[1:]) * np.asarray(spacing_mm) / 2
    matrix = np.diag(1 / half_mm) @ matrix @ np.diag(half_mm)
    # torch orders coordinates from the last axis to the first.
    theta = torch.zeros(1, 3, 4)
    theta[0, :, :3] = torch.from_numpy(matrix[::-1, ::-1].copy())
    grid = F.affine_grid(theta, [1, 1, *image.shape[1:]], align_corners=False).to(image.device)
    image = F.grid_sample(image[None], grid, mode="bilinear", padding_mode="border", align_corners=False)[0]
    turned = F.grid_sample(target[None].float(), grid, mode="nearest", padding_mode="border", align_corners=False)[0]
    return image, turned.to(target.dtype)


def rotation(angles: np.ndarray) -> np.ndarray:
    """Rotation about X, then Y, then Z; (3,) radians -> (3, 3)."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = (a for a in range(3) if a != axis)
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = math.cos(angle)
        turn[i, j], turn[j, i] = -math.sin(angle), math.sin(angle)
        matrix = turn @ matrix
    return matrix


def _mirror(
    image: torch.Tensor,
    target: torch.Tensor,
    rng: np.random.Generator,
    axes: Sequence[int],
    pairs: Sequence[tuple[int, int]],
    sigmoid: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = rng.random(3) < P_MIRROR
    flips = [a for a in axes if drawn[a]]
    if not flips:
        return image, target
    dims = [a + 1 for a in flips]
    image, target = image.flip(dims), target.flip(dims)
    if 0 in flips and pairs:
        target = swap_sides(target, pairs, sigmoid=sigmoid)
    return image, target


def swap_sides(target: torch.Tensor, pairs: Sequence[tuple[int, int]], *, sigmoid: bool) -> torch.Tensor:
    """Exchange the left and right class of each pair in an encoded target (1 or K, X, Y, Z)."""
    if sigmoid:
        order = list(range(len(target)))
        for a, b in pairs:
            order[a], order[b] = b, a
        return target[order]
    table = torch.arange(256, dtype=torch.uint8, device=target.device)
    for a, b in pairs:
        table[a + 1], table[b + 1] = b + 1, a + 1
    return table[target.long()]


def _shading(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    if rng.random() < P_BRIGHTNESS:
        image = image * rng.uniform(*FACTOR)
    if rng.random() < P_CONTRAST:
        image = _contrast(image, rng.uniform(*FACTOR))
    return image


def _intensity(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    if rng.random() < P_NOISE:
        generator = torch.Generator(image.device).manual_seed(int(rng.integers(2**31)))
        noise = torch.randn(image.shape, generator=generator, device=image.device)
        image = image + noise * math.sqrt(rng.uniform(0, MAX_NOISE_VARIANCE))
    if rng.random() < P_BLUR:
        image = blur(image, rng.uniform(*BLUR_SIGMA))
    image = _shading(image, rng)
    if rng.random() < P_LOW_RESOLUTION:
        zoom = rng.uniform(*ZOOM)
        small = [max(1, round(s * zoom)) for s in image.shape[1:]]
        low = F.interpolate(image[None], size=small, mode="nearest-exact")
        image = F.interpolate(low, size=image.shape[1:], mode="trilinear", align_corners=False)[0]
    for probability, sign in ((P_GAMMA_INVERTED, -1), (P_GAMMA, 1)):
        if rng.random() < probability:
            image = sign * _gamma(sign * image, rng.uniform(*GAMMA))
    return image


def blur(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur of (C, X, Y, Z) by three passes of a 1D kernel; sigma in voxels."""
    radius = max(1, math.ceil(3 * sigma))
    x = torch.arange(-radius, radius + 1, dtype=image.dtype, device=image.device)
    kernel = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = kernel / kernel.sum()
    out = image[:, None]  # channels as batch
    for axis in range(3):
        shape, pad = [1, 1, 1, 1, 1], [0] * 6
        shape[axis + 2] = -1
        pad[2 * (2 - axis)] = pad[2 * (2 - axis) + 1] = radius
        out = F.conv3d(F.pad(out, pad, mode="replicate"), kernel.view(shape))
    return out[:, 0]


def _contrast(image: torch.Tensor, factor: float) -> torch.Tensor:
    mean = image.mean((1, 2, 3), keepdim=True)
    low, high = image.amin((1, 2, 3), keepdim=True), image.amax((1, 2, 3), keepdim=True)
    return ((image - mean) * factor + mean).clamp(low, high)


def _gamma(image: torch.Tensor, gamma: float) -> torch.Tensor:
    """Gamma on the image scaled to 0..1; mean and deviation are kept."""
    dims = (1, 2, 3)
    mean, std = image.mean(dims, keepdim=True), image.std(dims, keepdim=True)
    low = image.amin(dims, keepdim=True)
    span = (image.amax(dims, keepdim=True) - low).clamp(min=1e-7)
    bent = ((image - low) / span) ** gamma * span + low
    return (bent - bent.mean(dims, keepdim=True)) / bent.std(dims, keepdim=True).clamp(min=1e-7) * std + mean
