"""DICOM-SEG: segments as frames that lie in space by themselves, in any order, and only where there is something.

Source: DICOM PS3.3, A.51 (Segmentation, of masks) and A.51 of Supplement 243 (label maps).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from autoseg.data.formats.dicom_files import (
    FIELDS,
    Frame,
    check_decoder,
    frames_of,
    naming_damage,
    read_dicom,
    read_fields,
    several,
    value_of,
)
from autoseg.data.formats.segmentation import Colour, Piece, Segmentation, colour_of, colours_by_name
from autoseg.data.formats.stored import FileFaultError, Finding, check_axes, lps_to_ras
from autoseg.data.grid import Grid

SEG_FIELDS = ("SegmentSequence", "SegmentationType", "MaximumFractionalValue", "SegmentationFractionalType")
SAME_PLACE = 0.1
"""Frames may lie as far beside the places of a stack, in distances of its slices."""


def open_seg(path: Path) -> Segmentation:
    """Read the header of a segmentation.

    Raises:
        FileFaultError: It is damaged, has no segment, or frames without a place, as those of slides.
    """
    check_decoder(read_dicom(path))
    data = read_fields(path, (*FIELDS, *SEG_FIELDS))
    with naming_damage(f"a damaged DICOM-SEG header in {path.name}"):
        kind = str(value_of(data, "SegmentationType") or "BINARY")
        items = several(value_of(data, "SegmentSequence"))
        names = {int(item.SegmentNumber): _name(item) for item in items}
        colours = colours_by_name((_name(item), _colour(item)) for item in items)
        described = len(several(value_of(data, "PerFrameFunctionalGroupsSequence")))
        stored = int(value_of(data, "NumberOfFrames") or 1)
        if described != stored:
            finding = f"{described} frames described and {stored} stored"
            raise FileFaultError("unreadable", finding, "Copy or export it again.")
        frames = list(frames_of(path, data))
        highest = int(value_of(data, "MaximumFractionalValue") or 255)
        shape = (int(value_of(data, "Columns")), int(value_of(data, "Rows")))
    names.pop(0, None)  # a label map may name its background
    _check(kind, names, frames)
    numbers: dict[str, int] = {}
    for number, name in sorted(names.items()):
        numbers.setdefault(name, number)

    def pieces(grid: Grid) -> Iterator[Piece]:
        return _pieces(path, kind, names, frames, highest / 2)

    warnings: tuple[Finding, ...] = ()
    if kind == "FRACTIONAL":
        finding = "a segmentation of shares or probabilities (FRACTIONAL)"
        remedy = "Voxels of at least one half are taken. Export it as BINARY if another limit is meant."
        warnings = (Finding("label_values", finding, remedy, is_fault=False),)
    return Segmentation(
        numbers=numbers,
        is_label_map=False,
        pieces=pieces,
        grid=lambda: _stack(frames, shape),
        warnings=warnings,
        colours=colours,
    )


def _name(item: object) -> str:
    """A segment's name: its label, else its number."""
    label = str(getattr(item, "SegmentLabel", "") or "").strip()
    return label or f"segment {int(item.SegmentNumber)}"  # type: ignore[attr-defined]


WHITE = np.array([0.9505, 1.0, 1.0889])
"""D65 in CIE XYZ, as highdicom and dcmqi take it."""
XYZ_TO_RGB = np.array([[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]])
"""To linear sRGB. Source: IEC 61966-2-1."""


def _colour(item: object) -> Colour | None:
    """The colour in which a segment is to be shown, from CIE L*a*b* in 16 bits; None where there is none.

    Source: DICOM PS3.3 C.10.7.1.1.
    """
    stored = several(getattr(item, "RecommendedDisplayCIELabValue", None))
    if len(stored) != 3:
        return None
    light, a, b = (float(part) / 65535 for part in stored)
    y = (100 * light + 16) / 116
    cube_roots = np.array([y + (255 * a - 128) / 500, y, y - (255 * b - 128) / 200])
    xyz = WHITE * np.where(cube_roots > 6 / 29, cube_roots**3, (cube_roots - 16 / 116) / 7.787)
    linear = np.clip(XYZ_TO_RGB @ xyz, 0, 1)
    red, green, blue = 255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    return colour_of(red, green, blue)


