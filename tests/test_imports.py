"""Imports point down the layers of the house, and starting up loads nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "autoseg"
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "version"),
    ("terminal",),
    ("hardware",),
    ("config",),
    ("workspace",),
    ("data",),
    ("plan",),
    ("networks",),
    ("evaluation", "tracking", "weights"),
    ("inference",),
    ("export",),
    ("training",),
    ("algos", "pretraining"),
    ("analyzer", "ensemble", "pseudolabel", "launch"),
    ("report",),
    ("pipeline",),
    ("sweep",),
    ("api",),
    ("cli",),
    ("__main__", "__init__"),
)
"""The house from the ground up. A room may import rooms of the layers below it, and itself. `autoseg/__init__.py`
hands out the Python API when it is asked for, so it stands on top."""
HEIGHT = {room: height for height, layer in enumerate(LAYERS) for room in layer}


def room_of(module: str) -> str:
    """The room of the house that a dotted module inside the package belongs to: a folder, or a file at the root."""
    return module.split(".")[0]


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, relative to the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("autoseg.")}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "autoseg":
                found |= {f"autoseg.{alias.name}" for alias in node.names if not alias.name.startswith("__")}
            elif node.module and node.module.startswith("autoseg."):
                inner = PACKAGE.joinpath(*node.module.split(".")[1:])
                names = {a.name for a in node.names if (inner / f"{a.name}.py").exists() or (inner / a.name).is_dir()}
                found |= {f"{node.module}.{name}" for name in names} or {node.module}
    return {name.removeprefix("autoseg.") for name in found}


def offences(path: Path, module: str) -> list[str]:
    """Imports of a module that point up or sideways."""
    mine = room_of(module)
    wrong = []
    for other in imports_of(path):
        theirs = room_of(other)
        if theirs != mine and HEIGHT[theirs] >= HEIGHT[mine]:
            wrong.append(f"autoseg.{module} imports autoseg.{other}")
    return wrong


def modules() -> list[tuple[Path, str]]:
    files = sorted(PACKAGE.rglob("*.py"))
    return [(f, ".".join(f.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")) for f in files]


def test_every_room_has_a_layer_and_no_other_lies_at_the_root() -> None:
    assert {room_of(name) for _, name in modules()} == {*HEIGHT}


def test_imports_point_down() -> None:
    assert [text for path, name in modules() for text in offences(path, name)] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("inference.predictor", "from autoseg.training.trainer import Trainer"),
        ("analyzer.case", "from autoseg import pipeline"),
        ("data.volumes", "import autoseg.inference.windows"),
        ("config", "def f():\n    from autoseg.workspace.workspace import Workspace"),
    ],
)
def test_a_wrong_import_is_seen(tmp_path: Path, module: str, source: str) -> None:
    path = tmp_path / "module.py"
    path.write_text(source)
    assert len(offences(path, module)) == 1


@pytest.mark.parametrize(
    "module",
    [
        "autoseg",
        "autoseg.cli.main",
        "autoseg.config.settings",
        "autoseg.workspace.workspace",
        "autoseg.report.status",
        "autoseg.cli.doctor",
        "autoseg.pipeline.stages",
    ],
)
def test_no_torch_on_import(module: str) -> None:
    heavy = "[m for m in ('torch', 'monai', 'scipy', 'sklearn', 'matplotlib') if m in sys.modules]"
    code = f"import sys, {module}; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_importing_the_package_loads_only_what_python_itself_begins_with() -> None:
    """Counted, not timed: `import autoseg` is its version and typing, on any machine well under 100 ms."""
    code = "import sys, typing; before = {*sys.modules}; import autoseg; print(sorted({*sys.modules} - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['__future__', 'autoseg', 'autoseg.version']\n"
