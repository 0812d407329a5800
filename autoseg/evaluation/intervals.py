"""Intervals and tests for scores of cases: whole patients are what is drawn from the world, not their scans.

Every interval and every test of the package is made here. An estimate is linearised: each patient has an influence,
how far the estimate would move without its deviation, and the sum of their squares is the estimate's variance. That
holds alike for a mean over cases, for a mean over classes of means over cases, and for a difference of two means.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
"""Of every interval."""
FEWEST_PAIRS = 6
"""Under six pairs a two-sided signed-rank test cannot reach p < 0.05 (its least p is 2 / 2^n)."""
FEWEST_IN_GROUP = 3
"""Patients under which a group is not tested against the rest: of fewer no spread worth the name is known."""
ALPHA = 0.05
"""A corrected p below it counts as a difference."""

Patients = Sequence[Hashable | None]
"""Patient of each case; None: the case stands alone."""


def num_patients(patients: Patients) -> int:
    """How many there are."""
    return len({*_numbered(patients, len(patients)).tolist()})


# -- intervals


def mean_interval(
    scores: np.ndarray | Sequence[Sequence[float]],
    patients: Patients | None = None,
    *,
    within: tuple[float, float] = (-math.inf, math.inf),
) -> tuple[float, float]:
    """The 95 % interval of a mean over cases, then over classes.

    Student's t with Hall's correction for skewness, since scores pile up below 1 with a tail to the left: of percentile
    bootstrap, BCa, bootstrap-t, t and this, it and bootstrap-t hold at 8, 15 and 40 patients, and it needs no draws
    (`benchmarks/intervals.py`). Patients with several cases are summed up first.

    Args:
        scores: (cases, classes); NaN does not count.
        patients: of each case; None: every case is a patient of its own.
        within: range of the values, to which the ends are cut.

    Returns:
        Low and high; NaN where fewer than two patients count, or where all their values are alike, so that nothing
        says how much others would differ.

    Source: Hall 1992, On the Removal of Skewness by Transformation; the variance is Bell and McCaffrey's 2002 (CR2) for
    a mean, degrees of freedom from Kish's effective number of patients.
    """
    values = np.asarray(scores, float)
    if values.ndim != 2 or not values.size:
        return math.nan, math.nan
    theta, influence, leverage = _influences(values, _numbered(patients, len(values)))
    return _interval(theta, [(influence, leverage)], within)


def _numbered(patients: Patients | None, num: int) -> np.ndarray:
    """(N,) number of each case's patient, from 0."""
    if patients is None:
        return np.arange(num)
    keys: dict[Hashable, int] = {}
    alone = [("case", i) if p is None else ("patient", p) for i, p in enumerate(patients)]
    return np.array([keys.setdefault(key, len(keys)) for key in alone])


def _influences(values: np.ndarray, patient: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """The mean over classes of means over cases, and each patient's influence on it and share of its weight."""
    counts = ~np.isnan(values)
    num = counts.sum(axis=0)
    counted = num > 0
    if not counted.any():
        return math.nan, np.zeros(0), np.zeros(0)
    values, counts, num = values[:, counted], counts[:, counted], num[counted]
    known = np.where(counts, values, 0.0)
    means = known.sum(axis=0) / num
    of_case = (np.where(counts, values - means, 0.0) / num).mean(axis=1)
    weight = (counts / num).mean(axis=1)
    influence = np.bincount(patient, of_case)
    leverage = np.bincount(patient, weight)
    present = leverage > 0
    return float(means.mean()), influence[present], leverage[present]


def _interval(
    theta: float, sides: Sequence[tuple[np.ndarray, np.ndarray]], within: tuple[float, float]
) -> tuple[float, float]:
    """The interval of an estimate from the influences and shares of weight of one or two independent samples."""
    variances, spare = [], []
    for influence, leverage in sides:
        if len(influence) < 2:
            return math.nan, math.nan
        # An influence is measured against a mean that the patient is part of, which makes it too small.
        variances.append(float((influence**2 / np.maximum(1 - leverage, 1e-12)).sum()))
        spare.append(float(1 / (leverage**2).sum() - 1))
    variance = sum(variances)
    pooled = np.concatenate([influence for influence, _ in sides])
    if not variance > (1e-9 * max(1.0, abs(theta))) ** 2:
        return math.nan, math.nan
    freedom = variance**2 / sum(v**2 / s for v, s in zip(variances, spare, strict=True))
    skewness = float((pooled**3).sum() / (pooled**2).sum() ** 1.5)
    error = math.sqrt(variance)
    quantile = _student(freedom)
    ends = theta - error * _unskewed(quantile, skewness), theta - error * _unskewed(-quantile, skewness)
    return max(within[0], ends[0]), min(within[1], ends[1])


def _student(freedom: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + LEVEL) / 2))


def _unskewed(quantile: float, skewness: float) -> float:
    """Hall's third transformation, turned around: the quantile of t where the mean has a skewness."""
    if abs(skewness) < 1e-6:
        return quantile
    return float(3 / skewness * (np.cbrt(1 + skewness * (quantile - skewness / 6)) - 1))


