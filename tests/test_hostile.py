"""What files of a stranger can make autoseg do: nothing outside the work_dir, and no wait for ever."""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_jobs import make_job

from autoseg.analyzer.store import Store
from autoseg.cli.main import run_command
from autoseg.data.formats.table import read_header, read_stored
from autoseg.data.grid import Grid
from autoseg.data.volumes import write_volume
from autoseg.ensemble.predict import load_predictor
from autoseg.errors import DataError, WorkspaceError
from autoseg.launch import start
from autoseg.pipeline.stages import STAGES
from autoseg.report.page import make_report
from autoseg.training.progress import Curve
from autoseg.workspace.digests import DigestStore
from autoseg.workspace.files import (
    append_text,
    check_inside,
    last_lines,
    log_to,
    open_append,
    open_new,
    open_regular,
    write_atomic,
)
from autoseg.workspace.stored import read_stored as read_state
from autoseg.workspace.usage import CommandLine, add_line
from autoseg.workspace.workspace import Workspace


@pytest.fixture
def copied(finished_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished_run, tmp_path / "run", copy_function=shutil.copy2)
    return tmp_path / "run"


# -- a work_dir with links


def log_a_line(path: Path) -> None:
    with log_to(path):
        logging.getLogger("autoseg").warning("a line")


def add_a_digest(path: Path) -> None:
    store = DigestStore()
    store.path = path
    store.add([((1, 2, 3, 4), "digest")])


GROWING: dict[str, Callable[[Path], object]] = {
    "run.log and train.log": log_a_line,
    "usage.jsonl and commands.jsonl": lambda path: add_line(path, CommandLine(time=1, command="x", version="1")),
    "metrics.jsonl": lambda path: Curve(path, is_written=True).add({"epoch": 1}),
    "digests.jsonl": add_a_digest,
    "cases.jsonl": lambda path: Store(path).add("k", (1,), ("d",), None),  # type: ignore[arg-type]
    "what a worker prints": lambda path: start(["true"], path, {}).wait(),
}


@pytest.mark.parametrize("leads", ["to a file", "nowhere yet", "from a pipe"])
@pytest.mark.parametrize("name", GROWING)
def test_a_growing_file_is_not_written_through_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, leads: str
) -> None:
    monkeypatch.setattr("autoseg.analyzer.store.to_plain", lambda stats: {})
    outside, path = tmp_path / "outside", tmp_path / "work_dir" / "file"
    path.parent.mkdir()
    if leads == "to a file":
        outside.write_text("mine")
    if leads == "from a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(outside)
    with pytest.raises((WorkspaceError, OSError)) as error:
        GROWING[name](path)
    assert str(path) in str(error.value)
    assert not outside.exists() or outside.read_text() == "mine"


