"""Pictures of a case: slices in three planes with truth and prediction as contours. One volume at a time in memory.

A plane is one PNG with its slices below each other, and for each slice SVG paths in the coordinates of its pixels.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autoseg.data.datalists.cases import Case, read_case_label
from autoseg.data.formats.table import image_digest
from autoseg.data.labels import UNSURE, LabelMap
from autoseg.data.slices import PLANES, as_seen, gray_window, to_gray
from autoseg.data.volumes import read_image, read_label
from autoseg.workspace.files import digest

MOST_SLICES = 24
"""Slices of a plane: with three planes and three cases a report stays in a few MB."""
MOST_PIXELS = 160
"""Longest edge of a slice; larger ones are thinned."""
MARGIN_MM = 15.0
"""Shown around the classes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contour:
    """The outline of one class in one slice."""

    class_index: int
    is_truth: bool
    path: str
    """SVG path in pixels of the slice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plane:
    """All shown slices of one plane."""

    name: str
    png: str
    """Base64: slices below each other, each with its first and last row once more."""
    width: int
    height: int
    """Of one slice, in pixels."""
    aspect: float
    """Width over height in mm."""
    slices: tuple[tuple[Contour, ...], ...]
    positions_mm: tuple[float, ...]
    """Of each slice, from the first voxel of the volume."""
    start: int
    """The slice with most of the classes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CasePicture:
    """One case."""

    planes: tuple[Plane, ...]
    window: tuple[float, float]
    """Intensities shown as black and white."""
    spacing_mm: tuple[float, float, float]
    shape: tuple[int, int, int]


def picture_case(case: Case, prediction: Path, label_map: LabelMap, at: Sequence[int] | None = None) -> CasePicture:
    """Make the pictures of a case that has a label; of several channels the first is shown.

    Args:
        at: the voxel (X, Y, Z in RAS) whose slices are shown first; None: those with most of the classes.

    Raises:
        DataError: A file cannot be read.
    """
    truth = read_case_label(case)
    spacing = truth.spacing_mm
    x, y, z = truth.array.shape[1:]
    targets = [label_map.encode(truth.array[0]), label_map.encode(read_label(prediction).array[0])]
    box = shown_box(targets, spacing)
    targets = [target[(slice(None), *box)].copy() for target in targets]
    image = read_image(case.images[:1]).array[0][box].copy()
    window = gray_window(image)
    gray = to_gray(image, window)
    offset = [b.start for b in box]
    planes = tuple(
        _plane(name, axis, gray, targets, label_map, spacing, offset, None if at is None else at[axis])
        for name, axis in PLANES
    )
    return CasePicture(planes=planes, window=window, spacing_mm=spacing, shape=(x, y, z))


class KeptPictures:
    """Pictures of the last page, so that a live view does not make them anew."""

    def __init__(self) -> None:
        """None so far."""
        self._known: dict[str, CasePicture] = {}
        self._shown: set[str] = set()

    @contextmanager
    def page(self) -> Iterator[None]:
        """While a page is made; afterwards those that are not on it are dropped."""
        self._shown.clear()
        yield
        for key in set(self._known) - self._shown:
            del self._known[key]

    def picture(
        self, case: Case, prediction: Path, label_map: LabelMap, at: Sequence[int] | None = None
    ) -> CasePicture:
        """As `picture_case`, made once as long as the files stay as they are."""
        files = [*case.images, *([] if case.label is None else [case.label]), prediction]
        key = digest([str(prediction), case.segment_values, at, *(image_digest(p) for p in files if p.exists())])
        if key not in self._known:
            self._known[key] = picture_case(case, prediction, label_map, at)
        self._shown.add(key)
        return self._known[key]


KEPT = KeptPictures()


def _is_class(target: np.ndarray) -> np.ndarray:
    """(1 or K, X, Y, Z) encoded target -> (X, Y, Z) bool: any class, neither ignored nor unsure."""
    return np.logical_or.reduce((target > 0) & (target < UNSURE), axis=0)


def shown_box(targets: Sequence[np.ndarray], spacing_mm: Sequence[float]) -> tuple[slice, slice, slice]:
    """The box around all classes and a margin; the whole volume where there is none.

    Args:
        targets: (1 or K, X, Y, Z) each, as `LabelMap.encode` returns them.
    """
    foreground = np.logical_or.reduce([_is_class(target) for target in targets])
    box = []
    for axis in range(3):
        places = np.flatnonzero(foreground.any(axis=tuple(a for a in range(3) if a != axis)))
        margin = int(np.ceil(MARGIN_MM / spacing_mm[axis]))
        first, last = (places[0], places[-1]) if len(places) else (0, foreground.shape[axis])
        box.append(slice(max(0, int(first) - margin), min(foreground.shape[axis], int(last) + margin + 1)))
    return box[0], box[1], box[2]


