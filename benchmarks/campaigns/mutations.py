"""Damage: of NIfTI files by bytes and fields, of settings and lists by values, of finished work_dirs."""

from __future__ import annotations

import copy
import gzip
import io
import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

nibabel.imageglobals.logger.setLevel(60)  # what it repairs while it reads is not our subject

# -- NIfTI

HEADER_FIELDS: dict[str, tuple[Any, ...]] = {
    "sizeof_hdr": (0, 1, 347, 540, -348),
    "dim": ((0,) * 8, (3, 0, 0, 0, 0, 0, 0, 0), (-1,) * 8, (3, 32767, 32767, 32767, 1, 1, 1, 1), (7,) + (2,) * 7),
    "datatype": (0, 1, 3, 8, 64, 128, 512, 1536, 1792, 2304, 4096, -1),
    "bitpix": (0, 1, 8, 64, -16),
    "pixdim": (
        (0,) * 8,
        (np.nan,) * 8,
        (1, np.inf, 1, 1, 1, 1, 1, 1),
        (-1, 1, 1, 1, 1, 1, 1, 1),
        (1, 1e-9, 1, 1, 1, 1, 1, 1),
    ),
    "vox_offset": (0, 1, 351, 353, 1e9, np.nan, -352),
    "scl_slope": (0, np.nan, np.inf, -1, 1e38, 1e-38, 2.5),
    "scl_inter": (np.nan, np.inf, 1e38, -1024),
    "qform_code": (0, 1, 2, 5, -1, 32767),
    "sform_code": (0, 1, 2, 5, -1, 32767),
    "srow_x": ((0, 0, 0, 0), (np.nan,) * 4, (1e30, 0, 0, 0), (1, 1, 1, 1)),
    "srow_z": ((0, 0, 0, 0), (0, 0, -1, 0), (0, np.inf, 0, 0)),
    "quatern_b": (np.nan, 2.0, -1.0),
    "xyzt_units": (0, 1, 3, 255),
    "magic": (b"", b"ni1", b"n+2", b"xxxx"),
    "intent_code": (1002, 1007, 2000, -1),
}
"""Fields of a header -> values that are wrong, rare, or allowed and seldom seen."""


NIFTI_DAMAGES = ("field", "field", "fields", "header bytes", "voxel bytes", "cut", "added", "packed bytes", "suffix")


def nifti_seeds(image: Path) -> dict[str, bytes]:
    """One volume as several files, unpacked: its types, byte orders, versions, scalings."""
    loaded = nibabel.load(image)
    voxels, affine = np.asarray(loaded.dataobj), loaded.affine
    seeds = {}
    for kind in ("i2", "u1", "f4", "f8", "u2", "i4"):
        data = np.clip(voxels, 0, 255 if kind == "u1" else 32767).astype(kind)
        seeds[kind] = nibabel.Nifti1Image(data, affine).to_bytes()
    big = nibabel.Nifti1Header(endianness=">")
    big.set_data_dtype(">i2")
    seeds["big endian"] = nibabel.Nifti1Image(voxels.astype(">i2"), affine, header=big).to_bytes()
    seeds["NIfTI-2"] = nibabel.Nifti2Image(voxels.astype("i2"), affine).to_bytes()
    scaled = nibabel.Nifti1Image(voxels.astype("i2"), affine)
    scaled.header.set_slope_inter(2.0, -100.0)
    seeds["scaled"] = scaled.to_bytes()
    seeds["4D"] = nibabel.Nifti1Image(voxels.astype("i2")[..., None], affine).to_bytes()
    return seeds


