"""What a network says of itself to the planner, and what it needs to know to choose its size."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]
"""Of a network's weights by their names."""

CPU_BATCH = 2
CPU_BATCH_RULE = "2 on a CPU (nnU-Net's least): a step with 1 patch takes 0.9 times as long (measured)"
"""Source: SegResNet, 40x56x40, two AVX2 cores: 0.51 s for 1 patch, 0.57 s for 2; oneDNN shares out samples."""


GPU_VOXELS = 4_200_000
"""Most voxels of a patch on a GPU of 19 GiB and more. Source: about 160^3; nnU-Net's ResEnc M and L presets plan 2 to 7
million for large images, Auto3DSeg 7.2 million, and neither grows patches with memory by default. A larger patch buys
context that few structures need with steps that all need."""
GPU_VOXELS_PER_GIB = 7.225e6 / 2 / 16
"""Of a patch of which a step takes two. Source: Auto3DSeg fits one of 224x224x144 into 16 GB."""
GPU_BATCH_RULE = (
    "2 to 4 on a GPU, as memory holds them, or a quarter of the cases: steps count for more than samples (nnU-Net: 2)"
)
THIN, THIN_RATIO = 32, 3
"""An axis of at most so many voxels, a third of the longest one's or fewer, is not cut. Of one with up to twice as many
a patch keeps as many as it is short of that, at least 31 of 33 and 16 of 48, so that no single slice decides. Source:
nnU-Net's patches hold all slices of thick-slice data sets (ACDC, prostate); 3 is its ratio for them, 32 a choice, and
so is the way it fades."""
LONG = 2
"""A patch is at most so many times as long as it is wide, in mm, where the image is wide enough. Source: nnU-Net begins
with a cube in mm of 256^3 voxels, cut to the image, where its ResEnc L patches have about 4.2 million: a quarter. A box
of that length that is half as wide and as high has a quarter of the cube's voxels, too, so this is its rule for patches
of any size."""
LEAST_GPU_BATCH, MOST_GPU_BATCH = 2, 4
"""Patches of a step on a GPU. Source: nnU-Net takes at least 2. More than a handful buy steadier gradients with fewer
steps: a batch that fills 80 GB left 1,250 steps of a run that Auto3DSeg trains for 48,000. The 4 is a choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """Facts for `choose`."""

    spacing_mm: tuple[float, float, float]
    median_shape: tuple[int, int, int]
    """Median image in voxels at that spacing."""
    num_outputs: int
    memory_gib: float
    """Memory of the device."""
    on_gpu: bool
    size: int = 0
    """Rung of the network's ladder; 0 where nothing is known of the time. `RUNGS` and `GPU_RUNGS` in its file have
    them all."""
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


def count_numbers(names: Iterable[str], pattern: str) -> list[int]:
    """How many numbers stand in the second group of a pattern for each number 0, 1, 2, ... in its first.

    Such as the blocks of each stage, where the pattern is of a block's names.
    """
    pairs = {(int(m[1]), int(m[2])) for name in names if (m := re.match(pattern, name))}
    firsts = sorted({first for first, _ in pairs})
    return [sum(first == n for first, _ in pairs) for n in firsts]


def round_up(value: int, step: int) -> int:
    """The next multiple of `step`, at least one step."""
    return max(step, math.ceil(value / step) * step)


def most_gpu_voxels(memory_gib: float) -> int:
    """Voxels of a patch on a GPU: as many as fit twice, up to `GPU_VOXELS`."""
    return int(min(GPU_VOXELS, GPU_VOXELS_PER_GIB * memory_gib))


def gpu_batch(roi: tuple[int, int, int], memory_gib: float) -> int:
    """Patches of a step on a GPU: two, up to four where memory holds so many."""
    return max(LEAST_GPU_BATCH, min(MOST_GPU_BATCH, int(2 * GPU_VOXELS_PER_GIB * memory_gib / math.prod(roi))))


def fit_roi(sizing: Sizing, max_voxels: int, steps: tuple[int, int, int]) -> tuple[int, int, int]:
    """The largest patch of at most `max_voxels` with the image's proportions, but for a long image's.

    Starts from the median image, cut to the longest edge that a patch of so many voxels may have and rounded up, so
    that no patch is mostly padding. Then shrinks the axis that is largest against the median image, as nnU-Net does,
    in whole steps of the network.

    Args:
        sizing: facts of the data set.
        max_voxels: of the patch; exceeded only where one step along each axis has more.
        steps: the network's divisor, in voxels.
    """
    shape = sizing.median_shape
    kept, most_mm = [_kept_voxels(n, max(shape)) for n in shape], longest_mm(sizing, max_voxels)
    roi = [
        round_up(min(n, max(round(most_mm / mm), least)), step)
        for n, mm, least, step in zip(shape, sizing.spacing_mm, kept, steps, strict=True)
    ]
    while math.prod(roi) > max_voxels:
        shrinkable = [a for a in range(3) if roi[a] > steps[a]]
        if not shrinkable:
            break
        shrinkable = [a for a in shrinkable if roi[a] - steps[a] >= kept[a]] or shrinkable
        worst = max(shrinkable, key=lambda a: roi[a] / max(1, shape[a]) + 1e-6 * roi[a])
        roi[worst] -= steps[worst]
    return roi[0], roi[1], roi[2]


def _kept_voxels(length: int, longest: int) -> int:
    """How many voxels of an axis a patch keeps as long as others can be cut.

    Where slices are few they are thick as a rule, and then what lies above and below counts most.

    Args:
        length: of the axis, in voxels.
        longest: of the image's axes.
    """
    return max(0, min(length, 2 * THIN - length)) if THIN_RATIO * length <= longest else 0


def longest_mm(sizing: Sizing, max_voxels: int) -> float:
    """The longest edge in mm of a patch of `max_voxels` that is `LONG` times as long as wide.

    Such a patch is as high as wide. Where the image is lower than that, the patch is as high as the image and has the
    more length and width, but no more than the image's own width allows.
    """
    lowest, width, _ = sorted(n * mm for n, mm in zip(sizing.median_shape, sizing.spacing_mm, strict=True))
    volume = max_voxels * math.prod(sizing.spacing_mm)
    return max(math.cbrt(LONG**2 * volume), min(math.sqrt(LONG * volume / lowest), LONG * width))


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
