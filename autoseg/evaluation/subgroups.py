"""Scores by group of cases: by site, scanner, sex, age, size of what is to be found, annotated classes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from autoseg.data.datalists.cases import MetaValue
from autoseg.data.datalists.metadata import number_of, text_of
from autoseg.evaluation.intervals import ALPHA, case_means, difference_to_rest, holm, mean_interval, num_patients
from autoseg.evaluation.metrics import class_means, to_plain
from autoseg.evaluation.tables import csv_text

MOST_LEVELS = 20
"""Values of a text that make groups; more are names of something, and are left out."""
MOST_NUMBERS = 6
"""Different numbers that make groups each; more, or one for each case, are cut into thirds."""
NOT_GIVEN = "not given"

Value = MetaValue


@dataclass(frozen=True, slots=True, kw_only=True)
class SubgroupRow:
    """One group of cases and the rest."""

    factor: str
    """What the cases are grouped by."""
    level: str
    """The value of the group."""
    num: int
    """Cases in it that count."""
    num_patients: int
    mean: float
    """Mean over its cases of their mean score over classes."""
    low: float
    high: float
    """Ends of the 95 % interval of that."""
    difference: float
    """To the mean of all other cases, class by class: a group with other classes does not differ by that alone."""
    difference_low: float
    difference_high: float
    p: float | None
    """Of the difference, after Holm's correction over the whole table; None: too few patients on a side."""

    @property
    def words(self) -> str:
        """The finding."""
        if self.p is None:
            return "too few to test"
        if self.p >= ALPHA:
            return "no clear difference"
        return "higher" if self.difference > 0 else "lower"


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """What cases are grouped by."""

    name: str
    levels: tuple[str, ...]
    """Its values, in their order."""
    level_of: Mapping[str, str]
    """Case -> value."""


def factors_of(facts: Mapping[str, Mapping[str, Value]]) -> tuple[list[Factor], tuple[str, ...]]:
    """Group cases by each of their facts.

    Args:
        facts: case -> key -> value.

    Returns:
        A factor for each key with at least two groups; numbers, written as texts or not, of many values are cut into
        thirds. And why keys were left out, in words.
    """
    factors = []
    notes = []
    for key in dict.fromkeys(key for of_case in facts.values() for key in of_case):
        values = {case: of_case[key] for case, of_case in facts.items() if key in of_case}
        numbers = {case: number for case, v in values.items() if (number := number_of(v)) is not None}
        is_number, num = len(numbers) == len(values), len({*numbers.values()})
        if is_number and (num > MOST_NUMBERS or 1 < num == len(values)):
            levels, level_of = _thirds(numbers)
        else:
            level_of = {case: text_of(numbers[case] if is_number else value) for case, value in values.items()}
            levels = sorted({*level_of.values()}, key=float if is_number else str)
        if len(levels) > MOST_LEVELS or 1 < len(levels) == len(values):
            notes.append(f"{key}: {len(levels)} different values of {len(values)} cases make no groups.")
            continue
        if len(values) < len(facts):
            levels = [*levels, NOT_GIVEN]
        if len(levels) > 1:
            level_of = {case: level_of.get(case, NOT_GIVEN) for case in facts}
            factors.append(Factor(name=key, levels=tuple(levels), level_of=level_of))
    return factors, tuple(notes)


def _thirds(numbers: Mapping[str, float]) -> tuple[list[str], dict[str, str]]:
    """The names of three groups of about equal size, and each case's."""
    first, second = np.quantile([*numbers.values()], [1 / 3, 2 / 3])
    low, high = (f"{end:.4g}" if abs(end) < 10_000 else f"{end:.0f}" for end in (first, second))
    names = [f"up to {low}", f"{low} to {high}", f"over {high}"]
    return names, {case: names[int(value > first) + int(value > second)] for case, value in numbers.items()}


def table_of(
    factors: Sequence[Factor],
    scores: Mapping[str, Sequence[float]],
    patient_of: Mapping[str, Hashable],
    *,
    within: tuple[float, float] = (0.0, 1.0),
) -> list[SubgroupRow]:
    """Compare every group with the rest.

    Args:
        factors: as `factors_of` makes them.
        scores: case -> value per class; NaN does not count.
        patient_of: case -> patient; cases that are not there stand alone.
        within: range of the values.
    """
    means = case_means(scores)
    adjusted = _adjusted(scores)
    rows: list[dict[str, Any]] = []
    tests: list[float | None] = []
    places: list[int] = []
    for factor in factors:
        level_of = factor.level_of
        cases = [case for case in means if case in level_of]
        levels = [level for level in factor.levels if any(level_of[case] == level for case in cases)]
        patients = [patient_of.get(case) for case in cases]
        for level in levels:
            inside = [level_of[case] == level for case in cases]
            here = [case for case, is_in in zip(cases, inside, strict=True) if is_in]
            who = [patient_of.get(case) for case in here]
            low, high = mean_interval([[means[case]] for case in here], who, within=within)
            other = difference_to_rest([adjusted[case] for case in cases], inside, patients)
            # Of two groups each is the other's rest: that is one test.
            if len(levels) == 2 and level == levels[1]:
                places.append(places[-1])
            else:
                places.append(len(tests))
                tests.append(other.p)
            rows.append(
                {
                    "factor": factor.name, "level": level, "num": len(here), "num_patients": num_patients(who),
                    "mean": sum(means[case] for case in here) / len(here), "low": low, "high": high,
                    "difference": other.difference, "difference_low": other.low, "difference_high": other.high,
                }
            )  # fmt: skip
    corrected = holm(tests)
    return [SubgroupRow(**row, p=corrected[place]) for row, place in zip(rows, places, strict=True)]


def _adjusted(scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Each case's mean deviation from the means of its classes."""
    means = class_means([*scores.values()]) if scores else []
    deviations = {case: [v - m for v, m in zip(values, means, strict=True)] for case, values in scores.items()}
    return case_means(deviations)


def rows_to_json(rows: Sequence[SubgroupRow]) -> list[dict[str, Any]]:
    """Plain data."""
    plain: list[dict[str, Any]] = [{**to_plain(asdict(row)), "finding": row.words} for row in rows]
    return plain


def rows_to_csv(rows: Sequence[SubgroupRow]) -> str:
    """A table with a header; empty cells where a figure is not known."""
    return csv_text([*SubgroupRow.__dataclass_fields__, "finding"], rows_to_json(rows))
