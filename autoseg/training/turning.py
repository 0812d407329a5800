"""Turning and scaling of a patch: which voxels of the case it is made of, and how they come to lie in it.

A patch that is turned is made of the voxels of the case that its turned box covers, so that no voxel of it is made up
where the case has a real one. What lies outside of the case is 0 and background, as in a patch that reaches beyond its
case without being turned, and counts in the loss as there.

Source: nnU-Net 2.8.1, which cuts a larger patch, turns it and crops to the centre; it cuts all patches as large as a
turn of 30 degrees about one axis needs, here the cut is as large as the drawn turn needs. nnU-Net turns voxels, which
shears where spacing differs by axis; here millimetres are turned.

Thick slices and flat patches are turned and scaled in their plane alone (nnU-Net's "dummy 2D"): across it, neighbouring
voxels have too little to do with each other to be interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

Voxels = tuple[int, int, int]

P_ROTATE, P_SCALE, MAX_ANGLE, MAX_ANGLE_IN_PLANE, SCALE = 0.2, 0.2, math.radians(30), math.pi, (0.7, 1.4)
"""SCALE is how many voxels of the case come to lie on one of the patch: over 1 makes things smaller.
Source: nnU-Net; `SpatialTransform` of batchgeneratorsv2."""
ANISOTROPY = 3.0
"""Above this ratio slices are thick, and patches flat. Source: nnU-Net's ANISO_THRESHOLD."""
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
    places: torch.Tensor
    """(3, sum of the patch's edges) float32: along each axis of the box, what the patch's voxels along X, then Y, then
    Z add to the place they come from, in voxels; the first voxel's centre is 0."""
    through: int | None
    """The axis across the plane that the patch is turned in; None: it is turned in space."""
    first_slice: int
    """Of the patch, along `through`, that the box begins with; 0 where it is turned in space."""

    def pinned(self) -> Turned:
        """The same in memory that a GPU copies from without a wait."""
        return self._each(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> Turned:
        """The same on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Turned:
        return replace(self, image=move(self.image), target=move(self.target), places=move(self.places))


def thick_axis(spacing_mm: Sequence[float], roi: Voxels) -> int | None:
    """The axis across thick slices, or across a flat patch; None where there is none.

    Source: nnU-Net 2.8.1, which asks in its planning for one spacing over 3 times all others, and turns patches in
    their plane where the longest edge is over 3 times that along the coarsest axis. Here either is enough: patches
    here may be cubes on thick slices, and a volume of few slices need not have thick ones.
    """
    coarse = int(np.argmax(spacing_mm))
    others = [s for axis, s in enumerate(spacing_mm) if axis != coarse]
    if spacing_mm[coarse] > ANISOTROPY * max(others):
        return coarse
    return int(np.argmin(roi)) if max(roi) > ANISOTROPY * min(roi) else None


def draw_matrix(
    rng: np.random.Generator, spacing_mm: Sequence[float], *, through: int | None, max_angle: float
) -> np.ndarray | None:
    """Draw how a patch is turned and scaled, (3, 3) from its voxels to the case's; None: it is left as it is.

    Args:
        through: the axis that stays as it is; None: none does.
        max_angle: in radians.
    """
    rotate, scale = rng.random() < P_ROTATE, rng.random() < P_SCALE
    angles, factor = rng.uniform(-max_angle, max_angle, 3), rng.uniform(*SCALE)
    if not (rotate or scale):
        return None
    factors = np.full(3, factor)
    if through is not None:
        angles[[axis for axis in range(3) if axis != through]] = 0
        factors[through] = 1
    matrix = (rotation(angles) if rotate else np.eye(3)) * (factors if scale else 1)
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


def places_in_box(matrix: np.ndarray, centre: np.ndarray, roi: Voxels) -> np.ndarray:
    """What the voxels along each edge of a patch add to where they come from: `Turned.places`.

    Args:
        centre: of the patch, in the box' voxels.
    """
    edges = [np.outer(matrix[:, axis], np.arange(size) - (size - 1) / 2) for axis, size in enumerate(roi)]
    for axis, edge in enumerate(edges):  # each axis' own, since one may be left out
        edge[axis] += centre[axis]
    return np.hstack(edges).astype(np.float32)


def axis_left_alone(matrix: np.ndarray) -> int | None:
    """The one axis that a matrix neither turns nor scales; None: there is none."""
    changes = np.abs(matrix - np.eye(3)) > 1e-12
    alone = np.flatnonzero(~changes.any(0) & ~changes.any(1))
    return int(alone[0]) if len(alone) else None


def turn(turned: Turned, roi: Voxels) -> tuple[torch.Tensor, torch.Tensor]:
    """Put a turned patch together.

    Returns:
        image (C, *roi) float32, linearly interpolated, and target (1 or K, *roi), in each voxel the label that has the
        greatest part of the linear interpolation, of equal ones the nearest (nnU-Net).
    """
    number = len(turned.target) - turned.weighted
    outside = [0] * number + [OUTSIDE_WEIGHT] * turned.weighted
    through = turned.through
    if through is None:
        places = _places(turned.places, (0, 1, 2), roi)
        image = _interpolated(turned.image.float(), places)
        target = [largest_part(c[None], places, value)[0] for c, value in zip(turned.target, outside, strict=True)]
        return image, torch.stack(target)
    # All slices at once, by one plane's places.
    places = _places(turned.places, [axis for axis in range(3) if axis != through], roi)
    box = turned.image.movedim(through + 1, 1)
    slices = _interpolated(box.flatten(0, 1).float(), places).unflatten(0, box.shape[:2])
    labels = [
        largest_part(c.movedim(through, 0), places, value) for c, value in zip(turned.target, outside, strict=True)
    ]
    return _among_slices(slices, [0.0] * len(slices), turned, roi), _among_slices(labels, outside, turned, roi)


def _among_slices(
    channels: Sequence[torch.Tensor] | torch.Tensor, outside: Sequence[float], turned: Turned, roi: Voxels
) -> torch.Tensor:
    """Channels (slices of the box, U, V) among all slices of the patch, (C, *roi); where there is none, `outside`."""
    assert turned.through is not None
    padded = []
    for channel, value in zip(channels, outside, strict=True):
        before = turned.first_slice
        after = roi[turned.through] - len(channel) - before
        padded.append(F.pad(channel, (0, 0, 0, 0, before, after), value=value).movedim(0, turned.through))
    return torch.stack(padded)


def _places(steps: torch.Tensor, axes: Sequence[int], roi: Voxels) -> list[torch.Tensor]:
    """Where in the box the voxels come from, along some axes; each of the patch's edges along those axes."""
    along = steps.split(list(roi), 1)
    first, *others = axes
    places = []
    for axis in axes:
        total = along[first][axis]
        for other in others:
            total = total[..., None] + along[other][axis]
        places.append(total)
    return places


def _interpolated(volumes: torch.Tensor, places: Sequence[torch.Tensor]) -> torch.Tensor:
    """Channels (C, *box) at some places, linearly; outside is 0. Of a plane or of a volume."""
    # grid_sample's coordinates run from -1 to 1 between the outer edges of the voxels, and from the last axis to the
    # first. affine_grid would take longer than all the rest.
    grid = [(p + 0.5).mul_(2 / size).sub_(1) for p, size in zip(places, volumes.shape[1:], strict=True)]
    return F.grid_sample(
        volumes[None], torch.stack(grid[::-1], -1)[None], mode="bilinear", padding_mode="zeros", align_corners=False
    )[0]


def largest_part(
    labels: torch.Tensor, places: Sequence[torch.Tensor], outside: int, *, everywhere: bool | None = None
) -> torch.Tensor:
    """The label with the greatest part of the linear interpolation at some places.

    Args:
        labels: (S, *box) uint8, of a volume, or of S slices that are put together alike.
        places: along each axis of the box, of any shape, in voxels.
        outside: label of all that lies outside.
        everywhere: vote where all neighbours have one label, too: to know where, a GPU would have to be waited for.
            None: not on a CPU. The labels are the same.

    Returns:
        (S, *shape of the places) uint8.
    """
    # One voxel more on each side stands for all that lies outside. A cell is the space between neighbouring voxels.
    padded = F.pad(labels, (1, 1) * len(places), value=outside)
    sizes = padded.shape[1:]
    lowest = highest = padded
    for axis, size in enumerate(sizes, start=1):
        pairs = [[v.narrow(axis, first, size - 1) for first in (0, 1)] for v in (lowest, highest)]
        lowest, highest = torch.minimum(*pairs[0]), torch.maximum(*pairs[1])
    inside = [(p.flatten() + 1).clamp_(0, size - 1.001) for p, size in zip(places, sizes, strict=True)]
    cell = [p.to(torch.int32) for p in inside]
    flat = cell[0]
    for c, size in zip(cell[1:], lowest.shape[2:], strict=True):
        flat = flat * size + c
    result = lowest.flatten(1).index_select(1, flat)
    if everywhere is None:
        everywhere = labels.device.type != "cpu"
    if everywhere:
        every = [torch.arange(size, device=labels.device) for size in result.shape]
        which = tuple(index.flatten() for index in torch.meshgrid(*every, indexing="ij"))
    else:
        which = (highest.flatten(1).index_select(1, flat) != result).nonzero(as_tuple=True)
    lower = [c.long()[which[1]] for c in cell]
    base = which[0]
    for c, size in zip(lower, sizes, strict=True):
        base = base * size + c
    offsets, shares = [0], torch.ones(1, len(base), device=labels.device)
    for stride, c, p in zip(padded.stride()[1:], lower, inside, strict=True):
        part = p[which[1]] - c
        offsets = [o + step for o in offsets for step in (0, stride)]
        shares = (shares[:, None] * torch.stack([1 - part, part])).flatten(0, 1)
    around = torch.stack([padded.flatten()[base + offset] for offset in offsets])
    votes = torch.stack([(shares * (around == one)).sum(0) for one in around])
    # The nearest voxel's share, made small, settles what is equal.
    winner = (votes + 1e-4 * shares).argmax(0, keepdim=True)
    result[which] = around.gather(0, winner)[0]
    return result.unflatten(1, places[0].shape)
