"""Predictions for every training case by the models that never saw it, and their scores; resumable by case.

`ensemble/out_of_fold/<combination>/<case>.nii.gz` are label files on the images' own grids;
`ensemble/records/<case>.json` holds a case's scores and a digest of all they were made from.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil

from autoseg.data.datalists.cases import Case, Datalist
from autoseg.data.formats.nifti import stem_of
from autoseg.data.grid import Volume
from autoseg.data.labels import LabelMap
from autoseg.data.streams import MemoryImage
from autoseg.data.volumes import read_image, read_label, write_volume
from autoseg.ensemble.combine import CaseCost, CaseScore, Combination, ModelCost, combinations_of
from autoseg.ensemble.records import read_case_record
from autoseg.errors import DataError
from autoseg.evaluation.calibration import Calibration
from autoseg.evaluation.metrics import TOLERANCE_MM, class_means, dice_per_class, nsd_per_class, to_plain
from autoseg.inference.clock import Clock
from autoseg.inference.cost import Cost, Facts, weights_bytes
from autoseg.inference.files import writing
from autoseg.inference.postprocess import LEAST_GAIN, ClassRule, clean, measure_parts, propose
from autoseg.inference.predictor import Predictor, model_digest, vote
from autoseg.inference.restore import Member, labels_of_means
from autoseg.inference.sides import BodyWatch
from autoseg.inference.windows import ProbRows, Shape, default_batch
from autoseg.workspace.digests import content_digest
from autoseg.workspace.files import digest, write_json
from autoseg.workspace.workspace import Workspace

log = logging.getLogger(__name__)
Progress = Callable[[int, int, str], None]
"""Called with the number of cases done, of all, and the name of the one just done."""

RECORD_VERSION = 5
"""Raised whenever the meaning of a record changes."""


def case_digest(case: Case, models: Mapping[str, str], combine: str) -> str:
    """A digest of everything a case's prediction and score are made from.

    Raises:
        DataError: A file is missing.
    """
    files = [*case.images, *([case.label] if case.label else [])]
    if lost := [path for path in files if not path.exists()]:
        raise DataError([f"{path}: no such file. Check the path in the datalist and dataroot." for path in lost])
    contents = [content_digest(path) for path in files]
    return digest([RECORD_VERSION, contents, dict(models), combine, case.annotated])


def read_record(path: Path, key: str, outputs: Sequence[Path]) -> dict[str, Any] | None:
    """A case's record, if it was made from the same and all its files are still there."""
    if not path.exists() or not all(p.exists() for p in outputs):
        return None
    record = read_case_record(path)
    return record if record.get("made_from") == key else None


def score_of(case: Case, pred: np.ndarray, label: Volume, label_map: LabelMap) -> list[float]:
    """Dice per class of a prediction (X, Y, Z) in RAS."""
    return dice_per_class(pred, label.array[0], label_map, annotated=case.annotated)


def read_case_label(case: Case, image: Volume) -> Volume:
    """Read a case's label.

    Raises:
        DataError: It cannot be read, or lies on another grid than the image.
    """
    assert case.label is not None
    label = read_label(case.label)
    if found := label.grid.differs_from(image.grid):
        raise DataError(f"{case.label}: not on the grid of {case.images[0].name} ({found}). Export the label again.")
    return label


