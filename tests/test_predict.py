"""New images and scores of folders, as the commands `predict` and `evaluate` do them."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from tiny_jobs import make_job

from autoseg.claims import Claim
from autoseg.data.volumes import Grid, write_volume
from autoseg.ensemble.combine import EnsembleSpec
from autoseg.ensemble.evaluate import evaluate, evaluate_folders
from autoseg.ensemble.predict import predict_files
from autoseg.errors import ConfigError, DataError, WorkspaceError
from autoseg.workspace import Workspace, write_json

AFFINES = {
    "flipped": np.array([[-1.0, 0, 0, 30], [0, -1.2, 0, 10], [0, 0, 1.5, -7], [0, 0, 0, 1]]),
    "permuted": np.array([[0, 0, 1.1, 0], [-0.9, 0, 0, 4], [0, 2.5, 0, 9], [0, 0, 0, 1.0]]),
    "oblique": np.array([[0.98, 0.17, 0, 3], [-0.17, 0.98, 0.1, -20], [0, -0.1, 1.9, 5], [0, 0, 0, 1]]),
    "anisotropic": np.diag([0.7, 0.7, 5.0, 1.0]),
}


@pytest.fixture
def work_dir(tmp_path: Path) -> Path:
    """Two trained jobs and an ensemble of both."""
    root = tmp_path / "work"
    members = (("segresnet", 0), ("segresnet", 1))
    for algo, fold in members:
        make_job(root, algo, fold, seed=fold)
    spec = EnsembleSpec(
        name="segresnet",
        method="auto",
        combine="mean",
        members=members,
        classes=("sphere", "box"),
        dice=0.5,
        version="0",
    )
    write_json(Workspace(root).ensemble_spec, spec.model_dump(mode="json"))
    return root


def write_image(path: Path, affine: np.ndarray | None = None, shape=(20, 18, 16), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    nib.save(nib.Nifti1Image(values, np.eye(4) if affine is None else affine), path)
    return path


def test_a_folder_comes_back_on_its_own_grids(work_dir: Path, tmp_path: Path) -> None:
    for name, affine in AFFINES.items():
        write_image(tmp_path / "images" / f"{name}_0000.nii.gz", affine)
    write_image(tmp_path / "images" / "tiny.nii", shape=(5, 4, 1))
    assert predict_files(work_dir, tmp_path / "images", tmp_path / "out", device="cpu") == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(f"{n}.nii.gz" for n in [*AFFINES, "tiny"])
    for name, affine in AFFINES.items():
        label = nib.load(tmp_path / "out" / f"{name}.nii.gz")
        assert label.shape == (20, 18, 16)
        np.testing.assert_allclose(label.affine, affine, atol=1e-5)
        assert label.get_data_dtype() == np.uint8
        assert len(np.unique(np.asarray(label.dataobj))) > 1


def test_one_file_to_one_file_and_one_job_alone(work_dir: Path, tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.nii.gz")
    outputs = [tmp_path / "deep" / f"{i}.nii.gz" for i in range(3)]
    assert predict_files(work_dir, image, outputs[0], device="cpu") == 0
    assert predict_files(work_dir, image, outputs[1], algo="segresnet", fold=1, device="cpu") == 0
    assert predict_files(work_dir, image, outputs[2], algo="segresnet", device="cpu") == 0
    both, one, mean = (np.asarray(nib.load(p).dataobj) for p in outputs)
    assert (both != one).any()
    np.testing.assert_array_equal(both, mean)


def test_bad_files_are_skipped_and_named(work_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = tmp_path / "images"
    write_image(images / "good.nii.gz")
    write_image(images / "two_channels.nii.gz", shape=(8, 8, 8, 2))
    write_image(images / "flat.nii.gz", shape=(8, 8))
    (images / "broken.nii.gz").write_bytes(b"nothing")
    whole = write_image(images / "cut.nii").read_bytes()
    (images / "cut.nii").write_bytes(whole[:2000])
    bad = np.full((8, 8, 8), np.nan, np.float32)
    nib.save(nib.Nifti1Image(bad, np.eye(4)), images / "nan.nii.gz")
    with caplog.at_level(logging.ERROR):
        assert predict_files(work_dir, images, tmp_path / "out", device="cpu") == 2
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["good.nii.gz"]
    text = caplog.text
    for name in ("broken.nii.gz", "cut.nii", "flat.nii.gz", "nan.nii.gz", "two_channels.nii.gz"):
        assert f"skipped: {images / name}" in text
    assert "two_channels.nii.gz with 2 channels. Expected 1" in text
    assert "5 of 6 images were skipped" in text


def test_channels_in_files_of_their_own(tmp_path: Path) -> None:
    root, images = tmp_path / "work", tmp_path / "images"
    make_job(root, "segresnet", 0, channels=[{"mode": "meanstd"}] * 2)
    for case in ("a", "b_0001"):
        for channel in range(2):
            write_image(images / f"{case}_{channel:04d}.nii.gz", seed=channel)
    write_image(images / "both.nii.gz", shape=(20, 18, 16, 2))
    write_image(images / "half_0000.nii.gz")
    assert predict_files(root, images, tmp_path / "out", algo="segresnet", device="cpu") == 2
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.nii.gz", "b_0001.nii.gz", "both.nii.gz"]
    one = images / "a_0000.nii.gz"
    assert predict_files(root, one, tmp_path / "one.nii.gz", algo="segresnet", device="cpu") == 0
    assert (tmp_path / "one.nii.gz").read_bytes() == (tmp_path / "out" / "a.nii.gz").read_bytes()


def test_what_cannot_be_done_is_said_before_any_work(work_dir: Path, tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.nii.gz")
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"--image: .*gone: no such file or folder"):
        predict_files(work_dir, tmp_path / "gone", out)
    with pytest.raises(ConfigError, match="empty holds no image files"):
        predict_files(work_dir, empty, out)
    with pytest.raises(ConfigError, match=r"a\.nii\.gz is a file, but --image"):
        predict_files(work_dir, tmp_path, image)
    with pytest.raises(ConfigError, match="would be overwritten"):
        predict_files(work_dir, image, image)
    with pytest.raises(ConfigError, match="would be overwritten"):
        predict_files(work_dir, image, tmp_path)
    with pytest.raises(ConfigError, match="cannot be made"):
        predict_files(work_dir, image, image / "below")
    with pytest.raises(WorkspaceError, match="no such work_dir"):
        predict_files(tmp_path / "none", image, out)
    with pytest.raises(WorkspaceError, match=r"no trained job of algorithm dints and fold 1\. Trained: segresnet_0"):
        predict_files(work_dir, image, out, algo="dints", fold=1)
    Workspace(work_dir).ensemble_spec.write_text('{"name": 3}')
    with pytest.raises(WorkspaceError, match=r"ensemble\.json: name: .* Delete the file and run `autoseg ensemble`"):
        predict_files(work_dir, image, out)
    Workspace(work_dir).ensemble_spec.unlink()
    with pytest.raises(WorkspaceError, match=r"no ensemble yet\. Run `autoseg ensemble`"):
        predict_files(work_dir, image, out)
    assert not out.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_that_is_not_writable(work_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir(mode=0o500)
    with pytest.raises(ConfigError, match="is not writable"):
        predict_files(work_dir, write_image(tmp_path / "a.nii.gz"), out)


def test_a_disk_that_is_full(work_dir: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("autoseg.inference.predictor.write_volume", full)
    assert predict_files(work_dir, write_image(tmp_path / "a.nii.gz"), tmp_path / "out", device="cpu") == 2
    assert "a.nii.gz: cannot be written (No space left on device)" in caplog.text


def test_processes_share_a_folder(work_dir: Path, tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for name in "abc":
        write_image(images / f"{name}.nii.gz")
    (out).mkdir()
    (out / "c.nii.gz").write_bytes(b"done before")
    other = Claim(out / ".claims" / "a", "a")
    other.__enter__()
    # The other process ends without having written its image.
    timer = threading.Timer(1.0, lambda: other.__exit__(None, None, None))
    timer.start()
    assert predict_files(work_dir, images, out, device="cpu", share=True) == 0
    timer.join()
    assert (out / "c.nii.gz").read_bytes() == b"done before"
    written = {p.name: p.stat().st_mtime_ns for p in out.glob("*.nii.gz")}
    assert set(written) == {"a.nii.gz", "b.nii.gz", "c.nii.gz"}
    assert written["b.nii.gz"] < written["a.nii.gz"]
    assert predict_files(work_dir, images, out, device="cpu", share=True) == 0
    assert written == {p.name: p.stat().st_mtime_ns for p in out.glob("*.nii.gz")}


# -- evaluate


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Predictions and labels of three cases; of one of them the prediction is missing."""
    rng = np.random.default_rng(0)
    grid = Grid(shape=(14, 12, 10), affine=AFFINES["flipped"])
    for name in ("a", "b", "c"):
        label = np.zeros(grid.to_ras().shape, np.uint8)
        label[3:9, 3:9, 2:7], label[9:12, 4:8, 3:6] = 1, 2
        write_volume(tmp_path / "labels" / f"{name}.nii.gz", label, grid)
        pred = np.where(rng.random(label.shape) < 0.1, 0, label).astype(np.uint8)
        if name != "c":
            write_volume(tmp_path / "preds" / f"{name}{'_seg' if name == 'b' else ''}.nii.gz", pred, grid)
    return tmp_path / "preds", tmp_path / "labels"


