"""Label files: label maps, which every format can hold, and segmentations, whose segments have names.

Segmentations are those of 3D Slicer, of DICOM (SEG, RTSTRUCT), and folders of a mask per class, as TotalSegmentator
writes them. Which label value a segment becomes is not theirs to say but the datalist's, since files number segments as
they like.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from autoseg.data.formats.format import Format
from autoseg.data.formats.segmentation import Layers, Piece, Segmentation, on_grid
from autoseg.data.formats.stored import FileFaultError, Finding, Header, StoredVolume, check_room
from autoseg.data.formats.table import (
    FORMATS,
    format_of,
    image_digest,
    image_files,
    read_header,
    read_stored_volume,
    reading,
    stem_of,
    suffix_of,
)
from autoseg.data.grid import Grid, corners_of
from autoseg.errors import DataError, some_of
from autoseg.workspace.files import subfolders

MASK_FOLDERS = ("segmentations", "segmentation", "masks", "labels")
"""Folders inside a case's folder in which masks are looked for, besides the case's folder itself."""
TOUCHING = 0.01
"""Segments that share less than this part of the smaller one touch, and do not overlap: the later one has the voxels.
A choice: neighbours that were drawn one by one share part of their border, regions inside others all of the smaller."""
MOST_NAMED = 12
"""Segments that a message names."""

SegmentValues = tuple[tuple[str, tuple[int, ...]], ...]
"""Name of each segment that is a class, in the order of the datalist -> the label values that belong to it: one, or,
where segments overlap, those of all sets of segments that it is in."""


# -- files


def label_files(folder: Path, *, deep: bool = False) -> list[Path]:
    """The labels of a folder in the order of their names: files, and subfolders that are one label.

    Args:
        deep: search files in subfolders, which then are no folders of masks.
    """
    found = {path for row in FORMATS if row.find_labels is not None for path in row.find_labels(folder)}
    masks = () if deep else (p for p in subfolders(folder) if p not in found and masks_of(p))
    return sorted({*image_files(folder, deep=deep), *found, *masks})


def masks_of(folder: Path) -> dict[str, Path]:
    """Class -> mask of a folder; empty where it is no folder of masks."""
    inner = next((folder / name for name in MASK_FOLDERS if (folder / name).is_dir()), folder)
    return {} if not inner.is_dir() or _is_dicom(inner) else {stem_of(p): p for p in image_files(inner)}


def _is_dicom(path: Path) -> bool:
    """Whether a folder holds DICOM, at any depth."""
    try:
        return not format_of(path).suffixes
    except FileFaultError:
        return False


def open_segmentation(path: Path) -> Segmentation | None:
    """The segments of a label file; none where it is a plain label map.

    Formats whose files never name segments are not opened.

    Raises:
        FileFaultError: It is damaged, or a package that is needed is not installed; the message names the file.
    """
    row = next((row for row in FORMATS if suffix_of(path) in row.suffixes), None)
    if row is not None and row.segmentation is None:
        return None
    if row is None and (masks := masks_of(path)):
        return mask_segmentation(masks)
    with reading(path):
        kind: Format = row or format_of(path)
        return None if kind.segmentation is None else kind.segmentation(path)


def mask_segmentation(masks: dict[str, Path]) -> Segmentation:
    """A folder of binary masks, all on one grid, as a segmentation.

    Args:
        masks: class -> file.
    """

    def pieces(grid: Grid) -> Iterator[Piece | FileFaultError]:
        first: tuple[Path, Grid] | None = None
        for name, path in masks.items():
            try:
                volume = read_stored_volume(path)
                first = first or (path, volume.grid)
                if differs := volume.grid.differs_from(first[1]):
                    finding = f"not on the grid of {first[0].name}: {differs}"
                    raise FileFaultError("grid", finding, "Export the masks again.")
                yield Piece(name=name, mask=_as_mask(volume), affine=volume.grid.affine)
            except FileFaultError as error:
                fault = error.fault
                yield FileFaultError(fault.kind, fault.finding, fault.remedy, path=path)

    return Segmentation(
        numbers={name: number for number, name in enumerate(masks, start=1)},
        is_label_map=False,
        pieces=pieces,
        grid=lambda: read_header(next(iter(masks.values()))).grid,
    )


def _as_mask(volume: StoredVolume) -> np.ndarray:
    """Where a mask is set, (I, J, K).

    Raises:
        FileFaultError: It has channels, or other values than 0 and one more.
    """
    if volume.array.shape[3] != 1:
        raise FileFaultError("not_3d", f"a mask with {volume.array.shape[3]} channels", "Expected one mask per file.")
    array = volume.array[..., 0]
    mask: np.ndarray = array * volume.slope + volume.inter != 0 if volume.inter else array != 0
    set_values = array[mask]
    if len(set_values) and not (set_values == set_values[0]).all():
        raise FileFaultError(
            "label_values", "more than one value besides 0", "Expected a binary mask. Is it a label map of all classes?"
        )
    return mask


# -- values


def is_by_name(segmentation: Segmentation, names: Sequence[str]) -> bool:
    """Whether names decide the label values of a file's segments, and not the values in the file.

    Those of a file of Slicer that is a label map, too, decide where all of its segments are classes by their names.
    """
    return not segmentation.is_label_map or (bool(names) and {*segmentation.numbers} <= {*names})


def value_names(path: Path) -> dict[int, str]:
    """What a label map calls its values; empty where it names none, is no label map, or cannot be read."""
    try:
        segmentation = open_segmentation(path)
    except (DataError, OSError, ValueError):
        return {}  # as reading it will say
    named = segmentation.numbers if segmentation is not None and segmentation.is_label_map else {}
    return {value: name for name, value in named.items()}


def values_by_name(path: Path, values: SegmentValues) -> SegmentValues:
    """The values of classes, where a label's segments are or may be known by name; nothing for a plain label map.

    DICOM files and folders are not opened: most are segmentations, and hundreds take long.
    """
    row = next((row for row in FORMATS if suffix_of(path) in row.suffixes), None)
    if row is None:
        return values
    try:
        segmentation = open_segmentation(path)
    except (DataError, OSError, ValueError):
        return values  # as reading it will say
    by_name = segmentation is not None and is_by_name(segmentation, [name for name, _ in values])
    return values if by_name else ()


def read_stored_label(
    path: Path,
    *,
    grid: Grid | None = None,
    values: SegmentValues = (),
    free_bytes: int | None = None,
    with_digest: bool = False,
) -> StoredVolume:
    """Read a label file as a label map, as it is stored.

    Args:
        grid: of the image that it belongs to, on which segments are put; None: a segmentation's own.
        values: of the classes, where the label's segments are known by name.
        free_bytes: memory the voxels may take; None: no limit.
        with_digest: also of the files' bytes.

    Raises:
        FileFaultError: As `read_stored_volume`; segments have no values, overlap where no value says so, or do not lie
            on the grid.
    """
    segmentation = open_segmentation(path)
    if segmentation is None or not is_by_name(segmentation, [name for name, _ in values]):
        return read_stored_volume(path, free_bytes=free_bytes, with_digest=with_digest)
    with reading(path):
        if not values:
            raise _no_values(segmentation)
        grid = grid or own_grid(segmentation)
        _check_room(grid, free_bytes)
        layers = on_grid(segmentation, grid)
        if layers.faults:
            first = layers.faults[0]
            more = f", and {len(layers.faults) - 1} more such files" if len(layers.faults) > 1 else ""
            place = f"{first.path.name}: " if first.path else ""
            raise FileFaultError(first.fault.kind, f"{place}{first.fault.finding}{more}", first.fault.remedy)
        array, warnings = label_map_of(layers, values)
    return StoredVolume(
        array=array[..., None],
        grid=grid,
        digest=image_digest(path) if with_digest else "",
        warnings=(*segmentation.warnings, *_left_out(segmentation, values), *warnings),
    )


def own_grid(segmentation: Segmentation) -> Grid:
    """The grid of a segmentation by itself.

    Raises:
        FileFaultError: It has none.
    """
    if segmentation.grid is None:
        finding = "contours, or several segmentations, which have no grid of their own"
        raise FileFaultError("grid", finding, "Give it as the label of its image.")
    return segmentation.grid()


def joint_grid(grids: Sequence[Grid]) -> Grid:
    """The smallest grid with the voxels of the first that holds all."""
    first = grids[0]
    to_index = np.linalg.inv(first.affine)
    corners = np.hstack([(to_index @ grid.affine @ corners_of(grid.shape))[:3] for grid in grids])
    low, high = np.rint(corners.min(1)).astype(int), np.rint(corners.max(1)).astype(int)
    affine = first.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ low
    i, j, k = (high - low + 1).tolist()
    return Grid(shape=(i, j, k), affine=affine)


def _check_room(grid: Grid, free_bytes: int | None) -> None:
    """Refuse a segmentation whose label does not fit into memory. Raises: FileFaultError."""
    check_room(Header(grid=grid, num_channels=2, dtype=np.dtype(np.uint16)), free_bytes)


def _no_values(segmentation: Segmentation) -> FileFaultError:
    names = list(segmentation.numbers)
    return FileFaultError(
        "label_names",
        f"its segments are known by name ({some_of(names, MOST_NAMED)}), and no label values are named",
        'Expected `labels` in the datalist, such as {"1": "' + names[0] + '"}; `autoseg init` writes them.',
    )


def _left_out(segmentation: Segmentation, values: SegmentValues) -> list[Finding]:
    """Warn of segments that are no class."""
    rest = [name for name in segmentation.numbers if name not in dict(values)]
    if not rest:
        return []
    finding = f"segments that are no class: {some_of(rest, MOST_NAMED)}"
    remedy = "They count as background. Name them in `labels` of the datalist if they are to be learned."
    return [Finding("label_names", finding, remedy, is_fault=False)]


def label_map_of(layers: Layers, values: SegmentValues) -> tuple[np.ndarray, list[Finding]]:
    """Segments as label values.

    A voxel has the value that belongs to exactly the classes whose segments it lies in. Where there is none, and few
    voxels are concerned, it has that of the class that comes last in `values`.

    Returns:
        (I, J, K) uint8, or uint16 where values exceed 255; and warnings.

    Raises:
        FileFaultError: More voxels than few have no value.
    """
    classes_of: dict[int, frozenset[str]] = {}
    for name, numbers in values:
        for number in numbers:
            classes_of[number] = classes_of.get(number, frozenset()) | {name}
    value_of = {classes: value for value, classes in reversed(classes_of.items())} | {frozenset[str](): 0}
    order = [name for name, _ in values]
    counts = layers.counts
    sizes = {name: sum(n for names, n in counts.items() if name in names) for name in order}
    table = np.zeros(len(layers.sets), np.uint16)
    warnings: list[Finding] = []
    for number, names in enumerate(layers.sets):
        classes = names & {*order}
        if classes in value_of:
            table[number] = value_of[classes]
            continue
        last = max(classes, key=order.index)
        # The value of the last one that says least beside and beyond what the voxel is.
        table[number] = min(dict(values)[last], key=lambda v: len(classes_of[v] ^ classes))
        if not (count := counts.get(names, 0)):
            continue
        share = count / min(sizes[name] for name in classes)
        words = " and ".join(sorted(classes, key=order.index))
        together = f"{words} share {count} voxels" if len(classes) > 1 else f"{count} voxels are of {words} alone"
        finding = f"{together}, for which there is no label value"
        if share >= TOUCHING:
            remedy = "Correct the segments; or let `autoseg init` write `labels` anew, as regions that overlap."
            raise FileFaultError("overlap", finding, remedy)
        remedy = f"They count as {last}, which comes last. Correct the segments to be rid of this warning."
        warnings.append(Finding("overlap", finding, remedy, is_fault=False))
    dtype = np.uint8 if max(classes_of, default=0) < 256 else np.uint16
    return table.astype(dtype)[layers.index], warnings
