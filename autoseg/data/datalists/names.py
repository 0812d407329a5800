"""Names of cases from the names of their files, and the one rule by which a name that was changed is known again."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from autoseg.data.formats.table import stem_of

FIRST_CHANNEL = re.compile(r"(?<=.)_0000$")
"""nnU-Net's number of the first channel. Other numbers stay: case_0003 is the fourth case, not the fourth channel."""
NOT_IN_NAMES = frozenset('/\\<>:"|?*')
"""Letters that a file name on Linux, macOS or Windows cannot have.
Source: Microsoft, Naming Files, Paths, and Namespaces."""
ENDINGS = re.compile(
    r"[_\-. ](image|images|img|volume|scan|label|labels|labelmap|seg|segmentation|rtstruct|mask|masks|gt|pred|"
    r"prediction)$",
    re.IGNORECASE,
)
"""Endings that say what a file is, not of which case."""
IMAGE_ENDINGS = r"[_\-. ]?(image|images|img|volume|scan|ct|mri|mr)$"
LABEL_ENDINGS = (
    r"[_\-. ]?(label|labels|labelmap|lbl|seg|segm|dseg|segmentation|segmentations|mask|masks|msk|gt|truth|groundtruth|"
    r"annotation|annotations|lesion|lesions|wmh|roi)$"
)
LABEL_BEGINNINGS = r"^(label|labels|seg|segmentation|mask|gt)[_\-. ]"
IMAGE_BEGINNINGS = r"^(image|img|volume|scan)[_\-. ]"
"""Words that tell images from labels, at the ends and beginnings of their files' names."""
RULE = (
    "of the same name but for upper and lower case, signs between letters and digits, _0000, "
    "and an ending such as _seg, _label or _pred"
)
"""What `loose_key` lets be different, in words."""


def unique_names(paths: Sequence[Path]) -> list[str]:
    """Names for cases from their first images (relative paths), unique and fit for file names.

    The stem without nnU-Net's _0000; where that is not unique, with the folders above it, and at last a number.
    Names stay as they are; only what a file system cannot hold, or a terminal cannot show, becomes an underscore, and
    a dot that would hide the file is left out. Case is ignored when names are compared, since some file systems do.
    """
    parts = [(*p.parent.parts, FIRST_CHANNEL.sub("", stem_of(p))) for p in paths]
    depth = [1] * len(paths)

    def name(i: int) -> str:
        return file_name("_".join(parts[i][-depth[i] :]))

    names = [name(i) for i in range(len(paths))]
    while clash := [i for i in _clashing(names) if depth[i] < len(parts[i])]:
        for i in clash:
            depth[i] += 1
            names[i] = name(i)
    taken = {_folded(name) for name in names}
    for n, i in enumerate(_clashing(names), start=1):
        number = next(k for k in itertools.count(n) if _folded(f"{names[i]}_{k}") not in taken)
        names[i] = f"{names[i]}_{number}"
        taken.add(_folded(names[i]))
    return names


def file_name(text: str) -> str:
    """The text as the name of a file."""
    fit = "".join("_" if c in NOT_IN_NAMES or not c.isprintable() else c for c in text)
    return fit.strip(" ").lstrip(".") or "case"


def path_hint(path: str) -> str:
    """What to say of a path that is not there, written as on Windows or with blanks around; empty for another."""
    if path != path.strip():
        return " It begins or ends with a blank."
    return " Its folders are parted by backslashes; write slashes (/)." if "\\" in path else ""


def _folded(name: str) -> str:
    """Equal for names that are one file on some file system: macOS and Windows ignore case, macOS composes letters."""
    return unicodedata.normalize("NFC", name).casefold()


def _clashing(names: Sequence[str]) -> list[int]:
    counts = Counter(_folded(n) for n in names)
    return [i for i, n in enumerate(names) if counts[_folded(n)] > 1]


def is_label_name(name: str) -> bool:
    """Whether a file's name, or what is left of it, is that of a label."""
    return base_of_label(name) != name or re.fullmatch(LABEL_ENDINGS, name, re.IGNORECASE) is not None


def base_of_label(name: str) -> str:
    """A label's name less the word that says that it is one: 7 of 7_seg and of segmentation-7."""
    for pattern in (LABEL_ENDINGS, LABEL_BEGINNINGS):
        if (base := re.sub(pattern, "", name, flags=re.IGNORECASE)) != name and base:
            return base
    return name


def loose_key(stem: str) -> str:
    """What is left of a name without case, signs, the first channel's number and an ending that says what a file is.

    Letters of every script are kept, so that two patients never become one for want of ASCII.
    """
    text = unicodedata.normalize("NFKC", stem)
    text = ENDINGS.sub("", FIRST_CHANNEL.sub("", text)) or text
    words = "".join(c if c.isalnum() or unicodedata.category(c).startswith("M") else " " for c in text.casefold())
    return "_".join(words.split()) or text


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairing:
    """Which file goes with which."""

    pairs: dict[Path, Path]
    """Wanted file -> the file of the other folder that goes with it."""
    by_rule: tuple[Path, ...]
    """Those wanted whose file has not exactly the same name."""
    faults: tuple[str, ...]
    """Files that may go with several, in sentences."""
    rest: tuple[Path, ...]
    """Files of the other folder that go with none."""


def pair_files(wanted: Sequence[Path], others: Sequence[Path]) -> Pairing:
    """Pair two folders' files by name: first those of exactly the same stem, then the rest by `loose_key`."""
    faults: list[str] = []
    exact = _by_key(((stem_of(p), p) for p in wanted), ((stem_of(p), p) for p in others), faults)
    taken = {p for group in exact for p in (*group[0], *group[1])}
    loose = _by_key(
        ((loose_key(stem_of(p)), p) for p in wanted if p not in taken),
        ((loose_key(stem_of(p)), p) for p in others if p not in taken),
        faults,
    )
    taken |= {p for group in loose for p in (*group[0], *group[1])}
    single = [(a[0], b[0]) for a, b in (*exact, *loose) if len(a) == len(b) == 1]
    return Pairing(
        pairs=dict(single),
        by_rule=tuple(a[0] for a, b in loose if len(a) == len(b) == 1),
        faults=tuple(faults),
        rest=tuple(p for p in others if p not in taken),
    )


def _by_key(
    wanted: Iterable[tuple[str, Path]], others: Iterable[tuple[str, Path]], faults: list[str]
) -> list[tuple[list[Path], list[Path]]]:
    """The files of each key that both sides have; more than one on a side is a fault."""
    groups: defaultdict[str, tuple[list[Path], list[Path]]] = defaultdict(lambda: ([], []))
    for side, files in enumerate((wanted, others)):
        for key, path in files:
            groups[key][side].append(path)
    both = [group for group in groups.values() if all(group)]
    for own, other in both:
        if len(own) > 1:
            faults.append(f"{own[0]} and {own[1].name}: {other[0]} may belong to either. Rename one of the two.")
        elif len(other) > 1:
            faults.append(f"{own[0].name}: {other[0]} and {other[1]} may both belong to it. Keep one of them there.")
    return both
