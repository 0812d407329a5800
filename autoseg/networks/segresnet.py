"""SegResNet with deep supervision (MONAI's SegResNetDS)."""

from __future__ import annotations

import math
from typing import Any

from monai.networks.nets.segresnet_ds import SegResNetDS, scales_for_resolution
from torch import nn

from autoseg.networks.sizing import (
    CPU_BATCH,
    CPU_BATCH_RULE,
    GPU_BATCH_RULE,
    GPU_VOXELS,
    LONG,
    LearningRates,
    NetworkChoice,
    Shapes,
    Sizing,
    count_numbers,
    gpu_batch,
    longest_mm,
    most_gpu_voxels,
)
from autoseg.networks.topology import Topology, Triple, patch_and_topology

ENCODER = r"encoder\."
"""Names of the weights that make features of an image: a regular expression that they begin with."""
LATENT = "encoder"
"""The module that makes the encoder's coarsest features, by which pretraining compares images."""
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


def read_shapes(shapes: Shapes) -> dict[str, Any]:
    """Filters, blocks, normalisation, and the number of heads where there are any."""
    if (stem := shapes.get("encoder.conv_init.weight")) is None:
        return {}
    num_heads = sum(name.endswith(".head.weight") for name in shapes)
    return {
        **({"dsdepth": num_heads} if num_heads else {}),
        "init_filters": stem[0],
        "blocks_down": count_numbers(shapes, r"encoder\.layers\.(\d+)\.blocks\.(\d+)\."),
        "norm": "BATCH" if "encoder.layers.0.blocks.0.norm1.running_mean" in shapes else "INSTANCE",
    }


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
GPU_SIZES = ((16, 64**3), (32, 96**3), (32, 128**3), (32, None))
"""Filters of the first stage and most voxels of a patch; None: `most_gpu_voxels`. Smaller ones for short budgets. A
choice; the patches are those of nnU-Net's and Auto3DSeg's smaller presets."""
GPU_RUNGS = range(-3, 1)
LEAST_CPU_VOXELS, SMALL_CPU_BATCH = 32**3, 4
"""Patches on a CPU: half the median image, but at least so many voxels, and how many of these a step takes.
Source: hippocampus, 5 minutes: 0.8773 Dice with four patches of 32^3, 0.8750 with two of the whole image."""
MOST_GPU_STAGES = 5
"""Source: Auto3DSeg."""
LEAST_VOXELS = {True: 4, False: 8}
"""On a GPU and on a CPU: voxels that each axis keeps at the coarsest stage. Source: nnU-Net stops halving at 4 voxels;
on a CPU measured (docs/results.md)."""


def rung_of(sizing: Sizing, most_gpu_stages: int) -> tuple[int, int, int]:
    """Features of the first stage, most stages and most voxels of a patch, for the device and the rung."""
    if sizing.on_gpu:
        filters, most = GPU_SIZES[sizing.size - GPU_RUNGS.start]
        return filters, most_gpu_stages, min(most or GPU_VOXELS, most_gpu_voxels(sizing.memory_gib))
    filters, stages, most_voxels = CPU_SIZES[sizing.size - RUNGS.start]
    return filters, stages, min(max(math.prod(sizing.median_shape) // 2, LEAST_CPU_VOXELS), most_voxels)


def choose(sizing: Sizing) -> NetworkChoice:
    """Choose filters, depth, patch and batch."""
    on_gpu = sizing.on_gpu
    filters, stages, max_voxels = rung_of(sizing, MOST_GPU_STAGES)
    roi, topology = patch_and_topology(sizing, max_voxels, most_stages=stages, least_voxels=LEAST_VOXELS[on_gpu])
    levels = max(topology.halvings) + 1  # the rule may need more, but MONAI halves some axis in each of its stages
    voxels = math.prod(roi)
    batch = CPU_BATCH if voxels > LEAST_CPU_VOXELS else SMALL_CPU_BATCH
    return NetworkChoice(
        network={
            "init_filters": filters,
            "blocks_down": BLOCKS[levels] if on_gpu or levels != 3 else [1, 2, 2],
            "dsdepth": min(4, max(1, levels - 1)),
            "norm": "INSTANCE",
            "resolution": resolution_for(topology),
        },
        roi_size=roi,
        batch_size=gpu_batch(roi, sizing.memory_gib) if on_gpu else batch,
        rules={
            "init_filters": "32 on a GPU (Auto3DSeg), 16 where a budget pays for too few steps; 16 on a CPU, measured "
            "to learn more in the same time; 8 where a budget pays for too few steps of them, 24, 32 where it pays for "
            "2,000 (measured)",
            "blocks_down": f"{levels} stages: halve an axis while it keeps {LEAST_VOXELS[on_gpu]} voxels and its "
            "spacing is under twice the finest (nnU-Net's rule); blocks as Auto3DSeg's",
            "dsdepth": "a loss at every resolution but the coarsest, at most 4 (Auto3DSeg)",
            "norm": "instance normalisation, since batches are small (Auto3DSeg, nnU-Net)",
            "resolution": "each axis is halved as often as nnU-Net's rule says; MONAI's network takes that as the "
            "spacing which leads to it",
            "roi_size": _patch_rule(sizing, roi, max_voxels),
            "batch_size": GPU_BATCH_RULE
            if on_gpu
            else CPU_BATCH_RULE
            if batch == CPU_BATCH
            else "4 of the smallest patches on a CPU (measured)",
        },
    )


def _patch_rule(sizing: Sizing, roi: Triple, max_voxels: int) -> str:
    """Why a patch is as large as it is, for `explain`."""
    million, most_mm = f"{max_voxels / 1e6:.3g} M voxels", longest_mm(sizing, max_voxels)
    if all(edge >= n for edge, n in zip(roi, sizing.median_shape, strict=True)):
        return f"the whole median image, rounded up: a patch may have {million}"
    axes = zip(roi, sizing.median_shape, sizing.spacing_mm, strict=True)
    is_cut = any(round(most_mm / mm) <= edge < n for edge, n, mm in axes)
    length = f"{most_mm:.3g} mm long: patches of long images are {LONG} times as long as wide at most (nnU-Net)"
    if is_cut and 2 * math.prod(roi) <= max_voxels:
        return f"the median image, but {length}"
    rule = f"the median image, cut to {million} " + (
        "(between nnU-Net's ResEnc presets and Auto3DSeg; less for a short budget)"
        if sizing.on_gpu
        else "(half of it on a CPU, 32^3 to 64^3, or 48^3 for a short budget: more steps, measured)"
    )
    return f"{rule}; at most {length}" if is_cut else rule


def resolution_for(topology: Topology) -> list[float] | None:
    """The spacing from which MONAI's network derives how often each axis is halved; None: all alike.

    With one stage more than the most halvings of an axis, MONAI's network halves each axis as often as the topology. It
    halves the axes of finer spacing first, one halving more for each factor of two, and then all of them
    (`scales_for_resolution`). So the axis that is halved least gets 1, and each other one half of that for each
    halving it has more. Where the rule halves an axis late and alone, MONAI halves it earlier, together with others.
    """
    halvings = topology.halvings
    if len(set(halvings)) == 1:
        return None
    return [2.0 ** (min(halvings) - n) for n in halvings]
