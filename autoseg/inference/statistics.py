"""A table of what predicted classes measure: their volumes, and the intensities of the image inside them.

An image goes through slab by slab, so that a large one never lies in memory. Figures are exact for images of integers;
see `autoseg.data.histograms` for floats of very many values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from autoseg.data.histograms import EMPTY, MOST_PAIRS, Histogram, Stats, histograms_by_label, pool
from autoseg.data.segments import Segment
from autoseg.data.streams import ImageRows
from autoseg.inference.case_table import CaseTable, Row
from autoseg.inference.quality import Verdict
from autoseg.inference.quality_file import volume_text

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
COLUMNS = (
    "case", "class", "channel", "unit", "voxels", "volume_ml", "volume_low_ml", "volume_high_ml", *INTENSITIES,
)  # fmt: skip
HU, AS_STORED = "HU", "as stored"
"""Units of intensities: of a CT, and of any other image, whose file does not tell."""
SLAB_VOXELS = 1 << 24
"""Looked at together."""


def rows_of_slabs(image: ImageRows, num_channels: int = 1) -> int:
    """Rows of an image that are looked at together."""
    plane = math.prod(size for axis, size in enumerate(image.shape) if axis != image.axis)
    return max(1, SLAB_VOXELS // max(1, plane * num_channels))


def measure(
    case: str,
    image: ImageRows,
    labels: np.ndarray,
    segments: Sequence[Segment],
    units: Sequence[str],
    verdict: Verdict | None = None,
) -> list[Row]:
    """Measure the classes of an image.

    Args:
        case: its name.
        image: in the files' intensities.
        labels: (X, Y, Z) label values in RAS.
        segments: the classes.
        units: of the intensities of each channel.
        verdict: what is thought of the prediction; None: the ends of volumes' intervals stay empty.

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
    ends = {c.name: (c.volume_low_ml, c.volume_high_ml) for c in verdict.classes} if verdict is not None else {}
    for segment in segments:
        low, high = map(volume_text, ends.get(segment.name, (None, None)))
        for channel, histograms in enumerate(by_value):
            inside = pool([histograms[value] for value in segment.values if value in histograms])
            row = _row(case, segment.name, channel, units[channel], inside, voxel_ml)
            rows.append(row | {"volume_low_ml": low, "volume_high_ml": high})
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


def statistics_table(path: Path, *, is_shared: bool = False) -> CaseTable:
    """The table of a folder of label files: a row for each case, class and channel, by the cases' names."""
    return CaseTable(path=path, columns=COLUMNS, is_shared=is_shared)