def damaged_nifti(seeds: dict[str, bytes], rng: random.Random) -> tuple[str, bytes, str]:
    """What was done, the file's bytes, and its suffix."""
    name = rng.choice(sorted(seeds))
    raw = bytearray(seeds[name])
    zipped = rng.random() < 0.6
    what = rng.choice(NIFTI_DAMAGES)
    if what in ("field", "fields"):
        words = [set_field(raw, rng) for _ in range(1 if what == "field" else rng.randint(2, 4))]
        what = ", ".join(words)
    elif what == "header bytes":
        for _ in range(rng.randint(1, 6)):
            raw[rng.randrange(352)] = rng.randrange(256)
    elif what == "voxel bytes":
        for _ in range(rng.randint(1, 40)):
            raw[rng.randrange(352, len(raw))] = rng.randrange(256)
    elif what == "cut":
        raw = raw[: rng.randrange(len(raw))]
    elif what == "added":
        raw += rng.randbytes(rng.choice((1, 352, 5000)))
    data = gzip.compress(bytes(raw), 1, mtime=0) if zipped else bytes(raw)
    if what == "packed bytes":
        data = damaged_stream(gzip.compress(bytes(raw), 1, mtime=0), rng)
        zipped = True
    ending = zipped if what != "suffix" else not zipped
    return f"{name}: {what}{', gzip' if zipped else ''}", data, ".nii.gz" if ending else ".nii"


