"""Words that name an image's channels, in files' names and in lists, and what kind of image each is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from autoseg.data.formats.table import read_grid, stem_of, suffix_of
from autoseg.errors import DataError, some_of

COMMON = 0.9
"""Of the cases, how many have an image that is a channel; what fewer have is left out. A choice."""
NUM_CHECKED = 5
"""Cases whose channels are compared with the label's grid."""

CHANNEL = re.compile(r"_(\d{4})$")
"""nnU-Net's number of a channel at the end of a file's stem."""
KINDS: Mapping[str, str] = {
    **dict.fromkeys(("ct", "cbct", "cta", "ctp", "ncct", "ctres", "contrast ct"), "CT"),
    **dict.fromkeys(("pet", "pt", "suv", "fdg"), "PET"),
    **dict.fromkeys(("mri", "mr", "mprage", "pd", "pdw", "swi", "dir", "stir"), "MRI"),
    **dict.fromkeys(("dwi", "adc", "hbv", "dce", "trace"), "MRI"),
}
"""Word -> CT, PET or MRI. Source: names of files of BIDS, PI-CAI (hbv: diffusion at a high b value), ISLES, autoPET."""
_MRI = r"(?:ce|hr|3d|2d|ax|sag|cor)?(?:t1|t2|flair)[a-z]{0,4}"
"""Words of MRI: T1w, t1ce, t2f (BIDS, BraTS), ceT1, hrT2 (CrossMoDA), 3DFLAIR (MSSEG)."""
_WORD = rf"{_MRI}|{'|'.join(KINDS)}"
CHANNEL_WORD = re.compile(rf"[_\-. ]+({_WORD})$", re.IGNORECASE)
"""Such a word at the end of a name."""


def is_channel(name: str) -> bool:
    """Whether a name is such a word."""
    return re.fullmatch(_WORD, name, re.IGNORECASE) is not None


def kind_of(name: str) -> str:
    """CT, MRI, PET, or the name itself where it is none of these."""
    word = name.strip().lower()
    known = "CT" if word.startswith("ct ") else "MRI" if word.startswith("mr") or re.match(_MRI, word) else name
    return KINDS.get(word, known)


def split_channel(path: Path) -> tuple[str, str] | None:
    """A file's name without its channel's word, and the word in lower case: a and flair of a_FLAIR.nii.gz; no name is
    left of FLAIR.nii.gz. None where it has no such word.
    """
    stem = f"_{stem_of(path)}"
    match = CHANNEL_WORD.search(stem)
    return (stem[1 : match.start()], match.group(1).lower()) if match else None


def by_word(images: Sequence[Path]) -> dict[str, Path]:
    """Word -> file, of the files that have one."""
    return {split[1]: path for path in images if (split := split_channel(path))}


def in_most(cases: Sequence[Collection[str]]) -> list[str]:
    """What nearly all cases have, sorted: all but one, or nine of ten (`COMMON`)."""
    counts = Counter(name for names in cases for name in names)
    fewest = min(COMMON * len(cases), max(2, len(cases) - 1))
    return sorted(name for name, count in counts.items() if count >= fewest)


def channel_words(cases: Sequence[Sequence[Path]]) -> tuple[str, ...]:
    """The words of each case's files, where all cases have the same, two or more; else none."""
    found = {tuple(split[1] if (split := split_channel(p)) else "" for p in images) for images in cases}
    words = next(iter(found)) if len(found) == 1 else ()
    return words if len(words) > 1 and all(words) and len(set(words)) == len(words) else ()


def case_path(images: Sequence[Path]) -> Path:
    """The path that a case is called by: its first image's, without the channel's word where it has several."""
    first = images[0]
    split = split_channel(first) if len(images) > 1 else None
    if split is None:
        return first
    return first.with_name(f"{split[0]}{suffix_of(first)}") if split[0] else first.parent


def name_channels(plain: dict[str, Any], names: Sequence[str]) -> str:
    """Write into a list's content what channels are, where that is known, and say which a case has.

    Args:
        plain: the content of a datalist.json, which is changed.
        names: of the channels, two or more.
    """
    if all(map(is_channel, names)):
        plain["modality"] = {str(c): name for c, name in enumerate(names)}
    return f"each case has {len(names)} channels: {', '.join(names)} (`image` in datalist.json)."


def on_grid(
    root: Path, names: Sequence[str], cases: Sequence[tuple[Mapping[str, Path], Path]], notes: list[str]
) -> list[str]:
    """The channels that lie on the label's grid in most of some cases, as channels must; all where none does.

    Args:
        cases: images by their channel's name, and the label.
        notes: where it is said what is left out.
    """
    step = max(1, len(cases) // NUM_CHECKED)
    off: dict[str, list[str]] = {}
    num = 0
    for images, label in cases[::step][:NUM_CHECKED]:
        try:
            grid = read_grid(label)[0]
            differences = {n: read_grid(images[n])[0].differs_from(grid) for n in names if n in images}
        except (DataError, OSError):
            continue  # the analysis says what is wrong with it; a folder of masks has no grid of its own
        num += 1
        for name, difference in differences.items():
            if difference:
                off.setdefault(name, []).append(f"{images[name].relative_to(root).as_posix()} ({difference})")
    off = {name: examples for name, examples in off.items() if 2 * len(examples) > num}
    kept = [name for name in names if name not in off]
    where = some_of((f"{name}, as in {examples[0]}" for name, examples in off.items()), 5, "; ")
    if not kept:
        notes.append(f"no image lies on its label's grid: {where}. Resample images to it, or labels to one of them.")
        return list(names)
    if off:
        notes.append(
            f"left out, images that do not lie on their label's grid: {where}. Resample them to it to learn from them."
        )
    return kept
