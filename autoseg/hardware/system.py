"""What Linux, macOS and Windows do differently, in one place: the rest of the package asks here.

Linux alone forks safely and lets a process end with its parent. Windows has no fork, no signals between processes
but Ctrl-Break, no `resource`, no flags against links in `open`, and text files unless one asks for bytes; and it does
not replace a file that somebody has open.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

PR_SET_PDEATHSIG = 1
"""Source: prctl(2)."""
NUM_REPLACE_TRIES, REPLACE_PAUSE_S = 40, 0.05
"""On Windows a reader keeps a file open for milliseconds; a scanner of viruses for up to a second or two."""


def is_windows() -> bool:
    """Whether this is Windows."""
    return os.name == "nt"


def _resource() -> Any:
    """Python's module of limits; None on Windows, which has none."""
    try:
        import resource
    except ImportError:
        return None
    return resource


# -- processes


def can_fork() -> bool:
    """Whether processes may be forked: on macOS the system's own libraries do not survive it."""
    return sys.platform.startswith("linux") and hasattr(os, "fork")


def end_with_parent(parent: int) -> None:
    """Let this process be killed when its parent dies, where the system can (Linux); end where it is dead already.

    Args:
        parent: its process number, as the parent knew it before this process began.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def cores_allowed() -> list[int]:
    """Numbers of the cores this process may run on; all where the system does not tell (macOS, Windows)."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def num_cores_allowed() -> int:
    """How many they are."""
    return len(cores_allowed())


def peak_memory_bytes() -> int | None:
    """Highest memory of this process and of its largest child that has ended; None where the system does not tell."""
    resource = _resource()
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(resource.getrusage(w).ru_maxrss for w in who) * unit


def open_files_limit() -> tuple[float, float] | None:
    """Files this process may have open at once, now and at most; inf: no limit; None where there is no such limit."""
    resource = _resource()
    if resource is None:
        return None
    soft, hard = (
        float("inf") if limit == resource.RLIM_INFINITY else limit
        for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    return soft, hard


def address_space_limit_bytes() -> int | None:
    """Addresses this process may use, as `ulimit -v` sets them; None where there is no such limit."""
    resource = _resource()
    if resource is None or not hasattr(resource, "RLIMIT_AS"):
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else int(limit)


# -- signals


def stop_signals() -> tuple[signal.Signals, ...]:
    """Signals that ask a process to save and end: SIGTERM, Ctrl-C, and Ctrl-Break where there is one."""
    return (signal.SIGTERM, signal.SIGINT, *([signal.Signals(signal.SIGBREAK)] if hasattr(signal, "SIGBREAK") else []))


def own_session() -> dict[str, Any]:
    """Arguments of Popen for a process that a terminal's Ctrl-C does not reach, but `ask_to_stop` does."""
    if is_windows():
        return {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
    return {"start_new_session": True}


def ask_to_stop(process: subprocess.Popen[bytes]) -> None:
    """Ask a process begun with `own_session` to save and end. On Windows SIGTERM would kill it at once."""
    process.send_signal(getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM) if is_windows() else signal.SIGTERM)


def stop_this_process() -> None:
    """Do what SIGTERM from outside does, from any thread of this process."""
    if is_windows():
        signal.raise_signal(signal.SIGTERM)
    else:
        os.kill(os.getpid(), signal.SIGTERM)


def interrupt_main_thread() -> None:
    """Do from another thread what Ctrl-C does; it ends a sleep of the main thread, too."""
    main = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main is not None:
        signal.pthread_kill(main, signal.SIGINT)
    else:
        signal.raise_signal(signal.SIGINT)


# -- files


def open_descriptor(path: Path, flags: int, mode: int = 0o666, *, follow: bool = True) -> int:
    """`os.open` for bytes; not inherited by children, not blocked by a pipe, and through no link where that is said.

    Raises:
        OSError: As `os.open`; `errno.ELOOP`: a link that is not followed.
    """
    flags |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    if not follow:
        if not hasattr(os, "O_NOFOLLOW") and path.is_symlink():  # looked at before: the best that can be done there
            raise OSError(errno.ELOOP, "is a link", str(path))
        flags |= getattr(os, "O_NOFOLLOW", 0)
    return os.open(path, flags, mode)


def set_mode(descriptor: int, path: Path, mode: int) -> None:
    """Set the permissions of an open file."""
    if hasattr(os, "fchmod"):
        os.fchmod(descriptor, mode)
    else:
        os.chmod(path, mode)


def lock(descriptor: int) -> None:
    """Lock an open file for as long as it is open; a killed process holds no lock.

    Raises:
        OSError: Another process has it open and locked, or there are no such locks (Windows).
    """
    try:
        import fcntl
    except ImportError:
        raise OSError(errno.ENOTSUP, "this system has no locks that end with a process") from None
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def let_go(file: IO[bytes]) -> None:
    """Close a file that is renamed or removed next, where that cannot be done with one that is open (Windows)."""
    if is_windows():
        file.close()


def replace(source: Path, target: Path) -> None:
    """`os.replace`; on Windows tried for two seconds where somebody has the target open.

    Raises:
        OSError: As `os.replace`.
    """
    for left in reversed(range(NUM_REPLACE_TRIES if is_windows() else 1)):
        try:
            os.replace(source, target)
        except PermissionError:
            if not left:
                raise
            time.sleep(REPLACE_PAUSE_S)
        else:
            return
