"""A DICOM series: its slices in their order, the grid they lie on, and what is wrong with them.

Slices are sorted along the normal of their plane, never by name or number. What cannot be said by a grid (missing
slices, several time points, turned slices) is refused with the reason; nothing is resampled. A gantry's tilt can be
said by an affine, so that a tilted scan is read as it is, with a warning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autoseg.data.formats.dicom_files import MARKS, MOSAIC, DicomFile, Frame, read_pixels
from autoseg.data.formats.stored import FileFaultError, Finding, check_axes, lps_to_ras, no_numbers
from autoseg.data.grid import Grid, in_mm

SAME_PLACE_MM = 1e-2
"""Closer images are at one place: scanners round to 1e-3 mm and less."""
SAME_DIRECTION = 1e-4
"""Direction cosines that differ by less are equal: 0.05 mm over 500 mm."""
UNEVEN = 0.02
"""Distances between slices may differ by this share, as rounding of positions does."""
TILT_DEGREES = 0.1
"""Less is rounding."""
CONVERT = "Export it again, or convert it with dcm2niix and check the result."


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Slices that make a volume."""

    frames: tuple[Frame, ...]
    """In the order of the grid's third axis."""
    grid: Grid
    dtype: np.dtype
    """Of the pixels as stored."""
    is_evenly_scaled: bool
    """Whether one slope and one intercept hold for all slices; those of a PET differ."""
    warnings: tuple[Finding, ...]


def judge_series(files: Sequence[DicomFile]) -> Series:
    """Put the slices of a series in order.

    Raises:
        FileFaultError: They make no volume, with the reason.
    """
    dtype = _pixel_type(files)
    frames = [frame for file in files for frame in file.frames]
    _check_planes(files, frames)
    axis = _normal(frames[0])
    frames.sort(key=lambda frame: float(np.dot(frame.position, axis)))
    warnings: list[Finding] = []
    frames = _without_copies(frames, axis, warnings)
    step = _step(frames, axis, warnings)
    affine = np.eye(4)
    row, column = np.array(frames[0].orientation[:3]), np.array(frames[0].orientation[3:])
    # A step along a row goes to the next column, and the other way round.
    affine[:3, 0] = row * frames[0].spacing_mm[1]
    affine[:3, 1] = column * frames[0].spacing_mm[0]
    affine[:3, 2] = step
    affine[:3, 3] = frames[0].position
    check_axes(affine)
    shape = (files[0].columns, files[0].rows, len(frames))
    grid = Grid(shape=shape, affine=lps_to_ras(affine))
    is_even = len({(frame.slope, frame.inter) for frame in frames}) == 1
    return Series(frames=tuple(frames), grid=grid, dtype=dtype, is_evenly_scaled=is_even, warnings=tuple(warnings))


def _pixel_type(files: Sequence[DicomFile]) -> np.dtype:
    """The one type that holds the pixels of all files."""
    for file in files:
        if not file.photometric.startswith("MONOCHROME") or not file.dtype:
            raise no_numbers(file.photometric or "unknown")
        if file.has_lut:
            raise FileFaultError("unreadable", "intensities by a table (Modality LUT)", CONVERT)
        if MOSAIC in file.image_type:
            finding = "each of its images is a mosaic of slices, as Siemens writes functional MRI"
            raise FileFaultError("not_3d", finding, "Convert it with dcm2niix.")
    return np.result_type(*{np.dtype(file.dtype) for file in files})


def _check_planes(files: Sequence[DicomFile], frames: Sequence[Frame]) -> None:
    """Make sure that all slices have one size, one direction and one spacing."""
    for frame in frames:
        if (len(frame.position), len(frame.orientation), len(frame.spacing_mm)) != (3, 6, 2):
            remedy = f"Expected a slice of a volume. {CONVERT}"
            raise FileFaultError("orientation", "images without position, direction or pixel spacing", remedy)
    numbers = np.array([(*f.position, *f.orientation, *f.spacing_mm) for f in frames])
    row, column = numbers[:, 3:6], numbers[:, 6:9]
    off = np.abs(np.array([(row * row).sum(1) - 1, (column * column).sum(1) - 1, (row * column).sum(1)]))
    if not np.isfinite(numbers).all() or off.max() > 1e-2 or (numbers[:, 9:] <= 0).any():
        raise FileFaultError("orientation", "directions or spacings that no image has", CONVERT)
    if len(sizes := Counter((file.columns, file.rows) for file in files)) > 1:
        words = ", ".join(f"{n} of {x}x{y}" for (x, y), n in sizes.most_common(4))
        raise FileFaultError("not_3d", f"images of different sizes ({words})", "Keep those of one volume.")
    groups = _groups(numbers[:, 3:9], SAME_DIRECTION)
    if len(groups) > 1:
        words = ", ".join(map(str, groups[:8]))
        finding = f"images of {len(groups)} orientations in one series ({words} images), as localizers and turned views"
        raise FileFaultError("orientation", finding, "Keep those of one volume.")
    if len(_groups(numbers[:, 9:], 1e-3 * float(numbers[0, 9]))) > 1:
        raise FileFaultError("spacing", "images of different pixel spacing in one series", "Keep those of one volume.")


