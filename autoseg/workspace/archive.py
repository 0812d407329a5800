"""A packed model: the parts of a run that predict, in one zip or one folder, named by a manifest with their SHA-256.

Parts lie as in a work_dir, the weights as safetensors, which can hold nothing but tensors. A zip may come from a
stranger: nothing of it is written anywhere before names, kinds and sizes of all entries are known to be right, and
nothing is used before every digest is. Entries are stored uncompressed, so that no small file can be a large one.
The digests tell damage; they do not tell who made a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import struct
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, ClassVar

from pydantic import Field

from autoseg.config.networks import NETWORKS
from autoseg.errors import AutosegError, WorkspaceError
from autoseg.terminal import printable
from autoseg.version import __version__
from autoseg.workspace.files import check_inside, open_new, open_regular
from autoseg.workspace.stored import Stored, check_stored, refuse_newer

FORMAT = 1
"""Of the files that this version packs. Raise it where an older autoseg would read a new file wrongly."""
MANIFEST = "manifest.json"
_JOB = rf"(?:{'|'.join(NETWORKS)})_(?:0|[1-9][0-9]{{0,3}})"
PART = re.compile(
    r"README\.md|LICENSE|labels\.json|settings\.yaml|ensemble/(?:ensemble|quality)\.json|"
    rf"{_JOB}/(?:job\.json|validation\.json|configs/hyper_parameters\.yaml|models/model\.safetensors)"
)
"""The names that a part may have."""
WEIGHTS = ".safetensors"
MOST_PARTS = 2000
"""Parts of a packed model: some 500 jobs."""
MOST_TEXT = 16 << 20
"""Bytes of a part that is read as text; the largest plan, of 500 classes, has a hundredth of it."""
MOST_DIRECTORY = 1 << 20
"""Bytes of a zip's table of contents. Python holds ten times as much for it."""
PIECE = 1 << 20
AGAIN = "Ask for it again, or pack it anew: `autoseg pack --work_dir W --output m.zip`."
_ZIP_FAULTS = (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, OverflowError, EOFError, struct.error)
"""What Python's reader raises on files that are no zips, or damaged ones."""


class Part(Stored):
    """One part of a packed model."""

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0, le=1 << 50)]


class Manifest(Stored):
    """What stands in manifest.json."""

    advice: ClassVar[str] = AGAIN

    format: int
    """Of the packed model; see `FORMAT`."""
    version: str
    """Of autoseg that packed it."""
    name: str
    """Of the run, or of its ensemble."""
    parts: dict[str, Part]
    """Every part but the manifest itself."""


def is_packed(path: Path) -> bool:
    """Whether a path is a packed model, or a file that should be one, and no work_dir."""
    return (path / MANIFEST).is_file() or (path.exists() and not path.is_dir())


@contextmanager
def opened_model(path: Path) -> Iterator[Path]:
    """The folder of a model for as long as it is read: a work_dir itself, or what a packed model holds, checked.

    Args:
        path: a work_dir, or a packed model; a zip is unpacked into a folder that only this user can read, and that
            is removed at the end.

    Raises:
        WorkspaceError: The packed model is damaged, hostile, or of a newer autoseg. What is said within about files of
            the unpacked folder names the zip.
    """
    if not is_packed(path):
        yield path
        return
    if path.is_dir():
        _check_folder(path)
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="autoseg-") as folder:
        _unpack(path, Path(folder))
        try:
            yield Path(folder)
        except AutosegError as error:
            raise type(error)([message.replace(folder, str(path)) for message in error.messages]) from error


