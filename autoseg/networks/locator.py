"""The locator: a small SegResNet that finds the region where any organ is, at a coarse voxel size."""

from __future__ import annotations

from autoseg.networks.segresnet import ENCODER, build, divisor, heads, read_shapes
from autoseg.networks.sizing import CPU_BATCH, CPU_BATCH_RULE, LearningRates, NetworkChoice, Sizing, fit_roi

__all__ = ["ENCODER", "build", "choose", "divisor", "heads", "read_shapes"]

LATENT = ""
"""It is not pretrained: it is small, and looks at images coarsely."""
LEARNING_RATES = LearningRates(gpu=2e-4, cpu=2e-3, muon=4e-3, source="as SegResNet's")
"""Source: SegResNet's, which it is."""
SECONDS_PER_MEGAVOXEL = 3.2
"""Source: SegResNet's, which it is."""
RUNGS = GPU_RUNGS = range(1)
FLARE = "FLARE23 paper: SegResNet of 1, 2, 2, 4 blocks and 16 filters at 4 mm, patches of 128^3"


def choose(sizing: Sizing) -> NetworkChoice:
    """Choose the patch; all else is fixed."""
    network = {"init_filters": 16, "blocks_down": [1, 2, 2, 4], "dsdepth": 3, "norm": "INSTANCE", "resolution": None}
    largest = 128 if sizing.on_gpu else 64
    return NetworkChoice(
        network=dict(network),
        roi_size=fit_roi(sizing, largest**3, divisor(network)),
        batch_size=CPU_BATCH,
        rules={
            **dict.fromkeys(("init_filters", "blocks_down"), FLARE),
            "dsdepth": "a loss at every resolution but the coarsest (Auto3DSeg)",
            "norm": "instance normalisation, since batches are small (Auto3DSeg, nnU-Net)",
            "resolution": "the voxels are cubes",
            "roi_size": f"the median image rounded up, at most {largest}^3"
            + (f" ({FLARE})" if sizing.on_gpu else " on a CPU"),
            "batch_size": CPU_BATCH_RULE,
        },
    )
