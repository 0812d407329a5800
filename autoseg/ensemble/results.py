"""What the stage `ensemble` found, as tables for people and as `scores.json`."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from autoseg.ensemble import suspicious
from autoseg.ensemble.combine import Candidate, CaseScore
from autoseg.ensemble.finish import Finished
from autoseg.ensemble.held_back import HeldBack
from autoseg.ensemble.optimism import ChosenAgain
from autoseg.evaluation.calibration import out_of_fold_temperature
from autoseg.evaluation.intervals import case_means, difference_to_rest
from autoseg.evaluation.metrics import mean_score, summarise, to_plain
from autoseg.evaluation.score_files import QualityCheck
from autoseg.evaluation.scores import DICE, METRICS, Metric
from autoseg.evaluation.subgroups import Factor, SubgroupRow, Value, factors_of, rows_to_json, table_of
from autoseg.evaluation.suspicion import Suspicion
from autoseg.evaluation.tables import format_rows, format_score, format_table
from autoseg.inference.ensemble_spec import EnsembleSpec
from autoseg.inference.quality import QualityModel, worst_first
from autoseg.version import __version__

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Results:
    """All that was found."""

    candidates: tuple[Candidate, ...]
    chosen: Candidate
    cases: tuple[CaseScore, ...]
    classes: tuple[str, ...]
    """Of the user."""
    network_classes: tuple[str, ...]
    """Of the networks, which have the probabilities; merged sides are one."""
    held_back: HeldBack
    """Cases that no model has learned from."""
    patients: Mapping[str, str]
    """Case -> its patient, where the list names one."""
    facts: Mapping[str, Mapping[str, Value]]
    """Case -> what it may be grouped by, such as its site; of training cases and of testing ones."""
    finished: Finished
    suspicious: Sequence[Suspicion]
    """Labels that the ensemble contradicts."""
    quality: QualityModel | None
    """What predicts how good predictions are; None: too few cases."""
    again: ChosenAgain | None
    """What was chosen without each fold; None with one fold alone."""
    metric: Metric
    """That decided."""
    spec: EnsembleSpec
    gaps: tuple[str, ...]
    failures: tuple[str, ...]

    @property
    def test_scores(self) -> dict[str, Sequence[float]]:
        """Held-back case -> Dice per class."""
        return {name: scores[DICE.name] for name, scores in self.held_back.scores.items()}

    # -- for people
    def tables(self) -> list[str]:
        """The candidates; postprocessing; each algorithm and the ensemble, class by fold; the testing cases."""
        tables = [self._candidates_table()]
        if self.finished.rules:
            tables.append(self._rules_table())
        singles = [c for c in self.candidates if "+" not in c.name and not c.name.startswith("best_")]
        tables += [format_table(f"Dice of {c.name}", self.classes, self._by_fold(c.scores)) for c in singles]
        if self.chosen not in singles or self.finished.rules:
            processed = ", postprocessing included" if self.finished.rules else ""
            title = f"Dice of the ensemble ({self.chosen.name}){processed}"
            tables.append(format_table(title, self.classes, self._by_fold(self.finished.dice)))
        if self.again is not None and self.again.dice:
            tables.append(self._optimism_words())
        if self.test_scores:
            tables.append(self._testing_table())
        return tables

    def _optimism_words(self) -> str:
        """The Dice with and without choices made on the same cases."""
        plain, nested = self._plain_and_again()
        return (
            f"Mean Dice {format_score(plain)}; {format_score(nested)} where the combination and the postprocessing are "
            f"chosen again without the fold they are scored on: the choice flatters by {plain - nested:.4f}"
        )

    def _plain_and_again(self) -> tuple[float, float]:
        """Mean Dice of the cases that were scored both ways: as chosen, and chosen without their fold."""
        again = {} if self.again is None else self.again.dice
        shared = [name for name in again if name in self.finished.dice]
        return mean_score([self.finished.dice[n] for n in shared]), mean_score([again[n] for n in shared])

    @cached_property
    def subgroups(self) -> list[SubgroupRow]:
        """The ensemble's out-of-fold Dice by group of cases."""
        return self._groups_of(self.finished.dice)

    @cached_property
    def subgroup_notes(self) -> tuple[str, ...]:
        """Why keys of the cases make no groups."""
        _, notes = self._factors_of(self.finished.dice)
        for note in notes:
            log.info("ensemble: no groups by %s", note)
        return notes

    def _factors_of(self, names: Iterable[str]) -> tuple[list[Factor], tuple[str, ...]]:
        return factors_of({name: self.facts.get(name, {}) for name in names})

    def _groups_of(self, dice: Mapping[str, Sequence[float]]) -> list[SubgroupRow]:
        return table_of(self._factors_of(dice)[0], dice, self.patients)

    def _external_json(self) -> dict[str, Any] | None:
        """Every metric on the cases with a label that no model has learned from, and how their Dice differs."""
        if not self.test_scores:
            return None
        metrics = [m for m in METRICS if all(m.name in values for values in self.held_back.scores.values())]
        patients = self._patients(self.held_back.scores)
        dice = {**self.finished.dice, **self.test_scores}
        inside = [name in self.test_scores for name in dice]
        other = difference_to_rest([*dice.values()], inside, self._patients(dice))
        return {
            "metrics": {
                m.name: m.summary([v[m.name] for v in self.held_back.scores.values()], self.classes, patients).to_json()
                for m in metrics
            },
            "difference": to_plain(other.difference),
            "low": to_plain(other.low),
            "high": to_plain(other.high),
            "p": to_plain(other.p),
            "subgroups": rows_to_json(self._groups_of(self.test_scores)),
        }

    def _quality_json(self, check: QualityCheck) -> dict[str, Any]:
        """How well Dice is predicted, and what is thought of the held-back cases, the worst first."""
        verdicts = sorted(
            self.held_back.verdicts.items(),
            key=lambda item: (worst_first(item[1].dice, bool(item[1].reasons)), item[0]),
        )
        true = case_means(self.test_scores)
        return {
            "check": check.model_dump(mode="json"),
            "held_back": [
                {
                    "case": name,
                    "predicted": to_plain(verdict.dice),
                    "dice": to_plain(true.get(name)),
                    "reasons": list(verdict.reasons),
                    "classes": [
                        {
                            "class": c.name,
                            "predicted": to_plain(c.dice),
                            "low": to_plain(c.low),
                            "high": to_plain(c.high),
                            "volume_ml": to_plain(c.volume_ml),
                            "volume_low_ml": to_plain(c.volume_low_ml),
                            "volume_high_ml": to_plain(c.volume_high_ml),
                        }
                        for c in verdict.classes
                    ],
                }
                for name, verdict in verdicts
            ],
        }

    def _temperature_json(self) -> dict[str, Any] | None:
        """The temperature that would calibrate the probabilities, fitted without the fold it is judged on."""
        fold_of = {case.name: case.fold for case in self.cases}
        by_fold: dict[int, list[Any]] = {}
        for name, counts in self.finished.calibration.items():
            if counts is not None:
                by_fold.setdefault(fold_of[name], []).append(counts)
        found = out_of_fold_temperature({fold: np.sum(counts, axis=0) for fold, counts in by_fold.items()})
        if found is None:
            return None
        plain: dict[str, Any] = to_plain(asdict(found))
        return {**plain, "by_fold": {str(fold): value for fold, value in found.by_fold.items()}}

    def _again_json(self) -> dict[str, Any] | None:
        if self.again is None or not self.again.dice:
            return None
        plain, nested = self._plain_and_again()
        names = [name for name in self.again.dice if name in self.finished.dice]
        summary = summarise([self.again.dice[n] for n in names], self.classes, patients=self._patients(names))
        return {
            "dice": summary.to_json(),
            "optimism": to_plain(plain - nested),
            "combinations": {str(fold): name for fold, name in self.again.combinations.items()},
        }

    def _by_fold(self, scores: Mapping[str, Sequence[float]]) -> list[tuple[int, Sequence[float]]]:
        fold_of = {case.name: case.fold for case in self.cases}
        return [(fold_of[name], values) for name, values in scores.items()]

    def _candidates_table(self) -> str:
        costs = {row.name: row for row in self.spec.pareto}
        rows = []
        for c in sorted(self.candidates, key=lambda c: c.rank, reverse=True):
            row = costs.get(c.name)
            cost = ["-", "-", ""]
            if row is not None:
                cost = [f"{row.seconds:.2f}", f"{row.gb:.2f}", "x" if row.on_front else ""]
            name = ("* " if c is self.chosen else "  ") + c.name
            decided = [] if self.metric is DICE else [format_score(c.selected_mean)]
            rows.append([name, format_score(c.mean), *decided, *cost, str(len(c.scores)), str(len(c.members))])
        decides = [] if self.metric is DICE else [self.metric.heading(self.finished.tolerance_mm)]
        header = ["  combination", "dice", *decides, "s/image", "GB", "front", "cases", "models"]
        by = "" if self.metric is DICE else f" by {self.metric.short_title}"
        title = f"Out-of-fold Dice of each combination and what it takes, * chosen{by}"
        given_up = f"\nGiven up for the budget: {self.spec.given_up}." if self.spec.given_up else ""
        return f"{title}\n{format_rows(header, rows)}{given_up}"

    def _rules_table(self) -> str:
        def score(value: float | None) -> str:
            return format_score(math.nan if value is None else value)

        rows = [
            [r.name, score(r.dice_before), score(r.dice_after), score(r.gain), score(r.gain_low), r.words]
            for r in self.finished.rules
        ]
        title = (
            f"Postprocessing: out-of-fold Dice before and after, gain in {self.metric.short_title}, lower end of "
            "its 95 % interval; a dash: as was set"
        )
        return f"{title}\n" + format_rows(["class", "before", "after", "gain", "at least", "what"], rows)

    def _testing_table(self) -> str:
        summary = summarise(list(self.test_scores.values()), self.classes, patients=self._patients(self.test_scores))
        rows = [[c.name, format_score(c.mean), format_score(c.std), str(c.num)] for c in summary.classes]
        rows.append(["mean", format_score(summary.mean), "", str(summary.num_cases)])
        return "Dice of the ensemble on the testing cases\n" + format_rows(["class", "mean", "std", "n"], rows)

    # -- scores.json
    def _patients(self, names: Iterable[str]) -> list[str | None]:
        """The patient of each case."""
        return [self.patients.get(name) for name in names]

    def to_json(self) -> dict[str, Any]:
        """Plain data; patients are numbered there, not named."""
        numbers = {patient: i for i, patient in enumerate(dict.fromkeys(self.patients.values()))}
        return {
            "version": __version__,
            "metric": self.metric.name,
            "classes": list(self.classes),
            "chosen": self.chosen.name,
            "candidates": [
                {
                    "name": c.name,
                    "combine": c.combine,
                    "members": [list(m) for m in c.members],
                    "selected": to_plain(c.selected_mean),
                    **summarise([*c.scores.values()], self.classes, patients=self._patients(c.scores)).to_json(),
                }
                for c in self.candidates
            ],
            "cases": [{"name": c.name, "fold": c.fold, "dice": to_plain(dict(c.dice))} for c in self.cases],
            "patients": {name: numbers[patient] for name, patient in self.patients.items()},
            "testing": to_plain(dict(self.test_scores)),
            "gaps": list(self.gaps),
            "failures": list(self.failures),
            **self._ensemble_json(),
        }

    def _ensemble_json(self) -> dict[str, Any]:
        """The chosen ensemble's own part, postprocessing included.

        Each metric per case and over all cases; calibration of the probabilities, before postprocessing.
        """
        finished = self.finished
        counted = [c for c in finished.calibration.values() if c is not None]
        return {
            "tolerance_mm": finished.tolerance_mm,
            "metrics": {m.name: m.to_json() for m in METRICS},
            **{
                m.name: m.summary(
                    [*finished.scores[m.name].values()], self.classes, self._patients(finished.scores[m.name])
                ).to_json()
                for m in METRICS
            },
            "calibration": np.sum(counted, axis=0).round(3).tolist() if counted else None,
            "temperature": self._temperature_json(),
            "chosen_again": self._again_json(),
            "subgroups": rows_to_json(self.subgroups),
            "subgroup_notes": list(self.subgroup_notes),
            "external": self._external_json(),
            "suspicious": suspicious.rows_to_json(self.suspicious),
            "quality": None if self.quality is None else self._quality_json(self.quality.check),
            "calibrated": list(self.network_classes),
            "ensemble": {n: to_plain({m: scores[n] for m, scores in finished.scores.items()}) for n in finished.dice},
        }
