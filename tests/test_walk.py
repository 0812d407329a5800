"""A newcomer's walk: README and quick start typed as they stand, in a clean folder, with data of one's own.

Only this is not as it stands: words in capitals are the newcomer's own, the time is short, and what has no end
(`--serve`) or fetches the repository is left out.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from test_site import TINY

from autoseg.cli.main import run_command

ROOT = Path(__file__).resolve().parents[1]
PROSTATE = ROOT.parent / "shared" / "data" / "prostate_mr_small"
OWN = {"DATA_FOLDER": "my_data", "NEW_SCANS": "../new_scans"}
"""What stands in capitals on the pages, and what the newcomer has."""
LEFT_OUT = re.compile(r"^(git clone|make )|--serve")
NUM_NEW = 5
"""Scans that are kept back to be segmented at the end."""


def lines_of(path: Path, heading: str = "") -> list[str]:
    """What a page tells to type, below a heading alone where one is given."""
    text = path.read_text()
    if heading:
        text = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for block in re.findall(r"^```(?:sh)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL) for line in
             block.splitlines()]  # fmt: skip
    for word, own in OWN.items():
        lines = [line.replace(word, own) for line in lines]
    return [line for line in lines if line.partition("#")[0].strip() and not LEFT_OUT.search(line)]


README = lines_of(ROOT / "README.md", "From your data to a result")
QUICKSTART = lines_of(ROOT / "docs" / "quickstart.md")


def test_the_walk_is_that_of_the_pages() -> None:
    def commands(lines: list[str]) -> list[str]:
        return [next((w for w in line.split() if not w.endswith("autoseg")), "") for line in lines]

    assert commands(README) == ["init", "cd", "analyze", "run", "predict"]
    assert commands(QUICKSTART) == (
        ["doctor", "init", "cd", "run", "status", "predict", "evaluate", "explain", "explain"]
    )


def test_the_readme_works_on_phantoms(phantom_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("images", "labels"):
        shutil.copytree(phantom_dataset / kind, tmp_path / "my_data" / kind)
    (tmp_path / "new_scans").mkdir()
    shutil.copy(phantom_dataset / "images" / "phantom_000.nii.gz", tmp_path / "new_scans" / "someone.nii.gz")
    monkeypatch.chdir(tmp_path)
    for line in README:
        words = shlex.split(line, comments=True)
        if words[0] == "cd":
            monkeypatch.chdir(tmp_path / words[1])
            continue
        assert words[0].removeprefix("../") == ".venv/bin/autoseg"
        assert run_command(words[1:]) == 0, line
        if words[1] == "init":
            settings = tmp_path / "my_run" / "input.yaml"
            settings.write_text(settings.read_text() + TINY)
    assert (tmp_path / "my_run" / "work_dir" / "report.html").exists()
    label = nib.load(tmp_path / "my_run" / "predictions" / "someone.nii.gz")
    assert label.shape == nib.load(tmp_path / "new_scans" / "someone.nii.gz").shape


@pytest.mark.slow
@pytest.mark.skipif(not PROSTATE.exists(), reason="needs the prostate MR beside the repository")
@pytest.mark.parametrize("lines", [README, QUICKSTART], ids=["README", "quick start"])
def test_the_pages_work_on_real_data_typed_in_a_shell(lines: list[str], tmp_path: Path) -> None:
    """Of 27 prostates 22 are learned from; five more are segmented."""
    listed = json.loads((PROSTATE / "dataset.json").read_text())
    cases = listed["training"]
    for case in cases[:-NUM_NEW]:
        for path in map(Path, case.values()):
            (tmp_path / "my_data" / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROSTATE / path, tmp_path / "my_data" / path)
    listed |= {"training": cases[:-NUM_NEW], "numTraining": len(cases) - NUM_NEW}
    (tmp_path / "my_data" / "dataset.json").write_text(json.dumps(listed))
    for kind in ("image", "label"):
        (tmp_path / f"new_{'scans' if kind == 'image' else 'labels'}").mkdir()
        for case in cases[-NUM_NEW:]:
            shutil.copy(PROSTATE / case[kind], tmp_path / f"new_{'scans' if kind == 'image' else 'labels'}")
    program = tmp_path / ".venv" / "bin" / "autoseg"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m autoseg "$@"\n')
    program.chmod(0o755)
    home = tmp_path / "home"
    home.mkdir()
    environment = {"HOME": str(home), "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= {key: os.environ[key] for key in ("PYTHONPATH", "OMP_NUM_THREADS") if key in os.environ}
    typed = "\n".join(line.replace("--budget 2h", "--budget 3m") for line in lines)
    done = subprocess.run(
        ["bash", "-e"], input=typed, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = tmp_path / "my_run"
    assert (run / "work_dir" / "report.html").stat().st_size > 100_000
    dices = []
    for case in cases[-NUM_NEW:]:
        found = nib.load(run / "predictions" / Path(case["image"]).name)
        truth = nib.load(PROSTATE / case["label"])
        np.testing.assert_allclose(found.affine, truth.affine, atol=1e-5)
        a, b = np.asarray(found.dataobj) == 1, np.asarray(truth.dataobj) == 1
        dices.append(2 * (a & b).sum() / (a.sum() + b.sum()))
    print(f"mean Dice {np.mean(dices):.3f}")
    assert np.mean(dices) > 0.3
    if lines is QUICKSTART:
        assert re.search(r"^mean +0\.\d", done.stdout, flags=re.MULTILINE), "evaluate's table"
        assert "roi_size" in done.stdout, "explain"
