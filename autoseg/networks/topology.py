"""Where a network halves which axis, and along which axes its kernels reach: one rule for all that can follow it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autoseg.networks.sizing import Sizing, fit_roi

Triple = tuple[int, int, int]

LEAST_VOXELS = 4
"""Voxels that an axis keeps at the coarsest stage. Source: nnU-Net (`UNet_featuremap_min_edge_length`)."""
COARSER = 2.0
"""An axis whose voxels are this many times longer than the finest is neither halved nor looked along by a kernel: its
neighbours are further apart than those of the others. Source: nnU-Net (`get_pool_and_conv_props`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Stages from the finest to the coarsest."""

    strides: tuple[Triple, ...]
    """Of each stage against the one before; ones for the first."""
    kernels: tuple[Triple, ...]
    """1 or 3 along each axis."""

    @property
    def divisor(self) -> Triple:
        """What each edge of a patch must be a multiple of."""
        return divisor_of(self.strides)

    @property
    def halvings(self) -> Triple:
        """How often each axis is halved in all."""
        x, y, z = self.divisor
        return x.bit_length() - 1, y.bit_length() - 1, z.bit_length() - 1


def divisor_of(strides: Sequence[Sequence[int]]) -> Triple:
    """The product of strides along each axis."""
    total = [1, 1, 1]
    for stride in strides:
        total = [a * b for a, b in zip(total, stride, strict=True)]
    return total[0], total[1], total[2]


def topology_for(
    spacing_mm: Sequence[float], patch: Sequence[int], *, most_stages: int = 6, least_voxels: int = LEAST_VOXELS
) -> Topology:
    """Halve an axis while its extent and its spacing allow it.

    Args:
        spacing_mm: of the voxels the network sees, along X, Y, Z.
        patch: edges in voxels.
        most_stages: with the first one, at full resolution.
        least_voxels: that an axis keeps at the coarsest stage.

    Source: nnU-Net's `get_pool_and_conv_props`: an axis is halved while it keeps `least_voxels`, and while its spacing
    is less than `COARSER` times the finest of the axes that can be halved; a kernel reaches along an axis from the
    stage on where its spacing is less than `COARSER` times the finest. The last axis alone is halved only while it
    keeps half as many voxels more, as there.
    """
    spacing, size = list(spacing_mm), list(patch)
    kernel = [1, 1, 1]
    strides: list[Triple] = [(1, 1, 1)]
    kernels: list[Triple] = []
    while len(strides) < most_stages:
        long_enough = [a for a in range(3) if size[a] >= 2 * least_voxels]
        if not long_enough:
            break
        finest = min(spacing[a] for a in long_enough)
        halved = [a for a in long_enough if spacing[a] < COARSER * finest]
        if len(halved) == 1 and size[halved[0]] < 3 * least_voxels:
            break
        finest = min(spacing)
        kernel = [3 if k == 3 or s < COARSER * finest else 1 for k, s in zip(kernel, spacing, strict=True)]
        kernels.append((kernel[0], kernel[1], kernel[2]))
        stride = [2 if a in halved else 1 for a in range(3)]
        strides.append((stride[0], stride[1], stride[2]))
        spacing = [s * f for s, f in zip(spacing, stride, strict=True)]
        size = [-(-n // f) for n, f in zip(size, stride, strict=True)]
    return Topology(strides=tuple(strides), kernels=(*kernels, (3, 3, 3)))


def patch_and_topology(
    sizing: Sizing, max_voxels: int, *, most_stages: int, least_voxels: int = LEAST_VOXELS
) -> tuple[Triple, Topology]:
    """The patch of at most `max_voxels` and how it is halved, each fitting the other.

    Args:
        sizing: facts of the data set.
        max_voxels: of the patch; exceeded only where the topology's divisor is larger.
        most_stages, least_voxels: as `topology_for` takes them, for the median image; of the patch, which may be a part
            of it, each axis keeps `LEAST_VOXELS`.
    """
    topology = topology_for(sizing.spacing_mm, sizing.median_shape, most_stages=most_stages, least_voxels=least_voxels)
    for _ in range(3 * most_stages):  # each turn takes halvings away, so it ends long before
        roi = fit_roi(sizing, max_voxels, topology.divisor)
        fitting = topology_for(sizing.spacing_mm, roi, most_stages=most_stages)
        if all(own <= fits for own, fits in zip(topology.halvings, fitting.halvings, strict=True)):
            break
        topology = fitting  # the patch became too small for some halvings, so it has fewer, and need not be as round
    return roi, topology


def halved_once(shape: Triple) -> Topology:
    """Two stages for an image that is too small for any halving by rule: the longest axes are halved."""
    stride = [2 if n == max(shape) else 1 for n in shape]
    return Topology(strides=((1, 1, 1), (stride[0], stride[1], stride[2])), kernels=((3, 3, 3), (3, 3, 3)))
