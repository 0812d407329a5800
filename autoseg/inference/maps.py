"""Maps beside a label file: each class' probability, and how uncertain each voxel is, on the image's own grid.

Slabs are written where they belong as they pass by, into temporary files on disk, so that memory does not grow with
the image or the number of classes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch

from autoseg.data.formats.format import LabelWriter
from autoseg.data.formats.table import WRITERS, label_suffix
from autoseg.data.grid import Grid
from autoseg.data.labels import LabelMap
from autoseg.data.preprocess import Region
from autoseg.data.streams import LabelRows

PLAIN = {"seg.nrrd": "nrrd"}
"""Format of label files that name segments -> the one of maps."""
MAP_FORMATS = ("nifti", "nrrd", "mha")
"""Others, which hold segments alone, have maps as NIfTI."""


def map_writer(writer: LabelWriter) -> LabelWriter:
    """How maps are written beside label files of a format."""
    name = PLAIN.get(writer.name, writer.name)
    return WRITERS[name if name in MAP_FORMATS else "nifti"]


def maps_folder(target: Path) -> Path:
    """The folder of the maps of a label file: CASE.maps beside it."""
    return target.with_name(f"{target.name[: -len(label_suffix(target))]}.maps")


def map_names(classes: Sequence[str]) -> list[str]:
    """A name for the file of each class, without its suffix: of letters, digits and `_.+-`, each another."""
    names: list[str] = []
    for number, name in enumerate(classes, 1):
        plain = f"probability_{re.sub(r'[^A-Za-z0-9_.+-]+', '_', name)}"
        taken = {other.casefold() for other in names}
        names.append(f"{plain}_{number}" if plain.casefold() in taken else plain)
    return names


def entropy(probs: torch.Tensor, *, independent: bool) -> torch.Tensor:
    """How uncertain voxels are, 0 to 1.

    Args:
        probs: (K, ...) in 0..1.
        independent: regions that may overlap: that of the most uncertain one; else the entropy over all outputs, as a
            share of the most that it can be.
    """

    def term(p: torch.Tensor) -> torch.Tensor:
        return -torch.special.xlogy(p, p)

    if independent:
        return ((term(probs) + term(1 - probs)) / math.log(2)).amax(0).clamp_(0, 1)
    return (term(probs).sum(0) / math.log(len(probs))).clamp_(0, 1)


class MapFiles:
    """The maps of one image while its slabs pass by; a context manager that leaves whole files, or none."""

    def __init__(
        self,
        target: Path,
        grid: Grid,
        label_map: LabelMap,
        writer: LabelWriter,
        *,
        probabilities: bool,
        uncertainty: bool,
    ) -> None:
        """Name the files.

        Args:
            target: the label file.
            grid: of the image's file.
            label_map: the networks' classes.
            writer: of the label file.
            probabilities, uncertainty: which maps.
        """
        writer = map_writer(writer)
        folder, names = maps_folder(target), []
        if probabilities:
            names += map_names(label_map.names)
        if uncertainty:
            names.append("uncertainty")
        self._first = 0 if label_map.sigmoid else 1
        self._num = len(label_map.names) if probabilities else 0
        self._independent, self._wants_entropy = label_map.sigmoid, uncertainty
        self._files = [
            LabelRows(folder / f"{name}{writer.suffixes[0]}", grid, np.dtype("<f4"), writer.write) for name in names
        ]
        self._stack = ExitStack()
        self._volumes: list[np.ndarray] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._volumes = [stack.enter_context(file).volume() for file in self._files]
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._volumes = []
        self._stack.__exit__(kind, error, trace)

    def put(self, region: Region, probs: torch.Tensor) -> None:
        """Write a slab.

        Args:
            region: where it lies in the RAS volume.
            probs: (K outputs, X, Y, Z) in 0..1, on any device.
        """
        for i in range(self._num):
            self._volumes[i][region] = probs[self._first + i].cpu().numpy()
        if self._wants_entropy:
            self._volumes[-1][region] = entropy(probs, independent=self._independent).cpu().numpy()
