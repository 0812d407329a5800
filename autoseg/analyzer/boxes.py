"""Boxes around what matters in an image, in stored voxels, and the histogram inside one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from autoseg.data.histograms import Histogram, chunks, histograms_by_label, pool

Box = tuple[slice, slice, slice]


def box_above_zero(array: np.ndarray, slope: float, inter: float, whole: Histogram) -> Box:
    """Box around the voxels with an intensity above 0, the whole image where there is none."""
    if whole.values[0] > 0 or whole.values[-1] <= 0:
        return _full(array)
    zero = -inter / slope
    return _box(array, lambda part: part > zero if slope > 0 else part < zero) or _full(array)


def box_other_than_zero(array: np.ndarray, slope: float, inter: float, whole: Histogram) -> Box:
    """Box around the voxels with an intensity other than 0, the whole image where there is none."""
    place = int(np.searchsorted(whole.values, 0.0))
    if place == len(whole.values) or whole.values[place] != 0:
        return _full(array)
    return _box(array, lambda part: part * slope + inter != 0) or _full(array)


def within(box: Box, array: np.ndarray, slope: float, inter: float, whole: Histogram) -> Histogram:
    """The histogram of a box, counted in the box or around it, whichever is less."""
    inside = array[box]
    if inside.size == array.size:
        return whole
    if 2 * inside.size > array.size:
        rest = pool([histograms_by_label(part, None, slope, inter)[0] for part in around(array, box)])
        if whole.includes(rest):
            return whole.without(rest)
    return histograms_by_label(inside, None, slope, inter)[0]


def around(array: np.ndarray, box: Box) -> list[np.ndarray]:
    """The parts of an image outside a box; they do not overlap."""
    x, y, z = box
    parts = [array[: x.start], array[x.stop :], array[x, : y.start], array[x, y.stop :]]
    parts += [array[x, y, : z.start], array[x, y, z.stop :]]
    return [p for p in parts if p.size]


def _full(array: np.ndarray) -> Box:
    x, y, z = (slice(0, n) for n in array.shape)
    return x, y, z


def _box(array: np.ndarray, holds: Callable[[np.ndarray], np.ndarray]) -> Box | None:
    """Smallest box around the voxels for which `holds`, None where there is none."""
    faces = [array[0], array[-1], array[:, 0], array[:, -1], array[:, :, 0], array[:, :, -1]]
    if all(bool(np.any(holds(face))) for face in faces):
        return _full(array)
    seen = [np.zeros(n, bool) for n in array.shape]
    for part in chunks(array.shape):
        mask = holds(array[:, :, part])
        plane: np.ndarray = np.any(mask, axis=2)
        seen[0] |= plane.any(axis=1)
        seen[1] |= plane.any(axis=0)
        seen[2][part] = mask.any(axis=(0, 1))
    if not seen[0].any():
        return None
    x, y, z = (slice(int(s.argmax()), len(s) - int(s[::-1].argmax())) for s in seen)
    return x, y, z


def hull(boxes: Sequence[Box]) -> Box:
    """The smallest box around several."""
    x, y, z = (slice(min(b[a].start for b in boxes), max(b[a].stop for b in boxes)) for a in range(3))
    return x, y, z
