"""Typical mistakes of a first hour, each made as a new user would: the message alone is enough to correct it.

A message says where, what was found, and what to do; the exit code is 2; there is no traceback; nothing that was
there is changed.
"""

# ruff: noqa: E501 - messages stand whole on a line
from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from autoseg.cli.main import run_command
from autoseg.config.networks import ALGOS
from autoseg.data.formats.table import SUFFIXES_TEXT
from autoseg.data.phantoms import make_phantoms
from autoseg.workspace.claims import Claim

IMAGE, LABEL = "images/phantom_001.nii.gz", "labels/phantom_001.nii.gz"
Make = Callable[[Path], object]


def setting(line: str) -> Make:
    return lambda folder: (folder / "input.yaml").write_text(f"{(folder / 'input.yaml').read_text()}{line}\n")


def replaced(old: str, new: str, name: str = "input.yaml") -> Make:
    def make(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return make


def voxel(name: str, value: float, dtype: type) -> Make:
    def make(folder: Path) -> None:
        image = nib.load(folder / name)
        array = np.asarray(image.dataobj).astype(dtype)
        array[0, 0, 0] = value
        nib.save(nib.Nifti1Image(array, image.affine), folder / name)

    return make


def too_few_names(folder: Path) -> None:
    """And nobody else names the other label value."""
    replaced("class_names: [sphere, box]", "class_names: [sphere]")(folder)
    listed = json.loads((folder / "datalist.json").read_text())
    del listed["labels"]
    (folder / "datalist.json").write_text(json.dumps(listed))


def shorter(folder: Path) -> None:
    image = nib.load(folder / LABEL)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[:-1], image.affine), folder / LABEL)


def truncated(folder: Path) -> None:
    (folder / IMAGE).write_bytes((folder / IMAGE).read_bytes()[:2000])


def nothing(folder: Path) -> None:
    """The mistake is in the words alone."""