def parse_manifest(data: bytes, place: str) -> Manifest:
    """Read a manifest.

    Raises:
        WorkspaceError: It is damaged, or of a newer format.
    """
    try:
        raw = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        words = " ".join(str(error).split())[:100]
        raise WorkspaceError(f"{place}: {MANIFEST}: not valid JSON ({words}). {AGAIN}") from None
    number = raw.get("format") if isinstance(raw, dict) else None
    if isinstance(number, int) and number > FORMAT:
        writer = printable(str(raw.get("version", "of a later version")))[:40]
        raise WorkspaceError(
            f"{place}: a packed model of format {number}, made by autoseg {writer}; this one ({__version__}) reads "
            f"up to {FORMAT}. Install autoseg {writer} or later."
        )
    refuse_newer(Path(place), raw)
    return check_stored(raw, Manifest, f"{place}: {MANIFEST}", AGAIN)


def _fault(place: Path, what: str) -> WorkspaceError:
    return WorkspaceError(f"{place}: {printable(what, one_line=True)}. Nothing of it is used. {AGAIN}")


# -- a zip


def _unpack(path: Path, folder: Path) -> None:
    """Write what a zip holds into an empty folder, after all of it was found to be right.

    Raises:
        WorkspaceError: It is not.
    """
    try:
        with open_regular(path) as file:
            _check_directory_size(path, file)
            with zipfile.ZipFile(file) as archive:
                entries = _entries(path, archive.infolist(), os.fstat(file.fileno()).st_size)
                manifest = parse_manifest(_read_manifest(path, archive, entries), str(path))
                _check_names(path, manifest, {name: entry.file_size for name, entry in entries.items()})
                for name, part in manifest.parts.items():
                    with archive.open(entries[name]) as source:
                        _copy(path, name, source, folder / name, part)
    except _ZIP_FAULTS as error:
        words = " ".join(str(error).split())[:100]
        raise _fault(path, f"not a zip, cut off, or damaged ({words})") from None
    except PermissionError:
        raise WorkspaceError(f"{path}: may not be read. Check its permissions.") from None


