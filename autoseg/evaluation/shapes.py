"""What classes of a label look like as a whole: how large they are, in how many pieces, and where they lie."""

from __future__ import annotations

import math

import numpy as np

from autoseg.config.fields import Strict
from autoseg.data.components import Components, box_of_label, number_components
from autoseg.data.labels import LabelMap

Triple = tuple[float, float, float]


class ClassShape(Strict):
    """One class of a label."""

    volume_ml: float
    largest: float
    """Share of its largest component (26 neighbours) in it; 0 where the class is not there."""
    centre_mm: Triple | None
    """Its centre from that of all classes together, along X, Y, Z (RAS); None where it is not there."""
    size_mm: Triple | None
    """Edges of its largest component's box."""


def shapes_of(labels: np.ndarray, label_map: LabelMap, spacing_mm: Triple) -> list[ClassShape]:
    """Look at every class of a label.

    Args:
        labels: (X, Y, Z) label values in RAS; ignored voxels are background here.
        label_map: the classes.
        spacing_mm: of the voxels.
    """
    box = box_of_label(labels)
    target = label_map.encode(labels[box])
    target[target > len(label_map.names)] = 0
    if label_map.sigmoid:
        each = [_components(mask, 1) for mask in target]
    else:
        of_all = number_components(target[0], tuple(range(1, len(label_map.names) + 1))).components
        each = [_of_value(of_all, value) for value in range(1, len(label_map.names) + 1)]
    voxels = sum(int(c.voxels.sum()) for c in each)
    middle = sum((c.mass.sum(axis=0) for c in each), np.zeros(3)) / max(1, voxels)
    return [_shape(components, middle, spacing_mm) for components in each]


def _components(mask: np.ndarray, value: int) -> Components:
    return _of_value(number_components(np.ascontiguousarray(mask), (value,)).components, value)


def _of_value(components: Components, value: int) -> Components:
    chosen = components.label == value
    return Components(**{n: getattr(components, n)[chosen] for n in Components.__dataclass_fields__})


def _shape(components: Components, middle: np.ndarray, spacing_mm: Triple) -> ClassShape:
    """Describe the components of one class, the largest first."""
    voxels = int(components.voxels.sum())
    if not voxels:
        return ClassShape(volume_ml=0.0, largest=0.0, centre_mm=None, size_mm=None)
    centre = (components.mass.sum(axis=0) / voxels - middle) * spacing_mm
    return ClassShape(
        volume_ml=_short(voxels * math.prod(spacing_mm) / 1000),
        largest=_short(int(components.voxels[0]) / voxels),
        centre_mm=_triple(centre),
        size_mm=_triple(components.shape[0] * np.array(spacing_mm)),
    )


def _triple(values: np.ndarray) -> Triple:
    x, y, z = (_short(float(v)) for v in values)
    return x, y, z


def _short(value: float) -> float:
    return float(f"{value:.7g}")
