"""What other systems lack: fork, fcntl, resource, flags of open, signals. Taken away here, and all still works."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import stat
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import bare
import pytest
import yaml
from plans import TINY

from autoseg.analyzer import workers
from autoseg.cli.doctor import doctor, examine
from autoseg.cli.main import run_command
from autoseg.errors import WorkspaceError
from autoseg.hardware import system
from autoseg.hardware.limits import available_cores
from autoseg.launch import stop
from autoseg.training.signals import StopSignals
from autoseg.workspace.claims import Busy, Claim
from autoseg.workspace.files import SECRET, append_text, last_lines, open_new, open_regular, write_text
from autoseg.workspace.usage import measured, read_usage
from autoseg.workspace.workspace import Workspace

PACKAGE = Path(__file__).resolve().parents[1] / "autoseg"
OF_ONE_SYSTEM = re.compile(
    r"\bimport (?:fcntl|resource|pwd|grp|msvcrt|winreg)\b|\bos\.(?:fork|O_(?:NOFOLLOW|NONBLOCK|CLOEXEC|BINARY)|fchmod|"
    r"sched_getaffinity|kill|killpg|setsid|getppid|replace)\b|\bprctl\b|start_new_session|pthread_kill|SIGKILL|SIGBREAK"
)
ELSEWHERE = {"cli/doctor.py": "os.replace", "export/run.py": "os.replace"}
"""Doctor tries what the system does, without a second try; export/run.py is a file that needs no other of autoseg."""


@pytest.fixture
def bare_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python as on Windows, as far as this system lets it."""
    for name in bare.OF_OS:
        monkeypatch.delattr(os, name, raising=False)
    for name in ("fcntl", "resource"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)  # as there; Python's own, from 3.13 on, needs O_NONBLOCK


def test_one_module_knows_the_systems() -> None:
    found = {
        f"{path.relative_to(PACKAGE).as_posix()}: {use}"
        for path in PACKAGE.rglob("*.py")
        if path != PACKAGE / "hardware" / "system.py"
        for use in OF_ONE_SYSTEM.findall(path.read_text())
    }
    assert found == {f"{name}: {use}" for name, use in ELSEWHERE.items()}


@pytest.mark.usefixtures("bare_system")
def test_files_are_as_safe_without_the_flags_of_posix(tmp_path: Path) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    write_text(path, "one\r\n")
    append_text(path, "two\n")
    assert path.read_bytes() == b"one\r\ntwo\n"
    assert last_lines(path, 1) == ["two"]
    append_text(path, "three\n", mode=SECRET)
    if not system.is_windows():  # where a file's mode says who may write it, and no more
        assert stat.S_IMODE(path.stat().st_mode) == SECRET
    link.symlink_to(path)
    with pytest.raises(OSError, match="is a link") as error:
        open_regular(link, follow=False)
    assert error.value.errno == errno.ELOOP
    with pytest.raises(WorkspaceError, match="to which nothing is written"):
        append_text(link, "four\n")
    with pytest.raises(FileExistsError):
        open_new(path)
    assert path.read_bytes() == b"one\r\ntwo\nthree\n"
    with Claim(tmp_path / ".claims", "job"), pytest.raises(Busy):
        Claim(tmp_path / ".claims", "job").__enter__()


@pytest.mark.usefixtures("bare_system")
def test_a_machine_without_fork_fcntl_and_resource_is_fit(tmp_path: Path) -> None:
    text, code = doctor(tmp_path)
    assert code == 0, text
    assert {"Writing": "ok"}.items() <= {check.name: check.state for check in examine(tmp_path)}.items()
    assert "Open files" not in text
    assert available_cores() >= 1
    workspace = Workspace(tmp_path)
    workspace.usage.parent.mkdir(parents=True)
    with measured(workspace, "analyze", forks=True):
        pass
    assert read_usage(workspace)[0].peak_bytes > 0


def test_other_systems_are_tried_but_said_to_be_untested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoseg.cli.doctor.sys", SimpleNamespace(**{**vars(sys), "platform": "darwin"}))
    check = next(check for check in examine(tmp_path) if check.name == "System")
    assert (check.state, check.advice[:26]) == ("warn", "Runs are tested on Linux. ")


