"""One pass over an image file: its voxels as stored, its grid, a digest of its bytes, and what is wrong with it.

The analysis reads each file once, in pieces, and keeps the stored type, so that it needs the memory of the voxels
and little more. What a gzip checksum, the file's length and the header can tell is checked on the way.
"""

from __future__ import annotations

import hashlib
import io
import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from autoseg.data.volumes import SUFFIXES, Grid, spatial_and_channels, suffix_of
from autoseg.errors import DataError

PIECE = 1 << 20
"""Bytes read and inflated at a time: fits a core's cache."""
MOST_INFLATION = 1040
"""Deflate makes at most 1,032 bytes of one. Source: zlib's technical notes."""
SPACING_LIMITS_MM = (0.005, 50.0)
"""Voxel edges outside are taken for an error of units: finer than micro-CT, or thicker than any slice."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong with a file or a case, before it is known what the case is called."""

    kind: str
    finding: str
    remedy: str
    is_fault: bool = True
    """False: a warning."""
    file: int = -1
    """Which of the case's files: the image's number, or LABEL_FILE; -1: the case as a whole."""


class FileFaultError(Exception):
    """A file that cannot be analysed; never leaves the analyzer."""

    def __init__(self, kind: str, finding: str, remedy: str) -> None:
        self.found = Finding(kind, finding, remedy)
        super().__init__(finding)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredVolume:
    """A file's voxels as they are stored."""

    array: np.ndarray
    """(I, J, K, C) in stored orientation, stored type, native byte order, first axis fastest."""
    slope: float
    inter: float
    """Intensity = slope * stored + inter."""
    grid: Grid
    digest: str
    """Of the file's bytes."""
    warnings: tuple[Finding, ...]