def damaged_stream(data: bytes, rng: random.Random) -> bytes:
    """A gzip stream with some bytes changed, cut, doubled or taken out."""
    stream = bytearray(data)
    kind = rng.randrange(6)
    place = rng.randrange(len(stream))
    if kind == 0:
        for _ in range(rng.randint(1, 4)):
            stream[rng.randrange(len(stream))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del stream[place:]
    elif kind == 2:
        del stream[place : place + rng.randint(1, 64)]
    elif kind == 3:
        stream[-rng.randint(1, 8)] ^= 0xFF  # checksum and length
    elif kind == 4:
        stream += rng.choice((bytes(100), b"x" * 100, gzip.compress(b"more"), data))
    else:
        stream[place:place] = rng.randbytes(rng.randint(1, 64))
    return bytes(stream)


def set_field(raw: bytearray, rng: random.Random) -> str:
    """Set one field of a header; says which."""
    version2 = int.from_bytes(raw[:4], "little") == 540
    header_class = nibabel.Nifti2Header if version2 else nibabel.Nifti1Header
    size = 540 if version2 else 348
    try:
        header = header_class(bytes(raw[:size]), check=False)
    except Exception:  # noqa: BLE001 - an earlier field made it unreadable
        return "unreadable already"
    field = rng.choice(sorted(HEADER_FIELDS))
    value = rng.choice(HEADER_FIELDS[field])
    with np.errstate(all="ignore"):
        try:
            header[field] = value
        except (OverflowError, ValueError):
            return f"{field} unchanged"
    raw[:size] = header.binaryblock
    return f"{field}={value}"


def strictly_read(data: bytes) -> tuple[np.ndarray, np.ndarray] | None:
    """Voxels (I, J, K) float64 and affine as nibabel has them from the whole, sound bytes; None where it refuses.

    Raises:
        ValueError: The gzip stream is damaged, so whoever reads voxels from it reads what nobody wrote.
    """
    try:
        raw = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except Exception as error:
        raise ValueError(str(error)) from error
    for kind in (nibabel.Nifti1Image, nibabel.Nifti2Image):
        try:
            with np.errstate(all="ignore"):
                image = kind.from_stream(io.BytesIO(with_offset(raw, kind.header_class)))
                voxels = np.asarray(image.dataobj, np.float64)
        except Exception:  # noqa: BLE001 - the other version, or a file that it refuses
            continue
        while voxels.ndim > 3 and voxels.shape[-1] == 1:
            voxels = voxels[..., 0]
        return (voxels, image.affine) if voxels.ndim == 3 else None
    return None


def with_offset(raw: bytes, header_class: type) -> bytes:
    """Voxels of a single file lie behind its header; nibabel would take the header for voxels where it says 0."""
    size = header_class.sizeof_hdr
    header = header_class(raw[:size], check=False)
    if header["magic"].item()[:3] == b"n+1" and 0 <= header["vox_offset"] < header.single_vox_offset:
        header["vox_offset"] = header.single_vox_offset
        return bytes(header.binaryblock) + raw[size:]
    return raw


# -- settings and lists

ODD: tuple[Any, ...] = (
    None, "", " ", "null", [], {}, [[]], [{}], -1, 0, 1, 2**63, 10**400, 1e308, float("inf"), float("nan"), -0.0, True,
    "2h", "-3", "0x1f", "1e3", "a\nb: 1", "\u2028", "\u202e", "\U0001f600", "x" * 5000, [1, 2, 3], [0, 0, 0], ["a"],
    {"a": "b"}, {"low": 1, "high": 0}, "!!python/object:os.system", "{{x}}", "${HOME}", "`id`", "NaN", "\x00", "\ud800",
    "../x", "segresnet", "CT", [16, 16, 16], [1e-9, 1, 1],
)  # fmt: skip
"""Values where others are expected."""
TEXT = (
    *("\t", "\r\n", "\ufeff", "\x00", "\x1b[2J", "&a ", "*a", "!!binary x", "<<: *a", "- ", "? ", "%YAML 9\n", "---\n"),
    *("...\n", "{", "]", '"', "'", "|", "\u2028", "\x85", "\ud83d", "\xe9", "#"),
)
TEXT_DAMAGES = ("cut", "insert", "insert", "line out", "line doubled", "indent", "swap", "bytes", "latin-1", "utf-16")
KEEP = ("work_dir", "dataroot", "launcher", "address", "slurm", "sweep")
"""Settings that would lead out of the campaign's folder, or start what it does not control."""


def change_value(data: Any, rng: random.Random, keep: tuple[str, ...] = KEEP) -> str:
    """Put an odd value at a place of plain data, or take one out, or double one; says where and what."""
    places: list[tuple[Any, Any, str]] = []

    def walk(node: Any, path: str) -> None:
        if isinstance(node, dict):
            for key in node:
                if key not in keep:
                    places.append((node, key, f"{path}.{key}"))
                    walk(node[key], f"{path}.{key}")
        elif isinstance(node, list):
            for index in range(len(node)):
                places.append((node, index, f"{path}[{index}]"))
                walk(node[index], f"{path}[{index}]")

    walk(data, "")
    if not places:
        return "nothing to change"
    node, key, path = rng.choice(places)
    kind = rng.randrange(5)
    if kind == 0:
        del node[key]
        return f"{path} taken out"
    if kind == 1 and isinstance(node, dict):
        new = rng.choice(("seeed", "", " ", "a.b", "\U0001f600", "1", "class_names", "folds"))
        node[new] = node.pop(key)
        return f"{path} called {new!r}"
    if kind == 2 and isinstance(node, list):
        node.append(node[key])
        return f"{path} doubled"
    value = copy.deepcopy(rng.choice(ODD))
    node[key] = value
    return f"{path} = {str(value)[:40]!r}"


def change_text(text: str, rng: random.Random) -> tuple[str, bytes]:
    """Damage a text as editors, transfers and typing do; says how."""
    lines = text.splitlines(keepends=True)
    kind = rng.choice(TEXT_DAMAGES)
    place = rng.randrange(len(text) + 1)
    line = rng.randrange(len(lines))
    if kind == "cut":
        return kind, text[:place].encode()
    if kind == "insert":
        word = rng.choice(TEXT)
        return f"insert {word!r} at {place}", (text[:place] + word + text[place:]).encode("utf-8", "surrogatepass")
    if kind == "line out":
        del lines[line]
    elif kind == "line doubled":
        lines.insert(line, lines[line])
    elif kind == "indent":
        lines[line] = "  " + lines[line]
    elif kind == "swap":
        other = rng.randrange(len(lines))
        lines[line], lines[other] = lines[other], lines[line]
    elif kind == "bytes":
        data = bytearray(text.encode())
        for _ in range(rng.randint(1, 5)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return kind, bytes(data)
    elif kind == "latin-1":
        return kind, (text + "# \xe9\n").encode("latin-1", "replace")
    else:
        return kind, text.encode("utf-16")
    return f"{kind} {line}", "".join(lines).encode()


# -- a packed model


def damaged_zip(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Damage an archive byte by byte, or its members: cut, emptied, exchanged, added, named otherwise, edited."""
    if rng.random() < 0.4:
        stream = bytearray(data)
        if rng.random() < 0.3:
            return "cut", bytes(stream[: rng.randrange(len(stream))])
        for _ in range(rng.randint(1, 4)):
            stream[rng.randrange(len(stream))] ^= 1 << rng.randrange(8)
        return "flip of bits", bytes(stream)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(sorted(parts))
    kind = rng.choice(("leave out", "empty", "cut", "exchange", "add", "rename", "value", "value"))
    if kind == "leave out":
        del parts[name]
    elif kind in ("empty", "cut"):
        parts[name] = parts[name][: 0 if kind == "empty" else len(parts[name]) // 2]
    elif kind == "exchange":
        parts[name] = parts[rng.choice(sorted(parts))]
    elif kind == "add":
        parts[rng.choice(("../out", "/tmp/out", "a/b.py", "x" * 300, "\x1b[2J"))] = b"a"
    elif kind == "rename":
        parts[rng.choice(("../out", "model.pt", name.upper()))] = parts.pop(name)
    elif name.endswith(".json"):
        content = json.loads(parts[name])
        kind = change_value({"": content}, rng, ())
        parts[name] = json.dumps(content).encode()
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for part, content in parts.items():
            archive.writestr(part, content)
    return f"{name}: {kind}", made.getvalue()


# -- a finished work_dir


def damage_work_dir(work_dir: Path, rng: random.Random) -> str:
    """Damage one file of a work_dir as disks, syncing tools and hands do; says which and how."""
    files = sorted(path for path in work_dir.rglob("*") if path.is_file())
    path = rng.choice(files)
    structured = path.suffix in (".json", ".yaml", ".jsonl")
    kinds = ["cut", "empty", "delete", "flip", "flip", "append", "other", "folder", "copy", "link"]
    kinds += ["value"] * 8 if structured else []
    kind = rng.choice(kinds)
    done = _DAMAGES[kind](path, files, rng)
    return f"{path.relative_to(work_dir)}: {done or kind}"


def _cut(path: Path, files: list[Path], rng: random.Random) -> str:
    size = path.stat().st_size
    os.truncate(path, rng.randrange(size) if size else 0)
    return ""


def _flip(path: Path, files: list[Path], rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 3) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return "flip of bits"


def _append(path: Path, files: list[Path], rng: random.Random) -> str:
    with path.open("ab") as file:
        file.write(rng.choice((b"\n", b"{}", b"\x00" * 100, rng.randbytes(300), b'\n{"a": \xff}\n')))
    return ""


def _other(path: Path, files: list[Path], rng: random.Random) -> str:
    other = rng.choice(files)
    if other != path:
        shutil.copyfile(other, path)
    return f"replaced by {other.name}"


def _folder(path: Path, files: list[Path], rng: random.Random) -> str:
    path.unlink()
    path.mkdir()
    return ""


def _copy(path: Path, files: list[Path], rng: random.Random) -> str:
    shutil.copyfile(path, path.with_name(f"{path.stem} (conflict){path.suffix}"))
    return "a second copy beside it"


def _link(path: Path, files: list[Path], rng: random.Random) -> str:
    path.unlink()
    path.symlink_to(rng.choice((Path("/etc/hostname"), Path("nowhere"), Path("/dev/zero"))))
    return f"a link to {os.readlink(path)}"


def _value(path: Path, files: list[Path], rng: random.Random) -> str:
    import yaml

    try:
        if path.suffix == ".jsonl":
            lines = path.read_text().splitlines()
            index = rng.randrange(len(lines))
            data = json.loads(lines[index])
            done = change_value({"line": data}, rng, ())
            lines[index] = json.dumps(data)
            path.write_text("\n".join(lines) + "\n")
        elif path.suffix == ".json":
            data = json.loads(path.read_text())
            done = change_value(data, rng, ())
            path.write_text(json.dumps(data))
        else:
            data = yaml.safe_load(path.read_text())
            done = change_value(data, rng, ())
            path.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    except (ValueError, yaml.YAMLError, IndexError) as error:
        return f"value unchanged ({type(error).__name__})"
    return done


def _empty(path: Path, files: list[Path], rng: random.Random) -> str:
    os.truncate(path, 0)
    return ""


def _delete(path: Path, files: list[Path], rng: random.Random) -> str:
    path.unlink()
    return ""


_DAMAGES: dict[str, Callable[[Path, list[Path], random.Random], str]] = {
    "cut": _cut,
    "empty": _empty,
    "delete": _delete,
    "flip": _flip,
    "append": _append,
    "other": _other,
    "folder": _folder,
    "copy": _copy,
    "link": _link,
    "value": _value,
}
