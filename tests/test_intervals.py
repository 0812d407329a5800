"""Intervals cover, tests respect patients and find what is there alone: by simulation and by closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from autoseg.evaluation.intervals import compare, difference_to_rest, holm, mean_interval
from autoseg.evaluation.metrics import summarise

GRID = np.linspace(-5, 5, 2001)
QUANTILES = stats.beta.ppf(stats.norm.cdf(GRID), 18, 2)
"""Scores with a tail to the left, as Dice has, of latent normal values."""


def covered(sizes: tuple[int, ...], shared: float, repeats: int = 1500) -> float:
    """How often the interval of the mean holds the truth; scores are Beta(18, 2), patients share a part."""
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(len(sizes)), sizes)
    hits = 0
    for _ in range(repeats):
        latent = math.sqrt(shared) * rng.standard_normal(len(sizes))[patient]
        latent = latent + math.sqrt(1 - shared) * rng.standard_normal(len(patient))
        values = np.interp(latent, GRID, QUANTILES)
        low, high = mean_interval(values[:, None], patient.tolist(), within=(0.0, 1.0))
        hits += low <= 0.9 <= high
    return hits / repeats


@pytest.mark.parametrize(
    ("sizes", "shared"),
    [((5,) * 40, 0.9), ((1,) * 15, 0.0), ((1,) * 8, 0.0), (tuple(range(1, 11)) * 2, 0.9)],
    ids=["40 patients of 5", "15 cases", "8 cases", "unequal patients"],
)
def test_intervals_cover(sizes: tuple[int, ...], shared: float) -> None:
    assert 0.93 <= covered(sizes, shared) <= 0.98


def test_symmetric_scores_have_student_s_interval() -> None:
    values = np.array([0.7, 0.8, 0.9, 0.75, 0.85])
    expected = stats.t.interval(0.95, 4, values.mean(), values.std(ddof=1) / math.sqrt(5))
    assert mean_interval(values[:, None]) == pytest.approx(expected)


def test_scans_of_one_patient_add_nothing_when_they_are_alike() -> None:
    values = np.random.default_rng(1).beta(5, 2, 12)
    repeated = np.repeat(values, 5)[:, None]
    patients = [f"p{i // 5}" for i in range(60)]
    assert mean_interval(repeated, patients) == pytest.approx(mean_interval(values[:, None]))
    wrong = mean_interval(repeated)
    right = mean_interval(repeated, patients)
    assert wrong[1] - wrong[0] < 0.5 * (right[1] - right[0])


def test_cases_without_a_patient_stand_alone() -> None:
    values = np.random.default_rng(2).beta(5, 2, (9, 2))
    assert mean_interval(values, [None] * 9) == mean_interval(values)
    assert mean_interval(values, [0, None, 1, *[None] * 6]) == mean_interval(values)  # a patient called 0, too


def test_a_mean_over_classes_that_cases_lack() -> None:
    rng = np.random.default_rng(3)
    values = rng.beta(8, 2, (300, 3))
    values[rng.random((300, 3)) < 0.4] = np.nan
    low, high = mean_interval(values)
    means = [np.nanmean(np.nanmean(values[rng.integers(300, size=300)], axis=0)) for _ in range(2000)]
    assert [low, high] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.002)


@pytest.mark.parametrize("values", [[0.5], [0.5, math.nan], [1.0, 1.0, 1.0], [math.nan, math.nan], []])
def test_an_interval_that_nothing_speaks_for_is_not_given(values: list[float]) -> None:
    assert all(map(math.isnan, mean_interval(np.array(values).reshape(-1, 1))))
    summary = summarise([[v] for v in values], ["a"])
    assert all(map(math.isnan, (summary.low, summary.high, summary.classes[0].low)))


def test_one_patient_gives_no_interval_however_many_scans() -> None:
    assert all(map(math.isnan, mean_interval(np.random.default_rng(0).random((20, 1)), ["p"] * 20)))


def test_ends_stay_in_the_range_of_the_values() -> None:
    summary = summarise([[0.2], [1.0], [0.9]], ["a"])
    assert (summary.low, summary.high) == (0.0, 1.0)
    distances = summarise([[0.2], [10.0], [0.9]], ["a"], within=(0.0, math.inf))
    assert distances.low == 0.0
    assert distances.high > 10


# -- tests


def test_the_paired_test_counts_patients() -> None:
    # Eight patients of ten scans, five of them better by chance: scan by scan that looks certain.
    rng = np.random.default_rng(0)
    shift = np.array([0.02, 0.03, 0.01, 0.025, 0.015, -0.02, -0.01, -0.015])
    first = {f"{p}_{s}": 0.8 + float(shift[p]) + 0.001 * rng.standard_normal() for p in range(8) for s in range(10)}
    second = dict.fromkeys(first, 0.8)
    scores = {"a": first, "b": second}
    naive = compare(scores, [("a", "b")])[0]
    grouped = compare(scores, [("a", "b")], {name: name[0] for name in first})[0]
    assert naive.p is not None
    assert grouped.p is not None
    assert naive.p < 0.01 < 0.2 < grouped.p
    assert grouped.p == pytest.approx(stats.wilcoxon(shift).pvalue, abs=0.1)
    assert grouped.low < 0 < naive.low
    assert grouped.difference == naive.difference
    assert grouped.num == 80


def sites(seed: int, num: int = 5, patients: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Skewed scores of patients of several sites, all alike."""
    rng = np.random.default_rng(seed)
    return rng.beta(18, 2, num * patients), np.repeat(np.arange(num), patients)


