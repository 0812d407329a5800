"""The scores of a folder of predictions, as a table and as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from autoseg.evaluation.metrics import ClassSummary, Summary, to_plain
from autoseg.evaluation.scores import METRICS, Family, Metric
from autoseg.evaluation.tables import format_rows, format_score
from autoseg.evaluation.tolerances import Tolerance

Scoring = Literal["autoseg", "flare23"]
INTERVAL = ("95% low", "high")
"""Columns of the first metric."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Scores of a folder."""

    classes: tuple[str, ...]
    scores: dict[str, dict[str, list[float]]]
    """Metric -> case -> value per class, NaN where not counted."""
    missing: tuple[str, ...]
    """Labels without a prediction, scored as if an empty one were there."""
    predictions: dict[str, Path]
    """Case -> the file that was scored."""
    notes: tuple[str, ...]
    """What was paired by more than the name, or left out, in sentences."""
    patients: dict[str, str]
    """Case -> its patient, for cases whose names say that they belong together."""
    tolerance_mm: Tolerance | None
    """Of the surface Dice; None: each class has its own."""
    scoring: Scoring

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Those that were computed."""
        return tuple(metric for metric in METRICS if metric.name in self.scores)

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Classes that have a mean of their own: FLARE23 ranks by organs and tumor, each for itself."""
        if self.scoring == "autoseg":
            return {}
        return {"organs": tuple(n for n in self.classes if n != "tumor"), "tumor": ("tumor",)}

    def summaries(self, classes: Sequence[str] | None = None, family: Family | None = None) -> dict[str, Summary]:
        """Each metric, of a family or of all, over cases and some classes; None: all."""
        names = self.classes if classes is None else classes
        places = [self.classes.index(n) for n in names]
        return {
            metric.name: metric.summary(
                [[row[i] for i in places] for row in self.scores[metric.name].values()],
                names,
                [self.patients.get(case) for case in self.scores[metric.name]],
            )
            for metric in self.metrics
            if family in (None, metric.family)
        }


def format_evaluation(evaluation: Evaluation, *, lesions: bool = False) -> str:
    """The scores as a table: mean and deviation over cases, per class; then of groups of classes and of all.

    The first metric has its 95 % interval, too. A group of one class is that class' row.

    Args:
        lesions: add a table of the scores of lesions.
    """
    families: tuple[Family, ...] = ("whole", "lesions") if lesions else ("whole",)
    tables = ["\n".join([_table(evaluation, family), *_other_numbers(evaluation, family)]) for family in families]
    lines = ["\n\n".join(tables)]
    if evaluation.missing:
        lines.append(f"No prediction, scored as an empty one: {', '.join(evaluation.missing)}")
    lines += evaluation.notes
    return "\n".join(lines)


def _table(evaluation: Evaluation, family: Family) -> str:
    """The metrics of a family."""
    summaries = evaluation.summaries(family=family)
    by_class = {}
    for i, name in enumerate(evaluation.classes):
        columns = {metric: (summary.classes[i], summary.classes[i].std) for metric, summary in summaries.items()}
        by_class[name] = _row(name, columns, next(iter(summaries.values())).classes[i].num)
    means = {name: _means(name, evaluation.summaries(classes, family)) for name, classes in evaluation.groups.items()}
    rows = [row for name, row in by_class.items() if name not in means]
    rows += [by_class.get(name, row) for name, row in means.items()]
    rows.append(_means("mean", summaries))
    header = ["class"]
    for metric in evaluation.metrics:
        if metric.family != family:
            continue
        header += [metric.heading(evaluation.tolerance_mm), "std", *(INTERVAL if len(header) == 1 else ())]
    return format_rows([*header, "n"], rows)


def _other_numbers(evaluation: Evaluation, family: Family) -> list[str]:
    """Metrics that other numbers of cases count for than for the first one, whose are in the table."""
    numbers = {metric: _numbers(summary) for metric, summary in evaluation.summaries(family=family).items()}
    first = next(iter(numbers))
    lines = []
    for metric, by_name in numbers.items():
        different = [f"{name} {num}" for name, num in by_name.items() if num != numbers[first][name]]
        if different:
            lines.append(f"n is that of {first}; of {metric}: {', '.join(different)}")
    return lines


def _numbers(summary: Summary) -> dict[str, int]:
    """How many cases count for each class and for the mean."""
    return {**{c.name: c.num for c in summary.classes}, "mean": summary.num_cases}


def _means(name: str, summaries: Mapping[str, Summary]) -> list[str]:
    """A row of means over classes."""
    columns = {metric: (summary, math.nan) for metric, summary in summaries.items()}
    return _row(name, columns, next(iter(summaries.values())).num_cases)


def _row(name: str, columns: Mapping[str, tuple[Summary | ClassSummary, float]], num: int) -> list[str]:
    """A row of the table, from each metric's means and its deviation."""
    cells = [name]
    for summary, std in columns.values():
        interval = (summary.low, summary.high) if len(cells) == 1 else ()
        cells += map(format_score, (summary.mean, std, *interval))
    return [*cells, str(num)]


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """Every score as plain data."""

    def plain(summaries: Mapping[str, Summary]) -> dict[str, Any]:
        return {metric: summary.to_json() for metric, summary in summaries.items()}

    cases = sorted(next(iter(evaluation.scores.values())))
    return {
        "scoring": evaluation.scoring,
        "classes": list(evaluation.classes),
        "metrics": {m.name: m.to_json() for m in evaluation.metrics},
        "tolerance_mm": evaluation.tolerance_mm,
        **plain(evaluation.summaries()),
        "groups": {name: plain(evaluation.summaries(classes)) for name, classes in evaluation.groups.items()},
        "missing": list(evaluation.missing),
        "predictions": {name: str(path) for name, path in sorted(evaluation.predictions.items())},
        "notes": list(evaluation.notes),
        "cases": {n: {m: to_plain(scores[n]) for m, scores in evaluation.scores.items()} for n in cases},
    }
