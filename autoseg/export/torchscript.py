"""TorchScript: a file for each model, by tracing, with the description as the extra file autoseg.json."""

from __future__ import annotations

import io
from pathlib import Path

import torch

from autoseg.export.graph import Graph, write_graphs
from autoseg.export.onnx import quiet
from autoseg.export.targets import Request
from autoseg.workspace.files import write_atomic

EXTRA = "autoseg.json"


def write(request: Request) -> list[Path]:
    """Write `<job>.ts` for each model."""
    return write_graphs(request, ".ts", _write)


def _write(graph: Graph, path: Path) -> None:
    with quiet(), torch.no_grad():
        # Traced: MONAI's SwinUNETR and DiNTS cannot be scripted, and none of the networks branches on its data.
        traced = torch.jit.trace(graph.module, tuple(graph.inputs.values()), check_trace=False)
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer, _extra_files={EXTRA: graph.description_text})
    write_atomic(path, lambda file: file.write(buffer.getvalue()))
