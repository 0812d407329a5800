"""Where jobs run: this machine's devices (local.py), or a cluster: a file of this folder and a row of `CLUSTERS`.

A launcher is a function that starts tasks, tells `ended` about each that ends, and starts it again where that says so.
A task is one `autoseg` command, idempotent and claimed by its worker (see `autoseg.workspace.claims`), so that a
launcher may die, start a task twice or lose a machine without harm.
"""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import psutil

from autoseg.config.settings import Settings
from autoseg.hardware.limits import DEVICE_NAME
from autoseg.hardware.system import ask_to_stop, own_session, stop_this_process
from autoseg.workspace.files import open_append

log = logging.getLogger(__name__)


LAUNCHER_PID = "AUTOSEG_LAUNCHER_PID"
"""Environment variable with the process that started this one and waits for it."""

SAVING_S = 120.0
"""Seconds a stopped worker gets to end its step and save."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One `autoseg` command to be run somewhere."""

    name: str
    words: tuple[str, ...]
    """What follows `autoseg`."""
    gpus: int = 0
    """GPUs it trains on; several by torchrun."""
    cpus: int = 1
    """CPU threads it may use."""

    def command(self) -> list[str]:
        """The task as a command line."""
        start = [sys.executable, "-m"]
        if self.gpus > 1:
            start += ["torch.distributed.run", "--standalone", f"--nproc_per_node={self.gpus}", "-m"]
        return [*start, "autoseg", *self.words]

    def environment(self, device: str) -> dict[str, str]:
        """What its process is to find in its environment.

        Args:
            device: as `autoseg status` is to call it, such as `cpu` or `cuda:0`.
        """
        return {DEVICE_NAME: device, "OMP_NUM_THREADS": str(self.cpus)}


Ended = Callable[[Task, int], bool]
"""Told of a task that ended and its exit code; True: start it again."""


class Cluster(Protocol):
    """What the file of a launcher on other machines has."""

    def run(self, tasks: Sequence[Task], settings: Settings, ended: Ended, output: Path) -> None:
        """Run tasks until all have ended; arguments and errors as `launch` has them.

        A task that is stopped gets `SAVING_S` to save. `run_command` runs it on the machine where that is called: its
        `command()`, with its `environment()`, into `output / "<name>.out"`. `settings.device` is in the task's words.
        """

    def has_gpus(self, settings: Settings) -> bool:
        """Whether jobs get a GPU with `device: auto`."""

    def num_workers(self, settings: Settings, gpus: int, cpus: int) -> int:
        """Workers of a sweep that have room at once, each with so many GPUs and CPU threads."""


CLUSTERS = {"ray": "ray_cluster", "slurm": "slurm_array"}
"""Value of the setting `launcher` -> its file in this folder; `local` is this machine."""


def cluster_of(settings: Settings) -> Cluster | None:
    """The launcher on other machines; None where jobs run on this one."""
    file = CLUSTERS.get(settings.launcher)
    return cast(Cluster, importlib.import_module(f"autoseg.launch.{file}")) if file else None


def launch(
    tasks: Sequence[Task],
    settings: Settings,
    ended: Ended,
    *,
    output: Path,
    memory_gib: Callable[[Task], float | None] = lambda task: None,
) -> None:
    """Run tasks on the launcher of the settings until all have ended.

    Args:
        output: Folder for what the processes print; `start` makes it.
        memory_gib: Memory a running or past task took, where that is known.

    Raises:
        ResourceError: The launcher's package, its cluster or every device is missing.
        KeyboardInterrupt: A signal came; the tasks were stopped and have saved their work.
    """
    if (cluster := cluster_of(settings)) is not None:
        cluster.run(tasks, settings, ended, output)
    else:
        from autoseg.launch.local import find_places, run_local

        run_local(tasks, find_places(settings), ended, output, memory_gib=memory_gib)


def start(command: Sequence[str], output: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, so that Ctrl-C reaches it through us alone; append what it prints."""
    with open_append(output) as file:
        return subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**os.environ, **environment, LAUNCHER_PID: str(os.getpid())},
            **own_session(),
        )


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Let processes save and end; kill those that do not within `SAVING_S`."""
    for process in processes:
        if process.poll() is None:
            ask_to_stop(process)
    for process in processes:
        try:
            process.wait(SAVING_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run_command(command: Sequence[str], output: Path, environment: Mapping[str, str]) -> int:
    """Run a task's command to its end on the machine where this is called; stopped, let it save first."""
    process = start(command, output, environment)
    try:
        return process.wait()
    except BaseException:
        stop([process])
        raise


def stop_with_launcher() -> None:
    """In a worker: watch the launcher that started this process, and stop as on SIGTERM where it dies."""
    pid = os.environ.get(LAUNCHER_PID, "")
    if not pid:
        return
    try:
        launcher = psutil.Process(int(pid))
    except psutil.NoSuchProcess:
        launcher = None

    def watch() -> None:
        while launcher is not None and launcher.is_running() and launcher.status() != psutil.STATUS_ZOMBIE:
            pause.wait(1.0)
        log.warning("the process that started this one is gone: saving and stopping")
        stop_this_process()

    pause = threading.Event()
    threading.Thread(target=watch, daemon=True, name="watch of the launcher").start()
