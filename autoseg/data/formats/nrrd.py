"""NRRD: `.nrrd`, and `.nhdr` with the voxels in a file beside it.

The header is text: fields, then free keys. It is read here and not by a library, since pynrrd drops the letters of
names that are not ASCII and SimpleITK drops the voxels' file, which streaming and digests need.
Source: https://teem.sourceforge.net/nrrd/format.html
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autoseg.data.formats.format import Format
from autoseg.data.formats.nrrd_writer import NRRD_LABEL, SEG_NRRD
from autoseg.data.formats.raw import RawHeader, checked, read_voxels, readers
from autoseg.data.formats.segmentation import Colour, Piece, Segmentation, colour_of, colours_by_name
from autoseg.data.formats.stored import (
    FileFaultError,
    Finding,
    check_axes,
    lps_to_ras,
    named_voxels,
    no_numbers,
    odd_units,
    orientation_guessed,
    split_shape,
)
from autoseg.data.grid import Grid
from autoseg.workspace.files import open_regular

MOST_HEADER_BYTES = 1 << 24
"""A header is some kB; Slicer's, of hundreds of segments, some 100 kB."""
TYPES = {
    "i1": "signed char, int8, int8_t",
    "u1": "uchar, unsigned char, uint8, uint8_t",
    "i2": "short, short int, signed short, signed short int, int16, int16_t",
    "u2": "ushort, unsigned short, unsigned short int, uint16, uint16_t",
    "i4": "int, signed int, int32, int32_t",
    "u4": "uint, unsigned int, uint32, uint32_t",
    "i8": "longlong, long long, long long int, signed long long, signed long long int, int64, int64_t",
    "u8": "ulonglong, unsigned long long, unsigned long long int, uint64, uint64_t",
    "f4": "float",
    "f8": "double",
}
"""NumPy's name -> the format's names."""
TYPE_OF = {name: kind for kind, names in TYPES.items() for name in names.split(", ")}
SPACES = {
    "right-anterior-superior": (1, 1, 1),
    "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "las": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1),
    "lps": (-1, -1, 1),
}
"""World -> signs that make it RAS+; each may have `-time` or `t` at its end."""
ODD_KINDS = ("color", "complex", "matrix", "quaternion")
"""Parts of the kinds of axes whose samples are no channels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NrrdText:
    """A header's text."""

    fields: dict[str, str]
    """Names in lower case without blanks."""
    keys: dict[str, str]
    """Free keys, such as those of Slicer's segments."""
    num_bytes: int


def is_nrrd(path: Path, start: bytes) -> bool:
    """Whether a file begins as NRRD does."""
    return start.startswith(b"NRRD000")


def read_text(path: Path) -> NrrdText:
    """Read a header's lines.

    Raises:
        FileFaultError: It is no such header.
    """
    fields: dict[str, str] = {}
    keys: dict[str, str] = {}
    with open_regular(path) as file:
        if not file.readline(16).startswith(b"NRRD"):
            raise _damaged("no magic word")
        while (raw := file.readline(MOST_HEADER_BYTES)) and (line := raw.decode(errors="replace").rstrip()):
            if file.tell() > MOST_HEADER_BYTES:
                raise _damaged("its end is missing")
            if line.startswith("#"):
                continue
            name, colon, value = line.partition(":")
            if not colon:
                raise _damaged(f"{line[:40]!r} is no field")
            if value.startswith("="):
                keys[name] = value[1:].replace("\\n", "\n")
            else:
                fields[name.lower().replace(" ", "")] = value.strip()
        return NrrdText(fields=fields, keys=keys, num_bytes=file.tell())


def _damaged(why: str) -> FileFaultError:
    return FileFaultError("unreadable", f"a damaged NRRD header ({why})", "Export it again.")