def score_out_of_fold(
    workspace: Workspace,
    datalist: Datalist,
    algos_by_fold: Mapping[int, Sequence[str]],
    *,
    combine: Literal["auto", "mean", "vote"],
    device: str,
    progress: Progress | None = None,
) -> tuple[list[CaseScore], list[str]]:
    """Predict and score every case of the folds that have a trained model.

    Each model is loaded once; a case that was scored before with the same models, files and settings is not
    done again.

    Returns:
        The scores, and a message for each case that could not be scored.
    """
    total = sum(len(datalist.val_cases(fold)) for fold in algos_by_fold)
    done = 0
    scores: list[CaseScore] = []
    failures: list[str] = []
    for fold, algos in sorted(algos_by_fold.items()):
        wanted = combinations_of(algos, combine)
        models = {algo: model_digest(workspace, algo, fold) for algo in algos}
        cost: Cost | None = None
        base_bytes = psutil.Process().memory_info().rss
        for case in datalist.val_cases(fold):
            try:
                key = case_digest(case, models, combine)
                outputs = [_label_file(workspace, c, case) for c in wanted]
                record = read_record(workspace.ensemble / "records" / f"{case.name}.json", key, outputs)
                if record is None:
                    if cost is None:
                        jobs = [workspace.job_dir(a, fold) for a in algos]
                        cost = Cost(predictor=Predictor(jobs, device=device))
                    found = _score_case(workspace, case, cost, algos, wanted, base_bytes)
                    record = {"made_from": key, "fold": fold, **found}
                    write_json(workspace.ensemble / "records" / f"{case.name}.json", record)
                scores.append(_from_record(case, record))
            except DataError as error:
                log.error("%s: not scored: %s", case.name, error)
                failures.extend(f"{case.name}: {message}" for message in error.messages)
            done += 1
            if progress is not None:
                progress(done, total, case.name)
    return scores, failures


def _label_file(workspace: Workspace, combination: Combination, case: Case) -> Path:
    return workspace.out_of_fold / combination.name / f"{case.name}.nii.gz"


def _from_record(case: Case, record: Mapping[str, Any]) -> CaseScore:
    dice = {n: _floats(values) for n, values in record["dice"].items()}
    cost = record["cost"]
    models = {algo: ModelCost(**found) for algo, found in cost["models"].items()}
    return CaseScore(
        name=case.name,
        fold=record["fold"],
        dice=dice,
        cost=CaseCost(rest_s=cost["rest_s"], base=cost["base"], models=models),
    )


def _floats(values: Sequence[float | None]) -> list[float]:
    return [math.nan if v is None else float(v) for v in values]


def _score_case(
    workspace: Workspace,
    case: Case,
    cost: Cost,
    algos: Sequence[str],
    wanted: Sequence[Combination],
    base_bytes: int,
) -> dict[str, Any]:
    """Predict a case with each algorithm, merge them in every way, write the labels and score them.

    Args:
        cost: of a predictor with one model for each of `algos`.
        wanted: each algorithm alone first, in their order.
        base_bytes: of the process with no model and no image.

    Returns:
        Plain data: `dice`, a value per class for each combination, without postprocessing; `calibration`, counts for
        each mean; `cost`, time and memory.
    """
    predictor = cost.predictor
    predictor.clock = Clock()
    with predictor.clock.at("load"):
        image = read_image(case.images)
    label = read_case_label(case, image)
    label_map = predictor.label_map
    watched = BodyWatch(MemoryImage(image))
    places = {c: tuple(algos.index(algo) for algo in c.algos) for c in wanted}
    means = [c for c in wanted if c.combine == "mean"]
    shape: tuple[int, int, int] = image.array.shape[1:]
    try:
        each = predictor.each(watched)
    except DataError as error:
        raise DataError([f"{case.images[0]}: {message}" for message in error.messages]) from error
    target = label_map.encode(label.array[0])
    counted = label_map.wholly(case.annotated)
    counts = [Calibration(target, label_map, counted) for _ in means]
    found = labels_of_means(
        each, [places[c] for c in means], shape, label_map, watch=lambda k, place, probs: counts[k].add(place, probs)
    )
    midline = watched.midline() if label_map.merged_sides else 0.0
    labels = dict(zip(means, found, strict=True))
    for combination in wanted:
        if combination.combine == "vote":
            labels[combination] = vote([found[i] for i in places[combination]], label_map)
    dice = {}
    for combination, pred in labels.items():
        predictor.finish(pred, image.spacing_mm, midline, cleaned=False)
        path = _label_file(workspace, combination, case)
        with writing(path):
            write_volume(path, pred, image.grid)
        dice[combination.name] = score_of(case, pred, label, label_map.named)
    calibration = {c.name: count.to_json() for c, count in zip(means, counts, strict=True)}
    took = _cost_of(cost, algos, image, watched.axis, each, base_bytes)
    return {"dice": to_plain(dice), "calibration": calibration, "cost": took}


