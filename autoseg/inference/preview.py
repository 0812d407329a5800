"""A picture of a predicted image: the slice of each plane with most of the classes, these in colour, and a legend."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autoseg.data.segments import Segment, mask_of
from autoseg.data.slices import PLANES, as_seen, gray_window, to_gray
from autoseg.data.streams import ImageRows
from autoseg.inference.statistics import rows_of_slabs
from autoseg.workspace.files import write_atomic

if TYPE_CHECKING:
    from PIL.Image import Image

PANEL_PIXELS = 360
"""Longest edge of a plane."""
GAP, LINE, FONT = 12, 20, 13
"""Pixels between the parts; of a line of the legend; of its letters."""
OPACITY = 0.35
"""Of a class's colour inside its outline."""
LEGEND_PIXELS = 230
"""Width of an entry of the legend."""


def draw_preview(path: Path, case: str, image: ImageRows, labels: np.ndarray, segments: Sequence[Segment]) -> None:
    """Write the picture of a case as PNG; of several channels the first is shown.

    Args:
        path: of the file.
        case: its name.
        image: in the files' intensities.
        labels: (X, Y, Z) label values in RAS.
        segments: the classes.

    Raises:
        OSError: The file cannot be written.
    """
    planes = _slices(image, labels)
    window = gray_window(np.concatenate([gray.ravel() for gray, _ in planes]))
    longest_mm = max(n * mm for n, mm in zip(image.shape, image.spacing_mm, strict=True))
    panels = []
    for (_, axis), (gray, label) in zip(PLANES, planes, strict=True):
        edges = [a for a in range(3) if a != axis]
        size = [max(1, round(PANEL_PIXELS * image.shape[a] * image.spacing_mm[a] / longest_mm)) for a in edges]
        panels.append(_panel(to_gray(gray, window), label, segments, (size[0], size[1])))
    present = {s.name for s in segments if any(mask_of(label, s).any() for _, label in planes)}
    page = _page(case, panels, [s for s in segments if s.name in present])
    buffer = io.BytesIO()
    page.save(buffer, "PNG", optimize=True)
    write_atomic(path, lambda file: file.write(buffer.getvalue()))


def _slices(image: ImageRows, labels: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each plane the slice with most voxels of a class, the middle one where there is none: image and labels."""
    step, axis = rows_of_slabs(image), image.axis
    counts = [np.zeros(size, np.int64) for size in image.shape]
    slabs = [slice(start, min(start + step, image.shape[axis])) for start in range(0, image.shape[axis], step)]
    for slab in slabs:
        part = _cut(labels, axis, slab) != 0
        for a in range(3):
            sums = part.sum(axis=tuple(b for b in range(3) if b != a))
            counts[a][slab if a == axis else slice(None)] += sums
    places = [int(count.argmax()) if count.any() else len(count) // 2 for count in counts]
    gray = [np.zeros([s for b, s in enumerate(image.shape) if b != a], np.float32) for a in range(3)]
    for slab in slabs:
        part = image.rows(slab.start, slab.stop)[0]
        for a in range(3):
            if a != axis:
                where = [slice(None), slice(None)]
                where[[b for b in range(3) if b != a].index(axis)] = slab
                gray[a][tuple(where)] = np.take(part, places[a], axis=a)
            elif slab.start <= places[a] < slab.stop:
                gray[a][...] = np.take(part, places[a] - slab.start, axis=a)
    return [(gray[a], np.array(np.take(labels, places[a], axis=a))) for _, a in PLANES]


def _cut(array: np.ndarray, axis: int, rows: slice) -> np.ndarray:
    return array[tuple(rows if a == axis else slice(None) for a in range(3))]


def _panel(gray: np.ndarray, label: np.ndarray, segments: Sequence[Segment], size: tuple[int, int]) -> Image:
    """A plane as it is seen, `size` pixels wide and high, with its classes."""
    from PIL import Image

    base = Image.fromarray(as_seen(gray)).resize(size, Image.Resampling.BILINEAR)
    picture = np.repeat(np.asarray(base, np.float32)[..., None], 3, axis=2)
    for segment in segments:
        small = Image.fromarray(as_seen(mask_of(label, segment)).astype(np.uint8) * 255)
        mask = np.asarray(small.resize(size, Image.Resampling.NEAREST)) > 0
        inner = np.pad(mask, 1)
        inner = inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
        colour = np.array(segment.colour, np.float32)
        picture[mask] += OPACITY * (colour - picture[mask])
        picture[mask & ~inner] = colour
    return Image.fromarray(picture.astype(np.uint8))


def _page(case: str, panels: Sequence[Image], segments: Sequence[Segment]) -> Image:
    from PIL import Image, ImageDraw

    width = sum(panel.width + GAP for panel in panels) + GAP
    columns = max(1, (width - GAP) // LEGEND_PIXELS)
    rows = -(-max(1, len(segments)) // columns)
    top = GAP + LINE
    below = top + max(panel.height for panel in panels) + GAP
    page = Image.new("RGB", (max(width, 2 * GAP + LEGEND_PIXELS), below + rows * LINE + GAP), (20, 20, 20))
    draw = ImageDraw.Draw(page)
    draw.text((GAP, GAP // 2), case, fill=(255, 255, 255), font=_font())
    left = GAP
    for panel, (name, _) in zip(panels, PLANES, strict=True):
        page.paste(panel, (left, top))
        if name != "sagittal":
            draw.text((left + 3, top + 2), "R", fill=(255, 255, 255), font=_font())
        left += panel.width + GAP
    for number, segment in enumerate(segments):
        x, y = GAP + number % columns * LEGEND_PIXELS, below + number // columns * LINE
        draw.rectangle((x, y + 3, x + 12, y + 15), fill=segment.colour)
        draw.text((x + 18, y), _short(segment.name), fill=(255, 255, 255), font=_font())
    if not segments:
        draw.text((GAP, below), "no class", fill=(255, 255, 255), font=_font())
    return page


def _short(name: str) -> str:
    """A name that fits into its place in the legend."""
    font = _font()
    if font.getlength(name) <= LEGEND_PIXELS - 24:
        return name
    while name and font.getlength(f"{name}...") > LEGEND_PIXELS - 24:
        name = name[:-1]
    return f"{name}..."


@lru_cache(maxsize=1)
def _font() -> Any:
    """Letters of most alphabets; matplotlib brings them."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), FONT)
