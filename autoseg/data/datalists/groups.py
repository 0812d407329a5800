"""Cases that belong together by their names: frames of a patient, tiles of a stack, weeks of an atlas.

Models that learn from one frame and are scored on another know the answer. A name is taken apart: what names a part
is cut, and what is left is the group. Names are read cautiously: one that has a single number, as case_001 does, says
nothing, and the fewer words a name has, the more cases must agree.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Literal

from autoseg.data.datalists.channels import CHANNEL_WORD
from autoseg.data.datalists.listfile import Plain
from autoseg.data.datalists.names import ENDINGS
from autoseg.errors import DataError, some_of

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
    ("t", "v", "d", "w", "m", "f", "z", "fr", "fu", "ph", "time", "scan", "run", "acq", "rep", "part", "study", "mr")
)
"""Words that name a part only after the patient's number: scan in p01_scan2, but not in scan2."""
STATES = frozenset(
    ("ed", "es", "systole", "diastole", "inhale", "exhale")
    + ("pre", "post", "preop", "postop", "baseline", "followup")
    + ("left", "right", "l", "r", "lh", "rh", "od", "os")
)
"""Words that name a part so without a number of their own. LH and RH are hemispheres, OD and OS eyes."""
FEWEST_GROUPS = 5
"""Where a bare second number or letter is all that tells: fewer groups say too little. A choice."""
LARGEST_MEAN = 6.0
"""Where no word is sure: more cases in each group, on average, are taken for those of a site. A choice."""
WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")
GRID = re.compile(r"(?<![A-Za-z0-9])(?:r(?:ow)?\d+[_-]?c(?:ol)?\d+|x\d+[_-]?y\d+(?:[_-]?z\d+)?)(?![A-Za-z0-9])", re.I)
"""A tile's place, such as r0c2."""
SESSION = re.compile(r"(?<![A-Za-z0-9])ses-[A-Za-z0-9]+")
"""BIDS' session, whose label may be a word: ses-M12, ses-pre."""
DATE = re.compile(
    r"(?<!\d)(?:(?:19|20)\d\d([-_.]?)(?:0[1-9]|1[0-2])\1(?:0[1-9]|[12]\d|3[01])"
    r"|[0-3]\d([-_.])[0-3]\d\2(?:19|20)\d\d)(?!\d)"
)
"""A day, the year first or last: 2019-01-11, 20190111, 11.01.2019."""
PATIENT = re.compile(
    r"(?<![A-Za-z0-9])(?:sub-[A-Za-z0-9]+|p\d+|(?:patient|pat|pt|pid|id|subject|subj|sub|person|participant|volunteer|"
    r"donor|animal|mouse|rat|specimen)[_\-. ]?(?!(?:19|20)\d\d[-_.](?:0[1-9]|1[0-2])(?!\d))\d+)",
    re.I,
)
"""A patient with a number that is no date, or BIDS' subject: what follows is of this patient."""
STACK = re.compile(r"(?<![A-Za-z0-9])(?:vol|volume|stack)[_\-. ]?\d+", re.I)
"""A volume with a number, which names a group where no patient does."""
NO_PATIENT = re.compile(
    r"(?<![A-Za-z])(?:site|cent(?:er|re)|hospital|clinic|institut(?:e|ion)|scanner|vendor|cohort|batch|dataset|set|task|"
    r"fold|split|group)s?(?:[_\-. ]?\d+|[A-Z]\d*(?![A-Za-z]))?(?![a-z])",
    re.I,
)
"""Where cases come from, with its number or letter: many patients are of one."""
YEAR = re.compile(r"(?<![A-Za-z0-9])(?:19|20)\d\d(?:[-_.]?(?:0[1-9]|1[0-2]))?(?![A-Za-z0-9])")
"""A year, or a month of one, by itself: no patient's number."""
BARE = re.compile(r"(.*\d.*?)[_\-. ](\d{1,4})|(.*\d)[_\-. ]?([A-Za-z])")
"""A name that ends in a number or letter of its own, where another number stands before it. Longer numbers are those of
patients."""

SHARES = frozenset(("train", "training", "tr", "val", "valid", "validation", "va", "test", "testing", "ts"))
"""Names of folders that are a share of a data set, and no patient's."""

