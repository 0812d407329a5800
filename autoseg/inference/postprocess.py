"""Cleaning of predicted labels, and the choice of what to clean by out-of-fold scores.

Everything works in place on label values (X, Y, Z) in RAS, in memory or mapped from a file, and goes through them in
slabs: beside the label map itself no array of the volume's size is made (for regions that overlap, one mask per
region is). Largest components and holes need the whole label map, so this comes after the last slab is predicted.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import product
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from autoseg.config.fields import Strict
from autoseg.data.components import box_of_label, number_components
from autoseg.data.labels import LabelMap
from autoseg.evaluation.intervals import Patients, mean_interval

BODY_AXIS = 2
"""Z, up, in RAS: the axis that slices are counted along."""
SIZES_MM3 = (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)
"""Volumes below which components may be chosen to be removed."""
LEAST_GAIN = 1e-6
"""Score by which a class must rise; anything less is rounding."""


class ClassRule(Strict):
    """What is done to one class of a prediction, in this order."""

    name: str
    """The class."""
    largest: bool = False
    """Keep its largest component alone."""
    min_mm3: Annotated[float, Field(ge=0)] = 0.0
    """Remove its components that are smaller."""
    slice_run: bool = False
    """Keep its longest run of slices along the body alone."""
    min_voxels: Annotated[int, Field(ge=0)] = 0
    """Remove it where it has fewer voxels in all."""
    fill_holes: bool = False
    """Fill background that it encloses."""
    dice_before: float | None = None
    """Mean out-of-fold Dice of the class without all this; null where it was set, not chosen."""
    dice_after: float | None = None
    """The same with it."""
    gain: float | None = None
    """How much better the score that decides is for it, mean over cases; null where it was set."""
    gain_low: float | None = None
    """Lower end of the 95 % interval of that, above 0."""

    @property
    def words(self) -> str:
        """What is done, for people."""
        parts = [
            "largest component" if self.largest else "",
            f"components of {self.min_mm3:g} mm3 and more" if self.min_mm3 else "",
            "longest run of slices" if self.slice_run else "",
            f"none under {self.min_voxels} voxels" if self.min_voxels else "",
            "holes filled" if self.fill_holes else "",
        ]
        return ", ".join(part for part in parts if part) or "nothing"


def deeds(rules: Sequence[ClassRule]) -> list[dict[str, Any]]:
    """What rules do, as plain data, without what it came to."""
    return [rule.model_dump(exclude={"dice_before", "dice_after", "gain", "gain_low"}) for rule in rules]


def set_rules(names: Sequence[str], slice_run: Collection[str], min_voxels: Mapping[str, int]) -> tuple[ClassRule, ...]:
    """The rules that a user set, for the classes that have any."""
    return tuple(
        ClassRule(name=n, slice_run=n in slice_run, min_voxels=min_voxels.get(n, 0))
        for n in names
        if n in slice_run or n in min_voxels
    )


def clean(
    labels: np.ndarray, label_map: LabelMap, rules: Sequence[ClassRule], spacing_mm: tuple[float, float, float]
) -> None:
    """Apply rules to predicted labels, in place.

    A voxel that is taken from a class becomes background (of regions that overlap: what the others make of it).

    Args:
        labels: (X, Y, Z) label values in RAS, as `LabelMap.decode` gives them.
        rules: of classes of the label map.
        spacing_mm: of the voxels.
    """
    if not rules:
        return
    voxel_mm3 = math.prod(spacing_mm)
    values = dict(zip(label_map.names, label_map.painted_values, strict=True))
    if not label_map.sigmoid:
        _clean_values(labels, {values[r.name]: r for r in rules}, voxel_mm3)
        return
    masks = label_map.encode(labels)
    before = masks.copy()
    for rule in rules:
        _clean_values(masks[label_map.names.index(rule.name)], {1: rule}, voxel_mm3)
    changed = (masks != before).any(axis=0)
    labels[changed] = label_map.decode(masks)[changed]


def _clean_values(labels: np.ndarray, rules: Mapping[int, ClassRule], voxel_mm3: float) -> None:
    """The same for classes that exclude each other; `rules` by label value."""
    labels = labels[box_of_label(labels)]
    if not labels.size:
        return
    _drop_components(labels, rules, voxel_mm3)
    _drop_slices(labels, rules)
    _fill_holes(labels, {value for value, rule in rules.items() if rule.fill_holes})


def _drop_components(labels: np.ndarray, rules: Mapping[int, ClassRule], voxel_mm3: float) -> None:
    values = [v for v, rule in rules.items() if rule.largest or rule.min_mm3]
    if not values:
        return
    numbered = number_components(labels, values)
    components = numbered.components
    dropped = np.zeros(len(components.label) + 1, bool)  # the last stands for -1: no component
    for value in values:
        of_class = np.flatnonzero(components.label == value)
        if rules[value].largest:
            dropped[of_class[1:]] = True
        dropped[of_class[components.voxels[of_class] * voxel_mm3 < rules[value].min_mm3]] = True
    if dropped.any():
        for start, index in numbered.slabs():
            part = labels[:, :, start : start + index.shape[2]]
            part[dropped[index]] = 0


def longest_run(filled: np.ndarray) -> slice:
    """The longest run of true values; the first of several, an empty slice where none is true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], filled.astype(np.int8), [0]])))
    starts, stops = edges[::2], edges[1::2]
    if not len(starts):
        return slice(0, 0)
    best = int(np.argmax(stops - starts))
    return slice(int(starts[best]), int(stops[best]))


