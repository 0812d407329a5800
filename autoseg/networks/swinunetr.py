"""SwinUNETR (MONAI's)."""

from __future__ import annotations

from typing import Any

from monai.networks.nets.swin_unetr import SwinUNETR
from torch import nn

from autoseg.networks.sizing import (
    CPU_BATCH,
    CPU_BATCH_RULE,
    GPU_BATCH_RULE,
    LearningRates,
    NetworkChoice,
    Shapes,
    Sizing,
    count_numbers,
    fit_roi,
    gpu_batch,
)

ENCODER = r"swinViT\."
"""Names of the weights that make features of an image: a regular expression that they begin with."""
LATENT = "swinViT"
"""The module that makes the encoder's coarsest features, by which pretraining compares images."""
LEARNING_RATES = LearningRates(gpu=4e-4, cpu=4e-3, muon=1e-2, source="Auto3DSeg's")
"""Source: Auto3DSeg's on a GPU; those on a CPU and Muon's: the hippocampus (docs/results.md)."""
SECONDS_PER_MEGAVOXEL = 3.1
"""Source: measured in fp32 on two AVX2 cores (docs/results.md)."""


def build(in_channels: int, out_channels: int, network: dict[str, Any]) -> nn.Module:
    """Build it; one output.

    Raises:
        ValueError: The features of a stage cannot be shared out over its heads, which MONAI meets in its first step.
    """
    for stage, num_heads in enumerate(network["num_heads"]):
        if (features := network["feature_size"] * 2**stage) % num_heads:
            raise ValueError(f"num_heads: {features} features of stage {stage + 1} do not divide by {num_heads}")
    return SwinUNETR(
        in_channels=in_channels,
        out_channels=out_channels,
        feature_size=network["feature_size"],
        depths=tuple(network["depths"]),
        num_heads=tuple(network["num_heads"]),
        window_size=network["window_size"],
        use_v2=network["use_v2"],
        norm_name=("group", {"num_groups": network["feature_size"]}) if network["norm"] == "group" else "instance",
    )


def heads(module: nn.Module) -> tuple[nn.Module, ...]:
    """The one of 1x1x1 at the end."""
    return (module.get_submodule("out.conv.conv"),)


def read_shapes(shapes: Shapes) -> dict[str, Any]:
    """Features, layers, heads, windows, the second version's convolutions, and normalisation where it tells."""
    if (stem := shapes.get("swinViT.patch_embed.proj.weight")) is None:
        return {}
    first = "swinViT.layers{}.0.blocks.0.attn.relative_position_bias_table"
    tables = [shapes[name] for stage in range(1, 5) if (name := first.format(stage)) in shapes]
    settings: dict[str, Any] = {
        "feature_size": stem[0],
        "use_v2": "swinViT.layers1c.0.layer.conv1.conv.weight" in shapes,
    }
    if len(tables) == 4:
        settings["depths"] = count_numbers(shapes, r"swinViT\.layers(\d)\.0\.blocks\.(\d+)\.")
        settings["num_heads"] = [heads for _, heads in tables]
        settings["window_size"] = (round(tables[0][0] ** (1 / 3)) + 1) // 2  # (2 w - 1)^3 places
    if "encoder1.layer.conv1.conv.weight" in shapes:
        settings["norm"] = "group" if "encoder1.layer.norm1.weight" in shapes else "instance"
    return settings


def divisor(network: dict[str, Any]) -> tuple[int, int, int]:
    """Patch embedding and four mergings halve each axis five times."""
    return 32, 32, 32


CPU_SIZES = ((12, 32**3), (12, 2 * 32**3), (24, 2 * 32**3))
"""Features and voxels of a patch where a budget pays for more and more steps. Source: the smallest for the hippocampus
in 75 seconds (docs/results.md), 12 and 24 as SegResNet's 16 and 24; the larger ones are a choice."""
RUNGS = range(len(CPU_SIZES))
GPU_SIZES = ((24, 64**3), (48, 96**3))
"""On a GPU. Source: the larger is Auto3DSeg's; the smaller, for short budgets, a choice."""
GPU_RUNGS = range(-1, 1)


def choose(sizing: Sizing) -> NetworkChoice:
    """Choose features, patch and batch."""
    if sizing.on_gpu:
        (feature_size, max_voxels), window = GPU_SIZES[sizing.size - GPU_RUNGS.start], 7
    else:
        (feature_size, max_voxels), window = CPU_SIZES[sizing.size], 4
    roi = fit_roi(sizing, max_voxels, (32, 32, 32))
    # At 32^3 the coarsest stage is one voxel, which has no variance of its own to normalise by.
    norm = "group" if max(sizing.roi_size or roi) <= 32 else "instance"
    return NetworkChoice(
        network={
            "feature_size": feature_size,
            "depths": [2, 2, 2, 2],
            "num_heads": [3, 6, 12, 24],
            "window_size": window,
            "use_v2": True,
            "norm": norm,
        },
        roi_size=roi,
        batch_size=gpu_batch(roi, sizing.memory_gib) if sizing.on_gpu else CPU_BATCH,
        rules={
            "feature_size": "48 on a GPU (Auto3DSeg); 12 on a CPU, where 48 makes no progress in minutes "
            "(measured); 24 where a budget pays for 2,000 steps",
            "depths": "two layers a stage (SwinUNETR's paper)",
            "num_heads": "3, 6, 12, 24 (SwinUNETR's paper)",
            "window_size": "7 (SwinUNETR's paper); 4 on a CPU, where patches are 16 voxels wide after embedding",
            "use_v2": "a residual convolution before each stage (SwinUNETR-V2): learns faster from little data",
            "norm": "instance (SwinUNETR's paper); group, as many groups as features, for patches of 32^3, whose "
            "coarsest stage is one voxel",
            "roi_size": "the median image in steps of 32, at most 96^3 (Auto3DSeg)"
            if sizing.on_gpu
            else "32x32x32 on a CPU: 0.77 Dice where 32x64x32 gave 0.35 in the same 75 s (measured); "
            "twice that where a budget pays for 2,000 steps",
            "batch_size": GPU_BATCH_RULE if sizing.on_gpu else CPU_BATCH_RULE,
        },
    )
