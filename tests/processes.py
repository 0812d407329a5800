"""Commands in processes of their own, without their start; waiting without a limit that a busy machine could miss.

Half of what a small run takes is loading torch and MONAI. `autoseg` and `Started` therefore fork from one process that
has loaded them (multiprocessing's forkserver); a fork has its own number, signals, output and end as any process has.
Where the start of the command is the subject, tests begin `python -m autoseg` themselves.

Nothing here gives up: what never comes true ends by the timeout of pytest (pyproject.toml), the last resort.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

LOADED = (
    "autoseg.algos.fit",
    "autoseg.algos.generate",
    "autoseg.analyzer.analysis",
    "autoseg.cli.main",
    "autoseg.ensemble.build",
    "autoseg.networks.segresnet",
    "autoseg.pipeline.run",
    "autoseg.report.page",
    "autoseg.training.job",
    "fire",
    "scipy.ndimage",
    "sklearn.model_selection",
    "torch._dynamo",  # loaded by the first optimizer
)
"""What the forks find loaded. One that is missing is no fault: the fork loads it itself."""


@functools.cache
def _forks() -> multiprocessing.context.BaseContext:
    """Where processes come from; Windows has no fork, so that each loads everything anew."""
    forks = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
    forks.set_forkserver_preload(list(LOADED))
    return forks


def _run(words: list[str], cwd: str, environment: dict[str, str], output: str, errors: str) -> None:
    """In the fork: become the `autoseg` command."""
    for number, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - to the end of the process
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = ["autoseg", *words]
    import torch

    from autoseg.cli.main import main

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    main()


@functools.cache
def _outputs() -> Path:
    """A folder for what the processes print, removed at the end of the test run."""
    folder = tempfile.mkdtemp(prefix="autoseg-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


class Started:
    """The `autoseg` command at work, as a Popen would be."""

    def __init__(self, *words: str | Path, cwd: Path | None = None) -> None:
        """Start it."""
        self._output, self._errors = (_outputs() / f"{uuid.uuid4().hex}.{name}" for name in ("out", "err"))
        self.words = list(map(str, words))
        place = str(cwd or Path.cwd())
        arguments = (self.words, place, dict(os.environ), str(self._output), str(self._errors))
        self._process = _forks().Process(target=_run, args=arguments)
        self._process.start()

    @property
    def pid(self) -> int:
        """The process' number."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def stderr(self) -> str:
        """What it has said so far."""
        return self._errors.read_text() if self._errors.exists() else ""

    @property
    def stdout(self) -> str:
        """What it has put out so far."""
        return self._output.read_text() if self._output.exists() else ""

    @property
    def returncode(self) -> int | None:
        """Its exit code, minus the signal's number where one ended it; None: it still runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Wait for its end; returns its exit code."""
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode

    def ends_within(self, limit_s: float) -> bool:
        """Wait for its end, but no longer than that; for campaigns, never for a test."""
        self._process.join(limit_s)
        return self._process.exitcode is not None


def autoseg(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    started = Started(*words, cwd=cwd)
    code = started.wait()
    return subprocess.CompletedProcess(started.words, code, started.stdout, started.stderr)


def wait_for(true: Callable[[], object]) -> None:
    """Look again and again until it is true."""
    while not true():
        time.sleep(0.02)


def wait_for_epochs(metrics: Path, count: int) -> None:
    """Wait until a job has written the metrics of so many epochs."""
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= count)


def cpu_s(*words: str, cwd: Path) -> float:
    """Seconds of processor time that Python takes for some words, its own children included.

    Other work on the machine hardly changes them, as it does wall time.
    """
    process = subprocess.Popen([sys.executable, *words], cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, words
    return used.ru_utime + used.ru_stime
