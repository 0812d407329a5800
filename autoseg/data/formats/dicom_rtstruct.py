"""RTSTRUCT: regions as contours on the slices of an image, filled there by the even-odd rule.

A voxel belongs to a region where its centre lies within an odd number of the region's contours on the slice: holes
drawn as contours of their own, or by a channel to the outer one (keyhole), both stay empty.
Source: DICOM PS3.3, C.8.8.6; matplotlib decides which centres lie within a contour.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from autoseg.data.formats.dicom_files import naming_damage, numbers_of, read_fields, several, value_of
from autoseg.data.formats.segmentation import Colour, Piece, Segmentation, colour_of
from autoseg.data.formats.stored import FARTHEST_MM, FileFaultError, Finding, lps_to_ras
from autoseg.data.grid import Grid

RT_FIELDS = ("StructureSetROISequence", "ROIContourSequence")
FILLED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
"""Kinds of contours that enclose something; points and open lines do not."""
OFF_SLICE = 0.25
"""Contours may lie as far beside a slice, in distances of slices: systems round to 0.01 mm and more, and a contour
half-way between two slices belongs to neither."""


def open_rtstruct(path: Path) -> Segmentation:
    """Read the contours of a structure set.

    Raises:
        FileFaultError: It is damaged, or has no closed contour.
    """
    data = read_fields(path, RT_FIELDS)
    with naming_damage(f"a damaged RTSTRUCT in {path.name}"):
        names = {
            int(item.ROINumber): str(item.get("ROIName", "") or "").strip() or f"region {int(item.ROINumber)}"
            for item in several(value_of(data, "StructureSetROISequence"))
        }
        contours: dict[int, list[np.ndarray]] = {}
        colours: dict[int, Colour] = {}
        num_open = 0
        for item in several(value_of(data, "ROIContourSequence")):
            number = int(item.ReferencedROINumber)
            if len(shown := numbers_of(item.get("ROIDisplayColor"))) == 3 and (colour := colour_of(*shown)):
                colours[number] = colour
            for contour in several(item.get("ContourSequence")):
                if str(contour.get("ContourGeometricType")) not in FILLED:
                    num_open += 1
                    continue
                points = np.array([float(v) for v in several(contour.ContourData)]).reshape(-1, 3)
                if len(points) >= 3:
                    contours.setdefault(number, []).append(points)
    if not contours or not {*contours} <= {*names}:
        finding = "a structure set without closed contours" if not contours else "contours of a region without a name"
        raise FileFaultError("unreadable", finding, "Export it again.")
    if any(not (np.abs(points) < FARTHEST_MM).all() for listed in contours.values() for points in listed):
        raise FileFaultError("unreadable", "contours that lie nowhere", "Export it again.")
    numbers: dict[str, int] = {}
    for number in sorted(contours):
        numbers.setdefault(names[number], number)
    warnings: tuple[Finding, ...] = ()
    if num_open:
        remedy = "Expected closed contours; others enclose nothing."
        warnings = (Finding("header", f"{num_open} points or open contours left out", remedy, is_fault=False),)

    def pieces(grid: Grid) -> Iterator[Piece]:
        for number, listed in contours.items():
            yield from _filled(names[number], listed, grid)

    return Segmentation(
        numbers=numbers,
        is_label_map=False,
        pieces=pieces,
        grid=None,
        warnings=warnings,
        colours={name: colours[number] for name, number in numbers.items() if number in colours},
    )


def _filled(name: str, contours: list[np.ndarray], grid: Grid) -> Iterator[Piece]:
    """The slices of one region."""
    to_index = np.linalg.inv(grid.affine) @ lps_to_ras(np.eye(4))
    by_slice: dict[tuple[int, int], list[np.ndarray]] = {}
    for points in contours:
        index = points @ to_index[:3, :3].T + to_index[:3, 3]
        axis = int(np.argmin(np.ptp(index, axis=0)))
        heights = index[:, axis]
        number = int(np.rint(np.median(heights)))
        if np.abs(heights - number).max() > OFF_SLICE:
            finding = f"a contour of {name!r} is not on a slice of the image"
            raise FileFaultError("grid", finding, "Give the image that it was drawn on; nothing is resampled.")
        if not 0 <= number < grid.shape[axis]:
            finding = f"a contour of {name!r} is on a slice that the image does not have"
            raise FileFaultError("grid", finding, "Check that it belongs to this image, and that no slice is missing.")
        by_slice.setdefault((axis, number), []).append(np.delete(index, axis, axis=1))
    for (axis, number), polygons in by_slice.items():
        shape = tuple(np.delete(grid.shape, axis))
        mask = np.zeros(shape, bool)
        for polygon in polygons:
            _turn_inside(mask, polygon)
        # A piece is a slice along its own third axis: the place and the axes of this one within the grid.
        within = np.zeros((4, 4))
        within[[i for i in range(3) if i != axis], [0, 1]] = 1
        within[axis, 2] = within[3, 3] = 1
        within[axis, 3] = number
        yield Piece(name=name, mask=mask[..., None], affine=grid.affine @ within)


def _turn_inside(mask: np.ndarray, polygon: np.ndarray) -> None:
    """Turn what is set to what is not, and the other way round, where a voxel's centre lies within a polygon."""
    from matplotlib.path import Path as Outline

    low = np.clip(np.floor(polygon.min(0)).astype(int), 0, mask.shape)
    high = np.clip(np.ceil(polygon.max(0)).astype(int) + 1, 0, mask.shape)
    if (low >= high).any():
        return
    i, j = np.meshgrid(*(np.arange(a, b) for a, b in zip(low, high, strict=True)), indexing="ij")
    centres = np.stack([i.ravel(), j.ravel()], axis=1)
    closed = np.vstack([polygon, polygon[:1]])
    inside = Outline(closed).contains_points(centres).reshape(i.shape)
    mask[low[0] : high[0], low[1] : high[1]] ^= inside
