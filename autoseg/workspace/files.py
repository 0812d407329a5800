"""Files of a work_dir: atomic writes, digests, logs."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a text file; none where it is missing."""
    try:
        with open(path, "rb") as file:
            return _tail(file).decode(errors="replace").splitlines()[-count:]
    except FileNotFoundError:
        return []


def _tail(file: IO[bytes], size: int = 65536) -> bytes:
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - size))
    return file.read()


def write_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that after a crash either the old or the new one is there, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two machines may have processes of one number.
    part = path.with_name(f".part-{uuid.uuid4().hex[:12]}-{path.name}")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomic(path, lambda file: file.write(text.encode()))


def write_json(path: Path, data: Any) -> None:
    """Write plain data as JSON, atomically."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def write_yaml(path: Path, data: Any) -> None:
    """Write plain data as YAML, keys in their order, short lists on one line; atomically."""
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    write_text(path, yaml.dump(data, Dumper=dumper, sort_keys=False, default_flow_style=None, width=120))


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Copy the package's log into a file, with the time before each line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger = logging.getLogger("autoseg")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def digest(data: Any) -> str:
    """A short, stable digest of plain data."""
    text = json.dumps(data, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