def _check_directory_size(path: Path, file: IO[bytes]) -> None:
    """Refuse a table of contents that is too long to be read.

    Its length stands in the last record of a zip, and for one of over 4 GiB in another before it (APPNOTE.TXT 4.3.14
    to 4.3.16). A comment at the end is refused, so that the record is where it is looked for.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 42))
    tail = file.read(42)
    if len(tail) < 22 or tail[-22:-18] != b"PK\5\6":
        raise _fault(path, "not a zip, cut off, or with something behind its end")
    num_entries, length = struct.unpack("<HI", tail[-12:-10] + tail[-10:-6])
    if len(tail) == 42 and tail[:4] == b"PK\6\7":
        (place,) = struct.unpack("<Q", tail[8:16])
        file.seek(min(place, size))
        record = file.read(56)
        if len(record) < 56 or record[:4] != b"PK\6\6":
            raise _fault(path, "not a zip, cut off, or damaged (the record of its length is not where it should be)")
        num_entries, length = struct.unpack("<QQ", record[32:48])
    if num_entries > MOST_PARTS or length > MOST_DIRECTORY:
        raise _fault(path, f"{num_entries} entries in a table of {length} bytes, expected at most {MOST_PARTS}")
    file.seek(0)


def _entries(path: Path, infos: list[zipfile.ZipInfo], size: int) -> dict[str, zipfile.ZipInfo]:
    """The entries of a zip by name.

    Raises:
        WorkspaceError: One has a name that leads elsewhere, is no plain file, or is larger than the zip can hold.
    """
    names = Counter(info.orig_filename for info in infos)
    for info in infos:
        name = info.orig_filename
        if reason := _unsafe(name):
            raise _fault(path, f"the entry {name[:80]!r} {reason}")
        if names[name] > 1:
            raise _fault(path, f"the entry {name[:80]!r} is there {names[name]} times")
        if info.flag_bits & 0x2041:  # encrypted, strongly, or its table of contents: APPNOTE.TXT 4.4.4
            raise _fault(path, f"the entry {name[:80]!r} is encrypted")
        if (kind := stat.S_IFMT(info.external_attr >> 16)) not in (0, stat.S_IFREG):
            raise _fault(path, f"the entry {name[:80]!r} is {'a link' if kind == stat.S_IFLNK else 'no plain file'}")
        if info.compress_type != zipfile.ZIP_STORED:
            raise _fault(path, f"the entry {name[:80]!r} is compressed; parts of a model are stored as they are")
        if info.file_size != info.compress_size or info.file_size > size:
            raise _fault(path, f"the entry {name[:80]!r} says it has {info.file_size} bytes, more than the file holds")
    if sum(info.file_size for info in infos) > size:
        raise _fault(path, "its entries say they have more bytes than the file, so they lie over each other")
    return {info.orig_filename: info for info in infos}


def _unsafe(name: str) -> str:
    """Why a name may lead out of the folder that it is to be written into; empty: it does not."""
    if not name or any(ord(c) < 32 for c in name):
        return "has no name, or a control character in it"
    if name.startswith("/") or re.match("[A-Za-z]:", name):
        return "has an absolute path"
    if "\\" in name:
        return "has a backslash in its path"
    return "leads out of the folder" if ".." in name.split("/") else ""


def _read_manifest(path: Path, archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo]) -> bytes:
    if MANIFEST not in entries:
        raise _fault(path, f"a zip without {MANIFEST}, so no packed model")
    if entries[MANIFEST].file_size > MOST_TEXT:
        raise _fault(path, f"{MANIFEST} has {entries[MANIFEST].file_size} bytes, expected at most {MOST_TEXT}")
    return archive.read(entries[MANIFEST])


def _check_names(path: Path, manifest: Manifest, sizes: dict[str, int]) -> None:
    """Make sure that a manifest names what is there, and nothing that is no part of a model."""
    named = manifest.parts
    if extra := sorted({*sizes} - {*named, MANIFEST}):
        raise _fault(path, f"holds {extra[0][:80]!r}, which {MANIFEST} does not name")
    if strange := next((name for name in named if not PART.fullmatch(name)), ""):
        raise _fault(path, f"{MANIFEST} names {strange[:80]!r}, which is no part of a model")
    if missing := sorted({*named} - {*sizes}):
        raise _fault(path, f"{missing[0]} is missing")
    for name, part in named.items():
        if part.bytes != sizes[name]:
            raise _fault(path, f"{name} has {sizes[name]} bytes, but {part.bytes} when it was packed")
        if part.bytes > MOST_TEXT and not name.endswith(WEIGHTS):
            raise _fault(path, f"{name} has {part.bytes} bytes, expected at most {MOST_TEXT}")


def _copy(path: Path, name: str, source: IO[bytes], target: Path, part: Part) -> None:
    """Write a part, made sure to have the digest that it was packed with."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open_new(target, mode=0o600) as file:
        _check_digest(path, name, source, part, file)


def _check_digest(path: Path, name: str, source: IO[bytes], part: Part, copy: IO[bytes] | None = None) -> None:
    hasher = hashlib.sha256()
    while piece := source.read(PIECE):
        hasher.update(piece)
        if copy is not None:
            copy.write(piece)
    if hasher.hexdigest() != part.sha256:
        raise _fault(path, f"{name} is not what was packed: its SHA-256 differs, so it is damaged or was replaced")


# -- a folder


def _check_folder(folder: Path) -> None:
    """Make sure that a folder holds the parts that its manifest names, as they were packed; other files are let be.

    Raises:
        WorkspaceError: It does not, or links lead out of it.
    """
    check_inside(folder)
    try:
        with open_regular(folder / MANIFEST) as file:
            manifest = parse_manifest(file.read(MOST_TEXT), str(folder))
        sizes = {name: (folder / name).stat().st_size for name in manifest.parts if (folder / name).is_file()}
        _check_names(folder, manifest, sizes)
        for name, part in manifest.parts.items():
            with open_regular(folder / name) as file:
                _check_digest(folder, name, file, part)
    except OSError as error:
        raise _fault(folder, f"{Path(error.filename or MANIFEST).name} cannot be read ({error.strerror})") from None