def test_a_growing_file_grows(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    append_text(path, "ä\n")
    append_text(path, "b\n")
    assert path.read_text(encoding="utf-8") == "ä\nb\n"
    assert stat.S_IMODE(path.stat().st_mode) & 0o600 == 0o600
    append_text(path, "c\n", mode=0o600)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        open_append(tmp_path / "folder")


def test_a_whole_file_replaces_a_link(tmp_path: Path) -> None:
    outside, path = tmp_path / "outside", tmp_path / "file"
    outside.write_text("mine")
    path.symlink_to(outside)
    write_atomic(path, lambda file: file.write(b"new"))
    assert (outside.read_text(), path.read_text(), path.is_symlink()) == ("mine", "new", False)
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        open_new(path)


def test_a_label_file_does_not_go_through_a_link_of_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Known:
        hex = "0" * 32

    monkeypatch.setattr("autoseg.workspace.files.uuid.uuid4", Known)
    outside, path = tmp_path / "outside", tmp_path / "labels.nii.gz"
    (tmp_path / f".part-{'0' * 12}-labels.nii.gz").symlink_to(outside)
    grid = Grid(shape=(2, 2, 2), affine=np.eye(4))
    with pytest.raises(FileExistsError):
        write_volume(path, np.zeros((2, 2, 2), np.uint8), grid)
    assert not outside.exists()


@pytest.mark.parametrize("name", ["cache", "state", "segresnet_0/models", "analysis", "run.log", "round_1"])
def test_a_run_refuses_a_work_dir_whose_links_lead_out(
    copied: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    outside, place = copied / "outside", copied / "work_dir" / name
    if place.exists():
        place.rename(outside)
    else:
        outside.mkdir()
    place.symlink_to(outside)
    before = sorted(outside.rglob("*")) if outside.is_dir() else outside.read_bytes()
    assert run_command(["run", "--input", str(copied / "input.yaml")]) == 2
    shown = capsys.readouterr().err
    assert f"{place}: a link that leads out of the work_dir, to {outside}. Nothing is read or written outside" in shown
    assert (sorted(outside.rglob("*")) if outside.is_dir() else outside.read_bytes()) == before


def test_links_inside_the_work_dir_and_one_to_it_are_let_be(copied: Path, tmp_path: Path) -> None:
    work_dir = copied / "work_dir"
    (work_dir / "shortcut").symlink_to("segresnet_0")
    (tmp_path / "elsewhere").symlink_to(work_dir)
    check_inside(work_dir)
    check_inside(tmp_path / "elsewhere")
    os.mkfifo(work_dir / "cache" / "pipe")
    with pytest.raises(WorkspaceError, match="pipe: a pipe, a device or a socket"):
        check_inside(work_dir)


@pytest.mark.parametrize("algo", ["{outside}/segresnet", "../outside/segresnet", "sub/segresnet"])
def test_ensemble_members_lie_in_the_work_dir(copied: Path, algo: str) -> None:
    work_dir, outside = copied / "work_dir", copied / "outside"
    make_job(outside, "segresnet", 0)
    make_job(work_dir / "sub", "segresnet", 0)
    path = work_dir / "ensemble" / "ensemble.json"
    spec = json.loads(path.read_text())
    spec["members"] = [[algo.format(outside=outside), 0]]
    path.write_text(json.dumps(spec))
    with pytest.raises(WorkspaceError, match=r"would lie outside it\. Expected a folder of a job in it"):
        load_predictor(Workspace(work_dir))


@pytest.mark.parametrize("name", ["segresnet_0", "segresnet_0/models", "segresnet_0/models/model.pt"])
def test_weights_are_not_read_through_a_link_that_leads_out(copied: Path, name: str) -> None:
    place, outside = copied / "work_dir" / name, copied / "outside"
    place.rename(outside)
    place.symlink_to(outside)
    with pytest.raises(WorkspaceError, match=r"outside"):
        load_predictor(Workspace(copied / "work_dir"), algo="segresnet", fold=0)


def test_the_report_shows_no_file_that_input_yaml_links_to(copied: Path) -> None:
    secret, place = copied / "secret", copied / "work_dir" / "input.yaml"
    secret.write_text("-----BEGIN PRIVATE KEY-----")
    place.unlink()
    place.symlink_to(secret)
    text = make_report(copied / "work_dir", STAGES).read_text()
    assert "PRIVATE KEY" not in text
    assert f"{place}: cannot be read (is a link)" in text


# -- what is no file


def test_a_pipe_or_a_device_is_no_image(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.nii.gz"
    os.mkfifo(pipe)
    device = tmp_path / "device.nii.gz"
    device.symlink_to("/dev/zero")
    for path, what in ((pipe, "a pipe"), (device, "a device")):
        for read in (read_header, read_stored):
            with pytest.raises(DataError, match=f"{path}: is {what}, not a file. Give the path of an image file."):
                read(path)
        with pytest.raises(OSError, match=what):
            DigestStore().digest(path)
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)


def test_a_pipe_is_no_state(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    os.mkfifo(path)
    with pytest.raises(WorkspaceError, match=f"{path}: cannot be read \\(is a pipe, not a file\\)"):
        read_state(path, dict)
    assert last_lines(path, 3) == ["cannot be read: is a pipe, not a file"]


# -- text that becomes a part of a file


@pytest.mark.parametrize("end", ["\n", "\r", "\u2028", "\x85", "\x1b[2J"])
def test_text_ends_no_comment_and_no_line_of_a_bundle(tmp_path: Path, end: str) -> None:
    from tiny_jobs import tiny_plan

    from autoseg.export.bundle import write_bundle
    from autoseg.plan import Origin, read_plan

    name = f"liver{end}learning_rate: 7{end}<script>"
    plan = tiny_plan(classes=[{"name": name, "values": [1]}])
    job = Workspace(tmp_path).job_dir("segresnet", 0)
    data = plan.model_dump(mode="json")
    origin = Origin(value=None, origin=f"input{end}learning_rate: 8", rule=f"for {name}")
    write_bundle(plan, dict.fromkeys(data, origin), data, job)
    assert read_plan(job) == plan
    text = job.plan.read_bytes().decode()
    assert text.isprintable() or set(filter(lambda c: not c.isprintable(), text)) == {"\n"}
    readme = (job.root / "docs" / "README.md").read_bytes().decode()
    assert [c for c in readme if not c.isprintable() and c != "\n"] == []
    assert len(readme.splitlines()) == 10
