"""What stands in datastats.yaml, datastats_by_case.yaml and state/summary.json, as far as autoseg reads it again.

The parts in Auto3DSeg's form may hold more than is named here: its tools know them, and may add to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Generic, Literal, Self, TypeVar

from pydantic import ConfigDict, Field, JsonValue, model_validator

from autoseg.data.frame import Frame
from autoseg.workspace.stored import Stored
from autoseg.workspace.workspace import Workspace

Finite = Annotated[float, Field(allow_inf_nan=False)]
Triple = tuple[Finite, Finite, Finite]
FigureT = TypeVar("FigureT")
AGAIN = "Undo the edit, or delete the file and run `autoseg analyze` again."


class Foreign(Stored):
    """Base of what has Auto3DSeg's form: keys that are not named are left alone."""

    model_config = ConfigDict(extra="ignore")


class Intensity(Foreign):
    """Intensities of one channel in one case."""

    median: float
    percentile_00_5: float
    percentile_99_5: float


class ImageStats(Foreign):
    """The grid of a case in RAS."""

    shape: tuple[tuple[int, int, int], ...] = Field(min_length=1)
    """Voxels, once for each channel."""
    spacing: Triple
    """mm."""


class ClassInCase(Foreign):
    """One label value in one case."""

    volume_ml: float


class LabelStats(Foreign):
    """The label of a case."""

    labels: tuple[int, ...]
    label: tuple[ClassInCase, ...]
    """For each of `labels`."""

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if len(self.labels) != len(self.label):
            raise ValueError(f"labels names {len(self.labels)} values, but label has figures of {len(self.label)}")
        return self


class ForegroundStats(Foreign):
    """Intensities of the labelled voxels of a case."""

    intensity: tuple[Intensity, ...]
    """Of each channel; empty where no voxel is labelled."""


class CaseEntry(Foreign):
    """A case of `stats_by_cases`."""

    name: str
    image_stats: ImageStats
    image_foreground_stats: ForegroundStats | None = None
    """None without a label, as is `label_stats`."""
    label_stats: LabelStats | None = None

    def volume_ml(self, values: Sequence[int]) -> float:
        """Volume of a class; 0 where it does not occur."""
        if self.label_stats is None:
            return 0.0
        table = dict(zip(self.label_stats.labels, self.label_stats.label, strict=True))
        return float(sum(table[value].volume_ml for value in values if value in table))


class StatsByCase(Foreign):
    """What stands in datastats_by_case.yaml."""

    advice: ClassVar[str] = AGAIN

    stats_by_cases: tuple[CaseEntry, ...]


class Spread(Stored, Generic[FigureT]):
    """A figure over all cases: of numbers, or of triples axis by axis."""

    max: FigureT
    mean: FigureT
    median: FigureT
    min: FigureT
    stdev: FigureT
    percentile: tuple[FigureT, ...]
    """The four below."""
    percentile_00_5: FigureT
    percentile_10_0: FigureT
    percentile_90_0: FigureT
    percentile_99_5: FigureT


class PooledIntensity(Stored):
    """Intensities of one channel over all labelled voxels of all cases together."""

    num_voxels: int
    is_exact: bool
    max: float
    mean: float
    median: float
    min: float
    stdev: float
    percentile_00_5: float
    percentile_10_0: float
    percentile_90_0: float
    percentile_99_5: float


class BackgroundIntensity(Stored):
    """Intensities of one channel in the voxels that no class has: each case's figure, over the cases."""

    min: Spread[float]
    percentile_00_5: Spread[float]
    percentile_99_5: Spread[float]
    max: Spread[float]


class ClassEntry(Stored):
    """One class over all cases."""

    name: str
    values: tuple[int, ...]
    """In label files."""
    num_cases: int
    """In which it occurs."""
    num_annotated: int
    voxel_fraction: float
    """Share of all voxels of the labelled cases."""
    volume_ml: Spread[float] | None
    num_components: Spread[float] | None
    """None for a region of several values."""


class LateralEntry(Stored):
    """Left and right among the classes; `autoseg.analyzer.lateral.Lateral` says what its fields mean."""

    pairs: tuple[tuple[str, str], ...]
    pairs_rule: str
    unsure: tuple[str, ...]
    unsure_rule: str


class DataSet(Stored):
    """What autoseg adds to Auto3DSeg's statistics: exact figures over the data set, in RAS, classes by name."""

    num_channels: int
    shape: Spread[Triple]
    spacing_mm: Spread[Triple]
    size_mm: Spread[Triple]
    orientations: dict[str, int]
    """Axis codes of the files, such as LAS -> cases."""
    frame: Frame | None = None
    """The data set's own axes, in which shapes and spacings are; None: X, Y, Z of RAS+."""
    frame_rule: str = ""
    """Why it has some."""
    nonzero_crop_ratio: Spread[float]
    nonzero_size_mm: Spread[Triple] | None = None
    """Of the box around voxels other than 0; None in analyses of the first versions."""
    labelled_outside: tuple[str, ...] = ()
    """Cases with a labelled voxel outside that box."""
    outside_fraction: float = 0.0
    """The largest share of a label value's voxels that lies outside."""
    foreground_intensity: tuple[PooledIntensity, ...]
    """Of each channel."""
    background_intensity: tuple[BackgroundIntensity, ...] = ()
    """Of each channel; empty where every voxel has a class, and in analyses of the first versions."""
    classes: tuple[ClassEntry, ...]
    lateral: LateralEntry | None = None
    """None in files of version 0.1."""


class GroupEntry(Stored):
    """Cases that were annotated for the same classes."""

    num_cases: int
    num_classes: int
    classes: tuple[str, ...]
    cases: tuple[str, ...]


class FaultEntry(Stored):
    """A fault or a warning of the data; `autoseg.analyzer.faults.Fault` says what its fields mean."""

    kind: str
    finding: str
    remedy: str
    case: str = ""
    file: str = ""
    severity: Literal["fault", "warning"] = "fault"


class StatsSummary(Foreign):
    """Auto3DSeg's figures over all cases."""

    n_cases: int


class DataStats(Stored):
    """What stands in datastats.yaml."""

    advice: ClassVar[str] = AGAIN

    stats_summary: StatsSummary
    data_set: DataSet
    label_groups: tuple[GroupEntry, ...]
    """Largest first."""
    occurring_groups: tuple[GroupEntry, ...]
    """By the classes that occur."""
    faults: tuple[FaultEntry, ...]
    warnings: tuple[FaultEntry, ...]


class AnalysisSummary(Stored):
    """What stands in state/summary.json, and what `autoseg analyze --json` prints."""

    advice: ClassVar[str] = AGAIN

    cases: dict[str, int]
    """Role -> cases in the datalist."""
    read: int
    """Cases that were read now; the others were known."""
    seconds: float
    label_groups: tuple[GroupEntry, ...]
    occurring_groups: tuple[GroupEntry, ...]
    hint: str
    """What to set where labels look partial and nothing was declared; else empty."""
    quarantined: tuple[str, ...]
    faults: tuple[FaultEntry, ...]
    warnings: tuple[FaultEntry, ...]
    data_set: dict[str, JsonValue]
    """As in datastats.yaml; empty where no case is sound."""


def summary_path(workspace: Workspace) -> Path:
    """Where the analysis' summary is kept."""
    return workspace.run / "state" / "summary.json"
