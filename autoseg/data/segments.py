"""The classes of a label file as segments: name, values, coded term and colour, as segmentation formats have them."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from autoseg.config.settings import ClassCodes
from autoseg.data.formats.segmentation import Colour
from autoseg.data.labels import LabelMap
from autoseg.data.terms import Term, term_of

GOLDEN = (5**0.5 - 1) / 2
"""Of a circle of hues: steps by it lie far from all earlier ones, however many there are."""
MOST_COLOURS = 512
"""To choose from: twice as many as classes can be."""
FIRST_COLOURS: tuple[Colour, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
"""Told apart by the colour-blind, too. Source: Okabe and Ito 2008, as in the report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One class of a label file."""

    name: str
    values: tuple[int, ...]
    """The values of its voxels; several where regions overlap."""
    term: Term
    colour: Colour


@lru_cache(maxsize=8)
def class_colours(count: int) -> tuple[Colour, ...]:
    """Colours for classes: each is, of many, that which is least like those before it."""
    colours = list(FIRST_COLOURS[:count])
    hues = [(i * GOLDEN % 1, (0.5, 0.75, 1.0)[i % 3], (1.0, 0.85, 0.65)[i % 3]) for i in range(MOST_COLOURS)]
    others = np.rint([[255 * part for part in colorsys.hsv_to_rgb(*hue)] for hue in hues])
    apart = np.min([np.linalg.norm(others - colour, axis=1) for colour in FIRST_COLOURS], axis=0)
    while len(colours) < count:
        best = int(apart.argmax())
        red, green, blue = others[best].astype(int).tolist()
        colours.append((red, green, blue))
        apart = np.minimum(apart, np.linalg.norm(others - others[best], axis=1))
    return tuple(colours)


def segments_of(
    label_map: LabelMap, codes: Mapping[str, str | ClassCodes], colours: Mapping[str, Colour] | None = None
) -> tuple[Segment, ...]:
    """The classes of label files of a label map.

    Args:
        codes, colours: the settings of these names; a class that `colours` does not name has one that others have not.

    Raises:
        ConfigError: A code is not known.
    """
    own = colours or {}
    free = [c for c in class_colours(len(label_map.names) + len(own)) if c not in own.values()]
    shown = [own[name] if name in own else free.pop(0) for name in label_map.names]
    rows = zip(label_map.names, _values(label_map), shown, strict=True)
    return tuple(Segment(name=n, values=v, term=term_of(n, codes), colour=c) for n, v, c in rows)


def _values(label_map: LabelMap) -> tuple[tuple[int, ...], ...]:
    """The values that each class has in a predicted file: of exclusive classes the painted one alone."""
    return label_map.values if label_map.sigmoid else tuple((v,) for v in label_map.painted_values)


def mask_of(array: np.ndarray, segment: Segment) -> np.ndarray:
    """Where a segment lies in label values: bool of the same shape."""
    if len(segment.values) == 1:
        return np.asarray(array == segment.values[0])
    table = np.zeros(65536, bool)
    table[list(segment.values)] = True
    return table[array]


def layers_of(array: np.ndarray, segments: Sequence[Segment]) -> list[list[Segment]]:
    """Segments put into as few layers as are met in order, so that none in a layer overlap in label values."""
    present = set(np.unique(array).tolist())
    layers: list[tuple[list[Segment], set[int]]] = []
    for segment in segments:
        own = present & {*segment.values}
        members, taken = next((layer for layer in layers if not layer[1] & own), ([], set()))
        if not members:
            layers.append((members, taken))
        members.append(segment)
        taken |= own
    return [members for members, _ in layers] or [[]]
