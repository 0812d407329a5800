"""Figures of a run that say where they come from: each is read from a file under its work_dir by a key.

A key is a JSON pointer (RFC 6901), such as `/dice/mean`; YAML files have the same keys. `*` in it stands for every
element. `count` of a key is the length of the list or mapping there, `distinct` the number of different values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from autoseg.errors import WorkspaceError
from autoseg.export.markdown import cell
from autoseg.workspace.stored import read_stored

Of = Literal["value", "count", "distinct"]
"""What is taken of a key: what stands there, how many things do, or how many different ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure of a text and its source."""

    shown: str
    """As it stands in the text."""
    file: str
    """Relative to the run's folder."""
    key: str
    """A JSON pointer into the file."""
    of: Of
    value: float | str
    """What the file holds, in full."""
    unit: float
    """The figure is the value divided by this, such as 60 for minutes of a duration in seconds."""
    form: str
    """Python's format that makes `shown` of the figure."""

    @property
    def source(self) -> str:
        """File and key, in words."""
        what = {"value": "", "count": "count of ", "distinct": "different values of "}[self.of]
        divided = "" if self.unit == 1 else f", divided by {self.unit:g}"
        return f"{self.file}: {what}{self.key}{divided}"


def pointer(*keys: str | int) -> str:
    """Keys as a JSON pointer; a key `*` stands for every element."""
    return "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in keys)


def at(data: Any, key: str) -> Any:
    """What a key leads to; None where there is nothing."""
    before, star, after = key.partition("/*")
    if star:
        found = at(data, before)
        values = found.values() if isinstance(found, Mapping) else found or ()
        return [at(value, after) for value in values]
    for part in key.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(data, Mapping):
            data = data.get(name)
        elif isinstance(data, Sequence) and not isinstance(data, str) and name.isdigit() and int(name) < len(data):
            data = data[int(name)]
        else:
            return None
    return data


def taken(data: Any, key: str, of: Of) -> Any:
    """What is taken of a key; None where there is nothing."""
    found = at(data, key)
    if of == "value" or found is None:
        return found
    return len(found) if of == "count" else len({str(value) for value in found})


def show(value: float | str, form: str, unit: float = 1.0) -> str:
    """A value as it stands in a text."""
    if isinstance(value, str):
        return value
    scaled = value if unit == 1 else value / unit
    return format(scaled, form)


@dataclass(slots=True)
class Traced:
    """Texts made of figures that are read from a run's files; every figure is remembered with its source."""

    root: Path
    """The run's folder."""
    marks: bool = True
    """Whether a figure is followed by the number of its source, as Markdown's footnotes are written."""
    figures: list[Figure] = field(default_factory=list)
    """Those that were shown, in the order of their sources' numbers."""
    _files: dict[str, Any] = field(default_factory=dict)

    def read(self, file: str) -> Any:
        """A whole file; None where it is not there.

        Raises:
            WorkspaceError: It is damaged.
        """
        if file not in self._files:
            path = self.root / file
            self._files[file] = read_stored(path, dict[str, Any]) if path.exists() else None
        return self._files[file]

    def get(self, file: str, *keys: str | int, of: Of = "value") -> Any:
        """What a file holds; None where it is not there, or a score that is not counted."""
        value = taken(self.read(file), pointer(*keys), of)
        return None if isinstance(value, float) and math.isnan(value) else value

    def show(self, file: str, *keys: str | int, form: str = "", of: Of = "value", unit: float = 1.0) -> str:
        """A figure as text, with its source's number.

        Raises:
            WorkspaceError: There is none.
        """
        value = self.get(file, *keys, of=of)
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise WorkspaceError(f"{self.root / file}: {pointer(*keys)}: expected a figure. Run `autoseg run` again.")
        figure = Figure(
            shown=show(value, form, unit), file=file, key=pointer(*keys), of=of, value=value, unit=unit, form=form
        )
        return figure.shown + self._mark(figure)

    def name(self, file: str, *keys: str | int) -> str:
        """A name of the user's or a group's, fit for a table; with its source's number where it has figures."""
        text = str(self.get(file, *keys))
        return cell(text) + (self.show(file, *keys).removeprefix(text) if any(c.isdigit() for c in text) else "")

    def _mark(self, figure: Figure) -> str:
        if figure not in self.figures:
            self.figures.append(figure)
        return f"[^{self.figures.index(figure) + 1}]" if self.marks else ""

    def mean(self, file: str, *keys: str | int, form: str = ".3f", name: str = "mean") -> str:
        """A mean with its 95 % interval, where that is known."""
        if self.get(file, *keys, name) is None:
            return "not counted"
        text = self.show(file, *keys, name, form=form)
        if self.get(file, *keys, "low") is None or self.get(file, *keys, "high") is None:
            return text
        low, high = (self.show(file, *keys, end, form=form) for end in ("low", "high"))
        return f"{text} (95 % interval {low} to {high})"

    def triple(self, file: str, *keys: str | int, form: str) -> str:
        """Three figures along X, Y and Z."""
        return " x ".join(self.show(file, *keys, axis, form=form) for axis in range(3))
