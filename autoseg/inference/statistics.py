"""A table of what predicted classes measure: their volumes, and the intensities of the image inside them.

An image goes through slab by slab, so that a large one never lies in memory. Figures are exact for images of integers;
see `autoseg.data.histograms` for floats of very many values.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autoseg.data.histograms import EMPTY, MOST_PAIRS, Histogram, Stats, histograms_by_label, pool
from autoseg.data.segments import Segment
from autoseg.data.streams import ImageRows
from autoseg.workspace.claims import Claim
from autoseg.workspace.files import open_regular, write_text

FILE = "statistics.csv"
INTENSITIES = {
    "mean": "mean",
    "std": "stdev",
    "min": "min",
    "percentile_00_5": "percentile_00_5",
    "percentile_10": "percentile_10_0",
    "median": "median",
    "percentile_90": "percentile_90_0",
    "percentile_99_5": "percentile_99_5",
    "max": "max",
}
"""Column -> figure of `Stats`."""
COLUMNS = ("case", "class", "channel", "unit", "voxels", "volume_ml", *INTENSITIES)
HU, AS_STORED = "HU", "as stored"
"""Units of intensities: of a CT, and of any other image, whose file does not tell."""
SLAB_VOXELS = 1 << 24
"""Looked at together."""

Row = dict[str, str]


def rows_of_slabs(image: ImageRows, num_channels: int = 1) -> int:
    """Rows of an image that are looked at together."""
    plane = math.prod(size for axis, size in enumerate(image.shape) if axis != image.axis)
    return max(1, SLAB_VOXELS // max(1, plane * num_channels))


def measure(
    case: str, image: ImageRows, labels: np.ndarray, segments: Sequence[Segment], units: Sequence[str]
) -> list[Row]:
    """Measure the classes of an image.

    Args:
        case: its name.
        image: in the files' intensities.
        labels: (X, Y, Z) label values in RAS.
        segments: the classes.
        units: of the intensities of each channel.

    Returns:
        A row for each class and channel; the figures of intensities are empty where the class has no voxel.
    """
    by_value: list[dict[int, Histogram]] = [{} for _ in range(image.num_channels)]
    step = rows_of_slabs(image, image.num_channels)
    for start in range(0, image.shape[image.axis], step):
        stop = min(start + step, image.shape[image.axis])
        place = [slice(None)] * 3
        place[image.axis] = slice(start, stop)
        label = labels[tuple(place)]
        if not label.any():
            continue
        for channel, values in enumerate(image.rows(start, stop)):
            for value, part in histograms_by_label(values, label).items():
                if value:
                    whole = pool([by_value[channel].get(value, EMPTY), part])
                    by_value[channel][value] = whole.rounded(MOST_PAIRS)
    voxel_ml = _volume_mm3(image) / 1000
    rows = []
    for segment in segments:
        for channel, histograms in enumerate(by_value):
            inside = pool([histograms[value] for value in segment.values if value in histograms])
            rows.append(_row(case, segment.name, channel, units[channel], inside, voxel_ml))
    return rows


def _volume_mm3(image: ImageRows) -> float:
    """Of a voxel; a sheared grid's is less than the product of its edges."""
    return abs(float(np.linalg.det(image.grid.affine[:3, :3])))


def _row(case: str, name: str, channel: int, unit: str, inside: Histogram, voxel_ml: float) -> Row:
    total = inside.total if len(inside.values) else 0
    stats: Stats | None = inside.stats() if total else None
    row = {"case": case, "class": name, "channel": str(channel), "unit": unit}
    row |= {"voxels": str(total), "volume_ml": f"{total * voxel_ml:.6g}"}
    return row | {c: "" if stats is None else f"{getattr(stats, f):.6g}" for c, f in INTENSITIES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticsFile:
    """The table of a folder of label files: a row for each case, class and channel, by the cases' names."""

    path: Path
    is_shared: bool = False
    """Whether other processes write rows, too."""

    def put(self, case: str, rows: Sequence[Row]) -> None:
        """Write the rows of a case in the place of those that it has.

        Raises:
            OSError: The file cannot be written.
        """
        claim = Claim(self.path.parent / ".claims" / f".{self.path.name}", self.path.name, wait=True)
        with claim if self.is_shared else nullcontext():
            others = [row for row in self.read() if row["case"] != case]
            text = io.StringIO()
            table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
            table.writeheader()
            table.writerows(sorted([*others, *rows], key=lambda row: row["case"]))
            write_text(self.path, text.getvalue())

    def read(self) -> list[Row]:
        """The rows that are there; none of a file that is not this table, which is replaced."""
        try:
            with open_regular(self.path) as file:
                table = csv.DictReader(io.StringIO(file.read().decode("utf-8")))
                return [*table] if tuple(table.fieldnames or ()) == COLUMNS else []
        except (FileNotFoundError, UnicodeDecodeError):
            return []
