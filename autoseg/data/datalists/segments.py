"""The table of classes of a data set whose labels name their segments: DICOM, files of Slicer, folders of masks.

Names decide, since files number segments as they like. Where segments overlap, classes become regions: each set of
segments that occurs together has a label value of its own, and a region has the values of all sets that it is in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from autoseg.data.datalists.cases import Case, Datalist
from autoseg.data.datalists.names import loose_key
from autoseg.data.formats.label_files import (
    TOUCHING,
    SegmentValues,
    open_segmentation,
    values_by_name,
)
from autoseg.data.formats.segmentation import Colour, Segmentation, on_grid
from autoseg.data.formats.table import read_grid, reading, stem_of
from autoseg.data.grid import Grid
from autoseg.errors import DataError, some_of

HIGHEST_VALUE = 65534
"""A label's highest value; the next one marks unsure voxels."""
MOST_PAIRS = 3
"""Overlaps that a note names."""


def segment_values(labels: Mapping[int, str], regions: Mapping[str, tuple[int, ...]]) -> SegmentValues:
    """The classes of a datalist as readers of segmentations take them."""
    return tuple(regions.items()) or tuple((name, (value,)) for value, name in sorted(labels.items()))


def with_values(case: Case, values: SegmentValues) -> Case:
    """A case that knows the values of its label's segments."""
    if case.label is None or not values:
        return case
    return replace(case, segment_values=values_by_name(case.label, values))


@dataclass(kw_only=True)
class _Names:
    """What the labels of a data set name."""

    numbers: dict[str, dict[int, Path]] = field(default_factory=dict)
    """Name -> the numbers it has in files, and a file of each."""
    together: set[frozenset[str]] = field(default_factory=set)
    """Sets of two segments or more that voxels lie in."""
    overlapping: dict[frozenset[str], str] = field(default_factory=dict)
    """Those of them that do more than touch, and a label of each."""
    num_plain: int = 0
    """Labels that name nothing."""
    colours: dict[str, Colour] = field(default_factory=dict)
    """Of the segments that have one, from the first file that says it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Classes:
    """The classes that label files name."""

    labels: dict[int, str] = field(default_factory=dict)
    """Value -> name."""
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Name -> values, where segments overlap; `labels` is empty then."""
    colours: dict[str, Colour] = field(default_factory=dict)
    """Name -> colour, as far as files say it."""
    notes: tuple[str, ...] = ()
    """For people."""


def name_segments(datalist: Datalist) -> tuple[Datalist, Classes]:
    """The list with the classes that its labels name, where it names none itself.

    Labels whose segments may overlap are read whole.

    Returns:
        The list, as it was where no label names anything; and what they name.

    Raises:
        DataError: Labels cannot be read; or files number segments differently, and other files hold numbers alone.
    """
    if datalist.labels or datalist.regions:
        return datalist, Classes()
    classes = table_of([(c.label, partial(_image_grid, c)) for c in datalist.cases if c.label])
    if not classes.labels and not classes.regions:
        return datalist, classes
    values = segment_values(classes.labels, classes.regions)
    named = datalist.changed(partial(with_values, values=values))
    return replace(named, labels=classes.labels, regions=classes.regions), classes


def _image_grid(case: Case) -> Grid:
    return read_grid(case.images[0])[0]


def table_of(labels: Sequence[tuple[Path, Callable[[], Grid]]], numbers_remedy: str = "") -> Classes:
    """The classes that label files name; none where no file names any.

    Args:
        labels: files, and what reads the grid that each is put on.
        numbers_remedy: what else helps where files without names hold the values that names contradict.

    Raises:
        DataError: As `name_segments`.
    """
    names = _gather(labels)
    if not names.numbers:
        return Classes()
    notes = ["class names are those of the segments in the label files."]
    labels_by_value, regions = _table(names, notes, numbers_remedy)
    return Classes(labels=labels_by_value, regions=regions, colours=names.colours, notes=tuple(notes))


