"""Turning and scaling of a patch: which voxels of the case it is made of, and how they come to lie in it.

A patch that is turned is made of the voxels of the case that its turned box covers, so that no voxel of it is made up
where the case has a real one. What lies outside of the case is 0 and background, as in a patch that reaches beyond its
case without being turned, and counts in the loss as there.

Source: nnU-Net 2.8.1, which cuts a larger patch, turns it and crops to the centre; it cuts all patches as large as a
turn of 30 degrees about one axis needs, here the cut is as large as the drawn turn needs. nnU-Net turns voxels, which
shears where spacing differs by axis; here millimetres are turned.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

Voxels = tuple[int, int, int]

P_ROTATE, P_SCALE, MAX_ANGLE, SCALE = 0.2, 0.2, math.radians(30), (0.7, 1.4)
"""SCALE is how many voxels of the case come to lie on one of the patch: over 1 makes things smaller.
Source: nnU-Net; `SpatialTransform` of batchgeneratorsv2."""
ANISOTROPY = 3.0
"""Above this ratio of spacings, rotation stays in the plane of the two fine axes (nnU-Net)."""
OUTSIDE_WEIGHT = 100
"""What a voxel outside of the case counts in the loss, in percent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turned:
    """The voxels of a case that a turned patch is made of, and where in them the patch lies."""

    image: torch.Tensor
    """(C, X, Y, Z) of the box, float16 or float32."""
    target: torch.Tensor
    """(1 or K, X, Y, Z) of the box, uint8."""
    weighted: bool
    """Whether the last channel of the target is the voxels' weights in percent."""
    matrix: np.ndarray
    """(3, 3): from the patch's centre, in its voxels, to the box' voxels."""
    centre: np.ndarray
    """(3,): where in the box the patch's centre lies, in voxels; the first voxel's centre is 0."""

    def pinned(self) -> Turned:
        """The same in memory that a GPU copies from without a wait."""
        return self._with(self.image.pin_memory(), self.target.pin_memory())

    def to(self, device: torch.device) -> Turned:
        """The same on a device."""
        return self._with(self.image.to(device, non_blocking=True), self.target.to(device, non_blocking=True))

    def _with(self, image: torch.Tensor, target: torch.Tensor) -> Turned:
        return Turned(image=image, target=target, weighted=self.weighted, matrix=self.matrix, centre=self.centre)


def draw_matrix(rng: np.random.Generator, spacing_mm: Sequence[float], *, axial: bool) -> np.ndarray | None:
    """Draw how a patch is turned and scaled, (3, 3) from its voxels to the case's; None: it is left as it is."""
    rotate, scale = rng.random() < P_ROTATE, rng.random() < P_SCALE
    angles, factor = rng.uniform(-MAX_ANGLE, MAX_ANGLE, 3), rng.uniform(*SCALE)
    if not (rotate or scale):
        return None
    if axial:
        angles[:2] = 0
    elif max(spacing_mm) > ANISOTROPY * min(spacing_mm):
        coarse = int(np.argmax(spacing_mm))
        angles[[a for a in range(3) if a != coarse]] = 0
    matrix = rotation(angles) if rotate else np.eye(3)
    if scale:
        matrix = matrix * (np.array([factor, factor, 1.0]) if axial else factor)
    return np.diag(1 / np.asarray(spacing_mm)) @ matrix @ np.diag(spacing_mm)


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


def box_of_turned(
    matrix: np.ndarray, start: Voxels, roi: Voxels, shape: Sequence[int]
) -> tuple[tuple[slice, slice, slice], np.ndarray]:
    """The voxels of a case that a turned patch is made of; at least one, where it sees nothing of the case.

    Args:
        matrix: as `draw_matrix` gives it.
        start: first voxel of the patch in the case before it is turned; negative where it begins outside.
        roi: patch in voxels.
        shape: of the case.

    Returns:
        The box, and the patch's centre in its voxels.
    """
    half = (np.array(roi) - 1) / 2
    centre, reach = np.array(start) + half, np.abs(matrix) @ half
    # Rounding must not add a slice where the patch ends on a voxel's centre.
    first = np.clip(np.floor(centre - reach + 1e-6).astype(int), 0, np.array(shape) - 1)
    last = np.clip(np.ceil(centre + reach - 1e-6).astype(int), first, np.array(shape) - 1)
    x, y, z = (slice(int(a), int(b) + 1) for a, b in zip(first, last, strict=True))
    return (x, y, z), centre - first


