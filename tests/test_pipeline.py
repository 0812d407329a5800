"""The whole line on phantoms, as installed: run, rerun, edit, change, kill."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
from processes import autoseg

from autoseg.cli.main import run_command
from autoseg.data.phantoms import make_phantoms

SMALL = {
    "num_epochs": 2,
    "batch_size": 2,
    "num_steps_per_epoch": 2,
    "num_epochs_per_validation": 1,
    "precision": "fp32",
    "algos": ["segresnet"],
    "num_workers": 1,
    "segresnet": {"init_filters": 8, "blocks_down": [1, 1], "roi_size": [16, 16, 16], "learning_rate": 0.003},
}


def make_data(folder: Path, **settings) -> Path:  # type: ignore[no-untyped-def]
    """Phantoms in two folds and an input.yaml that trains in seconds."""
    path = make_phantoms(folder, num_cases=4, num_testing=1, shape=(26, 24, 24), num_fold=2)
    path.write_text(path.read_text() + yaml.safe_dump({**SMALL, **settings}))
    return path


def scores(work_dir: Path) -> dict:  # type: ignore[type-arg]
    found: dict = json.loads((work_dir / "ensemble" / "scores.json").read_text())  # type: ignore[type-arg]
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run; not to be changed."""
    folder = tmp_path_factory.mktemp("run")
    done = autoseg("run", "--input", make_data(folder))
    assert done.returncode == 0, done.stderr
    assert "Dice of the ensemble" in done.stdout
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run", copy_function=shutil.copy2)
    return tmp_path / "run"


def test_a_run_leaves_what_the_design_says(finished: Path) -> None:
    work = finished / "work_dir"
    for name in (
        "input.yaml",
        "settings.yaml",
        "datalist.json",
        "datastats.yaml",
        "datastats_by_case.yaml",
        "faults.json",
    ):
        assert (work / name).is_file(), name
    for fold in range(2):
        job = work / f"segresnet_{fold}"
        for name in ("configs/metadata.json", "configs/inference.json", "models/model.pt", "docs/README.md", "LICENSE"):
            assert (job / name).is_file(), name
        assert json.loads((job / "job.json").read_text())["state"] == "done"
        assert len((job / "metrics.jsonl").read_text().splitlines()) == 2
        assert len(list((job / "validation").glob("*.nii.gz"))) == 2
    predicted = nib.load(next((work / "ensemble" / "predictions").glob("*.nii.gz")))
    image = nib.load(next((finished / "images").glob("*004.nii.gz")))
    assert predicted.shape == image.shape
    np.testing.assert_allclose(predicted.affine, image.affine, atol=1e-5)
    texts = [p for p in work.rglob("*") if p.suffix in (".yaml", ".json", ".md", ".jsonl")]
    assert not [p for p in texts if str(finished) in p.read_text()], "absolute paths in work_dir"
    assert not list(work.rglob(".part-*"))


def test_a_second_run_does_nothing(finished: Path) -> None:
    work = finished / "work_dir"
    before = {p: p.stat().st_mtime_ns for p in work.rglob("model.pt")}
    again = autoseg("run", "--input", finished / "input.yaml")
    assert again.returncode == 0
    assert "analyze: up to date" in again.stderr
    assert "generate: up to date" in again.stderr
    assert again.stderr.count("is done (Dice") == 2
    assert before == {p: p.stat().st_mtime_ns for p in work.rglob("model.pt")}


def test_train_honours_an_edit_and_says_so(copied: Path) -> None:
    plan = copied / "work_dir" / "segresnet_1" / "configs" / "hyper_parameters.yaml"
    plan.write_text(re.sub(r"^num_epochs: 2\b", "num_epochs: 3", plan.read_text(), flags=re.M))
    done = autoseg("train", "--input", copied / "input.yaml")
    assert done.returncode == 0, done.stderr
    assert "segresnet_0 is done" in done.stderr
    assert "segresnet_1, because plan: num_epochs changed" in done.stderr
    assert len((plan.parent.parent / "metrics.jsonl").read_text().splitlines()) == 3
    explained = autoseg("explain", "segresnet_1.num_epochs", "--work_dir", copied / "work_dir").stdout
    assert "edited by hand" in explained
    # Even where another setting makes the plan anew, the edit stays.
    again = autoseg("generate", "--input", copied / "input.yaml", "--weight_decay", "0.001")
    assert "keeping what was edited by hand: num_epochs" in again.stderr
    text = plan.read_text()
    assert "num_epochs: 3" in text
    assert "weight_decay: 0.001  # command line" in text


