"""The list of labels that the out-of-fold predictions contradict, as a table; each case's part is in its record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from autoseg.data.datalists.cases import read_case_label
from autoseg.ensemble.labels import OutOfFoldLabels, Speaking, rules_key
from autoseg.ensemble.records import read_case_record
from autoseg.evaluation.suspicion import Contradiction, Suspicion, contradictions, ranked
from autoseg.evaluation.tables import csv_text
from autoseg.inference.postprocess import ClassRule
from autoseg.workspace.files import write_json

COLUMNS = ("case", "class", "suspicion", "kind", "gain", "partner", "shift_mm")


def suspicious_labels(
    labels: OutOfFoldLabels, cases: Mapping[str, Speaking], rules: Sequence[ClassRule]
) -> list[Suspicion]:
    """Classes of cases whose labels the ensemble contradicts, the most suspicious first.

    Args:
        labels: of the run.
        cases: name -> the case, and the combination that speaks for it.
        rules: that its labels are handed out with.
    """
    return ranked({name: _contradictions(labels, speaking, rules) for name, speaking in cases.items()})


def _contradictions(labels: OutOfFoldLabels, speaking: Speaking, rules: Sequence[ClassRule]) -> list[Contradiction]:
    case, combination = speaking
    path = labels.record_file(case.name)
    record = read_case_record(path)
    kept, key = record.setdefault("contradictions", {}), rules_key(combination, rules)
    if key not in kept:
        assert case.label is not None
        label, (pred, _) = read_case_label(case), labels.cleaned(speaking, rules)
        said = contradictions(pred, label.array[0], labels.label_map, label.spacing_mm, annotated=case.annotated)
        # Of what would gain nothing the kind alone matters: it was tried.
        kept[key] = [{**asdict(c), "gain": round(max(0.0, c.gain), 6)} for c in said]
        write_json(path, record)
    return [Contradiction(**item) for item in kept[key]]


def rows_to_json(rows: Sequence[Suspicion]) -> list[dict[str, Any]]:
    """Plain data, a row a class of a case."""
    return [
        {
            "case": row.case,
            "class": row.contradiction.name,
            "suspicion": row.suspicion,
            "kind": row.contradiction.kind,
            "gain": round(row.contradiction.gain, 6),
            "partner": row.contradiction.partner,
            "shift_mm": row.contradiction.shift_mm,
        }
        for row in rows
    ]


def rows_to_csv(rows: Sequence[Suspicion]) -> str:
    """A table with a header."""
    return csv_text(COLUMNS, rows_to_json(rows))
