"""What files of a stranger can make autoseg do: nothing outside the work_dir, and no wait for ever."""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import json
import logging
import os
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import wait_for
from pydantic import JsonValue
from tiny_jobs import make_job, tiny_plan

from autoseg.analyzer.store import Store
from autoseg.cli.main import run_command
from autoseg.config.load import read_settings_file
from autoseg.config.reader import read_model, read_plain
from autoseg.config.settings import Settings
from autoseg.data.datalists.listreader import build_datalist
from autoseg.data.formats.content import Content
from autoseg.data.formats.table import read_header, read_stored_volume
from autoseg.data.grid import Grid
from autoseg.data.phantoms import make_phantoms
from autoseg.data.volumes import write_volume
from autoseg.ensemble.predict import load_predictor
from autoseg.errors import ConfigError, DataError, WorkspaceError
from autoseg.export.bundle import write_bundle
from autoseg.launch import start
from autoseg.pipeline.stages import STAGES
from autoseg.plan import Origin, read_plan
from autoseg.report.page import make_report
from autoseg.report.serve import make_server
from autoseg.terminal import paint, show
from autoseg.training.progress import Curve
from autoseg.workspace.digests import DigestStore
from autoseg.workspace.files import (
    append_text,
    check_inside,
    last_lines,
    log_to,
    open_append,
    open_half,
    open_new,
    open_regular,
    write_atomic,
)
from autoseg.workspace.stored import read_stored
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
    half, file = open_half(path)
    file.close()
    half.unlink()
    half.symlink_to(outside)
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


