"""Python as on Windows, as far as Linux lets it: taken away from one test, or from a process and all that it starts."""

from __future__ import annotations

import builtins
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

TESTS = Path(__file__).resolve().parent
OF_OS = ("fork", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "fchmod", "sched_getaffinity", "killpg", "setsid", "wait4")
OF_SIGNAL = ("SIGCONT", "SIGSTOP", "SIGUSR1", "SIGUSR2", "pthread_kill")
MODULES = ("fcntl", "grp", "pwd", "resource")
"""Other packages may import these, since they ask what system it is."""
STARTS = "from bare import become_bare\n\nbecome_bare()\n"


def become_bare() -> None:
    """Take it all away from this process, for good; new processes are spawned."""
    for module, names in ((os, OF_OS), (signal, OF_SIGNAL)):
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    shutil._use_fd_functions = False  # type: ignore[attr-defined]  # as there; Python's own, from 3.13 on, needs O_NONBLOCK
    multiprocessing.set_start_method("spawn")
    for kind in ("fork", "forkserver"):
        multiprocessing.context._concrete_contexts.pop(kind, None)  # type: ignore[attr-defined]
    real = builtins.__import__

    def bare_import(name: str, globals: Mapping[str, object] | None = None, *rest: object, **named: object) -> object:
        if name in MODULES and str((globals or {}).get("__name__")).partition(".")[0] == "autoseg":
            raise ImportError(f"{name} is not there, as on Windows")
        return real(name, globals, *rest, **named)  # type: ignore[arg-type]

    builtins.__import__ = bare_import  # type: ignore[assignment]


def run_bare(*words: str, folder: Path, cwd: Path) -> str:
    """What `python ...` puts out in a process that is bare from its start, as are all that it starts.

    Args:
        words: what follows `python`; it has to end well.
        folder: an empty one, which no other process uses.
    """
    (folder / "sitecustomize.py").write_text(STARTS)
    inherited = os.environ.get("PYTHONPATH")
    places = [str(folder), str(TESTS), str(TESTS.parent), *([inherited] if inherited else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
