"""What stands in ensemble/records/<case>.json: a case's scores, and a digest of all they were made from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict

from autoseg.errors import WorkspaceError
from autoseg.evaluation.score_files import PerClass
from autoseg.evaluation.suspicion import Kind, Part
from autoseg.workspace.stored import Score, Stored, read_stored


class StoredModelCost(Stored):
    """`autoseg.ensemble.combine.ModelCost`."""

    seconds: float
    weights: int
    window: int
    rows: int


class StoredCaseCost(Stored):
    """`autoseg.ensemble.combine.CaseCost`."""

    rest_s: float
    base: int
    models: dict[str, StoredModelCost]


class StoredParts(Stored):
    """Sizes of one class's parts, as `autoseg.inference.postprocess.measure_parts` counts them."""

    truth: int
    largest: tuple[int, int]
    """Voxels, and those of them that are right, as in the others."""
    sizes: tuple[tuple[int, int], ...]
    holes: tuple[int, int]


class StoredContradiction(Stored):
    """`autoseg.evaluation.suspicion.Contradiction`."""

    name: str
    kind: Kind
    gain: float
    partner: str
    shift_mm: float


class StoredPart(Stored):
    """`autoseg.evaluation.suspicion.Part`."""

    voxels: int
    volume_ml: float
    voxel: tuple[int, int, int]
    seen: tuple[int, int, int]
    center_mm: tuple[float, float, float]


def part_of(item: Mapping[str, Any]) -> Part:
    """A part as a record holds it."""
    return Part(**StoredPart.model_validate(item).model_dump())


class CaseRecord(Stored):
    """A case out of fold, or a held-back case, which has no fold and only the ensemble's Dice.

    Scores by metrics other than Dice stand each under the metric's name.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, dict[str, PerClass]]

    advice: ClassVar[str] = "Undo the edit, or delete the file and run `autoseg ensemble` again."

    made_from: str
    """A digest."""
    fold: int | None = None
    dice: dict[str, PerClass] | PerClass | None
    """Out of fold by combination, without postprocessing."""
    selected: dict[str, dict[str, PerClass]] = {}
    """The same by the metrics that decided, see `autoseg.ensemble.out_of_fold.metric_key`."""
    calibration: dict[str, tuple[tuple[tuple[float, float, float], ...], ...]] = {}
    """By combination that is a mean."""
    cost: StoredCaseCost | None = None
    parts: dict[str, tuple[StoredParts | None, ...]] = {}
    """By digest of the combination and its rules, as are `finished` and the scores by metrics."""
    options: dict[str, tuple[tuple[Score, ...] | None, ...]] = {}
    """Scores of each class with each of its options of postprocessing, by digest of combination, rules and metric."""
    contradictions: dict[str, tuple[StoredContradiction, ...]] = {}
    contradicted_parts: dict[str, tuple[StoredPart, ...]] = {}
    """By digest of the combination with its rules, the class and the kind."""
    finished: dict[str, PerClass] = {}
    in_ensemble: str = ""
    """Digest of the rules that the file in out_of_fold/ensemble was made with."""

    @property
    def lengths(self) -> set[int]:
        """For how many classes there are scores."""
        by_metric = [self.finished, *(self.__pydantic_extra__ or {}).values()]
        by_metric.append(self.dice if isinstance(self.dice, dict) else {"": self.dice or ()})
        return {len(scores) for table in by_metric for scores in table.values() if scores}


def read_case_record(path: Path, num_classes: int | None = None) -> dict[str, Any]:
    """A record as plain data, all of which is as `CaseRecord` says.

    Args:
        path: the file.
        num_classes: that it has scores for; None: any number, but one alone.

    Raises:
        WorkspaceError: It is missing or damaged.
    """
    record = read_stored(path, CaseRecord)
    lengths = record.lengths | ({num_classes} if num_classes and record.lengths else set())
    if len(lengths) > 1:
        numbers = " and ".join(map(str, sorted(lengths)))
        raise WorkspaceError(f"{path}: scores for {numbers} classes. Expected one number of them. {CaseRecord.advice}")
    return record.model_dump(mode="json", exclude_unset=True)