def test_a_link_that_goes_while_it_is_looked_at_is_none(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = copied / "work_dir" / "brief"
    link.symlink_to("/")
    real = os.path.realpath

    def gone(path: str | Path, **more: bool) -> str:
        if Path(path) == link:
            raise FileNotFoundError
        return real(path, **more)

    with pytest.raises(WorkspaceError, match="brief: a link that leads out"):
        check_inside(copied / "work_dir")
    monkeypatch.setattr("os.path.realpath", gone)
    assert check_inside(copied / "work_dir") == []


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
        for read in (read_header, read_stored_volume):
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
        read_stored(path, dict)
    assert last_lines(path, 3) == ["cannot be read: is a pipe, not a file"]


# -- text that becomes a part of a file


@pytest.mark.parametrize("end", ["\n", "\r", "\u2028", "\x85", "\x1b[2J"])
def test_text_ends_no_comment_and_no_line_of_a_bundle(tmp_path: Path, end: str) -> None:
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
    usual = Workspace(tmp_path / "usual").job_dir("segresnet", 0)
    write_bundle(tiny_plan(classes=[{"name": "liver", "values": [1]}]), dict.fromkeys(data, origin), data, usual)
    assert len(readme.splitlines()) == len((usual.root / "docs" / "README.md").read_text().splitlines())


# -- files that ask for too much


def bomb(levels: int = 9) -> str:
    """A few lines that stand for 9**levels values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    return "\n".join([*lines, *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels))]) + "\n"


def read_with_settings(path: Path) -> object:
    return read_model(path, Settings)


@pytest.mark.parametrize("read", [read_plain, read_settings_file, read_with_settings])
def test_aliases_of_aliases_are_refused(tmp_path: Path, read: Callable[[Path], object]) -> None:
    path = tmp_path / "input.yaml"
    path.write_text(bomb())
    with pytest.raises(ConfigError, match=f"{path}:6: \\*a4 and the aliases before it repeat more than 100000 values"):
        read(path)
    path.write_text("a: &a [*a, *a]\n")
    with pytest.raises(ConfigError, match=f"{path}:1: \\*a refers to itself"):
        read(path)
    path.write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="nested deeper than 30 levels"):
        read(path)


def test_aliases_of_aliases_are_no_state(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    for text, words in (
        (bomb(), r"line 6: \*a4 and the aliases before it repeat more"),
        ("a: &a [*a, *a]\n", r"line 1: \*a refers to itself"),
        ("a: " + "[" * 100_000, "nested deeper than 30 levels"),
    ):
        path.write_text(text)
        with pytest.raises(WorkspaceError, match=words):
            read_stored(path, dict[str, JsonValue])


def test_numbers_without_end_are_refused(tmp_path: Path) -> None:
    """To YAML 1:1:1 is a number of base 60; 200,000 such signs kept a processor busy for minutes."""
    path = tmp_path / "settings.yaml"
    path.write_text("a: b\nc: " + "1:" * 100_000 + "1\n")
    with pytest.raises(ConfigError, match=f"{path}:2: a number of 200001 signs"):
        read_plain(path)
    with pytest.raises(WorkspaceError, match="line 2: a number of 200001 signs"):
        read_stored(path, dict[str, JsonValue])
    path.write_text("c: '" + "1:" * 1000 + "1'\n")
    assert read_stored(path, dict[str, JsonValue]) == read_plain(path) == {"c": "1:" * 1000 + "1"}


def test_plain_aliases_are_read(tmp_path: Path) -> None:
    path = tmp_path / "plain.yaml"
    path.write_text("a: &a {b: [1, 2]}\nc: *a\nd: [*a, *a]\n")
    inner = {"b": [1, 2]}
    assert read_plain(path) == {"a": inner, "c": inner, "d": [inner, inner]}
    assert read_stored(path, dict[str, JsonValue]) == {"a": inner, "c": inner, "d": [inner, inner]}


@pytest.mark.parametrize("text", ["[" * 5000 + "]" * 5000, '{"a": ' + "9" * 5000 + "}", '{"training": "\\ud800"}'])
@pytest.mark.parametrize("name", ["datalist.json", "splits_final.json"])
def test_json_that_python_cannot_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str
) -> None:
    make_phantoms(tmp_path / "data", num_cases=4, num_testing=0, shape=(24, 24, 24), num_fold=2)
    listed = json.loads((tmp_path / "data" / "datalist.json").read_text())
    if name == "splits_final.json":
        for folder, key, suffix in (("imagesTr", "image", "_0000"), ("labelsTr", "label", "")):
            (tmp_path / "data" / folder).mkdir()
            for i, case in enumerate(listed["training"]):
                target = tmp_path / "data" / folder / f"n{i}{suffix}.nii.gz"
                (tmp_path / "data" / case[key]).rename(target)
        table = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1, "b": 2}, "file_ending": ".nii.gz"}
        (tmp_path / "data" / "dataset.json").write_text(json.dumps(table))
        (tmp_path / "data" / "datalist.json").unlink()
    path = tmp_path / "data" / name
    path.write_text(text)
    assert run_command(["init", str(tmp_path / "data"), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert str(path) in said
    assert "Traceback" not in said


def test_state_nested_too_deep_is_left_out(tmp_path: Path) -> None:
    deep = "[" * 100_000 + "]" * 100_000 + "\n"  # how deep is too deep changes with Python
    path = tmp_path / "lines.jsonl"
    path.write_text(deep)
    assert Store(path).entries == []
    store = DigestStore()
    store.open(path)
    assert store.known == {}
    with pytest.raises(WorkspaceError, match=f"{path}: damaged"):
        read_stored(path, dict)


def content(data: bytes) -> Content:
    return Content(io.BytesIO(data), len(data), is_packed=True, piece_bytes=1000)


def test_gzip_members_without_content_end() -> None:
    with pytest.raises(ValueError, match="more than 10000 gzip members without content follow each other"):
        list(content(gzip.compress(b"") * 10_001))
    assert list(content(gzip.compress(b"") * 10_000 + gzip.compress(b"ab"))) == [b"ab"]


@pytest.mark.parametrize("seed", range(8))
def test_members_of_any_size_and_zeros_between_them_are_read(seed: int) -> None:
    random = np.random.default_rng(seed)
    pieces = [random.integers(0, 5, int(n), np.uint8).tobytes() for n in random.integers(0, 20_000, 12)]
    packed = b"".join(gzip.compress(piece) + bytes(int(random.integers(0, 9000))) for piece in pieces)
    assert b"".join(content(packed)) == b"".join(pieces)
    with pytest.raises(EOFError):
        list(content(packed.rstrip(b"\0")[:-1]))


# -- names that a terminal would obey

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\x08\r\u202e"
SAFE = r"\x1b]0;owned\x07\x1b[2J\x9b31m\x08\r\u202e"


def test_results_errors_and_logs_show_names_and_obey_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / EVIL).mkdir()
    assert run_command(["status", "--work_dir", str(tmp_path / EVIL)]) == 2
    assert f"{SAFE}: not a run's folder" in capsys.readouterr().err
    with log_to(tmp_path / "run.log"):
        logging.getLogger("autoseg").warning("case %s", EVIL)
    assert f" warning: case {SAFE}\n" in (tmp_path / "run.log").read_text()
    assert f"case {SAFE}\n" in capsys.readouterr().err
    with log_to(tmp_path / "forged.log"):  # a line of its own would look like one of ours
        logging.getLogger("autoseg").info("1/1 %s", "a\nerror: all is lost")
    assert r"1/1 a\nerror: all is lost" in capsys.readouterr().err
    assert (tmp_path / "forged.log").read_text().count("\n") == 1
    root = make_phantoms(tmp_path / "data", num_cases=2, num_testing=0, shape=(24, 24, 24), num_fold=2).parent
    listed = (root / "datalist.json").read_text()
    (root / "datalist.json").write_text(listed.replace("sphere", json.dumps(EVIL)[1:-1]))
    assert run_command(["init", str(root), "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert SAFE in shown.out
    assert EVIL[:5] not in shown.out + shown.err
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    show(paint(f"a {EVIL}", "green", sys.stdout))
    assert capsys.readouterr().out == f"\x1b[32ma {SAFE}\x1b[0m\n"


def test_the_live_report_hangs_up_on_clients_that_say_nothing(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoseg.report.serve.MOST_CONNECTIONS", 4)
    server = make_server(finished_run / "work_dir", STAGES, 0)
    assert server.RequestHandlerClass.timeout == 10.0
    monkeypatch.setattr(server.RequestHandlerClass, "timeout", 0.2)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    try:
        clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
        for client in clients:
            client.settimeout(60)
            client.send(b"GET / HT")
        for client in clients:
            with client, contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b""  # hung up on; else this waits, and fails
        wait_for(lambda: server.free_places == 4)
        for host in ("LOCALHOST", f"LocalHost:{port}", f"127.0.0.1:{port}"):
            request = urllib.request.Request(f"http://127.0.0.1:{port}/version", headers={"Host": host})
            assert urllib.request.urlopen(request).status == 200
        for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:1", ""):
            request = urllib.request.Request(f"http://127.0.0.1:{port}/version", headers={"Host": host})
            with pytest.raises(urllib.error.HTTPError, match="403"):
                urllib.request.urlopen(request)
    finally:
        server.shutdown()
        server.server_close()


# -- bad days


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """A function that makes a folder read-only, for root, too, whom permissions do not stop."""

    def refuse(folder: Path) -> None:
        def guarded(name: str, is_writing: Callable[..., bool]) -> None:
            real = getattr(os, name)

            def call(path: Any, *args: Any, **kwargs: Any) -> Any:
                if Path(os.fsdecode(path)).is_relative_to(folder) and is_writing(*args, **kwargs):
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
                return real(path, *args, **kwargs)

            monkeypatch.setattr(os, name, call)

        guarded("open", lambda flags=0, *_, **__: bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)))
        for name in ("unlink", "mkdir", "link", "utime", "replace", "rename"):
            guarded(name, lambda *_, **__: True)

    return refuse


def test_a_read_only_run_is_shown(
    copied: Path, capsys: pytest.CaptureFixture[str], read_only: Callable[[Path], None], tmp_path: Path
) -> None:
    work_dir = copied / "work_dir"
    before = {path: path.stat().st_mtime_ns for path in work_dir.rglob("*")}
    read_only(work_dir)
    assert run_command(["status", "--work_dir", str(work_dir)]) == 0
    assert "segresnet_0" in capsys.readouterr().out
    assert run_command(["report", "--work_dir", str(work_dir)]) == 2
    said = capsys.readouterr().err
    assert f"{work_dir / 'report.html'}: cannot be written (Read-only file system)." in said
    assert "--output" in said
    assert run_command(["report", "--work_dir", str(work_dir), "--output", str(tmp_path / "page.html")]) == 0
    assert "segresnet" in (tmp_path / "page.html").read_text()
    assert {path: path.stat().st_mtime_ns for path in work_dir.rglob("*")} == before


def sync_conflicts(work_dir: Path) -> None:
    for path in [*work_dir.rglob(".claims/*.json")]:
        for name in (f"{path.stem} (conflicted copy 2026-01-01).json", f"{path.stem}.sync-conflict.json", "9~.json"):
            shutil.copy(path, path.with_name(name))


def copy_of_a_job(work_dir: Path) -> None:
    shutil.copytree(work_dir / "segresnet_0", work_dir / "backup_1")


def folder_of_others(work_dir: Path) -> None:
    (work_dir / "backup_1").mkdir()
    (work_dir / "backup_1" / "job.json").write_text('{"foo": 1}')
    (work_dir / "other_٣").mkdir()  # a digit to Python
    (work_dir / "other_٣" / "job.json").write_text("{}")


@pytest.mark.parametrize("litter", [sync_conflicts, copy_of_a_job, folder_of_others])
def test_files_of_others_in_a_work_dir_are_none_of_ours(
    copied: Path, capsys: pytest.CaptureFixture[str], litter: Callable[[Path], None]
) -> None:
    work_dir = copied / "work_dir"
    assert len(list(work_dir.rglob(".claims/*.json"))) > 2
    litter(work_dir)
    for words in (["status"], ["report"], ["explain"]):
        assert run_command([*words, "--work_dir", str(work_dir)]) == 0
    assert run_command(["run", "--input", str(copied / "input.yaml")]) == 0
    load_predictor(Workspace(work_dir))
    shown = capsys.readouterr()
    assert "backup" not in shown.out + shown.err
    assert "Not readable" not in shown.out


def test_state_that_is_no_text_is_named(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work_dir = copied / "work_dir"
    names = [
        "segresnet_0/job.json",
        "settings.yaml",
        "datastats_by_case.yaml",
        "ensemble/scores.json",
    ]
    names += ["segresnet_0/metrics.jsonl", "segresnet_0/train.log", "input.yaml", "state/usage.jsonl", "faults.json"]
    names += ["segresnet_0/configs/hyper_parameters.yaml", "segresnet_0/configs/origins.yaml"]
    for name in names:
        path = work_dir / name
        path.write_bytes(b"\xff\xfe" + path.read_bytes())
    for path in work_dir.rglob(".claims/*.json"):
        path.write_bytes(b"\xff")
    assert run_command(["status", "--work_dir", str(work_dir)]) == 0
    assert f"{work_dir}/segresnet_0/job.json: damaged: byte 0 is not UTF-8 text" in capsys.readouterr().out
    assert run_command(["report", "--work_dir", str(work_dir)]) == 0
    page = (work_dir / "report.html").read_text()
    assert "could not be made" not in page
    for name in ("settings.yaml", "datastats_by_case.yaml", "ensemble/scores.json"):
        assert f"{name}: damaged: byte 0 is not UTF-8 text" in page
    for words in (["explain"], ["status", "segresnet_0"]):
        assert run_command([*words, "--work_dir", str(work_dir)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def in_a_process(*words: str, more: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does, in a shell; `more` follows it there."""
    command = shlex.join([sys.executable, "-m", "autoseg", *words])
    return subprocess.run(
        ["bash", "-c", f"{command} {more}"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("more", [">&-", "2>&-", ">&- 2>&-", "| true", "2> >(true)"])
def test_work_goes_on_without_anyone_to_read_it(phantom_dataset: Path, tmp_path: Path, more: str) -> None:
    text = (phantom_dataset / "input.yaml").read_text().replace("dataroot: .", f"dataroot: {phantom_dataset}")
    path = tmp_path / "input.yaml"
    path.write_text(text.replace("datalist: ", f"datalist: {phantom_dataset}/"))
    ended = in_a_process("analyze", "--input", str(path), more=f"{more}; exit ${{PIPESTATUS[0]}}")
    assert ended.returncode == 0
    assert "Traceback" not in ended.stderr + ended.stdout
    assert (tmp_path / "work_dir" / "state" / "analyze.json").exists()
    assert "analyze" in (tmp_path / "work_dir" / "run.log").read_text()


def test_names_that_a_locale_cannot_show(phantom_dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "Größe 大"
    shutil.copytree(phantom_dataset, folder)
    for variables in ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "1"}):
        ended = in_a_process("init", str(folder), "--output", str(tmp_path / "out"), "--force", **variables)
        assert (ended.returncode, ended.stderr) == (0, "")
    assert (tmp_path / "out" / "input.yaml").read_text(encoding="utf-8").count("Größe 大") == 1
    ended = in_a_process("analyze", "--input", str(tmp_path / "out" / "input.yaml"), PYTHONIOENCODING="ascii")
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"scan_\xfc.nii.gz\n", "byte 5 is not UTF-8"),
        (b"a\0b.nii.gz\n", "holds a NUL character"),
        (b"\xef\xbb\xbfscan.nii.gz\r\n", ""),
        (b"x" * 300 + b".nii.gz\n", ""),
    ],
)
def test_a_list_of_images(copied: Path, capsys: pytest.CaptureFixture[str], content: bytes, words: str) -> None:
    path = copied / "list.txt"
    path.write_bytes(content)
    shutil.copy(next((copied / "images").glob("*.nii.gz")), copied / "scan.nii.gz")
    words_of = ["--work_dir", str(copied / "work_dir"), "--image", str(path), "--output", str(copied / "out")]
    code = run_command(["predict", *words_of])
    said = capsys.readouterr().err
    assert "Traceback" not in said
    if content.startswith(b"\xef"):
        assert (code, [p.name for p in (copied / "out").glob("*.nii.gz")]) == (0, ["scan.nii.gz"])
    else:
        assert code == 2
        assert words in said


