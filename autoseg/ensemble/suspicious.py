"""The list of labels that the out-of-fold predictions contradict, as a table and as points for 3D Slicer.

Each case's share of it is in its record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from autoseg.data.datalists.cases import read_case_label
from autoseg.ensemble.labels import OutOfFoldLabels, Speaking, rules_key
from autoseg.ensemble.records import part_of, read_case_record
from autoseg.evaluation.suspicion import Contradiction, Part, Suspicion, contradictions, parts_of, ranked
from autoseg.evaluation.tables import csv_text
from autoseg.inference.postprocess import ClassRule
from autoseg.workspace.files import digest, write_json

COLUMNS = (
    *("case", "class", "suspicion", "kind", "gain", "partner", "shift_mm"),
    *("part", "voxels", "volume_ml", "i", "j", "k", "right_mm", "front_mm", "up_mm"),
)
"""Of the table, a row a part: `i`, `j`, `k` is a voxel of the label's file, and its last three are RAS+."""
POINTS = ".mrk.json"
SCHEMA = (
    "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/"
    "markups-schema-v1.0.3.json#"
)


def suspicious_labels(
    labels: OutOfFoldLabels, cases: Mapping[str, Speaking], rules: Sequence[ClassRule]
) -> list[Suspicion]:
    """Classes of cases whose labels the ensemble contradicts, the most suspicious first.

    Args:
        labels: of the run.
        cases: name -> the case, and the combination that speaks for it.
        rules: that its labels are handed out with.
    """
    rows = ranked({name: _contradictions(labels, speaking, rules) for name, speaking in cases.items()})
    return [replace(row, parts=_parts(labels, cases[row.case], rules, row.contradiction)) for row in rows]


def _parts(
    labels: OutOfFoldLabels, speaking: Speaking, rules: Sequence[ClassRule], said: Contradiction
) -> tuple[Part, ...]:
    """Where the label is contradicted, kept in the case's record."""
    case, combination = speaking
    path = labels.record_file(case.name)
    record = read_case_record(path)
    key = digest([rules_key(combination, rules), said.name, said.kind])
    kept = record.setdefault("contradicted_parts", {})
    if key not in kept:
        label, (pred, _) = read_case_label(case), labels.cleaned(speaking, rules)
        kept[key] = [asdict(p) for p in parts_of(said, pred, label.array[0], labels.label_map, label.grid)]
        write_json(path, record)
    return tuple(part_of(item) for item in kept[key])


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
    return [{**_row(row), "parts": [asdict(part) for part in row.parts]} for row in rows]


def _row(row: Suspicion) -> dict[str, Any]:
    return {
        "case": row.case,
        "class": row.contradiction.name,
        "suspicion": row.suspicion,
        "kind": row.contradiction.kind,
        "gain": round(row.contradiction.gain, 6),
        "partner": row.contradiction.partner,
        "shift_mm": row.contradiction.shift_mm,
    }


def rows_to_csv(rows: Sequence[Suspicion]) -> str:
    """A table with a header, a row a part."""
    lines: list[dict[str, Any]] = []
    for row in rows:
        for number, part in enumerate(row.parts, 1):
            place: dict[str, Any] = dict(
                zip(("i", "j", "k", "right_mm", "front_mm", "up_mm"), (*part.voxel, *part.center_mm), strict=True)
            )
            lines.append({**_row(row), "part": number, "voxels": part.voxels, "volume_ml": part.volume_ml, **place})
        if not row.parts:
            lines.append({**dict.fromkeys(COLUMNS, ""), **_row(row)})
    return csv_text(COLUMNS, lines)


def write_points(folder: Path, rows: Sequence[Suspicion]) -> None:
    """Write a list of points for each case, CASE.mrk.json, that 3D Slicer opens; lists of other cases are removed."""
    by_case: dict[str, list[Suspicion]] = {}
    for row in rows:
        if row.parts:
            by_case.setdefault(row.case, []).append(row)
    for old in folder.glob(f"*{POINTS}"):
        if old.name.removesuffix(POINTS) not in by_case:
            old.unlink()
    for case, listed in by_case.items():
        write_json(folder / f"{case}{POINTS}", _points(listed))


def _points(rows: Sequence[Suspicion]) -> dict[str, Any]:
    """Slicer's markups: a point at the centre of each part, in RAS and mm.

    Source: the schema that is named in the file.
    """
    points = [
        {
            "id": str(number),
            "label": f"{row.contradiction.name}: {row.contradiction.kind}",
            "description": f"suspicion {row.suspicion:.2f}, {part.voxels} voxels, {part.volume_ml:.3g} ml",
            "position": [*part.center_mm],
            "selected": True,
            "locked": True,
            "visibility": True,
            "positionStatus": "defined",
        }
        for number, (row, part) in enumerate(((row, part) for row in rows for part in row.parts), 1)
    ]
    markup = {
        "type": "Fiducial", "coordinateSystem": "RAS", "coordinateUnits": "mm", "locked": True, "labelFormat": "%N-%d",
        "controlPoints": points,
    }  # fmt: skip
    return {"@schema": SCHEMA, "markups": [markup]}
