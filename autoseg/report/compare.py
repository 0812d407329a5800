"""Paired comparison of segmenters on the same cases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

FEWEST_PAIRS = 6
"""Under six pairs a two-sided signed-rank test cannot reach p < 0.05 (its least p is 2 / 2^n)."""
ALPHA = 0.05
"""A corrected p below it counts as a difference."""
NUM_BOOTSTRAP = 2000
"""Resamples of the cases for an interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One pair of segmenters."""

    first: str
    second: str
    num: int
    """Cases that both scored."""
    difference: float
    """Mean over the cases of first minus second."""
    low: float
    high: float
    """Ends of its 95 % bootstrap interval, cases drawn whole."""
    wins: int
    """Cases in which the first is better."""
    losses: int
    p: float | None
    """Two-sided, after Holm's correction over all comparisons; None: too few cases."""

    @property
    def words(self) -> str:
        """The finding; a mean and a majority that point different ways are said to."""
        if self.p is None:
            return "too few cases to test"
        if self.p >= ALPHA:
            return "no clear difference"
        by_mean = self.first if self.difference > 0 else self.second
        by_cases = self.first if self.wins > self.losses else self.second
        if by_mean != by_cases:
            return f"mixed: {by_cases} in most cases, {by_mean} on average"
        return f"{by_mean} is better"


def case_means(dice: Mapping[str, Sequence[float | None]]) -> dict[str, float]:
    """Mean over the classes that count of each case's scores; cases where none counts are left out."""
    means = {}
    for name, values in dice.items():
        known = [v for v in values if v is not None and not math.isnan(v)]
        if known:
            means[name] = sum(known) / len(known)
    return means


def compare(
    scores: Mapping[str, Mapping[str, float]], pairs: Sequence[tuple[str, str]], *, seed: int = 0
) -> list[Comparison]:
    """Compare pairs of segmenters by Wilcoxon's signed-rank test.

    Args:
        scores: segmenter -> case -> score.
        pairs: names to compare.
        seed: of the bootstrap.

    Source: Wilcoxon 1945, as Demsar 2006 advises for two methods on the same data; Holm 1979.
    """
    changes, raw = [], []
    for first, second in pairs:
        names = sorted(set(scores[first]) & set(scores[second]))
        if not names:
            continue
        change = np.array([scores[first][n] - scores[second][n] for n in names])
        rng = np.random.default_rng(seed)
        means = change[rng.integers(len(change), size=(NUM_BOOTSTRAP, len(change)))].mean(axis=1)
        low, high = np.percentile(means, [2.5, 97.5])
        raw.append(_signed_rank(change))
        changes.append((first, second, change, float(low), float(high)))
    adjusted = holm(raw)
    return [
        Comparison(
            first=first, second=second, num=len(change), difference=float(change.mean()), low=low, high=high,
            wins=int((change > 0).sum()), losses=int((change < 0).sum()), p=p,
        )
        for (first, second, change, low, high), p in zip(changes, adjusted, strict=True)
    ]  # fmt: skip


def _signed_rank(change: np.ndarray) -> float | None:
    from scipy.stats import wilcoxon

    if len(change) < FEWEST_PAIRS:
        return None
    if not change.any():
        return 1.0
    # Pratt's way with zeros: cases without a difference speak against one.
    return float(wilcoxon(change, zero_method="pratt").pvalue)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction of p values; None stays None and does not count."""
    known = sorted((p, i) for i, p in enumerate(values) if p is not None)
    result: list[float | None] = [None] * len(values)
    highest = 0.0
    for rank, (p, i) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - rank)))
        result[i] = highest
    return result
