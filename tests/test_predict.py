"""New images and scores of folders, as the commands `predict` and `evaluate` do them."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from processes import wait_for
from tiny_jobs import make_job, tiny_plan

from autoseg.cli.main import run_command
from autoseg.data import streams
from autoseg.data.grid import Grid
from autoseg.data.streams import MemoryImage
from autoseg.data.volumes import volume_of, write_volume
from autoseg.ensemble.predict import load_predictor, predict_files
from autoseg.errors import ConfigError, DataError, WorkspaceError
from autoseg.evaluation.folders import evaluate, evaluate_folders
from autoseg.inference.checks import check_image
from autoseg.inference.cost import Limits
from autoseg.inference.ensemble_spec import EnsembleSpec
from autoseg.plan import FramePlan
from autoseg.workspace.claims import Claim
from autoseg.workspace.files import write_json, write_yaml
from autoseg.workspace.workspace import Workspace

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
    assert "5 of 6 images skipped" in text


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
    with pytest.raises(WorkspaceError, match=r"ensemble\.json: name: .* or delete the file and run `autoseg ensemble`"):
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

    def end() -> None:
        """The other process ends without having written its image, once all others are there."""
        wait_for((out / "b.nii.gz").exists)
        other.__exit__(None, None, None)

    thread = threading.Thread(target=end)
    thread.start()
    assert predict_files(work_dir, images, out, device="cpu", share=True) == 0
    thread.join()
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
    header = " ".join(printed.splitlines()[0].split())
    assert header.startswith("class dice std 95% low high nsd 2 mm std hd95")
    assert header.endswith(" n")
    assert "No prediction, scored as an empty one: c.nii.gz" in printed
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["classes"] == ["left", "right"]
    assert found["missing"] == ["c.nii.gz"]
    assert found["cases"]["c"]["dice"] == found["cases"]["c"]["nsd"] == [0.0, 0.0]
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
    assert found.scores["dice"]["a"] == evaluate(*folders).scores["dice"]["a"][1:]


def test_perfect_predictions(folders: tuple[Path, Path]) -> None:
    found = evaluate(folders[1], folders[1])
    assert all(row == [1.0, 1.0] for row in [*found.scores["dice"].values(), *found.scores["nsd"].values()])


def test_a_prediction_a_share_of_a_voxel_off_and_stored_flipped_is_scored_in_place(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    for path in sorted(folders[1].iterdir()):
        label = nib.load(path)
        turned = label.as_reoriented([[2, -1], [0, 1], [1, -1]])
        affine = turned.affine.copy()
        affine[:3, 3] += 0.02
        (tmp_path / "turned").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(np.asarray(turned.dataobj), affine), tmp_path / "turned" / path.name)
    found = evaluate(tmp_path / "turned", folders[1])
    assert all(row == [1.0, 1.0] for row in [*found.scores["dice"].values(), *found.scores["nsd"].values()])


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
    assert "may both belong to it" in text
    assert f"{labels / 'd.nii.gz'}: 7 bytes are too few for a NIfTI header" in text
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


# -- serving: lists, timing, budgets, options


def test_a_list_of_images(work_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_image(tmp_path / "images" / "a.nii.gz")
    write_image(tmp_path / "b.nii")
    listed = tmp_path / "list.txt"
    listed.write_text(f"# two and one that is gone\nimages/a.nii.gz\ngone.nii.gz\n\n{tmp_path / 'b.nii'}\n")
    assert predict_files(work_dir, listed, tmp_path / "out", device="cpu") == 2
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.nii.gz", "b.nii.gz"]
    assert f"skipped: {tmp_path / 'gone.nii.gz'}: no such file" in caplog.text
    listed.write_text("images\\a.nii.gz\n")
    with pytest.raises(ConfigError, match=r"names images\\a\.nii\.gz, which is not there\. .*write slashes"):
        predict_files(work_dir, listed, tmp_path / "out", device="cpu")
    listed.write_text("# nothing\n")
    with pytest.raises(ConfigError, match=r"list\.txt names no image"):
        predict_files(work_dir, listed, tmp_path / "out", device="cpu")
    with pytest.raises(ConfigError, match="is a list. Give a folder"):
        predict_files(work_dir, listed, tmp_path / "one.nii.gz", device="cpu")


def test_timing(work_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        write_image(tmp_path / "images" / f"{name}.nii.gz")
    (tmp_path / "images" / "bad.nii.gz").write_bytes(b"nothing")
    assert predict_files(work_dir, tmp_path / "images", tmp_path / "out", device="cpu", timing=True) == 2
    found = json.loads((tmp_path / "out" / "timing.json").read_text())
    phases = ["load", "pre", "infer", "invert", "post", "write"]
    assert [row["case"] for row in found["cases"]] == ["a", "b"]
    assert found["failed"] == 1
    for row in found["cases"]:
        known = sum(row[phase] for phase in phases)
        assert known <= row["total"] + 1e-3
        assert all(row[phase] > 0 for phase in ("load", "pre", "infer", "invert", "write"))
        assert row["ram_gb"] > 0.05
    for phase in [*phases, "total"]:
        assert found["sum"][phase] == pytest.approx(sum(row[phase] for row in found["cases"]), abs=1e-3)
    assert found["total"] >= found["load_models"] + found["sum"]["total"] - 1e-3
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["seconds", *phases, "total", "GB"]
    assert [line.split()[0] for line in printed[2:5]] == ["a", "b", "all"]
    assert printed[5].startswith("models loaded in")
    one = tmp_path / "one.nii.gz"
    assert predict_files(work_dir, tmp_path / "images" / "a.nii.gz", one, device="cpu", timing=True) == 0
    assert (tmp_path / "one.timing.json").exists()


def test_a_budget_is_told_before_and_what_it_took_after(
    work_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = write_image(tmp_path / "a.nii.gz", shape=(40, 36, 50))
    plain, limited = tmp_path / "plain.nii.gz", tmp_path / "out"
    assert predict_files(work_dir, image, plain, device="cpu") == 0
    with caplog.at_level(logging.INFO):
        limits = Limits(device_bytes=8 * 10**9, seconds=1000.0)
        assert predict_files(work_dir, image, limited, device="cpu", limits=limits, timing=True) == 0
    assert (limited / "a.nii.gz").read_bytes() == plain.read_bytes()
    assert "--max_memory on a CPU is that of the process" in caplog.text
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("a: ")]
    assert lines[0].startswith("a: expected ")
    assert lines[1].startswith("a: it took ")
    (row,) = json.loads((limited / "timing.json").read_text())["cases"]
    assert row["expected"]["given_up"] == []
    assert row["expected"]["ram_gb"] > 0.9 * row["ram_gb"]  # never much less than what it takes
    with caplog.at_level(logging.INFO):
        tight = Limits(seconds=1e-6)
        assert predict_files(work_dir, image, tmp_path / "quick.nii.gz", device="cpu", limits=tight) == 0
    assert "given up: overlap 0, 1 of 2 models" in caplog.text
    assert predict_files(work_dir, image, tmp_path / "no.nii.gz", device="cpu", limits=Limits(ram_bytes=10**6)) == 2
    assert not (tmp_path / "no.nii.gz").exists()
    assert "GB more than --max_memory and --max_ram allow" in caplog.text


def test_settings_of_the_run_and_flags_over_them(work_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    workspace = Workspace(work_dir)
    inference = {"overlap": 0.5, "min_voxels": {"sphere": 7}, "anywhere": ["box"]}
    write_yaml(workspace.settings, {"inference": {"value": inference, "origin": "input.yaml:3"}})
    predictor = load_predictor(workspace, device="cpu")
    assert predictor.options.overlap == 0.5
    assert predictor.rules == ()  # the ensemble's file has none
    alone = load_predictor(workspace, algo="segresnet", device="cpu")
    assert [(rule.name, rule.min_voxels) for rule in alone.rules] == [("sphere", 7)]
    with caplog.at_level(logging.INFO):
        fast = load_predictor(workspace, device="cpu", inference={"fast": True, "skip_empty": False})
    assert "no locator is trained" in caplog.text
    assert (fast.options.overlap, fast.options.crop_to_first, fast.options.skip_empty) == (0.5, True, False)
    with pytest.raises(ConfigError, match="no locator is trained"):
        load_predictor(workspace, device="cpu", inference={"locate": True})
    make_job(work_dir, "locator", 0, classes=[{"name": "region", "values": [1, 2]}])
    fast = load_predictor(workspace, device="cpu", inference={"fast": True})
    assert fast.locator is not None
    assert fast.options.locate
    assert [model.name for model in load_predictor(workspace, algo="segresnet", device="cpu").models] == [
        "segresnet_0",
        "segresnet_1",
    ]
    write_yaml(workspace.settings, {"inference": {"value": {"overlap": 3}, "origin": ""}})
    with pytest.raises(WorkspaceError, match=r"inference: overlap: .* or run `autoseg ensemble` again"):
        load_predictor(workspace, device="cpu")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_memory", "4"], "--max_memory: expected an amount of memory with its unit, such as 500MB, 4GB"),
        (["--max_time", "15"], "--max_time: expected a time with its unit"),
        (["--overlap", "1.5"], "--overlap: expected a number from 0 to below 1, found 1.5"),
    ],
)
def test_flags_that_make_no_sense(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["predict", "--image", "a.nii.gz", "--output", "out", *words]) == 2
    assert message in capsys.readouterr().err


# -- bad input


def test_odd_but_good_volumes(work_dir: Path, tmp_path: Path) -> None:
    shapes = {
        "one_slice": (30, 28, 1),
        "two": (30, 28, 2),
        "three": (3, 30, 28),
        "small": (5, 40, 40),
        "tiny": (4, 4, 4),
        "uneven": (6, 5, 4),
        "thick": (30, 28, 3),
        "long": (8, 8, 200),
    }
    for name, shape in shapes.items():
        affine = np.diag([0.7, 0.7, 10.0, 1.0]) if name == "thick" else None
        write_image(tmp_path / "images" / f"{name}.nii.gz", affine, shape=shape)
    assert predict_files(work_dir, tmp_path / "images", tmp_path / "out", device="cpu") == 0
    for name, shape in shapes.items():
        label, image = nib.load(tmp_path / "out" / f"{name}.nii.gz"), nib.load(tmp_path / "images" / f"{name}.nii.gz")
        assert label.shape == shape
        np.testing.assert_array_equal(label.affine, image.affine)


SPACINGS = {
    "metres": (
        np.diag([0.001, 0.001, 0.0015, 1]),
        "so the image is 0.02x0.018x0.024 mm, less than what the models can tell",
    ),
    "huge": (np.diag([1000.0, 1000.0, 1500.0, 1]), "so the image is 24 m long"),
}


@pytest.mark.parametrize("name", SPACINGS)
@pytest.mark.parametrize("streamed", [False, True])
def test_absurd_spacing(work_dir, tmp_path, caplog, monkeypatch, name: str, streamed: bool) -> None:
    if streamed:
        monkeypatch.setattr(streams, "STREAM_VOXELS", 10)
    image = write_image(tmp_path / "a.nii.gz", SPACINGS[name][0])
    assert predict_files(work_dir, image, tmp_path / "out", device="cpu") == 2
    assert f"skipped: {image}: voxels of" in caplog.text
    assert SPACINGS[name][1] in caplog.text
    assert "Correct the spacing in the file's header" in caplog.text
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("streamed", [False, True])
def test_an_image_of_one_value(work_dir, tmp_path, caplog, monkeypatch, streamed: bool) -> None:
    if streamed:
        monkeypatch.setattr(streams, "STREAM_VOXELS", 10)
    path = tmp_path / "flat.nii.gz"
    values = np.full((20, 18, 60), 7, np.float32)
    nib.save(nib.Nifti1Image(values, np.eye(4)), path)
    assert predict_files(work_dir, path, tmp_path / "out", device="cpu") == 2
    assert f"skipped: {path}: every voxel has the value 7. Expected an image of something" in caplog.text
    values[3, 3, 31] = 8  # in a row that a sample misses
    nib.save(nib.Nifti1Image(values, np.eye(4)), path)
    assert predict_files(work_dir, path, tmp_path / "out", device="cpu") == 0


@pytest.mark.parametrize("streamed", [False, True])
def test_what_is_doubtful_in_an_image_is_told(work_dir, tmp_path, caplog, monkeypatch, streamed: bool) -> None:
    """As the analysis tells of training images: two affines that differ, and stray voxels."""
    if streamed:
        monkeypatch.setattr(streams, "STREAM_VOXELS", 10)
    path = write_image(tmp_path / "a.nii.gz", np.diag([1.0, 1, 1, 1]), shape=(20, 18, 60))
    assert predict_files(work_dir, path, tmp_path / "out", device="cpu") == 0
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    image = nib.load(path)
    values = np.asarray(image.dataobj).copy()
    values[3, 3, 31] = 3e38
    odd = nib.Nifti1Image(values, image.affine)
    odd.set_sform(np.eye(4), 1)
    odd.set_qform(np.array([[1, 0, 0, 30], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), 1)
    nib.save(odd, path)
    assert predict_files(work_dir, path, tmp_path / "out", device="cpu") == 0
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(told) == 2
    assert told[0] == (
        f"{path}: sform (its affine) and qform put corners 30 mm (30 voxels) apart. The affine is used. Export it "
        "again if that is wrong."
    )
    assert told[1].startswith(f"{path}: a few voxels lie far outside of -2.")


def test_an_image_without_voxels(work_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "none.nii"
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 0), np.float32), np.eye(4)), path)
    assert predict_files(work_dir, path, tmp_path / "out", device="cpu") == 2
    assert f"skipped: {path}: " in caplog.text
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("ranges", [None, [(-1000, 300)]])
@pytest.mark.parametrize("offset", [-3000.0, 5000.0])
def test_no_ct_for_ct_models(tmp_path: Path, caplog, offset: float, ranges) -> None:
    """It is segmented all the same, with a warning; a plan of an older version judges by its bounds."""
    root = tmp_path / "ct"
    ct = {"mode": "ct", "bounds": (-100, 300), "mean": 60, "std": 50}
    make_job(root, "segresnet", 0, channels=[ct], image_ranges=ranges)
    how = {"algo": "segresnet", "device": "cpu"}
    assert predict_files(root, write_image(tmp_path / "good.nii.gz"), tmp_path / "out", **how) == 0
    assert "do not trust the labels" not in caplog.text
    image = tmp_path / "mri.nii.gz"
    values = np.random.default_rng(0).normal(offset, 100, (20, 18, 16)).astype(np.float32)
    nib.save(nib.Nifti1Image(values, np.eye(4)), image)
    assert predict_files(root, image, tmp_path / "out", **how) == 0
    span = "-1000 to 300" if ranges else "-100 to 300"
    assert f"100% of the voxels outside of {span}, where the training images lie" in caplog.text
    assert "Expected intensities like theirs (of a CT: Hounsfield units)" in caplog.text
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["good.nii.gz", "mri.nii.gz"]


def test_a_training_image_with_small_bright_targets_is_predicted(tmp_path, caplog) -> None:
    """None of its body lies within the foreground's bounds; values at the very ends of the range are in it."""
    bounds = {"mode": "ct", "bounds": (1889, 2593), "mean": 2300, "std": 100}
    make_job(tmp_path / "ct", "segresnet", 0, channels=[bounds], image_ranges=[(-1000, 2593)])
    values = np.full((20, 18, 16), -1000, np.int16)
    values[4:16, 4:14, 4:12] = np.random.default_rng(0).normal(40, 30, (12, 10, 8))
    values[9, 9, 9] = 2300
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "markers.nii.gz")
    how = {"algo": "segresnet", "device": "cpu"}
    assert predict_files(tmp_path / "ct", tmp_path / "markers.nii.gz", tmp_path / "out", **how) == 0
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("mode", ["mri", "pet"])
def test_a_ct_for_other_models(tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str) -> None:
    root = tmp_path / "work"
    make_job(root, "segresnet", 0, channels=[{"mode": mode}])
    values = np.random.default_rng(0).normal(0, 300, (20, 18, 16)).astype(np.float32)
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "mri.nii.gz")  # of negative values, too, yet no air
    values[:, :, :6] = np.random.default_rng(1).normal(-1000, 10, (20, 18, 6))
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "ct.nii.gz")
    how = {"algo": "segresnet", "device": "cpu"}
    assert predict_files(root, tmp_path / "mri.nii.gz", tmp_path / "out", **how) == 0
    assert "as air does" not in caplog.text
    assert predict_files(root, tmp_path / "ct.nii.gz", tmp_path / "out", **how) == 0
    assert f"as air does in a CT. Expected {'an MRI' if mode == 'mri' else 'a PET'}, as the training" in caplog.text


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_disk_that_fills_up_while_a_large_label_is_written(
    work_dir, tmp_path, monkeypatch, caplog, call: str
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(streams, "STREAM_VOXELS", 10)
    if call == "write":
        monkeypatch.setattr(streams.LabelRows, "write", full)
    else:
        monkeypatch.setattr("autoseg.workspace.files.os.fsync", full)
    image, out = write_image(tmp_path / "a.nii.gz"), tmp_path / "out"
    assert predict_files(work_dir, image, out, device="cpu") == 2
    assert f"skipped: {out / 'a.nii.gz'}: cannot be written (No space left on device)" in caplog.text
    assert [*out.iterdir()] == []


def test_a_streamed_image_is_cleaned_and_split_as_one_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "work"
    named = [{"name": "kidney_left", "values": [4]}, {"name": "kidney_right", "values": [2]}]
    make_job(root, "segresnet", 0, classes=[{"name": "kidney", "values": [4, 2]}], user_classes=named)
    inference = {"min_voxels": {"kidney_left": 5}, "slice_run": ["kidney_right"]}
    write_yaml(Workspace(root).settings, {"inference": {"value": inference, "origin": ""}})
    labels = []
    for i, affine in enumerate(AFFINES.values()):
        image = write_image(tmp_path / f"{i}.nii.gz", affine, shape=(26, 30, 34))
        for name, streamed in (("memory", 1 << 26), ("streamed", 10)):
            monkeypatch.setattr(streams, "STREAM_VOXELS", streamed)
            target = tmp_path / name / f"{i}.nii.gz"
            assert predict_files(root, image, target, algo="segresnet", device="cpu") == 0
            labels.append(np.asarray(nib.load(target).dataobj))
        assert set(np.unique(labels[-1])) == {0, 2, 4}
        assert (labels[-1] != labels[-2]).mean() < 2e-3  # rows of another axis, so other windows' sums


def test_a_long_prediction_shows_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("autoseg.terminal.LOG_EVERY_S", -1.0)
    monkeypatch.setattr("autoseg.inference.windows.CPU_BATCH_VOXELS", 1)
    for fold in (0, 1):
        make_job(tmp_path / "work", "segresnet", fold, overlap=0.5)
    for name in ("a", "b"):
        write_image(tmp_path / "images" / f"{name}.nii.gz", shape=(60, 50, 40))
    with caplog.at_level("INFO", "autoseg"):
        predict_files(tmp_path / "work", tmp_path / "images", tmp_path / "out", algo="segresnet", device="cpu")
    lines = [re.match(r"predict: (\d+) %, image (\d) of 2, ", r.message) for r in caplog.records]
    seen = [(int(line[1]), int(line[2])) for line in lines if line]
    shares = [share for share, _ in seen]
    assert shares == sorted(shares)
    assert shares[-1] == 100
    assert len(set(shares)) > 8
    assert max(share for share, number in seen if number == 1) == 50  # half of both
    assert min(share for share, number in seen if number == 2) > 50


def test_an_image_far_coarser_than_the_models_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = tiny_plan()
    volume = volume_of(np.random.default_rng(0).normal(size=(8, 8, 8)).astype(np.float32), np.diag([50, 50, 50, 1.0]))
    check_image("a.nii.gz", MemoryImage(volume), plan)
    assert caplog.messages == [
        "a.nii.gz: voxels of 50x50x50 mm, each of which becomes 54253 of the models' (1.2x1.2x1.6 mm), so it takes "
        "long and its labels are no finer than its voxels. Is the spacing in mm?"
    ]
    caplog.clear()
    volume = volume_of(np.random.default_rng(0).normal(size=(8, 8, 8)).astype(np.float32), np.diag([1, 1, 10, 1.0]))
    check_image("a.nii.gz", MemoryImage(volume), plan)
    assert caplog.messages == []


def test_coarse_is_meant_along_the_axes_of_the_models(caplog: pytest.LogCaptureFixture) -> None:
    frame = FramePlan(axes=((0, 0, 1), (1, 0, 0), (0, 1, 0)), slices=0)  # the models' X is the image's Z
    plan = tiny_plan().model_copy(update={"resample_resolution": (8.0, 1.0, 1.0), "frame": frame})
    noise = np.random.default_rng(0).normal(size=(8, 8, 8)).astype(np.float32)
    check_image("a.nii.gz", MemoryImage(volume_of(noise, np.diag([4, 30, 30, 1.0]))), plan)
    assert caplog.messages == []  # 450 of the models' voxels each; 900 with the axes taken for each other
    check_image("a.nii.gz", MemoryImage(volume_of(noise, np.diag([4, 40, 40, 1.0]))), plan)
    assert "each of which becomes 800 of the models' (1x1x8 mm)" in caplog.messages[0]
