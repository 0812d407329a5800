"""Predictions for every training case by the models that never saw it, and their scores; resumable by case.

`ensemble/out_of_fold/<combination>/<case>.nii.gz` are label files on the images' own grids;
`ensemble/records/<case>.json` holds a case's scores and a digest of all they were made from.
What jobs kept of their predictions (`autoseg.inference.held_out`) is merged; a network runs only where that is missing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil

from autoseg.data.datalists.cases import Case, Datalist, read_case_label
from autoseg.data.formats.table import image_digest, read_grid
from autoseg.data.grid import Volume
from autoseg.data.labels import LabelMap
from autoseg.data.volumes import read_image, read_label, write_volume
from autoseg.ensemble.combine import CaseCost, CaseScore, Combination, ModelCost, combinations_of
from autoseg.ensemble.records import read_case_record
from autoseg.errors import DataError
from autoseg.evaluation.metrics import dice_per_class, to_plain
from autoseg.evaluation.score_files import floats
from autoseg.evaluation.scores import DICE, Comparison, Metric, score_case
from autoseg.evaluation.tolerances import TOLERANCE_MM, Tolerance
from autoseg.inference.cost import Cost
from autoseg.inference.files import writing
from autoseg.inference.held_out import (
    HeldOut,
    LivePrediction,
    PredictionCost,
    held_out_key,
    label_file,
    merge,
    probs_file,
    read_held_out,
)
from autoseg.inference.predictor import Predictor, check_alike, job_digest, vote
from autoseg.inference.prob_files import DamagedProbs, StoredRows
from autoseg.inference.restore import Member
from autoseg.inference.shortage import within_memory
from autoseg.inference.sides import join_sides, split_sides
from autoseg.plan import read_plan
from autoseg.workspace.files import digest, write_atomic, write_json
from autoseg.workspace.workspace import Workspace

log = logging.getLogger(__name__)
Progress = Callable[[int, int, str], None]
"""Called with the number of cases done, of all, and the name of the one just done."""
Merging = Literal["auto", "mean", "vote"]
"""How algorithms are merged, as `EnsembleSettings.combine` has it."""

RECORD_VERSION = 7
"""Raised whenever the meaning of a record changes."""


def case_digest(case: Case, models: Mapping[str, str], combine: str) -> str:
    """A digest of everything a case's prediction and score are made from.

    Raises:
        DataError: A file is missing.
    """
    files = [*case.images, *([case.label] if case.label else [])]
    if lost := [path for path in files if not path.exists()]:
        raise DataError([f"{path}: no such file. Check the path in the datalist and dataroot." for path in lost])
    contents = [image_digest(path) for path in files]
    by_name = [case.segment_values] if case.segment_values else []
    return digest([RECORD_VERSION, contents, dict(models), combine, case.annotated, *by_name])


def read_record(path: Path, key: str, outputs: Sequence[Path], num_classes: int | None = None) -> dict[str, Any] | None:
    """A case's record, if it was made from the same and all its files are still there.

    Raises:
        WorkspaceError: It is damaged.
    """
    if not path.exists() or not all(p.exists() for p in outputs):
        return None
    record = read_case_record(path, num_classes)
    return record if record.get("made_from") == key else None


def score_of(case: Case, pred: np.ndarray, label: Volume, label_map: LabelMap) -> list[float]:
    """Dice per class of a prediction (X, Y, Z) in RAS."""
    return dice_per_class(pred, label.array[0], label_map, annotated=case.annotated)


def metric_key(metric: Metric, tolerance_mm: Tolerance) -> str:
    """What names a metric's values in a record: those of surfaces depend on the tolerance."""
    return f"{metric.name} {digest(tolerance_mm)}" if metric.needs_tolerance else metric.name


def comparison_of(
    case: Case, pred: np.ndarray, label: Volume, label_map: LabelMap, tolerance_mm: Tolerance
) -> Comparison:
    """A prediction (X, Y, Z) in RAS of a case and its label, to be scored."""
    return Comparison(
        pred=pred,
        label=label.array[0],
        label_map=label_map,
        spacing_mm=label.spacing_mm,
        annotated=case.annotated,
        tolerance_mm=tolerance_mm,
    )


