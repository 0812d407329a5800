"""Where in an image to look: the locator's region, and what the first model found. Axes: X, Y, Z in RAS."""

from __future__ import annotations

import math

import numpy as np
import torch

from autoseg.data.components import number_components
from autoseg.data.preprocess import Region
from autoseg.inference.postprocess import BODY_AXIS
from autoseg.inference.probable import most_probable
from autoseg.inference.windows import ProbRows

MARGIN_MM = 16.0
"""Kept around what a coarse look found: four of the locator's voxels."""
SPECK = 0.05
"""Size of a component, as a share of the largest, below which the locator's findings do not count."""
KEPT_VALUES = 1 << 28
"""Probabilities of the first model that are kept as float16, 512 MiB; where there are more it runs again."""


def can_keep(rows: ProbRows) -> bool:
    """Whether a model's probabilities are few enough to be kept."""
    return rows.num_outputs * math.prod(rows.shape) <= KEPT_VALUES


class KeptRows:
    """A model's probabilities that are all there: made once, looked at, then handed out."""

    def __init__(self, rows: ProbRows, *, keep: bool = True) -> None:
        """Make all rows.

        Args:
            keep: them, where they are not too many; else only where a class was found.
        """
        self.shape, self.axis, self.num_outputs = rows.shape, rows.axis, rows.num_outputs
        length = rows.shape[rows.axis]
        self._held: torch.Tensor | None = None
        if keep and can_keep(rows):
            plane = [s for a, s in enumerate(rows.shape) if a != rows.axis]
            self._held = torch.empty((length, *plane, rows.num_outputs), dtype=torch.float16)
        foreground = []
        for start in range(0, length, rows.at_once):
            stop = min(start + rows.at_once, length)
            probs = rows.rows(start, stop)
            foreground.append(((probs > 0.5).any(1) if rows.independent else most_probable(probs, 1) > 0).cpu())
            if self._held is not None:
                self._held[start:stop] = probs.movedim(1, -1)
        self.foreground = torch.cat(foreground).movedim(0, rows.axis).numpy()
        """(X, Y, Z) bool on the network's grid: where any class is."""

    @property
    def are_kept(self) -> bool:
        """Whether the rows can be had again; else there were too many."""
        return self._held is not None

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """See `restore.Rows`."""
        assert self._held is not None
        return self._held[start:stop].float().movedim(-1, 1)


def region_of(
    foreground: np.ndarray,
    box: Region,
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    least: tuple[int, int, int],
    *,
    keep: tuple[int, ...] = (),
) -> Region | None:
    """The region of an image around what was found on a coarser grid.

    Args:
        found: (X, Y, Z) bool over `box`.
        box: of the image that `found` covers.
        shape: of the image.
        spacing_mm: of the image.
        least: voxels of the image that a window covers; a smaller region is widened to it, so that networks see what
            they saw in training and not the padding.
        keep: axes that stay as in `box`.

    Returns:
        None where nothing was found.
    """
    region = []
    for axis, (here, size, mm) in enumerate(zip(box, shape, spacing_mm, strict=True)):
        line = np.flatnonzero(foreground.any(axis=tuple(a for a in range(3) if a != axis)))
        if not len(line):
            return None
        if axis in keep:
            region.append(here)
            continue
        scale = (here.stop - here.start) / foreground.shape[axis]
        low = here.start + math.floor(line[0] * scale - MARGIN_MM / mm)
        high = here.start + math.ceil((line[-1] + 1) * scale + MARGIN_MM / mm)
        lacking = max(0, least[axis] - (high - low))
        low, high = low - lacking // 2, high + lacking - lacking // 2
        low, high = low - max(0, high - size), high + max(0, -low)
        region.append(slice(max(0, low), min(size, high)))
    return region[0], region[1], region[2]


def without_specks(foreground: np.ndarray) -> np.ndarray:
    """Findings without components that are small against the largest."""
    mask = foreground.astype(np.uint8)
    numbered = number_components(mask, (1,))
    sizes = numbered.components.voxels
    if len(sizes) < 2:
        return mask.astype(bool)
    keep = np.append(sizes >= SPECK * sizes[0], False)
    for start, index in numbered.slabs():
        mask[:, :, start : start + index.shape[2]] = keep[index]
    return mask.astype(bool)


def located(
    rows: ProbRows,
    keep_length: bool,
    box: Region,
    spacing_mm: tuple[float, float, float],
    shape: tuple[int, int, int],
    least: tuple[int, int, int],
) -> Region | None:
    """The region that a locator finds.

    Args:
        rows: the locator's, over `box`.
        keep_length: leave the body's length as it is.
    """
    foreground = without_specks(KeptRows(rows, keep=False).foreground)
    return region_of(foreground, box, shape, spacing_mm, least, keep=(BODY_AXIS,) if keep_length else ())