def test_names_as_long_as_names_can_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / ("n" * 248 + ".nii.gz")
    grid = Grid(shape=(2, 2, 2), affine=np.eye(4))
    write_volume(path, np.zeros((2, 2, 2), np.uint8), grid)
    assert read_stored_volume(path).array.shape == (2, 2, 2, 1)
    for words in (
        ["status", "--work_dir", str(tmp_path / ("n" * 300))],
        ["report", "--work_dir", str(tmp_path / ("n" * 300))],
        ["run", "--input", str(tmp_path / ("n" * 300))],
        ["analyze", "--data", str(tmp_path / ("n" * 300))],
        ["predict", "--image", str(tmp_path / ("n" * 300)), "--output", "x"],
        ["evaluate", "--predictions", str(tmp_path / ("n" * 300)), "--labels", "x"],
        ["init", str(tmp_path / ("n" * 300)), "--output", str(tmp_path)],
    ):
        assert run_command(words) == 2
        said = capsys.readouterr().err
        assert "nnnn" in said
        assert "Traceback" not in said


@pytest.mark.parametrize("image", ["n" * 300 + ".nii.gz", "a\0b.nii.gz", "x/" * 3000 + "y.nii.gz"])
def test_paths_in_a_datalist_that_cannot_be(tmp_path: Path, image: str) -> None:
    raw = {"training": [{"image": image, "label": "l.nii.gz"}, {"image": "b.nii.gz", "label": "c.nii.gz"}]}
    with pytest.raises(ConfigError) as error:
        build_datalist(raw, tmp_path, path=tmp_path / "datalist.json")
    assert image[:90] in str(error.value)


def test_file_names_that_are_no_text(phantom_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data"
    for kind in ("images", "labels"):
        shutil.copytree(phantom_dataset / kind, folder / kind)
        first = min((folder / kind).iterdir())
        os.rename(first, os.fsencode(folder / kind) + b"/scan_\xff.nii.gz")
    assert run_command(["init", str(folder), "--output", str(tmp_path / "out")]) == 2
    assert r"images/scan_\udcff.nii.gz: the name is not UTF-8. Rename the file." in capsys.readouterr().err


@pytest.mark.parametrize("key", ["work_dir", "dataroot", "name", "modality"])
def test_nul_in_a_setting(phantom_dataset: Path, tmp_path: Path, key: str) -> None:
    lines = (phantom_dataset / "input.yaml").read_text().splitlines()
    path = tmp_path / "input.yaml"
    path.write_text("\n".join([*(ln for ln in lines if not ln.startswith(key)), f'{key}: "a\\0b"']))
    with pytest.raises(ConfigError, match=rf"{path}:\d+: {key}: expected .*Remove the NUL character"):
        read_model(path, Settings)
