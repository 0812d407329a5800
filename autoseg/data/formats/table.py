"""The table of image formats, and the one way to a file through it: its content decides, then its suffix.

Every reader of images and labels comes through here, so that what the analysis accepts, training and prediction
accept, too.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from autoseg.data.formats.analyze import ANALYZE
from autoseg.data.formats.content import GZIP
from autoseg.data.formats.dicom import DICOM
from autoseg.data.formats.format import Format, LabelFile, LabelWriter, Origin
from autoseg.data.formats.metaimage import METAIMAGE
from autoseg.data.formats.mgh import MGH
from autoseg.data.formats.nifti import NIFTI
from autoseg.data.formats.nrrd import NRRD
from autoseg.data.formats.stored import FileFaultError, Header, StoredSlices, StoredVolume, brief, check_room
from autoseg.data.grid import Grid
from autoseg.errors import DataError, some_of
from autoseg.workspace.digests import FileSignature, content_digest, file_signature
from autoseg.workspace.files import SpecialFileError, open_regular

logger = logging.getLogger(__name__)

FORMATS: tuple[Format, ...] = (NIFTI, NRRD, METAIMAGE, MGH, ANALYZE, DICOM)
"""Asked in this order whether they recognise a file."""
SUFFIXES = tuple(suffix for row in FORMATS for suffix in row.suffixes)
"""Of the files that are taken for images in a folder."""
WRITERS: dict[str, LabelWriter] = {writer.name: writer for row in FORMATS for writer in row.writers}
"""The ways to write label files, by name."""
LABEL_SUFFIXES = tuple(dict.fromkeys(suffix for writer in WRITERS.values() for suffix in writer.suffixes))
"""Of the label files that can be written."""
_SHORTEST = tuple(s for s in SUFFIXES if not any(s != other and s.endswith(other) for other in SUFFIXES))
SUFFIXES_TEXT = ", ".join(_SHORTEST)
PATTERNS_TEXT = ", ".join(f"*{suffix}" for suffix in _SHORTEST) + ", or folders of DICOM files"
LABEL_SUFFIX = LABEL_SUFFIXES[0]
"""Of the label files that autoseg names itself."""

SIDE_SUFFIXES = (
    *(".json", ".txt", ".csv", ".tsv", ".md", ".xml", ".yaml", ".yml", ".html", ".log", ".bval", ".bvec"),
    *(".preview.png", "dicomdir"),
)
"""Of files that often lie beside images; a DICOMDIR has no suffix but its name."""
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
"""Of files of 2D pictures."""
ON_PICTURES = (
    "autoseg reads medical formats: put the slices of a scan into one file, e.g. with 3D Slicer, or write each picture "
    "as a NIfTI file of one slice."
)
MOST_NAMES = 5
"""Files that a warning names."""
START_BYTES = 1024
"""Of the content that a format is recognised by."""


# -- names


def suffix_of(path: Path) -> str:
    """The suffix of an image file in lower case, `.nii.gz` as one piece; of another file what follows the last dot.

    A number is no suffix: files and folders of DICOM are often called by UIDs such as 1.2.840.10008.
    """
    name = path.name.lower()
    other = path.suffix.lower()
    return max((s for s in SUFFIXES if name.endswith(s)), key=len, default="" if other[1:].isdecimal() else other)


def stem_of(path: Path) -> str:
    """The file's name without its image suffix."""
    return path.name[: len(path.name) - len(suffix_of(path))]


def has_image_suffix(path: Path) -> bool:
    """Whether a path is named like an image; hidden files (macOS's `._` files) are not."""
    return suffix_of(path) in SUFFIXES and not path.name.startswith(".")


def is_image(path: Path) -> bool:
    """Whether a format knows the content or the suffix of a path, which may be a folder. Raises: OSError."""
    try:
        format_of(path)
    except FileFaultError:
        return False
    return True


