"""What each stage used: time, processor time, memory, disk. Sampled by a thread; kept in state/usage.jsonl."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field

from autoseg.hardware.limits import available_cores, memory_limit_bytes
from autoseg.hardware.system import peak_memory_bytes
from autoseg.version import __version__
from autoseg.workspace.files import PUBLIC, append_text
from autoseg.workspace.stored import Moment, Seconds, Stored, read_stored_lines
from autoseg.workspace.workspace import Workspace

EVERY_S = 1.0
"""Between two looks at the memory: shorter peaks may be missed."""


class UsageLine(Stored):
    """One line of state/usage.jsonl: one start of a stage."""

    stage: str
    started: Moment
    seconds: Seconds
    cpu_s: Seconds
    """Of this process and its children together, as is the memory."""
    peak_bytes: int = Field(ge=0)
    gpu_bytes: int | None = None
    """Most allocated by torch; None without a GPU."""
    disk_bytes: int = Field(ge=0)
    """Of the whole work_dir afterwards."""
    ended: str
    """ok, or the kind of the error."""


class CommandLine(Stored):
    """One line of state/commands.jsonl: one command of the run."""

    time: Moment
    command: str
    version: str


def add_line(path: Path, line: Stored, *, mode: int = PUBLIC) -> None:
    """Add a line to a file that only grows."""
    append_text(path, json.dumps(line.model_dump(mode="json")) + "\n", mode=mode)


@contextmanager
def measured(workspace: Workspace, stage: str, *, forks: bool = False) -> Iterator[None]:
    """Note what happens inside as one line of state/usage.jsonl, also where it ends in an error.

    Args:
        workspace: the run.
        stage: its name.
        forks: the stage forks, for which there must be no thread: its memory is taken at the end from the system's
            own high-water marks, this process and its largest child.
    """
    import psutil

    process = psutil.Process()
    peak = _memory(process)
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(EVERY_S):
            peak = max(peak, _memory(process))

    watcher = threading.Thread(target=watch, name="usage", daemon=True)
    started, begin, cpu = time.time(), time.monotonic(), _cpu_s()
    _reset_gpu()
    ended = "ok"
    if not forks:
        watcher.start()
    try:
        yield
    except BaseException as error:
        ended = type(error).__name__
        raise
    finally:
        stop.set()
        if forks:
            peak = max(peak, peak_memory_bytes() or 0)
        else:
            watcher.join()
        line = UsageLine(
            stage=stage,
            started=round(started, 1),
            seconds=round(time.monotonic() - begin, 2),
            cpu_s=round(_cpu_s() - cpu, 2),
            peak_bytes=max(peak, _memory(process)),
            gpu_bytes=_gpu_bytes(),
            disk_bytes=disk_bytes(workspace.root),
            ended=ended,
        )
        add_line(workspace.usage, line)


PACKAGES = ("torch", "monai", "numpy", "scipy", "nibabel", "scikit-learn", "connected-components-3d", "pydantic")
"""Packages whose versions may change a result."""


def environment() -> dict[str, str]:
    """Machine and versions, in words."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import psutil

    facts = {
        "autoseg": __version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processor": f"{psutil.cpu_count(logical=False) or '?'} cores, {psutil.cpu_count() or '?'} threads, "
        f"{available_cores()} of them to be used",
        "memory": f"{memory_limit_bytes() / 2**30:.1f} GiB",
    }
    if cuda := _cuda():
        facts["GPU"] = ", ".join(cuda.get_device_name(i) for i in range(cuda.device_count()))
    for name in PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            continue
    return facts


def read_usage(workspace: Workspace) -> list[UsageLine]:
    """All lines, oldest first. Raises: WorkspaceError: as `read_stored_lines`."""
    return read_stored_lines(workspace.usage, UsageLine)


def disk_bytes(folder: Path) -> int:
    """Bytes of all files under a folder; files that vanish meanwhile count as nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:
                continue
    return total


def _memory(process: Any) -> int:
    """Bytes of a process and its children; pages they share count once where the system tells (Linux)."""
    import psutil

    total = 0
    try:
        members = [process, *process.children(recursive=True)]
    except psutil.Error:
        members = [process]
    for member in members:
        try:
            info = member.memory_full_info() if len(members) > 1 else member.memory_info()
            total += getattr(info, "pss", info.rss)
        except psutil.Error:
            continue
    return total


def _cpu_s() -> float:
    """Processor seconds of this process and of the children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _cuda() -> Any:
    """torch.cuda where torch was loaded and there is a GPU."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized() else None


def _reset_gpu() -> None:
    if cuda := _cuda():
        cuda.reset_peak_memory_stats()


def _gpu_bytes() -> int | None:
    cuda = _cuda()
    return int(cuda.max_memory_allocated()) if cuda else None
