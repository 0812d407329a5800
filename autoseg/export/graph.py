"""The graph that ONNX, OpenVINO and TorchScript files hold, and what else a program must know to run it.

`image` (B, C, X, Y, Z) float32 to `logits` (B, K, X, Y, Z) float32; B is free, the window's edges are the plan's. With
the normalisation in the graph, images come as they are stored, and channels that are normalised by mean and deviation
of their image have these as `mean` and `std` (C,).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoseg.data.preprocess import needs_stats
from autoseg.export.source import read_source
from autoseg.export.targets import Request
from autoseg.inference.predictor import group_key, load_network
from autoseg.plan import Plan
from autoseg.version import __version__
from autoseg.workspace.files import digest

FORMAT = 2
"""Of the description that goes with a graph; `autoseg.export.run` reads it. 2 has axes of a data set's own (`frame`),
which a program that knows 1 alone must not pass over; a description without them stays 1."""
KEY = "autoseg"
"""Under which a file keeps the description."""


class Normalised(nn.Module):
    """A network that takes intensities as they are stored; it does what `data.preprocess.normalize` does."""

    def __init__(self, network: nn.Module, plan: Plan) -> None:
        super().__init__()
        self.network = network
        self._norms = plan.preprocessing.norms

    def forward(
        self, image: torch.Tensor, mean: torch.Tensor | None = None, std: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits.

        Args:
            image: (B, C, X, Y, Z).
            mean, std: (C,) of the whole image, where a channel needs them; entries of the others are not used.
        """
        channels = []
        for place, norm in enumerate(self._norms):
            channel = image[:, place : place + 1]
            if norm.mode in ("ct", "range"):
                assert norm.bounds is not None
                low, high = norm.bounds
                minus, over = (norm.mean, norm.std) if norm.mode == "ct" else (low, high - low)
                channel = (channel.clamp(low, high) - minus) / max(over, 1e-6)
            elif norm.mode != "none":
                assert mean is not None
                assert std is not None
                raw = channel
                channel = (raw - mean[place]) / std[place].clamp(min=1e-6)
                if norm.nonzero:
                    channel = torch.where(raw == 0, torch.zeros_like(raw), channel)
                if norm.mode == "meanstdtanh":
                    channel = 3 * torch.tanh(channel / 3)
            channels.append(channel)
        logits: torch.Tensor = self.network(torch.cat(channels, 1))
        return logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """One model to export."""

    name: str
    """Of its job."""
    module: nn.Module
    inputs: dict[str, torch.Tensor]
    """Examples, by name."""
    description: dict[str, Any]
    """Plain data; see `describe`."""

    @property
    def description_text(self) -> str:
        """The description as a file keeps it."""
        return json.dumps(self.description, ensure_ascii=True)


def describe(plan: Plan, name: str, *, whole: bool) -> dict[str, Any]:
    """What a program must know to run a graph as autoseg runs its network."""
    label_map = plan.label_map
    shift = 0 if label_map.sigmoid else 1
    pairs = [[a + shift, b + shift] for a, b in plan.mirrored_classes]
    return {
        "format": 1 if plan.frame is None else FORMAT,
        "version": __version__,
        "name": name,
        "whole": whole,
        "frame": None if plan.frame is None else plan.frame.model_dump(mode="json"),
        "channels": [channel.model_dump(mode="json") for channel in plan.channels],
        "spacing_mm": list(plan.resample_resolution),
        "window": list(plan.roi_size),
        "overlap": plan.overlap,
        "crop_foreground": plan.crop_foreground,
        "mirror_axes": list(plan.mirror_axes) if plan.tta else [],
        "mirrored_pairs": pairs if plan.tta else [],
        "sigmoid": label_map.sigmoid,
        "classes": [
            {"name": n, "values": list(v), "written_as": painted}
            for n, v, painted in zip(label_map.names, label_map.values, label_map.painted_values, strict=True)
        ],
        "paint_order": list(label_map.paint_order),
        "overlaps": [[sorted(regions), value] for regions, value in label_map.overlap_values.items()],
        # Logits of models of one group are averaged, probabilities of groups.
        "group": digest([str(part) for part in group_key(plan)]),
    }


def write_graphs(request: Request, suffix: str, write: Callable[[Graph, Path], None]) -> list[Path]:
    """Write a file for each model of the ensemble, or of the jobs that were named."""
    source = read_source(request.workspace, algo=request.algo, fold=request.fold)
    plans, paths = source.predicting, []
    for name, job in source.jobs.items():
        plan = plans[name]
        module = load_network(job, plan)
        # Two, since an exporter takes a batch of one for a constant.
        inputs = {"image": torch.zeros((2, len(plan.channels), *plan.roi_size))}
        if request.whole:
            module = Normalised(module, plan).eval()
            if any(needs_stats(norm) for norm in plan.preprocessing.norms):
                inputs |= {"mean": torch.zeros(len(plan.channels)), "std": torch.ones(len(plan.channels))}
        graph = Graph(name=name, module=module, inputs=inputs, description=describe(plan, name, whole=request.whole))
        path = request.folder / f"{name}{suffix}"
        write(graph, path)
        paths.append(path)
    return paths
