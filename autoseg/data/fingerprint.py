"""The fingerprint: what the planner needs to know of a data set, read from datastats.yaml alone.

Axes: X, Y, Z in RAS+, or those of the data set's own frame. Intensities are the files' own, after NIfTI scaling.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from autoseg.data.datastats import DataStats, Triple
from autoseg.data.frame import Frame
from autoseg.errors import WorkspaceError
from autoseg.workspace.stored import read_stored

Shape = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForegroundIntensity:
    """Intensities of one channel over all labelled voxels of all training cases together."""

    mean: float
    std: float
    min: float
    p00_5: float
    median: float
    p99_5: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BackgroundIntensity:
    """Intensities of one channel in the voxels of the training cases that no class has."""

    min: float
    """Over all cases, as `max`."""
    p00_5_least: float
    """The least of the cases' 0.5 percentiles."""
    p00_5: float
    """Median over the cases, as `p99_5`."""
    p99_5: float
    p99_5_largest: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelGroup:
    """The cases that were annotated for the same classes."""

    classes: tuple[str, ...]
    cases: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """A data set's training cases in numbers."""

    num_cases: int
    num_channels: int
    spacing_mm_min: Triple
    spacing_mm_p10: Triple
    spacing_mm_median: Triple
    spacing_mm_max: Triple
    shape_min: Shape
    """Voxels, as every other shape here."""
    shape_median: Shape
    shape_p90: Shape
    shape_max: Shape
    size_mm_median: Triple
    """Field of view: shape times spacing."""
    size_mm_p90: Triple
    foreground: tuple[ForegroundIntensity, ...]
    """One per channel; all zero where no voxel is labelled."""
    background: tuple[BackgroundIntensity, ...]
    """One per channel; empty where every voxel is labelled."""
    nonzero_crop_ratio: float
    """Median over cases of the volume of the box around non-zero voxels, as a share of the image, in (0, 1]."""
    nonzero_size_mm_median: Triple | None = None
    """Of that box; None in statistics of version 0.1, which lack it."""
    labelled_outside: tuple[str, ...] = ()
    """Cases with labelled voxels outside that box."""
    outside_fraction: float = 0.0
    """The largest share of a label value's voxels that lies outside."""
    class_names: tuple[str, ...]
    class_values: tuple[tuple[int, ...], ...]
    """Label values of each class."""
    class_num_cases: tuple[int, ...]
    """Training cases in which each class occurs."""
    class_voxel_fraction: tuple[float, ...]
    """Share of each class in all voxels of the training cases."""
    label_groups: tuple[LabelGroup, ...]
    """Largest first; one group where every case is annotated for all classes."""
    lateral_pairs: tuple[tuple[str, str], ...] | None = None
    """Classes that are the left and the right one of a structure; None in statistics of version 0.1, which lack it."""
    lateral_rule: str = ""
    """How they are known."""
    one_sided: tuple[str, ...] = ()
    """Classes of one side whose counterpart, if there is one, is not known."""
    one_sided_rule: str = ""
    """What was seen of them."""
    frame: Frame | None = None
    """The data set's own axes, in which shapes and spacings are; None: X, Y, Z of RAS+."""
    frame_rule: str = ""
    """Why it has some."""

    def size_mm_seen(self, *, cropped: bool) -> Triple:
        """Median field of view that networks see: of the whole image, or of the box around voxels other than 0."""
        return (self.nonzero_size_mm_median if cropped else None) or self.size_mm_median

    @classmethod
    def read(cls, datastats_yaml: Path) -> Fingerprint:
        """Read the fingerprint from a datastats.yaml that this package wrote.

        Raises:
            WorkspaceError: The file is missing, damaged, or was written by another program.
        """
        if not datastats_yaml.exists():
            raise WorkspaceError(f"{datastats_yaml}: missing. Run `autoseg analyze` first.")
        return cls.of(read_stored(datastats_yaml, DataStats))

    @classmethod
    def of(cls, datastats: DataStats) -> Fingerprint:
        """Take the fingerprint from the content of datastats.yaml."""
        data_set = datastats.data_set
        spacing, shape, size = data_set.spacing_mm, data_set.shape, data_set.size_mm
        classes, lateral = data_set.classes, data_set.lateral
        return cls(
            num_cases=datastats.stats_summary.n_cases,
            num_channels=data_set.num_channels,
            spacing_mm_min=_triple(spacing.min),
            spacing_mm_p10=_triple(spacing.percentile_10_0),
            spacing_mm_median=_triple(spacing.median),
            spacing_mm_max=_triple(spacing.max),
            shape_min=_voxels(shape.min),
            shape_median=_voxels(shape.median),
            shape_p90=_voxels(shape.percentile_90_0),
            shape_max=_voxels(shape.max),
            size_mm_median=_triple(size.median),
            size_mm_p90=_triple(size.percentile_90_0),
            foreground=tuple(
                ForegroundIntensity(
                    mean=_figure(channel.mean),
                    std=_figure(channel.stdev),
                    min=_figure(channel.min),
                    p00_5=_figure(channel.percentile_00_5),
                    median=_figure(channel.median),
                    p99_5=_figure(channel.percentile_99_5),
                    max=_figure(channel.max),
                )
                for channel in data_set.foreground_intensity
            ),
            background=tuple(
                BackgroundIntensity(
                    min=_figure(channel.min.min),
                    p00_5_least=_figure(channel.percentile_00_5.min),
                    p00_5=_figure(channel.percentile_00_5.median),
                    p99_5=_figure(channel.percentile_99_5.median),
                    p99_5_largest=_figure(channel.percentile_99_5.max),
                    max=_figure(channel.max.max),
                )
                for channel in data_set.background_intensity
            ),
            nonzero_crop_ratio=_figure(data_set.nonzero_crop_ratio.median),
            nonzero_size_mm_median=None
            if data_set.nonzero_size_mm is None
            else _triple(data_set.nonzero_size_mm.median),
            labelled_outside=data_set.labelled_outside,
            outside_fraction=_figure(data_set.outside_fraction),
            class_names=tuple(c.name for c in classes),
            class_values=tuple(c.values for c in classes),
            class_num_cases=tuple(c.num_cases for c in classes),
            class_voxel_fraction=tuple(_figure(c.voxel_fraction) for c in classes),
            label_groups=tuple(LabelGroup(classes=g.classes, cases=g.cases) for g in datastats.label_groups),
            lateral_pairs=None if lateral is None else lateral.pairs,
            lateral_rule="" if lateral is None else lateral.pairs_rule,
            one_sided=() if lateral is None else lateral.unsure,
            one_sided_rule="" if lateral is None else lateral.unsure_rule,
            frame=data_set.frame,
            frame_rule=data_set.frame_rule,
        )


def _figure(value: float) -> float:
    """A figure as the file has it, in 9 digits, so that a fingerprint made in memory equals one that was read."""
    return float(f"{value:.9g}")


def _triple(values: Triple) -> Triple:
    x, y, z = values
    return _figure(x), _figure(y), _figure(z)


def _voxels(values: Triple) -> Shape:
    x, y, z = values
    return round(_figure(x)), round(_figure(y)), round(_figure(z))