def label_on_image(case: Case) -> Volume:
    """Read a case's label, and make sure that it fits the image.

    Raises:
        DataError: It cannot be read, or lies on another grid than the image.
    """
    label = read_case_label(case)
    if difference := label.grid.differs_from(read_grid(case.images[0])[0]):
        image = case.images[0].name
        raise DataError(f"{case.label}: not on the grid of {image} ({difference}). Export the label again.")
    return label


@dataclass(kw_only=True)
class Fold:
    """The models of one fold, and how its held-out cases are scored with them."""

    workspace: Workspace
    fold: int
    algos: tuple[str, ...]
    combine: Merging
    device: str
    select_by: Metric = DICE
    tolerance_mm: Tolerance = TOLERANCE_MM
    """Of surfaces."""
    wanted: tuple[Combination, ...] = field(init=False)
    """Combinations to score; each algorithm alone first, in their order."""
    models: dict[str, str] = field(init=False)
    """Algorithm -> digest of its job."""
    label_map: LabelMap = field(init=False)
    """The networks' classes."""
    _costs: dict[str, Cost] = field(default_factory=dict)
    """Of models that had to be loaded."""
    _base_bytes: int = field(init=False)
    """Of the process with no model and no image."""

    def __post_init__(self) -> None:
        """Read the plans.

        Raises:
            ConfigError: A plan cannot be read.
            WorkspaceError: The models do not belong together.
        """
        jobs = {algo: self.workspace.job_dir(algo, self.fold) for algo in self.algos}
        plans = {job.root.name: read_plan(job) for job in jobs.values()}
        check_alike(plans)
        self.wanted = combinations_of(self.algos, self.combine)
        self.models = {algo: job_digest(job) for algo, job in jobs.items()}
        self.label_map = next(iter(plans.values())).label_map
        self._base_bytes = psutil.Process().memory_info().rss

    @property
    def merges_probs(self) -> bool:
        """Whether there are means of several algorithms."""
        return any(c.combine == "mean" and len(c.algos) > 1 for c in self.wanted)

    def record_file(self, case: Case) -> Path:
        """Where a case's scores are."""
        return self.workspace.ensemble / "records" / f"{case.name}.json"

    def output(self, combination: Combination, case: Case) -> Path:
        """Where a combination's labels for a case are."""
        return self.workspace.out_of_fold / combination.name / f"{case.name}.nii.gz"

    def read(self, case: Case) -> dict[str, Any] | None:
        """A case's record; None where it has to be scored.

        Raises:
            DataError: A file of the case is missing.
        """
        key = case_digest(case, self.models, self.combine)
        return read_record(self.record_file(case), key, [self.output(c, case) for c in self.wanted])

    def kept(self, case: Case) -> dict[str, HeldOut]:
        """What each algorithm's job kept of a case, where that is enough to score it without the network."""
        counted = self.label_map.wholly(case.annotated)
        by_algo = {}
        for algo, model in self.models.items():
            held_out = read_held_out(
                self.workspace.job_dir(algo, self.fold), case.name, held_out_key(case, model, counted)
            )
            if held_out is not None and (held_out.probs is not None or not self.merges_probs):
                by_algo[algo] = held_out
        return by_algo

    def score(self, case: Case) -> dict[str, Any]:
        """Score a case with every combination; write its labels and its record.

        Raises:
            DataError: A file of the case cannot be read, or the image does not fit the models.
            WorkspaceError: A model cannot be loaded.
            ResourceError: A file cannot be written, or memory does not suffice.
        """
        kept = self.kept(case)
        while True:
            try:
                # The predictors are made as they are needed.
                predictors = (cost.predictor for cost in self._costs.values())
                scores = within_memory(predictors, case.name, partial(self._score, case, kept))
                break
            except DamagedProbs as error:
                log.info("%s; %s is predicted again", error, case.name)
                kept = {algo: held for algo, held in kept.items() if self._probs_file(algo, case) != error.path}
        made_from = case_digest(case, self.models, self.combine)
        record = {"made_from": made_from, "fold": self.fold, **scores}
        write_json(self.record_file(case), record)
        return record

    def deciding(self, case: Case) -> dict[str, list[float]] | None:
        """Scores of each combination's labels by the metric that decides, kept in the record; None for Dice.

        Raises:
            DataError: The label cannot be read.
        """
        metric = self.select_by
        if metric is DICE:
            return None
        record = read_case_record(self.record_file(case))
        kept = record.setdefault("selected", {}).setdefault(metric_key(metric, self.tolerance_mm), {})
        if lacking := [c for c in self.wanted if c.name not in kept]:
            label = read_case_label(case)
            for combination in lacking:
                pred = read_label(self.output(combination, case)).array[0]
                comparison = comparison_of(case, pred, label, self.label_map.named, self.tolerance_mm)
                kept[combination.name] = to_plain(score_case(comparison, [metric])[metric.name])
            write_json(self.record_file(case), record)
        return {c.name: floats(kept[c.name]) for c in self.wanted}

    def _probs_file(self, algo: str, case: Case) -> Path:
        return probs_file(self.workspace.job_dir(algo, self.fold), case.name)

    def _score(self, case: Case, kept: Mapping[str, HeldOut]) -> dict[str, Any]:
        """Merge a case's predictions in every way, write the labels and score them.

        Args:
            case: of the fold.
            kept: what jobs kept of it; the networks of the other algorithms run.

        Returns:
            Plain data: `dice`, a value per class for each combination, without postprocessing; `calibration`, counts
            for each mean; `cost`, time and memory; `traits` of each algorithm's prediction.

        Raises:
            DamagedProbs: Probabilities that a job kept cannot be read.
        """
        label = label_on_image(case)
        live = self._live(case, [algo for algo in self.algos if algo not in kept])
        merged, calibration = self._merged(case, label, kept, live)
        stored = {algo: self._copied(algo, case) for algo in kept}
        alone = {Combination(algos=(algo,)): join_sides(pred, self.label_map) for algo, pred in stored.items()}
        known = merged | alone
        midline = next(iter(live.values())).midline() if live else next(iter(kept.values())).midline
        grid, dice = read_grid(case.images[0])[0], {}
        for combination in self.wanted:
            if combination in alone:
                pred = stored[combination.algos[0]]
            else:
                if combination.combine == "vote":
                    pred = vote([known[Combination(algos=(algo,))] for algo in combination.algos], self.label_map)
                else:
                    pred = known[combination].copy()
                split_sides(pred, self.label_map, midline)
                with writing(path := self.output(combination, case)):
                    write_volume(path, pred, grid)
            dice[combination.name] = score_of(case, pred, label, self.label_map.named)
        costs = {algo: live[algo].took() if algo in live else kept[algo].cost for algo in self.algos}
        traits = {algo: live[algo].traits() if algo in live else kept[algo].traits for algo in self.algos}
        return {
            "dice": to_plain(dice),
            "calibration": calibration,
            "cost": cost_of(costs, self._base_bytes),
            "traits": {algo: of_algo.model_dump(mode="json") for algo, of_algo in traits.items()},
        }

    def _live(self, case: Case, algos: Sequence[str]) -> dict[str, LivePrediction]:
        """Predictions of a case by networks that are about to run."""
        if not algos:
            return {}
        begin = time.perf_counter()
        image = read_image(case.images)
        load_s = time.perf_counter() - begin
        live = {}
        for algo in algos:
            if algo not in self._costs:
                job = self.workspace.job_dir(algo, self.fold)
                self._costs[algo] = Cost(predictor=Predictor([job], device=self.device))
            try:
                live[algo] = LivePrediction(self._costs[algo], image, load_s)
            except DataError as error:
                raise DataError([f"{case.images[0]}: {message}" for message in error.messages]) from error
        return live

    def _merged(
        self, case: Case, label: Volume, kept: Mapping[str, HeldOut], live: Mapping[str, LivePrediction]
    ) -> tuple[dict[Combination, np.ndarray], dict[str, Any]]:
        """Labels of every mean, sides not split, but for those of one algorithm that are stored; calibration of all."""
        calibration: dict[str, Any] = {algo: held.calibration for algo, held in kept.items()}
        means = [c for c in self.wanted if c.combine == "mean" and (len(c.algos) > 1 or c.algos[0] in live)]
        if not means:
            return {}, calibration
        with ExitStack() as stack:
            members = {algo: prediction.member for algo, prediction in live.items()}
            for algo, held in kept.items():
                if self.merges_probs and held.probs is not None:
                    rows = stack.enter_context(StoredRows(self._probs_file(algo, case), held.probs))
                    members[algo] = Member(rows=rows, box=held.probs.region)
            places = {algo: place for place, algo in enumerate(members)}
            labels, counts = merge(
                [*members.values()],
                [tuple(places[algo] for algo in c.algos) for c in means],
                label.array[0],
                self.label_map,
                self.label_map.wholly(case.annotated),
            )
        calibration |= {c.name: count for c, count in zip(means, counts, strict=True)}
        return dict(zip(means, labels, strict=True)), calibration

    def _copied(self, algo: str, case: Case) -> np.ndarray:
        """Copy the labels that a job made; (X, Y, Z) in RAS."""
        source, target = label_file(self.workspace.job_dir(algo, self.fold), case.name), Combination(algos=(algo,))
        with writing(path := self.output(target, case)):
            write_atomic(path, lambda file: file.write(source.read_bytes()))
        return read_label(path).array[0].astype(self.label_map.dtype)