def read_header(path: Path) -> RawHeader:
    """Read and judge a header.

    Raises:
        FileFaultError: Damaged, not 3D, no numbers, without a usable grid, or voxels that are stored in another way.
    """
    text = read_text(path)
    fields = text.fields
    if lost := [name for name in ("type", "dimension", "sizes", "encoding") if name not in fields]:
        raise _damaged(f"no {lost[0]}")
    sizes = [int(word) for word in fields["sizes"].split()]
    if int(fields["dimension"]) != len(sizes):
        raise _damaged(f"dimension {fields['dimension']} and {len(sizes)} sizes")
    dtype = _dtype(fields)
    warnings: list[Finding] = []
    space_axes, affine = _geometry(fields, sizes, warnings)
    channel_axes = [axis for axis in range(len(sizes)) if axis not in space_axes]
    full_shape = (*(sizes[axis] for axis in space_axes), *(sizes[axis] for axis in channel_axes))
    shape, num_channels = split_shape(full_shape)
    if any(space_axes[0] < axis < space_axes[2] for axis in channel_axes):
        raise FileFaultError("not_3d", "its channels lie between the axes of space", "Put them first or last.")
    place = _place(path, text, math.prod(sizes) * dtype.itemsize)
    header = RawHeader(
        grid=Grid(shape=shape, affine=affine),
        num_channels=num_channels,
        dtype=dtype,
        warnings=tuple(warnings),
        channels_first=num_channels > 1 and any(axis < space_axes[0] and sizes[axis] > 1 for axis in channel_axes),
        voxel_file=place.voxel_file,
        start=place.start,
        offset=place.offset,
        is_packed=place.is_packed,
    )
    return checked(path, header)


def _dtype(fields: dict[str, str]) -> np.dtype:
    """The type of the voxels."""
    kind = TYPE_OF.get(fields["type"].lower())
    if kind is None:
        raise no_numbers(fields["type"])
    endian = fields.get("endian", "").lower()
    if kind[1] != "1" and endian not in ("little", "big"):
        raise _damaged("no endian")
    return np.dtype((">" if endian == "big" else "<") + kind)


def _geometry(
    fields: dict[str, str], sizes: list[int], warnings: list[Finding]
) -> tuple[tuple[int, int, int], np.ndarray]:
    """The three axes of space, and the affine into RAS+."""
    directions = _directions(fields, len(sizes))
    axes = _space_axes(fields, directions, len(sizes))
    affine = np.eye(4)
    if directions is not None:
        affine[:3, :3] = np.array([_spatial(directions[axis]) for axis in axes]).T
        origins = _vectors(fields.get("spaceorigin", "(0,0,0)"))
        affine[:3, 3] = _spatial(origins[0] if origins else None)
    else:
        spacings = [float(word) for word in fields.get("spacings", "nan " * len(sizes)).split()]
        if len(spacings) != len(sizes) or not all(np.isfinite(spacings[axis]) for axis in axes):
            raise FileFaultError("spacing", "no spacing in the header", "Export it again with one.")
        affine[:3, :3] = np.diag([spacings[axis] for axis in axes])
    check_axes(affine)
    space = fields.get("space", "").lower()
    signs = SPACES.get(space.removesuffix("-time")) or SPACES.get(space.removesuffix("t"))
    if signs is None or directions is None:
        warnings.append(orientation_guessed())
    if units := {u.lower() for u in re.findall(r'"([^"]*)"', fields.get("spaceunits", ""))} & {"m", "cm", "um", "nm"}:
        warnings.append(odd_units(sorted(units)[0]))
    # Where the world is not named it is taken for LPS, as ITK does.
    return axes, (lps_to_ras(affine) if signs is None else np.diag([*signs, 1]) @ affine)


def _directions(fields: dict[str, str], num_axes: int) -> list[list[float] | None] | None:
    """The direction of each axis, None for one that is not in space; None where the header has no directions."""
    if "spacedirections" not in fields:
        return None
    directions = _vectors(fields["spacedirections"])
    if len(directions) != num_axes:
        raise _damaged(f"{len(directions)} space directions and {num_axes} axes")
    return directions


def _space_axes(
    fields: dict[str, str], directions: list[list[float] | None] | None, num_axes: int
) -> tuple[int, int, int]:
    """Which axes are those of space; the others are channels."""
    kinds = fields.get("kinds", "").lower().split()
    kinds = kinds if len(kinds) == num_axes else ["???"] * num_axes
    for kind in kinds:
        if any(odd in kind for odd in ODD_KINDS):
            raise no_numbers(kind)
    if directions is not None:
        # A vector along time alone is no direction in space.
        axes = [axis for axis, vector in enumerate(directions) if vector is not None and any(vector[:3])]
    else:
        axes = [axis for axis, kind in enumerate(kinds) if kind in ("domain", "space", "???")][:3]
    if len(axes) != 3:
        raise FileFaultError("not_3d", f"{len(axes)} axes of space", "Expected a 3D volume, or 4D. Convert it.")
    return axes[0], axes[1], axes[2]


def _vectors(text: str) -> list[list[float] | None]:
    """`(1,0,0) none (0,1,0)`."""
    return [
        [float(word) for word in match[1].split(",")] if match[1] is not None else None
        for match in re.finditer(r"none|\(([^)]*)\)", text)
    ]


