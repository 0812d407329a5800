"""The limits of the house: functions that fit a screen, and no module that uses what another one keeps to itself."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "autoseg"
MOST_LINES, MOST_BRANCHES = 60, 20
REASON = "# Long:"
"""How the comment directly above a function begins that says why it may be longer or have more branches."""

OF_LIBRARIES = {
    "_asdict": "documented, of named tuples",
    "_fields": "documented, of named tuples",
    "_exit": "documented, of os: a worker that ends at once",
    "_trial_id": "Optuna's storages name trials by nothing else",
    "_foreach_lerp_": "torch's own optimizers average with it; the public way takes a call for each tensor",
    "_ConvNd": "the one base of torch's convolutions",
}
"""Names with an underscore that belong to no module of ours, and why they are used."""

BRANCHES = (ast.If, ast.For, ast.While, ast.IfExp, ast.ExceptHandler, ast.match_case, ast.comprehension)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def num_branches(function: Function) -> int:
    """Ifs, loops, excepts, match cases, comprehensions, and each `and` and `or`; those of inner functions, too."""
    nodes = list(ast.walk(function))
    return sum(isinstance(n, BRANCHES) for n in nodes) + sum(
        len(n.values) - 1 for n in nodes if isinstance(n, ast.BoolOp)
    )


def functions(tree: ast.AST, within: str = "") -> Iterator[tuple[str, Function]]:
    """All functions with their dotted names, such as `Trainer.run`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            yield within + node.name, node
        name = f"{within}{node.name}." if isinstance(node, Function | ast.ClassDef) else within
        yield from functions(node, name)


def has_reason(function: Function, lines: list[str]) -> bool:
    """Whether the comment directly above a function, or above its decorators, gives the reason for its length."""
    line = min([function.lineno, *(d.lineno for d in function.decorator_list)]) - 2
    begins = ""
    while line >= 0 and lines[line].strip().startswith("#"):
        begins = lines[line].strip()
        line -= 1
    return begins.startswith(REASON) and len(begins) > len(REASON) + 10


def too_long(source: str) -> list[str]:
    """Functions of a file over the limits without a reason."""
    found, lines = [], source.splitlines()
    for name, function in functions(ast.parse(source)):
        num_lines = (function.end_lineno or 0) - function.lineno + 1
        if (num_lines > MOST_LINES or num_branches(function) > MOST_BRANCHES) and not has_reason(function, lines):
            found.append(name)
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_" and name not in OF_LIBRARIES


def private_uses(source: str) -> list[str]:
    """Underscore names of other modules that a file imports, or reads from an object, and does not define itself."""
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    defined = {n.name for n in nodes if isinstance(n, Function | ast.ClassDef)}
    defined |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    defined |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    found = []
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{a.name}" for a in node.names if is_private(a.name)]
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in defined:
            found.append(ast.unparse(node))
    return found


def offences(check: Callable[[str], list[str]]) -> set[str]:
    """What a check finds in the package, as `file: name`."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {f"{path.relative_to(PACKAGE)}: {name}" for path in files for name in check(path.read_text())}


def test_functions_fit_a_screen() -> None:
    """Over 60 lines or 20 branches: take it apart by meaning, or say why not in a `# Long:` comment above it."""
    assert sorted(offences(too_long)) == [], "too long, and no reason is given"


def test_nobody_uses_what_another_module_keeps_to_itself() -> None:
    """A name that begins with an underscore is its own module's: make it public, or do without."""
    assert sorted(offences(private_uses)) == [], "another module's underscore name is used"


LONG = "def f():\n" + "    x = 1\n" * 60
SPLIT = "def f(a):\n    return " + " or ".join(["a"] * 22) + "\n"
INNER = "class C:\n    @staticmethod\n    def f():\n" + "        x = 1\n" * 60


@pytest.mark.parametrize(
    ("source", "names"),
    [
        (LONG, ["f"]),
        (LONG.replace("    x = 1\n", "", 1), []),
        (SPLIT, ["f"]),
        (SPLIT.replace("a or ", "", 1), []),
        (INNER, ["C.f"]),
        (f"# Long: it is a table, row by row.\n{LONG}", []),
        (f"# Long: it is a table,\n# row by row.\n{LONG}", []),
        (f"# Long:\n{LONG}", ["f"]),
        (f"# Long: it is a table, row by row.\n\n{LONG}", ["f"]),
        (f"# A table.\n{LONG}", ["f"]),
        (INNER.replace("    @", "    # Long: it is a table, row by row.\n    @"), []),
    ],
)
def test_a_long_function_is_seen(source: str, names: list[str]) -> None:
    assert too_long(source) == names


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("from autoseg.data.grid import _turn", ["autoseg.data.grid._turn"]),
        ("from autoseg.data import grid\ngrid._turn()", ["grid._turn"]),
        ("def f(trainer):\n    return trainer._step()", ["trainer._step"]),
        ("class C:\n    def _f(self): return 1\n    def g(self, other): return other._f()", []),
        ("from autoseg.data.grid import Grid, __doc__\nGrid.__name__", []),
    ],
)
def test_a_private_name_of_another_module_is_seen(source: str, names: list[str]) -> None:
    assert private_uses(source) == names
