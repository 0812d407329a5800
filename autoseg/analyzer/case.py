"""One case: its files read once, its statistics, and what is wrong with it by itself.

What depends on settings or on the other cases (class names, folds, outliers) is judged afterwards, from this.
Axes: X, Y, Z in RAS+; a result says nothing of orientation on disk beyond its name.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.orientations import ornt2axcodes

from autoseg.analyzer.boxes import Box, around, box_above_zero, box_other_than_zero, hull, within
from autoseg.data.components import find_components
from autoseg.data.formats.label_files import SegmentValues, read_stored_label
from autoseg.data.formats.stored import FileFaultError, Finding, StoredVolume
from autoseg.data.formats.table import read_stored_volume
from autoseg.data.frame import Directions, Frame
from autoseg.data.grid import Grid, axes_of, in_mm, stored_as
from autoseg.data.histograms import Histogram, Stats, chunks, histograms_by_label, pool
from autoseg.data.stray import Usual
from autoseg.errors import counted

LABEL_FILE = 9999
"""Number of the label among a case's files."""
MOST_SPACING_MM = 50.0
"""Longer voxel edges are taken for an error of units: no slice is as thick. `units.py` judges the short ones."""
MOST_COMPONENTS = 100
"""Components of a class whose boxes are listed, the largest first."""
MOST_POOLED_VALUES = 1 << 16
"""Different foreground intensities of a case that are kept for pooling; more are rounded to 12 bits."""
FLOAT32_MAX = float(np.finfo(np.float32).max)
FEW_VALUES = 256
"""An image with at least as many intensities is known by how often each occurs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassStats:
    """One label value of a case; 0 is background."""

    value: int
    voxels: int
    intensity: tuple[Stats, ...]
    """One per channel."""
    num_components: int
    component_shapes: tuple[tuple[int, int, int], ...]
    """Bounding boxes, the largest components first, at most MOST_COMPONENTS."""
    centre_mm: tuple[float, float, float]
    """Centre of mass in the RAS+ world."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseStats:
    """What is known of a case; where it has faults, the rest is empty."""

    findings: tuple[Finding, ...]
    digests: tuple[str, ...] = ()
    """Of the bytes of the images, then of the label."""
    identity: str = ""
    """Equal for equal voxels, also where files were compressed or oriented differently."""
    orientation: str = ""
    """Of the stored axes, such as LPS."""
    shape: tuple[int, int, int] = (0, 0, 0)
    spacing_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    directions: Directions = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    """A step of one voxel along X, Y, Z, in mm of the RAS+ world."""
    cropped_shapes: tuple[tuple[int, int, int], ...] = ()
    """Box around voxels above 0, one per channel."""
    nonzero_shape: tuple[int, int, int] = (0, 0, 0)
    """Of the box around voxels other than 0 in any channel."""
    outside: tuple[tuple[int, int], ...] = ()
    """Label value and number of voxels of each class that has some outside that box."""
    intensity: tuple[Stats, ...] = ()
    """Within the box around voxels above 0, one per channel."""
    foreground: tuple[Stats, ...] = ()
    """Of the labelled voxels, one per channel; empty where none is."""
    background: tuple[Stats, ...] = ()
    """Of all other voxels of the image, one per channel; empty where every voxel is labelled."""
    classes: tuple[ClassStats, ...] = ()
    """By label value, background first; empty without a label."""
    pooled: tuple[Histogram, ...] = ()
    """Intensities of the labelled voxels, one per channel."""

    @property
    def is_faulty(self) -> bool:
        """Whether the case cannot be used."""
        return any(f.is_fault for f in self.findings)

    def in_frame(self, frame: Frame | None) -> CaseStats:
        """The same with a data set's own axes in place of X, Y, Z in RAS+."""
        if frame is None or self.is_faulty:
            return self
        turn = frame.turn(np.array(self.directions).T)
        classes = tuple(
            replace(c, component_shapes=tuple(turn.triple(shape) for shape in c.component_shapes)) for c in self.classes
        )
        return replace(
            self,
            shape=turn.triple(self.shape),
            spacing_mm=turn.triple(self.spacing_mm),
            directions=turn.triple(self.directions),
            cropped_shapes=tuple(turn.triple(shape) for shape in self.cropped_shapes),
            nonzero_shape=turn.triple(self.nonzero_shape),
            classes=classes,
        )

    @property
    def num_channels(self) -> int:
        """Channels of the image."""
        return len(self.intensity)

    @property
    def voxels(self) -> int:
        """Number of voxels."""
        return math.prod(self.shape)

    @property
    def nonzero_ratio(self) -> float:
        """Volume of the box around voxels other than 0 in any channel, as a share of the image."""
        return math.prod(self.nonzero_shape) / self.voxels if self.voxels else 1.0

    @property
    def size_mm(self) -> tuple[float, float, float]:
        """Field of view."""
        x, y, z = (n * s for n, s in zip(self.shape, self.spacing_mm, strict=True))
        return x, y, z


