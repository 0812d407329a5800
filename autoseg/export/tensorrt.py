"""TensorRT: an engine for each model, by way of ONNX. An engine belongs to the GPU and the version that built it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
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
    _, *edges = graph.inputs["image"].shape
    engine = build_engine(onnx_bytes(graph), edges, graph.name)
    write_atomic(path, lambda file: file.write(engine))
    write_text(path.with_suffix(".json"), graph.description_text)


def build_engine(onnx: bytes, edges: Sequence[int], name: str, *, fp16: bool = False) -> bytes:
    """An engine of an ONNX file's network.

    Args:
        edges: C, X, Y, Z of its input.
        name: of the model, for messages.
        fp16: let layers work in half precision; changes labels a little.

    Raises:
        ResourceError: TensorRT cannot read the file or build the engine, or has no such flag.
    """
    import tensorrt

    builder = tensorrt.Builder(tensorrt.Logger(tensorrt.Logger.WARNING))
    network = builder.create_network(0)
    parser = tensorrt.OnnxParser(network, builder.logger)
    if not parser.parse(onnx):
        raise ResourceError(f"{name}: TensorRT cannot read the graph: {parser.get_error(0)}. Export onnx instead.")
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape("image", (1, *edges), (1, *edges), (MOST_WINDOWS, *edges))
    config.add_optimization_profile(profile)
    if fp16:
        if not hasattr(tensorrt.BuilderFlag, "FP16"):
            raise ResourceError(f"{name}: this TensorRT has no fp16 flag. Take a version from 8 to 10.")
        config.set_flag(tensorrt.BuilderFlag.FP16)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ResourceError(f"{name}: TensorRT could not build an engine; its messages above say why.")
    return bytes(engine)
