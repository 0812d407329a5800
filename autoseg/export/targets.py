"""What `autoseg export` can write: a row for each format, each with its own file in this folder.

A new format is a file with a `write` function and a row here; the command, its help and docs/export.md's table follow.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from autoseg.errors import ConfigError, ResourceError
from autoseg.hardware.packages import install_advice
from autoseg.workspace.archive import is_packed, opened_model
from autoseg.workspace.workspace import Workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be exported, and where to."""

    workspace: Workspace
    folder: Path
    """To write into."""
    algo: str | None = None
    fold: int | None = None
    """Jobs of these alone; neither: the chosen ensemble."""
    whole: bool = False
    """Put what can be of the preprocessing into the graph."""
    name: str = ""
    """Of what is made; empty: the run's."""
    release: str = "1.0.0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A format."""

    name: str
    doc: str
    """What is made, for the help and the documentation."""
    module: str
    """In this folder; its `write(request)` returns the paths of what it made."""
    packages: tuple[str, ...] = ()
    """That it needs besides."""
    extra: str = ""
    """Of autoseg that has them."""
    takes: tuple[str, ...] = ()
    """Fields of the request that it heeds, besides algo and fold."""


TARGETS = (
    Target(
        name="bundle",
        doc="a MONAI bundle in a folder of its own: of the ensemble, or of a model that can be trained on",
        module="bundle_export",
        takes=("name",),
    ),
    Target(
        name="slicer",
        doc="a zip for 3D Slicer's MONAI Auto3DSeg extension, of one model, and its entry for Models.json",
        module="slicer",
        takes=("name", "release"),
    ),
    Target(
        name="onnx",
        doc="`<job>.onnx` for each model, which `python -m autoseg.export.run` runs without torch",
        module="onnx",
        packages=("onnx", "onnxscript"),
        extra="export",
        takes=("whole",),
    ),
    Target(
        name="openvino",
        doc="`<job>.xml` and `<job>.bin` for each model",
        module="openvino",
        packages=("onnx", "onnxscript", "openvino"),
        extra="openvino",
        takes=("whole",),
    ),
    Target(
        name="torchscript",
        doc="`<job>.ts` for each model, which torch runs without MONAI and autoseg, in C++, too",
        module="torchscript",
        takes=("whole",),
    ),
    Target(
        name="nnunet_raw",
        doc="a raw data set of nnU-Net v2 with the run's folds, to compare on equal ones",
        module="nnunet_raw",
        takes=("name",),
    ),
    Target(
        name="tensorrt",
        doc="`<job>.plan` for each model, an engine for the GPU that builds it",
        module="tensorrt",
        takes=("whole",),
    ),
)
"""All formats, as the help lists them."""
BY_NAME = {target.name: target for target in TARGETS}

if TYPE_CHECKING:
    TargetName = str  # a type checker cannot read names out of a table
else:
    TargetName = Literal[*BY_NAME]


def export(
    work_dir: Path,
    format: TargetName,
    *,
    output: Path | None = None,
    algo: str | None = None,
    fold: int | None = None,
    whole: bool = False,
    name: str = "",
    release: str = "",
) -> list[Path]:
    """Write a run's models in a format of other tools.

    Args:
        work_dir: folder of a finished run, or a packed model.
        output: folder to write into; None: `export/` in the work_dir.

    Returns:
        What was made.

    Raises:
        ConfigError: An option has no effect, or the format cannot hold the model.
        ResourceError: A package is missing.
        WorkspaceError: There is no model, or it was changed since it was made.
    """
    target = BY_NAME[format]
    given = {"whole": whole, "name": name, "release": release}
    if idle := [key for key, value in given.items() if value and key not in target.takes]:
        raise ConfigError(f"--{idle[0]}: no effect with --format {format}. Leave it out.")
    if missing := [package for package in target.packages if importlib.util.find_spec(package) is None]:
        raise ResourceError(f"--format {format} needs {', '.join(missing)}. {install_advice(target.extra)}")
    if output is None and is_packed(Path(work_dir)):
        raise ConfigError("--output: missing. A packed model is not written into; give a folder.")
    folder = Path(output) if output is not None else Path(work_dir) / "export"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output: {folder} is a file. Give a folder to write into.")
    with opened_model(Path(work_dir)) as root:
        request = Request(
            workspace=Workspace(root),
            folder=folder,
            algo=algo,
            fold=fold,
            whole=whole,
            name=name,
            release=release or "1.0.0",
        )
        written: list[Path] = importlib.import_module(f"autoseg.export.{target.module}").write(request)
    return written
