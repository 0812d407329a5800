"""What stands in ensemble/scores.json. It loads no torch, so that whoever only shows scores starts quickly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Self

from pydantic import ConfigDict, Field, model_validator

from autoseg.config.settings import SelectBy
from autoseg.workspace.stored import Score, Stored, read_stored
from autoseg.workspace.workspace import Workspace

PerClass = tuple[Score, ...]
"""A score for each class; None: not counted."""
AGAIN = "Undo the edit, or delete the file and run `autoseg ensemble` again."


def floats(values: Sequence[float | None]) -> list[float]:
    """Scores as they are counted with: NaN where not counted."""
    return [math.nan if v is None else float(v) for v in values]


class ClassScores(Stored):
    """A score of one class over cases; None where no case counts."""

    name: str
    num: int
    """Cases that count."""
    mean: Score
    std: Score
    median: Score
    q25: Score
    q75: Score
    low: Score
    """Ends of the 95 % interval of the mean."""
    high: Score


class ScoreSummary(Stored):
    """A score over cases and classes."""

    classes: tuple[ClassScores, ...]
    mean: Score
    low: Score
    high: Score
    num_cases: int
    """Cases that count for any class."""
    num_patients: int | None = None
    """Of these cases; None in runs of 0.1."""


class CandidateScores(ScoreSummary):
    """The Dice of a combination, without postprocessing."""

    name: str
    combine: str
    members: tuple[tuple[str, int], ...]
    """Algorithm and fold of each model."""
    selected: Score = None
    """Mean of the metric that decided; None in runs of 0.1."""


class ChosenAgain(Stored):
    """The Dice where all that was chosen on out-of-fold cases was chosen again without the fold it is scored on."""

    dice: ScoreSummary
    optimism: Score
    """How much higher the Dice of what was chosen on the same cases is."""
    combinations: dict[int, str]
    """Fold -> combination chosen by the others."""


class SubgroupScores(Stored):
    """`autoseg.evaluation.subgroups.SubgroupRow`, and its finding in words."""

    factor: str
    level: str
    num: int
    num_patients: int
    mean: Score
    low: Score
    high: Score
    difference: Score
    difference_low: Score
    difference_high: Score
    p: Score
    finding: str


class SuspiciousPart(Stored):
    """`autoseg.evaluation.suspicion.Part`."""

    voxels: int
    volume_ml: float
    voxel: tuple[int, int, int]
    seen: tuple[int, int, int]
    center_mm: tuple[float, float, float]

    @property
    def words(self) -> str:
        """Where it is, and how large."""
        place, mm = ", ".join(map(str, self.voxel)), ", ".join(f"{v:.1f}" for v in self.center_mm)
        return f"voxel {place} (RAS {mm} mm), {self.volume_ml:.3g} ml"


class SuspiciousLabel(Stored):
    """A class of a case whose label the out-of-fold prediction contradicts."""

    model_config = ConfigDict(populate_by_name=True)

    case: str
    name: str = Field(alias="class")
    suspicion: float
    kind: str
    gain: float
    partner: str
    shift_mm: float
    parts: tuple[SuspiciousPart, ...] = ()
    """Where to look, the largest first; runs before them have none."""

    @property
    def words(self) -> str:
        """What speaks against the label."""
        return {
            "missing": "the models see it where nothing is labelled",
            "extra": "the models see nothing where it is labelled",
            "swapped": f"seems to be exchanged with {self.partner}",
            "left and right": f"left and right seem to be exchanged ({self.partner})",
            "shifted": f"fits once it is moved by {self.shift_mm:g} mm",
            "mirrored": "fits once it is mirrored from left to right",
        }.get(self.kind, self.kind)


class QualityCheck(Stored):
    """How well the Dice of cases out of fold was predicted, by fits that did not see them."""

    num_cases: int
    num_copies: int
    """Spoilt ones of some of them."""
    spearman: Score
    """Of predicted and true mean Dice over the cases; None where it is not defined."""
    spearman_all: Score
    """Over these and the copies."""
    error: Score
    """Mean absolute error of the mean Dice, over the cases."""
    covered: Score
    """Share of Dice, class by class, within the interval."""
    points: tuple[tuple[str, str, float, float], ...]
    """Case, how it was spoilt (empty: not), predicted and true mean Dice."""


class HeldBackClass(Stored):
    """What is thought of a class of a held-back case."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True, populate_by_name=True)

    name: str = Field(alias="class")
    predicted: Score
    low: Score
    high: Score
    volume_ml: float
    volume_low_ml: Score
    volume_high_ml: Score


class HeldBackQuality(Stored):
    """What is thought of the prediction of a held-back case."""

    case: str
    predicted: Score
    """Mean Dice."""
    dice: Score
    """True mean Dice, where there is a label."""
    reasons: tuple[str, ...]
    """Why the image is not like the training data."""
    classes: tuple[HeldBackClass, ...]


class Quality(Stored):
    """Predicted Dice."""

    check: QualityCheck
    held_back: tuple[HeldBackQuality, ...]
    """The worst first."""


class TemperatureScores(Stored):
    """`autoseg.evaluation.calibration.Temperature`."""

    value: float
    by_fold: dict[int, float]
    error_before: float
    error_after: float
    classes_after: tuple[Score, ...]


class ExternalScores(Stored):
    """Cases with a label that no model has learned from: those of `testing`, and of `validation` beside folds."""

    metrics: dict[str, ScoreSummary]
    difference: Score
    """Of their mean Dice to that of the out-of-fold cases, over the classes that count in both."""
    low: Score
    high: Score
    p: Score
    subgroups: tuple[SubgroupScores, ...]


