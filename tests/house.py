"""A copy of the package to which a test adds a part as CONTRIBUTING.md says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def copy_house(folder: Path) -> Path:
    """The package and the templates in a folder."""
    for name in ("autoseg", "templates"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def put(path: Path, marker: str, text: str) -> None:
    """Write a text in the place of a marker that stands alone in a file."""
    source = path.read_text()
    assert source.count(marker) == 1, f"{path.name}: {marker!r}"
    path.write_text(source.replace(marker, text))


def autoseg(house: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """One command of the copied package."""
    return _python(house, "-m", "autoseg", *map(str, words))


def commands(house: Path, *each: list[str]) -> subprocess.CompletedProcess[str]:
    """Commands of the copied package, one after the other in a process that loads torch once, until one fails."""
    code = (
        "import json, sys; from autoseg.cli.main import run_command\n"
        "sys.exit(next((code for words in json.loads(sys.argv[1]) if (code := run_command(words))), 0))"
    )
    return _python(house, "-c", code, json.dumps(each))


def _python(house: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(house), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=house, env=environment, timeout=280, check=False)