def test_scores_equal_the_independent_tool(folders: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    preds, labels = folders
    assert evaluate_folders(preds, labels, classes=("left", "right"), output=tmp_path / "scores.json") == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split() == [
        "class",
        "dice",
        "std",
        "95%",
        "low",
        "high",
        "nsd",
        "2",
        "mm",
        "std",
        "n",
    ]
    assert "No prediction, so Dice 0: c.nii.gz" in printed
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["classes"] == ["left", "right"]
    assert found["missing"] == ["c.nii.gz"]
    assert found["cases"]["c"] == {"dice": [0.0, 0.0], "nsd": [0.0, 0.0]}
    tool = Path(__file__).resolve().parents[2] / "shared" / "tools" / "score_dice.py"
    if not tool.exists():
        pytest.skip("the independent tool is not here")
    done = subprocess.run(
        [sys.executable, str(tool), str(preds), str(labels)], capture_output=True, text=True, check=True
    )
    wanted = json.loads(done.stdout)
    assert [round(c["mean"], 4) for c in found["dice"]["classes"]] == [wanted["by_class"]["1"], wanted["by_class"]["2"]]
    assert round(found["dice"]["mean"], 4) == wanted["mean"]
    assert wanted["missing"] == found["missing"]


def test_classes_that_occur_or_are_given_by_value(folders: tuple[Path, Path]) -> None:
    assert evaluate(*folders).classes == ("1", "2")
    found = evaluate(*folders, classes=("2",))
    assert found.classes == ("2",)
    assert found.dice["a"] == evaluate(*folders).dice["a"][1:]


def test_perfect_predictions(folders: tuple[Path, Path]) -> None:
    found = evaluate(folders[1], folders[1])
    assert all(row == [1.0, 1.0] for row in [*found.dice.values(), *found.nsd.values()])


def test_all_faults_of_the_folders_at_once(folders: tuple[Path, Path]) -> None:
    preds, labels = folders
    write_volume(preds / "a.nii.gz", np.zeros((14, 12, 11), np.uint8), Grid(shape=(14, 12, 11), affine=np.eye(4)))
    (preds / "sub").mkdir()
    (preds / "sub" / "b_seg.nii.gz").write_bytes((preds / "b_seg.nii.gz").read_bytes())
    (labels / "d.nii.gz").write_bytes(b"nothing")
    with pytest.raises(DataError) as caught:
        evaluate(preds, labels)
    text = str(caught.value)
    assert f"{preds / 'a.nii.gz'}: not on the grid of {labels / 'a.nii.gz'}" in text
    assert "b.nii.gz: " in text
    assert "may both be its prediction" in text
    assert f"{labels / 'd.nii.gz'}: not a readable NIfTI file" in text
    assert len(caught.value.messages) == 3


def test_folders_that_are_missing_or_empty(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"--predictions: .*gone is not a folder"):
        evaluate(tmp_path / "gone", folders[1])
    with pytest.raises(ConfigError, match=r"--labels: .*empty holds no label files"):
        evaluate(folders[0], tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"--predictions: .*empty holds no label files"):
        evaluate(tmp_path / "empty", folders[1])
    with pytest.raises(ConfigError, match=r"--output: .* cannot be written"):
        evaluate_folders(*folders, output=folders[0] / "a.nii.gz" / "x.json")
