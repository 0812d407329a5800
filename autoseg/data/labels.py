"""Label maps: which values of a label file belong to which output of a network, and back.

Two kinds. Exclusive classes (softmax): output 0 is background, output i + 1 is class i. Regions that may
overlap (sigmoid): output i is region i, and background is where no region is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from autoseg.config.settings import InferenceSettings, Settings
from autoseg.config.types import suggest
from autoseg.data.side_names import SidedPair, sided_pairs
from autoseg.errors import ConfigError

IGNORE, UNSURE = 255, 254
"""Values in an encoded target, above those of classes, whatever marks them in the files: of an ignored voxel, and of
one of which is known only that it is of none of the classes that its case's annotators drew."""
MOST_CODED = 15
"""Regions whose sets fit into the values of a label file."""
UNSURE_VALUE = 65535
"""What marks the latter in a completed label's file; no class can have it, so that every label map means the same."""


@dataclass(frozen=True, kw_only=True)
class LabelMap:
    """The foreground classes (or regions) of a data set, in the order of a network's outputs."""

    names: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    """For each class, the values in label files that belong to it; a gap between values is no problem."""
    sigmoid: bool = False
    """True: the classes are regions that may overlap."""
    ignore_label: int | None = None
    """Value in label files that marks voxels left out of loss and metrics."""
    origin: LabelMap | None = None
    """The classes as the user named them, where some of them are one class here."""

    def __post_init__(self) -> None:
        faults = []
        if len(self.names) != len(self.values) or not self.names:
            faults.append(f"class_names: {len(self.names)} names for {len(self.values)} sets of label values.")
        if len(set(self.names)) != len(self.names):
            twice = sorted({n for n in self.names if self.names.count(n) > 1})
            faults.append(f"class_names: {', '.join(twice)} is named twice. Give each class its own name.")
        if not all(name.strip() for name in self.names):
            faults.append("class_names: a name is empty. Give each class a name.")
        flat = [v for vs in self.values for v in vs]
        if len(self.names) >= UNSURE:
            faults.append(f"class_names: {len(self.names)} classes. Expected at most {UNSURE - 1}.")
        if any(v < 0 or v >= UNSURE_VALUE for v in flat):
            faults.append(f"class_names: label values must lie in 0..{UNSURE_VALUE - 1}, found {sorted(flat)}.")
        if not self.sigmoid and len(set(flat)) != len(flat):
            twice_v = sorted({v for v in flat if flat.count(v) > 1})
            faults.append(
                f"class_names: label value {twice_v[0]} belongs to more than one class. "
                "Set sigmoid: true for overlapping regions."
            )
        if self.ignore_label is not None and self.ignore_label in flat:
            faults.append(f"ignore_label: {self.ignore_label} is also the value of a class.")
        if self.ignore_label == UNSURE_VALUE:
            faults.append(f"ignore_label: {UNSURE_VALUE} marks unsure pseudo-labels. Give a lower one.")
        if faults:
            raise ConfigError(faults)

    @property
    def num_outputs(self) -> int:
        """Channels of a network's output."""
        return len(self.names) if self.sigmoid else len(self.names) + 1

    @cached_property
    def known_values(self) -> frozenset[int]:
        """All values that a label file may hold, background and ignore label included."""
        known = {0, *(v for vs in self.values for v in vs)}
        if self.ignore_label is not None:
            known.add(self.ignore_label)
        return frozenset(known)

    @cached_property
    def dtype(self) -> type[np.uint8] | type[np.uint16]:
        """Smallest type that holds every value of a label file."""
        return np.uint8 if max(self.known_values) < 256 else np.uint16

    def _tables(self) -> np.ndarray:
        """Lookup tables, (1 or K, 65536) uint8: value in a file -> encoded target."""
        tables = np.zeros((len(self.names) if self.sigmoid else 1, 65536), np.uint8)
        for i, values in enumerate(self.values):
            for v in values:
                tables[i if self.sigmoid else 0, v] = 1 if self.sigmoid else i + 1
        if self.ignore_label is not None:
            tables[:, self.ignore_label] = IGNORE
        tables[:, UNSURE_VALUE] = UNSURE
        return tables

    def encode(self, label: np.ndarray) -> np.ndarray:
        """Turn a label file's values into a target.

        Args:
            label: (X, Y, Z) integers, values of `known_values` or `UNSURE_VALUE`; any other becomes background.

        Returns:
            uint8; softmax: (1, X, Y, Z) with 0 background, 1..K classes; sigmoid: (K, X, Y, Z) of 0 and 1;
            255 where the voxel is to be ignored, 254 where models were unsure of it.
        """
        tables = self._tables()
        index = np.clip(label, 0, 65535).astype(np.uint16)
        return np.stack([table[index] for table in tables])

    def masks(self, label: np.ndarray) -> list[np.ndarray]:
        """For each class, where it lies in a label file's values: K boolean arrays of the label's shape."""
        if not self.sigmoid:
            target = self.encode(label)[0]
            return [target == i + 1 for i in range(len(self.names))]
        return [channel == 1 for channel in self.encode(label)]

    @cached_property
    def painted_values(self) -> tuple[int, ...]:
        """The value each class writes into a label file.

        A region writes the first of its values that no smaller region inside it has, so nested regions
        (whole tumor 1, 2, 4; core 1, 4; enhancing 4) come back as the values they were made from.
        """
        painted = []
        for i, region in enumerate(self.values):
            inner = {v for j, other in enumerate(self.values) if j != i and set(other) < set(region) for v in other}
            painted.append(next((v for v in region if v not in inner), region[0]))
        return tuple(painted)

    @cached_property
    def paint_order(self) -> tuple[int, ...]:
        """Classes from the largest set of values to the smallest: inner regions are painted last."""
        return tuple(sorted(range(len(self.names)), key=lambda i: -len(self.values[i])))

    @cached_property
    def overlap_values(self) -> dict[frozenset[int], int]:
        """Sets of regions that a label value stands for and that painting one after the other would lose -> that value.

        Such as {a, b} -> 3 for a: [1, 3] and b: [2, 3]. Nested regions need none: the inner one is painted last.
        """
        lost: dict[frozenset[int], int] = {}
        if not self.sigmoid:
            return lost
        for value in dict.fromkeys(v for values in self.values for v in values):
            regions = frozenset(i for i, values in enumerate(self.values) if value in values)
            last = next(i for i in reversed(self.paint_order) if i in regions)
            painted = self.painted_values[last]
            if any((painted in values) != (i in regions) for i, values in enumerate(self.values)):
                lost.setdefault(regions, value)
        return lost

    @cached_property
    def untold_overlaps(self) -> tuple[tuple[str, str], ...]:
        """Pairs of regions, neither inside the other, that no label value stands for together."""
        pairs = []
        for i, first in enumerate(self.values) if self.sigmoid else ():
            for j, second in enumerate(self.values[i + 1 :], i + 1):
                if not {*first} & {*second} or {*first} == {*second}:
                    pairs.append((self.names[i], self.names[j]))
        return tuple(pairs)

    def decode(self, target: np.ndarray) -> np.ndarray:
        """Turn an encoded target, or a prediction in that form, back into a label file's values.

        Regions that overlap: a voxel gets the value that stands for exactly the regions it lies in; where there is
        none, that of the smallest of them.

        Args:
            target: as `encode` returns it.

        Returns:
            (X, Y, Z) of `dtype`.
        """
        if not self.sigmoid:
            table = np.zeros(256, self.dtype)
            table[1 : len(self.names) + 1] = self.painted_values
            if self.ignore_label is not None:
                table[IGNORE] = self.ignore_label
            return table[target[0]]
        if len(self.names) <= MOST_CODED:
            code = np.zeros(target.shape[1:], np.uint16)
            for i, channel in enumerate(target):
                code |= (channel == 1).astype(np.uint16) << i
            label = self._value_of_code[code]
            if self.ignore_label is not None:
                label[target[0] == IGNORE] = self.ignore_label
            return label
        label = np.zeros(target.shape[1:], self.dtype)
        for i in self.paint_order:
            label[target[i] == 1] = self.painted_values[i]
        for regions, value in self.overlap_values.items():
            exactly = np.ones(label.shape, bool)
            for i in range(len(self.names)):
                exactly &= (target[i] == 1) == (i in regions)
            label[exactly] = value
        if self.ignore_label is not None:
            label[target[0] == IGNORE] = self.ignore_label
        return label

    @cached_property
    def _value_of_code(self) -> np.ndarray:
        """The value of each set of regions, which are the bits of an index."""
        table = np.zeros(1 << len(self.names), self.dtype)
        codes = np.arange(len(table))
        for i in self.paint_order:
            table[codes >> i & 1 == 1] = self.painted_values[i]
        for regions, value in self.overlap_values.items():
            table[sum(1 << i for i in regions)] = value
        return table

    def with_overlaps(self) -> LabelMap:
        """The same regions, with a value for each set of them, so that no overlap is lost; itself where none can be.

        Only regions have overlaps, and only up to `MOST_CODED` of them have values enough.
        """
        if not self.sigmoid or len(self.names) > MOST_CODED:
            return self
        codes = range(1, 1 << len(self.names))
        values = tuple(tuple(c for c in codes if c >> i & 1) for i in range(len(self.names)))
        return _Overlaps(names=self.names, values=values, sigmoid=True)

    @cached_property
    def sided_pairs(self) -> tuple[SidedPair, ...]:
        """Pairs of classes whose names differ in left and right alone."""
        return sided_pairs(self.names)

    @property
    def named(self) -> LabelMap:
        """The classes as the user named them: those of predictions and scores."""
        return self.origin or self

    def parts(self, name: str) -> tuple[str, ...]:
        """The user's classes that a class here was made of; itself where it was not merged."""
        if self.origin is None:  # a region inside another is no part of it
            return (name,)
        region = set(self.values[self.names.index(name)])
        return tuple(n for n, v in zip(self.named.names, self.named.values, strict=True) if set(v) <= region)

    def wholly(self, names: Collection[str] | None) -> tuple[str, ...] | None:
        """The classes here whose parts are all among some classes of the user; None, for all, stays None."""
        return None if names is None else tuple(n for n in self.names if set(self.parts(n)) <= {*names})

    @cached_property
    def merged_sides(self) -> tuple[tuple[int, int, int], ...]:
        """Label values (here, of the left part, of the right part) of each class that was made of both sides."""
        triples = []
        for name, value in zip(self.names, self.painted_values, strict=True):
            parts = self.parts(name) if self.origin else ()
            if len(parts) == 2 and (pair := sided_pairs(parts)):
                painted = dict(zip(self.named.names, self.named.painted_values, strict=True))
                triples.append((value, painted[parts[pair[0].left]], painted[parts[pair[0].right]]))
        return tuple(triples)


