"""The out-of-fold labels of a combination with rules of postprocessing applied, and their scores, kept in records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autoseg.data.datalists.cases import Case, read_case_label
from autoseg.data.grid import Volume
from autoseg.data.labels import LabelMap
from autoseg.data.volumes import read_label
from autoseg.ensemble.out_of_fold import comparison_of, metric_key
from autoseg.ensemble.records import read_case_record
from autoseg.evaluation.metrics import to_plain
from autoseg.evaluation.score_files import floats
from autoseg.evaluation.scores import DICE, Metric, score_case
from autoseg.evaluation.tolerances import Tolerance
from autoseg.inference.postprocess import ClassRule, clean, deeds, measure_parts, option_dice, options
from autoseg.workspace.files import digest, write_json
from autoseg.workspace.workspace import Workspace

Speaking = tuple[Case, str]
"""A case, and the combination that speaks for it."""


def rules_key(combination: str, rules: Sequence[ClassRule]) -> str:
    """What names a combination with its rules in a record."""
    return digest([combination, deeds(rules)])


@dataclass(frozen=True, slots=True, kw_only=True)
class OutOfFoldLabels:
    """Labels of one run's cases."""

    workspace: Workspace
    label_map: LabelMap
    """Of the user's classes."""
    tolerance_mm: Tolerance
    """Of surfaces."""

    def record_file(self, name: str) -> Path:
        """Where a case's scores are."""
        return self.workspace.ensemble / "records" / f"{name}.json"

    def cleaned(self, speaking: Speaking, rules: Sequence[ClassRule]) -> tuple[np.ndarray, Volume]:
        """A combination's labels (X, Y, Z) of a case with rules applied, and the volume they were read from."""
        case, combination = speaking
        pred = read_label(self.workspace.out_of_fold / combination / f"{case.name}.nii.gz")
        labels = pred.array[0].astype(self.label_map.dtype)
        clean(labels, self.label_map, rules, pred.spacing_mm)
        return labels, pred

    def scores(
        self, speaking: Speaking, rules: Sequence[ClassRule], metrics: Sequence[Metric]
    ) -> dict[str, list[float]]:
        """Metric -> value per class of the labels with rules applied."""
        case, combination = speaking
        path = self.record_file(case.name)
        record = read_case_record(path)
        if not rules and [*metrics] == [DICE]:
            return {DICE.name: floats(record["dice"][combination])}
        stores = {m.name: record.setdefault("finished" if m is DICE else m.name, {}) for m in metrics}
        key = rules_key(combination, rules)
        keys = {m.name: digest([key, metric_key(m, self.tolerance_mm)]) if m.needs_tolerance else key for m in metrics}
        if lacking := [m for m in metrics if keys[m.name] not in stores[m.name]]:
            assert case.label is not None
            labels, _ = self.cleaned(speaking, rules)
            comparison = comparison_of(case, labels, read_case_label(case), self.label_map, self.tolerance_mm)
            for name, values in score_case(comparison, lacking).items():
                stores[name][keys[name]] = to_plain(values)
            write_json(path, record)
        return {m.name: floats(stores[m.name][keys[m.name]]) for m in metrics}

    def option_scores(self, speaking: Speaking, base: Sequence[ClassRule], metric: Metric) -> list[list[float] | None]:
        """For each class the score with each of its options after the rules that were set.

        None for classes that the case is not annotated for.
        """
        case, combination = speaking
        if metric is DICE:
            return [None if p is None else option_dice(p) for p in self._parts(speaking, base)]
        path = self.record_file(case.name)
        record = read_case_record(path)
        kept = record.setdefault("options", {})
        key = digest([rules_key(combination, base), metric_key(metric, self.tolerance_mm)])
        if key not in kept:
            kept[key] = to_plain(self._try_options(speaking, base, metric))
            write_json(path, record)
        return [None if values is None else floats(values) for values in kept[key]]

    def _try_options(self, speaking: Speaking, base: Sequence[ClassRule], metric: Metric) -> list[list[float] | None]:
        """Score each class with each of its options, one at a time."""
        case, _ = speaking
        assert case.label is not None
        label, (labels, pred) = read_case_label(case), self.cleaned(speaking, base)
        counts = self.label_map.names if case.annotated is None else case.annotated
        tried: list[list[float] | None] = []
        for i, name in enumerate(self.label_map.names):
            if name not in counts:
                tried.append(None)
                continue
            values = []
            known: dict[bytes, float] = {}
            for option in options(name):
                changed = labels.copy()
                clean(changed, self.label_map, [option], pred.spacing_mm)
                # Most options change nothing, or the same as a milder one.
                mark = np.packbits(changed != labels).tobytes()
                if mark not in known:
                    comparison = comparison_of(case, changed, label, self.label_map, self.tolerance_mm)
                    known[mark] = score_case(comparison, [metric], [name])[metric.name][i]
                values.append(known[mark])
            tried.append(values)
        return tried

    def _parts(self, speaking: Speaking, base: Sequence[ClassRule]) -> list[dict[str, Any] | None]:
        """Sizes of a prediction's parts, None for classes that do not count."""
        case, combination = speaking
        path = self.record_file(case.name)
        record = read_case_record(path)
        key = rules_key(combination, base)
        if key not in record.setdefault("parts", {}):
            assert case.label is not None
            label = read_case_label(case)
            pred, _ = self.cleaned(speaking, base)
            counts = self.label_map.names if case.annotated is None else case.annotated
            parts = measure_parts(pred, label.array[0], self.label_map, label.spacing_mm)
            record["parts"][key] = [
                p if n in counts else None for n, p in zip(self.label_map.names, parts, strict=True)
            ]
            write_json(path, record)
        measured: list[dict[str, Any] | None] = record["parts"][key]
        return measured

    def mean_scores(
        self, cases: Mapping[str, Speaking], rules: Sequence[ClassRule], metric: Metric
    ) -> dict[str, list[float]]:
        """Case -> value per class by one metric."""
        return {name: self.scores(speaking, rules, [metric])[metric.name] for name, speaking in cases.items()}
