"""Files of a work_dir: how they are opened, atomic writes, digests, logs.

A work_dir may come from a stranger, or lie where others can write. What stands at a path is therefore never trusted:
nothing is written through a link, and nothing is read from a pipe or a device, which could block for ever.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import yaml

from autoseg.errors import ConfigError, WorkspaceError
from autoseg.hardware.system import let_go, lock, open_descriptor, replace, set_mode
from autoseg.terminal import LineFormatter

PUBLIC, SECRET = 0o666, 0o600
"""Permissions of new files: as the user's umask has it; the user's alone, where passwords may stand in them."""
_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}
HALF = ".part-"
"""How the names of files begin that are being written."""
_OF_THIS_MACHINE = HALF + hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]
STRANGERS_HALF_S = 24 * 3600.0
"""Age at which a half of another machine's was surely left by a process that is gone: no file takes a day to write."""
MOST_NAMED = 3
"""Links that a message names."""


class SpecialFileError(OSError):
    """A pipe, a device or a socket where a file was expected; `strerror` says which."""


# -- opening


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are not there.

    Raises:
        OSError: It cannot be made; `PermissionError` also where the system says that a folder above is missing, as it
            does below /proc.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:
        raise PermissionError(errno.EACCES, "no folder can be made here", error.filename) from error


