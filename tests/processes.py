"""Waiting for other processes and counting their work, without a limit that a busy machine could miss.

Nothing here gives up: what never comes true ends by the timeout of pytest (pyproject.toml), the last resort.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


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
