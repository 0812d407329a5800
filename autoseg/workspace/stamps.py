"""What a finished stage was made from, and how that is compared with what there is now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from autoseg.errors import some_of
from autoseg.workspace.stored import Moment, Stored

NOT_DONE = "not done yet"
"""The reason to run a stage that was never done."""
MOST_NAMED = 4
"""Changed inputs of one kind that are named; more are counted."""


class Stamp(Stored):
    """What stands in state/<stage>.json."""

    advice: ClassVar[str] = "Undo the edit, or delete the file: the stage is then done again."

    inputs: dict[str, str]
    """What it was made from: name -> digest."""
    version: str
    """Of autoseg."""
    time: Moment
    """When it ended."""


def changed(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Names of the inputs that differ, as a person would say it; many of a kind are counted."""
    differences: dict[str, list[str]] = {"changed": [], "new": [], "gone": []}
    differences["changed"] = [name for name in new if name in old and old[name] != new[name]]
    differences["new"] = [name for name in new if name not in old]
    differences["gone"] = [name for name in old if name not in new]
    words = []
    for what, names in differences.items():
        if names:
            verb = "" if what == "changed" else "is " if len(names) == 1 else "are "
            shown = some_of(names, MOST_NAMED)
            words.append(f"{shown} {verb}{what}")
    return words