def open_regular(path: Path, *, follow: bool = True) -> IO[bytes]:
    """Open a file for reading; never a pipe, a device or a socket.

    Args:
        path: the file.
        follow: whether it may be a link, as images often are.

    Raises:
        SpecialFileError: It is none of a file's kind.
        OSError: As `open`; a link that is not followed has `errno.ELOOP`.
    """
    # Looked at before it is opened, since opening a device may act on it, and after it, since it may have changed.
    _check_regular(path, os.stat(path, follow_symlinks=follow).st_mode)
    descriptor = open_descriptor(path, os.O_RDONLY, follow=follow)
    try:
        _check_regular(path, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _check_regular(path: Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if stat.S_ISLNK(mode):
        raise OSError(errno.ELOOP, "is a link", str(path))
    if not stat.S_ISREG(mode):
        raise SpecialFileError(errno.EINVAL, f"is {_KINDS.get(stat.S_IFMT(mode), 'no file')}, not a file", str(path))


def open_append(path: Path, *, mode: int = PUBLIC) -> IO[bytes]:
    """Open a file that only grows, made where it is missing, unbuffered: each write is one piece at its end.

    Args:
        path: the file.
        mode: its permissions where it is made; `SECRET` also takes rights away from one that is there.

    Raises:
        WorkspaceError: A link, a pipe or a device stands there.
        OSError: It cannot be made or written to.
    """
    make_folder(path.parent)
    try:
        descriptor = open_descriptor(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, mode, follow=False)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a pipe that nobody reads
            raise WorkspaceError(_not_ours(path)) from None
        raise
    try:
        kind = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(kind):
            raise WorkspaceError(_not_ours(path))
        if mode == SECRET and stat.S_IMODE(kind) & ~SECRET:
            set_mode(descriptor, path, SECRET)
        return os.fdopen(descriptor, "ab", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def open_new(path: Path, *, mode: int = PUBLIC) -> IO[bytes]:
    """Make a file and open it for writing; nothing may stand there, not even a link that leads nowhere.

    Raises:
        OSError: As `open`; FileExistsError: something stands there.
    """
    descriptor = open_descriptor(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode, follow=False)
    return os.fdopen(descriptor, "w+b")


def open_half(path: Path, *, mode: int = PUBLIC) -> tuple[Path, IO[bytes]]:
    """Open a new file beside a path, to be written and then moved there.

    It is locked as long as it is open, so that one which a killed process left can be told from one that is being
    written; see `remove_halves`. Without a name of its own (`O_TMPFILE`) it could not be moved over an older file.

    Returns:
        Its path, and the file.

    Raises:
        OSError: As `open_new`.
    """
    while True:
        half = path.with_name(_OF_THIS_MACHINE + uuid.uuid4().hex[:12])  # short: as long as every file system takes
        file = open_new(half, mode=mode)
        with suppress(OSError):  # no locks here; or `remove_halves` looks at it just now
            lock(file.fileno())
        if os.fstat(file.fileno()).st_nlink:
            return half, file
        file.close()  # it was taken away before it was locked


def remove_halves(halves: Iterable[Path]) -> None:
    """Remove files that nobody writes any more, as a killed process leaves them.

    Args:
        halves: paths whose names begin with `HALF`.
    """
    for path in halves:
        try:
            descriptor = open_descriptor(path, os.O_RDWR, follow=False)
        except OSError:
            continue
        try:
            # On some file systems a lock is only seen by the machine that has it.
            is_ours = path.name.startswith(_OF_THIS_MACHINE)
            if is_ours or time.time() - os.fstat(descriptor).st_mtime > STRANGERS_HALF_S:
                lock(descriptor)
                path.unlink()
        except OSError:  # it is being written, or cannot be locked
            continue
        finally:
            os.close(descriptor)


def _not_ours(path: Path) -> str:
    return f"{path}: a link, a pipe or a device, to which nothing is written. Expected a file. Remove it."


def is_beneath(path: Path, root: Path) -> bool:
    """Whether a path lies in a folder, once all links are followed."""
    real = os.path.realpath(root)
    return os.path.commonpath([real, os.path.realpath(path)]) == real


def check_inside(root: Path, folder: Path | None = None) -> list[Path]:
    """Refuse a work_dir with links that lead out of it, through which its files would be read or written elsewhere.

    Args:
        root: the work_dir.
        folder: the only folder of it to look through; None: all.

    Returns:
        Files there that are being written, or were left by a process that was killed while it wrote them.

    Raises:
        WorkspaceError: There are some, or pipes, devices or sockets.
    """
    faults: list[str] = []
    halves: list[Path] = []
    folders = [os.path.realpath(folder or root)]
    while folders:
        try:
            entries = list(os.scandir(folders.pop()))
        except OSError:  # it cannot be read: whatever is to be written there says so
            continue
        for entry in entries:
            if entry.is_symlink():
                if entry.name.endswith(".journal.lock"):  # Optuna's, made and removed at any time; nobody opens it
                    continue
                with suppress(FileNotFoundError):  # it is gone again
                    if not is_beneath(Path(entry.path), root):
                        leads_to = os.path.realpath(entry.path)
                        faults.append(f"{entry.path}: a link that leads out of the work_dir, to {leads_to}.")
            elif entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif not entry.is_file(follow_symlinks=False):
                faults.append(f"{entry.path}: a pipe, a device or a socket.")
            elif entry.name.startswith(HALF):
                halves.append(Path(entry.path))
    if faults:
        more = [f"{root}: {len(faults) - MOST_NAMED} more of these."] if len(faults) > MOST_NAMED else []
        advice = (
            "Nothing is read or written outside the work_dir: put a folder or file there, or give another work_dir."
        )
        raise WorkspaceError([*(f"{fault} {advice}" for fault in sorted(faults)[:MOST_NAMED]), *more])
    return halves


# -- reading and writing


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder in the order of their names; hidden ones are left out."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a text file; none where it is missing, or is a link, a pipe or a device."""
    try:
        with open_regular(path, follow=False) as file:
            return _tail(file).decode(errors="replace").splitlines()[-count:]
    except FileNotFoundError:
        return []
    except OSError as error:
        return [f"cannot be read: {error.strerror}"]


def _tail(file: IO[bytes], size: int = 65536) -> bytes:
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - size))
    return file.read()


def write_atomic(path: Path, write: Callable[[IO[bytes]], object], *, mode: int = PUBLIC) -> None:
    """Write a file so that after a crash either the old or the new one is there, never half of one.

    A link that stands there is replaced, not followed.
    """
    make_folder(path.parent)
    half, file = open_half(path, mode=mode)
    try:
        with file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            let_go(file)
            replace(half, path)  # before it is closed, and with it the lock gone
    finally:
        half.unlink(missing_ok=True)


@contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which is moved to a path where nothing stands yet; nothing is left where it is not filled."""
    half = path.absolute().with_name(HALF + uuid.uuid4().hex[:12])
    make_folder(half)
    try:
        yield half
        os.rename(half, path)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def write_text(path: Path, text: str, *, mode: int = PUBLIC) -> None:
    """Write a text file atomically."""
    write_atomic(path, lambda file: file.write(text.encode()), mode=mode)


def write_output(path: Path, text: str) -> None:
    """Write a text file where the user wants it.

    Raises:
        ConfigError: It cannot be written there.
    """
    try:
        write_text(path, text)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"--output: {path} cannot be written ({reason}). Give a file in a folder that you own."
        ) from error


def append_text(path: Path, text: str, *, mode: int = PUBLIC) -> None:
    """Add text at the end of a file that only grows, in one write: lines of several processes do not mix.

    Raises:
        WorkspaceError, OSError: As `open_append`.
    """
    with open_append(path, mode=mode) as file:
        file.write(text.encode())


def write_json(path: Path, data: Any, *, mode: int = PUBLIC) -> None:
    """Write plain data as JSON, atomically."""
    write_text(path, json_text(data), mode=mode)


def json_text(data: Any) -> str:
    """Plain data as `write_json` writes it."""
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def write_yaml(path: Path, data: Any, *, mode: int = PUBLIC) -> None:
    """Write plain data as YAML, keys in their order, short lists on one line; atomically."""
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    write_text(path, yaml.dump(data, Dumper=dumper, sort_keys=False, default_flow_style=None, width=120), mode=mode)


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Copy the package's log into a file, with the time before each line."""
    handler = logging.StreamHandler(
        io.TextIOWrapper(open_append(path), "utf-8", errors="backslashreplace", write_through=True)
    )
    handler.setFormatter(LineFormatter("%(asctime)s %(mark)s%(message)s", "%Y-%m-%d %H:%M:%S"))
    logger = logging.getLogger("autoseg")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
        handler.stream.close()


def digest(data: Any) -> str:
    """A short, stable digest of plain data."""
    text = json.dumps(data, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_digest(name: str) -> bool:
    """Whether a name is one that `digest` gives."""
    return len(name) == 16 and not {*name} - {*"0123456789abcdef"}
