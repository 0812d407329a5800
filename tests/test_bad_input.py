"""Bad input: every kind, tried as a user would; exit 2, the whole message, no traceback, nothing half-written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from autoseg.cli.main import run_command
from autoseg.data.phantoms import make_phantoms

Break = Callable[[Path], None]


def _edit(path: Path, change: Callable[[np.ndarray], np.ndarray], dtype: type = np.float32) -> None:
    nii = nib.load(path)
    array = change(np.asarray(nii.dataobj).astype(dtype))
    nib.save(nib.Nifti1Image(array, nii.affine), path)


def _put(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[3, 3, 3] = value
        return array

    return change


def _datalist(change: Callable[[dict], None]) -> Break:  # type: ignore[type-arg]
    def apply(folder: Path) -> None:
        path = folder / "datalist.json"
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return apply


def _setting(line: str) -> Break:
    def apply(folder: Path) -> None:
        path = folder / "input.yaml"
        path.write_text(path.read_text() + line + "\n")

    return apply


def _truncate(folder: Path) -> None:
    path = folder / "images" / "phantom_001.nii.gz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _other_fold(data: dict) -> None:  # type: ignore[type-arg]
    for item in data["training"]:
        item["fold"] = 2 * item["fold"]


LABEL, IMAGE = "labels/phantom_001.nii.gz", "images/phantom_001.nii.gz"
BROKEN: dict[str, tuple[Break, tuple[str, ...]]] = {
    "missing image": (
        lambda f: (f / IMAGE).unlink(),
        ("training[1].image: no file images/phantom_001.nii.gz", "Copy it there, or correct the path."),
    ),
    "truncated image": (_truncate, ("phantom_001", "ends early or is damaged", "xport it again")),
    "label on another grid": (
        lambda f: _edit(f / LABEL, lambda a: a[:-1]),
        ("phantom_001 (labels/phantom_001.nii.gz): not on the image's grid: shape (25,", "Export the label again."),
    ),
    "label value not in the list": (
        lambda f: _edit(f / LABEL, _put(7), np.uint8),
        ("label value 7 not declared. Expected 0, 1, 2. Name them in class_names, or correct the label.",),
    ),
    "label value no integer": (lambda f: _edit(f / LABEL, _put(0.5)), ("phantom_001", "0.5", "nearest")),
    "NaN": (lambda f: _edit(f / IMAGE, _put(np.nan)), ("phantom_001", "1 voxel", "NaN")),
    "infinity": (lambda f: _edit(f / IMAGE, _put(np.inf)), ("phantom_001", "infinit")),
    "a fold with no case": (_datalist(_other_fold), ("fold 1", "no case")),
    "one case only": (_datalist(lambda d: d.update(training=d["training"][:1])), ("1 ", "case", "at least")),
    "misspelt key": (_setting("num_epohs: 3"), ("input.yaml:5: num_epohs: unknown key. Did you mean num_epochs?",)),
    "wrong type": (_setting("num_epochs: many"), ("input.yaml:5: num_epochs:", "many", "whole number")),
    "missing datalist": (lambda f: (f / "datalist.json").unlink(), ("datalist.json", "no such file")),
    "a path outside the data root": (
        _datalist(lambda d: d["training"][0].update(image="../images/x.nii.gz")),
        ("../images/x.nii.gz", "outside"),
    ),
    "a fold that is not there": (_setting("folds: [9]"), ("fold 9: no such fold. The datalist has folds 0 to 1.",)),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_bad_input(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_phantoms(tmp_path, num_cases=4, num_testing=0, shape=(26, 24, 24), num_fold=2)
    change, expected = BROKEN[kind]
    change(tmp_path)
    code = run_command(["run", "--input", str(tmp_path / "input.yaml")])
    told = capsys.readouterr().err
    assert code == 2
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert any(all(part in line for part in expected) for line in errors), told
    assert "Traceback" not in told
    work = tmp_path / "work_dir"
    assert not list(work.rglob(".part-*"))
    assert not list(work.rglob("job.json"))


def test_all_faults_are_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_phantoms(tmp_path, num_cases=4, num_testing=0, shape=(26, 24, 24), num_fold=2)
    for kind in ("truncated image", "label value no integer"):
        BROKEN[kind][0](tmp_path)
    _edit(tmp_path / "images" / "phantom_002.nii.gz", _put(np.nan))
    assert run_command(["run", "--input", str(tmp_path / "input.yaml")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len([e for e in errors if "phantom_001" in e]) >= 2
    assert len([e for e in errors if "phantom_002" in e]) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--inptu", "a.yaml"], "--inptu"),
        (["rum"], "Did you mean run?"),
        (["train", "--fold", "abc"], "--fold"),
        (["run", "surplus"], "surplus"),
    ],
)
def test_bad_words(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(words) == 2
    assert message in capsys.readouterr().err


def test_a_faulty_case_can_be_set_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_phantoms(tmp_path, num_cases=6, num_testing=0, shape=(26, 24, 24), num_fold=2)
    _truncate(tmp_path)
    code = run_command(["analyze", "--input", str(tmp_path / "input.yaml"), "--on_fault", "skip"])
    assert code == 0
    assert "Set aside: phantom_001" in capsys.readouterr().out
    kept = json.loads((tmp_path / "work_dir" / "datalist.json").read_text())["training"]
    assert len(kept) == 5


def test_folds_are_made_of_the_cases_that_are_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each case is a fold here, so one that is set aside leaves an empty fold."""
    make_phantoms(tmp_path, num_cases=4, num_testing=0, shape=(26, 24, 24), num_fold=4)
    words = ["analyze", "--input", str(tmp_path / "input.yaml"), "--on_fault", "skip"]
    _truncate(tmp_path)
    assert run_command(words) == 2
    assert capsys.readouterr().err.endswith(
        "error: datalist.json: fold 2 has no case left, since on_fault: skip leaves out phantom_001. Mend one of its "
        "cases (on_fault: stop tells what is wrong with them), or leave the folds out of the list, so that they are "
        "made of what is left.\n"
    )
    path = tmp_path / "datalist.json"
    data = json.loads(path.read_text())
    data["training"] = [{k: v for k, v in item.items() if k != "fold"} for item in data["training"]]
    path.write_text(json.dumps(data))
    assert run_command(words) == 0
    assert "3 folds in place of 4: there are 3 patients or cases." in capsys.readouterr().err
    kept = json.loads((tmp_path / "work_dir" / "datalist.json").read_text())["training"]
    assert sorted(item["fold"] for item in kept) == [0, 1, 2]