def tell_left_out(folder: Path, images: Iterable[Path]) -> None:
    """Warn of files of a folder that are neither images nor parts of one, nor notes beside them."""
    parts = {part for image in images for part in (image, *files_of(image))}
    others = (p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".") and p not in parts)
    names = sorted(p.name for p in others if not p.name.lower().endswith(SIDE_SUFFIXES))
    if names:
        words = some_of(names, MOST_NAMES)
        logger.warning("%s: left out, of no format that is read: %s. Read are %s.", folder, words, PATTERNS_TEXT)


def image_files(folder: Path, *, deep: bool = False) -> list[Path]:
    """The images of a folder in the order of their names, hidden ones left out.

    A subfolder that is an image, as a DICOM series is, is among them; the folder itself, where it is one.

    Args:
        deep: search subfolders, too.
    """
    named = [p for p in (folder.rglob("*") if deep else folder.iterdir()) if has_image_suffix(p)]
    return sorted({*named, *(path for row in FORMATS if row.find is not None for path in row.find(folder))})


def pictures_instead(folder: Path) -> str:
    """Say what works where a folder holds 2D pictures in place of volumes; empty where it holds none."""
    pictures = [p for p in folder.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES and not p.name.startswith(".")]
    if not pictures or image_files(folder, deep=True):
        return ""
    kinds = ", ".join(sorted({p.suffix.lower() for p in pictures}))
    return f" It holds 2D pictures ({len(pictures)} {kinds}). {ON_PICTURES}"


# -- identity


def files_of(path: Path) -> tuple[Path, ...]:
    """All files that an image or a folder of masks consists of; the path alone where they cannot be told."""
    row = next((row for row in FORMATS if suffix_of(path) in row.suffixes), None)
    try:
        row = row or format_of(path)
        return (path,) if row.files is None else row.files(path)
    except (DataError, OSError, ValueError):
        if path.is_dir() and (masks := image_files(path, deep=True)):
            return tuple(part for mask in masks for part in files_of(mask))
        return (path,)  # it is damaged, as reading it will say


def image_digest(path: Path) -> str:
    """The digest of what an image's files hold, 32 hexadecimal digits. Raises: OSError: one cannot be read."""
    return content_digest(*files_of(path))


def image_signature(path: Path) -> FileSignature:
    """What tells without reading that an image's files are untouched. Raises: OSError."""
    return file_signature(*files_of(path))


# -- reading


def format_of(path: Path) -> Format:
    """The format of an image: the one that recognises its content, else the one of its suffix.

    Raises:
        FileFaultError: No format knows it.
        OSError: It cannot be opened.
    """
    start = _start_of(path)
    by_content = (row for row in FORMATS if row.recognise(path, start))
    by_suffix = (row for row in FORMATS if suffix_of(path) in row.suffixes)
    if (kind := next(by_content, None) or next(by_suffix, None)) is None:
        if suffix_of(path) in PICTURE_SUFFIXES:
            raise FileFaultError("not_3d", f"a 2D picture ({suffix_of(path)})", ON_PICTURES)
        raise FileFaultError(
            "unreadable",
            "a folder without DICOM files" if path.is_dir() else f"unknown image format {path.suffix!r}",
            f"Expected one of {SUFFIXES_TEXT}, or DICOM. Convert it.",
        )
    return kind