def _spatial(vector: list[float] | None) -> list[float]:
    if vector is None or len(vector) not in (3, 4):
        raise _damaged("a vector that does not have three numbers")
    return vector[:3]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where the voxels are; see `RawHeader`."""

    voxel_file: Path | None
    start: int
    offset: int
    is_packed: bool


def _place(path: Path, text: NrrdText, num_bytes: int) -> _Place:
    """Find the voxels of a header; `num_bytes`: their size."""
    fields = text.fields
    encoding = fields["encoding"].lower()
    if encoding not in ("raw", "gzip", "gz"):
        raise FileFaultError("unreadable", f"voxels stored as {encoding}", "Save it as raw or gzip.")
    is_packed = encoding != "raw"
    name = fields.get("datafile")
    voxel_file = None if name is None else named_voxels(path, name)
    start = 0 if name is not None else text.num_bytes
    with open_regular(voxel_file or path) as file:
        file.seek(start)
        for _ in range(min(int(fields.get("lineskip", 0)), 1 << 16)):
            start += len(file.readline(1 << 20))
    skip = int(fields.get("byteskip", 0))
    if skip == -1 and not is_packed:  # the voxels end with the file
        start, skip = max(start, (voxel_file or path).stat().st_size - num_bytes), 0
    if skip < 0:
        raise _damaged(f"byte skip {skip}")
    return _Place(voxel_file=voxel_file, start=start, offset=skip, is_packed=is_packed)


def files(path: Path) -> tuple[Path, ...]:
    """The header's file, and that of the voxels where it is another."""
    name = read_text(path).fields.get("datafile")
    return (path,) if name is None else (path, path.parent / name)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Segment:
    """A segment as Slicer names it: voxels of a value in a layer."""

    name: str
    value: int
    layer: int
    colour: Colour | None


def _segments(keys: dict[str, str]) -> list[_Segment]:
    """The segments that a header names."""
    segments = []
    for key, name in keys.items():
        if (match := re.fullmatch(r"(Segment\d+)_Name", key)) is not None:
            value, layer = (int(keys.get(f"{match[1]}_{field}", usual)) for field, usual in _USUAL)
            if value != 0:  # which is background
                colour = _colour(keys.get(f"{match[1]}_Color", ""))
                segments.append(_Segment(name=name.strip() or match[1], value=value, layer=layer, colour=colour))
    return segments


def _colour(text: str) -> Colour | None:
    """A colour of three shares of 1; None where there is none."""
    try:
        red, green, blue = (255 * float(word) for word in text.split())
    except ValueError:
        return None
    return colour_of(red, green, blue)


_USUAL = (("LabelValue", 1), ("Layer", 0))
"""What Slicer leaves out."""


def segmentation(path: Path) -> Segmentation | None:
    """The segments in a file of 3D Slicer; None where the header names none.

    Source: https://apidocs.slicer.org/main/classvtkMRMLSegmentationStorageNode.html

    Raises:
        FileFaultError: The header is damaged, or segments lie in layers that the file does not have.
    """
    segments = _segments(read_text(path).keys)
    if not segments:
        return None
    header = read_header(path)
    if max(s.layer for s in segments) >= header.num_channels or min(s.layer for s in segments) < 0:
        raise _damaged(f"segments in more than {header.num_channels} layers")
    numbers: dict[str, int] = {}
    for segment in segments:
        numbers.setdefault(segment.name, segment.value)
    places = {(s.layer, s.value) for s in segments}
    one_each = len(places) == len(segments) == len(numbers)

    def pieces(grid: Grid) -> Iterator[Piece]:
        volume = read_voxels(path, header)
        for segment in segments:
            mask = volume.array[..., segment.layer] == segment.value
            yield Piece(name=segment.name, mask=mask, affine=volume.grid.affine)

    return Segmentation(
        numbers=numbers,
        is_label_map=header.num_channels == 1 and one_each,
        pieces=pieces,
        grid=lambda: header.grid,
        warnings=header.warnings,
        colours=colours_by_name((s.name, s.colour) for s in segments),
    )


NRRD = Format(
    name="NRRD",
    suffixes=(".seg.nrrd", ".nrrd", ".nhdr"),
    recognise=is_nrrd,
    **readers(read_header),
    segmentation=segmentation,
    files=files,
    writers=(NRRD_LABEL, SEG_NRRD),
)