def score_cases(
    fold: Fold, cases: Sequence[Case], after_case: Callable[[Case], None] = lambda case: None
) -> tuple[list[CaseScore], list[str]]:
    """Score cases of a fold, those whose record is still right at no cost.

    Args:
        fold: its models.
        cases: of the fold.
        after_case: called after each.

    Returns:
        The scores, and a message for each case that could not be scored.
    """
    scores: list[CaseScore] = []
    failures: list[str] = []
    for case in cases:
        try:
            scores.append(_from_record(case, fold.read(case) or fold.score(case), fold.deciding(case)))
        except DataError as error:
            log.error("%s: not scored: %s", case.name, " ".join(error.messages))
            failures.extend(f"{case.name}: {message}" for message in error.messages)
        after_case(case)
    return scores, failures


def score_out_of_fold(
    workspace: Workspace,
    datalist: Datalist,
    algos_by_fold: Mapping[int, Sequence[str]],
    *,
    combine: Merging,
    device: str,
    progress: Progress | None = None,
    select_by: Metric = DICE,
    tolerance_mm: Tolerance = TOLERANCE_MM,
) -> tuple[list[CaseScore], list[str]]:
    """Score every case of the folds that have a trained model.

    A case that was scored before with the same models, files and settings is not done again; one that its fold's jobs
    have predicted is merged and scored; a network runs only for what they did not keep.

    Returns:
        The scores, and a message for each case that could not be scored.
    """
    total = sum(len(datalist.val_cases(fold)) for fold in algos_by_fold)
    num_done = 0
    scores: list[CaseScore] = []
    failures: list[str] = []

    def after_case(case: Case) -> None:
        nonlocal num_done
        num_done += 1
        if progress is not None:
            progress(num_done, total, case.name)

    for fold, algos in sorted(algos_by_fold.items()):
        models = Fold(
            workspace=workspace, fold=fold, algos=tuple(algos), combine=combine, device=device, select_by=select_by,
            tolerance_mm=tolerance_mm,
        )  # fmt: skip
        scored, failed = score_cases(models, datalist.val_cases(fold), after_case)
        scores += scored
        failures += failed
    return scores, failures


