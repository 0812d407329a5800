"""What the choices made on out-of-fold cases flatter: they are made again without each fold, and tried on it.

The combination and the rules of postprocessing are chosen by the scores of the very cases they are reported on. Chosen
again by the cases of all folds but one and scored on that one, fold by fold, they give a Dice that no choice has seen.
Which weights a job keeps is still chosen by its own fold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autoseg.data.datalists.cases import Case
from autoseg.ensemble.cleaning import choose_rules
from autoseg.ensemble.combine import Candidate, CaseScore, Choosing
from autoseg.ensemble.labels import OutOfFoldLabels, Speaking
from autoseg.evaluation.scores import DICE
from autoseg.inference.postprocess import ClassRule


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenAgain:
    """Choices made without each fold."""

    combinations: dict[int, str]
    """Fold -> name of the combination chosen by the others."""
    rules: dict[int, tuple[ClassRule, ...]]
    """Fold -> rules chosen by the others."""
    dice: dict[str, list[float]]
    """Case -> Dice per class by what was chosen without its fold."""


def speaking_for(candidate: Candidate, scored: Sequence[CaseScore], cases: Mapping[str, Case]) -> dict[str, Speaking]:
    """Each case that a candidate scores, with the combination that speaks for it."""
    return {c.name: (cases[c.name], candidate.combination(c.fold).name) for c in scored if c.name in candidate.scores}


def choose_again(
    labels: OutOfFoldLabels,
    scored: Sequence[CaseScore],
    cases: Mapping[str, Case],
    choosing: Choosing,
    base: Sequence[ClassRule],
) -> ChosenAgain | None:
    """Choose by all folds but one what speaks for that one, for each fold; None where there is one fold alone.

    Args:
        labels: of the run.
        scored: every case out of fold.
        cases: by name.
        choosing: what decides.
        base: rules of postprocessing that were set.
    """
    folds = sorted({case.fold for case in scored})
    if len(folds) < 2:
        return None
    again = ChosenAgain(combinations={}, rules={}, dice={})
    for fold in folds:
        others = [case for case in scored if case.fold != fold]
        candidate = choosing.choose(choosing.candidates(others)).candidate
        if fold not in candidate.by_fold:
            continue
        rules = tuple(base)
        if choosing.how.postprocess == "auto":
            rules = choose_rules(labels, speaking_for(candidate, others, cases), base, choosing.metric)
        here = candidate.combination(fold).name
        again.combinations[fold], again.rules[fold] = here, rules
        for case in scored:
            if case.fold == fold and here in case.dice:
                again.dice[case.name] = labels.scores((cases[case.name], here), rules, [DICE])[DICE.name]
    return again
