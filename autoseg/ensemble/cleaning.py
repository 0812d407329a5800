"""The choice of postprocessing by out-of-fold scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autoseg.ensemble.labels import OutOfFoldLabels, Speaking
from autoseg.evaluation.metrics import class_means
from autoseg.evaluation.scores import DICE, Metric
from autoseg.inference.postprocess import ClassRule, gains, propose, sure_gain


def choose_rules(
    labels: OutOfFoldLabels, cases: Mapping[str, Speaking], base: Sequence[ClassRule], metric: Metric
) -> tuple[ClassRule, ...]:
    """The rules that were set with those whose gain is sure.

    Each class is tried alone first; then all that gained together, and one that did not gain after all, since rules
    meet, is left out again.

    Args:
        labels: of the run.
        cases: name -> the case, and the combination that speaks for it; those to choose by.
        base: rules that were set; they come first.
        metric: that decides.
    """
    names = labels.label_map.names
    patients = [case.group for case, _ in cases.values()]
    tried = [labels.option_scores(speaking, base, metric) for speaking in cases.values()]
    proposed = propose(names, tried, patients=patients, higher_is_better=metric.higher_is_better)
    if not proposed:
        return tuple(base)
    plain = [*labels.mean_scores(cases, base, metric).values()]
    while proposed:
        rules = joined(names, base, proposed)
        cleaned = [*labels.mean_scores(cases, rules, metric).values()]
        gain = {
            name: sure_gain(
                gains([row[i] for row in plain], [row[i] for row in cleaned], metric.higher_is_better), patients
            )
            for i, name in enumerate(names)
            if name in proposed
        }
        lost = [name for name in proposed if not gain[name][1] > 0]
        if not lost:
            return _measured(labels, cases, base, rules, gain)
        proposed = {name: rule for name, rule in proposed.items() if name not in lost}
    return tuple(base)


def _measured(
    labels: OutOfFoldLabels,
    cases: Mapping[str, Speaking],
    base: Sequence[ClassRule],
    rules: Sequence[ClassRule],
    gain: Mapping[str, tuple[float, float]],
) -> tuple[ClassRule, ...]:
    """Rules with what they came to; those that were set as they are."""
    names = labels.label_map.names
    before = dict(zip(names, class_means([*labels.mean_scores(cases, base, DICE).values()]), strict=True))
    after = dict(zip(names, class_means([*labels.mean_scores(cases, rules, DICE).values()]), strict=True))
    return tuple(
        rule.model_copy(
            update={
                "dice_before": round(before[rule.name], 6),
                "dice_after": round(after[rule.name], 6),
                "gain": round(gain[rule.name][0], 6),
                "gain_low": round(gain[rule.name][1], 6),
            }
        )
        if rule.name in gain
        else rule
        for rule in rules
    )


def joined(names: Sequence[str], base: Sequence[ClassRule], proposed: Mapping[str, ClassRule]) -> tuple[ClassRule, ...]:
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
