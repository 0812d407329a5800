"""Faults that a user can repair. Everything else is a bug and keeps its traceback.

A message says where, what was found, what was expected and what to do. Faults are collected: one error may
carry many lines, so that a user can repair them all at once.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

_WRITABLE = "Give a folder that you may write to, such as with --work_dir; `autoseg doctor` checks it."

MACHINES_FAULTS = {
    errno.ENOSPC: "Free some space, or give a work_dir on another disk. The same command then goes on from here.",
    errno.EDQUOT: "Free some of your quota, or give a work_dir elsewhere. The same command then goes on from here.",
    errno.EACCES: _WRITABLE,
    errno.EPERM: _WRITABLE,
    errno.EROFS: _WRITABLE,
    errno.ENOTDIR: _WRITABLE,
    errno.ENAMETOOLONG: "Give a shorter name, or a folder nearer to the root.",
    errno.ELOOP: "Links lead in a circle. Correct them.",
    errno.EISDIR: "A file belongs there. Move the folder away; what was in the file is then made again.",
    errno.EFBIG: "Files may not grow so large here: see `ulimit -f`. The same command then goes on from here.",
    errno.ENOMEM: "Close other programs, or allow this one more memory. The same command then goes on from here.",
    errno.EMFILE: "Allow more open files: ulimit -n 4096. The same command then goes on from here.",
}
"""What the machine may refuse anywhere -> what to do about it."""


class AutosegError(Exception):
    """The root of all errors that a user can repair. The command line prints the message and exits with 2."""

    def __init__(self, messages: str | Iterable[str]) -> None:
        self.messages: tuple[str, ...] = (messages,) if isinstance(messages, str) else tuple(messages)
        super().__init__("\n".join(self.messages))


class ConfigError(AutosegError):
    """A setting, a flag, or a file of settings (input.yaml, datalist.json, a plan) is wrong."""


class DataError(AutosegError):
    """An image, a label or the data set as a whole cannot be used as it is."""


class WorkspaceError(AutosegError):
    """A stage is missing, stale, locked, or the work_dir belongs to something else."""


class ResourceError(AutosegError):
    """Memory, disk, a device or an optional package is missing."""


def some_of(words: Iterable[object], most: int = 12, separator: str = ", ") -> str:
    """Words side by side, the rest counted: "a, b and 3 more", or with another separator "a; b; and 3 more"."""
    texts = [str(w) for w in words]
    rest = f"{separator.rstrip(', ')} and {len(texts) - most} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + rest


def counted(number: int, word: str, many: str = "") -> str:
    """A number and its word in singular or plural, which is `many` or ends in an s."""
    return f"{number} {word if number == 1 else many or word + 's'}"