def analyze_case(
    images: tuple[Path, ...],
    label: Path | None,
    ignore_label: int | None,
    free_bytes: int | None = None,
    segment_values: SegmentValues = (),
) -> CaseStats:
    """Read a case once and measure it.

    Args:
        images: one file per channel, or files with several.
        ignore_label: label value that is no class.
        free_bytes: memory one file may take.
        segment_values: as `Case` has them.

    Returns:
        The statistics, or, where anything is wrong, every fault that could be found.
    """
    findings: list[Finding] = []
    read_file = partial(read_stored_volume, free_bytes=free_bytes, with_digest=True)
    volumes = [_read(read_file, path, number, findings) for number, path in enumerate(images)]
    first = volumes[0]
    read_label = partial(
        read_stored_label,
        grid=None if first is None else first.grid,
        values=segment_values,
        free_bytes=free_bytes,
        with_digest=True,
    )
    label_volume = _read(read_label, label, LABEL_FILE, findings) if label is not None else None
    label_array = None
    if label_volume is not None:
        label_array = _label_array(label_volume, findings)
        if first is not None and (differs := label_volume.grid.differs_from(first.grid)):
            findings.append(
                Finding("grid", f"not on the image's grid: {differs}", "Export the label again.", file=LABEL_FILE)
            )
        elif first is not None and label_array is not None:
            label_array = stored_as(label_array, label_volume.grid, first.grid)
    for number, volume in enumerate(volumes):
        if volume is not None:
            _check_voxels(volume, number, findings)
            if first is not None and (differs := volume.grid.differs_from(first.grid)):
                remedy = f"All channels must share one grid, that of {images[0].name}. Resample it."
                findings.append(
                    Finding("grid", f"not on the grid of the first channel: {differs}", remedy, file=number)
                )
    read = [v for v in volumes if v is not None]
    digests = tuple(v.digest for v in [*volumes, *([label_volume] if label is not None else [])] if v is not None)
    if any(f.is_fault for f in findings) or first is None:
        return CaseStats(findings=tuple(findings), digests=digests)
    read = [replace(v, array=stored_as(v.array, v.grid, first.grid), grid=first.grid) for v in read]
    del volumes, label_volume, first, volume
    return _measure(read, label_array, ignore_label, tuple(findings), digests)


def _read(
    read: Callable[[Path], StoredVolume], path: Path, number: int, findings: list[Finding]
) -> StoredVolume | None:
    try:
        volume = read(path)
        refuse_grid(volume.grid)
    except FileFaultError as error:
        findings.append(_in_file(error.fault, number))
        return None
    findings += [_in_file(w, number) for w in volume.warnings]
    return volume


def refuse_grid(grid: Grid) -> None:
    """Refuse what no model can be trained on, in whatever format it is stored.

    Raises:
        FileFaultError: The grid has sizes that no scan has.
    """
    if max(grid.spacing_mm) > MOST_SPACING_MM:
        remedy = f"Expected at most {MOST_SPACING_MM:g} mm. Correct the units, or export it again."
        raise FileFaultError("spacing", f"spacing of {in_mm(grid.spacing_mm)} mm", remedy)


def _in_file(finding: Finding, number: int) -> Finding:
    return Finding(finding.kind, finding.finding, finding.remedy, finding.is_fault, number)


def _check_voxels(volume: StoredVolume, number: int, findings: list[Finding]) -> None:
    """NaN, infinity, one value everywhere; channel by channel."""
    for channel in range(volume.array.shape[3]):
        array = volume.array[..., channel]
        where = f" in channel {channel}" if volume.array.shape[3] > 1 else ""
        low, high = (float(v) * volume.slope + volume.inter for v in (array.min(), array.max()))
        if not (np.isfinite(low) and np.isfinite(high) and max(abs(low), abs(high)) < FLOAT32_MAX):
            num_nan = sum(int(np.isnan(array[:, :, part]).sum()) for part in chunks(array.shape))
            what = "voxels are infinite, or beyond 32-bit floats"
            if num_nan:
                what = f"{counted(num_nan, 'voxel is', 'voxels are')} NaN"
            findings.append(Finding("not_finite", what + where, "Replace them, or leave the case out.", file=number))
        elif low == high:
            remedy = "Export the image again, or leave it out."
            findings.append(Finding("constant", f"every voxel is {low:g}{where}", remedy, file=number))


