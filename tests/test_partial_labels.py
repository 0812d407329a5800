"""benchmarks/partial_labels.py: its table is over the same classes for every arm."""

from __future__ import annotations

import importlib
import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from autoseg.data.grid import Grid
from autoseg.data.volumes import write_volume
from autoseg.workspace.files import write_json

ROOT = Path(__file__).resolve().parents[1]


def test_classes_without_truth_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether an arm predicts a voxel of them (0) or none (null), in results that are stored already, too."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module("partial_labels")
    lacking = module.NAMES.index("esophagus") + 1
    values = [v for v in range(1, 15) if v != lacking]
    for case, mine in enumerate((values[:5], values[5:])):
        label = np.array([0, *mine], np.uint8).reshape(-1, 1, 1)
        grid = Grid(shape=label.shape, affine=np.eye(4))
        write_volume(tmp_path / "cohort_1" / "truth" / f"{case}.nii.gz", label, grid)
    for arm, of_esophagus in (("naive", None), ("both", 0.0)):
        dice = {n: of_esophagus if n == "esophagus" else 0.5 for n in module.NAMES}
        found = {"arm": arm, "seed": 1, "dice": dice, "training_s": 1.0, "pseudo_labels": None}
        write_json(tmp_path / "results" / f"{arm}_1.json", found)
    module.write_table(Namespace(folder=tmp_path))
    rows = {row["arm"]: row for row in json.loads((tmp_path / "partial_labels.json").read_text())["rows"]}
    assert [rows[arm]["other organs"] for arm in ("naive", "both")] == [0.5, 0.5]
    assert [rows[arm]["organs"] for arm in ("naive", "both")] == [0.5, 0.5]
    assert "no testing case of seed 1 has it: esophagus" in (tmp_path / "partial_labels.md").read_text()
    stored = json.loads((tmp_path / "cohort_1" / "occurring.json").read_text())
    assert stored == [n for n in module.NAMES if n != "esophagus"]
