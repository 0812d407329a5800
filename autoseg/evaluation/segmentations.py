"""Label files whose segments are known by name, in a comparison: what values they become, and on which grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from autoseg.data.datalists.segments import segment_values, table_of
from autoseg.data.formats.label_files import SegmentValues, joint_grid, open_segmentation, own_grid
from autoseg.data.formats.table import read_header, reading
from autoseg.data.grid import Grid
from autoseg.data.labels import LabelMap

BY_CLASSES = "Or name the classes of the values 1, 2, ... in their order: --classes liver,tumor."
"""What else helps in a comparison where names and values contradict each other."""


def shared_grid(label: Path, prediction: Path | None) -> Grid | None:
    """The grid that a label and its prediction are put on: of the one that is a label map, else one that holds both.

    None where both are label maps.

    Raises:
        DataError: A file cannot be read, or has no grid of its own while the other has none, either.
    """
    paths = [label] if prediction is None else [label, prediction]
    opened = [(path, open_segmentation(path)) for path in paths]
    by_name = [(path, s) for path, s in opened if s is not None and not s.is_label_map]
    if not by_name:
        return None
    if maps := [path for path, s in opened if s is None or s.is_label_map]:
        return read_header(maps[0]).grid
    grids = []
    for path, segmentation in by_name:
        with reading(path):
            grids.append(own_grid(segmentation))
    return joint_grid(grids)


def classes_by_name(pairs: Mapping[Path, Path], labels: Sequence[Path]) -> tuple[LabelMap, SegmentValues] | None:
    """The classes that label files and predictions name; None where none is known by name alone.

    Raises:
        DataError: Files cannot be read, or contradict each other.
    """
    paths = [(path, path, pairs.get(path)) for path in labels] + [(pred, path, pred) for path, pred in pairs.items()]
    opened = [open_segmentation(path) for path, _, _ in paths]
    if all(segmentation is None or segmentation.is_label_map for segmentation in opened):
        return None
    classes = table_of([(path, partial(_grid, label, pred)) for path, label, pred in paths], BY_CLASSES)
    values = segment_values(classes.labels, classes.regions)
    names, numbered = zip(*values, strict=True)
    return LabelMap(names=names, values=numbered, sigmoid=bool(classes.regions)), values


def _grid(label: Path, prediction: Path | None) -> Grid:
    grid = shared_grid(label, prediction)
    assert grid is not None, "asked for where a file is no label map"
    return grid