def _drop_slices(labels: np.ndarray, rules: Mapping[int, ClassRule]) -> None:
    values = [v for v, rule in rules.items() if rule.slice_run or rule.min_voxels]
    if not values:
        return
    length = labels.shape[BODY_AXIS]
    counts = np.zeros((length, max(values) + 1), np.int64)
    for z in range(length):
        counted = np.bincount(labels[:, :, z].ravel(), minlength=max(values) + 1)
        counts[z] = counted[: max(values) + 1]
    for value in values:
        keep = longest_run(counts[:, value] > 0) if rules[value].slice_run else slice(0, length)
        if int(counts[keep, value].sum()) < rules[value].min_voxels:
            keep = slice(0, 0)
        for z in np.flatnonzero(counts[:, value]).tolist():
            if not keep.start <= z < keep.stop:
                plane = labels[:, :, z]
                plane[plane == value] = 0


def _holes(labels: np.ndarray, values: Collection[int]) -> dict[int, list[np.ndarray]]:
    """Background that one class alone encloses: label value -> voxels (N, 3) of each hole in it.

    A hole is a 6-connected component of background, the counterpart of 26-connected classes, that does not touch
    the volume's border and whose neighbours are all of the class.
    """
    numbered = number_components(labels, (0,), connectivity=6)
    low, high = numbered.components.low, numbered.components.high
    inner = np.append(((low > 0) & (high < np.array(labels.shape) - 1)).all(axis=1), False)
    if not inner.any():
        return {}
    pieces, owners = [], []
    for start, index in numbered.slabs():
        where = np.nonzero(inner[index])
        pieces.append(np.stack([where[0], where[1], where[2] + start], axis=1))
        owners.append(index[where])
    voxels, owner = np.concatenate(pieces), np.concatenate(owners)
    order = np.argsort(owner, kind="stable")
    voxels, owner = voxels[order], owner[order]
    least = np.full(len(voxels), np.iinfo(np.int64).max)
    most = np.zeros(len(voxels), np.int64)
    for axis, step in product(range(3), (-1, 1)):
        at = voxels.copy()
        at[:, axis] += step
        beside = labels[at[:, 0], at[:, 1], at[:, 2]].astype(np.int64)
        solid = beside > 0
        least[solid] = np.minimum(least[solid], beside[solid])
        most = np.maximum(most, beside)
    firsts = np.flatnonzero(np.diff(owner, prepend=-1))
    least, most = np.minimum.reduceat(least, firsts), np.maximum.reduceat(most, firsts)
    by_value: dict[int, list[np.ndarray]] = {}
    for hole, low_value, high_value in zip(np.split(voxels, firsts[1:]), least, most, strict=True):
        if low_value == high_value and int(low_value) in values:
            by_value.setdefault(int(low_value), []).append(hole)
    return by_value


