"""DiNTS with a fixed topology, whose codes are numbers. Needs MONAI alone, since bundles carry a copy of this file.

MONAI's `TopologyInstance` asks tensors which paths are active, each time it runs. An exporter (`torch.export`, ONNX)
cannot know what is in a tensor and gives up; numbers are constants of its graph. Layers and weights are MONAI's.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

import numpy as np
import torch
from monai.networks.nets.dints import DiNTS, TopologyInstance


class FixedTopology(TopologyInstance):
    """MONAI's, with the active paths as numbers."""

    def __init__(
        self,
        paths: Sequence[Sequence[int]],
        operations: Sequence[Sequence[int]],
        channel_mul: float,
        use_downsample: bool,
    ) -> None:
        """Build the cells of the active paths.

        Args:
            paths: (blocks, 3 depths - 2) of 0 and 1.
            operations: same shape, 0..4: index into `Cell.OPS3D`.
            channel_mul: width.
            use_downsample: begin at half resolution.
        """
        codes = np.array(paths, np.int64)
        super().__init__(
            arch_code=[codes, np.array(operations, np.int64)],
            channel_mul=channel_mul,
            num_blocks=len(codes),
            num_depths=(codes.shape[1] + 2) // 3,
            use_downsample=use_downsample,
        )
        self.active = [[place for place, on in enumerate(block) if on] for block in codes.tolist()]
        """Of each block the paths that are active."""

    def forward(self, x: list[torch.Tensor]) -> list[torch.Tensor]:
        """Features of each depth, finest first, through all blocks; as MONAI's."""
        for block, places in enumerate(self.active):
            outputs = [x[0].new_zeros(())] * self.num_depths
            for place in places:
                cell = self.cell_tree[str((block, place))]
                into = self.arch_code2out[place]
                outputs[into] = outputs[into] + cell(x[self.arch_code2in[place]], weight=None)
            x = outputs
        return x


def build(
    in_channels: int,
    out_channels: int,
    paths: Sequence[Sequence[int]],
    operations: Sequence[Sequence[int]],
    nodes: Sequence[Sequence[int]],
    channel_mul: float,
    use_downsample: bool,
) -> DiNTS:
    """Build it; one output.

    Args:
        nodes: (blocks + 1, depths) of 0 and 1: which depths hold features that count.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # MONAI prints advice about the patch
        space = FixedTopology(paths, operations, channel_mul, use_downsample)
    return DiNTS(
        dints_space=space,
        in_channels=in_channels,
        num_classes=out_channels,
        use_downsample=use_downsample,
        node_a=[list(row) for row in nodes],
    )