class _Overlaps(LabelMap):
    """Regions whose values are the sets of them: bit i of a value is region i."""

    @cached_property
    def painted_values(self) -> tuple[int, ...]:
        """See `LabelMap`."""
        return tuple(1 << i for i in range(len(self.names)))

    @cached_property
    def overlap_values(self) -> dict[frozenset[int], int]:
        """None: `_value_of_code` is the identity."""
        return {}

    @cached_property
    def _value_of_code(self) -> np.ndarray:
        return np.arange(1 << len(self.names), dtype=self.dtype)


def merge_classes(label_map: LabelMap, groups: Mapping[str, Collection[str]]) -> LabelMap:
    """Make one class of several, in the place of the first.

    Args:
        groups: name of the new class -> names of those that it is made of.
    """
    of = {part: name for name, parts in groups.items() for part in parts}
    values: dict[str, tuple[int, ...]] = {}
    for name, members in zip(label_map.names, label_map.values, strict=True):
        values[of.get(name, name)] = (*values.get(of.get(name, name), ()), *members)
    return LabelMap(
        names=tuple(values),
        values=tuple(values.values()),
        sigmoid=label_map.sigmoid,
        ignore_label=label_map.ignore_label,
        origin=label_map,
    )


def region_map(label_map: LabelMap, without: Collection[str]) -> LabelMap:
    """One class, `region`, of all classes but some; of all where no other is left."""
    named = label_map.named
    kept = [n for n in named.names if n not in without] or list(named.names)
    values = {n: v for n, v in zip(named.names, named.values, strict=True) if n in kept}
    origin = LabelMap(
        names=tuple(values), values=tuple(values.values()), sigmoid=named.sigmoid, ignore_label=named.ignore_label
    )
    union = tuple(sorted({v for vs in values.values() for v in vs}))
    return LabelMap(names=("region",), values=(union,), ignore_label=named.ignore_label, origin=origin)