def test_an_analysis_by_spawned_processes_is_the_same(
    phantom_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds, real = [], multiprocessing.get_context

    def get_context(kind: str) -> object:
        kinds.append(kind)
        return real(kind)

    monkeypatch.setattr(multiprocessing, "get_context", get_context)
    monkeypatch.setattr(workers, "workers_for", lambda *_, **__: 2)
    monkeypatch.setattr(workers, "IN_PROCESS_BYTES", 0)
    results = []
    for name, forks in (("as_usual", system.can_fork()), ("spawned", False)):
        monkeypatch.setattr(system, "can_fork", lambda forks=forks: forks)
        folder = shutil.copytree(phantom_dataset, tmp_path / name)
        assert run_command(["analyze", "--input", str(folder / "input.yaml")]) == 0
        results.append((folder / "work_dir" / "datastats_by_case.yaml").read_text())
    assert results[0].replace("as_usual", "spawned") == results[1]
    assert kinds[-1] == "spawn"


@pytest.mark.parametrize(
    ("platform", "has_fork", "forks"),
    [("linux", True, True), ("linux", False, False), ("darwin", True, False), ("win32", False, False)],
)
def test_only_linux_forks(monkeypatch: pytest.MonkeyPatch, platform: str, has_fork: bool, forks: bool) -> None:
    """macOS has fork, and its libraries do not survive it."""
    monkeypatch.setattr(system, "sys", SimpleNamespace(platform=platform))
    if has_fork:
        monkeypatch.setattr(os, "fork", lambda: pytest.fail("it is only asked"), raising=False)
    else:
        monkeypatch.delattr(os, "fork", raising=False)
    assert system.can_fork() == forks


# -- Python that has nothing of it, in processes of its own


def test_a_run_needs_nothing_that_windows_lacks(phantom_dataset: Path, tmp_path: Path) -> None:
    """Training is a process of its own, which a launcher starts and watches."""
    starts, run = tmp_path / "starts", shutil.copytree(phantom_dataset, tmp_path / "run")
    starts.mkdir()
    assert bare.run_bare("-c", "import os; print(hasattr(os, 'fork'))", folder=starts, cwd=run) == "False\n"
    lines = TINY.replace("num_workers: 1", "num_workers: 2") + "jobs_per_device: 2\n"
    (run / "input.yaml").write_text((run / "input.yaml").read_text() + lines)
    bare.run_bare("-m", "autoseg", "run", folder=starts, cwd=run)
    assert json.loads((run / "work_dir" / "segresnet_0" / "job.json").read_text())["state"] == "done"
    assert (run / "work_dir" / "ensemble" / "predictions").exists()
    assert (run / "work_dir" / "report.html").exists()


@pytest.mark.slow
def test_what_public_ci_runs_on_windows_needs_nothing_that_it_lacks(tmp_path: Path) -> None:
    jobs = yaml.safe_load((PACKAGE.parent / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    (line,) = [step["run"] for step in jobs["other-systems"]["steps"] if "pytest" in step.get("run", "")]
    words = shlex.split(line)[1:]
    assert words[:2] == ["-m", "pytest"]
    said = bare.run_bare(*words, "-p", "no:cacheprovider", folder=tmp_path, cwd=PACKAGE.parent)
    assert " passed" in said.splitlines()[-1]


# -- Windows


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer as on Windows where the system is asked for."""
    monkeypatch.setattr(system, "is_windows", lambda: True)
    monkeypatch.setattr(system, "REPLACE_PAUSE_S", 0.0)


@pytest.mark.usefixtures("windows")
def test_a_file_that_is_open_is_replaced_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, tries = os.replace, []

    def replace(source: Path, target: Path) -> None:
        tries.append(target)
        if len(tries) < 3:
            raise PermissionError(errno.EACCES, "in use")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    write_text(tmp_path / "file", "new")
    assert ((tmp_path / "file").read_text(), len(tries)) == ("new", 3)
    tries[:] = []
    monkeypatch.setattr(os, "replace", lambda *_: tries.append(0) or os.open("/nowhere/at/all", os.O_RDONLY))
    with pytest.raises(FileNotFoundError):  # no other error is tried again
        write_text(tmp_path / "file", "newer")
    assert len(tries) == 1

    def never(source: Path, target: Path) -> None:
        tries.append(target)
        raise PermissionError(errno.EACCES, "in use")

    monkeypatch.setattr(os, "replace", never)
    with pytest.raises(PermissionError):
        write_text(tmp_path / "file", "newer")
    assert len(tries) == 1 + system.NUM_REPLACE_TRIES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.usefixtures("windows")
def test_processes_are_asked_to_stop_by_ctrl_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "CTRL_BREAK_EVENT", 1, raising=False)
    sent: list[int] = []
    process = SimpleNamespace(poll=lambda: None, send_signal=sent.append, wait=lambda seconds: 0)
    stop([process])  # type: ignore[list-item]
    assert sent == [1]
    assert set(system.own_session()) == {"creationflags"}


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="stands for Ctrl-Break here")
def test_ctrl_break_is_caught_like_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGUSR1)
    assert signals.received == "SIGUSR1"


@pytest.mark.usefixtures("windows")
def test_a_process_stops_itself_without_being_killed() -> None:
    with StopSignals() as signals:
        system.stop_this_process()
    assert signals.received == "SIGTERM"


def test_another_thread_does_what_ctrl_c_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for there_is_pthread_kill in (True, False):
        if not there_is_pthread_kill:
            monkeypatch.delattr(signal, "pthread_kill", raising=False)
        with StopSignals() as signals:
            thread = threading.Thread(target=system.interrupt_main_thread)
            thread.start()
            thread.join()
        assert signals.received == "SIGINT"
