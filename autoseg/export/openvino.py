"""OpenVINO: `<job>.xml` and `<job>.bin` for each model, by way of ONNX, with the description in the file's rt_info."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from autoseg.export.graph import KEY, Graph, write_graphs
from autoseg.export.onnx import onnx_bytes
from autoseg.export.run import import_openvino
from autoseg.export.targets import Request
from autoseg.hardware.system import replace
from autoseg.workspace.files import make_folder


def write(request: Request) -> list[Path]:
    """Write the two files for each model; both are moved to their place when they are whole, the weights first."""
    return write_graphs(request, ".xml", _write)


def _write(graph: Graph, path: Path) -> None:
    openvino = import_openvino()
    model = openvino.convert_model(io.BytesIO(onnx_bytes(graph)))
    model.set_rt_info(graph.description_text, [KEY])
    make_folder(path.parent)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=path.parent) as folder:
        made = Path(folder) / path.name
        openvino.save_model(model, made, compress_to_fp16=False)
        for part in (made.with_suffix(".bin"), made):
            replace(part, path.with_name(part.name))