def _plane(
    name: str,
    axis: int,
    gray: np.ndarray,
    targets: Sequence[np.ndarray],
    label_map: LabelMap,
    spacing: Sequence[float],
    offset: Sequence[int],
    at: int | None,
) -> Plane:
    across, up = [a for a in range(3) if a != axis]
    amount = sum(_is_class(target).sum(axis=(across, up)) for target in targets)
    amount = np.asarray(amount)
    first = int(np.argmax(amount)) if at is None else min(max(0, at - offset[axis]), len(amount) - 1)
    places = _places(amount, first)
    step = [max(1, -(-gray.shape[a] // MOST_PIXELS)) for a in (across, up)]
    pictures, slices = [], []
    for place in places:
        picture = as_seen(np.take(gray, place, axis=axis), step)
        height, width = picture.shape
        # With its edge rows twice, so that smoothing never mixes neighbouring slices.
        pictures.append(np.pad(picture, ((1, 1), (0, 0)), mode="edge"))
        contours = []
        for is_truth, target in zip((True, False), targets, strict=True):
            for i, mask in _masks(np.take(target, place, axis=axis + 1), label_map):
                if path := outline(as_seen(mask, step)):
                    contours.append(Contour(class_index=i, is_truth=is_truth, path=path))
        slices.append(tuple(contours))
    return Plane(
        name=name,
        png=_png(np.concatenate(pictures)),
        width=width,
        height=height,
        aspect=(width * step[0] * spacing[across]) / (height * step[1] * spacing[up]),
        slices=tuple(slices),
        positions_mm=tuple(round((p + offset[axis]) * spacing[axis], 1) for p in places),
        start=places.index(first),
    )


def _masks(flat: np.ndarray, label_map: LabelMap) -> list[tuple[int, np.ndarray]]:
    """Index and (A, B) bool of each class in a slice (1 or K, A, B) of an encoded target."""
    if label_map.sigmoid:
        return [(i, channel == 1) for i, channel in enumerate(flat)]
    values = [int(v) for v in np.unique(flat[0]) if 0 < v < UNSURE]
    return [(v - 1, flat[0] == v) for v in values]


def _places(amount: np.ndarray, wanted: int) -> tuple[int, ...]:
    """The slices to show: those with a class and one beside, evenly thinned, a wanted one among them."""
    nonzero = np.flatnonzero(amount)
    first, last = (int(nonzero[0]) - 1, int(nonzero[-1]) + 1) if len(nonzero) else (0, len(amount) - 1)
    first, last = max(0, min(first, wanted)), min(len(amount) - 1, max(last, wanted))
    even = np.linspace(first, last, min(MOST_SLICES, last - first + 1)).round().astype(int)
    even[np.argmin(np.abs(even - wanted))] = wanted
    return tuple(int(p) for p in np.unique(even))


def outline(mask: np.ndarray) -> str:
    """The edge of a mask as an SVG path along the pixels' borders.

    Args:
        mask: (rows, columns) bool.

    Returns:
        Closed polygons in pixels, whole numbers; empty for an empty mask.
    """
    if not mask.any():
        return ""
    padded = np.pad(mask, 1).astype(np.int8)
    # Directed edges with the mask on their right: each corner has as many going out as coming in.
    follow: dict[tuple[int, int], list[tuple[int, int]]] = {}
    rows, cols = np.nonzero(np.diff(padded, axis=0))
    for r, c in zip(rows.tolist(), cols.tolist(), strict=True):
        below = padded[r + 1, c] == 1
        a, b = (c, r + 1), (c + 1, r + 1)
        follow.setdefault(a if below else b, []).append(b if below else a)
    rows, cols = np.nonzero(np.diff(padded, axis=1))
    for r, c in zip(rows.tolist(), cols.tolist(), strict=True):
        right = padded[r, c + 1] == 1
        a, b = (c + 1, r + 1), (c + 1, r)
        follow.setdefault(a if right else b, []).append(b if right else a)
    parts = []
    while follow:
        first = next(iter(follow))
        corners, here, direction = [], first, (0, 0)
        while True:
            onward = follow[here].pop()
            if not follow[here]:
                del follow[here]
            step = (onward[0] - here[0], onward[1] - here[1])
            if step != direction:
                corners.append(here)
            here, direction = onward, step
            if here == first:
                break
        parts.append(_path(corners))
    return "".join(parts)


def _path(corners: Sequence[tuple[int, int]]) -> str:
    """A closed path of horizontal and vertical lines; padding of one pixel taken off."""
    x, y = corners[0]
    text = f"M{x - 1} {y - 1}"
    for nx, ny in corners[1:]:
        text += f"h{nx - x}" if ny == y else f"v{ny - y}"
        x, y = nx, ny
    return text + "z"


def _png(array: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