def _gather(labels: Sequence[tuple[Path, Callable[[], Grid]]]) -> _Names:
    """Open all labels."""
    names = _Names()
    faults: list[str] = []
    for path, read_image_grid in labels:
        try:
            segmentation = open_segmentation(path)
            if segmentation is None:
                names.num_plain += 1
                continue
            for name, number in segmentation.numbers.items():
                names.numbers.setdefault(name, {}).setdefault(number, path)
            names.colours = {**segmentation.colours, **names.colours}
            if not segmentation.is_label_map and len(segmentation.numbers) > 1:
                _find_overlaps(path, segmentation, read_image_grid(), names)
        except DataError as error:
            faults.extend(error.messages)
    if faults:
        raise DataError(faults)
    return names


def _find_overlaps(path: Path, segmentation: Segmentation, grid: Grid, names: _Names) -> None:
    """Note which segments of a label share voxels."""
    with reading(path):
        layers = on_grid(segmentation, grid)
        if layers.faults:
            raise layers.faults[0]
    counts = layers.counts
    sizes = {name: sum(n for members, n in counts.items() if name in members) for name in segmentation.numbers}
    for members, count in counts.items():
        if len(members) > 1:
            names.together.add(members)
            if count >= TOUCHING * min(sizes[name] for name in members):
                names.overlapping.setdefault(members, stem_of(path))


def _table(names: _Names, notes: list[str], numbers_remedy: str) -> tuple[dict[int, str], dict[str, tuple[int, ...]]]:
    """`labels`, or `regions` where segments overlap.

    Raises:
        DataError: Names differ in spelling alone, or numbers contradict each other where names do not say more.
    """
    _check_spelling(names)
    if names.overlapping:
        if names.num_plain:
            raise DataError(_contradiction(names, "overlap"))
        return {}, _regions(names, notes)
    if names.together:
        pairs = ", ".join(" and ".join(sorted(members)) for members in _in_order(names.together)[:MOST_PAIRS])
        notes.append(f"segments touch ({pairs}): the later one has the voxels they share.")
    by_number: dict[int, set[str]] = {}
    for name, numbers in names.numbers.items():
        for number in numbers:
            by_number.setdefault(number, set()).add(name)
    agree = all(len(n) == 1 for n in names.numbers.values()) and all(len(n) == 1 for n in by_number.values())
    if agree and all(0 < number <= HIGHEST_VALUE for number in by_number):
        return {number: name for number, (name,) in sorted(by_number.items())}, {}
    if names.num_plain:
        raise DataError(f"{_contradiction(names, 'have different numbers')} {numbers_remedy}".rstrip())
    return dict(enumerate(sorted(names.numbers), start=1)), {}


def _check_spelling(names: _Names) -> None:
    """Refuse names that are one but for case and signs: they would be two classes."""
    spelt: dict[str, list[str]] = {}
    for name in names.numbers:
        spelt.setdefault(loose_key(name), []).append(name)
    faults = []
    for first, second, *_ in (n for n in spelt.values() if len(n) > 1):
        places = [next(iter(names.numbers[name].values())) for name in (first, second)]
        faults.append(
            f"{places[1]}: segment {second!r} differs from {first!r} in {places[0]} in spelling alone. Give segments "
            "of one class one name."
        )
    if faults:
        raise DataError(faults)


def _contradiction(names: _Names, why: str) -> str:
    first = next(path for numbers in names.numbers.values() for path in numbers.values())
    return (
        f"{first}: its segments, and those of other files, {why}, while {names.num_plain} label files hold values "
        "without names. Give all labels as segmentations, or all as label maps."
    )


def _regions(names: _Names, notes: list[str]) -> dict[str, tuple[int, ...]]:
    """A value for each segment by itself, then one for each set that occurs."""
    sets = [*(frozenset({name}) for name in sorted(names.numbers)), *_in_order(names.together)]
    if len(sets) > HIGHEST_VALUE:
        raise DataError(
            f"Segments overlap in {len(names.together)} ways. Expected at most {HIGHEST_VALUE}. Keep fewer."
        )
    pairs = _in_order(names.overlapping)
    words = (f"{' and '.join(sorted(members))} in {names.overlapping[members]}" for members in pairs)
    notes.append(f"segments overlap ({some_of(words, MOST_PAIRS)}): classes are regions, learned with sigmoid.")
    return {
        name: tuple(n for n, members in enumerate(sets, start=1) if name in members) for name in sorted(names.numbers)
    }


def _in_order(sets: Collection[frozenset[str]]) -> list[frozenset[str]]:
    """The smallest sets first, then by alphabet."""
    return sorted(sets, key=lambda members: (len(members), sorted(members)))
