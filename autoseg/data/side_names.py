"""Left and right in the names of classes: which two names differ in the side alone.

Nothing is said of what the classes look like: `autoseg.analyzer.lateral` compares the labels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

GENDERS = "(\u044b\u0439|\u0430\u044f|\u043e\u0435|\u044b\u0435)"
"""Endings of Russian adjectives: masculine, feminine, neuter, plural."""
LEFT = re.compile(
    "l|lh|lt|lft|left|sin|sx|sinister|sinistrum|sinistr[aoie]|links|linke[rsnm]?|gauches?|izquierd[oa]s?|esquerd[oa]s?|"
    f"\u5de6|\u043b\u0435\u0432{GENDERS}"
)
RIGHT = re.compile(
    "r|rh|rt|rgt|right|dex|dx|dexter|dextrum|dextra|destr[aoie]|rechts|rechte[rsnm]?|droite?s?|derech[oa]s?|direit[oa]s?|"
    f"\u53f3|\u043f\u0440\u0430\u0432{GENDERS}"
)
"""Words of a side, in lower case. Source: FreeSurfer writes lh and rh, radiotherapy's TG-263 L and R, older plans Lt
and Rt; sin and dex are Latin; then Italian, German and Dutch, French, Spanish, Portuguese, the sign of Chinese and
Japanese, and Russian (lev-, prav-)."""
SHORTEST_REST = 3
"""Letters that must follow a letter of a side that nothing parts from them, so that LV and RV, a heart's two different
chambers, are no pair while LHIP and RHIP are."""
UNSIDED = re.compile(
    "(lacrimal|lamina|large|larynx|lateral|lens|lesion|lingual|lip|liver|lobe|lobule|lower|lumbar|lumen|lung|lymph|"
    "radius|ramus|rectum|rectus|region|renal|retina|rib|ring|root)s?"
)
"""Words that begin with an l or r of their own: lung and rung are no two sides of an ung. Source: those of `terms.csv`,
and a choice of more."""
WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+|[^\W\d_A-Za-z]+")
"""A word: also a part that begins with a capital letter, such as Hip in LHip, and a number."""
GLUED = re.compile("^(left|right|[\u5de6\u53f3])(?=\\w)|(?<=\\w)(left|right|[\u5de6\u53f3])$", re.IGNORECASE)
"""A side that nothing parts from its structure; Chinese and Japanese part no words."""
OPEN, CLOSED = "([{<\uff08\u3010", ")]}>\uff09\u3011"
"""Brackets, the last two of each those of Chinese and Japanese."""
JOINT = rf"(?:[^\w{re.escape(OPEN + CLOSED)}]|_)+"
"""What stands between words."""


@dataclass(frozen=True, slots=True)
class SidedPair:
    """Two classes of one structure, as places in the list of names."""

    left: int
    right: int
    shared: str
    """The name without a side, as the first of the two has it; may be empty."""


@dataclass(frozen=True, slots=True)
class _Reading:
    """A name read as one of a side."""

    rank: int
    """0: the side is a word of several letters; 1: a letter; 2: written together with what follows."""
    is_left: bool
    key: tuple[str, ...]
    """What the name of the other side has alike."""
    start: int
    stop: int
    """Where the side stands in the name."""


def sided_pairs(names: Sequence[str]) -> tuple[SidedPair, ...]:
    """Pairs of names that differ in left and right alone, in the order of their first names.

    Case and what stands between words do not count: `LEFT KIDNEY` and `right_kidney`, `ctx-lh-cuneus`, `lh.insula`,
    `kidney_lt`, `Kidney (L)`, `LHip` and `RHip`. Where several names fit one, none is paired. L1 and R1 are none, as
    these are a vertebra and a rib; `rib L1` and `rib R1` are.
    """
    readings = [tuple(_readings(name)) for name in names]
    paired: set[int] = set()
    pairs = []
    for rank in range(3):
        sides: dict[tuple[str, ...], tuple[list[int], list[int]]] = {}
        places: dict[tuple[int, tuple[str, ...]], _Reading] = {}
        for i, own in enumerate(readings):
            for reading in own:
                if i not in paired and reading.rank == rank:
                    sides.setdefault(reading.key, ([], []))[not reading.is_left].append(i)
                    places[i, reading.key] = reading
        for key, (left, right) in sides.items():
            if len(left) == len(right) == 1 and left != right and not paired & {*left, *right}:
                first = min(*left, *right)
                pairs.append(SidedPair(left[0], right[0], _without(names[first], places[first, key])))
                paired |= {*left, *right}
    return tuple(sorted(pairs, key=lambda pair: min(pair.left, pair.right)))


def without_side(name: str) -> Iterator[tuple[bool, str]]:
    """All ways to read a name as one of a side, the surest first: whether it is left, and the name without it."""
    for reading in sorted(_readings(name), key=lambda r: r.rank):
        yield reading.is_left, _without(name, reading)


def _readings(name: str) -> Iterator[_Reading]:
    """All ways to read a name as one of a side."""
    words = [(m.group().lower(), m.start(), m.end()) for m in WORD.finditer(name)]
    for i, (word, start, stop) in enumerate(words):
        # A side's place among the words is part of what is alike: `left 3` and `3 right` are not.
        before, after = [w for w, _, _ in words[:i]], [w for w, _, _ in words[i + 1 :]]
        if LEFT.fullmatch(word) or RIGHT.fullmatch(word):
            if word in ("l", "r") and not before and "".join(after).isdecimal():
                continue  # a letter that is counted: L5 is a vertebra, R5 a rib
            key, is_left = (*before, "", *after), bool(LEFT.fullmatch(word))
            yield _Reading(int(word in ("l", "r")), is_left, key, start, stop)
        elif match := GLUED.search(word):
            side, rest = match.group(), word[: match.start()] + word[match.end() :]
            key = (*before, "", rest, *after) if match.start() == 0 else (*before, rest, "", *after)
            yield _Reading(2, bool(LEFT.fullmatch(side)), key, start + match.start(), start + match.end())
        elif word[0] in "lr" and len(word) > SHORTEST_REST and not UNSIDED.fullmatch(word):
            yield _Reading(2, word[0] == "l", (*before, "", word[1:], *after), start, start + 1)


def _without(name: str, reading: _Reading) -> str:
    """The name less its side, what joins that to its neighbour, and brackets that hold the side alone."""
    before, after = name[: reading.start], name[reading.stop :]
    opened, closed = (re.search(rf"[{re.escape(OPEN)}]\s*$", before), re.match(rf"\s*[{re.escape(CLOSED)}]", after))
    if opened and closed:
        before, after = before[: opened.start()], after[closed.end() :]
    if not after[:1].isalnum():  # the one joint that is left is after the side
        before = re.sub(f"{JOINT}$", "", before)
    if not before or before[-1] in OPEN:  # nothing is left that what follows would be joined to
        after = re.sub(f"^{JOINT}", "", after)
    return before + after
