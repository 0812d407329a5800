"""benchmarks/gpu.sh and gpu.py, on a CPU and small: they do not fail on a GPU for what has nothing to do with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(out: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script, with this Python."""
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--out", str(out), *words],
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_part_alone(tmp_path: Path) -> None:
    done = run(tmp_path / "out", "--dry", PARTS="devices")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "out" / "devices.json").read_text()) == []
    assert "## devices" in done.stdout
    assert "## plan" not in done.stdout
    done = run(tmp_path / "out", "--wrong")
    assert (done.returncode, done.stderr) == (2, "unknown: --wrong\n")


def test_a_part_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    bench = gpu.Bench(tmp_path, "cpu", small=True, algos=("segresnet",), budget="1m")
    monkeypatch.setattr(bench, "plan", lambda: 1 / 0)
    monkeypatch.setattr(gpu, "list_gpus", list)
    assert gpu.run_parts(bench, ("plan", "devices")) == 1
    assert "plan failed; see also" in capsys.readouterr().out
    assert (tmp_path / "devices.json").exists()
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--output", str(tmp_path / "none")]) == 2
    assert "torch finds no GPU here" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_parts(tmp_path: Path) -> None:
    done = run(tmp_path, "--dry", ALGOS="segresnet")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert {*rows} >= {"devices", "plan", "layout", "precision", "memory", "prediction", "two_jobs"}
    assert rows["plan"][0]["roi_size"] == [32, 32, 32]
    assert rows["layout"][0]["contiguous s"] > 0
    assert rows["layout"][0]["compiled s"] > 0
    assert rows["precision"][0]["fp32 s"] > 0
    assert rows["memory"][0]["state"] == "done"
    assert rows["memory"][0]["peak GiB"] > 0
    assert rows["prediction"][0]["infer"] > 0
    assert rows["prediction"][1]["windows"] >= 1
    assert [row["processes"] for row in rows["two_jobs"]] == [1, 2]