def test_train_says_what_input_yaml_no_longer_says(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copied / "input.yaml"
    assert run_command(["train", "--input", str(path)]) == 0
    assert "planned before" not in capsys.readouterr().err
    path.write_text(path.read_text().replace("num_epochs: 2", "num_epochs: 3"))
    assert run_command(["train", "--input", str(path)]) == 0
    assert (
        "warning: segresnet_0, segresnet_1: planned before this: settings changed. The plans count as they are; run "
        "`autoseg generate`, or `autoseg run`, to plan anew.\n"
    ) in capsys.readouterr().err


def test_what_follows_from_a_value_on_the_command_line_comes_with_it(tmp_path: Path) -> None:
    """A budget would end at the epochs planned without one; a rate belongs to its optimizer."""
    network = {k: v for k, v in SMALL["segresnet"].items() if k != "learning_rate"}  # type: ignore[attr-defined]
    path = make_data(tmp_path, num_epochs=None, num_steps_per_epoch=100_000, segresnet=network)
    assert autoseg("analyze", "--input", path).returncode == 0
    assert autoseg("generate", "--input", path, "--folds", "0").returncode == 0
    file = tmp_path / "work_dir" / "segresnet_0" / "configs" / "hyper_parameters.yaml"
    before = yaml.safe_load(file.read_text())
    assert (before["optimizer"], before["learning_rate"]) == ("muon", 4e-3)
    assert before["budget_s"] is None
    done = autoseg("train", "--input", path, "--fold", "0", "--optimizer", "adamw", "--budget", "4s")
    assert done.returncode in (0, 1), done.stderr  # 1: so few steps on a busy machine that a job is not done
    after = yaml.safe_load(file.read_text())
    assert (after["optimizer"], after["learning_rate"], after["budget_s"]) == ("adamw", 2e-3, 4)
    assert after["num_epochs"] * 100_000 * after["step_s"] >= 3 * 4


def test_what_changes_prediction_alone_scores_again_and_trains_nothing(copied: Path) -> None:
    work, path = copied / "work_dir", copied / "input.yaml"
    before = {p: p.read_bytes() for p in work.rglob("model.pt")}
    seconds = json.loads((work / "segresnet_0" / "job.json").read_text())["seconds"]
    path.write_text(path.read_text() + "overlap: 0.1\ntta: true\n")
    done = autoseg("run", "--input", path)
    assert done.returncode == 0, done.stderr
    for fold in range(2):
        assert f"segresnet_{fold}: plan: tta, plan: overlap changed; scoring its model again" in done.stderr
        job = json.loads((work / f"segresnet_{fold}" / "job.json").read_text())
        scored = json.loads((work / f"segresnet_{fold}" / "validation.json").read_text())
        assert job["state"] == "done"
        assert job["dice"] == pytest.approx(scored["summary"]["mean"], abs=1e-6)
    assert json.loads((work / "segresnet_0" / "job.json").read_text())["seconds"] == seconds
    assert before == {p: p.read_bytes() for p in work.rglob("model.pt")}
    assert autoseg("run", "--input", path).stderr.count("is done (Dice") == 2
    again = autoseg("train", "--input", path, "--fold", "0", "--again")
    assert "scoring its model again" not in again.stderr
    assert "epoch 2" in again.stderr


def test_the_log_has_what_the_analysis_says_and_what_ended_the_run(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the terminal, which says it once; a batch system keeps its output elsewhere, or not at all."""
    path = sorted((copied / "images").glob("*.nii.gz"))[0]
    image = nib.load(path)
    values = np.asarray(image.dataobj).astype(np.float32)
    values[0, 0, 0] = 3e38
    nib.save(nib.Nifti1Image(values, image.affine), path)
    assert run_command(["analyze", "--input", str(copied / "input.yaml")]) == 0
    shown = capsys.readouterr()
    log = copied / "work_dir" / "run.log"
    assert len(re.findall(r" warning: analyze: \S+ \(images/\S+\): 1 voxel as far as 3e\+38", log.read_text())) == 1
    assert (shown.out + shown.err).count("as far as 3e+38") == 1
    path.write_bytes(path.read_bytes()[:100])
    assert run_command(["analyze", "--input", str(copied / "input.yaml")]) == 2
    assert capsys.readouterr().err.count("ends early or is damaged") == 1
    assert len(re.findall(r" error: \S+ \(images/\S+\): the file ends early or is damaged", log.read_text())) == 1


def test_an_invalid_edit_is_named(copied: Path) -> None:
    plan = copied / "work_dir" / "segresnet_0" / "configs" / "hyper_parameters.yaml"
    plan.write_text(plan.read_text().replace("batch_size: 2", "batch_sice: 2"))
    done = autoseg("train", "--input", copied / "input.yaml")
    assert done.returncode == 2
    assert "batch_sice: unknown key. Did you mean batch_size?" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_changed_case_is_named_and_its_jobs_are_trained_again(copied: Path) -> None:
    label = copied / "labels" / "phantom_000.nii.gz"
    nii = nib.load(label)
    array = np.asarray(nii.dataobj).copy()
    array[0, 0, 0] = 1
    nib.save(nib.Nifti1Image(array, nii.affine), label)
    stopped = autoseg("train", "--input", copied / "input.yaml")
    assert stopped.returncode == 2
    assert (
        "the analysis is out of date (case phantom_000 changed). Run `autoseg analyze` or `autoseg run`."
        in stopped.stderr
    )
    done = autoseg("run", "--input", copied / "input.yaml")
    assert done.returncode == 0, done.stderr
    assert "analyze: again, because case phantom_000 changed" in done.stderr
    assert "case phantom_000 changed" in done.stderr.split("train: job 1")[1]


def test_another_data_set_is_refused(copied: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    make_data(other)
    for path in [*other.glob("images/*"), *other.glob("labels/*")]:
        path.rename(path.with_name("x" + path.name))
    listed = (other / "datalist.json").read_text().replace("images/", "images/x").replace("labels/p", "labels/xp")
    (other / "datalist.json").write_text(listed)
    done = autoseg("run", "--input", other / "input.yaml", "--work_dir", copied / "work_dir")
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"error: {copied}/work_dir: this work_dir belongs to another data set (4 training cases, none of them in "
        "datalist.json). Set another work_dir, or delete this one."
    )


def test_a_failed_job_does_not_stop_the_others_and_is_tried_again(copied: Path) -> None:
    work = copied / "work_dir"
    for fold in range(2):
        job = json.loads((work / f"segresnet_{fold}" / "job.json").read_text())
        job["state"] = "pending"
        (work / f"segresnet_{fold}" / "job.json").write_text(json.dumps(job))
        assert not (work / f"segresnet_{fold}" / "models" / "checkpoint.pt").exists()
    weights = work / "segresnet_0" / "models" / "model.pt"
    weights.unlink(missing_ok=True)
    weights.mkdir(parents=True)  # so that no weights can be written
    failed = autoseg("train", "--input", copied / "input.yaml")
    assert failed.returncode == 1
    assert "1 of 2 jobs done" in failed.stderr
    status = autoseg("status", "--work_dir", work).stdout
    assert re.search(r"segresnet_0\s+failed", status)
    assert re.search(r"segresnet_1\s+done", status)
    weights.rmdir()
    assert autoseg("train", "--input", copied / "input.yaml").returncode == 0


def test_a_bare_run_goes_on_with_the_earlier_command_line(tmp_path: Path) -> None:
    path = make_data(tmp_path)
    path.write_text(path.read_text().replace("num_epochs: 2\n", ""))
    assert "analyze has not been done" in autoseg("generate", "--input", path).stderr
    assert autoseg("analyze", "--input", path).returncode == 0
    first = autoseg("generate", "--input", path, "--num_epochs", "7")
    assert first.returncode == 0, first.stderr
    again = autoseg("generate", "--input", path)
    assert "as on an earlier command line: --num_epochs 7" in again.stderr
    assert "generate: up to date" in again.stderr


def test_predict_and_evaluate_with_the_run(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = autoseg("predict", "--work_dir", finished / "work_dir", "--image", finished / "images", "--output", out)
    assert done.returncode == 0, done.stderr
    assert len(list(out.glob("*.nii.gz"))) == 5
    scored = autoseg("evaluate", "--predictions", out, "--labels", finished / "labels", "--classes", "sphere,box")
    assert scored.returncode == 0, scored.stderr
    assert "sphere" in scored.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_killed_ten_times_ends_with_the_same_scores(tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        make_data(tmp_path / name, num_epochs=6)
    assert autoseg("run", "--input", tmp_path / "whole" / "input.yaml").returncode == 0
    rng = random.Random(3)
    for _ in range(10):
        process = subprocess.Popen(
            [sys.executable, "-m", "autoseg", "run", "--input", str(tmp_path / "killed" / "input.yaml")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(rng.uniform(1.0, 12.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert autoseg("run", "--input", tmp_path / "killed" / "input.yaml").returncode == 0
    whole, killed = (scores(tmp_path / name / "work_dir") for name in ("whole", "killed"))
    assert whole == killed