def _label_array(volume: StoredVolume, findings: list[Finding]) -> np.ndarray | None:
    """The label's values as uint8 or uint16, (I, J, K); None where there are none to use."""
    if volume.array.shape[3] != 1:
        what = f"a label with {volume.array.shape[3]} channels"
        remedy = "Expected one label map. For overlapping masks give a folder of a file each as the label."
        findings.append(Finding("not_3d", what, remedy, file=LABEL_FILE))
        return None
    array = volume.array[..., 0]
    low, high = float(array.min()), float(array.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        remedy = "Expected integers. Export it again."
        findings.append(Finding("not_finite", "NaN or infinite voxels", remedy, file=LABEL_FILE))
        return None
    ends = sorted((low * volume.slope + volume.inter, high * volume.slope + volume.inter))
    if ends[0] < -0.5 or ends[1] > 65535:
        what = f"label values from {ends[0]:g} to {ends[1]:g}"
        findings.append(Finding("label_values", what, "Expected integers from 0 to 65535.", file=LABEL_FILE))
        return None
    if array.dtype.kind != "f" and volume.slope == 1 and volume.inter == 0:
        return array.astype(np.uint8 if ends[1] < 256 else np.uint16, copy=False)
    integers = np.empty(array.shape, np.uint8 if ends[1] < 255.5 else np.uint16, order="F")
    for part in chunks(array.shape):
        values = array[:, :, part] * volume.slope + volume.inter
        rounded = np.rint(values)
        odd = np.abs(values - rounded) > 1e-3
        if odd.any():
            what = f"label value {float(values[odd][0]):.6g} is not an integer"
            remedy = "Was it interpolated? Resample labels by nearest neighbour."
            findings.append(Finding("label_not_integer", what, remedy, file=LABEL_FILE))
            return None
        integers[:, :, part] = rounded
    return integers


def _measure(
    volumes: list[StoredVolume],
    label: np.ndarray | None,
    ignore_label: int | None,
    findings: tuple[Finding, ...],
    digests: tuple[str, ...],
) -> CaseStats:
    """The statistics of a sound case. Empties `volumes`: the image is let go before components are sought."""
    grid = volumes[0].grid
    orientation, axes, directions = _orientation(grid.affine[:3, :3].tobytes())
    x, y, z = axes
    by_channel: list[dict[int, Histogram]] = []
    pooled, cropped, cropped_shapes, nonzero = [], [], [], []
    identity = hashlib.sha256()
    warnings: list[Finding] = []
    for number in range(len(volumes)):
        volume = volumes.pop(0)
        for channel in range(volume.array.shape[3]):
            array = volume.array[..., channel]
            histograms = histograms_by_label(array, label, volume.slope, volume.inter)
            whole = pool(list(histograms.values()))
            kept = _without_strays(histograms, whole, ignore_label)
            if kept.finding:
                remedy = (
                    "They are left out of all statistics, and count as the nearest usual value in training and "
                    "prediction. Correct the export where they are not meant."
                )
                warnings.append(Finding("intensity", kept.finding, remedy, is_fault=False, file=number))
            box = box_above_zero(array, volume.slope, volume.inter, whole)
            by_channel.append(kept.by_label)
            pooled.append(kept.foreground.rounded(MOST_POOLED_VALUES))
            cropped.append(within(box, array, volume.slope, volume.inter, whole).within(kept.usual))
            cropped_shapes.append(tuple(box[a].stop - box[a].start for a in axes))
            nonzero.append(box_other_than_zero(array, volume.slope, volume.inter, whole))
            _identify(identity, array, whole)
    # The image is freed here; components need memory of their own.
    del volume, array
    has_foreground = bool(len(pooled[0].values))
    box = hull(nonzero)
    beside = [pool([h for value, h in histograms.items() if value in (0, ignore_label)]) for histograms in by_channel]
    return CaseStats(
        findings=(*findings, *warnings),
        digests=digests,
        identity=identity.hexdigest()[:32],
        orientation=orientation,
        shape=(grid.shape[x], grid.shape[y], grid.shape[z]),
        spacing_mm=(grid.spacing_mm[x], grid.spacing_mm[y], grid.spacing_mm[z]),
        directions=directions,
        cropped_shapes=tuple(cropped_shapes),
        nonzero_shape=(box[x].stop - box[x].start, box[y].stop - box[y].start, box[z].stop - box[z].start),
        outside=() if label is None else _outside(label, box, ignore_label),
        intensity=tuple(h.stats() for h in cropped),
        foreground=tuple(h.stats() for h in pooled) if has_foreground else (),
        background=tuple(h.stats() for h in beside) if len(beside[0].values) else (),
        classes=() if label is None else _classes(label, by_channel, grid.affine, axes),
        pooled=tuple(pooled) if has_foreground else (),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Kept:
    """A channel's histograms without stray voxels."""

    by_label: dict[int, Histogram]
    foreground: Histogram
    """Of all labelled voxels together."""
    usual: Usual | None = None
    """What is usual in the whole channel."""
    finding: str = ""
    """Which voxels were left out; empty: none."""


def _without_strays(histograms: dict[int, Histogram], whole: Histogram, ignore_label: int | None) -> _Kept:
    """Leave stray voxels of a channel out of its histograms by label value.

    Of the whole channel first, then of the foreground by itself: a voxel that does not show in ten million may decide
    the mean of a thousand.
    """
    usual = whole.usual()
    kept = {value: histogram.within(usual) for value, histogram in histograms.items()}
    labelled = [value for value in kept if value not in (0, ignore_label)]
    foreground = pool([kept[value] for value in labelled])
    inner = foreground.usual()
    if (limits := usual or inner) is None:
        return _Kept(by_label=kept, foreground=foreground)
    if inner is not None:
        kept |= {value: kept[value].within(inner) for value in labelled}
        foreground = pool([kept[value] for value in labelled])
    number = whole.total - sum(histogram.total for histogram in kept.values())
    if not number:
        return _Kept(by_label=kept, foreground=foreground, usual=usual)
    measured = whole if usual else pool([histograms[value] for value in labelled])
    least, most = float(measured.values[0]), float(measured.values[-1])
    extreme = most if most - limits.high > limits.low - least else least
    finding = (
        f"{number} {'voxel' if number == 1 else 'voxels'} as far as {extreme:.4g}, while 99 % "
        f"{'' if usual else 'of the foreground '}lie from {limits.low:.4g} to {limits.high:.4g}"
    )
    return _Kept(by_label=kept, foreground=foreground, usual=usual, finding=finding)


def _outside(label: np.ndarray, box: Box, ignore_label: int | None) -> tuple[tuple[int, int], ...]:
    """Label values outside a box, background and ignored ones left out, each with its number of voxels."""
    counts: Counter[int] = Counter()
    for part in around(label, box):
        values, voxels = np.unique(part[part != 0], return_counts=True)
        counts.update(dict(zip(values.tolist(), voxels.tolist(), strict=True)))
    return tuple(sorted((value, num) for value, num in counts.items() if value != ignore_label))


@lru_cache(maxsize=1024)
def _orientation(linear: bytes) -> tuple[str, tuple[int, int, int], Directions]:
    """Anatomical name of an affine's stored axes; of each of X, Y, Z (RAS+) the stored axis, and a step of one voxel.

    Args:
        linear: the affine's (3, 3) part, float64; most cases of a data set share one.
    """
    affine = np.eye(4)
    affine[:3, :3] = np.frombuffer(linear).reshape(3, 3)
    ornt = axes_of(affine)
    x, y, z = np.argsort(ornt[:, 0]).tolist()
    steps = (affine[:3, :3] * ornt[:, 1] + 0.0).T.tolist()  # no zero is negative
    return "".join(ornt2axcodes(ornt)), (x, y, z), (tuple(steps[x]), tuple(steps[y]), tuple(steps[z]))


def _classes(
    label: np.ndarray, by_channel: list[dict[int, Histogram]], affine: np.ndarray, axes: tuple[int, ...]
) -> tuple[ClassStats, ...]:
    parts = find_components(label)
    shapes = parts.shape[:, list(axes)]
    classes = []
    for value in by_channel[0]:
        rows = np.flatnonzero(parts.label == value)
        centre = parts.mass[rows].sum(0) / parts.voxels[rows].sum()
        x, y, z = (affine[:3, :3] @ centre + affine[:3, 3]).tolist()
        classes.append(
            ClassStats(
                value=value,
                voxels=int(parts.voxels[rows].sum()),
                intensity=tuple(histograms[value].stats() for histograms in by_channel),
                num_components=len(rows),
                component_shapes=tuple((a, b, c) for a, b, c in shapes[rows[:MOST_COMPONENTS]].tolist()),
                centre_mm=(x, y, z),
            )
        )
    return tuple(classes)


def _identify(identity: Any, array: np.ndarray, whole: Histogram) -> None:
    """Add a channel to a case's identity.

    How often each of hundreds of intensities occurs is not shared by two scans, and does not depend on how a file
    is stored; an image of few intensities is known by its voxels instead.
    """
    identity.update(np.array(sorted(array.shape)).tobytes() + whole.values.tobytes() + whole.counts.tobytes())
    if len(whole.values) < FEW_VALUES:
        for part in chunks(array.shape):
            identity.update(array[:, :, part].tobytes(order="F"))
