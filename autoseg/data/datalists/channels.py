"""Words that name an image's channels, in files' names and in lists, and what kind of image each is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autoseg.data.formats.table import stem_of

KINDS: Mapping[str, str] = {
    **dict.fromkeys(("ct", "cbct", "cta", "ctp", "ncct", "contrast ct"), "CT"),
    **dict.fromkeys(("pet", "pt", "suv", "fdg"), "PET"),
    **dict.fromkeys(("mri", "mr", "t1", "t1w", "t1c", "t1ce", "t1gd", "t1n", "t1km", "mprage"), "MRI"),
    **dict.fromkeys(("t2", "t2w", "t2f", "t2s", "flair", "pd", "pdw", "swi", "dir", "stir"), "MRI"),
    **dict.fromkeys(("dwi", "adc", "hbv", "dce", "trace"), "MRI"),
}
"""Word -> CT, PET or MRI. Source: names of files of BraTS, BIDS, PI-CAI (hbv: diffusion at a high b value), FeTS, ISLES
and autoPET."""
CHANNEL_WORD = re.compile(rf"[_\-. ]({'|'.join(KINDS)})$", re.IGNORECASE)
"""Such a word at the end of a name."""


def kind_of(name: str) -> str:
    """CT, MRI, PET, or the name itself where it is none of these."""
    word = name.strip().lower()
    known = "CT" if word.startswith("ct ") else "MRI" if word.startswith(("mr", "t1", "t2")) else name
    return KINDS.get(word, known)


def words_of(images: Sequence[Sequence[Path]]) -> tuple[str, ...]:
    """The words, in lower case, at the end of each case's files, where all cases have the same; else none."""
    found = {
        tuple(m.group(1).lower() if (m := CHANNEL_WORD.search(stem_of(p))) else "" for p in paths) for paths in images
    }
    words = next(iter(found)) if len(found) == 1 else ()
    return words if all(words) else ()


def name_channels(plain: dict[str, Any], names: Sequence[str]) -> str:
    """Write into a list's content what channels are, where that is known, and say which a case has.

    Args:
        plain: the content of a datalist.json, which is changed.
        names: of the channels, two or more.
    """
    if all(name in KINDS for name in names):
        plain["modality"] = {str(c): name for c, name in enumerate(names)}
    return f"each case has {len(names)} channels: {', '.join(names)} (`image` in datalist.json)."