Evidence = Literal["sure", "word", "bare"]
"""What tells of a part: a word of `PARTS`, a tile's place, BIDS; a patient, another word or a day; a bare number or
letter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LikelyGroups:
    """What names say of cases that belong together."""

    of: Mapping[str, str] = field(default_factory=dict)
    """Name of a case -> what it is a part of; cases that stand alone are left out."""
    kind: str = ""
    """What the parts are, such as frames."""
    unsure: tuple[str, ...] = ()
    """Two names that may be parts of one thing, where names alone do not tell."""

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

    A group is what is left of a name without its part, up to the patient's number where one is named. A word of
    `PARTS`, a tile's place, and BIDS' sessions and subjects are believed. Patients, other words and days are where
    groups have up to `LARGEST_MEAN` cases on average: PT1 may be a site. A bare number or letter is where there are
    `FEWEST_GROUPS`, too, and it comes again in other groups: numbers that run on over all groups are those of patients.

    Args:
        names: of the cases, such as patient001_frame01 and patient001_frame12.
    """
    ending = _shared_ending(names)
    parts = {name: part for name in names if (part := _part_of(name, ending)) is not None}
    known = _shared(names, {name: p for name, p in parts.items() if p.evidence == "sure"})
    unsure: tuple[str, ...] = ()
    for evidence in ("word", "bare"):
        own = {name: part for name, part in parts.items() if part.evidence == evidence}
        num = len({part.of for part in own.values()})
        are_small = len(own) <= LARGEST_MEAN * num
        if evidence == "bare" and (not are_small or 2 * len({part.mark for part in own.values()}) > len(own)):
            continue
        if are_small and (evidence == "word" or num >= FEWEST_GROUPS):
            known |= _shared(names, own)
        elif num > 1:
            unsure = tuple(_shared(names, own))[:2]
    kinds = Counter(part.kind for part in known.values() if part.kind).most_common(1)
    return LikelyGroups(
        of={name: part.of for name, part in known.items()}, kind=kinds[0][0] if kinds else "", unsure=unsure
    )


def are_patients(folders: Mapping[str, int]) -> bool:
    """Whether folders are those of patients, not of sites, by their names and how many cases each has.

    Args:
        folders: name of a folder -> its cases, in folders below it, too.
    """
    if all(PATIENT.match(name) for name in folders):
        return True
    # Folders without a number, such as Bern or tumor, are sites or kinds of cases.
    if any(NO_PATIENT.match(name) or not any(c.isdigit() for c in name) for name in folders):
        return False
    return sum(folders.values()) / len(folders) <= LARGEST_MEAN


def group_by_folder(root: Path, items: Sequence[Plain], folders: Sequence[str]) -> list[str]:
    """Give cases of one patient's folder their `group`, where folders hold several.

    Args:
        root: the folder that patients' folders lie in.
        items: cases of a list, which are changed.
        folders: name of the patient's folder of each.

    Returns:
        Notes for people: what was done, or why folders are not taken for patients.

    Raises:
        DataError: Folders are shares of a data set, such as train/.
    """
    counts = Counter(folders)
    if shares := sorted(name for name in counts if name.lower() in SHARES):
        raise DataError(
            f"{root}: the folders {some_of((f'{n}/' for n in shares), most=5)} look like shares of a data set, not "
            "like patients. List the cases in a datalist.json, with the keys `validation` and `testing`."
        )
    example, most = counts.most_common(1)[0]
    if most == 1:
        return []
    if not are_patients(counts):
        return [
            f"the folders {some_of((f'{name}/' for name in counts), most=3)} are not taken for patients, by their "
            "names or since they hold many cases each. If they are, give their cases a `group` in datalist.json."
        ]
    for item, folder in zip(items, folders, strict=True):
        item["group"] = folder
    return [
        f"{len(items)} cases lie in the folders of {len(counts)} patients, such as {most} in {example}/: no fold "
        "splits one (`group` in datalist.json). Remove `group` and `fold` there if each case stands alone."
    ]


@dataclass(frozen=True, slots=True)
class _Part:
    """What a name says of a case that is a part of something."""

    of: str
    kind: str
    evidence: Evidence
    mark: str = ""
    """The bare number or letter."""


def _shared(names: Sequence[str], parts: Mapping[str, _Part]) -> dict[str, _Part]:
    """The parts that are not the only one of their thing, in the order of `names`; a case that is called like the whole
    is one of them, as 017 is of 017_2.
    """
    wholes = {part.of for part in parts.values()}
    plain = {name: base for name in names if name not in parts and (base := ENDINGS.sub("", name)) in wholes}
    all_parts = {n: parts.get(n) or _Part(plain[n], "", "bare") for n in names if n in parts or n in plain}
    counts = Counter(part.of for part in all_parts.values())
    return {name: part for name, part in all_parts.items() if counts[part.of] > 1}


def _shared_ending(names: Sequence[str]) -> str:
    """The last word that all names share, such as _ct of 017_2_ct; it tells nothing of parts."""
    ending = os.path.commonprefix([name[::-1] for name in names])[::-1] if len(names) > 1 else ""
    return match.group() if (match := re.search(r"[_\-. ][A-Za-z][A-Za-z0-9]*$", ending)) else ""


