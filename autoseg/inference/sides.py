"""Left and right of what was trained as one class, told apart in the prediction.

Axes: X, Y, Z in RAS, so the left side has the smaller X.
"""

from __future__ import annotations

import numpy as np

from autoseg.data.components import box_of_label, number_components
from autoseg.data.labels import LabelMap
from autoseg.data.streams import ImageRows

COARSE = 64
"""Samples along an axis of the plane, and rows for each as many voxels, of the image that the midline is taken from."""
PAIR = 0.25
"""Size of the second largest component, as a share of the largest, from which both are taken for a pair."""
ACROSS = 0.25
"""Share of a component's width that must lie on its smaller side for it to be cut in two."""


class BodyWatch:
    """An image that is looked at while its rows pass by: where the body's middle lies."""

    def __init__(self, image: ImageRows) -> None:
        self._image = image
        self.grid, self.shape, self.axis = image.grid, image.shape, image.axis
        self.num_channels, self.spacing_mm = image.num_channels, image.spacing_mm
        self._step = [max(1, s // COARSE) for s in image.shape]
        self._step[image.axis] = max(1, min(s for a, s in enumerate(self._step) if a != image.axis))
        self._seen: dict[int, np.ndarray] = {}

    def rows(self, start: int, stop: int) -> np.ndarray:
        """See `ImageRows`."""
        part = self._image.rows(start, stop)
        step = self._step[self.axis]
        for row in range(-(-start // step) * step, stop, step):
            if row not in self._seen:
                cut = [slice(None, None, s) for s in self._step]
                cut[self.axis] = slice(row - start, row - start + 1)
                self._seen[row] = part[0][tuple(cut)].copy()
        return part

    def midline(self) -> float:
        """The body's middle along X in voxels: half of what is brighter than air lies on either side.

        The middle of the image where no row has passed.
        """
        if not self._seen:
            return (self.shape[0] - 1) / 2
        coarse = np.concatenate(list(self._seen.values()), axis=self.axis)
        body = coarse > otsu(coarse)
        profile = body.sum(axis=(1, 2)).cumsum()
        if not len(profile) or profile[-1] == 0:
            return (self.shape[0] - 1) / 2
        at = np.interp(profile[-1] / 2, profile, np.arange(1, len(profile) + 1))
        if self.axis == 0:  # the slabs along X
            return float(np.interp(at - 0.5, np.arange(len(self._seen)), sorted(self._seen)))
        return float((at - 0.5) * self._step[0])


def otsu(values: np.ndarray) -> float:
    """The threshold that parts values into the two groups that differ most. Source: Otsu 1979."""
    counts, edges = np.histogram(values, bins=256)
    centres = (edges[:-1] + edges[1:]) / 2
    below = counts.cumsum()
    above = below[-1] - below
    mass = (counts * centres).cumsum()
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = mass / below - (mass[-1] - mass) / above
    between = np.where((below > 0) & (above > 0), below * above * apart**2, -1.0)
    return float(edges[int(between.argmax()) + 1])


def split_sides(labels: np.ndarray, label_map: LabelMap, midline: float) -> None:
    """Give each side its own value, in place.

    Where the two largest components of a class lie beside each other, the middle is halfway between them; else it
    is the body's. A component goes to the side of its centre as a whole, unless it lies well across the middle:
    then it is cut there.

    Args:
        labels: (X, Y, Z) label values in RAS, as `label_map.decode` gives them.
        midline: the body's middle along X, in voxels.

    Source: the FLARE23 paper tells the kidneys apart by their two largest components and the aorta's centre line.
    """
    if not label_map.merged_sides:
        return
    box = box_of_label(labels)
    labels, midline = labels[box], midline - box[0].start
    for value, left, right in label_map.merged_sides:
        numbered = number_components(labels, (value,))
        components = numbered.components
        if not len(components.label):
            continue
        low, high = components.low[:, 0], components.high[:, 0]
        middle = midline
        if len(low) > 1 and components.voxels[1] >= PAIR * components.voxels[0]:
            first, second = (0, 1) if low[0] < low[1] else (1, 0)
            if high[first] < low[second]:
                middle = (high[first] + low[second]) / 2
        centre = components.mass[:, 0] / components.voxels
        smaller = np.minimum(middle - low, high - middle) / np.maximum(high - low, 1)
        cut = np.append(smaller > ACROSS, False)
        is_right = np.append(centre > middle, False)
        beyond = (np.arange(labels.shape[0]) > middle)[:, None, None]
        for start, index in numbered.slabs():
            part = labels[:, :, start : start + index.shape[2]]
            there = np.where(cut[index], beyond, is_right[index])
            numbered_voxels = index >= 0
            part[numbered_voxels] = np.where(there, right, left)[numbered_voxels].astype(labels.dtype)


def join_sides(labels: np.ndarray, label_map: LabelMap) -> np.ndarray:
    """Labels as they were before `split_sides`: both sides of a class have its value again."""
    if not label_map.merged_sides:
        return labels
    joined = labels.copy()
    for value, left, right in label_map.merged_sides:
        joined[(labels == left) | (labels == right)] = value
    return joined
