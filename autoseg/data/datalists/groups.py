"""Cases that belong together by their names: frames of a patient, tiles of a stack, weeks of an atlas.

Models that learn from one frame and are scored on another know the answer. Names are read cautiously: one that ends in
a number of its own, as case_001 does, says nothing.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

PARTS: Mapping[str, str] = {
    **dict.fromkeys(("frame", "frames"), "frames"),
    **dict.fromkeys(("phase", "phases"), "phases"),
    **dict.fromkeys(("timepoint", "tp"), "time points"),
    **dict.fromkeys(("week", "weeks", "wk", "ga", "sta"), "weeks"),
    **dict.fromkeys(("day", "month"), "time points"),
    **dict.fromkeys(("visit", "session", "ses"), "visits"),
    **dict.fromkeys(("tile", "patch", "crop", "slab", "block"), "tiles"),
    "slice": "slices",
}
"""Words that, with a number, name a part of something -> what such parts are called. GA is a gestational age, STA a
spatiotemporal atlas (Gholipour 2017), ses BIDS' session."""
MAYBE_PARTS = frozenset(
    ("t", "v", "d", "w", "f", "fr", "ph", "time", "scan", "run", "acq", "rep", "part", "study", "mr")
)
"""Words that name a part where another number of the name can be the patient's: scan in p01_scan2, but not in scan2."""
STATES = frozenset(
    ("ed", "es", "pre", "post", "baseline", "followup", "systole", "diastole", "inhale", "exhale", "left", "right")
)
"""Words that name a part so without a number of their own."""
MOST_SECOND_NUMBER = 20
"""Largest second number, as in 017_2, that can count a patient's scans."""
FEWEST_GROUPS, LARGEST_MEAN = 5, 6.0
"""Where parts are guessed without a word of `PARTS`: fewer groups, or more cases in each, are taken for sites."""
WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")
GRID = re.compile(r"(?<![A-Za-z0-9])(?:r(?:ow)?\d+[_-]?c(?:ol)?\d+|x\d+[_-]?y\d+(?:[_-]?z\d+)?)(?![A-Za-z0-9])", re.I)
"""A tile's place, such as r0c2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LikelyGroups:
    """What names say of cases that belong together."""

    of: Mapping[str, str] = field(default_factory=dict)
    """Name of a case -> what it is a part of; cases that stand alone are left out."""
    kind: str = ""
    """What the parts are, such as frames."""

    @property
    def members(self) -> dict[str, list[str]]:
        """The cases of each group, at least two."""
        members: dict[str, list[str]] = defaultdict(list)
        for name, group in self.of.items():
            members[group].append(name)
        return dict(members)

    def num_units(self, names: Sequence[str]) -> int:
        """Groups, and cases that stand alone: as many folds can be made."""
        return len({self.of.get(name, f"case {name}") for name in names})


def likely_groups(names: Sequence[str]) -> LikelyGroups:
    """Recognise cases that are parts of one thing by their names.

    Args:
        names: of the cases, such as patient001_frame01 and patient001_frame12.
    """
    sure: dict[str, tuple[str, str]] = {}
    guessed: dict[str, tuple[str, str]] = {}
    for name in names:
        rest, kind = _without_parts(name)
        if kind in {*PARTS.values()}:
            sure[name] = rest, kind
        elif kind or (rest := _without_second_number(name)) != name:
            guessed[name] = rest, kind or "scans"
    counts = Counter(rest for rest, _ in guessed.values())
    if len(counts) < FEWEST_GROUPS or len(guessed) / len(counts) > LARGEST_MEAN:
        guessed = {}
    known = {**sure, **guessed}
    counts = Counter(rest for rest, _ in known.values())
    known = {name: part for name, part in known.items() if counts[part[0]] > 1}
    kinds = Counter(kind for _, kind in known.values()).most_common(1)
    return LikelyGroups(of={name: rest for name, (rest, _) in known.items()}, kind=kinds[0][0] if kinds else "")


def _without_parts(name: str) -> tuple[str, str]:
    """A name less what names a part, and what the part is; the name itself and nothing where it names none."""
    kind = "tiles" if GRID.search(name) else ""
    rest = GRID.sub("", name)
    words = list(WORD.finditer(rest))
    cuts: list[tuple[int, int]] = []
    doubtful: list[tuple[int, int]] = []
    for word, after in zip_longest(words, words[1:]):
        text = word.group().lower()
        number = after if after is not None and after.group().isdigit() and after.start() - word.end() <= 1 else None
        if number is not None and text in PARTS:
            kind = kind or PARTS[text]
            cuts.append((word.start(), number.end()))
        elif (
            number is not None and text in MAYBE_PARTS and not (len(text) == 1 and rest[: word.start()][-1:].isalnum())
        ):
            doubtful.append((word.start(), number.end()))
        elif text in STATES:
            doubtful.append((word.start(), word.end()))
    whole = _cut(rest, [*cuts, *doubtful])
    if any(c.isdigit() for c in whole):  # the patient's number is left
        return whole, kind or ("scans" if doubtful else "")
    return (_cut(rest, cuts), kind) if kind and _cut(rest, cuts) else (name, "")


def _cut(name: str, places: Sequence[tuple[int, int]]) -> str:
    """A name less some places of it, and less what joined them to the rest."""
    for start, stop in sorted(places, reverse=True):
        name = f"{name[:start]}\0{name[stop:]}"
    name = re.sub(r"[_\-. ]*\0[_\-. ]*(?=\0|$)|^(?:[_\-. ]*\0[_\-. ]*)+|[_\-. ]*\0", "", name)
    return name.strip("_-. ")


def _without_second_number(name: str) -> str:
    """017 of 017_2: a name less a small last number, where another one stands before it."""
    match = re.fullmatch(r"(.*\d.*?)[_\-. ](\d{1,3})", name)
    return match.group(1) if match and int(match.group(2)) <= MOST_SECOND_NUMBER else name
