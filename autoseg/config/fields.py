"""What the classes of settings are made of: their strict base, and types that several of them use."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from autoseg.config.units import parse_duration, parse_size
from autoseg.errors import ConfigError

USUAL_NUM_FOLD = 5
"""Folds of a cross-validation. Source: nnU-Net, Auto3DSeg."""


class Strict(BaseModel):
    """Base of everything read from a user's YAML: no unknown keys, no changes afterwards."""

    # Built when first used: commands that only look read few of the settings.
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, defer_build=True)


def _check_size(text: str) -> str:
    try:
        parse_size(text)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return text


def _check_duration(text: str) -> str:
    try:
        parse_duration(text)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return text


def check_unique(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values.

    Raises:
        ValueError: One of them is there twice.
    """
    twice = sorted({str(v) for v in values if values.count(v) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} is given more than once. Give each value once.")
    return values


def _check_pairs(pairs: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    check_unique(tuple(name for pair in pairs for name in pair))
    return pairs


def _check_rising(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] >= bounds[1]:
        raise ValueError(f"expected the lower bound first, then a higher one, found [{bounds[0]}, {bounds[1]}].")
    return bounds


def _check_concept(text: str) -> str:
    parts = [part.strip() for part in text.split(",", 2)]
    if len(parts) == 2 or not all(parts):
        raise ValueError(f"expected scheme, code and meaning, such as 'SCT,10200004,Liver', found {text!r}.")
    if len(parts) == 3 and any(len(part) > most for part, most in zip(parts, (16, 16, 64), strict=True)):
        raise ValueError(f"scheme and code have 16 characters at most, the meaning 64, as in DICOM; found {text!r}.")
    return text


Count = Annotated[int, Field(ge=1)]

Positive = Annotated[float, Field(gt=0)]

NotNegative = Annotated[float, Field(ge=0)]

Share = Annotated[float, Field(ge=0, le=1)]

ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]

Positive3 = tuple[Positive, Positive, Positive]

Voxels3 = tuple[Count, Count, Count]

FoldIndex = Annotated[int, Field(ge=0)]

Duration = Annotated[str, AfterValidator(_check_duration)]
"""A text such as 10m, 2h or 1d."""

MemorySize = Annotated[str, AfterValidator(_check_size)]
"""A text such as 4GB."""

Byte = Annotated[int, Field(ge=0, le=255)]
"""0 to 255."""

Concept = Annotated[str, AfterValidator(_check_concept)]
"""A coded concept: scheme, code and meaning, such as SCT,10200004,Liver; or a name of `autoseg/data/terms.csv`."""

RGB = tuple[Byte, Byte, Byte]
"""Red, green, blue."""

LateralPairs = Annotated[tuple[tuple[str, str], ...], AfterValidator(_check_pairs)]
"""Pairs of class names; a class is in one of them at most."""

Rising = Annotated[tuple[float, float], AfterValidator(_check_rising)]
"""A lower and a higher number."""
