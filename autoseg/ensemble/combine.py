"""Choosing what to combine, by out-of-fold scores; pure functions of the scores.

A combination is a set of algorithms, merged by mean or vote. A candidate says which algorithms speak in each
fold: one combination in all folds (with gaps where a job failed), or the best few of each fold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from autoseg.config import EnsembleSettings, Strict
from autoseg.errors import WorkspaceError
from autoseg.inference.metrics import mean_score
from autoseg.inference.predictor import Combine


class EnsembleSpec(Strict):
    """The chosen ensemble, as it stands in `ensemble.json`."""

    name: str
    """The candidate's name, such as segresnet+swinunetr."""
    method: Literal["auto", "best_by_fold", "best_n"]
    """How it was chosen."""
    combine: Combine
    """Mean of the probabilities, or vote."""
    members: tuple[tuple[str, int], ...]
    """Algorithm and fold of each model; the job's folder is <algorithm>_<fold>."""
    classes: tuple[str, ...]
    """Foreground classes."""
    dice: float | None
    """Out-of-fold mean Dice; null where nothing could be scored."""
    version: str
    """Version of autoseg that chose it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseScore:
    """Dice of one case it was not trained on, by each combination of its fold's algorithms."""

    name: str
    fold: int
    dice: Mapping[str, Sequence[float]]
    """Name of the combination -> Dice per class, NaN where not counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """Algorithms merged within one fold."""

    algos: tuple[str, ...]
    combine: Combine = "mean"

    @property
    def name(self) -> str:
        """Its name, in tables and as a folder; one algorithm alone has its own."""
        vote = "_vote" if self.combine == "vote" and len(self.algos) > 1 else ""
        return "+".join(self.algos) + vote


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An ensemble that may be chosen."""

    name: str
    combine: Combine
    by_fold: Mapping[int, tuple[str, ...]]
    """Fold -> algorithms whose models of that fold take part."""
    scores: Mapping[str, Sequence[float]]
    """Case -> Dice per class, for every case that could be scored."""

    @property
    def mean(self) -> float:
        """Out-of-fold mean Dice."""
        return mean_score(list(self.scores.values()))

    @property
    def members(self) -> tuple[tuple[str, int], ...]:
        """Algorithm and fold of each model."""
        return tuple((algo, fold) for fold in sorted(self.by_fold) for algo in self.by_fold[fold])

    def combination(self, fold: int) -> Combination:
        """What speaks in one fold."""
        return Combination(algos=self.by_fold[fold], combine=self.combine)


def combinations_of(algos: Sequence[str], combine: Literal["auto", "mean", "vote"]) -> tuple[Combination, ...]:
    """Every combination to score: each algorithm, every set of them as a mean, as a vote, or both.

    A vote of two says what the first one says, so it is scored only where votes were asked for.
    """
    found = [Combination(algos=(algo,)) for algo in algos]
    for num in range(2, len(algos) + 1):
        for chosen in combinations(algos, num):
            if combine != "vote":
                found.append(Combination(algos=chosen))
            if combine == "vote" or (combine == "auto" and num > 2):
                found.append(Combination(algos=chosen, combine="vote"))
    return tuple(found)


def candidates(
    cases: Sequence[CaseScore], algos_by_fold: Mapping[int, Sequence[str]], settings: EnsembleSettings
) -> list[Candidate]:
    """Make every candidate and look up its scores.

    Args:
        cases: as scored; each has the scores of `combinations_of` its fold's algorithms.
        algos_by_fold: fold -> algorithms trained for it.

    Returns:
        Combinations first, each with the algorithms it has in a fold; then best_by_fold and best_n.
    """
    algos = sorted({a for found in algos_by_fold.values() for a in found})
    made = []
    for wanted in combinations_of(algos, settings.combine):
        by_fold = {f: tuple(a for a in wanted.algos if a in found) for f, found in algos_by_fold.items()}
        made.append(_candidate(wanted.name, wanted.combine, by_fold, cases))
    if len(algos) > 1:
        combine: Combine = "vote" if settings.combine == "vote" else "mean"
        made.append(_candidate("best_by_fold", combine, _best(cases, algos_by_fold, 1), cases))
        if 1 < settings.num_best < len(algos) or settings.method == "best_n":
            by_fold = _best(cases, algos_by_fold, settings.num_best)
            made.append(_candidate(f"best_{settings.num_best}", combine, by_fold, cases))
    return made


def _candidate(
    name: str, combine: Combine, by_fold: Mapping[int, tuple[str, ...]], cases: Sequence[CaseScore]
) -> Candidate:
    scores = {}
    for case in cases:
        here = Combination(algos=by_fold.get(case.fold, ()), combine=combine).name
        if here in case.dice:
            scores[case.name] = case.dice[here]
    return Candidate(name=name, combine=combine, by_fold={f: a for f, a in by_fold.items() if a}, scores=scores)


def _best(
    cases: Sequence[CaseScore], algos_by_fold: Mapping[int, Sequence[str]], num: int
) -> dict[int, tuple[str, ...]]:
    """The `num` algorithms with the highest mean Dice of each fold."""
    best = {}
    for fold, algos in algos_by_fold.items():
        mine = [case for case in cases if case.fold == fold]
        means = {a: mean_score([case.dice[a] for case in mine if a in case.dice]) for a in algos}
        ranked = sorted(algos, key=lambda a: (-1.0 if math.isnan(means[a]) else means[a], a), reverse=True)
        best[fold] = tuple(sorted(ranked[:num]))
    return best


def choose(made: Sequence[Candidate], settings: EnsembleSettings) -> Candidate:
    """Choose a candidate as the settings say.

    auto: of the combinations that score the most cases the one with the highest mean Dice, single algorithms
    included; in a tie the one with fewer models. best_by_fold and best_n pick their members on the very cases
    they are scored on, which flatters them, so they are chosen only where asked for.

    Raises:
        WorkspaceError: There is no candidate.
    """
    if not made:
        raise WorkspaceError("no trained job to make an ensemble of. Run `autoseg train`, and see `autoseg status`.")
    name = {"best_by_fold": "best_by_fold", "best_n": f"best_{settings.num_best}"}.get(settings.method)
    if name is not None:
        return next((c for c in made if c.name == name), made[0])  # one algorithm alone is the best of each fold
    fixed = [c for c in made if not c.name.startswith("best_")]
    most = max(len(c.scores) for c in fixed)
    full = [c for c in fixed if len(c.scores) == most]
    return max(full, key=lambda c: (-1.0 if math.isnan(c.mean) else c.mean, -len(c.members)))
