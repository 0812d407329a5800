"""The residual-encoder U-Net, as nnU-Net's ResEnc presets build it.

Source: Isensee et al. 2024, "nnU-Net Revisited" (arXiv 2404.09556), and the planner of MIC-DKFZ/nnUNet 2.8.1: residual
blocks in the encoder (ResNet-D: the shortcut is pooled, then projected), one convolution a stage in the decoder, a loss
at every resolution. `resenc_layers.py` has the layers.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from autoseg.networks import resenc_layers
from autoseg.networks.segresnet import GPU_RUNGS, LEAST_VOXELS, RUNGS, rung_of
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
from autoseg.networks.topology import divisor_of, halved_once, patch_and_topology

__all__ = ["GPU_RUNGS", "RUNGS", "build", "choose", "divisor", "heads", "read_shapes"]

ENCODER = r"encoder\."
"""Names of the weights that make features of an image: a regular expression that they begin with."""
LATENT = "encoder"
"""The module that makes the encoder's coarsest features, by which pretraining compares images."""
LEARNING_RATES = LearningRates(gpu=2e-4, cpu=2e-3, muon=4e-3, source="as SegResNet's")
"""Source: SegResNet's, whose building blocks it shares; nnU-Net trains it by SGD with 1e-2."""
SECONDS_PER_MEGAVOXEL = 3.2
"""A guess: SegResNet's."""
KEYS = ("init_features", "blocks", "strides", "kernels", "dsdepth")
"""Of a plan's `network` that its layers are made by."""
BLOCKS, CPU_BLOCKS = (1, 3, 4, 6, 6, 6), (1, 2, 2, 2, 2, 2)
"""Residual blocks of each stage. Source: nnU-Net's ResEnc presets; on a CPU fewer, as SegResNet's. A choice."""


def build(in_channels: int, out_channels: int, network: dict[str, Any]) -> nn.Module:
    """Build it; training mode returns `dsdepth` outputs, finest first."""
    return resenc_layers.build(in_channels, out_channels, **{key: network[key] for key in KEYS})


def heads(module: nn.Module) -> tuple[nn.Module, ...]:
    """One a resolution, finest first."""
    layers: Any = module.get_submodule("decoder.seg_layers")
    return tuple(reversed(layers))


def read_shapes(shapes: Shapes) -> dict[str, Any]:
    """Features, blocks, kernels, strides, heads; where there is no decoder, stages after the first halve all axes."""
    if (stem := shapes.get("encoder.stem.convs.0.conv.weight")) is None:
        return {}
    blocks = count_numbers(shapes, r"encoder\.stages\.(\d+)\.blocks\.(\d+)\.")
    coarser = range(1, len(blocks))
    ups = [shapes.get(f"decoder.transpconvs.{len(blocks) - 1 - stage}.weight", (2,) * 5) for stage in coarser]
    kernels = [shapes[f"encoder.stages.{stage}.blocks.0.conv1.conv.weight"] for stage in range(len(blocks))]
    num_heads = sum(re.fullmatch(r"decoder\.seg_layers\.\d+\.weight", name) is not None for name in shapes)
    return {
        **({"dsdepth": num_heads} if num_heads else {}),
        "init_features": stem[0],
        "blocks": blocks,
        "kernels": [list(kernel[2:]) for kernel in kernels],
        "strides": [[1, 1, 1], *(list(up[2:]) for up in ups)],
    }


def divisor(network: dict[str, Any]) -> tuple[int, int, int]:
    """What each edge of a window must be a multiple of."""
    return divisor_of(network["strides"])


def choose(sizing: Sizing) -> NetworkChoice:
    """Choose features, stages, patch and batch."""
    on_gpu = sizing.on_gpu
    features, stages, max_voxels = rung_of(sizing, len(BLOCKS))
    roi, topology = patch_and_topology(sizing, max_voxels, most_stages=stages, least_voxels=LEAST_VOXELS[on_gpu])
    levels = len(topology.strides)
    if levels == 1:  # a U-Net has two stages at least; the longest axis is halved
        topology = halved_once(sizing.median_shape)
        roi, levels = fit_roi(sizing, max_voxels, topology.divisor), 2
    return NetworkChoice(
        network={
            "init_features": features,
            "blocks": list((BLOCKS if on_gpu else CPU_BLOCKS)[:levels]),
            "strides": [list(stride) for stride in topology.strides],
            "kernels": [list(kernel) for kernel in topology.kernels],
            "dsdepth": levels - 1,
        },
        roi_size=roi,
        batch_size=gpu_batch(roi, sizing.memory_gib) if on_gpu else CPU_BATCH,
        rules={
            "init_features": "32 on a GPU (nnU-Net), 16 where a budget pays for too few steps; on a CPU as SegResNet's",
            "blocks": "nnU-Net's ResEnc presets on a GPU; fewer on a CPU, where steps count",
            "strides": f"{levels} stages: halve an axis while it keeps {LEAST_VOXELS[on_gpu]} voxels and its spacing "
            "is under twice the finest (nnU-Net's rule)",
            "kernels": "1 along an axis until its spacing is under twice the finest, then 3 (nnU-Net's rule)",
            "dsdepth": "a loss at every resolution but the coarsest (nnU-Net)",
            "roi_size": f"the median image rounded up, cut to {max_voxels / 1e6:.3g} M voxels "
            + ("(between nnU-Net's ResEnc presets and Auto3DSeg)" if on_gpu else "(as SegResNet's on a CPU)"),
            "batch_size": GPU_BATCH_RULE if on_gpu else CPU_BATCH_RULE,
        },
    )