def turn(turned: Turned, roi: Voxels) -> tuple[torch.Tensor, torch.Tensor]:
    """Put a turned patch together.

    Returns:
        image (C, *roi) float32, linearly interpolated, and target (1 or K, *roi), in each voxel the label that has the
        greatest part of the linear interpolation, of equal ones the nearest (nnU-Net).
    """
    positions = _positions(turned, roi)
    # grid_sample's coordinates run from -1 to 1 between the outer edges of the voxels, and from the last axis to the
    # first. affine_grid would take longer than all the rest.
    grid = torch.stack(
        [(p + 0.5).mul_(2 / size).sub_(1) for p, size in zip(positions, turned.image.shape[1:], strict=True)][::-1], -1
    ).view(1, *roi, 3)
    image = F.grid_sample(turned.image[None].float(), grid, padding_mode="zeros", align_corners=False)[0]
    number = len(turned.target) - turned.weighted
    outside = [0] * number + [OUTSIDE_WEIGHT] * turned.weighted
    target = [_largest_part(channel, positions, value) for channel, value in zip(turned.target, outside, strict=True)]
    return image, torch.stack(target).view(-1, *roi)


def _positions(turned: Turned, roi: Voxels) -> list[torch.Tensor]:
    """Where in the box each voxel of the patch comes from, along each axis (N,), float32."""
    device = turned.image.device
    positions = []
    for row, centre in zip(turned.matrix, turned.centre, strict=True):
        offsets = [(np.arange(r) - (r - 1) / 2) * m for r, m in zip(roi, row, strict=True)]
        offsets[2] += centre
        x, y, z = (torch.from_numpy(o.astype(np.float32)).to(device) for o in offsets)
        positions.append((x[:, None, None] + (y[:, None] + z)).flatten())
    return positions


def _largest_part(labels: torch.Tensor, positions: Sequence[torch.Tensor], outside: int) -> torch.Tensor:
    """The label with the greatest part of the linear interpolation at each position.

    Args:
        labels: (X, Y, Z) uint8.
        positions: along each axis (N,), in voxels.
        outside: label of all that lies outside.

    Returns:
        (N,) uint8.
    """
    # One voxel more on each side stands for all that lies outside. A cell is the space between 8 voxels.
    padded = F.pad(labels, (1,) * 6, value=outside)
    lowest = highest = padded
    for axis, size in enumerate(padded.shape):
        pairs = [[v.narrow(axis, first, size - 1) for first in (0, 1)] for v in (lowest, highest)]
        lowest, highest = torch.minimum(*pairs[0]), torch.maximum(*pairs[1])
    inside = [(p + 1).clamp_(0, size - 1.001) for p, size in zip(positions, padded.shape, strict=True)]
    cell = [p.to(torch.int32) for p in inside]
    flat = (cell[0] * lowest.shape[1] + cell[1]).mul_(lowest.shape[2]).add_(cell[2])
    result = lowest.flatten().index_select(0, flat)
    mixed = highest.flatten().index_select(0, flat) != result
    # Cells of one label need no vote. A GPU would have to be waited for to know them, and votes everywhere instead.
    chosen = mixed.nonzero()[:, 0] if labels.device.type == "cpu" else slice(None)
    cell = [c[chosen].long() for c in cell]
    parts = [p[chosen] - c for p, c in zip(inside, cell, strict=True)]
    corners = list(itertools.product((0, 1), repeat=3))
    around = torch.stack([padded[tuple(c + step for c, step in zip(cell, corner, strict=True))] for corner in corners])
    shares = torch.stack(
        [math.prod(p if step else 1 - p for p, step in zip(parts, corner, strict=True)) for corner in corners]  # type: ignore[misc]
    )
    votes = torch.stack([(shares * (around == one)).sum(0) for one in around])
    # The nearest voxel's share, made small, settles what is equal.
    winner = (votes + 1e-4 * shares).argmax(0, keepdim=True)
    result[chosen] = around.gather(0, winner)[0]
    return result
