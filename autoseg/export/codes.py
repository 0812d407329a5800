"""What a class is in coded terms, as segmentations of DICOM and 3D Slicer say it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Code:
    """A coded concept."""

    scheme: str
    """SCT: SNOMED CT."""
    value: str
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """What a class is."""

    category: Code
    type: Code
    modifier: Code | None = None
    """Left or right."""
    region: Code | None = None
    """Where in the body something abnormal lies."""
    region_modifier: Code | None = None


UNKNOWN = Term(category=Code("SCT", "123037004", "Anatomical Structure"), type=Code("SCT", "85756007", "Tissue"))
"""Of a class of which no more is known."""


def term_of(name: str, codes: Mapping[str, Any]) -> Term:
    """The term of a class.

    Args:
        name: of the class.
        codes: as the user's settings have them; empty where there are none.
    """
    return UNKNOWN
