"""MetaImage: `.mha`, and `.mhd` with the voxels in a file beside it.

The header is text, `Key = value` a line. The world is LPS, as ITK writes and reads it.
Source: https://itk.org/Wiki/ITK/MetaIO/Documentation, MetaIO's metaImage.cxx
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np

from autoseg.data.formats.format import Format, LabelFile, LabelWriter
from autoseg.data.formats.raw import RawHeader, checked, readers
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
from autoseg.workspace.files import open_regular, write_atomic

MOST_HEADER_BYTES = 1 << 20
TYPES = {
    "MET_CHAR": "i1",
    "MET_ASCII_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
"""MetaIO's names -> NumPy's; its long has 4 bytes. Source: MET_ValueTypeSize in metaTypes.h"""
FIRST_KEYS = (b"ObjectType", b"NDims", b"Comment", b"ObjectSubType", b"TransformType")
"""What a header begins with."""


def is_metaimage(path: Path, start: bytes) -> bool:
    """Whether a file begins as MetaImage does."""
    line = start.split(b"\n", 1)[0]
    return line.startswith(FIRST_KEYS) and b"=" in line and b"NDims" in start


def read_text(path: Path) -> tuple[dict[str, str], int]:
    """Read a header's lines: its keys, and the number of bytes.

    Raises:
        FileFaultError: It is no such header.
    """
    keys: dict[str, str] = {}
    with open_regular(path) as file:
        while raw := file.readline(MOST_HEADER_BYTES):
            key, equals, value = raw.decode("latin-1").partition("=")
            if not equals or file.tell() > MOST_HEADER_BYTES:
                break
            keys[key.strip()] = value.strip()
            if key.strip() == "ElementDataFile":  # the last one
                return keys, file.tell()
    raise _damaged("no ElementDataFile")


def _damaged(why: str) -> FileFaultError:
    return FileFaultError("unreadable", f"a damaged MetaImage header ({why})", "Export it again.")


def read_header(path: Path) -> RawHeader:
    """Read and judge a header.

    Raises:
        FileFaultError: Damaged, not 3D, no numbers, without a usable grid, or voxels that are stored in another way.
    """
    keys, num_bytes = read_text(path)
    if lost := [key for key in ("NDims", "DimSize", "ElementType") if key not in keys]:
        raise _damaged(f"no {lost[0]}")
    sizes = [int(word) for word in keys["DimSize"].split()]
    if int(keys["NDims"]) != len(sizes):
        raise _damaged(f"NDims {keys['NDims']} and {len(sizes)} sizes")
    shape, num_volumes = split_shape(tuple(sizes))
    num_components = int(keys.get("ElementNumberOfChannels", 1))
    if num_components < 1 or min(num_components, num_volumes) > 1:
        what = f"{num_components} components and {num_volumes} volumes"
        raise FileFaultError("not_3d", what, "Expected a volume, with channels at most. Convert it.")
    kind = TYPES.get(keys["ElementType"])
    if kind is None:
        raise no_numbers(keys["ElementType"])
    is_big = _flag(keys, "BinaryDataByteOrderMSB") or _flag(keys, "ElementByteOrderMSB")
    dtype = np.dtype((">" if is_big else "<") + kind)
    warnings: list[Finding] = []
    affine = _affine(keys, len(sizes), warnings)
    voxel_file, start = _place(
        path, keys, num_bytes, int(np.prod(sizes, dtype=object)) * num_components * dtype.itemsize
    )
    header = RawHeader(
        grid=Grid(shape=shape, affine=affine),
        num_channels=max(num_components, num_volumes),
        dtype=dtype,
        warnings=tuple(warnings),
        channels_first=num_components > 1,
        voxel_file=voxel_file,
        start=start,
        offset=0,
        is_packed=_flag(keys, "CompressedData"),
        # Of packed voxels MetaIO may write more than it counts.
        has_tail=_flag(keys, "CompressedData"),
    )
    return checked(path, header)


def _flag(keys: dict[str, str], key: str) -> bool:
    return keys.get(key, "").lower() in ("true", "1")


def _numbers(keys: dict[str, str], *names: str) -> list[float] | None:
    """The numbers of the first of some keys that is there."""
    text = next((keys[name] for name in names if name in keys), None)
    return None if text is None else [float(word) for word in text.split()]


def _affine(keys: dict[str, str], num_axes: int, warnings: list[Finding]) -> np.ndarray:
    """The affine into RAS+ of the first three axes."""
    spacing = _numbers(keys, "ElementSpacing", "ElementSize")
    offset = _numbers(keys, "Offset", "Position", "Origin")
    matrix = _numbers(keys, "TransformMatrix", "Rotation", "Orientation")
    if spacing is None:
        raise FileFaultError("spacing", "no spacing in the header", "Export it again with one.")
    if matrix is None:
        warnings.append(orientation_guessed())
        matrix = np.eye(num_axes).ravel().tolist()
    offset = offset if offset is not None else [0.0] * num_axes
    if (len(spacing), len(offset), len(matrix)) != (num_axes, num_axes, num_axes**2):
        raise _damaged("spacing, offset and matrix do not fit the number of axes")
    affine = np.eye(4)
    # A row of the matrix is the direction of an axis.
    affine[:3, :3] = np.array(matrix).reshape(num_axes, num_axes)[:3, :3].T * spacing[:3]
    affine[:3, 3] = offset[:3]
    check_axes(affine)
    if (unit := keys.get("DistanceUnits", "mm").lower()) in ("m", "cm", "um", "nm"):
        warnings.append(odd_units(unit))
    return lps_to_ras(affine)


def _place(path: Path, keys: dict[str, str], header_bytes: int, num_bytes: int) -> tuple[Path | None, int]:
    """The file of the voxels, None where it is the header's, and where in it they begin; `num_bytes`: their size."""
    if keys.get("BinaryData", "True").lower() not in ("true", "1"):
        raise FileFaultError("unreadable", "voxels stored as text", "Save it with binary voxels.")
    name = keys["ElementDataFile"]
    is_local = name.upper() == "LOCAL"  # as `files` has it
    voxel_file = None if is_local else named_voxels(path, name)
    skip = int(keys.get("HeaderSize", 0))
    if skip < -1:
        raise _damaged(f"HeaderSize {skip}")
    if skip == -1 and not _flag(keys, "CompressedData"):  # the voxels end with the file
        return voxel_file, max(0, (voxel_file or path).stat().st_size - num_bytes)
    return voxel_file, header_bytes if is_local else max(0, skip)


