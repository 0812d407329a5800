"""The one reader of stored state: what a file under a work_dir holds becomes a typed object, or an error in a sentence.

The type of a file lies beside the code that owns it: a `Stored` model, or a mapping of such. A file that is cut off,
holds another type or an unknown key, or was written by a newer autoseg, is refused here for all of them alike.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from autoseg.config.nodes import load_plain
from autoseg.config.types import suggest
from autoseg.errors import WorkspaceError, some_of
from autoseg.version import __version__
from autoseg.workspace.files import PUBLIC, open_regular, write_json

T = TypeVar("T")
D = TypeVar("D")

REMEDY = "Undo the edit, or delete the file and run `autoseg run` again."
"""What to do about a file that cannot be read, where its type says nothing better."""
MOST_FAULTS = 3
"""Faults of one file that are named."""

Moment = Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]
"""Seconds since 1970, before the year 5000: what Python's calendar can show."""
Seconds = Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]
"""A duration."""
Score = float | None
"""None, or NaN in files of version 0.1: not counted."""


class Stored(BaseModel):
    """Base of what stands in a file under a work_dir: no unknown keys, no changes."""

    # Built when first used: a command reads few of the files, and building each model costs it milliseconds.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    advice: ClassVar[str] = REMEDY
    """What to do about a damaged file."""


@lru_cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def read_stored(path: Path, kind: type[T], *, remedy: str = "") -> T:
    """Read a JSON or YAML file (by its suffix) of a work_dir.

    Args:
        path: The file.
        kind: What it must hold: a `Stored` model, or a mapping or list of such.
        remedy: What to do about a damaged file; empty: as the model says.

    Raises:
        WorkspaceError: It is missing, cannot be read, is cut off or damaged, was written by a newer autoseg, or holds
            something else than `kind`.
    """
    remedy = remedy or getattr(kind, "advice", REMEDY)
    data = _parse(path, _read_text(path, remedy), remedy)
    refuse_newer(path, data)
    return check_stored(data, kind, str(path), remedy)


def read_stored_lines(path: Path, kind: type[T], *, remedy: str = "") -> list[T]:
    """Read a file that only grows, with a JSON object on each line; an empty list where it is missing.

    A line that is no JSON is left out: it is being written, or a crash cut it off.

    Raises:
        WorkspaceError: The file cannot be read, or a whole line holds something else than `kind`.
    """
    remedy = remedy or f"Delete the line, or the file: {getattr(kind, 'doc', 'the next command begins a new one')}."
    if not path.exists():
        return []
    values = []
    for number, text in enumerate(_read_text(path, remedy, errors="replace").splitlines(), 1):
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            continue
        values.append(check_stored(data, kind, f"{path}:{number}", remedy))
    return values


def check_stored(data: Any, kind: type[T], place: str, remedy: str = REMEDY) -> T:
    """Plain data as a type.

    Raises:
        WorkspaceError: It is something else; the message begins with `place` and ends with `remedy`.
    """
    try:
        value: T = _adapter(cast(Hashable, kind)).validate_python(data)
    except ValidationError as error:
        faults = [_words_of(item, kind) for item in error.errors(include_url=False, include_context=False)]
        raise WorkspaceError(f"{place}: {some_of(faults, MOST_FAULTS, '; ')}. {remedy}") from None
    return value


def write_stored(path: Path, value: BaseModel, *, mode: int = PUBLIC) -> None:
    """Write a model as JSON, atomically; `read_stored` gives an equal one."""
    write_json(path, value.model_dump(mode="json"), mode=mode)


def refuse_newer(path: Path, data: Any) -> None:
    """Refuse a file that says it was written by a newer autoseg.

    Raises:
        WorkspaceError: It was.
    """
    writer = data.get("version") if isinstance(data, dict) else None
    if isinstance(writer, str) and _release(writer) > _release(__version__):
        raise WorkspaceError(newer(path, writer))


def newer(path: Path, writer: str) -> str:
    """The message about a file that a newer autoseg has written."""
    return (
        f"{path}: written by autoseg {writer}, which is newer than this one ({__version__}). "
        f"Install autoseg {writer} or later, or give another work_dir."
    )


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version, such as 0.2.0 of 0.2.0.dev0; of anything else none, which is older than all."""
    match = re.match(r"[0-9]{1,9}(\.[0-9]{1,9})*", version)
    return tuple(int(number) for number in match[0].split(".")) if match else ()


def _read_text(path: Path, remedy: str, *, errors: str = "strict") -> str:
    try:
        with open_regular(path) as file:
            return file.read().decode(errors=errors)
    except FileNotFoundError:
        raise WorkspaceError(f"{path}: missing. Run the stage that writes it (see `autoseg status`).") from None
    except UnicodeDecodeError as error:
        raise WorkspaceError(f"{path}: damaged: byte {error.start} is not UTF-8 text. {remedy}") from None
    except OSError as error:
        raise WorkspaceError(
            f"{path}: cannot be read ({error.strerror}). Check what it is and its permissions."
        ) from None


def _parse(path: Path, text: str, remedy: str) -> Any:
    """Plain data out of JSON or YAML."""
    if path.suffix == ".yaml":
        try:
            return load_plain(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            words = " ".join(str(error).split())[:200]
            raise WorkspaceError(f"{path}: cut off or damaged: not valid YAML ({words}). {remedy}") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise WorkspaceError(f"{path}: cut off or damaged: not valid JSON ({place}). {remedy}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or lists nested as deep
        raise WorkspaceError(f"{path}: damaged: {error}. {remedy}") from None


def _words_of(item: Mapping[str, Any], kind: Any) -> str:
    """One finding of pydantic in the words of autoseg: where, what was found, what was expected."""
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = list(getattr(kind, "model_fields", {})) if len(item["loc"]) == 1 else []
        return f"unknown key {where}{f' ({suggest(where, known).rstrip(chr(46))})' if known else ''}"
    if item["type"] == "missing":
        return f"{where} is missing"
    expected = str(item["msg"]).replace("Input should be", "expected").removeprefix("Value error, ")
    expected = re.sub(r"\b(a )?(valid )?dictionary( or instance of \w+)?", "an object of names and values", expected)
    shown = repr(item["input"])
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    prefix = f"{where}: " if where else ""
    return f"{prefix}found {shown}, {expected[:200]}" if expected.startswith("expected") else f"{prefix}{expected}"


class Unreadable:
    """Reads on where files cannot be read, and keeps what is to be said of them; for commands that only show."""

    def __init__(self) -> None:
        """None so far."""
        self.messages: list[str] = []

    def or_else(self, default: D, read: Callable[[], T]) -> T | D:
        """What `read` returns, or the default where it meets a file that cannot be read."""
        try:
            return read()
        except WorkspaceError as error:
            self.messages += [message for message in error.messages if message not in self.messages]
            return default
