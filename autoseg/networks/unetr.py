"""UNETR (MONAI's): a vision transformer as the encoder, of patches of 16^3 voxels, and a convolutional decoder.

Source: Hatamizadeh et al. 2022, "UNETR: Transformers for 3D Medical Image Segmentation" (arXiv 2103.10504), as NVIDIA's
Clara fine-tunes it after self-supervised pretraining. `unetr_layers.py` has the layers.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from autoseg.networks import unetr_layers
from autoseg.networks.sizing import (
    CPU_BATCH,
    CPU_BATCH_RULE,
    GPU_BATCH_RULE,
    LearningRates,
    NetworkChoice,
    Shapes,
    Sizing,
    fit_roi,
    gpu_batch,
    round_up,
)
from autoseg.networks.unetr_layers import HEAD, PATCH

ENCODER = r"vit\."
"""Names of the weights that make features of an image: a regular expression that they begin with."""
LATENT = "vit.norm"
"""The module that makes the encoder's coarsest features, by which pretraining compares images."""
LEARNING_RATES = LearningRates(gpu=1e-4, cpu=1e-3, muon=4e-3, source="the paper's and Clara's")
"""Source: the paper's and Clara's on a GPU; on a CPU ten times as much, as SegResNet's, and SegResNet's for Muon: not
measured."""
SECONDS_PER_MEGAVOXEL = 3.0
"""A guess: about SwinUNETR's."""
TABLE = "vit.patch_embedding.position_embeddings"
KEYS = ("feature_size", "hidden_size", "image_size")
"""A plan's settings of the network, as `unetr_layers.build` takes them."""


def build(in_channels: int, out_channels: int, network: dict[str, Any]) -> nn.Module:
    """Build it; one output. Raises: ValueError: The edges of its image are no multiples of `PATCH`."""
    return unetr_layers.build(in_channels, out_channels, **{key: network[key] for key in KEYS})


def heads(module: nn.Module) -> tuple[nn.Module, ...]:
    """The one of 1x1x1 at the end."""
    return (module.get_submodule("out.conv.conv"),)


def read_shapes(shapes: Shapes) -> dict[str, Any]:
    """Features of the transformer and of the decoder; the window, where the table of positions is a cube's."""
    embedding = shapes.get("vit.patch_embedding.patch_embeddings.weight")
    if embedding is None or embedding[0] % HEAD:
        return {}
    settings: dict[str, Any] = {"hidden_size": embedding[0]}
    if (decoder := shapes.get("encoder1.layer.conv1.conv.weight")) is not None:
        settings["feature_size"] = decoder[0]
    places = shapes.get(TABLE, (1, 0, 0))[1]
    edge = round(places ** (1 / 3))
    return {**settings, "image_size": [PATCH * edge] * 3} if edge and edge**3 == places else settings


def divisor(network: dict[str, Any]) -> tuple[int, int, int]:
    """A token's edge."""
    return PATCH, PATCH, PATCH


CPU_SIZES = ((128, 8, 48**3), (192, 16, 64**3))
"""Features of the transformer and of the decoder's finest stage, and voxels of a patch, where a budget pays for more
and more steps. A choice: a sixth and a quarter of the paper's width; not measured."""
RUNGS = range(len(CPU_SIZES))
GPU_SIZES = ((384, 16, 64**3), (768, 16, 96**3))
"""On a GPU. Source: the larger is the paper's (ViT-B of 12 layers, 16 features, 96^3); the smaller, for short budgets,
a choice."""
GPU_RUNGS = range(-1, 1)


def choose(sizing: Sizing) -> NetworkChoice:
    """Choose features, patch and batch."""
    on_gpu = sizing.on_gpu
    hidden, features, max_voxels = GPU_SIZES[sizing.size - GPU_RUNGS.start] if on_gpu else CPU_SIZES[sizing.size]
    steps = PATCH, PATCH, PATCH
    roi = fit_roi(sizing, max_voxels, steps)
    if max(roi) == PATCH:  # one token has nothing to attend to
        roi = (2 * PATCH, PATCH, PATCH)
    return NetworkChoice(
        network={
            "feature_size": features,
            "hidden_size": hidden,
            "image_size": [round_up(edge, PATCH) for edge in sizing.roi_size or roi],
        },
        roi_size=roi,
        batch_size=gpu_batch(roi, sizing.memory_gib) if on_gpu else CPU_BATCH,
        rules={
            "feature_size": "16 (the paper); 8 on a CPU, where steps count",
            "hidden_size": "768 on a GPU (the paper's ViT-B), 384 for a short budget; 128 on a CPU, 192 where a budget "
            "pays for 2,000 steps",
            "image_size": "the patch, for which the table of positions is made; interpolated for other windows",
            "roi_size": f"the median image in steps of {PATCH}, at most {round(math.cbrt(max_voxels))}^3"
            + (" (the paper, Clara)" if on_gpu else " on a CPU"),
            "batch_size": GPU_BATCH_RULE if on_gpu else CPU_BATCH_RULE,
        },
    )