def _cost_of(
    cost: Cost, algos: Sequence[str], image: Volume, axis: int, each: Sequence[Member], base_bytes: int
) -> dict[str, Any]:
    """What a prediction of the case takes, as plain data: see `CaseCost`. Scoring is no part of it.

    Args:
        base_bytes: of the process with no model and no image.
    """
    predictor = cost.predictor
    facts = Facts(shape=image.array.shape[1:], spacing_mm=image.spacing_mm, num_channels=len(image.array), axis=axis)
    networks = [member.rows.network_s for member in each if isinstance(member.rows, ProbRows)]
    models = {}
    for i, (algo, network_s) in enumerate(zip(algos, networks, strict=True)):
        window: Shape = each[i].rows.window  # type: ignore[attr-defined]
        batch = default_batch(window, predictor.device)
        models[algo] = {
            "seconds": round(network_s, 4),
            "weights": weights_bytes(predictor.models[i]),
            "window": batch * cost.window(i, window).num_bytes,
            "rows": cost.rows_bytes([i], facts, predictor.options),
        }
    on_cpu = predictor.device.type == "cpu"
    if not on_cpu:
        for found in models.values():
            found["rows"] = 0
    clock = predictor.clock.seconds
    rest_s = (clock["load"] + clock["pre"]) / len(algos) + cost.rest_s * facts.voxels
    base = base_bytes + cost.image_bytes(facts) if on_cpu else 0
    return {"rest_s": round(rest_s, 4), "base": base, "models": models}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The chosen ensemble's out-of-fold labels as they will be handed out."""

    rules: tuple[ClassRule, ...]
    """What is done to them."""
    raw: dict[str, list[float]]
    """Case -> Dice per class before that, NaN where not counted."""
    dice: dict[str, list[float]]
    nsd: dict[str, list[float]]
    calibration: dict[str, Any]
    """Case -> counts; None for a vote."""


def finish_out_of_fold(
    workspace: Workspace,
    cases: Mapping[str, tuple[Case, str]],
    label_map: LabelMap,
    *,
    given: Sequence[ClassRule],
    choose_rules: bool,
) -> Finished:
    """Choose the postprocessing by evidence, apply it to the chosen combination's labels and score the result.

    The labels lie in out_of_fold/ensemble/ then. Rules are proposed from the sizes of the predictions' parts, then
    applied; one that did not raise its class after all, since rules meet, is left out again.

    Args:
        cases: name -> the case, and the combination that speaks in its fold.
        label_map: of the user's classes.
        given: rules that were set; they come first.
        choose_rules: look for more.
    """
    plain = _score_rules(workspace, cases, label_map, given)
    proposed: dict[str, ClassRule] = {}
    if choose_rules:
        parts = [_parts_of(workspace, name, *found, label_map, given) for name, found in cases.items()]
        proposed = propose(label_map.names, parts)
    rules = tuple(given)
    while proposed:
        rules = _joined(label_map.names, given, proposed)
        tried = _score_rules(workspace, cases, label_map, rules)
        before, after = (class_means([*scores.values()]) for scores in (plain, tried))
        gain = {n: (b, a) for n, b, a in zip(label_map.names, before, after, strict=True)}
        if lost := [n for n in proposed if not gain[n][1] > gain[n][0] + LEAST_GAIN]:
            proposed = {n: rule for n, rule in proposed.items() if n not in lost}
            rules = tuple(given)
            continue
        rules = tuple(_with_gain(rule, *gain[rule.name]) if rule.name in proposed else rule for rule in rules)
        break
    return _write_finished(workspace, cases, label_map, rules)


def _with_gain(rule: ClassRule, before: float, after: float) -> ClassRule:
    return rule.model_copy(update={"dice_before": round(before, 6), "dice_after": round(after, 6)})


def _joined(
    names: Sequence[str], given: Sequence[ClassRule], proposed: Mapping[str, ClassRule]
) -> tuple[ClassRule, ...]:
    """The rules that were set with those that were chosen, one for a class."""
    by_name = {rule.name: rule for rule in given}
    found = []
    for name in names:
        if name in proposed:
            mine = by_name.get(name, ClassRule(name=name))
            chosen = proposed[name].model_dump(include={"largest", "min_mm3", "fill_holes"})
            found.append(mine.model_copy(update=chosen))
        elif name in by_name:
            found.append(by_name[name])
    return tuple(found)