RUN = ["run", "--input", "input.yaml"]
FRESH: dict[str, tuple[Make, list[str], str]] = {
    # name: (what was done to the folder, the command, what the message must say; ... stands for anything)
    "wrong input path": (
        nothing,
        ["run", "--input", "inptu.yaml"],
        "inptu.yaml: no such file. Write one with `autoseg init DATA_FOLDER`, or name it with --input FILE.",
    ),
    "misspelt command": (nothing, ["trian"], "trian: unknown command. Did you mean train?"),
    "misspelt flag": (nothing, [*RUN, "--bugdet", "2h"], "--bugdet: unknown flag. Did you mean --budget?"),
    "flag without a value": (nothing, [*RUN, "--budget"], "--budget: no value given. Expected text."),
    "budget without a unit": (
        nothing,
        [*RUN, "--budget", "20"],
        "--budget: expected a time with its unit, such as 90s, 10m, 2h, 1h30m or 1d, found 20.",
    ),
    "quiet and verbose": (
        nothing,
        [*RUN, "--quiet", "--verbose"],
        "--quiet: contradicts --verbose. Give one of the two.",
    ),
    "misspelt key": (setting("num_epohs: 3"), RUN, "input.yaml:...: num_epohs: unknown key. Did you mean num_epochs?"),
    "key given twice": (
        setting("modality: CT"),
        RUN,
        "input.yaml:...: modality: already given on line ... Keep one of the two.",
    ),
    "wrong type": (
        setting("num_epochs: many"),
        RUN,
        "input.yaml:...: num_epochs: expected a whole number >= 1, found many.",
    ),
    "number in quotes": (
        setting('batch_size: "2"'),
        RUN,
        "input.yaml:...: batch_size: expected a whole number >= 1, found ...Remove the quotes.",
    ),
    "folds besides those of the list": (
        setting("num_fold: 5"),
        RUN,
        "input.yaml:...: num_fold: 5, but datalist.json has 2 folds of its own. Leave num_fold out to use these, or remove each `fold` from the list to have folds made.",
    ),
    "a path as on Windows": (
        replaced(IMAGE, IMAGE.replace("/", "\\\\"), "datalist.json"),
        RUN,
        "...no file images\\phantom_001.nii.gz in ... Its folders are parted by backslashes; write slashes (/)...",
    ),
    "no YAML": (setting("algos: [segresnet"), RUN, "input.yaml:..."),
    "tab in YAML": (
        setting("segresnet:\n\tbatch_size: 2"),
        RUN,
        "input.yaml:...: not valid YAML: ... Indent with spaces.",
    ),
    "key is missing": (replaced("modality:", "# modality:"), RUN, "input.yaml: modality: missing. Expected text: ..."),
    "unknown network": (
        setting("algos: [vnet]"),
        RUN,
        f"input.yaml:...: algos...: expected one of {', '.join(ALGOS)}, found vnet....",
    ),
    "fold that is not there": (
        nothing,
        [*RUN, "--folds", "[9]"],
        "fold 9: no such fold. The datalist has folds 0 to 1.",
    ),
    "negative fold": (nothing, ["train", "--fold", "-1"], "--fold: expected a whole number >= 0, found -1."),
    "no GPU": (nothing, [*RUN, "--device", "cuda"], "device...cuda..."),
    "wrong datalist": (replaced("datalist.json", "data.json"), RUN, "input.yaml:...: datalist: no such file: ..."),
    "wrong dataroot": (
        nothing,
        [*RUN, "--dataroot", "nowhere"],
        "--dataroot: no such folder: ... nowhere is relative to the current folder.",
    ),
    "datalist is no JSON": (
        replaced("{", "[{", "datalist.json"),
        RUN,
        "...datalist.json:...: not valid JSON ...Correct this place.",
    ),
    "image is missing": (
        lambda f: (f / IMAGE).unlink(),
        RUN,
        "...datalist.json: training[1].image: no file images/phantom_001.nii.gz ...Copy it there, or correct the path.",
    ),
    "image ends early": (truncated, RUN, "phantom_001 (images/phantom_001.nii.gz): ...damaged...xport it again..."),
    "label on another grid": (
        shorter,
        RUN,
        "phantom_001 (labels/phantom_001.nii.gz): not on the image's grid: ...Export the label again.",
    ),
    "label value nobody named": (
        voxel(LABEL, 7, np.uint8),
        RUN,
        "...label value 7 not declared. Expected 0, 1, 2. Name them in class_names, or correct the label.",
    ),
    "label with fractions": (
        voxel(LABEL, 0.5, np.float32),
        RUN,
        "phantom_001 (labels/phantom_001.nii.gz): ...0.5...nearest...",
    ),
    "NaN in an image": (
        voxel(IMAGE, np.nan, np.float32),
        RUN,
        "phantom_001 (images/phantom_001.nii.gz): 1 voxel is NaN. Replace them, or leave the case out.",
    ),
    "too few class names": (
        too_few_names,
        RUN,
        "...label value 2 not declared...class_names...",
    ),
    "work_dir cannot be made": (
        nothing,
        [*RUN, "--work_dir", "/proc/nowhere/run"],
        "/proc/nowhere/run: cannot be made or written to (...). Give a work_dir in a folder that you may write to.",
    ),
    "work_dir is a file": (
        nothing,
        [*RUN, "--work_dir", "datalist.json"],
        "--work_dir: expected a folder, found a file: ...Give another work_dir.",
    ),
    "data folder that is not there": (nothing, ["init", "nowhere", "--output", "x"], "...nowhere...no such folder..."),
    "data folder without data": (
        lambda f: (f / "empty").mkdir(),
        ["init", "empty", "--output", "x"],
        "...empty: ...images...labels...",
    ),
    "init twice": (
        nothing,
        ["init", ".", "--output", "."],
        "...input.yaml: exists already. Give another folder with --output, or --force to replace it.",
    ),
    "training before the analysis": (
        nothing,
        ["train", "--input", "input.yaml"],
        "...work_dir: analyze has not been done. Run `autoseg analyze` or `autoseg run` first.",
    ),
    "predicting before anything": (
        nothing,
        ["predict", "--image", "images", "--output", "out"],
        "work_dir: no such work_dir. Give the folder of a finished run with --work_dir.",
    ),
    "status of no run": (
        nothing,
        ["status", "--work_dir", "images"],
        "images: not a run's folder. Give a run's folder with --work_dir.",
    ),
    "report of no run": (
        nothing,
        ["report", "--work_dir", "images"],
        "images: not a run's folder. Give a run's folder with --work_dir.",
    ),
    "unknown key to explain": (
        nothing,
        ["explain", "roi_sise"],
        "roi_sise: no such setting or planned value. Did you mean roi_size?",
    ),
    "nothing to evaluate": (
        lambda f: (f / "none").mkdir(),
        ["evaluate", "--predictions", "none", "--labels", "labels"],
        f"--predictions: none holds no label files ({SUFFIXES_TEXT}).",
    ),
}
DONE: dict[str, tuple[Make, list[str], str]] = {
    "image to segment is missing": (
        nothing,
        ["predict", "--image", "scan.nii.gz", "--output", "out"],
        "--image: scan.nii.gz: no such file or folder.",
    ),
    "predictions over the images": (
        nothing,
        ["predict", "--image", "images", "--output", "images"],
        "--output: ...would be overwritten. Give another folder.",
    ),
    "a network that was not trained": (
        nothing,
        ["predict", "--image", "images", "--output", "out", "--algo", "swinunetr"],
        "work_dir: no trained job of algorithm swinunetr. Trained: ...",
    ),
    "a plan edited wrongly": (
        replaced("batch_size:", "batch_sice:", "work_dir/segresnet_0/configs/hyper_parameters.yaml"),
        ["train"],
        "...hyper_parameters.yaml:...: batch_sice: unknown key. Did you mean batch_size?",
    ),
    "another data set in the same work_dir": (
        lambda f: (
            [p.rename(p.with_name(f"x{p.name}")) for k in ("images", "labels") for p in (f / k).iterdir()]
            and (f / "datalist.json").write_text(
                (f / "datalist.json").read_text().replace("images/", "images/x").replace("labels/", "labels/x")
            )
        ),
        RUN,
        "...work_dir: this work_dir belongs to another data set (8 training cases, ...). Set another work_dir, or delete this one.",
    ),
    "damaged weights": (
        lambda f: (f / "work_dir/segresnet_0/models/model.pt").write_bytes(b"no weights"),
        ["predict", "--image", "images", "--output", "out", "--algo", "segresnet"],
        "...model.pt: not the weights that training left: damaged, or replaced. ...again: `autoseg train --algo segresnet --fold 0 --again`. Where it was changed on purpose, give ... --accept once.",
    ),
    "damaged weights in an ensemble": (
        lambda f: (f / "work_dir/segresnet_1/models/model.pt").write_bytes(b"no weights"),
        ["ensemble", "--input", "input.yaml"],
        "...segresnet_1/models/model.pt: not the weights that training left...",
    ),
    "a plan edited after training": (
        replaced("roi_size: [", "roi_size: [1", "work_dir/segresnet_0/configs/hyper_parameters.yaml"),
        ["predict", "--image", "images", "--output", "out", "--algo", "segresnet"],
        "...hyper_parameters.yaml: edited since segresnet_0 was trained, in what its weights belong to. Undo the edit, or run `autoseg train` to train by it. ...",
    ),
    "an ensemble edited by hand": (
        replaced('"combine": "mean"', '"combine": "vote"', "work_dir/ensemble/ensemble.json"),
        ["predict", "--image", "images", "--output", "out"],
        "...ensemble.json: edited since the ensemble was chosen. Undo the edit, or delete the file and run `autoseg ensemble` again. ...",
    ),
    "damaged scores": (
        lambda f: (f / "work_dir/ensemble/ensemble.json").write_text("{"),
        ["predict", "--image", "images", "--output", "out"],
        "...ensemble.json: cut off or damaged: not valid JSON ... Undo the edit, or delete the file and run `autoseg ensemble` again.",
    ),
}


