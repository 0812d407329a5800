"""benchmarks/reliability.py: its damage is damage, and each campaign runs in its least form."""

from __future__ import annotations

import gzip
import importlib
import json
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

from autoseg.data.phantoms import make_phantoms

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def reliability(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("reliability")


def test_damage_is_repeatable_and_read_strictly(reliability: ModuleType, tmp_path: Path) -> None:
    mutations = importlib.import_module("campaigns.mutations")
    make_phantoms(tmp_path, num_cases=4, num_testing=0, shape=(24, 24, 24), num_fold=2)
    seeds = mutations.nifti_seeds(tmp_path / "images" / "phantom_000.nii.gz")
    for raw in seeds.values():
        voxels, _ = mutations.strictly_read(gzip.compress(raw))
        assert voxels.shape == (24, 24, 24)
        with pytest.raises(ValueError):
            mutations.strictly_read(gzip.compress(raw)[:-5] + b"wrong")
    damaged = [mutations.damaged_nifti(seeds, random.Random(i)) for i in range(40)]
    assert [d[1] for d in damaged] == [mutations.damaged_nifti(seeds, random.Random(i))[1] for i in range(40)]
    assert len({d[0].partition(": ")[2][:6] for d in damaged}) > 8
    text = (tmp_path / "input.yaml").read_text()
    assert len({mutations.change_text(text, random.Random(i))[1] for i in range(40)}) > 20
    data = json.loads((tmp_path / "datalist.json").read_text())
    assert mutations.change_value(data, random.Random(0), ()) == mutations.change_value(
        json.loads((tmp_path / "datalist.json").read_text()), random.Random(0), ()
    )
    assert data != json.loads((tmp_path / "datalist.json").read_text())


def test_what_breaks_a_promise_is_seen(reliability: ModuleType) -> None:
    common = importlib.import_module("campaigns.common")
    trace = 'Traceback (most recent call last):\n  File "a.py", line 1, in f\n    f()\nValueError: no\n'
    for code, said, fault in (
        (None, "", "took over 61 s"),
        (3, "error: a", "exit code 3"),
        (2, "", "exit code 2 and no word"),
        (1, trace, 'traceback: File "a.py", line 1, in f: ValueError: no'),
    ):
        ended = common.Ended(words=[], code=code, stdout="", stderr=said, seconds=61)
        assert ended.faults == [fault]
    for code, said in ((0, ""), (1, "a job failed"), (2, "error: a")):
        assert common.Ended(words=[], code=code, stdout="", stderr=said, seconds=1).faults == []
    report = common.Report("x", {"only": "a,b"})
    assert [report.wants(name) for name in ("apple", "bear", "cat")] == [True, True, False]
    with report.row("apple") as row:
        row.tried += 1
        row.fault("broken")
    assert report.broken == 1
    assert "apple" in report.text()


@pytest.mark.slow
@pytest.mark.parametrize("campaign", ["kills", "disk", "limits", "fuzz", "escapes"])
def test_a_campaign_in_its_least_form(
    reliability: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], campaign: str
) -> None:
    words = [campaign, "--tiny", "--folder", str(tmp_path / "work"), "--output", str(tmp_path / "out.json")]
    assert reliability.main(words) == 0, capsys.readouterr().out[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    tried = [row for row in found["rows"] if row["tried"] or row["skipped"]]
    assert tried
    assert found["versions"]["torch"]
    assert not [row["faults"] for row in found["rows"] if row["faults"]]