def merge_left_right(label_map: LabelMap) -> LabelMap:
    """Make one class of each pair whose names differ in left and right alone.

    Pairs that are known by places alone are left as they are: which of them is the left one, to tell them apart again,
    only names say.

    Raises:
        ConfigError: There is no such pair, or classes may overlap.
    """
    if label_map.sigmoid or not label_map.sided_pairs:
        why = (
            "classes overlap"
            if label_map.sigmoid
            else "no two names of classes differ in left and right alone, and pairs that were found by places, or that "
            "lateral_pairs gives, are not merged"
        )
        raise ConfigError(f"merge_left_right: {why}. Leave it out, or name the classes so (kidney_left, kidney_right).")
    groups: dict[str, tuple[str, str]] = {}
    for pair in label_map.sided_pairs:
        first, second = sorted((pair.left, pair.right))
        parts, name = (label_map.names[first], label_map.names[second]), pair.shared
        groups[name if name and name not in label_map.names and name not in groups else "+".join(parts)] = parts
    return merge_classes(label_map, groups)


def make_label_map(
    settings: Settings,
    datalist_labels: Mapping[int, str],
    values_found: Iterable[int],
    *,
    regions: Mapping[str, tuple[int, ...]] | None = None,
    ignore_label: int | None = None,
) -> LabelMap:
    """The classes of a data set: from class_names, else as the datalist names them, else as they occur.

    Args:
        datalist_labels: label value -> name, background left out; empty where the datalist names none.
        values_found: values that occur in the label files; they count only where nobody names classes.
        regions: name -> label values, where the datalist names regions.
        ignore_label: as the datalist gives it; settings.ignore_label comes first.

    Raises:
        ConfigError: There is no class, or the names contradict each other.
    """
    ignored = settings.ignore_label if settings.ignore_label is not None else ignore_label
    names: list[str] = []
    values: list[tuple[int, ...]] = []
    if settings.class_names:
        for place, spec in enumerate(settings.class_names, start=1):
            names.append(spec if isinstance(spec, str) else spec.name)
            values.append((place,) if isinstance(spec, str) else spec.index)
    elif regions:
        names, values = list(regions), list(regions.values())
    elif datalist_labels:
        for value, name in sorted(datalist_labels.items()):
            if value not in (0, ignored):
                names.append(name)
                values.append((value,))
    else:
        foreground = sorted(set(values_found) - {0, ignored})
        names, values = [f"class_{v}" for v in foreground], [(v,) for v in foreground]
    if not names:
        raise ConfigError(
            "class_names: the data set has no class: none is named, and the labels hold background alone. "
            "Check the label files, or name the classes."
        )
    flat = [v for vs in values for v in vs]
    overlap = len(set(flat)) != len(flat)
    return LabelMap(
        names=tuple(names),
        values=tuple(values),
        sigmoid=overlap if settings.sigmoid is None else settings.sigmoid,
        ignore_label=ignored,
    )


