"""A case is what its files hold: copied or touched, nothing is redone; a changed voxel redoes what depends on it."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from autoseg.cli.main import run_command
from autoseg.data.datalists.cases import Case, case_digest
from autoseg.data.volumes import read_image, read_label, write_volume
from autoseg.workspace import digests
from autoseg.workspace.digests import DigestStore, content_digest
from autoseg.workspace.workspace import Workspace

PRODUCTS = (
    "*_*/models/model.pt",
    "*_*/job.json",
    "ensemble/records/*",
    "ensemble/predictions/*",
    "cache/*/*/image.npy",
)


@pytest.fixture
def copied(finished_run: Path, tmp_path: Path) -> Path:
    """The finished run, data and all, in another place, with new inodes and times, as `cp -r` leaves it."""
    folder = tmp_path / "elsewhere"
    shutil.copytree(finished_run, folder, copy_function=shutil.copyfile)
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path)
    return folder


def products(work_dir: Path) -> dict[str, tuple[int, int]]:
    """What a run has made, with inode and time of each file."""
    files = [path for pattern in PRODUCTS for path in work_dir.glob(pattern)]
    return {str(p.relative_to(work_dir)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}


def change_voxel(path: Path) -> None:
    """Give one voxel the value of another."""
    volume = read_label(path) if path.parent.name == "labels" else read_image([path])
    array = volume.array.copy()
    array[0, 0, 0, 0] = array.max()
    write_volume(path, array[0], volume.grid)


def test_a_copied_run_has_nothing_to_do(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = products(copied / "work_dir")
    with caplog.at_level(logging.INFO, "autoseg"):
        assert run_command(["run", "--input", str(copied / "input.yaml")]) == 0
    assert products(copied / "work_dir") == before
    assert "copied, moved or touched; nothing in them changed, so nothing is redone for them" in caplog.text
    assert "analyze: up to date" in caplog.text
    assert "again, because" not in caplog.text


def test_data_mounted_elsewhere_are_the_same(copied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("images", "labels"):
        shutil.move(copied / name, tmp_path / "mounted" / name)
    before = products(copied / "work_dir")
    words = ["run", "--input", str(copied / "input.yaml"), "--dataroot", str(tmp_path / "mounted")]
    with caplog.at_level(logging.INFO, "autoseg"):
        assert run_command(words) == 0
    assert products(copied / "work_dir") == before
    assert "again, because" not in caplog.text


def test_a_changed_testing_image_is_predicted_again_and_nothing_else(copied: Path) -> None:
    workspace = Workspace(copied / "work_dir")
    listed = json.loads(workspace.datalist.read_text())
    image = copied / listed["testing"][0]["image"]
    before = products(workspace.root)
    change_voxel(image)
    assert run_command(["run", "--input", str(copied / "input.yaml")]) == 0
    after = products(workspace.root)
    changed = {name for name in before if after[name] != before[name]}
    assert {*after} == {*before}
    name = image.name.removesuffix(".nii.gz")
    predictions = {f"ensemble/predictions/{image.name}", "ensemble/predictions/quality.csv"}
    assert changed == {*predictions, f"ensemble/records/{name}.json"}


def test_a_changed_label_changes_its_case_alone(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    workspace = Workspace(copied / "work_dir")
    listed = json.loads(workspace.datalist.read_text())
    item = listed["training"][0]
    before = {p.parent for p in workspace.cache.glob("*/*/points.npy")}
    assert len(before) == 8
    change_voxel(copied / item["label"])
    with caplog.at_level(logging.INFO, "autoseg"):
        assert run_command(["analyze", "--input", str(copied / "input.yaml")]) == 0
        assert "1 read" in caplog.text or "analyze: again, because case" in caplog.text
        assert run_command(["train", "--input", str(copied / "input.yaml"), "--algo", "segresnet", "--fold", "0"]) == 0
    after = {p.parent for p in workspace.cache.glob("*/*/points.npy")}
    assert len(after) == 8, "the old entry of the case is removed"
    assert len(after & before) == 7
    assert "cache: 1 entries removed" in caplog.text
    role = "validation" if item["fold"] == 0 else "training"
    name = Path(item["image"]).name.removesuffix(".nii.gz")
    assert f"because {role} case {name} changed" in caplog.text


def test_a_case_is_its_content_and_what_each_file_is_for(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path in paths:
        path.write_bytes(path.name.encode())
    case = Case(name="x", images=(paths[0],), label=paths[1])
    copy = tmp_path / "other"
    shutil.copyfile(paths[1], copy)
    assert case_digest(case) == case_digest(Case(name="y", images=(paths[0],), label=copy))
    others = [
        Case(name="x", images=(paths[1],), label=paths[0]),
        Case(name="x", images=(paths[0],)),
        Case(name="x", images=(paths[0],), label=paths[1], weight=paths[2]),
    ]
    assert len({case_digest(c) for c in (case, *others)}) == 4


def _add_many(store_path: Path, folder: Path) -> None:
    store = DigestStore()
    store.open(store_path)
    for path in sorted(folder.iterdir()):
        store.digest(path)


def test_processes_share_a_store_and_damaged_lines_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED_S", -1.0)  # files of a test are always young
    folder, path = tmp_path / "files", tmp_path / "state" / "digests.jsonl"
    folder.mkdir()
    for i in range(50):
        (folder / f"{i}").write_bytes(np.random.default_rng(i).bytes(100))
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_add_many, args=(path, folder)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    with open(path, "a") as file:
        file.write('[1, 2, "cut sh\n{}\n[1]\n[null, 0, 0, 0, "x"]\n')
    store = DigestStore()
    store.open(path)
    monkeypatch.setattr(digests, "Hasher", None)  # nothing is to be read
    for file in folder.iterdir():
        assert len(store.digest(file)) == 32
    assert len(store.known) == 50


def test_a_changed_file_is_read_again_though_its_times_are_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED_S", -1.0)
    path = tmp_path / "a"
    path.write_bytes(b"one")
    first, times = content_digest(path), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    path.write_bytes(b"two")
    os.utime(path, ns=times)
    assert content_digest(path) != first


def test_a_store_that_cannot_be_written_costs_time_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "SETTLED_S", -1.0)
    (tmp_path / "state").write_text("a file where a folder should be")
    store = DigestStore()
    store.open(tmp_path / "state" / "digests.jsonl")
    assert store.digest(tmp_path / "state") == content_digest(tmp_path / "state")
