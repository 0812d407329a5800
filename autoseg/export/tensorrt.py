"""TensorRT: an engine for each model, by way of ONNX. An engine belongs to the GPU and the version that built it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from autoseg.errors import ResourceError
from autoseg.export.graph import Graph, write_graphs
from autoseg.export.onnx import onnx_bytes
from autoseg.export.targets import Request
from autoseg.workspace.files import write_atomic, write_text

MOST_WINDOWS = 8
"""Windows of a batch that an engine is built for."""


def write(request: Request) -> list[Path]:
    """Write `<job>.plan` for each model, and its description beside it.

    Raises:
        ResourceError: There is no GPU, a package is missing, or TensorRT cannot build the engine.
    """
    if not torch.cuda.is_available():
        raise ResourceError(
            "--format tensorrt: torch finds no GPU here, and an engine can be built only on a GPU of the kind that it "
            "is to run on. Export onnx, and build the engine there."
        )
    # Looked for here and not by the table of formats: without a GPU, packages would be installed for nothing.
    if missing := [name for name in ("onnx", "onnxscript", "tensorrt") if importlib.util.find_spec(name) is None]:
        raise ResourceError(
            f"--format tensorrt needs {', '.join(missing)}. Run `pip install {' '.join(missing)}`, or export onnx and "
            "build the engine with TensorRT's own tools."
        )
    return write_graphs(request, ".plan", _write)


def _write(graph: Graph, path: Path) -> None:
    import tensorrt

    builder = tensorrt.Builder(tensorrt.Logger(tensorrt.Logger.WARNING))
    network = builder.create_network(0)
    parser = tensorrt.OnnxParser(network, builder.logger)
    if not parser.parse(onnx_bytes(graph)):
        raise ResourceError(
            f"{graph.name}: TensorRT cannot read the graph: {parser.get_error(0)}. Export onnx instead."
        )
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    _, *edges = graph.inputs["image"].shape
    profile.set_shape("image", (1, *edges), (1, *edges), (MOST_WINDOWS, *edges))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ResourceError(f"{graph.name}: TensorRT could not build an engine; its messages above say why.")
    write_atomic(path, lambda file: file.write(bytes(engine)))
    write_text(path.with_suffix(".json"), graph.description_text)
