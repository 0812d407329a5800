"""Seals: what files of a work_dir held when the stage that made them left them, so that damage and edits are noticed.

A seal is a small file beside what it covers. Whatever it names must have the digest that it has there; a folder of
version 0.1 has none, and is used without.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from autoseg.errors import WorkspaceError
from autoseg.version import __version__
from autoseg.workspace.stored import Stored, read_stored, write_stored

ON_PURPOSE = "Where it was changed on purpose, give the command --accept once."
"""What to do about a change that was wanted."""


class Seal(Stored):
    """What stands in a seal.json."""

    advice: ClassVar[str] = "Delete it to use the files beside it unchecked."

    version: str
    """Of autoseg that made the files."""
    digests: dict[str, str]
    """Name of what is covered -> its digest."""


def write_seal(path: Path, digests: Mapping[str, str]) -> None:
    """Store what files hold. Raises: OSError."""
    write_stored(path, Seal(version=__version__, digests=dict(digests)))


def broken_parts(path: Path, digests: Mapping[str, str]) -> list[str]:
    """Names of what does not hold what it did when it was sealed; none where there is no seal.

    Raises:
        WorkspaceError: The seal itself is damaged.
    """
    if not path.exists():
        return []
    sealed = read_stored(path, Seal).digests
    return [name for name, digest in digests.items() if sealed.get(name, digest) != digest]


def accept(path: Path, digests: Mapping[str, str]) -> None:
    """Seal files as they are now, after a user changed them on purpose.

    Raises:
        WorkspaceError: The seal cannot be written.
    """
    try:
        write_seal(path, digests)
    except OSError as error:
        raise WorkspaceError(
            f"{path}: cannot be written ({error.strerror or error}), so --accept has no effect. Copy the folder to "
            "where you may write, and use that."
        ) from error