# -- the same cases by two segmenters


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedTest:
    """One pair of segmenters."""

    first: str
    second: str
    num: int
    """Cases that both scored."""
    difference: float
    """Mean over the cases of first minus second."""
    low: float
    high: float
    """Ends of its 95 % interval; NaN where it is not known."""
    wins: int
    """Cases in which the first is better."""
    losses: int
    p: float | None
    """Two-sided, after Holm's correction over all comparisons; None: too few patients."""

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


def case_means(scores: Mapping[str, Sequence[float | None]]) -> dict[str, float]:
    """Mean over the classes that count of each case's scores; cases where none counts are left out."""
    means = {}
    for name, values in scores.items():
        known = [v for v in values if v is not None and not math.isnan(v)]
        if known:
            means[name] = sum(known) / len(known)
    return means


def compare(
    scores: Mapping[str, Mapping[str, float]],
    pairs: Sequence[tuple[str, str]],
    patient_of: Mapping[str, Hashable] | None = None,
) -> list[PairedTest]:
    """Compare pairs of segmenters by Wilcoxon's signed-rank test on patients.

    A patient with several cases takes part with the mean of its differences.

    Args:
        scores: segmenter -> case -> score.
        pairs: names to compare.
        patient_of: case -> patient; a case that is not there stands alone.

    Source: Wilcoxon 1945, as Demsar 2006 advises for two methods on the same data; Holm 1979.
    """
    changes, raw = [], []
    for first, second in pairs:
        names = sorted(set(scores[first]) & set(scores[second]))
        if not names:
            continue
        change = np.array([scores[first][n] - scores[second][n] for n in names])
        patients = [(patient_of or {}).get(n) for n in names]
        number = _numbered(patients, len(names))
        raw.append(_signed_rank(np.bincount(number, change) / np.bincount(number)))
        changes.append((first, second, change, *mean_interval(change[:, None], patients)))
    adjusted = holm(raw)
    return [
        PairedTest(
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


# -- a group of cases and the rest


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How a group of cases differs from the rest."""

    difference: float
    """Mean of the group minus that of the rest; NaN where either is empty."""
    low: float
    high: float
    """Ends of its 95 % interval; NaN where it is not known."""
    p: float | None
    """Two-sided, not yet corrected; None: fewer than `FEWEST_IN_GROUP` patients on a side."""


def difference_to_rest(
    values: np.ndarray | Sequence[float] | Sequence[Sequence[float]],
    inside: Sequence[bool],
    patients: Patients | None = None,
) -> Difference:
    """Compare a group of cases with all others.

    The test is by ranks, of patients' mean scores: with the long tails that scores have, a t test finds differences
    that are not there up to six times too often, and permuting means hardly finds those that are
    (docs/results.md). Where patients have cases on both sides, their own differences are tested, and the
    other patients leave the test.

    Args:
        values: a score for each case; or (cases, classes), NaN where not counted: then the difference is that of the
            means over classes of means over cases, of the classes that count on both sides, and the test is of cases'
            mean deviations from the means of their classes.
        inside: whether a case is of the group.
        patients: of each case; None: every case is a patient of its own.

    Source: Mann and Whitney 1947; Wilcoxon 1945 for patients on both sides.
    """
    scores, group = np.asarray(values, float), np.asarray(inside, bool)
    scores = scores[:, None] if scores.ndim == 1 else scores
    counts = ~np.isnan(scores)
    scores = scores[:, counts[group].any(axis=0) & counts[~group].any(axis=0)]
    known = ~np.isnan(scores).all(axis=1)
    patient = _numbered(patients, len(scores))
    scores, group, patient = scores[known], group[known], patient[known]
    if not group.any() or group.all():
        return Difference(difference=math.nan, low=math.nan, high=math.nan, p=None)
    of_case = np.nanmean(scores - np.nanmean(scores, axis=0), axis=1)
    thetas, sides, means = [], [], []
    for side, sign in ((group, 1), (~group, -1)):
        theta, influence, leverage = _influences(scores[side], patient[side])
        thetas.append(theta)
        sides.append((sign * influence, leverage))
        num = np.bincount(patient[side], minlength=patient.max() + 1)
        means.append(np.bincount(patient[side], of_case[side], minlength=len(num)) / np.where(num, num, np.nan))
    difference = thetas[0] - thetas[1]
    low, high = _interval(difference, sides, (-math.inf, math.inf))
    return Difference(difference=difference, low=low, high=high, p=_rank_test(means[0], means[1]))


def _rank_test(first: np.ndarray, second: np.ndarray) -> float | None:
    """Of patients' means on two sides, NaN where a patient has no case there."""
    from scipy.stats import mannwhitneyu

    both = ~np.isnan(first) & ~np.isnan(second)
    if both.any():
        return _signed_rank(first[both] - second[both])
    first, second = (of_side[~np.isnan(of_side)] for of_side in (first, second))
    if min(len(first), len(second)) < FEWEST_IN_GROUP:
        return None
    return float(mannwhitneyu(first, second).pvalue)