def least_p(scores: np.ndarray, site: np.ndarray) -> tuple[int, float]:
    """The site that differs most, and its p after Holm's correction."""
    ps = holm([difference_to_rest(scores, site == s).p for s in range(site.max() + 1)])
    known = [math.inf if p is None else p for p in ps]
    return int(np.argmin(known)), min(known)


def test_a_site_effect_of_five_points_is_found_and_none_where_there_is_none() -> None:
    assert sum(least_p(*sites(seed, patients=8))[1] < 0.05 for seed in range(200)) <= 10  # 5 %
    for seed in range(20):
        scores, site = sites(seed)
        which, p = least_p(scores - 0.05 * (site == 2), site)
        assert (which, p < 0.05) == (2, True)


def test_the_difference_and_its_interval() -> None:
    scores, site = np.random.default_rng(1).normal(0.8, 0.05, 80), np.repeat(np.arange(5), 16)
    difference = difference_to_rest(scores - 0.05 * (site == 2), site == 2)
    assert difference.difference == pytest.approx(scores[site == 2].mean() - scores[site != 2].mean() - 0.05)
    welch = stats.ttest_ind(scores[site == 2] - 0.05, scores[site != 2], equal_var=False)
    assert [difference.low, difference.high] == pytest.approx([*welch.confidence_interval()], abs=0.003)
    ranks = stats.mannwhitneyu(scores[site == 2] - 0.05, scores[site != 2])
    assert difference.p == pytest.approx(ranks.pvalue)


def test_the_difference_of_scores_by_class_is_that_of_their_means() -> None:
    rng = np.random.default_rng(2)
    scores = rng.beta(18, 2, (60, 3))
    scores[rng.random((60, 3)) < 0.5] = np.nan
    inside = np.arange(60) < 20
    scores[:3], scores[20:, 2] = np.nan, np.nan  # nothing counts in three cases, and one class on one side alone
    means = [np.nanmean(np.nanmean(part[:, :2], axis=0)) for part in (scores[:20], scores[20:])]
    found = difference_to_rest(scores, inside)
    assert found.difference == pytest.approx(means[0] - means[1])
    assert found.low < found.difference < found.high
    # A class that is hard, and hardly there in the group, is no difference.
    hard = np.stack([rng.normal(0.9, 0.01, 60), rng.normal(0.5, 0.01, 60)], axis=1)
    hard[:18, 1] = np.nan
    assert abs(difference_to_rest(hard, inside).difference) < 0.02
    assert (difference_to_rest(hard, inside).p or 0) > 0.05
    alone = difference_to_rest(hard[:, 0], inside)
    assert alone == difference_to_rest(hard[:, :1], inside)


def test_patients_are_drawn_between_groups_too() -> None:
    rng = np.random.default_rng(5)
    false = 0
    for _ in range(100):
        of_patient = rng.normal(0.8, 0.05, 12)
        patient = np.repeat(np.arange(12), 10)
        scores = of_patient[patient] + 0.002 * rng.standard_normal(120)
        p = difference_to_rest(scores, patient < 6, patient.tolist()).p
        assert p is not None
        false += p < 0.05
    assert false <= 10


def test_a_group_that_divides_patients_is_compared_within_them() -> None:
    rng = np.random.default_rng(6)
    patient = np.repeat(np.arange(15), 2)
    after = np.tile([False, True], 15)
    scores = rng.normal(0.8, 0.1, 15)[patient] - 0.02 * after + 0.005 * rng.standard_normal(30)
    difference = difference_to_rest(scores, after, patient.tolist())
    assert difference.p is not None
    assert difference.p < 0.01
    assert difference.difference == pytest.approx(-0.02, abs=0.005)


def test_small_groups_and_whole_ones_are_not_tested() -> None:
    scores = [0.9, 0.8, 0.7, 0.6, 0.95]
    assert difference_to_rest(scores, [True, True, False, False, False]).p is None
    assert math.isnan(difference_to_rest(scores, [True] * 5).difference)
    assert difference_to_rest(scores, [True] * 5).p is None