def _fill_holes(labels: np.ndarray, values: Collection[int]) -> None:
    if values:
        for value, holes in _holes(labels, values).items():
            for hole in holes:
                labels[hole[:, 0], hole[:, 1], hole[:, 2]] = value


# -- the choice


def measure_parts(
    labels: np.ndarray, truth: np.ndarray, label_map: LabelMap, spacing_mm: tuple[float, float, float]
) -> list[dict[str, Any]]:
    """What the choice needs to know of one prediction: for each class the sizes of its parts and how much is right.

    Args:
        labels, truth: (X, Y, Z) label values.

    Returns:
        For each class `truth` (voxels), and as [voxels, of them right] `largest` (the largest component), `sizes`
        (components below each of `SIZES_MM3`, and the rest) and `holes`. Ignored voxels do not count.
    """
    counted = np.ones(truth.shape, bool) if label_map.ignore_label is None else truth != label_map.ignore_label
    by_class = []
    if label_map.sigmoid:
        for mask, true in zip(label_map.encode(labels), label_map.encode(truth), strict=True):
            by_class += _parts(mask, np.where(true == 1, 1, 0).astype(np.uint8), (1,), counted, spacing_mm)
        return by_class
    target = label_map.encode(truth)[0]
    as_target = label_map.encode(labels)[0]
    classes = tuple(range(1, len(label_map.names) + 1))
    return _parts(as_target, np.where(counted, target, 0).astype(np.uint8), classes, counted, spacing_mm)


def _parts(
    labels: np.ndarray,
    truth: np.ndarray,
    values: Sequence[int],
    counted: np.ndarray,
    spacing_mm: tuple[float, float, float],
) -> list[dict[str, Any]]:
    voxel_mm3 = math.prod(spacing_mm)
    whole = np.bincount(truth[counted].ravel(), minlength=max(values) + 1)
    box = box_of_label(labels)
    labels, truth, counted = labels[box], truth[box], counted[box]
    numbered = number_components(labels, values)
    components = numbered.components
    num = len(components.label)
    size, right = np.zeros(num + 1, np.int64), np.zeros(num + 1, np.int64)
    for start, index in numbered.slabs():
        planes = (slice(None), slice(None), slice(start, start + index.shape[2]))
        size += np.bincount(index[counted[planes]] + 1, minlength=num + 1)
        agree = counted[planes] & (labels[planes] == truth[planes])
        right += np.bincount(index[agree] + 1, minlength=num + 1)
    size, right = size[1:], right[1:]
    holes = _holes(labels, set(values))
    by_class = []
    for value in values:
        of_class = np.flatnonzero(components.label == value)
        bins = np.searchsorted(SIZES_MM3, components.voxels[of_class] * voxel_mm3, side="right")
        sizes = [
            [int(size[of_class[bins == b]].sum()), int(right[of_class[bins == b]].sum())]
            for b in range(len(SIZES_MM3) + 1)
        ]
        filled = [0, 0]
        for hole in holes.get(value, []):
            at = (hole[:, 0], hole[:, 1], hole[:, 2])
            filled[0] += int(counted[at].sum())
            filled[1] += int((counted[at] & (truth[at] == value)).sum())
        first = [int(size[of_class[0]]), int(right[of_class[0]])] if len(of_class) else [0, 0]
        by_class.append({"truth": int(whole[value]), "largest": first, "sizes": sizes, "holes": filled})
    return by_class


