"""The chosen ensemble's out-of-fold labels as they are handed out: postprocessing chosen by evidence, then scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autoseg.data.datalists.cases import Case, read_case_label
from autoseg.data.formats.table import stem_of
from autoseg.data.grid import Volume
from autoseg.data.labels import LabelMap
from autoseg.data.volumes import read_label, write_volume
from autoseg.ensemble.out_of_fold import floats, score_of
from autoseg.ensemble.records import read_case_record
from autoseg.evaluation.metrics import class_means, to_plain
from autoseg.evaluation.scores import DICE, METRICS, Comparison
from autoseg.inference.files import writing
from autoseg.inference.postprocess import LEAST_GAIN, ClassRule, clean, measure_parts, propose
from autoseg.workspace.files import digest, write_json
from autoseg.workspace.workspace import Workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The chosen ensemble's out-of-fold labels as they will be handed out."""

    rules: tuple[ClassRule, ...]
    """What is done to them."""
    raw: dict[str, list[float]]
    """Case -> Dice per class before that, NaN where not counted."""
    scores: dict[str, dict[str, list[float]]]
    """Metric -> case -> value per class, NaN where not counted."""
    calibration: dict[str, Any]
    """Case -> counts; None for a vote."""

    @property
    def dice(self) -> dict[str, list[float]]:
        """Case -> Dice per class."""
        return self.scores[DICE.name]


def finish_out_of_fold(
    workspace: Workspace,
    cases: Mapping[str, tuple[Case, str]],
    label_map: LabelMap,
    *,
    base: Sequence[ClassRule],
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
    plain = _score_rules(workspace, cases, label_map, base)
    proposed: dict[str, ClassRule] = {}
    if choose_rules:
        parts = [_parts_of(workspace, name, *key, label_map, base) for name, key in cases.items()]
        proposed = propose(label_map.names, parts)
    rules = tuple(base)
    while proposed:
        rules = _joined(label_map.names, base, proposed)
        tried = _score_rules(workspace, cases, label_map, rules)
        before, after = (class_means([*scores.values()]) for scores in (plain, tried))
        gain = {n: (b, a) for n, b, a in zip(label_map.names, before, after, strict=True)}
        if lost := [n for n in proposed if not gain[n][1] > gain[n][0] + LEAST_GAIN]:
            proposed = {n: rule for n, rule in proposed.items() if n not in lost}
            rules = tuple(base)
            continue
        rules = tuple(_with_gain(rule, *gain[rule.name]) if rule.name in proposed else rule for rule in rules)
        break
    return _write_finished(workspace, cases, label_map, rules)


def _with_gain(rule: ClassRule, before: float, after: float) -> ClassRule:
    return rule.model_copy(update={"dice_before": round(before, 6), "dice_after": round(after, 6)})


def _joined(
    names: Sequence[str], base: Sequence[ClassRule], proposed: Mapping[str, ClassRule]
) -> tuple[ClassRule, ...]:
    """The rules that were set with those that were chosen, one for a class."""
    by_name = {rule.name: rule for rule in base}
    rules = []
    for name in names:
        if name in proposed:
            plain = by_name.get(name, ClassRule(name=name))
            chosen = proposed[name].model_dump(include={"largest", "min_mm3", "fill_holes"})
            rules.append(plain.model_copy(update=chosen))
        elif name in by_name:
            rules.append(by_name[name])
    return tuple(rules)


def _parts_of(
    workspace: Workspace,
    name: str,
    case: Case,
    combination: str,
    label_map: LabelMap,
    base: Sequence[ClassRule],
) -> list[dict[str, Any] | None]:
    """Sizes of a prediction's parts, None for classes that do not count; kept in the case's record."""
    path = workspace.ensemble / "records" / f"{name}.json"
    record = read_case_record(path)
    key = _rules_key(combination, base)
    if key not in record.setdefault("parts", {}):
        label = read_case_label(case)
        pred, _ = _cleaned(workspace, name, combination, label_map, base)
        counts = label_map.names if case.annotated is None else case.annotated
        parts = measure_parts(pred, label.array[0], label_map, label.spacing_mm)
        record["parts"][key] = [p if n in counts else None for n, p in zip(label_map.names, parts, strict=True)]
        write_json(path, record)
    measured: list[dict[str, Any] | None] = record["parts"][key]
    return measured


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
    scored = {}
    for name, (case, combination) in cases.items():
        path = workspace.ensemble / "records" / f"{name}.json"
        record = read_case_record(path)
        scores, key = record.setdefault("finished", {}), _rules_key(combination, rules)
        if not rules:
            scored[name] = floats(record["dice"][combination])
            continue
        if key not in scores:
            labels, _ = _cleaned(workspace, name, combination, label_map, rules)
            dice = score_of(case, labels, read_case_label(case), label_map)
            scores[key] = to_plain(dice)
            write_json(path, record)
        scored[name] = floats(scores[key])
    return scored


def _write_finished(
    workspace: Workspace,
    cases: Mapping[str, tuple[Case, str]],
    label_map: LabelMap,
    rules: tuple[ClassRule, ...],
) -> Finished:
    """Write the labels with rules applied to out_of_fold/ensemble/ and measure them; what is there stays."""
    folder = workspace.out_of_fold / "ensemble"
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if stem_of(path) not in cases:
            path.unlink()
    dice = _score_rules(workspace, cases, label_map, rules)
    scores: dict[str, dict[str, list[float]]] = {metric.name: {} for metric in METRICS}
    finished = Finished(rules=rules, raw={}, scores={**scores, DICE.name: dice}, calibration={})
    for name, (case, combination) in cases.items():
        path, target = workspace.ensemble / "records" / f"{name}.json", folder / f"{name}.nii.gz"
        record = read_case_record(path)
        key = _rules_key(combination, rules)
        # Dice is known from the choice of rules; the others are kept in the record, each under its name.
        stored = {metric.name: record.setdefault(metric.name, {}) for metric in METRICS if metric is not DICE}
        lacking = [metric for metric in METRICS if metric is not DICE and key not in stored[metric.name]]
        if lacking or record.get("in_ensemble") != key or not target.exists():
            labels, pred = _cleaned(workspace, name, combination, label_map, rules)
            with writing(target):
                write_volume(target, labels, pred.grid)
            if lacking:
                label = read_case_label(case)
                comparison = Comparison(
                    pred=labels,
                    label=label.array[0],
                    label_map=label_map,
                    spacing_mm=label.spacing_mm,
                    annotated=case.annotated,
                )
                for metric in lacking:
                    stored[metric.name][key] = to_plain(metric.score(comparison))
            record["in_ensemble"] = key
            write_json(path, record)
        finished.raw[name] = floats(record["dice"][combination])
        for metric_name, by_rules in stored.items():
            finished.scores[metric_name][name] = floats(by_rules[key])
        finished.calibration[name] = record["calibration"].get(combination)
    return finished
