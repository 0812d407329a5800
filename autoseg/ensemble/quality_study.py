"""What the quality of predictions is learned from: cases out of fold, and spoilt copies of some of them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autoseg.data.datalists.cases import Case, read_case_label
from autoseg.data.labels import LabelMap
from autoseg.data.streams import is_streamed
from autoseg.data.volumes import read_image
from autoseg.ensemble.combine import Candidate
from autoseg.ensemble.labels import OutOfFoldLabels, Speaking, rules_key
from autoseg.ensemble.records import CaseRecord, StoredShapes, read_case_record
from autoseg.ensemble.spoilt import KINDS, spoil
from autoseg.errors import DataError
from autoseg.evaluation.metrics import dice_per_class
from autoseg.evaluation.shapes import ClassShape, shapes_of
from autoseg.inference.appearance import Appearance
from autoseg.inference.postprocess import ClassRule, deeds
from autoseg.inference.predictor import Predictor, model_digest
from autoseg.inference.traits import Traits
from autoseg.workspace.files import digest, write_json
from autoseg.workspace.stored import Stored, read_stored, write_stored

log = logging.getLogger(__name__)

MOST_COPIES = 64
"""Spoilt copies that are predicted: eight of each kind."""
COPIES_SHARE = 0.05
"""Of the time that training took, which predicting them may take."""
VERSION = 1
"""Raised whenever copies are spoilt in another way, or something else is kept of them."""


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


class StoredCopy(Stored):
    """A spoilt copy."""

    case: str
    fold: int
    kind: str
    traits: dict[str, Traits]
    """By job."""
    shapes: tuple[ClassShape, ...]
    truth: tuple[ClassShape | None, ...]
    dice: tuple[float | None, ...]
    spacing_mm: tuple[float, float, float]
    shape: tuple[int, int, int]


class StoredCopies(Stored):
    """What stands in ensemble/spoilt.json."""

    made_from: str
    """A digest."""
    copies: tuple[StoredCopy, ...]


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
        truth=_truth(case, label.array[0], labels.label_map, label.spacing_mm),
        said=tuple(shapes_of(said, labels.label_map, label.spacing_mm)),
        spacing_mm=label.spacing_mm,
        shape=(x, y, z),
    )


def _truth(
    case: Case, label: np.ndarray, label_map: LabelMap, spacing_mm: tuple[float, float, float]
) -> tuple[ClassShape | None, ...]:
    shapes = shapes_of(label, label_map, spacing_mm)
    counted = label_map.names if case.annotated is None else case.annotated
    return tuple(s if n in counted else None for n, s in zip(label_map.names, shapes, strict=True))


# -- spoilt copies


def spoilt_copies(
    labels: OutOfFoldLabels,
    cases: Mapping[str, Speaking],
    rules: Sequence[ClassRule],
    candidate: Candidate,
    folds: Mapping[str, int],
    *,
    device: str,
) -> list[Studied]:
    """Predict spoilt copies of some cases by the models that never saw these; what is there is not made again.

    Args:
        labels, cases, rules, candidate: as `out_of_fold` takes them.
        folds: case -> its fold.
        device: where networks run.
    """
    workspace, path = labels.workspace, labels.workspace.spoilt
    models = {f"{a}_{f}": model_digest(workspace, a, f) for a, f in candidate.members}
    made_from = digest([VERSION, models, candidate.combine, deeds(rules), sorted(folds.items())])
    if path.exists():
        stored = read_stored(path, StoredCopies)
        if stored.made_from == made_from:
            return [_studied(copy) for copy in stored.copies]
    most_s = COPIES_SHARE * sum(workspace.read_job(a, f).seconds or 0.0 for a, f in workspace.job_names())
    begin, predictors, copies = time.monotonic(), dict[int, Predictor](), list[StoredCopy]()
    small = [name for name, (case, _) in cases.items() if not is_streamed(case.images)]  # others are not held whole
    for number, name in enumerate(_chosen(small, folds)):
        if time.monotonic() - begin > most_s:
            break
        fold, kind = folds[name], KINDS[number % len(KINDS)]
        if fold not in predictors:
            jobs = [workspace.job_dir(algo, fold) for algo in candidate.by_fold[fold]]
            predictors[fold] = Predictor(jobs, device=device, combine=candidate.combine, rules=rules)
            predictors[fold].watches_traits = True
        try:
            copies.append(_copy(predictors[fold], cases[name][0], fold, kind, np.random.default_rng([number, fold])))
        except DataError as error:  # of a spoilt copy, or of a file that has gone since
            log.info("ensemble: no %s copy of %s: %s", kind, name, error)
    log.info("ensemble: %d spoilt copies predicted, to know how failures look", len(copies))
    write_stored(path, StoredCopies(made_from=made_from, copies=tuple(copies)))
    return [_studied(copy) for copy in copies]


def _chosen(names: Sequence[str], folds: Mapping[str, int]) -> list[str]:
    """Cases to spoil, of each fold in turn, spread over its names; a few of many, or all several times."""
    if not names:
        return []
    by_fold = {f: sorted(n for n in names if folds[n] == f) for f in sorted({folds[n] for n in names})}
    chosen = []
    for number in range(MOST_COPIES):
        of_fold = [*by_fold.values()][number % len(by_fold)]
        turn, turns = number // len(by_fold), math.ceil(MOST_COPIES / len(by_fold))
        chosen.append(of_fold[turn * len(of_fold) // turns])
    return chosen


def _copy(predictor: Predictor, case: Case, fold: int, kind: str, random: np.random.Generator) -> StoredCopy:
    image, label = spoil(kind, read_image(case.images), read_case_label(case).array[0], random)
    said = predictor.predict_labels(image)
    label_map = predictor.label_map.named
    dice = dice_per_class(said, label, label_map, annotated=case.annotated)
    x, y, z = said.shape
    return StoredCopy(
        case=case.name,
        fold=fold,
        kind=kind,
        traits=predictor.traits(),
        shapes=tuple(shapes_of(said, label_map, image.spacing_mm)),
        truth=_truth(case, label, label_map, image.spacing_mm),
        dice=tuple(None if math.isnan(d) else d for d in dice),
        spacing_mm=image.spacing_mm,
        shape=(x, y, z),
    )


def _studied(copy: StoredCopy) -> Studied:
    return Studied(
        case=copy.case,
        fold=copy.fold,
        appearance=Appearance(traits=copy.traits, shapes=copy.shapes, spacing_mm=copy.spacing_mm, shape=copy.shape),
        truth=copy.truth,
        dice=[math.nan if d is None else d for d in copy.dice],
        kind=copy.kind,
    )
