"""A segmentation: named segments that may overlap, each a mask somewhere in space; and how it comes onto a grid.

What 3D Slicer, DICOM and folders of masks hold, as their files give it. Nothing is resampled: a mask is taken over
voxel by voxel where its grid is a part of the image's, however its axes are stored; else it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from nibabel.orientations import apply_orientation

from autoseg.data.formats.stored import FileFaultError, Finding
from autoseg.data.grid import TOLERANCE_VOXELS, Grid, corners_of

Colour = tuple[int, int, int]
"""Red, green, blue in 0..255."""

MOST_SETS = 1 << 16
"""Sets of segments that share voxels, in one file."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Piece:
    """A part of a segment, such as one slice of it."""

    name: str
    """Of the segment."""
    mask: np.ndarray
    """(I, J, K) bool."""
    affine: np.ndarray
    """(4, 4), voxel -> mm in RAS+. Where K is 1 its third axis is of no account."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Segmentation:
    """Segments as a file has them."""

    numbers: dict[str, int]
    """Name of each segment -> its number in the file, in the file's order. Segments of one name are one."""
    is_label_map: bool
    """Whether the file is a label map, too, whose values are the numbers; no segments of it overlap."""
    pieces: Callable[[Grid], Iterator[Piece | FileFaultError]]
    """Read the masks, as far as they are needed on a grid; a fault stands for a segment that cannot be read, so that
    all can be named."""
    grid: Callable[[], Grid] | None
    """The smallest grid that holds all of it. None: it lies on the slices of an image, and has no grid of its own."""
    warnings: tuple[Finding, ...] = ()
    colours: Mapping[str, Colour] = field(default_factory=dict)
    """Of the segments that have one in the file."""


def colour_of(red: float, green: float, blue: float) -> Colour | None:
    """A colour of numbers in 0..255, rounded and cut to that; None where a file has no numbers there."""
    parts = np.array([red, green, blue])
    if not np.isfinite(parts).all():
        return None
    r, g, b = np.clip(np.rint(parts), 0, 255).astype(int).tolist()
    return r, g, b


def colours_by_name(colours: Iterable[tuple[str, Colour | None]]) -> dict[str, Colour]:
    """The first colour of each segment that has one."""
    by_name: dict[str, Colour] = {}
    for name, colour in colours:
        if colour is not None:
            by_name.setdefault(name, colour)
    return by_name


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layers:
    """A segmentation on a grid: for each voxel, which segments it lies in."""

    sets: list[frozenset[str]]
    """Sets of segments that occur; the first is the empty one."""
    index: np.ndarray
    """(I, J, K) uint16: which of the sets a voxel has."""
    faults: list[FileFaultError]
    """Of segments that could not be read; they are left out."""

    @property
    def counts(self) -> dict[frozenset[str], int]:
        """Voxels of each set that occurs, the empty one left out."""
        counts = np.bincount(self.index.ravel(order="K"), minlength=len(self.sets)).tolist()
        return {names: n for names, n in zip(self.sets, counts, strict=True) if names and n}


def on_grid(segmentation: Segmentation, grid: Grid) -> Layers:
    """Put the segments onto a grid.

    Raises:
        FileFaultError: A mask does not lie on the grid's voxels, or outside of it.
        OSError, EOFError, ValueError, zlib.error: The file is damaged.
    """
    index = np.zeros(grid.shape, np.uint16, order="F")
    sets: list[frozenset[str]] = [frozenset()]
    number_of = {sets[0]: 0}
    faults: list[FileFaultError] = []
    for piece in segmentation.pieces(grid):
        if isinstance(piece, FileFaultError):
            faults.append(piece)
            continue
        part, mask = _placed(piece, grid)
        touched = index[part][mask]
        table = np.arange(len(sets), dtype=np.uint16)
        for number in np.flatnonzero(np.bincount(touched, minlength=1)).tolist():
            joined = sets[number] | {piece.name}
            if joined not in number_of:
                if len(sets) == MOST_SETS:
                    raise FileFaultError("overlap", "segments that overlap in too many ways", "Keep fewer of them.")
                number_of[joined] = len(sets)
                sets.append(joined)
            table[number] = number_of[joined]
        index[part][mask] = table[touched]
    return Layers(sets=sets, index=index, faults=faults)


def _placed(piece: Piece, grid: Grid) -> tuple[tuple[slice, ...], np.ndarray]:
    """Which part of a grid a mask covers, and the mask with the grid's axes.

    Raises:
        FileFaultError: Its voxels are none of the grid's.
    """
    step = np.linalg.inv(grid.affine) @ piece.affine
    turn = np.rint(step[:3, :3])
    if piece.mask.shape[2] == 1:  # how thick a slice is said to be does not matter, nor a tilt of the stack
        turn[:, 2] = np.abs(turn[:, :2]).sum(1) == 0
        step[:3, 2] = turn[:, 2]
    sound = (np.abs(turn).sum(0) == 1).all() and (np.abs(turn).sum(1) == 1).all()
    exact = np.eye(4)
    exact[:3, :3], exact[:3, 3] = turn, np.rint(step[:3, 3])
    corners = corners_of(piece.mask.shape)
    away = np.abs((step - exact) @ corners).max()
    if not sound or not away <= TOLERANCE_VOXELS:
        words = f"up to {away:.2g} voxels away" if sound else "of another size or direction"
        raise FileFaultError(
            "grid",
            f"segment {piece.name!r} is not on the image's voxels ({words})",
            "Nothing is resampled. Export it on the grid of its image, and check that it belongs to it.",
        )
    at = (exact @ corners)[:3]
    low, high = at.min(1).astype(int), at.max(1).astype(int) + 1
    ornt = np.stack([np.abs(turn).argmax(0), turn.sum(0)], axis=1)
    mask = apply_orientation(piece.mask, ornt)
    inner = [(max(0, a), min(b, n)) for a, b, n in zip(low, high, grid.shape, strict=True)]
    part = tuple(slice(a, max(a, b)) for a, b in inner)
    inside = mask[tuple(slice(max(0, s.start - a), max(0, s.stop - a)) for s, a in zip(part, low, strict=True))]
    if inside.size < mask.size and int(inside.sum()) < int(mask.sum()):
        finding = f"segment {piece.name!r} reaches beyond the image"
        raise FileFaultError("grid", finding, "Check that it belongs to this image, and that no slice is missing.")
    return part, inside
