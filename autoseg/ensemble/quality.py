"""Learn how good predictions are from those whose truth is known: `ensemble/quality.json`.

Cases out of fold say how Dice depends on what a prediction looks like where all is well, spoilt copies of some of them
where it is not. All that is told of the fit is told of cases that it was not fitted on.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from autoseg.data.labels import LabelMap
from autoseg.ensemble.combine import Chosen
from autoseg.ensemble.copies import Copies
from autoseg.ensemble.finish import Finished
from autoseg.ensemble.labels import OutOfFoldLabels, Speaking
from autoseg.ensemble.quality_study import Studied, out_of_fold, spoilt_copies
from autoseg.evaluation.score_files import QualityCheck
from autoseg.inference.appearance import (
    BEYOND,
    FEATURES,
    WITHIN,
    Reference,
    features_of,
    image_distances,
    reference_of,
)
from autoseg.inference.ensemble_spec import EnsembleSpec
from autoseg.inference.quality import (
    LEVEL,
    ClassQuality,
    QualityModel,
    logistic,
    network_indices,
    reasons_of,
    spread,
    volume_error,
)
from autoseg.version import __version__

log = logging.getLogger(__name__)

FEWEST_CASES = 8
"""Out of fold, under which nothing is fitted: as many as intervals of scores hold from."""
FEWEST_IN_CLASS = 20
"""Residuals of a class under which those of all classes are taken together."""
PRIOR = 0.5
"""Weight of each of `BEYOND` that is assumed as long as copies do not say better: twice as far as the farthest training
case then costs a third of the odds of being right. A choice."""
PRIOR_ROWS = 2.0
"""How many rows a unit of distance from the prior weighs as much as, each with an error of `ROBUST`."""
ROBUST = 0.1
"""Error of a Dice beyond which it counts linearly."""
PULL = 0.05
"""What a unit of distance of an intercept from that of its class, or of all classes, costs: an error of as much."""
PARTS = 5
"""Of the cases, each of which is predicted by a fit to the others."""


def learn_quality(
    labels: OutOfFoldLabels,
    cases: Mapping[str, Speaking],
    choice: Chosen,
    finished: Finished,
    spec: EnsembleSpec,
    label_map: LabelMap,
    copies: Copies,
) -> QualityModel | None:
    """Learn from the chosen ensemble's cases out of fold how good its predictions are.

    Args:
        labels, cases: as `autoseg.ensemble.quality_study.out_of_fold` takes them.
        choice: what was chosen.
        finished: what it came to.
        spec: what is stored of it.
        label_map: the networks' classes.
        copies: what predicts spoilt copies.

    Returns:
        None where there are too few cases.
    """
    studied = out_of_fold(labels, cases, finished.rules, choice.candidate, finished.dice)
    if not _is_enough(studied):
        log.info(
            "ensemble: fewer than %d cases out of fold, or all of one patient, so that quality is not predicted",
            FEWEST_CASES,
        )
        return None
    spoilt = spoilt_copies(copies, cases, {s.case: s.fold for s in studied})
    model = fit_quality(studied, spoilt, label_map, spec.key)
    check = model.check
    log.info(
        "ensemble: predicted Dice of cases out of fold: off by %s on average, Spearman %s; with %d spoilt copies %s",
        *(check.error, check.spearman, check.num_copies, check.spearman_all),
    )
    return model


def _is_enough(cases: Sequence[Studied]) -> bool:
    return len(cases) >= FEWEST_CASES and len({*_parts(cases).values()}) > 1


class _Row:
    """One class of a studied prediction."""

    __slots__ = ("dice", "features", "index", "studied")

    def __init__(self, studied: Studied, index: int, features: list[float], dice: float) -> None:
        self.studied, self.index, self.features, self.dice = studied, index, features, dice


def fit_quality(cases: Sequence[Studied], copies: Sequence[Studied], label_map: LabelMap, key: str) -> QualityModel:
    """Learn from cases out of fold, of two patients at least, and from spoilt copies.

    Args:
        cases: each a prediction by models that never saw it.
        copies: of some of them.
        label_map: the networks' classes.
        key: what names the ensemble, as `EnsembleSpec.key` has it.
    """
    names, network = label_map.named.names, network_indices(label_map)
    whole, fitted = _learned(cases, copies, network)
    part_of = _parts(cases)
    tried: list[_Tried] = []
    for part in sorted({*part_of.values()}):
        others = [[s for s in some if part_of[s.case] != part] for some in (cases, copies)]
        reference, fit = _learned(others[0], others[1], network)
        for s in (*cases, *copies):
            if part_of[s.case] == part:
                is_odd = bool(reasons_of(reference, names, s.appearance))
                tried += [_Tried(row, fit(row), is_odd) for row in _rows([s], reference, network)]
    radii, any_radius = _radii([t for t in tried if not t.row.studied.kind], len(names))
    odd_radii, any_odd = _radii([t for t in tried if t.is_odd], len(names))
    classes = []
    for i, name in enumerate(names):
        volumes: dict[int, tuple[float, ...]] = dict.fromkeys(sorted({s.fold for s in cases}), ())
        for s in cases:
            truth = s.truth[i]
            if truth is not None and s.appearance.shapes[i].volume_ml > 0:
                error = volume_error(s.appearance.shapes[i].volume_ml, truth.volume_ml, whole.classes[i].offset_ml)
                volumes[s.fold] = (*volumes[s.fold], round(error, 6))
        classes.append(
            ClassQuality(
                name=name,
                network_index=network[i],
                intercepts=fitted.intercepts[i],
                radius=radii.get(i, any_radius),
                radius_odd=odd_radii.get(i, any_odd),
                volumes=volumes,
            )
        )
    return QualityModel(
        version=__version__,
        made_from=key,
        features=FEATURES,
        weights=tuple(fitted.weights),
        classes=tuple(classes),
        reference=whole,
        check=_check(tried, [c.radius for c in classes], len(cases), len(copies)),
    )


def _parts(cases: Sequence[Studied]) -> dict[str, int]:
    """Case -> part, of `PARTS`, each of which has cases of every fold; a patient's are in one.

    Not the folds themselves: new images are seen by the same models as these cases, and how sure of itself a model is
    is known of it, not of the next.
    """
    part_of: dict[str, int] = {}
    patients: dict[str, int] = {}
    for number, s in enumerate(sorted(cases, key=lambda s: (s.fold, s.case))):
        part = patients.setdefault(s.patient, number % PARTS) if s.patient else number % PARTS
        part_of[s.case] = part
    return part_of


class _Fit:
    """Intercepts, by class and fold, and weights."""

    def __init__(self, intercepts: Sequence[dict[int, float]], weights: np.ndarray) -> None:
        self.intercepts = [{fold: round(float(v), 6) for fold, v in of_class.items()} for of_class in intercepts]
        self.weights = [round(float(v), 6) for v in weights]

    def __call__(self, row: _Row) -> float:
        return logistic(self.intercept(row) - float(np.dot(self.weights, row.features)))

    def intercept(self, row: _Row) -> float:
        """Of its class and fold."""
        own = self.intercepts[row.index]
        return own.get(row.studied.fold, sum(own.values()) / len(own))


class _Tried:
    """A row, and what was predicted of it by a fit that did not see its case."""

    __slots__ = ("is_odd", "predicted", "row")

    def __init__(self, row: _Row, predicted: float, is_odd: bool) -> None:
        self.row, self.predicted, self.is_odd = row, predicted, is_odd

    @property
    def off(self) -> float:
        """How far it is off, in spreads."""
        return abs(self.row.dice - self.predicted) / spread(self.predicted)


def _rows(studied: Sequence[Studied], reference: Reference, network: Sequence[int]) -> list[_Row]:
    rows = []
    for s in studied:
        image = image_distances(s.appearance, reference)
        for i, dice in enumerate(s.dice):
            features = features_of(s.appearance, s.fold, reference, i, network[i], image)
            if features is not None and not math.isnan(dice):
                rows.append(_Row(s, i, features, dice))
    return rows


def _learned(cases: Sequence[Studied], copies: Sequence[Studied], network: Sequence[int]) -> tuple[Reference, _Fit]:
    """What cases are like, and a fit: first what holds among them, then, with that fixed, what copies say beyond.

    In one step copies, which are worse than they look, would pull down what is predicted of everything.
    """
    reference = reference_of([s.appearance for s in cases], [s.fold for s in cases], [s.truth for s in cases], network)
    rows = _rows(cases, reference, network)
    intercepts, within = _fit_within(rows, len(network))
    beyond = _fit_beyond(_rows(copies, reference, network), _Fit(intercepts, within))
    return reference, _Fit(intercepts, np.concatenate([within, beyond]))


def _fit_within(rows: Sequence[_Row], num_classes: int) -> tuple[list[dict[int, float]], np.ndarray]:
    """Intercepts of the classes, by fold, and weights of `WITHIN`."""
    from scipy import sparse

    features = np.array([row.features[: len(WITHIN)] for row in rows]).reshape(-1, len(WITHIN))
    index, dice = np.array([row.index for row in rows], int), np.array([row.dice for row in rows])
    folds = sorted({row.studied.fold for row in rows})
    fold = np.array([folds.index(row.studied.fold) for row in rows], int)
    num = num_classes * len(folds)

    # Of many classes and folds there are hundreds of intercepts, of which a row has two.
    is_class, is_fold = _indicator(index, num_classes), _indicator(index * len(folds) + fold, num)
    eye = sparse.identity(num_classes + num, format="csr")
    centred = sparse.csr_matrix(np.eye(num_classes) - 1 / num_classes)
    pull = PULL * sparse.block_diag([centred, eye[:num, :num]], format="csr")
    linear = sparse.hstack([is_class, is_fold, sparse.csr_matrix(-features)], format="csr")

    def residuals(values: np.ndarray) -> np.ndarray:
        return np.concatenate([_robust(_logistic(linear @ values) - dice), pull @ values[: num_classes + num]])

    def jacobian(values: np.ndarray) -> Any:
        share = _logistic(linear @ values)
        slope = _robust_slope(share - dice) * share * (1 - share)
        nothing = sparse.csr_matrix((num_classes + num, len(WITHIN)))
        return sparse.vstack([sparse.diags(slope) @ linear, sparse.hstack([pull, nothing])], format="csr")

    start = np.concatenate([np.ones(num_classes), np.zeros(num), np.full(len(WITHIN), 0.5)])
    free, weights = _solved(residuals, start, num_classes + num, jacobian)
    each = free[num_classes:].reshape(num_classes, len(folds)) + free[:num_classes, None]
    return [dict(zip(folds, of_class, strict=True)) for of_class in each.tolist()], weights


def _indicator(index: np.ndarray, num: int) -> Any:
    """(rows, num), sparse: 1 where a row is of an index."""
    from scipy import sparse

    return sparse.csr_matrix((np.ones(len(index)), (np.arange(len(index)), index)), shape=(len(index), num))


def _fit_beyond(rows: Sequence[_Row], fit: _Fit) -> np.ndarray:
    """Weights of `BEYOND`, beside a fit of what is within."""
    features = np.array([row.features for row in rows]).reshape(-1, len(FEATURES))
    intercepts = np.array([fit.intercept(row) for row in rows])
    known = intercepts - features[:, : len(WITHIN)] @ np.array(fit.weights)
    beyond, dice = features[:, len(WITHIN) :], np.array([row.dice for row in rows])

    def residuals(values: np.ndarray) -> np.ndarray:
        off = _robust(_logistic(known - beyond @ values) - dice)
        return np.concatenate([off, ROBUST * math.sqrt(PRIOR_ROWS) * (values - PRIOR)])

    return _solved(residuals, np.full(len(BEYOND), PRIOR), 0)[1]


def _logistic(values: np.ndarray) -> np.ndarray:
    result: np.ndarray = 1 / (1 + np.exp(-np.clip(values, -50, 50)))
    return result


def _robust(off: np.ndarray) -> np.ndarray:
    """Errors whose squares grow like those of soft L1."""
    away: np.ndarray = np.sqrt(1 + (off / ROBUST) ** 2)
    result: np.ndarray = np.sign(off) * ROBUST * np.sqrt(2 * (away - 1))
    return result


def _robust_slope(off: np.ndarray) -> np.ndarray:
    """The derivative of `_robust`, which is 1 at 0."""
    away = np.sqrt(1 + (off / ROBUST) ** 2)
    slope: np.ndarray = np.sqrt((1 + away) / 2) / away
    return slope


def _solved(
    residuals: Callable[[np.ndarray], np.ndarray],
    start: np.ndarray,
    num_free: int,
    jacobian: Callable[[np.ndarray], Any] | Literal["2-point"] = "2-point",
) -> tuple[np.ndarray, np.ndarray]:
    """The least squares: the first values, which are free, and the others, which are not negative."""
    from scipy.optimize import least_squares

    low = np.where(np.arange(len(start)) < num_free, -20.0, 0.0)
    solved = least_squares(residuals, start, jac=jacobian, bounds=(low, 50.0)).x
    return solved[:num_free], solved[num_free:]


def _radii(tried: Sequence[_Tried], num_classes: int) -> tuple[dict[int, float], float | None]:
    """Quantiles of errors in spreads: by class where there are enough, and of all; None where there are too few.

    Source: Lei et al. 2018, Distribution-free predictive inference for regression (locally weighted), with errors of
    folds that the fit did not see.
    """
    by_class: dict[int, list[float]] = {i: [] for i in range(num_classes)}
    for t in tried:
        by_class[t.row.index].append(t.off)
    each = {i: _upper(values) for i, values in by_class.items() if len(values) >= FEWEST_IN_CLASS}
    return {i: v for i, v in each.items() if v is not None}, _upper([t.off for t in tried])


def _upper(values: Sequence[float]) -> float | None:
    """The quantile that the next of such values is below at `LEVEL`; None where there are too few for it."""
    place = math.ceil(LEVEL * (len(values) + 1) - 1e-9)
    return round(sorted(values)[place - 1], 6) if place <= len(values) else None


def _check(tried: Sequence[_Tried], radii: Sequence[float | None], num_cases: int, num_copies: int) -> QualityCheck:
    by_studied: dict[int, list[_Tried]] = {}
    for t in tried:
        by_studied.setdefault(id(t.row.studied), []).append(t)
    points = [
        (
            each[0].row.studied.case,
            each[0].row.studied.kind,
            round(float(np.mean([t.predicted for t in each])), 4),
            round(float(np.mean([t.row.dice for t in each])), 4),
        )
        for each in by_studied.values()
    ]
    clean = [(p, t) for _, kind, p, t in points if not kind]
    own = [t for t in tried if not t.row.studied.kind]
    inside = [t.off <= radius for t in own if (radius := radii[t.row.index]) is not None]
    return QualityCheck(
        num_cases=num_cases,
        num_copies=num_copies,
        spearman=_spearman(clean),
        spearman_all=_spearman([(p, t) for _, _, p, t in points]),
        error=round(float(np.mean([abs(p - t) for p, t in clean])), 4) if clean else None,
        covered=round(float(np.mean(inside)), 4) if inside else None,
        points=tuple(points),
    )


def _spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    from scipy.stats import spearmanr

    if len(pairs) < 3 or len({p for p, _ in pairs}) < 2 or len({t for _, t in pairs}) < 2:
        return None
    return round(float(spearmanr([p for p, _ in pairs], [t for _, t in pairs]).statistic), 4)
