"""Merging a folder per case of binary masks, as TotalSegmentator writes them, into one label file per case.

folder/CASE/liver.nii.gz or folder/CASE/segmentations/liver.nii.gz -> output/CASE.nii.gz, output/labels.json
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from nibabel.orientations import apply_orientation

from autoseg.analyzer.case import refuse_grid
from autoseg.data.formats.label_files import mask_segmentation, masks_of, own_grid
from autoseg.data.formats.segmentation import on_grid
from autoseg.data.formats.stored import FileFaultError
from autoseg.data.formats.table import LABEL_SUFFIX
from autoseg.data.grid import Grid, ras_orientation
from autoseg.data.volumes import write_volume
from autoseg.errors import DataError, counted, some_of
from autoseg.workspace.files import write_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """What was merged."""

    labels: dict[int, str]
    """Value in the label files -> class."""
    cases: tuple[str, ...]
    overlaps: tuple[tuple[str, str, str, int], ...]
    """(case, class, later class that has the voxels now, voxels)."""
    missing: tuple[tuple[str, str], ...]
    """(case, class without a mask there)."""

    def text(self) -> str:
        """For people: what was written, every overlap, and how many masks are missing."""
        lines = [f"{counted(len(self.cases), 'label file')} of {counted(len(self.labels), 'class', 'classes')}"]
        if self.overlaps:
            lines.append(f"Overlaps ({len(self.overlaps)}); the later class keeps the voxels:")
            lines += [f"- {case}: {a} and {b}, {counted(n, 'voxel')}" for case, a, b, n in self.overlaps]
        if self.missing:
            lines.append(f"Masks that are not there ({len(self.missing)}); taken as empty:")
            lines += [f"- {case}: {name}" for case, name in self.missing]
        return "\n".join(lines)


def merge_masks(folder: Path, output: Path, *, classes: Sequence[str] | None = None) -> MergeReport:
    """Merge each case's masks into one label file; a later class wins where masks overlap.

    Args:
        folder: a folder per case, with the masks in it or in a folder such as segmentations/.
        output: folder for CASE.nii.gz and labels.json.
        classes: mask names without suffix, in the order of label values 1, 2, ...; None: all, by alphabet.

    Raises:
        DataError: No mask, unknown classes, files that cannot be read, or masks on different grids; all at once.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder. Give the folder that holds a folder of masks per case.")
    if output.resolve() == folder.resolve():
        raise DataError(f"{output}: is the folder of the masks. Give another folder for the label files.")
    masks = {d.name: masks_of(d) for d in sorted(folder.iterdir()) if d.is_dir() and d.resolve() != output.resolve()}
    masks = {case: files for case, files in masks.items() if files}
    if not masks:
        raise DataError(
            f"{folder}: no mask in it. Expected a folder per case with a file per class, such as "
            f"{folder.name}/case_001/liver{LABEL_SUFFIX}."
        )
    available = sorted({name for files in masks.values() for name in files})
    names = tuple(available if classes is None else classes)
    _check_names(folder, names, available)
    faults: list[str] = []
    overlaps: list[tuple[str, str, str, int]] = []
    missing: list[tuple[str, str]] = []
    for case, files in masks.items():
        missing += [(case, name) for name in names if name not in files]
        merged = _merge(case, files, names, faults, overlaps)
        if merged is not None and not faults:
            write_volume(output / f"{case}{LABEL_SUFFIX}", *merged)
            logger.info("%s: %d masks merged", case, sum(name in files for name in names))
    if faults:
        raise DataError(faults)
    labels = dict(enumerate(names, start=1))
    write_json(output / "labels.json", {str(v): n for v, n in labels.items()})
    return MergeReport(labels=labels, cases=tuple(masks), overlaps=tuple(overlaps), missing=tuple(missing))


def _check_names(folder: Path, names: Sequence[str], available: Sequence[str]) -> None:
    faults = []
    unknown = [n for n in names if n not in available]
    if unknown:
        faults.append(f"{folder}: no case has a mask {', '.join(unknown)}. Found {some_of(available, most=20)}.")
    twice = sorted({n for n in names if list(names).count(n) > 1})
    if twice:
        faults.append(f"classes: {', '.join(twice)} is named twice. Name each class once.")
    if len(names) > 65535:
        faults.append(f"{folder}: {len(names)} classes. Expected at most 65535.")
    if faults:
        raise DataError(faults)


def _merge(
    case: str,
    files: dict[str, Path],
    names: Sequence[str],
    faults: list[str],
    overlaps: list[tuple[str, str, str, int]],
) -> tuple[np.ndarray, Grid] | None:
    """One case's label in RAS+ and its grid; None, and more faults, where that cannot be."""
    wanted = {name: files[name] for name in names if name in files}
    values = {name: value for value, name in enumerate(names, start=1)}
    segmentation = mask_segmentation(wanted)
    try:
        grid = own_grid(segmentation)
        refuse_grid(grid)
        layers = on_grid(segmentation, grid)
    except FileFaultError as error:
        faults.append(_named(case, error))
        return None
    if layers.faults:
        faults.extend(_named(case, error) for error in layers.faults)
        return None
    dtype = np.uint8 if len(names) < 256 else np.uint16
    table = np.array([max((values[name] for name in members), default=0) for members in layers.sets], dtype)
    shared: Counter[tuple[int, int]] = Counter()
    for members, count in layers.counts.items():
        # The later class takes the voxels from the one before it.
        for pair in pairwise(sorted(values[name] for name in members)):
            shared[pair] += count
    overlaps += [
        (case, names[a - 1], names[b - 1], n) for (a, b), n in sorted(shared.items(), key=lambda s: s[0][::-1])
    ]
    return _to_ras(table[layers.index], grid), grid


def _named(case: str, error: FileFaultError) -> str:
    place = f"{case} ({error.path.name})" if error.path is not None else case
    return f"{place}: {error.fault.finding}. {error.fault.remedy}"


def _to_ras(label: np.ndarray, grid: Grid) -> np.ndarray:
    ornt = ras_orientation(grid.affine)
    return np.ascontiguousarray(apply_orientation(label, ornt))