def _from_record(case: Case, record: Mapping[str, Any], selected: Mapping[str, Sequence[float]] | None) -> CaseScore:
    dice = {name: floats(values) for name, values in record["dice"].items()}
    cost = record["cost"]
    models = {algo: ModelCost(**of_model) for algo, of_model in cost["models"].items()}
    return CaseScore(
        name=case.name,
        fold=record["fold"],
        dice=dice,
        selected=selected,
        group=case.group,
        cost=CaseCost(rest_s=cost["rest_s"], base=cost["base"], models=models),
    )


def cost_of(costs: Mapping[str, PredictionCost], base_bytes: int) -> dict[str, Any]:
    """What a prediction of a case by several algorithms takes, as plain data: see `CaseCost`. Scoring is no part of it.

    The image is read once for all of them.

    Args:
        costs: of each algorithm alone.
        base_bytes: of the process with no model and no image.
    """
    each = costs.values()
    load_s = sum(cost.load_s for cost in each) / len(costs)
    rest_s = (load_s + sum(cost.pre_s + cost.rest_s for cost in each)) / len(costs)
    image_bytes = max(cost.image_bytes for cost in each)  # 0 on a GPU, whose memory is counted alone
    models = {
        algo: {
            "seconds": round(cost.network_s, 4),
            "weights": cost.weights_bytes,
            "window": cost.window_bytes,
            "rows": cost.rows_bytes,
        }
        for algo, cost in costs.items()
    }
    return {"rest_s": round(rest_s, 4), "base": base_bytes + image_bytes if image_bytes else 0, "models": models}
