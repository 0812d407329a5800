"""Folders of empty files for tests of layouts, and what is recognised of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autoseg.data.datalists.layouts import recognise
from autoseg.errors import ConfigError, DataError


def touch(root: Path, *names: str) -> Path:
    """Make empty files; layouts are recognised by names alone."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def put(root: Path, name: str, data: Any) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(json.dumps(data))


def message(root: Path) -> str:
    with pytest.raises((DataError, ConfigError)) as caught:
        recognise(root)
    return str(caught.value).replace(str(root), "ROOT")


def groups(root: Path) -> dict[str, str | None]:
    """Label file -> the group of its case, in the training cases."""
    return {c.label.relative_to(root).as_posix(): c.group for c in recognise(root, num_fold=None).training if c.label}