@pytest.fixture(scope="module")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_phantoms(tmp_path_factory.mktemp("small"), num_cases=4, num_testing=0, shape=(24, 24, 24), num_fold=2)


@pytest.fixture
def fresh(small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set with its input.yaml of two folds; the current folder."""
    shutil.copytree(small_data.parent, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def done(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(finished_run, tmp_path / "run", copy_function=shutil.copy2)
    monkeypatch.chdir(tmp_path / "run")
    return tmp_path / "run"


def fits(pattern: str, line: str) -> bool:
    """Whether a line has the parts of a pattern between `...` in their order, the first at its beginning."""
    first, *parts = pattern.split("...")
    if not line.startswith(first):
        return False
    at = len(first)
    for part in parts:
        at = line.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return at == len(line) or pattern.endswith("...") or not parts and line == first


def check(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    code = run_command(words)
    told = capsys.readouterr().err
    errors = [line.removeprefix("error: ") for line in told.splitlines() if line.startswith("error: ")]
    assert any(fits(message, line) for line in errors), f"\nexpected {message}\ngot      {told}"
    assert code == 2
    assert "Traceback" not in told
    assert len(errors) <= 8  # one mistake does not bring a flood


@pytest.mark.parametrize("mistake", FRESH)
def test_a_mistake_at_the_beginning(mistake: str, fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, words, message = FRESH[mistake]
    make(fresh)
    check(words, message, capsys)


@pytest.mark.parametrize("mistake", DONE)
def test_a_mistake_with_a_finished_run(mistake: str, done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, words, message = DONE[mistake]
    make(done)
    check(words, message, capsys)


def test_at_least_thirty_are_tried() -> None:
    assert len(FRESH) + len(DONE) >= 30


def test_two_runs_at_once(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = fresh / "work_dir"
    with Claim(work / ".claims", str(work)):
        check(
            RUN,
            "...work_dir: process ... is working on it since ..., last heartbeat 0 s ago (taken over after 120 s). Wait "
            "for that autoseg run, or give another work_dir.",
            capsys,
        )


def test_the_disk_is_full(done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before = (done / "work_dir" / "settings.yaml").read_bytes()

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "work_dir/settings.yaml")

    monkeypatch.setattr("os.fsync", full)
    check(
        RUN,
        "work_dir/settings.yaml: No space left on device. Free some space, or give a work_dir on another disk. ...",
        capsys,
    )
    assert (done / "work_dir" / "settings.yaml").read_bytes() == before
    assert not list((done / "work_dir").rglob(".part-*"))


def test_nothing_of_a_good_run_is_lost_by_a_mistake(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads((done / "work_dir" / "ensemble" / "scores.json").read_text())
    check([*RUN, "--folds", "[9]"], "fold 9: no such fold. The datalist has folds 0 to 1.", capsys)
    assert json.loads((done / "work_dir" / "ensemble" / "scores.json").read_text()) == before