def _parts_of(
    workspace: Workspace,
    name: str,
    case: Case,
    combination: str,
    label_map: LabelMap,
    given: Sequence[ClassRule],
) -> list[dict[str, Any] | None]:
    """Sizes of a prediction's parts, None for classes that do not count; kept in the case's record."""
    path = workspace.ensemble / "records" / f"{name}.json"
    record = read_case_record(path)
    key = _rules_key(combination, given)
    if key not in record.setdefault("parts", {}):
        assert case.label is not None
        label = read_label(case.label)
        pred, _ = _cleaned(workspace, name, combination, label_map, given)
        counts = label_map.names if case.annotated is None else case.annotated
        parts = measure_parts(pred, label.array[0], label_map, label.spacing_mm)
        record["parts"][key] = [p if n in counts else None for n, p in zip(label_map.names, parts, strict=True)]
        write_json(path, record)
    found: list[dict[str, Any] | None] = record["parts"][key]
    return found


def _rules_key(combination: str, rules: Sequence[ClassRule]) -> str:
    return digest([combination, [rule.model_dump(exclude={"dice_before", "dice_after"}) for rule in rules]])


def _cleaned(
    workspace: Workspace, name: str, combination: str, label_map: LabelMap, rules: Sequence[ClassRule]
) -> tuple[np.ndarray, Volume]:
    """A combination's labels (X, Y, Z) of a case with rules applied, and the volume they were read from."""
    pred = read_label(workspace.out_of_fold / combination / f"{name}.nii.gz")
    labels = pred.array[0].astype(label_map.dtype)
    clean(labels, label_map, rules, pred.spacing_mm)
    return labels, pred


def _score_rules(
    workspace: Workspace,
    cases: Mapping[str, tuple[Case, str]],
    label_map: LabelMap,
    rules: Sequence[ClassRule],
) -> dict[str, list[float]]:
    """Case -> Dice per class of the labels with rules applied; kept in the cases' records."""
    found = {}
    for name, (case, combination) in cases.items():
        path = workspace.ensemble / "records" / f"{name}.json"
        record = read_case_record(path)
        scores, key = record.setdefault("finished", {}), _rules_key(combination, rules)
        if not rules:
            found[name] = _floats(record["dice"][combination])
            continue
        if key not in scores:
            assert case.label is not None
            labels, _ = _cleaned(workspace, name, combination, label_map, rules)
            dice = score_of(case, labels, read_label(case.label), label_map)
            scores[key] = to_plain(dice)
            write_json(path, record)
        found[name] = _floats(scores[key])
    return found


def _write_finished(
    workspace: Workspace,
    cases: Mapping[str, tuple[Case, str]],
    label_map: LabelMap,
    rules: tuple[ClassRule, ...],
) -> Finished:
    """Write the labels with rules applied to out_of_fold/ensemble/ and measure their surfaces; what is there stays."""
    folder = workspace.out_of_fold / "ensemble"
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if stem_of(path) not in cases:
            path.unlink()
    dice = _score_rules(workspace, cases, label_map, rules)
    finished = Finished(rules=rules, raw={}, dice=dice, nsd={}, calibration={})
    for name, (case, combination) in cases.items():
        path, target = workspace.ensemble / "records" / f"{name}.json", folder / f"{name}.nii.gz"
        record = read_case_record(path)
        key = _rules_key(combination, rules)
        surface = record.setdefault("nsd", {})
        if key not in surface or record.get("in_ensemble") != key or not target.exists():
            labels, pred = _cleaned(workspace, name, combination, label_map, rules)
            with writing(target):
                write_volume(target, labels, pred.grid)
            if key not in surface:
                assert case.label is not None
                label = read_label(case.label)
                scores = nsd_per_class(
                    labels, label.array[0], label_map, label.spacing_mm, TOLERANCE_MM, annotated=case.annotated
                )
                surface[key] = to_plain(scores)
            record["in_ensemble"] = key
            write_json(path, record)
        finished.raw[name] = _floats(record["dice"][combination])
        finished.nsd[name] = _floats(surface[key])
        finished.calibration[name] = record["calibration"].get(combination)
    return finished
