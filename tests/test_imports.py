"""Imports point down the layers of the house, and starting up loads nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "autoseg"
SHARED_PARTS = ("algos.networks", "algos.plan", "algos.device", "algos.templates")
"""Parts of a stage that inference and the other stages may import, and each other."""
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("terminal", "machine"),
    ("annotations",),
    ("yamlnodes",),
    ("reader", "claims"),
    ("config", "workspace"),
    ("explain", "usage"),
    ("data",),
    SHARED_PARTS,
    ("inference",),
    ("analyzer", "algos", "ensemble", "pseudolabel", "launch", "report"),
    ("budget",),
    ("jobs",),
    ("planning",),
    ("pipeline",),
    ("sweep", "forecast"),
    ("demo", "init", "status", "arguments", "schema", "doctor", "api"),
    ("completion",),
    ("cli",),
    ("__init__", "__main__"),
)
"""The house from the ground up. A unit may import units of the layers below it, and itself. `autoseg/__init__.py`
hands out the Python API when it is asked for, so it stands on top."""
HEIGHT = {unit: height for height, layer in enumerate(LAYERS) for unit in layer}


def unit_of(module: str) -> str:
    """The unit of the house that a dotted module inside the package belongs to."""
    parts = module.split(".")
    two = ".".join(parts[:2])
    return two if two in SHARED_PARTS else parts[0]


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
    mine = unit_of(module)
    wrong = []
    for other in imports_of(path):
        theirs = unit_of(other)
        if theirs == mine or HEIGHT[theirs] < HEIGHT[mine] or (mine in SHARED_PARTS and theirs in SHARED_PARTS):
            continue
        wrong.append(f"autoseg.{module} imports autoseg.{other}")
    return wrong


def modules() -> list[tuple[Path, str]]:
    files = sorted(PACKAGE.rglob("*.py"))
    return [(f, ".".join(f.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")) for f in files]


def test_every_module_has_a_layer() -> None:
    assert [name for _, name in modules() if unit_of(name) not in HEIGHT] == []


def test_imports_point_down() -> None:
    assert [text for path, name in modules() for text in offences(path, name)] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ensemble.predict", "from autoseg.algos.trainer import train_job"),
        ("analyzer.case", "from autoseg import pipeline"),
        ("data.volumes", "import autoseg.inference.windows"),
        ("config", "def f():\n    from autoseg.workspace import Workspace"),
    ],
)
def test_a_wrong_import_is_seen(tmp_path: Path, module: str, source: str) -> None:
    path = tmp_path / "module.py"
    path.write_text(source)
    assert len(offences(path, module)) == 1


@pytest.mark.parametrize(
    "module", ["autoseg", "autoseg.cli", "autoseg.config", "autoseg.workspace", "autoseg.status", "autoseg.doctor"]
)
def test_no_torch_on_import(module: str) -> None:
    heavy = "[m for m in ('torch', 'monai', 'scipy', 'sklearn', 'matplotlib') if m in sys.modules]"
    code = f"import sys, {module}; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
