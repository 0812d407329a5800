"""The terminal: bars and colours where there is one, plain lines elsewhere; quiet and verbose."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autoseg import terminal
from autoseg.cli.main import run_command
from autoseg.errors import ConfigError
from autoseg.terminal import Progress, has_colours, paint_table, take_verbosity


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_screen(folder: Path, *words: str, **environment: str) -> str:
    """What a command shows on a terminal of its own."""
    main, worker = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100", **environment}
    process = subprocess.Popen(
        [sys.executable, "-m", "autoseg", *words], cwd=folder, stdin=worker, stdout=worker, stderr=worker, env=env
    )
    os.close(worker)
    shown = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        shown += part
    os.close(main)
    process.wait()
    return shown.decode()


def test_colours_where_there_is_a_terminal_and_nobody_minds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert has_colours(Screen())
    assert not has_colours(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not has_colours(Screen())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not has_colours(Screen())
    monkeypatch.setenv("NO_COLOR", "")  # as no-color.org says: set and not empty
    assert has_colours(Screen())


def test_the_chosen_row_stands_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    table = "Title\n  a\n* b"
    assert paint_table(table, Screen()) == "\x1b[1mTitle\x1b[0m\n  a\n\x1b[32m* b\x1b[0m"
    assert paint_table(table, io.StringIO()) == table


def test_a_command_on_a_terminal(tmp_path: Path) -> None:
    assert on_screen(tmp_path, "trian") == "\x1b[31merror:\x1b[0m trian: unknown command. Did you mean train?\r\n"
    assert "\x1b[" not in on_screen(tmp_path, "trian", NO_COLOR="1")


def test_a_bar_on_a_terminal_with_lines_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    logger = logging.getLogger("autoseg")
    before, level = logger.handlers[:], logger.level
    try:
        terminal.set_up_logging(logging.INFO)
        bar = Progress("ensemble", 4)
        bar.step()
        logging.getLogger("autoseg.test").info("a line")
        bar.to(4)
        bar.close()
        shown = screen.getvalue()
        assert re.search(r"ensemble: +25%\|", shown)
        assert "\ra line\n" in re.sub(r"\r +\r", "\r", shown)
        screen.truncate(0)
        terminal.set_up_logging(logging.WARNING)
        quiet = Progress("ensemble", 4)
        quiet.step()
        quiet.close()
        logging.getLogger("autoseg.test").info("unseen")
        logging.getLogger("autoseg.test").warning("seen")
        assert "unseen" not in screen.getvalue()
        assert "%" not in screen.getvalue()
        assert "seen" in screen.getvalue()
    finally:
        logger.handlers[:] = before
        logger.setLevel(level)


def test_timed_lines_elsewhere(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO, "autoseg"):
        bar = Progress("ensemble", 100)
        for _ in range(30):
            now[0] += 1.0
            bar.step()
        bar.close()
        silent = Progress("analyze", 100, shown=False)
        now[0] += 60
        silent.step()
    assert [r.message for r in caplog.records] == [
        "ensemble: 11 of 100 cases, 1.0 cases/s, 89 s left",
        "ensemble: 22 of 100 cases, 1.0 cases/s, 78 s left",
    ]


def test_a_share_is_told_with_a_note_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO, "autoseg"):
        bar = Progress("predict", 1.0, unit="")
        for share in (0.0, 0.01, 0.2, 0.5, 0.9):
            now[0] += 100.0
            bar.to(share, "image 1 of 2")
    assert [r.message for r in caplog.records] == [
        "predict: 0 %, image 1 of 2, none done yet",
        "predict: 1 %, image 1 of 2, 5.5 h left",
        "predict: 20 %, image 1 of 2, 20 min left",
        "predict: 50 %, image 1 of 2, 7 min left",
        "predict: 90 %, image 1 of 2, 56 s left",
    ]


def test_slow_work_is_told_in_seconds_a_case(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO, "autoseg"):
        bar = Progress("analyze", 3)
        for _ in range(2):
            now[0] += 41.0
            bar.step()
    assert [r.message for r in caplog.records] == [
        "analyze: 1 of 3 cases, 41 s a case, 82 s left",
        "analyze: 2 of 3 cases, 41 s a case, 41 s left",
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_stdout_or_stderr_stops_no_work(finished_run: Path) -> None:
    def status(streams: str, words: str = "status") -> subprocess.CompletedProcess[str]:
        """A command in a shell."""
        script = f"'{sys.executable}' -m autoseg {words} {streams}"
        return subprocess.run(["bash", "-c", script], cwd=finished_run, capture_output=True, text=True, check=False)

    lost = status("> /dev/full")
    assert lost.returncode == 1
    assert lost.stderr == (
        "error: stdout cannot be written to (No space left on device); the rest of the output is lost\n"
    )
    wrong = status("2> /dev/full", "trian")
    assert (wrong.returncode, wrong.stdout) == (2, "")


def test_verbosity() -> None:
    words = ["run", "--quiet", "--budget", "2h"]
    assert take_verbosity(words) == logging.WARNING
    assert words == ["run", "--budget", "2h"]
    assert take_verbosity(["--verbose", "run"]) == logging.DEBUG
    assert take_verbosity(["run"]) == logging.INFO
    with pytest.raises(ConfigError, match="contradicts"):
        take_verbosity(["--quiet", "run", "--verbose"])


def test_quiet_is_quiet_and_the_run_log_is_whole(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished_run, tmp_path / "run", copy_function=shutil.copy2)
    monkeypatch.chdir(tmp_path / "run")
    capsys.readouterr()
    assert run_command(["generate", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    log = (tmp_path / "run" / "work_dir" / "run.log").read_text()
    assert log.splitlines()[-2].endswith("generate: up to date")
