"""UNet with residual units (MONAI's), as its spleen bundle trains it."""

from __future__ import annotations

from typing import Any

from monai.networks.nets.unet import UNet
from torch import nn

from autoseg.networks.sizing import CPU_BATCH, CPU_BATCH_RULE, LearningRates, NetworkChoice, Shapes, Sizing, fit_roi

ENCODER = r"model\.(1\.submodule\.)*(0|conv|residual)\."
"""Names of the weights that make features of an image: a regular expression that they begin with."""
LATENT = ""
"""It is not pretrained: its modules are nested, so that no single one makes the coarsest features."""
LEARNING_RATES = LearningRates(gpu=2e-4, cpu=2e-3, muon=4e-3, source="as SegResNet's")
"""Source: SegResNet's."""
SECONDS_PER_MEGAVOXEL = 2.0
"""A guess: it was not measured."""


def build(in_channels: int, out_channels: int, network: dict[str, Any]) -> nn.Module:
    """Build it; one output."""
    return UNet(
        spatial_dims=3,
        in_channels=in_channels,
        out_channels=out_channels,
        channels=tuple(network["features"]),
        strides=(2,) * (len(network["features"]) - 1),
        num_res_units=network["num_res_units"],
        norm=network["norm"],
    )


def heads(module: nn.Module) -> tuple[nn.Module, ...]:
    """None: its last layer sees neighbouring voxels."""
    return ()


def read_shapes(shapes: Shapes) -> dict[str, Any]:
    """Filters, residual units and normalisation."""

    def stage(prefix: str) -> list[int]:
        """The filters of a stage; empty where there is none of that name."""
        names = (f"{prefix}conv.unit0.conv.weight", f"{prefix}conv.weight")
        return [shapes[name][0] for name in names if name in shapes]

    features, prefix = list[int](), "model."
    while filters := stage(f"{prefix}0."):
        features += filters
        prefix += "1.submodule."
    if not features:
        return {}
    return {
        "features": [*features, *stage(prefix)],
        "num_res_units": sum(f"model.0.conv.unit{unit}.conv.weight" in shapes for unit in range(32)),
        "norm": "BATCH" if any(name.endswith("running_mean") for name in shapes) else "INSTANCE",
    }


def divisor(network: dict[str, Any]) -> tuple[int, int, int]:
    """Each stage but the last halves every axis."""
    return (2 ** (len(network["features"]) - 1),) * 3


RUNGS = GPU_RUNGS = range(1)


def choose(sizing: Sizing) -> NetworkChoice:
    """Choose depth, patch and batch."""
    levels = 2
    for candidate in range(3, 6):
        # On a CPU the coarsest stage keeps 8 voxels an axis; on a GPU 4, as nnU-Net stops pooling there.
        if all(s // 2 ** (candidate - 1) >= (4 if sizing.on_gpu else 8) for s in sizing.median_shape):
            levels = candidate
    steps = (2 ** (levels - 1),) * 3
    return NetworkChoice(
        network={
            "features": [16 * 2**i for i in range(levels)],
            "num_res_units": 2,
            "norm": "BATCH" if sizing.on_gpu else "INSTANCE",
        },
        roi_size=fit_roi(sizing, 96**3 if sizing.on_gpu else 64**3, steps),
        batch_size=4 if sizing.on_gpu else CPU_BATCH,
        rules={
            "features": f"16, 32, ... (MONAI's spleen bundle); {levels} stages: halve while the coarsest keeps "
            f"{4 if sizing.on_gpu else 8} voxels (nnU-Net's rule)",
            "num_res_units": "2 (MONAI's spleen bundle)",
            "norm": "batch (MONAI's spleen bundle)" if sizing.on_gpu else "instance, since batches are small on a CPU",
            "roi_size": "the median image rounded up, at most 96^3 (MONAI's spleen bundle), 64^3 on a CPU",
            "batch_size": "4 (MONAI's spleen bundle)" if sizing.on_gpu else CPU_BATCH_RULE,
        },
    )
