"""DiNTS (MONAI's), with the topology of `templates/dints/topology.json` or one of its own search (search.py)."""

from __future__ import annotations

from typing import Any

from torch import nn

from autoseg.config.templates import read_template_json
from autoseg.networks import dints_topology
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
)

ENCODER = r"dints_space\.|stem_down\."
"""Names of the weights that make features of an image: a regular expression that they begin with."""
LATENT = ""
"""It is not pretrained: which of its weights there are follows from the topology, which is searched with labels."""
LEARNING_RATES = LearningRates(
    gpu=2e-4, cpu=5e-3, muon=1e-2, source="as SegResNet's, since it is trained by AdamW here (Auto3DSeg's: SGD, 0.2)"
)
"""Source: SegResNet's on a GPU; those on a CPU and Muon's: the hippocampus (docs/results.md)."""
SECONDS_PER_MEGAVOXEL = 3.0
"""Source: measured in fp32 on two AVX2 cores (docs/results.md)."""

KEYS = ("paths", "operations", "nodes", "channel_mul", "use_downsample")
"""Of a plan's `network` that it is built by."""


def build(in_channels: int, out_channels: int, network: dict[str, Any]) -> nn.Module:
    """Build it; one output."""
    return dints_topology.build(in_channels, out_channels, **{key: network[key] for key in KEYS})


def path_depths(num_depths: int) -> tuple[list[int], list[int]]:
    """From which depth each path of a block comes, and into which it goes; MONAI's order.

    Depth by depth: from above, from the same depth, from below; the first has nothing above it, the last nothing below.
    """
    into = [depth for depth in range(num_depths) for _ in range(3)][1:-1]
    out_of = [depth + step for depth in range(num_depths) for step in (-1, 0, 1)][1:-1]
    return out_of, into


def reached_nodes(paths: list[list[int]]) -> list[list[int]]:
    """Which depths hold features that count, before each block and after the last: (blocks + 1, depths) of 0 and 1."""
    num_depths = (len(paths[0]) + 2) // 3
    out_of, into = path_depths(num_depths)

    def touched(block: list[int], depths: list[int]) -> list[int]:
        return [max(on for on, d in zip(block, depths, strict=True) if d == depth) for depth in range(num_depths)]

    return [touched(paths[0], out_of), *(touched(block, into) for block in paths)]


def heads(module: nn.Module) -> tuple[nn.Module, ...]:
    """The one of 1x1x1 at the end."""
    final: Any = module.get_submodule("stem_finals")
    return (final[-1],)


def read_shapes(shapes: Shapes) -> dict[str, Any]:
    """Nothing: the topology is not told by shapes alone."""
    return {}


def divisor(network: dict[str, Any]) -> tuple[int, int, int]:
    """One halving per depth, one more with `use_downsample`."""
    depths = (len(network["paths"][0]) + 2) // 3
    return (2 ** (depths - 1 + int(network["use_downsample"])),) * 3


CPU_CHANNEL_MUL = (0.25, 0.5)
"""Width where a budget pays for more steps. Source: 0.25 takes 2.4 times the steps of 0.5 in the same time (measured);
when the wider one pays is a choice, as SegResNet's 24 filters."""
RUNGS = range(len(CPU_CHANNEL_MUL))
GPU_SIZES = ((0.5, 64**3), (1.0, 96**3))
"""Width and voxels of a patch on a GPU. Source: the larger is Auto3DSeg's; the smaller, for short budgets, a choice."""
GPU_RUNGS = range(-1, 1)


def choose(sizing: Sizing) -> NetworkChoice:
    """Choose width, patch and batch."""
    topology = read_template_json("dints", "topology.json")
    depths = (len(topology["paths"][0]) + 2) // 3
    if sizing.on_gpu:
        (channel_mul, max_voxels), downsample = GPU_SIZES[sizing.size - GPU_RUNGS.start], True
    else:
        channel_mul, downsample, max_voxels = CPU_CHANNEL_MUL[sizing.size], False, 64**3
    roi = fit_roi(sizing, max_voxels, (2 ** (depths - 1 + int(downsample)),) * 3)
    return NetworkChoice(
        network={
            "channel_mul": channel_mul,
            "use_downsample": downsample,
            "search": False,
            "paths": topology["paths"],
            "operations": topology["operations"],
            "nodes": reached_nodes(topology["paths"]),
        },
        roi_size=roi,
        batch_size=gpu_batch(roi, sizing.memory_gib) if sizing.on_gpu else CPU_BATCH,
        rules={
            "channel_mul": "1 on a GPU (MONAI's default); 0.25, "
            "8 filters at the finest scale, on a CPU: 2.4 times the steps of 0.5; that where a budget pays for 2,000",
            "use_downsample": "on a GPU from half resolution (MONAI's default); "
            "on a CPU patches are small, full resolution",
            "search": "off: the topology that comes with the template",
            "paths": "templates/dints/topology.json",
            "operations": "templates/dints/topology.json",
            "nodes": "depths that the paths reach",
            "roi_size": f"the median image rounded up, at most {round(max_voxels ** (1 / 3))}^3"
            + (" (Auto3DSeg)" if sizing.on_gpu else " on a CPU"),
            "batch_size": GPU_BATCH_RULE if sizing.on_gpu else CPU_BATCH_RULE,
        },
    )