def _part_of(name: str, ending: str) -> _Part | None:
    """What a name says of the part that a case is, less an ending that others have, too; None where it says nothing."""
    base, mark = ENDINGS.sub("", name), ""
    rest, kind, evidence = _without_words(base)
    if (owner := PATIENT.search(rest) or STACK.search(rest)) is not None:
        # pt01 may be a patient or a part of the data, so that the number of cases has to tell.
        is_sure = evidence == "sure" or owner.group().lower().startswith("sub-")
        rest, evidence = rest[: owner.end()], "sure" if is_sure else "word"
    elif not kind and (word := CHANNEL_WORD.search(base)) is not None and word.group() != ending:
        rest, kind, evidence = base[: word.start()], "images", "word"
    elif not kind and (match := BARE.fullmatch(rest.removesuffix(ending))) is not None:
        rest, mark = match.group(1) or match.group(3), match.group(2) or match.group(4)
    if rest == base or not _may_be_whole(rest, evidence):
        return None
    return _Part(rest, kind or "scans", evidence, mark)


def _may_be_whole(rest: str, evidence: Evidence) -> bool:
    """Whether what is left of a name can be a patient or a stack: it has more than a site and its number and, where no
    part is sure, a number that is no date's.
    """
    left = NO_PATIENT.sub("", rest)
    if evidence == "sure":
        return any(c.isalnum() for c in left)
    return any(c.isdigit() for c in YEAR.sub("", DATE.sub("", left)))


def _without_words(name: str) -> tuple[str, str, Evidence]:
    """A name less what names a part, what the part is, and what tells; no kind where the name has none."""
    owner = PATIENT.search(name)
    cuts, maybe, kind = _places(name, [owner.span()] if owner is not None else [])
    more: list[tuple[int, int]] = []
    for start, stop, is_after in sorted(maybe):
        if owner is not None or not is_after or _has_number(name[:start], [*cuts, *more]):
            more.append((start, stop))
    if more and _has_number(name, [*cuts, *more]):  # the patient's number is left
        return _cut(name, [*cuts, *more]), kind or "scans", "sure" if cuts else "word"
    return (rest, kind, "sure") if cuts and (rest := _cut(name, cuts)) else (name, "", "bare")


def _places(
    name: str, taken: Sequence[tuple[int, int]]
) -> tuple[list[tuple[int, int]], list[tuple[int, int, bool]], str]:
    """Where a name surely names a part; where it may, as `_doubtful` says; and what the sure part is.

    Args:
        taken: places that name the patient.
    """
    kind = "tiles" if GRID.search(name) else "visits" if SESSION.search(name) else ""
    sure = [match.span() for pattern in (GRID, SESSION) for match in pattern.finditer(name)]
    dates = [match.span() for match in DATE.finditer(name) if not _overlaps(match, taken)]
    maybe = [(*date, True) for date in dates]
    words = [word for word in WORD.finditer(name) if not _overlaps(word, [*taken, *sure, *dates])]
    for word, after in zip_longest(words, words[1:]):
        number = after if after is not None and after.group().isdigit() and after.start() - word.end() <= 1 else None
        if number is not None and word.group().lower() in PARTS:
            kind = kind or PARTS[word.group().lower()]
            sure.append((word.start(), number.end()))
        elif (place := _doubtful(name, word, number)) is not None:
            maybe.append(place)
    return sure, maybe, kind


def _overlaps(word: re.Match[str], places: Collection[tuple[int, int]]) -> bool:
    return any(start < word.end() and word.start() < stop for start, stop in places)


def _has_number(name: str, places: Collection[tuple[int, int]]) -> bool:
    """Whether a name, or the beginning of one, has a number outside of some places."""
    return any(c.isdigit() for c in _cut(name, [place for place in places if place[1] <= len(name)]))


def _doubtful(name: str, word: re.Match[str], number: re.Match[str] | None) -> tuple[int, int, bool] | None:
    """Where a word of `MAYBE_PARTS` with its number, or of `STATES`, stands, and whether it is a part only after the
    patient's number; None for other words.
    """
    text, before = word.group().lower(), name[: word.start()][-1:]
    joined = number is not None and number.start() == word.end()
    if number is not None and text in MAYBE_PARTS:
        is_word = not name[number.end() :][:1].isalpha() and not (len(text) == 1 and before.isalnum())  # not T1w, A1S9
        return (word.start(), number.end(), True) if is_word else None
    # Two letters are a word only where they stand alone: names may be digests, such as 00ed12.
    if text not in STATES or (len(text) <= 2 and (before.isalpha() or name[word.end() :][:1].isalnum())):
        return None
    # post1 of 01_post1, but post of post01, whose number is the patient's.
    is_numbered = joined and any(c.isdigit() for c in name[: word.start()])
    return word.start(), number.end() if number is not None and is_numbered else word.end(), len(text) == 1


def _cut(name: str, places: Collection[tuple[int, int]]) -> str:
    """A name less some places of it, and less what joined them to the rest."""
    for start, stop in sorted(places, reverse=True):
        name = f"{name[:start]}\0{name[stop:]}"
    name = re.sub(r"[_\-. ]*\0[_\-. ]*(?=\0|$)|^(?:[_\-. ]*\0[_\-. ]*)+|[_\-. ]*\0", "", name)
    return name.strip("_-. ")
