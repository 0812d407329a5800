"""ONNX: a file for each model, made by torch.export, with the description in its metadata."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from autoseg.export.graph import KEY, Graph, write_graphs
from autoseg.export.targets import Request
from autoseg.workspace.files import write_atomic

MOST_WINDOWS = 1 << 16
"""Of a batch: an exporter wants a limit."""


def write(request: Request) -> list[Path]:
    """Write `<job>.onnx` for each model."""
    return write_graphs(request, ".onnx", _write)


def _write(graph: Graph, path: Path) -> None:
    data = onnx_bytes(graph)
    write_atomic(path, lambda file: file.write(data))


def onnx_bytes(graph: Graph) -> bytes:
    """A model as an ONNX file, weights included."""
    batch = torch.export.Dim("batch", min=1, max=MOST_WINDOWS)
    shapes = tuple({0: batch} if name == "image" else {} for name in graph.inputs)
    with quiet():
        program = torch.onnx.export(
            graph.module,
            tuple(graph.inputs.values()),
            dynamo=True,
            input_names=[*graph.inputs],
            output_names=["logits"],
            dynamic_shapes=shapes,
            verbose=False,
        )
        assert program is not None
        proto: Any = program.model_proto
    entry = proto.metadata_props.add()
    entry.key, entry.value = KEY, graph.description_text
    data: bytes = proto.SerializeToString()
    return data


@contextmanager
def quiet() -> Iterator[None]:
    """Keep exporters' notes for their own developers away from users."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
