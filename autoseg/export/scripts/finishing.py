"""Cleaning of predicted label maps, as autoseg's rules have it. Needs SciPy besides."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.config.type_definitions import KeysCollection
from monai.data.utils import affine_to_spacing
from monai.transforms.spatial.array import Orientation
from monai.transforms.transform import MapTransform
from monai.utils.type_conversion import convert_to_dst_type
from scipy import ndimage

Items = dict[Hashable, Any]
TOUCHING = np.ones((3, 3, 3), bool)
"""Voxels of a component touch by faces, edges or corners; background touches by faces."""


class CleanLabelsd(MapTransform):
    """Take voxels from classes, and fill holes in them.

    Each rule has `channel` and `value`, the voxels it is about, and any of, in this order: `largest` (keep the largest
    component alone), `min_mm3` (remove smaller components), `slice_run` (keep the longest run of slices along the
    body), `min_voxels` (remove the class where it has fewer in all), `fill_holes` (that it alone encloses).
    """

    def __init__(self, keys: KeysCollection, rules: Sequence[Mapping[str, Any]]) -> None:
        """Set up."""
        super().__init__(keys)
        self.rules = rules

    def __call__(self, data: Mapping[Hashable, Any]) -> Items:
        """Label maps of (C, X, Y, Z) as MetaTensor, in any orientation."""
        items: Items = dict(data)
        for key in self.key_iterator(items):
            turn = Orientation(axcodes="RAS")
            turned: Any = turn(items[key])
            voxel_mm3 = math.prod(float(edge) for edge in affine_to_spacing(turned.affine))
            labels = np.array(turned.cpu()).astype(np.int32)
            for rule in self.rules:
                channel = labels[rule["channel"]]
                drop_components(channel, rule, voxel_mm3)
                drop_slices(channel, rule)
            for rule in self.rules:
                if rule.get("fill_holes"):
                    fill_holes(labels[rule["channel"]], rule["value"])
            cleaned = convert_to_dst_type(labels, turned, dtype=items[key].dtype)[0]
            items[key] = turn.inverse(cleaned)
        return items


def drop_components(labels: np.ndarray, rule: Mapping[str, Any], voxel_mm3: float) -> None:
    """Keep a class's largest component, or those that are large enough, in place."""
    least = rule.get("min_mm3", 0.0)
    if not (rule.get("largest") or least):
        return
    numbered, count = ndimage.label(labels == rule["value"], TOUCHING)
    sizes = np.bincount(numbered.ravel(), minlength=count + 1)
    keep = sizes * voxel_mm3 >= least
    if rule.get("largest") and count:
        first = int(sizes[1:].argmax()) + 1
        keep &= np.arange(count + 1) == first
    keep[0] = True  # all else
    labels[~keep[numbered]] = 0


def drop_slices(labels: np.ndarray, rule: Mapping[str, Any]) -> None:
    """Keep a class's longest run of slices along Z, and nothing where it is too small, in place."""
    mask = labels == rule["value"]
    if rule.get("slice_run"):
        filled = np.concatenate([[0], mask.any(axis=(0, 1)).astype(np.int8), [0]])
        edges = np.flatnonzero(np.diff(filled))
        starts, stops = edges[::2], edges[1::2]
        if len(starts):
            best = int((stops - starts).argmax())
            outside = np.ones(labels.shape[2], bool)
            outside[starts[best] : stops[best]] = False
            labels[mask & outside] = 0
            mask &= ~outside
    if mask.sum() < rule.get("min_voxels", 0):
        labels[mask] = 0


def fill_holes(labels: np.ndarray, value: int) -> None:
    """Fill background that a class alone encloses, in place; what touches the border of the volume is no hole."""
    numbered, _ = ndimage.label(labels == 0)
    for number, place in enumerate(ndimage.find_objects(numbered), 1):
        if any(s.start == 0 or s.stop == size for s, size in zip(place, labels.shape, strict=True)):
            continue
        wider = tuple(slice(s.start - 1, s.stop + 1) for s in place)
        hole = numbered[wider] == number
        around = labels[wider][ndimage.binary_dilation(hole) & ~hole]
        if (around == value).all():
            labels[wider][hole] = value