def check_classes(settings: InferenceSettings, names: Collection[str]) -> None:
    """Make sure that the classes that settings name exist.

    Raises:
        ConfigError: All that do not.
    """
    faults = []
    lists: dict[str, Sequence[str]] = {
        "anywhere": settings.anywhere,
        "slice_run": settings.slice_run,
        "min_voxels": tuple(settings.min_voxels),
    }
    for key, listed in lists.items():
        faults += [f"inference.{key}: {n} is no class. {suggest(n, names)}" for n in listed if n not in names]
    if faults:
        raise ConfigError(faults)


def annotated_classes(
    declared: Collection[str] | None,
    present: Collection[str],
    names: tuple[str, ...],
    partial_labels: Literal["off", "infer", "declared"],
) -> tuple[str, ...]:
    """The classes a case's annotators looked for, in the order of `names`.

    Args:
        declared: what the datalist says; None: nothing.
        present: the classes that occur in the case's label.
        names: all classes.
        partial_labels: off: all classes, whatever is declared; declared: the declaration, all classes where there
            is none; infer: the declaration, else the classes that occur.

    Nobody else decides this: the analysis stores the answer in the run's datalist.

    Source: inferring from what occurs is what NVIDIA did for FLARE23 (Table 1 of its paper).
    """
    if partial_labels == "off" or (declared is None and partial_labels == "declared"):
        return names
    looked_for = present if declared is None else declared
    return tuple(n for n in names if n in looked_for)
