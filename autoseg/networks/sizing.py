"""What a network says of itself to the planner, and what it needs to know to choose its size."""

from __future__ import annotations

import math
from dataclasses import dataclass

CPU_BATCH = 2
CPU_BATCH_RULE = "2 on a CPU (nnU-Net's least): a step with 1 patch takes 0.9 times as long (measured)"
"""Source: SegResNet, 40x56x40, two AVX2 cores: 0.51 s for 1 patch, 0.57 s for 2; oneDNN shares out samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """Facts for `choose`."""

    spacing_mm: tuple[float, float, float]
    median_shape: tuple[int, int, int]
    """Median image in voxels at that spacing."""
    p90_shape: tuple[int, int, int]
    """90th percentile of the image in voxels at that spacing, per axis."""
    num_outputs: int
    memory_gib: float
    """Memory of the device."""
    on_gpu: bool
    size: int = 0
    """Rung of the network's ladder on a CPU; 0 where nothing is known of the time. `RUNGS` in its file has them all."""
    roi_size: tuple[int, int, int] | None = None
    """Patch that is settled already: by the user, a recipe or what memory allows; None: it is to be chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningRates:
    """Highest learning rates of a network."""

    gpu: float
    """AdamW's on a GPU."""
    cpu: float
    """AdamW's on a CPU."""
    muon: float
    """Muon's."""
    source: str
    """Where that on a GPU comes from, for `explain`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkChoice:
    """A network's settings and patch, each with the rule that made it."""

    network: dict[str, object]
    roi_size: tuple[int, int, int]
    batch_size: int
    rules: dict[str, str]
    """Setting -> the rule and its source, for `explain`."""


def round_up(value: int, step: int) -> int:
    """The next multiple of `step`, at least one step."""
    return max(step, math.ceil(value / step) * step)


def fit_roi(sizing: Sizing, max_voxels: int, steps: tuple[int, int, int]) -> tuple[int, int, int]:
    """The largest patch of at most `max_voxels` with the image's proportions.

    Starts from the 90th percentile of the images to the nearest step, so that most fit into one window, then
    shrinks the axis that is largest against the median image, as nnU-Net does, in whole steps of the network.
    """
    roi = [
        max(round_up(median, step), round(p90 / step) * step)
        for median, p90, step in zip(sizing.median_shape, sizing.p90_shape, steps, strict=True)
    ]
    while math.prod(roi) > max_voxels:
        shrinkable = [a for a in range(3) if roi[a] > steps[a]]
        if not shrinkable:
            break
        worst = max(shrinkable, key=lambda a: roi[a] / max(1, sizing.median_shape[a]) + 1e-6 * roi[a])
        roi[worst] -= steps[worst]
    return roi[0], roi[1], roi[2]


def shorter_roi(roi: tuple[int, int, int], steps: tuple[int, int, int]) -> tuple[int, int, int] | None:
    """A patch one step of the network shorter along its longest axis.

    Args:
        steps: the network's divisor.

    Returns:
        The patch; None where no more than one voxel would be left at the coarsest stage, which has no variance to
        normalise by.
    """
    wide = [a for a in range(3) if roi[a] > steps[a]]
    if not wide:
        return None
    shorter = list(roi)
    axis = max(wide, key=lambda a: roi[a])
    shorter[axis] -= steps[axis]
    roi = shorter[0], shorter[1], shorter[2]
    return None if roi == steps else roi
