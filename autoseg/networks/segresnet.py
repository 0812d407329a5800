"""SegResNet with deep supervision (MONAI's SegResNetDS)."""

from __future__ import annotations

import math
from typing import Any

from monai.networks.nets.segresnet_ds import SegResNetDS, scales_for_resolution
from torch import nn

from autoseg.networks.sizing import CPU_BATCH, CPU_BATCH_RULE, LearningRates, NetworkChoice, Sizing, fit_roi

LEARNING_RATES = LearningRates(gpu=2e-4, cpu=2e-3, muon=4e-3, source="Auto3DSeg's")
"""Source: Auto3DSeg's on a GPU; on a CPU ten times as much for small networks and short schedules, and Muon's on the
hippocampus, between 2e-3 and 5e-3 (docs/results.md)."""
SECONDS_PER_MEGAVOXEL = 3.2
"""Source: measured in fp32 on two AVX2 cores (docs/results.md)."""


def build(in_channels: int, out_channels: int, network: dict[str, Any]) -> nn.Module:
    """Build it; training mode returns `dsdepth` outputs, finest first."""
    resolution = network.get("resolution")
    return SegResNetDS(
        init_filters=network["init_filters"],
        blocks_down=tuple(network["blocks_down"]),
        dsdepth=network["dsdepth"],
        norm=network["norm"],
        in_channels=in_channels,
        out_channels=out_channels,
        resolution=tuple(resolution) if resolution else None,
    )


def heads(module: nn.Module) -> tuple[nn.Module, ...]:
    """One a resolution, finest first."""
    levels: Any = module.get_submodule("up_layers")
    return tuple(level["head"] for level in reversed(levels))


def divisor(network: dict[str, Any]) -> tuple[int, int, int]:
    """What each edge of a window must be a multiple of."""
    return _divisor(len(network["blocks_down"]), network.get("resolution"))


def _divisor(levels: int, resolution: Any) -> tuple[int, int, int]:
    if not resolution:
        return (2 ** (levels - 1),) * 3
    steps = [1, 1, 1]
    for scale in scales_for_resolution(list(resolution), n_stages=levels)[: levels - 1]:
        steps = [a * int(b) for a, b in zip(steps, scale, strict=True)]
    return steps[0], steps[1], steps[2]


BLOCKS = {1: [2], 2: [1, 3], 3: [1, 2, 4], 4: [1, 2, 2, 4], 5: [1, 2, 2, 4, 4]}
"""Residual blocks per depth. Source: Auto3DSeg's SegResNet template."""


CPU_SIZES = ((8, 3, 48**3), (8, 3, 64**3), (16, 4, 64**3), (24, 4, 64**3), (32, 4, 64**3))
"""Filters of the first stage, most stages, most voxels of a patch, where a budget pays for more and more steps.
Source: 13 organs at 4 mm, oracle labels, runs of eight minutes on one core (docs/results.md): 86 steps of the third
came to 0.629 Dice, 273 of the second to 0.803, 616 of the first to 0.828. Plain loops on the hippocampus came to 0.8715
in 5 minutes with 16 filters and 0.8774 in 15 with 24 (on a CPU with bf16); 32 is Auto3DSeg's."""
RUNGS = range(-2, 3)
LEAST_CPU_VOXELS, SMALL_CPU_BATCH = 32**3, 4
"""Patches on a CPU: half the median image, but at least so many voxels, and how many of these a step takes.
Source: hippocampus, 5 minutes: 0.8773 Dice with four patches of 32^3, 0.8750 with two of the whole image."""


def choose(sizing: Sizing) -> NetworkChoice:
    """Choose filters, depth, patch and batch."""
    x, y, z = sizing.spacing_mm
    anisotropic = not 0.75 <= (x + y) / 2 / z <= 1.25
    resolution = [float(s) for s in sizing.spacing_mm] if anisotropic else None
    if sizing.on_gpu:
        filters, max_voxels, max_levels = 32, int(7.225e6 * max(1.0, sizing.memory_gib / 16)), 5
    else:
        # Two cores: 16 filters and 3 stages reached 0.87 Dice on the hippocampus in minutes (docs/results.md).
        filters, max_levels, most = CPU_SIZES[sizing.size - RUNGS.start]
        max_voxels = min(max(math.prod(sizing.median_shape) // 2, LEAST_CPU_VOXELS), most)
    levels = 1
    for candidate in range(2, max_levels + 1):
        steps = _divisor(candidate, resolution)
        # On a CPU the coarsest stage keeps 8 voxels an axis; on a GPU 4, as nnU-Net stops pooling there.
        coarsest = 4 if sizing.on_gpu else 8
        if all(s == 1 or p // s >= coarsest for s, p in zip(steps, sizing.p90_shape, strict=True)):
            levels = candidate
    steps = _divisor(levels, resolution)
    roi = fit_roi(sizing, max_voxels, steps)
    blocks = BLOCKS[levels] if sizing.on_gpu or levels != 3 else [1, 2, 2]
    voxels = roi[0] * roi[1] * roi[2]
    batch = CPU_BATCH if voxels > LEAST_CPU_VOXELS else SMALL_CPU_BATCH
    if sizing.on_gpu:
        least = 1 if voxels > 4e6 else 2
        batch = max(least, min(8, int(1.1 * sizing.memory_gib / 16 * 7.2e6 / voxels)))
    return NetworkChoice(
        network={
            "init_filters": filters,
            "blocks_down": blocks,
            "dsdepth": min(4, max(1, levels - 1)),
            "norm": "INSTANCE",
            "resolution": resolution,
        },
        roi_size=roi,
        batch_size=batch,
        rules={
            "init_filters": "32 on a GPU (Auto3DSeg); 16 on a CPU, measured to learn more in the same time; "
            "8 where a budget pays for too few steps of them, 24, 32 where it pays for 2,000 (measured)",
            "blocks_down": f"{levels} stages: halve while the 90th percentile image keeps "
            f"{4 if sizing.on_gpu else 8} voxels at the coarsest stage (nnU-Net's rule); blocks as Auto3DSeg's",
            "dsdepth": "a loss at every resolution but the coarsest, at most 4 (Auto3DSeg)",
            "norm": "instance normalisation, since batches are small (Auto3DSeg, nnU-Net)",
            "resolution": "anisotropic strides where mean in-plane over through-plane spacing is "
            "outside 0.75..1.25 (Auto3DSeg)",
            "roi_size": f"the 90th percentile image, cut to {max_voxels / 1e6:.3g} M voxels "
            + (
                "(Auto3DSeg: 224x224x144 for 16 GB, scaled with memory)"
                if sizing.on_gpu
                else "(half the median image on a CPU, 32^3 to 64^3, or 48^3 for a short budget: more steps, measured)"
            ),
            "batch_size": "Auto3DSeg: 1.1 x memory/16 GB at 7.2 M voxels, at least 2 below 4 M voxels (nnU-Net)"
            if sizing.on_gpu
            else CPU_BATCH_RULE
            if batch == CPU_BATCH
            else "4 of the smallest patches on a CPU (measured)",
        },
    )
