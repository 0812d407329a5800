"""How far surfaces may lie apart: one value for all classes, or one for each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from autoseg.config.types import suggest
from autoseg.errors import ConfigError

TOLERANCE_MM = 2.0
"""Accepted deviation of a boundary, in mm. Source: between the 1 and 3 mm of Nikolov et al. 2018 for most organs;
FLARE's challenges take 2 mm for many."""
MOST_NAMED = 4
"""Tolerances that are written out in a title."""

Tolerance = float | Mapping[str, float]
"""In mm: of all classes, or class -> its own, where others have `TOLERANCE_MM`."""


def of_class(tolerance_mm: Tolerance, name: str) -> float:
    """The tolerance of one class in mm."""
    return tolerance_mm.get(name, TOLERANCE_MM) if isinstance(tolerance_mm, Mapping) else tolerance_mm


def of_classes(tolerance_mm: Tolerance, names: Sequence[str]) -> Tolerance:
    """The tolerance of every class, as one value where they are alike."""
    each = {name: of_class(tolerance_mm, name) for name in names}
    return each if len({*each.values()}) > 1 else next(iter(each.values()), TOLERANCE_MM)


def faults_of(tolerance_mm: Tolerance, names: Sequence[str], where: str) -> list[str]:
    """Classes that have a tolerance but are none."""
    if not isinstance(tolerance_mm, Mapping):
        return []
    return [f"{where}: {name}: no such class. {suggest(name, names)}" for name in tolerance_mm if name not in names]


def words_of(tolerance_mm: Tolerance | None) -> str:
    """In a sentence: `2 mm`, `liver 5 mm, tumor 2 mm`."""
    if not isinstance(tolerance_mm, Mapping):
        return f"{TOLERANCE_MM if tolerance_mm is None else tolerance_mm:g} mm"
    if len(tolerance_mm) > MOST_NAMED:
        return f"{min(tolerance_mm.values()):g} to {max(tolerance_mm.values()):g} mm by class"
    return ", ".join(f"{name} {mm:g} mm" for name, mm in tolerance_mm.items())


def heading_of(tolerance_mm: Tolerance | None) -> str:
    """Above a column; nothing where each class has its own."""
    return "" if tolerance_mm is None or isinstance(tolerance_mm, Mapping) else f"{tolerance_mm:g} mm"


def parse_tolerance(text: str | None) -> Tolerance:
    """Read the command line's words: `2`, or `liver=5,tumor=1`; None: the default.

    Raises:
        ConfigError: They are neither.
    """
    if text is None:
        return TOLERANCE_MM
    by_class: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = part.rpartition("=")
        value = _millimetres(number)
        if value is None or (equals and not name.strip()) or (not equals and "," in text):
            raise ConfigError(
                f"--surface_tolerance_mm: {text}. Expected millimetres such as 2, or class by class such as "
                "liver=5,tumor=1."
            )
        if not equals:
            return value
        if name.strip() in by_class:
            raise ConfigError(f"--surface_tolerance_mm: {text}: {name.strip()} stands twice. Keep one.")
        by_class[name.strip()] = value
    return by_class


def _millimetres(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < math.inf else None
