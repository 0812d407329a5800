"""The pieces of a datalist.json that need no cases: strict JSON, the table of labels."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoseg.errors import ConfigError
from autoseg.terminal import printable

Plain = dict[str, Any]
"""The content of a datalist.json; paths relative to the data root."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelTable:
    """What `labels` says: either plain classes or regions of several values, and the value to ignore."""

    labels: dict[int, str] = field(default_factory=dict)
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ignore_label: int | None = None


def load_json(path: Path) -> Any:
    """Parse a user's JSON file; a key that stands twice in one object is a fault.

    Raises:
        ConfigError: The file is missing, not UTF-8, not JSON (with line and column), or has a key twice.
    """
    twice: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        twice.extend(sorted(k for k, n in Counter(k for k, _ in items).items() if n > 1))
        return dict(items)

    if not path.is_file():
        state = "is a folder" if path.is_dir() else "is missing"
        raise ConfigError(f"datalist: {path} {state}. Expected a datalist.json; `autoseg init DATA_FOLDER` writes one.")
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=pairs)
        json.dumps(data, ensure_ascii=False).encode()  # JSON may name halves of characters, which no file can hold
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}:{error.lineno}:{error.colno}: not valid JSON ({error.msg}). Correct this place."
        ) from None
    except UnicodeEncodeError as error:
        half = printable(error.object[error.start : error.start + 1])
        raise ConfigError(f"{path}: holds {half}, half of a character. Correct the text it stands in.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}). Expected JSON; save it as UTF-8.") from None
    except (RecursionError, ValueError) as error:  # lists nested thousands deep, a number of thousands of digits
        raise ConfigError(f"{path}: cannot be read ({error}). Expected a datalist; correct it.") from None
    if twice:
        raise ConfigError([f"{path}: key {k!r} stands twice in one object. Keep one." for k in twice])
    return data


def read_licence(path: Path) -> str:
    """The licence that a list names as MSD and nnU-Net do, on one line; empty where there is no list, or it names none.

    A list that cannot be read is for others to report.
    """
    if not path.is_file():
        return ""
    try:
        data = load_json(path)
    except ConfigError:
        return ""
    words = [data[key] for key in ("licence", "license") if isinstance(data, dict) and isinstance(data.get(key), str)]
    return printable(" ".join(words[0].split()), one_line=True)[:500] if words else ""


def parse_labels(raw: Any) -> tuple[LabelTable, list[str]]:
    """Read `labels`: {value: name} as MSD has it, or {name: value or [values]} as nnU-Net has it.

    Background (value 0) is left out; nnU-Net's `ignore` becomes the ignore label.

    Returns:
        The table, and faults without the file's name.
    """
    if not isinstance(raw, dict):
        return LabelTable(), [f'labels: {type(raw).__name__}. Expected an object such as {{"1": "liver"}}.']
    # nnU-Net turns the table around: names are the keys there. A table of strings alone has values as keys.
    by_value = all(isinstance(v, str) for v in raw.values())
    classes, faults = _named_values(raw, by_value=by_value)
    ignore = next((v[0] for n, v in classes if n == "ignore" and len(v) == 1 and not by_value), None)
    classes = [(n, v) for n, v in classes if v != (0,) and not (v == (ignore,) and n == "ignore")]
    faults += _name_faults(classes)
    if any(len(v) > 1 for _, v in classes):
        return LabelTable(regions=dict(classes), ignore_label=ignore), faults
    counts = Counter(v[0] for _, v in classes)
    faults += [f"labels: value {v} is given {n} names. Keep one." for v, n in counts.items() if n > 1]
    labels = {v[0]: n for n, v in sorted(classes, key=lambda named: named[1])}
    return LabelTable(labels=labels, ignore_label=ignore), faults


def _named_values(raw: dict[str, Any], *, by_value: bool) -> tuple[list[tuple[str, tuple[int, ...]]], list[str]]:
    """Each name with its values, in the order of the table, and faults; `by_value`: the keys are the values."""
    classes: list[tuple[str, tuple[int, ...]]] = []
    faults = []
    for key, entry in raw.items():
        name, values = (entry, [key]) if by_value else (key, entry if isinstance(entry, list) else [entry])
        numbers = [n for n in map(_value, values) if n is not None]
        if len(numbers) < len(values) or not numbers:
            faults.append(f"labels: {key!r}: {entry!r}: expected label values from 0 to 65535 and names.")
        else:
            classes.append((name, tuple(numbers)))
    return classes, faults


def _name_faults(classes: Sequence[tuple[str, tuple[int, ...]]]) -> list[str]:
    """Names given more than once, and empty ones."""
    names = Counter(n for n, _ in classes)
    faults = [f"labels: {n!r} is named {k} times. Give each class its own name." for n, k in names.items() if k > 1]
    return faults + [f"labels: a class of value {v} has no name." for n, v in classes if not n.strip()]


def _value(raw: Any) -> int | None:
    if isinstance(raw, str) and raw.strip().isdecimal():
        raw = int(raw)
    return raw if isinstance(raw, int) and not isinstance(raw, bool) and 0 <= raw <= 65535 else None


def parse_channels(raw: Any) -> tuple[str, ...] | None:
    """Read `modality` or `channel_names`: "CT", ["T1", "T2"] or {"0": "T1", "1": "T2"}; None where it is neither."""
    if isinstance(raw, dict):
        if not all(isinstance(k, str) and k.isdecimal() for k in raw):
            return None
        raw = [raw[k] for k in sorted(raw, key=int)]
    entries = [raw] if isinstance(raw, str) else raw
    if not isinstance(entries, list) or not all(isinstance(e, str) for e in entries):
        return None
    return tuple(entries)