def _check(kind: str, names: dict[int, str], frames: Sequence[Frame]) -> None:
    """Refuse what cannot be placed."""
    if kind not in ("BINARY", "FRACTIONAL", "LABELMAP"):
        raise FileFaultError("unreadable", f"a segmentation of type {kind}", "Export it as BINARY.")
    if not names:
        raise FileFaultError("unreadable", "a segmentation without segments", "Export it again.")
    if any((len(f.position), len(f.orientation), len(f.spacing_mm)) != (3, 6, 2) for f in frames):
        finding = "a segmentation whose frames have no place in the patient"
        raise FileFaultError("orientation", finding, "Expected one of a scan, not of a slide. Export it again.")
    if kind != "LABELMAP" and (odd := {f.segment for f in frames} - {*names}):
        finding = f"frames of a segment {sorted(map(str, odd))[0]} that it does not describe"
        raise FileFaultError("unreadable", finding, "Copy or export it again.")


def _pieces(path: Path, kind: str, names: dict[int, str], frames: Sequence[Frame], half: float) -> Iterator[Piece]:
    """The frames of all segments, as the file has them."""
    from pydicom.pixels.utils import iter_pixels

    arrays = iter_pixels(path, raw=True)
    for frame in frames:
        with naming_damage(f"damaged pixels in {path.name}"):
            array = np.asarray(next(arrays)).T[..., None]
        affine = plane_affine(frame)
        if kind == "LABELMAP":
            # A value of no segment is padding.
            for number in np.unique(array).tolist():
                if number in names:
                    yield Piece(name=names[number], mask=array == number, affine=affine)
            continue
        assert frame.segment is not None, "checked"
        mask = array >= half if kind == "FRACTIONAL" else array != 0
        yield Piece(name=names[frame.segment], mask=mask, affine=affine)


def plane_affine(frame: Frame) -> np.ndarray:
    """The affine of a single frame into RAS+, its third axis across the plane.

    Raises:
        FileFaultError: It has no plane.
    """
    affine = np.eye(4)
    row, column = np.array(frame.orientation[:3]), np.array(frame.orientation[3:])
    affine[:3, 0] = row * frame.spacing_mm[1]
    affine[:3, 1] = column * frame.spacing_mm[0]
    affine[:3, 2] = np.cross(row, column) * (frame.thickness_mm or 1.0)
    affine[:3, 3] = frame.position
    check_axes(affine)
    return lps_to_ras(affine)


def _stack(frames: Sequence[Frame], shape: tuple[int, int]) -> Grid:
    """The smallest grid that holds all frames, with the slices between them.

    Raises:
        FileFaultError: They are no slices of one stack.
    """
    first = plane_affine(frames[0])
    normal = np.cross(first[:3, 0], first[:3, 1])
    normal /= np.linalg.norm(normal)
    places = np.array([plane_affine(frame)[:3, 3] for frame in frames])
    heights = np.unique(np.round((places - places[0]) @ normal, 3))
    gap = float(np.diff(heights).min()) if len(heights) > 1 else (frames[0].thickness_mm or 1.0)
    step = np.median([f.thickness_mm for f in frames])
    # Where slices are left out, their distance is in the file; else it is the smallest there is.
    if step > 0 and _is_even(heights / step):
        gap = float(step)
    lowest = places[int(np.argmin((places - places[0]) @ normal))]
    aside = np.abs((places - lowest) - np.outer((places - lowest) @ normal, normal)).max()
    if not _is_even((heights - heights[0]) / gap) or aside > SAME_PLACE * min(frames[0].spacing_mm):
        remedy = "Give it as the label of its image, or export it again."
        raise FileFaultError("spacing", "a segmentation whose frames are no slices of one stack", remedy)
    affine = first.copy()
    affine[:3, 2], affine[:3, 3] = normal * gap, lowest
    return Grid(shape=(*shape, 1 + int(np.rint((heights[-1] - heights[0]) / gap))), affine=affine)


def _is_even(places: np.ndarray) -> bool:
    away = places - places[0]
    return bool((np.abs(away - np.rint(away)) < SAME_PLACE).all())
