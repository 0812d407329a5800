"""What the planner knows of each network: learning rates, costs, own hyperparameters."""

from __future__ import annotations

from autoseg.config.settings import AlgoName

SECONDS_PER_MEGAVOXEL = {"segresnet": 3.2, "swinunetr": 3.1, "dints": 3.0, "unet": 2.0, "locator": 3.2}
"""Seconds of a training step for a million voxels of the CPU-sized network, on two cores, where none was measured.
Source: measured in fp32 on two AVX2 cores (docs/results.md), but for unet, a guess."""


RATES: dict[AlgoName, tuple[float, float, float, str]] = {
    "segresnet": (2e-4, 2e-3, 4e-3, "Auto3DSeg's"),
    "swinunetr": (4e-4, 4e-3, 1e-2, "Auto3DSeg's"),
    "dints": (2e-4, 5e-3, 1e-2, "as SegResNet's, since it is trained by AdamW here (Auto3DSeg's: SGD, 0.2)"),
    "unet": (2e-4, 2e-3, 4e-3, "as SegResNet's"),
    "locator": (2e-4, 2e-3, 4e-3, "as SegResNet's"),
}
"""Highest learning rate on a GPU and on a CPU, that of Muon, and where the first comes from.
Source of Muon's: the hippocampus (docs/results.md); SegResNet between 2e-3 and 5e-3, UNet and locator as SegResNet."""


NETWORK_KEYS = {
    "segresnet": ("init_filters", "blocks_down", "dsdepth"),
    "locator": ("init_filters", "blocks_down", "dsdepth"),
    "swinunetr": ("feature_size", "depths", "window_size"),
    "dints": ("channel_mul", "use_downsample", "search"),
    "unet": ("features", "num_res_units"),
}