def _dice(parts: Mapping[str, Any], rule: ClassRule) -> float:
    if rule.largest:
        size, right = parts["largest"]
    else:
        first = SIZES_MM3.index(rule.min_mm3) + 1 if rule.min_mm3 else 0
        size = sum(s for s, _ in parts["sizes"][first:])
        right = sum(r for _, r in parts["sizes"][first:])
    if rule.fill_holes and size:
        size, right = size + parts["holes"][0], right + parts["holes"][1]
    total = size + parts["truth"]
    return 2 * right / total if total else math.nan


def options(name: str) -> list[ClassRule]:
    """What may be chosen for a class, the mildest first; the first does nothing."""
    return [
        ClassRule(name=name, largest=largest, min_mm3=size, fill_holes=fill)
        for largest, size in [(False, 0.0), *((False, s) for s in SIZES_MM3), (True, 0.0)]
        for fill in (False, True)
    ]


def option_dice(parts: Mapping[str, Any]) -> list[float]:
    """Dice of a class of one case with each of its `options`, from what `measure_parts` counted."""
    return [_dice(parts, option) for option in options("")]


def gains(before: Sequence[float], after: Sequence[float], higher_is_better: bool) -> list[float]:
    """How much better a score is in each case; NaN where neither counts.

    Where one alone counts, the other is of a class that is neither there nor predicted, which is as right as can be.
    """
    perfect = 1.0 if higher_is_better else 0.0

    def gain(b: float, a: float) -> float:
        if math.isnan(b) and math.isnan(a):
            return math.nan
        change = (perfect if math.isnan(a) else a) - (perfect if math.isnan(b) else b)
        return change if higher_is_better else -change

    return [gain(b, a) for b, a in zip(before, after, strict=True)]


def sure_gain(changes: Sequence[float], patients: Patients | None) -> tuple[float, float]:
    """The mean gain and the lower end of its 95 % interval, NaN where a single patient counts.

    Where all gain alike, nothing says how much others would differ, and the gain itself is the end.
    """
    known = [c for c in changes if not math.isnan(c)]
    if not known:
        return math.nan, math.nan
    mean = sum(known) / len(known)
    low, _ = mean_interval([[c] for c in changes], patients)
    if math.isnan(low) and max(known) - min(known) < LEAST_GAIN and _several(changes, patients):
        return mean, mean
    return mean, low


def _several(changes: Sequence[float], patients: Patients | None) -> bool:
    """Whether the values that count are of two patients or more."""
    places = [i for i, c in enumerate(changes) if not math.isnan(c)]
    return len({i if patients is None or patients[i] is None else f"patient {patients[i]}" for i in places}) > 1


def propose(
    names: Sequence[str],
    cases: Sequence[Sequence[Sequence[float] | None]],
    *,
    patients: Patients | None = None,
    higher_is_better: bool = True,
) -> dict[str, ClassRule]:
    """For each class the cleaning with the highest mean gain, of those whose gain is surely above 0.

    Args:
        names: of the classes.
        cases: for each case and class the score with each of the class's `options`, None for a class that it does not
            annotate.
        patients: of each case; None: every case is a patient of its own.
        higher_is_better: whether a higher score is better.

    Returns:
        Class -> rule, for the classes that gain.

    Source: nnU-Net decides so for the largest component, by the cross-validation's predictions
    (`remove_connected_components.py`); holes and small objects are decided by the same rule here. That the lower end of
    the gain's interval must be positive keeps out most of what only chance speaks for.
    """
    rules = {}
    for i, name in enumerate(names):
        of_class = [case[i] for case in cases]
        measured = [values for values in of_class if values is not None]
        known = None
        if patients is not None:
            known = [p for p, values in zip(patients, of_class, strict=True) if values is not None]
        best_gain = LEAST_GAIN
        for k, option in enumerate(options(name)):
            changes = gains([v[0] for v in measured], [v[k] for v in measured], higher_is_better)
            gain, low = sure_gain(changes, known)
            if low > 0 and round(gain, 9) > round(best_gain, 9):
                rules[name], best_gain = option.model_copy(update={"gain": gain, "gain_low": low}), gain
    return rules
