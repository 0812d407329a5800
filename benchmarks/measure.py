"""Commands measured as a user meets them: whole processes, their start included, and all of their memory."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

SAMPLE_S = 0.02


@dataclass(kw_only=True)
class Contender:
    """A command that is measured."""

    name: str
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)
    clean: Callable[[], None] = lambda: None
    """Takes away what an earlier round left."""
    seconds: list[float] = field(default_factory=list)
    mib: float = 0.0

    @property
    def median_s(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.seconds)

    def run(self, *, memory: bool = False) -> None:
        """Run once for its time, or for its memory."""
        self.clean()
        start = time.perf_counter()
        with tempfile.TemporaryFile() as output:
            child = subprocess.Popen(self.command, env={**os.environ, **self.env}, stdout=output, stderr=output)
            if memory:
                self.mib = max(self.mib, watch(child))
            code = child.wait()
            if not memory:
                self.seconds.append(time.perf_counter() - start)
                print(f"{self.name}: {self.seconds[-1]:.2f} s", file=sys.stderr)
            if code != 0:
                output.seek(0)
                raise SystemExit(f"{self.name} failed:\n{output.read().decode()[-2000:]}")


def watch(child: subprocess.Popen[bytes]) -> float:
    """Largest PSS of a process and its children until it ends, in MiB."""
    process = psutil.Process(child.pid)
    most = 0
    while child.poll() is None:
        total = 0
        try:
            for one in [process, *process.children(recursive=True)]:
                total += pss(one.pid)
        except psutil.NoSuchProcess:
            pass
        most = max(most, total)
        time.sleep(SAMPLE_S)
    return most / 2**20


def pss(pid: int) -> int:
    """Proportional set size of a process in bytes; 0 where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
