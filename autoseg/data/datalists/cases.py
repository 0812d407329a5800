"""A case and the list of all cases, as the rest of the package knows them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from autoseg.data.formats.label_files import SegmentValues
from autoseg.data.formats.table import image_digest, read_grid
from autoseg.data.grid import Volume
from autoseg.data.volumes import read_label
from autoseg.workspace.files import digest

MetaValue = str | int | float | bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """A case's label with pseudo-labels where classes were missing: learned from, never scored."""

    label: Path
    annotated: tuple[str, ...] | None
    """Classes it is complete for; None: all."""
    weight: Path | None = None
    """Weight of each voxel in percent; None: all alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One patient's scan: its image files, its label if there is one, and what is known about both."""

    name: str
    """Unique within the data set and fit for a file name; from the image's file name."""
    images: tuple[Path, ...]
    """Absolute paths, one per channel or files with several channels."""
    label: Path | None = None
    fold: int | None = None
    """Validation fold the case belongs to, from 0; None: not in cross-validation."""
    annotated: tuple[str, ...] | None = None
    """Names of the classes its annotators looked for. In a user's list None means: not declared; in a run's own list
    the analysis has settled it, and None means: all."""
    group: str | None = None
    """Patient; cases of one patient are never split over folds."""
    meta: Mapping[str, MetaValue] = field(default_factory=dict, hash=False)
    """What else the list or a table says of it, such as site or age, under the user's own keys."""
    completed: Completed | None = None
    """What a later round of training learns from in place of the label."""
    weight: Path | None = None
    """Weight of each voxel in training, in percent, where pseudo-labels are soft."""
    segment_values: SegmentValues = ()
    """Where the label's segments are known by name: what label values they become. Empty: it is a label map."""
    by_annotators: tuple[str, ...] | None = None
    """Names of the classes that its annotators drew, where models filled in the others; None: nothing is filled in."""

    def for_training(self) -> Case:
        """The case with the label that is to be learned from."""
        if self.completed is None:
            return self
        completed = self.completed
        return replace(
            self,
            label=completed.label,
            annotated=completed.annotated,
            segment_values=(),
            weight=completed.weight,
            by_annotators=self.annotated or (),  # None: an unlabeled case
            completed=None,
        )


def case_digest(case: Case) -> str:
    """The identity of a case: a digest of what its images, its label and its weights hold, not of where they lie.

    Copied, moved, renamed or touched files are the same case; a changed voxel makes another one.

    Raises:
        OSError: A file cannot be read.
    """
    files = [*case.images, *([case.label] if case.label is not None else [])]
    parts = [[image_digest(path) for path in files], case.weight and image_digest(case.weight)]
    return digest([*parts, *([case.segment_values] if case.segment_values else [])])


def without_label(case: Case) -> Case:
    """A case's images alone."""
    return Case(name=case.name, images=case.images, group=case.group)


def images_digest(case: Case) -> str:
    """The identity of a case's images, whatever label they have. Raises: as `case_digest`."""
    return case_digest(without_label(case))


def read_case_label(case: Case) -> Volume:
    """Read a case's label; where it is a segmentation, on its image's grid.

    Raises:
        DataError: As `read_label`; the image's header cannot be read.
    """
    assert case.label is not None
    grid = read_grid(case.images[0])[0] if case.segment_values else None
    return read_label(case.label, grid=grid, values=case.segment_values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Datalist:
    """All cases of a data set, sorted by role."""

    training: tuple[Case, ...]
    """Labelled, each with a fold 0..num_fold-1 once read; where the list named `validation` cases instead of
    folds, those come last, with fold 0, and the others have none. In a later round of training, unlabeled cases that
    were given pseudo-labels, too, without a label, and in the fold of their patient where that has one."""
    validation: tuple[Case, ...] = ()
    """Labelled cases named beside folds; held back from training, not used to choose models."""
    testing: tuple[Case, ...] = ()
    """Predicted by the ensemble; scored where a label is given."""
    unlabeled: tuple[Case, ...] = ()
    labels: dict[int, str] = field(default_factory=dict)
    """Label value -> class name, background left out; empty where the file names none."""
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Name -> label values, where the list names regions made of several values; then `labels` is empty."""
    ignore_label: int | None = None
    """Value of voxels to leave out, where the list names one (nnU-Net's `ignore`)."""
    modality: str | None = None
    """As a foreign data set names it; None where it does not. Of several channels, the first one's."""
    channels: tuple[str, ...] = ()
    """Names of the channels, as a foreign data set gives them; empty where it does not."""
    path: Path | None = field(default=None, compare=False)
    folds_made: bool = field(default=False, compare=False)
    """Whether the folds were made when the list was read, since it has none."""

    @property
    def cases(self) -> tuple[Case, ...]:
        """All of them, whatever their role."""
        return (*self.training, *self.validation, *self.testing, *self.unlabeled)

    @property
    def num_fold(self) -> int:
        """Number of folds."""
        return 1 + max((c.fold for c in self.training if c.fold is not None), default=-1)

    def train_cases(self, fold: int) -> tuple[Case, ...]:
        """The cases a fold's model learns from, pseudo-labels included."""
        return tuple(c.for_training() for c in self.training if c.fold != fold)

    def val_cases(self, fold: int) -> tuple[Case, ...]:
        """The cases a fold's model never sees, with the labels their annotators made."""
        return tuple(c for c in self.training if c.fold == fold and c.label is not None)

    def changed(self, change: Callable[[Case], Case]) -> Datalist:
        """The same list with every case changed, whatever its role."""
        return replace(
            self,
            training=tuple(map(change, self.training)),
            validation=tuple(map(change, self.validation)),
            testing=tuple(map(change, self.testing)),
            unlabeled=tuple(map(change, self.unlabeled)),
        )

    def without(self, names: Collection[str]) -> Datalist:
        """The same list less some cases, whatever their role."""

        def kept(cases: tuple[Case, ...]) -> tuple[Case, ...]:
            return tuple(c for c in cases if c.name not in names)

        return replace(
            self,
            training=kept(self.training),
            validation=kept(self.validation),
            testing=kept(self.testing),
            unlabeled=kept(self.unlabeled),
        )
