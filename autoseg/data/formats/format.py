"""What a format of image files is: a row of the table."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autoseg.data.formats.segmentation import Segmentation
from autoseg.data.formats.stored import Header, StoredSlices, StoredVolume
from autoseg.data.grid import Grid
from autoseg.data.segments import Segment


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelFile:
    """A label to be written."""

    grid: Grid
    """The image's own."""
    array: np.ndarray
    """(I, J, K) of an integer type, axes as the grid stores them; in memory, or mapped from a file. Of
    float32 for maps, which the plain formats take."""
    segments: tuple[Segment, ...] = ()
    """The classes, for formats that name them."""
    images: tuple[Path, ...] = ()
    """The files of the image that it was made from, for formats that refer to them."""

    def pieces(self) -> Iterator[memoryview]:
        """The voxels slice by slice, first axis running fastest; little-endian."""
        dtype = self.array.dtype.newbyteorder("<")
        for k in range(self.array.shape[2]):
            yield np.ascontiguousarray(self.array[:, :, k].T, dtype).data


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelWriter:
    """One way to write label files."""

    name: str
    """For `--format`."""
    suffixes: tuple[str, ...]
    """In lower case with the dot; the first is that of files that autoseg names itself."""
    write: Callable[[Path, LabelFile], None]
    """Write all of the file or nothing. Raises: DataError: the label cannot be said in this format."""
    check: Callable[[Sequence[Path]], None] | None = None
    """Given an image's files, refuse before any work what `write` cannot do. Raises: DataError: with the reason."""
    keeps_overlaps: bool = False
    """Whether a voxel can belong to several segments."""


SHORTEST_WORD = 3
"""Shorter words of names say nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where an image comes from."""

    modality: str
    """As the file has it, such as CT or MR; empty where it does not say."""
    patient: str
    """A digest that is equal for scans of one patient; empty where it is not known. To be compared only: numbers of
    patients can be guessed and tried, so that it is not written anywhere."""
    words: frozenset[str] = frozenset()
    """Digests of the words of the patient's name and number, to see whether names of files hold one."""


def word_digests(text: str) -> frozenset[str]:
    """A digest of each word of a text, whatever its case; short ones are left out."""
    words = (w for w in re.split(r"[\W_]+", text.casefold()) if len(w) >= SHORTEST_WORD)
    return frozenset(hashlib.sha256(word.encode()).hexdigest() for word in words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How files of a format are recognised, read and written.

    A function that cannot read a file raises `FileFaultError`, or lets OSError, EOFError, ValueError or zlib.error of
    the library below it pass: the table turns those into a message that the file is damaged.
    """

    name: str
    """For people."""
    suffixes: tuple[str, ...]
    """In lower case with the dot. An image of the format is looked for in folders by them."""
    recognise: Callable[[Path, bytes], bool]
    """(path, first bytes of the content, inflated where the whole file is gzip; none where the path is a folder) ->
    whether this is an image of the format. An image may be a folder, as a DICOM series is."""
    read_header: Callable[[Path], Header]
    """Read no voxel."""
    read: Callable[[Path], StoredVolume]
    """Read the voxels and check all that can be checked, checksums included."""
    read_with_digest: Callable[[Path, int | None], StoredVolume] | None = None
    """(path, memory the voxels may take) -> the voxels and a digest of the file's bytes in one pass, for the analysis.
    None: the file is read and then digested."""
    open_slices: Callable[[Path, ExitStack], StoredSlices] | None = None
    """Open a large file to read it slice by slice; what is open closes with the stack. None: such files are read
    whole."""
    segmentation: Callable[[Path], Segmentation | None] | None = None
    """The named segments of a label file; none where a file names none. None: no file of the format does."""
    origin: Callable[[Path], Origin] | None = None
    """Where an image comes from, as far as it says so. None: files of the format say nothing."""
    files: Callable[[Path], tuple[Path, ...]] | None = None
    """All files that an image consists of, for those that are named by the suffixes or are folders; together they are
    its content. None: always the one."""
    find: Callable[[Path], list[Path]] | None = None
    """The images of a folder that are not known by a suffix, in the order of their names: subfolders, or files of any
    name. None: there are none."""
    find_labels: Callable[[Path], list[Path]] | None = None
    """The same of segmentations, which are no images. None: there are none."""
    writers: tuple[LabelWriter, ...] = ()
    """How labels are written in this format, the usual way first; none: they are not."""