def _start_of(path: Path) -> bytes:
    """The first bytes of a file's content, as far as they can be had; none of a folder."""
    try:
        with open_regular(path) as file:
            start = file.read(START_BYTES)
    except IsADirectoryError:
        return b""
    if not start.startswith(GZIP):
        return start
    try:
        return zlib.decompressobj(wbits=31).decompress(start, START_BYTES)
    except zlib.error:
        return start


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say what is wrong with a file that cannot be read.

    Raises:
        FileFaultError: It cannot; the message names the file.
    """
    try:
        yield
    except FileFaultError as error:
        fault = error.fault
        raise FileFaultError(fault.kind, fault.finding, fault.remedy, path=path) from error
    except FileNotFoundError as error:
        remedy = "Check the path in the datalist and dataroot."
        raise FileFaultError("missing", "no such file", remedy, path=path) from error
    except SpecialFileError as error:
        remedy = "Give the path of an image file."
        raise FileFaultError("unreadable", str(error.strerror), remedy, path=path) from error
    except (OSError, EOFError, ValueError, OverflowError, zlib.error) as error:
        finding = f"the file ends early or is damaged ({brief(error)})"
        raise FileFaultError("unreadable", finding, "Copy or export it again.", path=path) from error


def read_header(path: Path) -> Header:
    """Read what a file says of itself, no voxel.

    Raises:
        FileFaultError: Missing, of no known format, damaged, not 3D, or without a usable grid.
    """
    with reading(path):
        return format_of(path).read_header(path)


def read_grid(path: Path) -> tuple[Grid, int]:
    """The grid as stored and the number of channels, from the header alone.

    Raises:
        FileFaultError: As `read_header`.
    """
    header = read_header(path)
    return header.grid, header.num_channels


def read_stored_volume(path: Path, *, free_bytes: int | None = None, with_digest: bool = False) -> StoredVolume:
    """Read a file's voxels as they are stored, all of the file checked.

    Args:
        free_bytes: memory the voxels may take; None: no limit.
        with_digest: also of the file's bytes.

    Raises:
        FileFaultError: As `read_header`; too large; or the voxels or their checksum are damaged.
    """
    with reading(path):
        row = format_of(path)
        if with_digest and row.read_with_digest is not None:
            return row.read_with_digest(path, free_bytes)
        if free_bytes is not None:
            check_room(row.read_header(path), free_bytes)
        volume = row.read(path)
        return replace(volume, digest=image_digest(path)) if with_digest else volume


def origin_of(path: Path) -> Origin:
    """Where an image comes from; empty where its format does not say, or it cannot be read."""
    try:
        row = format_of(path)
        return row.origin(path) if row.origin is not None else Origin(modality="", patient="")
    except (DataError, OSError, ValueError):
        return Origin(modality="", patient="")  # as reading it will say


def can_stream(path: Path) -> bool:
    """Whether the slices of a file can be read one after the other.

    Raises:
        FileFaultError: Missing, or of no known format.
    """
    with reading(path):
        return format_of(path).open_slices is not None


def open_slices(path: Path, stack: ExitStack) -> StoredSlices:
    """Open a file to read it slice by slice; it closes with the stack.

    Raises:
        FileFaultError: As `read_stored_volume`.
        ResourceError: There is no room to unpack it.
    """
    with reading(path):
        row = format_of(path)
        assert row.open_slices is not None, "asked for by `can_stream`"
        return row.open_slices(path, stack)


# -- writing


def label_suffix(path: Path) -> str:
    """The suffix of a label file that can be written, the longest that fits; empty where there is none."""
    name = path.name.lower()
    return max((s for s in LABEL_SUFFIXES if name.endswith(s)), key=len, default="")


def writer_of(path: Path, name: str | None = None) -> LabelWriter:
    """How a label file is written.

    Args:
        path: of the file.
        name: of the writer; None: as the suffix says.

    Raises:
        DataError: No label is written in a format of this suffix, or not by the named writer.
    """
    named = [WRITERS[name]] if name is not None else [*WRITERS.values()]
    suffix = label_suffix(path)
    if (writer := next((writer for writer in named if suffix in writer.suffixes), None)) is None:
        expected = ", ".join(dict.fromkeys(suffix for writer in named for suffix in writer.suffixes))
        what = f"as {suffix_of(path) or 'a file without suffix'}"
        how = f" in the format {name}" if name is not None else ""
        raise DataError(f"{path}: label files are not written {what}{how}. Expected one of {expected}.")
    return writer


def usual_writer(path: Path) -> LabelWriter:
    """How the label of an image is written where nobody says: in the image's own format, or else as NIfTI."""
    try:
        writers = format_of(path).writers
    except (DataError, OSError):
        writers = ()  # as reading it will say
    return writers[0] if writers else WRITERS["nifti"]


def write_label(path: Path, label: LabelFile, writer: LabelWriter | None = None) -> None:
    """Write a label file; all of it or nothing.

    Args:
        path: of the file.
        label: what is written.
        writer: None: as the suffix says.

    Raises:
        DataError: As `writer_of`; or the label cannot be said in this format.
    """
    (writer or writer_of(path)).write(path, label)