def file_digest(path: Path) -> str:
    """Digest of a file's bytes, as `read_stored` gives it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()[:32]


class _Pieces:
    """A file's content, inflated where it is gzip, piece by piece; digests the bytes that it reads."""

    def __init__(self, file: BinaryIO, is_gzip: bool) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.rest = b""
        self._pieces = self._inflated() if is_gzip else self._raw()

    def _raw(self) -> Iterator[bytes]:
        while piece := self.file.read(PIECE):
            self.digest.update(piece)
            yield piece

    def _inflated(self) -> Iterator[bytes]:
        inflater = zlib.decompressobj(wbits=31)
        started = False
        for packed in self._raw():
            while packed:
                if inflater.eof:  # another gzip member, or padding with zeros
                    packed = packed.lstrip(b"\0")
                    if not packed:
                        break
                    inflater, started = zlib.decompressobj(wbits=31), False
                piece = inflater.decompress(packed, PIECE)
                started = True
                packed = inflater.unused_data if inflater.eof else inflater.unconsumed_tail
                if piece:
                    yield piece
        while started and not inflater.eof and (piece := inflater.decompress(inflater.unconsumed_tail, PIECE)):
            yield piece
        if not inflater.eof:
            raise EOFError("the gzip stream ends early")

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end."""
        while len(self.rest) < size and (piece := next(self._pieces, b"")):
            self.rest += piece
        piece, self.rest = self.rest[:size], self.rest[size:]
        return piece

    def read_into(self, buffer: np.ndarray) -> int:
        """Fill a uint8 buffer; the number of bytes filled."""
        done = 0
        piece = self.rest
        while piece and done < len(buffer):
            take = min(len(piece), len(buffer) - done)
            buffer[done : done + take] = np.frombuffer(piece, np.uint8, take)
            done += take
            piece = piece[take:] if take < len(piece) else next(self._pieces, b"") if done < len(buffer) else b""
        self.rest = piece
        return done

    def count_rest(self) -> int:
        """Read to the end, which verifies the checksum; the number of bytes."""
        count = len(self.rest)
        for piece in self._pieces:
            count += len(piece)
        return count


def read_stored(path: Path, free_bytes: int | None = None) -> StoredVolume:
    """Read a NIfTI file once.

    Args:
        free_bytes: memory the voxels may take; None: no limit.

    Raises:
        FileFaultError: Missing, unreadable, truncated, not 3D, without a usable grid, or too large.
    """
    if suffix_of(path) not in SUFFIXES:
        raise FileFaultError(
            "unreadable", f"unknown image format {path.suffix!r}", f"Convert it to one of {', '.join(SUFFIXES)}."
        )
    try:
        with open(path, "rb") as file:
            is_gzip = file.read(2) == b"\x1f\x8b"
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            return _read(path, _Pieces(file, is_gzip), size * (MOST_INFLATION if is_gzip else 1), free_bytes)
    except FileNotFoundError:
        raise FileFaultError("missing", "no such file", "Check the path in the datalist and dataroot.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise FileFaultError(
            "unreadable", f"the file ends early or is damaged ({_brief(error)})", "Copy or export it again."
        ) from None


def _read(path: Path, pieces: _Pieces, most_bytes: int, free_bytes: int | None) -> StoredVolume:
    header = _header(pieces)
    warnings: list[Finding] = []
    pixdim = np.array(header["pixdim"][1:4], np.float64)
    _mend(header, warnings)
    try:
        dtype = header.get_data_dtype()
        full_shape = tuple(int(s) for s in header.get_data_shape())
        offset = int(header.get_data_offset())
        slope, inter = header.get_slope_inter()
    except (HeaderDataError, ValueError, OverflowError) as error:
        raise FileFaultError("unreadable", f"a damaged NIfTI header ({_brief(error)})", "Export it again.") from None
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise FileFaultError("unreadable", f"voxels of type {dtype}", "Expected numbers. Export as int16 or float32.")
    shape, channels = _shape(path, full_shape)
    grid = _grid(header, pixdim, shape, warnings)
    num_bytes = int(np.prod(shape, dtype=np.float64)) * channels * dtype.itemsize
    if num_bytes > most_bytes:
        raise FileFaultError(
            "unreadable",
            f"the header promises {num_bytes} bytes of voxels, more than the file can hold",
            "Copy or export it again.",
        )
    if free_bytes is not None and num_bytes > free_bytes:
        raise FileFaultError(
            "too_large",
            f"its voxels take {num_bytes / 2**30:.1f} GiB and {free_bytes / 2**30:.1f} GiB of memory are free",
            "Analyse it on a machine with more memory, or crop it.",
        )
    pieces.read(max(0, offset - header.sizeof_hdr))
    buffer = np.empty(num_bytes, np.uint8)
    done = pieces.read_into(buffer)
    if done < num_bytes:
        raise FileFaultError(
            "unreadable", f"the file ends after {done} of {num_bytes} bytes of voxels", "Copy or export it again."
        )
    if extra := pieces.count_rest():
        warnings.append(
            Finding(
                "header",
                f"{extra} bytes follow the voxels that the header describes",
                "The header's size or type may be wrong; export it again if the image looks odd.",
                is_fault=False,
            )
        )
    array = np.ndarray((*shape, channels), dtype, buffer, order="F")
    if not dtype.isnative:
        array = array.byteswap(inplace=True).view(dtype.newbyteorder("="))
    return StoredVolume(
        array=array,
        slope=1.0 if slope is None else float(slope),
        inter=0.0 if inter is None else float(inter),
        grid=grid,
        digest=pieces.digest.hexdigest()[:32],
        warnings=tuple(warnings),
    )


def _header(pieces: _Pieces) -> nib.Nifti1Header:
    """The header, NIfTI-1 or NIfTI-2, as stored: nothing mended yet."""
    start = pieces.read(348)
    kind: type[nib.Nifti1Header] = nib.Nifti1Header
    if start[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c"):
        kind, start = nib.Nifti2Header, start + pieces.read(540 - 348)
    if len(start) < kind.sizeof_hdr:
        raise FileFaultError("unreadable", f"{len(start)} bytes are too few for a NIfTI header", "Export it again.")
    try:
        header = kind(start, check=False)
    except (HeaderDataError, ImageFileError, ValueError) as error:
        raise FileFaultError("unreadable", f"not a NIfTI file ({_brief(error)})", "Export it again.") from None
    if bytes(header["magic"])[:3] not in (b"n+1", b"n+2"):
        raise FileFaultError("unreadable", "not a NIfTI file (no magic string)", "Export it again.")
    return header


class _Notes(logging.Handler):
    """Keeps what nibabel says while it mends a header."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _mend(header: nib.Nifti1Header, warnings: list[Finding]) -> None:
    """Mend a header as `nibabel.load` does, so that every reader sees the same; what it mends is a warning.

    Voxel sizes of 0 are judged apart: with an sform they do not matter.
    """
    notes = _Notes()
    logger = logging.Logger("header")
    logger.addHandler(notes)
    try:
        header.check_fix(logger=logger)
    except HeaderDataError as error:
        raise FileFaultError("unreadable", f"a damaged NIfTI header ({_brief(error)})", "Export it again.") from None
    texts = [t for t in notes.texts if "pixdim[1,2,3]" not in t]
    if texts:
        remedy = "The image is read so. Export it again."
        warnings.append(Finding("header", f"a damaged NIfTI header: {'; '.join(texts)}", remedy, is_fault=False))


