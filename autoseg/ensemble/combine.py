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

from autoseg.config.settings import EnsembleSettings
from autoseg.config.units import parse_duration, parse_size
from autoseg.errors import WorkspaceError
from autoseg.evaluation.metrics import mean_score
from autoseg.evaluation.scores import Metric
from autoseg.inference.ensemble_spec import ParetoRow
from autoseg.inference.predictor import Combine


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCost:
    """What one model took for a case."""

    seconds: float
    """In the network."""
    weights: int
    """Bytes."""
    window: int
    """Bytes of one pass, with as many windows as go through together."""
    rows: int
    """Bytes beside a slab."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseCost:
    """What a case took; or an image of a data set, over the cases that were scored."""

    rest_s: float
    """Seconds outside the networks, for each algorithm."""
    base: int
    """Bytes of the process and of the image; 0 on a GPU, whose memory is counted alone."""
    models: Mapping[str, ModelCost]
    """By algorithm."""

    def of(self, members: Sequence[tuple[str, int]]) -> tuple[float, float]:
        """Seconds and GB of an ensemble."""
        algos = {algo for algo, _ in members}
        seconds = self.rest_s * len(algos) + sum(self.models[algo].seconds for algo, _ in members)
        weights = sum(self.models[algo].weights for algo, _ in members)
        rows = sum(self.models[algo].rows for algo in algos)
        window = max((self.models[algo].window for algo in algos), default=0)
        return seconds, (self.base + weights + rows + window) / 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseScore:
    """Dice of one case it was not trained on, by each combination of its fold's algorithms."""

    name: str
    fold: int
    dice: Mapping[str, Sequence[float]]
    """Name of the combination -> Dice per class, NaN where not counted."""
    selected: Mapping[str, Sequence[float]] | None = None
    """The same by the metric that decides; None where that is Dice."""
    cost: CaseCost | None = None
    """What its fold's models took."""
    group: str | None = None
    """Patient; None: the case stands alone."""

    @property
    def deciding(self) -> Mapping[str, Sequence[float]]:
        """Scores by the metric that decides."""
        return self.dice if self.selected is None else self.selected


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
    selected: Mapping[str, Sequence[float]] | None = None
    """The same by the metric that decides; None where that is Dice."""
    higher_is_better: bool = True
    """By that metric."""

    @property
    def mean(self) -> float:
        """Out-of-fold mean Dice."""
        return mean_score(list(self.scores.values()))

    @property
    def selected_mean(self) -> float:
        """Out-of-fold mean of the metric that decides."""
        return self.mean if self.selected is None else mean_score(list(self.selected.values()))

    @property
    def rank(self) -> float:
        """The higher, the better; candidates without a score come last."""
        mean = self.selected_mean
        return -math.inf if math.isnan(mean) else mean if self.higher_is_better else -mean

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
    listed = [Combination(algos=(algo,)) for algo in algos]
    for num in range(2, len(algos) + 1):
        for chosen in combinations(algos, num):
            if combine != "vote":
                listed.append(Combination(algos=chosen))
            if combine == "vote" or (combine == "auto" and num > 2):
                listed.append(Combination(algos=chosen, combine="vote"))
    return tuple(listed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choosing:
    """All that decides besides the scores."""

    how: EnsembleSettings
    metric: Metric
    """`how.select_by`."""
    algos_by_fold: Mapping[int, Sequence[str]]
    """Fold -> algorithms trained for it."""
    costs: CaseCost | None
    """What an image takes; None where nothing was measured."""

    def candidates(self, cases: Sequence[CaseScore]) -> list[Candidate]:
        """Every candidate with its scores of some cases."""
        return candidates(cases, self.algos_by_fold, self.how, higher_is_better=self.metric.higher_is_better)

    def choose(self, entrants: Sequence[Candidate]) -> Chosen:
        """Choose one within the budgets: see `choose`."""
        return choose(
            entrants,
            self.how,
            self.costs,
            max_s=parse_duration(self.how.max_time) if self.how.max_time else None,
            max_gb=parse_size(self.how.max_memory) / 1e9 if self.how.max_memory else None,
        )


def candidates(
    cases: Sequence[CaseScore],
    algos_by_fold: Mapping[int, Sequence[str]],
    settings: EnsembleSettings,
    *,
    higher_is_better: bool = True,
) -> list[Candidate]:
    """Make every candidate and look up its scores.

    Args:
        cases: as scored; each has the scores of `combinations_of` its fold's algorithms.
        algos_by_fold: fold -> algorithms trained for it.
        higher_is_better: by the metric that decides.

    Returns:
        Combinations first, each with the algorithms it has in a fold; then best_by_fold and best_n.
    """
    algos = sorted({a for available in algos_by_fold.values() for a in available})
    entrants = []
    for wanted in combinations_of(algos, settings.combine):
        by_fold = {f: tuple(a for a in wanted.algos if a in available) for f, available in algos_by_fold.items()}
        entrants.append(_candidate(wanted.name, wanted.combine, by_fold, cases, higher_is_better))

    def best(num: int) -> dict[int, tuple[str, ...]]:
        return _best(cases, algos_by_fold, num, higher_is_better)

    if len(algos) > 1:
        combine: Combine = "vote" if settings.combine == "vote" else "mean"
        entrants.append(_candidate("best_by_fold", combine, best(1), cases, higher_is_better))
        if 1 < settings.num_best < len(algos) or settings.method == "best_n":
            by_fold = best(settings.num_best)
            entrants.append(_candidate(f"best_{settings.num_best}", combine, by_fold, cases, higher_is_better))
    return entrants


def _candidate(
    name: str,
    combine: Combine,
    by_fold: Mapping[int, tuple[str, ...]],
    cases: Sequence[CaseScore],
    higher_is_better: bool,
) -> Candidate:
    scores: dict[str, Sequence[float]] = {}
    selected: dict[str, Sequence[float]] = {}
    for case in cases:
        here = Combination(algos=by_fold.get(case.fold, ()), combine=combine).name
        if here in case.dice:
            scores[case.name] = case.dice[here]
            selected[case.name] = case.deciding[here]
    return Candidate(
        name=name,
        combine=combine,
        by_fold={f: a for f, a in by_fold.items() if a},
        scores=scores,
        selected=None if all(case.selected is None for case in cases) else selected,
        higher_is_better=higher_is_better,
    )


def _best(
    cases: Sequence[CaseScore], algos_by_fold: Mapping[int, Sequence[str]], num: int, higher_is_better: bool
) -> dict[int, tuple[str, ...]]:
    """The `num` algorithms with the best mean of each fold; of a fold without cases, those with the best of all."""
    best = {}
    for fold, algos in algos_by_fold.items():
        of_fold = [case for case in cases if case.fold == fold] or cases
        means = {a: mean_score([case.deciding[a] for case in of_fold if a in case.dice]) for a in algos}
        ranks = {a: -math.inf if math.isnan(m) else m if higher_is_better else -m for a, m in means.items()}
        ranked = sorted(algos, key=lambda a: (ranks[a], a), reverse=True)
        best[fold] = tuple(sorted(ranked[:num]))
    return best


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The candidate that was chosen, and which of its models are kept."""

    candidate: Candidate
    members: tuple[tuple[str, int], ...]
    """All of the candidate's, or those of the first folds where a budget allows no more."""
    given_up: str
    """What a budget cost, in words; empty where nothing."""


def costs_of(cases: Sequence[CaseScore]) -> CaseCost | None:
    """The mean time and the most memory over cases; None where none was measured."""
    known = [case.cost for case in cases if case.cost is not None]
    if not known:
        return None
    models = {}
    for algo in sorted({a for cost in known for a in cost.models}):
        measured = [cost.models[algo] for cost in known if algo in cost.models]
        models[algo] = ModelCost(
            seconds=sum(m.seconds for m in measured) / len(measured),
            weights=max(m.weights for m in measured),
            window=max(m.window for m in measured),
            rows=max(m.rows for m in measured),
        )
    return CaseCost(rest_s=sum(c.rest_s for c in known) / len(known), base=max(c.base for c in known), models=models)


def pareto_rows(entrants: Sequence[Candidate], costs: CaseCost | None) -> tuple[ParetoRow, ...]:
    """Every candidate with its cost, the best Dice first; none where nothing was measured."""
    if costs is None:
        return ()
    entries = [(c, c.mean, *costs.of(c.members)) for c in entrants]

    def beaten(one: tuple[Candidate, float, float, float], other: tuple[Candidate, float, float, float]) -> bool:
        pairs = [(-one[1], -other[1]), (one[2], other[2]), (one[3], other[3])]
        return all(b <= a for a, b in pairs) and any(b < a for a, b in pairs)

    rows = [
        ParetoRow(
            name=entry[0].name,
            dice=None if math.isnan(entry[1]) else round(entry[1], 6),
            seconds=round(entry[2], 3),
            gb=round(entry[3], 3),
            models=len(entry[0].members),
            on_front=not math.isnan(entry[1]) and not any(beaten(entry, other) for other in entries),
        )
        for entry in entries
    ]
    return tuple(sorted(rows, key=lambda row: -1.0 if row.dice is None else row.dice, reverse=True))


def choose(
    entrants: Sequence[Candidate],
    settings: EnsembleSettings,
    costs: CaseCost | None = None,
    *,
    max_s: float | None = None,
    max_gb: float | None = None,
) -> Chosen:
    """Choose a candidate as the settings say.

    auto: of the combinations that score the most cases the one with the best mean of `select_by`, single algorithms
    included; in a tie the one with fewer models. best_by_fold and best_n pick their members on the very cases
    they are scored on, which flatters them, so they are chosen only where asked for.

    With a budget, only what keeps to it; a combination whose models of all folds are too many is taken with those of
    the first folds, since its score is of one fold's models anyway. Where nothing keeps to it, the cheapest.

    Raises:
        WorkspaceError: There is no candidate.
    """
    if not entrants:
        raise WorkspaceError("no trained job to make an ensemble of. Run `autoseg train`, and see `autoseg status`.")
    name = {"best_by_fold": "best_by_fold", "best_n": f"best_{settings.num_best}"}.get(settings.method)
    if name is not None:
        # One algorithm alone is the best of each fold.
        able = [next((c for c in entrants if c.name == name), entrants[0])]
    else:
        fixed = [c for c in entrants if not c.name.startswith("best_")]
        most = max(len(c.scores) for c in fixed)
        able = [c for c in fixed if len(c.scores) == most]
    able.sort(key=lambda c: (c.rank, -len(c.members)), reverse=True)
    if costs is None or (max_s is None and max_gb is None):
        return Chosen(candidate=able[0], members=able[0].members, given_up="")

    def fits(members: Sequence[tuple[str, int]]) -> bool:
        seconds, gb = costs.of(members)
        return (max_s is None or seconds <= max_s) and (max_gb is None or gb <= max_gb)

    for candidate in able:
        folds = sorted(candidate.by_fold)
        for num in range(len(folds), 0, -1):
            members = tuple(m for m in candidate.members if m[1] in folds[:num])
            if fits(members):
                return Chosen(candidate=candidate, members=members, given_up=_given_up(able[0], candidate, members))
    cheapest = min(able, key=lambda c: costs.of(c.members))
    members = tuple(m for m in cheapest.members if m[1] == min(cheapest.by_fold))
    seconds, gb = costs.of(members)
    words = (
        f"nothing keeps to the budget; the cheapest, one fold of {cheapest.name}, takes {seconds:.1f} s and {gb:.2f} GB"
    )
    return Chosen(candidate=cheapest, members=members, given_up=words)


def _given_up(best: Candidate, chosen: Candidate, members: Sequence[tuple[str, int]]) -> str:
    words = []
    if chosen is not best:
        words.append(f"{best.name} with a Dice of {best.mean:.4f}, which does not keep to the budget")
    if len(members) < len(chosen.members):
        words.append(f"{len(chosen.members) - len(members)} of the {len(chosen.members)} models of {chosen.name}")
    return "; ".join(words)