def _groups(rows: np.ndarray, tolerance: float) -> list[int]:
    """Sizes of groups of rows that agree, the largest first; more than 8 are not counted apart."""
    sizes: list[int] = []
    while len(rows) and len(sizes) < 9:
        alike = np.abs(rows - rows[0]).max(1) <= tolerance
        sizes.append(int(alike.sum()))
        rows = rows[~alike]
    return sorted(sizes, reverse=True)


def _normal(frame: Frame) -> np.ndarray:
    """The unit vector across a slice."""
    normal = np.cross(frame.orientation[:3], frame.orientation[3:])
    unit: np.ndarray = normal / np.linalg.norm(normal)
    return unit


def _without_copies(frames: list[Frame], axis: np.ndarray, warnings: list[Finding]) -> list[Frame]:
    """Leave out images that are there twice; several different ones at a place are refused."""
    places: list[list[Frame]] = []
    for frame in frames:
        if places and float(np.dot(np.subtract(frame.position, places[-1][0].position), axis)) < SAME_PLACE_MM:
            places[-1].append(frame)
        else:
            places.append([frame])
    num_copies = 0
    for place in (p for p in places if len(p) > 1):
        first, *others = place
        if not all(_is_copy(first, other) for other in others):
            raise _several_at_a_place(places)
        num_copies += len(others)
    if num_copies:
        finding = f"{num_copies} slice{' is' if num_copies == 1 else 's are'} there more than once"
        remedy = "Equal copies are used once. Remove them to be rid of this warning."
        warnings.append(Finding("header", finding, remedy, is_fault=False))
    return [place[0] for place in places]


def _is_copy(first: Frame, other: Frame) -> bool:
    apart = np.abs(np.subtract(first.position, other.position)).max()
    if apart > SAME_PLACE_MM or (first.slope, first.inter) != (other.slope, other.inter):
        return False
    one, another = (read_pixels(f.path, None if f.index is None else [f.index])[0] for f in (first, other))
    return np.array_equal(one, another)


def _several_at_a_place(places: Sequence[Sequence[Frame]]) -> FileFaultError:
    """Say what differs between images at one place."""
    most = max(places, key=len)
    differing = [name for name in MARKS if len({dict(frame.marks).get(name) for frame in most}) > 1]
    kinds = list(dict.fromkeys(MARKS[name] for name in differing))
    words = f", which differ in {' and '.join(kinds)}" if kinds else ""
    finding = f"up to {len(most)} different images at each of {len(places)} places{words}"
    return FileFaultError("not_3d", finding, "Expected one volume. Keep one, or make a file of each with dcm2niix.")


def _step(frames: Sequence[Frame], axis: np.ndarray, warnings: list[Finding]) -> np.ndarray:
    """The vector from a slice to the next, in LPS.

    Raises:
        FileFaultError: Slices are missing, unevenly spaced or shifted against each other.
    """
    if len(frames) == 1:
        return axis * (frames[0].thickness_mm or 1.0)
    positions = np.array([frame.position for frame in frames])
    heights = positions @ axis
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    if (np.abs(gaps - usual) > max(UNEVEN * usual, SAME_PLACE_MM)).any():
        raise _uneven(frames, gaps)
    step: np.ndarray = (positions[-1] - positions[0]) / (len(frames) - 1)
    away_mm = np.abs(positions - (positions[0] + np.arange(len(frames))[:, None] * step)).max()
    if away_mm > max(0.1 * usual, SAME_PLACE_MM):
        finding = f"slices lie up to {away_mm:.3g} mm beside the line through the first and the last"
        raise FileFaultError("spacing", finding, CONVERT)
    tilt = float(np.degrees(np.arccos(min(1.0, abs(float(step @ axis)) / float(np.linalg.norm(step))))))
    if tilt > TILT_DEGREES:
        remedy = "It is read on its own, sheared grid, which is exact; labels are written on the same."
        finding = f"slices are tilted by {tilt:.1f} degrees against their stack (gantry tilt)"
        warnings.append(Finding("orientation", finding, remedy, is_fault=False))
    return step


def _uneven(frames: Sequence[Frame], gaps: np.ndarray) -> FileFaultError:
    """Say whether slices are missing, or lie at different distances."""
    least = float(gaps.min())
    shares = gaps / least
    if (np.abs(shares - np.rint(shares)) < 0.1).all() and np.mean(shares < 1.5) >= 0.5:
        num_missing = int(np.rint(shares).sum()) - len(gaps)
        where = int(np.argmax(shares))
        between = f"{frames[where].path.name} and {frames[where + 1].path.name}"
        finding = f"{num_missing} of {len(frames) + num_missing} slices are missing, the first gap between {between}"
        return FileFaultError("missing", finding, "Copy the whole series again.")
    finding = f"slices lie from {in_mm([least])} to {in_mm([float(gaps.max())])} mm apart"
    return FileFaultError("spacing", finding, f"Expected even distances: no grid can say this. {CONVERT}")