def files(path: Path) -> tuple[Path, ...]:
    """The header's file, and that of the voxels where it is another."""
    name = read_text(path)[0]["ElementDataFile"]
    return (path,) if name.upper() == "LOCAL" else (path, path.parent / name)


def write_mha(path: Path, label: LabelFile) -> None:
    """Write a label file: packed, with the voxels in the same file. Source: as ITK's writer has the header."""
    affine = lps_to_ras(label.grid.affine)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    kinds = {"u1": "MET_UCHAR", "u2": "MET_USHORT", "u4": "MET_UINT", "f4": "MET_FLOAT"}
    pack = zlib.compressobj(1)
    packed = [*map(pack.compress, label.pieces()), pack.flush()]
    lines = (
        *("ObjectType = Image", "NDims = 3", "BinaryData = True", "BinaryDataByteOrderMSB = False"),
        *("CompressedData = True", f"CompressedDataSize = {sum(map(len, packed))}"),
        f"TransformMatrix = {_text((affine[:3, :3] / spacing).T.ravel())}",
        f"Offset = {_text(affine[:3, 3])}",
        f"ElementSpacing = {_text(spacing)}",
        f"DimSize = {' '.join(map(str, label.grid.shape))}",
        f"ElementType = {kinds[label.array.dtype.str[1:]]}",
        "ElementDataFile = LOCAL",
    )
    head = "".join(f"{line}\n" for line in lines).encode()
    write_atomic(path, lambda file: file.writelines((head, *packed)))


def _text(numbers: np.ndarray) -> str:
    return " ".join(repr(float(number)) for number in numbers)


METAIMAGE = Format(
    name="MetaImage",
    suffixes=(".mha", ".mhd"),
    recognise=is_metaimage,
    **readers(read_header),
    files=files,
    writers=(LabelWriter(name="mha", suffixes=(".mha",), write=write_mha),),
)
