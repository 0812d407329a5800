"""What the quality of predictions is learned from: cases out of fold, and spoilt copies of some of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autoseg.data.datalists.cases import read_case_label
from autoseg.ensemble.combine import Candidate
from autoseg.ensemble.copies import Copies, StoredCopy, truth_shapes
from autoseg.ensemble.corruptions import DRAWN, MOST_DRAWN
from autoseg.ensemble.labels import OutOfFoldLabels, Speaking, rules_key
from autoseg.ensemble.records import CaseRecord, StoredShapes, read_case_record
from autoseg.errors import DataError
from autoseg.evaluation.shapes import ClassShape, shapes_of
from autoseg.inference.appearance import Appearance
from autoseg.inference.postprocess import ClassRule
from autoseg.workspace.files import write_json

log = logging.getLogger(__name__)

KINDS = tuple(DRAWN)
"""Of spoilt copies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Studied:
    """A prediction whose truth is known."""

    case: str
    fold: int
    appearance: Appearance
    truth: Sequence[ClassShape | None]
    """The label's classes; None where the case is not annotated for one."""
    dice: Sequence[float]
    """Per class, NaN where not counted."""
    patient: str = ""
    """Whose scan it is; empty: not known."""
    kind: str = ""
    """How the copy was spoilt; empty: the case itself."""


def out_of_fold(
    labels: OutOfFoldLabels,
    cases: Mapping[str, Speaking],
    rules: Sequence[ClassRule],
    candidate: Candidate,
    dice: Mapping[str, Sequence[float]],
) -> list[Studied]:
    """Appearance at every case out of fold.

    Args:
        labels: of the run.
        cases: name -> the case, and the combination that speaks for it.
        rules: that its labels are handed out with.
        candidate: what was chosen.
        dice: case -> Dice per class of these labels.
    """
    studied = []
    for name, speaking in cases.items():
        path, key = labels.record_file(name), rules_key(speaking[1], rules)
        record = read_case_record(path)
        if key not in record.setdefault("shapes", {}):
            record["shapes"][key] = _shapes(labels, speaking, rules).model_dump(mode="json")
            write_json(path, record)
        known = CaseRecord.model_validate(record)
        fold, shapes = record["fold"], known.shapes[key]
        algos = candidate.by_fold[fold]
        appearance = Appearance(
            traits={f"{algo}_{fold}": known.traits[algo] for algo in algos},
            shapes=shapes.said,
            spacing_mm=shapes.spacing_mm,
            shape=shapes.shape,
        )
        studied.append(
            Studied(
                case=name,
                fold=fold,
                appearance=appearance,
                truth=shapes.truth,
                dice=dice[name],
                patient=speaking[0].group or "",
            )
        )
    return studied


def _shapes(labels: OutOfFoldLabels, speaking: Speaking, rules: Sequence[ClassRule]) -> StoredShapes:
    case, _ = speaking
    label, (said, _) = read_case_label(case), labels.cleaned(speaking, rules)
    x, y, z = said.shape
    return StoredShapes(
        truth=truth_shapes(case, label.array[0], labels.label_map, label.spacing_mm),
        said=tuple(shapes_of(said, labels.label_map, label.spacing_mm)),
        spacing_mm=label.spacing_mm,
        shape=(x, y, z),
    )


# -- spoilt copies


def spoilt_copies(copies: Copies, cases: Mapping[str, Speaking], folds: Mapping[str, int]) -> list[Studied]:
    """Predict spoilt copies of some cases as long as there is time; where some are there, these are all.

    Args:
        copies: what predicts them.
        cases: as `out_of_fold` takes them.
        folds: case -> its fold.
    """
    able = [name for name, (case, _) in cases.items() if copies.can_predict(case, folds[name])]
    wanted = [(name, KINDS[n % len(KINDS)], n) for n, name in enumerate(_chosen(able, folds))]
    keys = [copies.key(cases[name][0], kind, [n, folds[name]]) for name, kind, n in wanted]
    made = [copies.copies[key] for key in keys if key in copies.copies]
    if made:
        return [_studied(copy) for copy in made]
    for name, kind, n in wanted:
        if copies.expected_s >= copies.learning_s:
            break
        try:
            made.append(copies.predict(cases[name][0], folds[name], kind, [n, folds[name]]))
        except DataError as error:  # of a spoilt copy, or of a file that has gone since
            log.info("ensemble: no %s copy of %s: %s", kind, name, error)
    copies.save()
    log.info("ensemble: %d spoilt copies predicted, to know how failures look", len(made))
    return [_studied(copy) for copy in made]


def _chosen(names: Sequence[str], folds: Mapping[str, int]) -> list[str]:
    """Cases to spoil, of each fold in turn, spread over its names; a few of many, or all several times."""
    if not names:
        return []
    by_fold = {f: sorted(n for n in names if folds[n] == f) for f in sorted({folds[n] for n in names})}
    chosen = []
    for number in range(MOST_DRAWN):
        of_fold = [*by_fold.values()][number % len(by_fold)]
        turn, turns = number // len(by_fold), math.ceil(MOST_DRAWN / len(by_fold))
        chosen.append(of_fold[turn * len(of_fold) // turns])
    return chosen


def _studied(copy: StoredCopy) -> Studied:
    return Studied(
        case=copy.case,
        fold=copy.fold,
        appearance=Appearance(traits=copy.traits, shapes=copy.shapes, spacing_mm=copy.spacing_mm, shape=copy.shape),
        truth=copy.truth,
        dice=[math.nan if d is None else d for d in copy.dice],
        kind=copy.kind,
    )
