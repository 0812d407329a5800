"""Faults that a user can repair. Everything else is a bug and keeps its traceback.

A message says where, what was found, what was expected and what to do. Faults are collected: one error may
carry many lines, so that a user can repair them all at once.
"""

from __future__ import annotations

from collections.abc import Iterable


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
