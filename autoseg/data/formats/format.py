"""What a format of image files is: a row of the table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autoseg.data.formats.stored import Header, StoredSlices, StoredVolume
from autoseg.data.grid import Grid


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
    value_names: Callable[[Path], dict[int, str]] | None = None
    """What a file calls the values of a label, as far as it names them. None: files of the format name none."""
    files: Callable[[Path], tuple[Path, ...]] | None = None
    """All files that an image consists of, for those that are named by the suffixes or are folders; together they are
    its content. None: always the one."""
    find: Callable[[Path], list[Path]] | None = None
    """The images of a folder that are not known by a suffix, in the order of their names: subfolders, or files of any
    name. None: there are none."""
    write: Callable[[Path, Grid, np.dtype, Iterable[bytes | memoryview]], None] | None = None
    """Write a label file from its voxels in pieces, first stored axis running fastest; all of the file or nothing.
    None: no label is written in this format."""
