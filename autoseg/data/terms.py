"""What a class is in the terms of clinical systems: SNOMED CT codes of organs and tissues, found by the class's name.

The table is `terms.csv` beside this file. Its codes and meanings are those of DICOM's own context groups
(CID 7151 "Segmentation Property Types" and CID 4), as pydicom's dictionary lists them; a test compares all of them.
SNOMED's codes in DICOM may be used free of charge. Source: https://dicom.nema.org/medical/dicom/current/output/chtml/part16
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from autoseg.config.settings import ClassCodes
from autoseg.config.types import nearest, suggest
from autoseg.data.side_names import WORD, without_side
from autoseg.errors import ConfigError

TABLE = Path(__file__).with_name("terms.csv")
FILLERS = frozenset(("of", "the"))
"""Words that say nothing: `head of femur` is `femur head`."""


@dataclass(frozen=True, slots=True)
class Code:
    """A coded concept."""

    scheme: str
    """SCT: SNOMED CT."""
    value: str
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """What a class is, as a segment of a DICOM or Slicer segmentation says it."""

    category: Code
    type: Code
    modifier: Code | None = None
    """Left or right."""
    region: Code | None = None
    """Where in the body something abnormal lies."""
    region_modifier: Code | None = None


LEFT, RIGHT = Code("SCT", "7771000", "Left"), Code("SCT", "24028007", "Right")
STRUCTURE = Code("SCT", "123037004", "Anatomical Structure")
"""As 3D Slicer's terminologies and dcmqi have it; newer editions of DICOM's CID 7150 have 91723000 of this meaning."""
TISSUE = Code("SCT", "85756007", "Tissue")
CATEGORIES = {
    "structure": STRUCTURE,
    "tissue": TISSUE,
    "abnormal": Code("SCT", "49755003", "Morphologically Abnormal Structure"),
    "substance": Code("SCT", "91720002", "Body Substance"),
    "object": Code("SCT", "260787004", "Physical object"),
}
"""Source: DICOM's CID 7150 "Segmentation Property Categories"."""
UNKNOWN = Term(category=STRUCTURE, type=TISSUE)
"""Of a class whose name is not in the table: all that is sure."""


@lru_cache(maxsize=1)
def _table() -> dict[tuple[str, ...], Term]:
    """The words of a name -> its term."""
    table = {}
    with TABLE.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            term = Term(category=CATEGORIES[row["category"]], type=Code("SCT", row["code"], row["meaning"]))
            table.update(dict.fromkeys((_words(name) for name in row["names"].split("|")), term))
    return table


def known_names() -> tuple[str, ...]:
    """The names in the table, the first of each row."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return tuple(row["names"].split("|")[0] for row in csv.DictReader(file))


def _words(name: str) -> tuple[str, ...]:
    """The words of a name in lower case; their order says nothing."""
    return tuple(sorted({match.group().lower() for match in WORD.finditer(name)} - FILLERS))


def _direct(name: str) -> Term | None:
    """The term of a name that stands in the table: as it is, in the plural, or as one of several, such as `rib 1`."""
    words = _words(name)
    single = tuple(sorted(word.removesuffix("s") for word in words))
    unnumbered = tuple(word for word in single if not word.isdecimal())
    return _table().get(words) or _table().get(single) or _table().get(unnumbered)


def _sided(name: str) -> Term | None:
    """The same, with left or right taken off and told by a modifier."""
    if term := _direct(name):
        return term
    for is_left, rest in without_side(name):
        if (term := _direct(rest)) and term.modifier is None:
            return Term(category=term.category, type=term.type, modifier=LEFT if is_left else RIGHT)
    return None


def find_term(name: str) -> Term | None:
    """The term of a class by its name; None where the table does not have it.

    Case, signs between words, their order and the plural do not count: `Kidney_L`, `left kidney` and `Left Kidneys` are
    one. Of something abnormal in an organ, such as `liver tumor`, the organ is the region.
    """
    if term := _sided(name):
        return term
    words = [match.group() for match in WORD.finditer(name)]
    for i, word in enumerate(words):
        what = _direct(word)
        if what is None or what.category != CATEGORIES["abnormal"]:
            continue
        if where := _sided(" ".join(words[:i] + words[i + 1 :])):
            return Term(category=what.category, type=what.type, region=where.type, region_modifier=where.modifier)
    return None


def term_of(name: str, codes: Mapping[str, str | ClassCodes]) -> Term:
    """The term of a class: as the user set it, else by the table, else `UNKNOWN`.

    Args:
        name: of the class.
        codes: the setting of that name.

    Raises:
        ConfigError: A short form that the table does not have.
    """
    if (own := codes.get(name)) is None:
        return find_term(name) or UNKNOWN
    parts: dict[str, Code] = {}
    base = UNKNOWN
    for key, text in ({"type": own} if isinstance(own, str) else own.model_dump(exclude_none=True)).items():
        if "," in text:
            scheme, value, meaning = (part.strip() for part in text.split(",", 2))
            parts[key] = Code(scheme, value, meaning)
        elif key == "type":
            base = _known(name, text)
        else:
            parts[key] = _known(name, text).type
    fields = {key: getattr(base, key) for key in ("category", "type", "modifier", "region", "region_modifier")}
    return Term(**{**fields, **parts})


def _known(name: str, text: str) -> Term:
    sides = {"left": LEFT, "right": RIGHT}
    if side := sides.get(text.lower()):
        return Term(category=STRUCTURE, type=side)
    if term := find_term(text):
        return term
    likely = nearest(text, known_names())
    hint = f"Did you mean {likely}? " if likely else ""
    raise ConfigError(
        f"codes.{name}: {text!r} is not in the table of codes. {hint}Expected a name that is, or scheme, code and "
        "meaning, such as 'SCT,10200004,Liver'."
    )


def check_codes(codes: Mapping[str, str | ClassCodes], names: Collection[str]) -> None:
    """Make sure that the classes whose codes are set exist, and that the codes are known.

    Raises:
        ConfigError: All faults.
    """
    faults = [f"codes: {name} is no class. {suggest(name, names)}" for name in codes if name not in names]
    for name in codes:
        try:
            term_of(name, codes)
        except ConfigError as error:
            faults += error.messages
    if faults:
        raise ConfigError(faults)