class CaseDice(Stored):
    """One case by models that never saw it."""

    name: str
    fold: int
    dice: dict[str, PerClass]
    """By combination."""


class MetricNote(Stored):
    """How the values of a metric are to be read."""

    unit: str
    higher_is_better: bool


SHARE = MetricNote(unit="", higher_is_better=True)


class Scores(Stored):
    """Out-of-fold scores of a run.

    Besides `dice`, every metric has a summary under its own name, see `summary_of`.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, ScoreSummary]

    advice: ClassVar[str] = AGAIN

    version: str
    """Of autoseg."""
    metric: SelectBy
    """That decided between combinations and rules of postprocessing."""
    classes: tuple[str, ...]
    chosen: str
    """Name of the chosen combination."""
    candidates: tuple[CandidateScores, ...]
    cases: tuple[CaseDice, ...]
    patients: dict[str, int] = {}
    """Case -> number of its patient, where the list names one; the others stand alone."""
    testing: dict[str, PerClass]
    gaps: tuple[str, ...]
    """Jobs without a model, in words."""
    failures: tuple[str, ...]
    """Cases that could not be predicted, in words."""
    tolerance_mm: float | dict[str, float]
    """Of surfaces, for metrics that need one; of all classes, or of each."""
    metrics: dict[str, MetricNote] = {"dice": SHARE, "nsd": SHARE}
    """By name; runs of 0.1 do not list them."""
    subgroups: tuple[SubgroupScores, ...] = ()
    """The ensemble's out-of-fold Dice by group of cases."""
    subgroup_notes: tuple[str, ...] = ()
    """Why keys of the cases make no groups."""
    suspicious: tuple[SuspiciousLabel, ...] = ()
    """The most suspicious first."""
    quality: Quality | None = None
    """None where there were too few cases to learn from."""
    external: ExternalScores | None = None
    """None where no such case has a label, and in runs of 0.1."""
    temperature: TemperatureScores | None = None
    """None for votes, with one fold alone, and in runs of 0.1."""
    chosen_again: ChosenAgain | None = None
    """None with one fold alone, and in runs of 0.1."""
    dice: ScoreSummary
    """The ensemble's, postprocessing included, as are the other metrics' and `ensemble`."""
    calibration: tuple[tuple[tuple[float, float, float], ...], ...] | None
    """For each class in `calibrated` and each bin: voxels, sum of probabilities, of them right."""
    calibrated: tuple[str, ...]
    ensemble: dict[str, dict[str, PerClass]]
    """Case -> metric -> score for each class."""

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        per_class = [values for case in self.cases for values in case.dice.values()]
        per_class += [*self.testing.values(), *(v for by_metric in self.ensemble.values() for v in by_metric.values())]
        if any(len(values) != len(self.classes) for values in per_class):
            raise ValueError(f"a case has not as many scores as there are classes ({len(self.classes)})")
        if unknown := sorted(set(self.__pydantic_extra__) - set(self.metrics)):
            raise ValueError(f"{unknown[0]}: unknown key")
        for summary in (self.dice, *self.__pydantic_extra__.values(), *self.candidates):
            if tuple(c.name for c in summary.classes) != self.classes:
                raise ValueError(f"a summary is of other classes than {', '.join(self.classes)}")
        if self.chosen not in [c.name for c in self.candidates]:
            raise ValueError(f"chosen: found {self.chosen!r}, expected one of the candidates")
        if lost := sorted(set(self.ensemble) - {case.name for case in self.cases}):
            raise ValueError(f"ensemble: found case {lost[0]!r}, which is not among the cases")
        if self.calibration is not None and len(self.calibration) != len(self.calibrated):
            raise ValueError("calibration: not as many classes as in calibrated")
        return self

    def summary_of(self, metric: str) -> ScoreSummary | None:
        """A metric over cases and classes; None where it was not computed."""
        return self.dice if metric == "dice" else self.__pydantic_extra__.get(metric)

    @property
    def chosen_candidate(self) -> CandidateScores:
        """The chosen combination."""
        return next(c for c in self.candidates if c.name == self.chosen)


class ChangeScore(Stored):
    """What one change of the images does."""

    name: str
    words: str
    dice: Score
    """Mean of the cases."""
    difference: Score
    """To the images as they are, case by case."""
    low: Score
    """Ends of its 95 % interval."""
    high: Score


class Robustness(Stored):
    """What stands in ensemble/robustness.json."""

    advice: ClassVar[str] = AGAIN

    made_from: str
    """A digest."""
    cases: tuple[str, ...]
    dice: Score
    """Mean of the cases as they are, predicted the same way."""
    changes: tuple[ChangeScore, ...]


class PrecisionComparison(Stored):
    """A case predicted in half precision and in fp32."""

    precision: str
    dice_change: float | None = None
    """Dice in half precision less that in fp32; null in files of version 0.1, which went by equal labels alone."""
    equal_labels: float
    """Share of the foreground voxels of either prediction."""
    is_equal: bool
    """Whether that is enough to predict in half precision."""


class ValidationFile(Stored):
    """What stands in a job's validation.json: its best model on the fold's cases."""

    advice: ClassVar[str] = "Undo the edit, or delete the job's job.json and run `autoseg train` again."

    summary: ScoreSummary
    dice: dict[str, dict[str, Score]]
    """Case -> class."""
    half_precision: PrecisionComparison | None = None
    """None where there was nothing to compare."""


def read_scores(workspace: Workspace) -> Scores | None:
    """The scores of a run or a round; None before the ensemble stage.

    Raises:
        WorkspaceError: The file is damaged.
    """
    return read_stored(workspace.scores, Scores) if workspace.scores.exists() else None