def _shape(path: Path, full_shape: tuple[int, ...]) -> tuple[tuple[int, int, int], int]:
    try:
        shape, channels = spatial_and_channels(path, full_shape)
    except DataError:
        raise FileFaultError(
            "not_3d",
            f"shape {full_shape} has {len(full_shape)} axes",
            "Expected a 3D volume, or 4D with channels last. Convert it.",
        ) from None
    if min(shape) == 1:
        raise FileFaultError(
            "not_3d", f"shape {shape} is a single slice", "Expected a volume. Stack the slices of a scan into one file."
        )
    return shape, channels


def _grid(header: nib.Nifti1Header, pixdim: np.ndarray, shape: tuple[int, int, int], warnings: list[Finding]) -> Grid:
    """The stored grid, and warnings where the header contradicts itself; `pixdim` as the file has it."""
    has_sform, has_qform = int(header["sform_code"]) > 0, int(header["qform_code"]) > 0
    if not has_sform and not (np.isfinite(pixdim).all() and (pixdim > 0).all()):
        raise FileFaultError("spacing", f"spacing of {_mm(pixdim)} mm", "Expected positive sizes. Export it again.")
    try:
        affine = np.asarray(header.get_best_affine(), np.float64)
    except (HeaderDataError, ValueError) as error:
        raise FileFaultError("unreadable", f"a damaged orientation ({_brief(error)})", "Export it again.") from None
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise FileFaultError("spacing", "an affine that is not invertible", "Expected a valid sform. Export it again.")
    grid = Grid(shape=shape, affine=affine)
    low, high = SPACING_LIMITS_MM
    if not all(low <= s <= high for s in grid.spacing_mm):
        raise FileFaultError(
            "spacing",
            f"spacing of {_mm(grid.spacing_mm)} mm",
            f"Expected {low:g} to {high:g} mm. Correct the units, or export it again.",
        )
    if not has_sform and not has_qform:
        remedy = "Left and right are guessed. Export it with an affine."
        warnings.append(Finding("orientation", "no orientation in the header", remedy, is_fault=False))
    elif not np.allclose(pixdim, grid.spacing_mm, rtol=1e-2):
        warnings.append(
            Finding(
                "header",
                f"voxel sizes {_mm(pixdim)} mm against {_mm(grid.spacing_mm)} mm in its affine",
                "The affine is used. Export it again if that is wrong.",
                is_fault=False,
            )
        )
    if (unit := int(header["xyzt_units"]) & 7) in (1, 3):
        warnings.append(
            Finding(
                "spacing",
                f"sizes in {'metres' if unit == 1 else 'micrometres'}",
                "They are read as mm, as everywhere. Export it again in mm.",
                is_fault=False,
            )
        )
    return grid


def _mm(values: np.ndarray | tuple[float, ...]) -> str:
    return "x".join(f"{v:.4g}" for v in values)


def _brief(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120] or type(error).__name__
