"""What more cases would bring: a power law through the Dice of models that learned from fewer, with its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from autoseg.evaluation.intervals import LEVEL
from autoseg.workspace.stored import Score, Stored

EXPONENTS = np.geomspace(0.1, 2.0, 40)
"""Of the power law that are tried. Source: Hestness et al. 2017 find 0.07 to 0.35 for large data sets, small ones in
medical images fall faster; the range is a choice."""
NUM_DRAWS = 1000


class CurvePoint(Stored):
    """One training of the curve."""

    num_cases: int
    """That it learned from."""
    seed: int
    """Of the draw of cases, and of the training."""
    fold: int
    """That it was scored on."""
    dice: Score
    """Mean over classes and cases."""
    cases: dict[str, float]
    """Case of the fold -> mean Dice over its classes."""
    seconds: float


class CurvePrediction(Stored):
    """The Dice that is expected with a number of cases."""

    num_cases: int
    dice: float
    low: float
    """Ends of its 95 % interval."""
    high: float


class LearningCurve(Stored):
    """What stands in learning_curve/curve.json."""

    advice: ClassVar[str] = "Undo the edit, or delete the file and run `autoseg learning_curve` again."

    version: str
    algo: str
    num_cases: int
    """That a training has at most: the cases of all folds but one."""
    points: tuple[CurvePoint, ...]
    predictions: tuple[CurvePrediction, ...]
    """Of the numbers that were trained, and of more."""
    failures: tuple[str, ...] = ()

    @property
    def caveat(self) -> str:
        """What the intervals do not hold; empty where they hold all that they are to."""
        if len({p.seed for p in self.points}) != 1:
            return ""
        return "With one seed nothing says how much trainings differ, and the intervals leave it out: give --seeds 2."


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """Draws of a law: Dice = ceiling - scale * n ** -exponent."""

    ceiling: np.ndarray
    scale: np.ndarray
    exponent: np.ndarray
    """(draws,) each."""

    def at(self, num_cases: float) -> np.ndarray:
        """(draws,) Dice, at most 1."""
        return np.clip(self.ceiling - self.scale * num_cases**-self.exponent, 0, 1)


def fit_law(points: Sequence[CurvePoint], patient_of: Mapping[str, Hashable] | None = None, *, seed: int = 0) -> Law:
    """Fit the law to the curve, over and over with other patients and other noise of training.

    Each draw takes patients of the folds with replacement, the same for all sizes, since all were scored on the same
    cases; adds the noise that trainings of one size differ by; fits ceiling and scale for every exponent by least
    squares, neither of them negative and the ceiling at most 1; and takes an exponent by its likelihood. So an
    exponent that the points do not settle widens the interval.

    Args:
        points: of at least three sizes.
        patient_of: case -> patient; a case that is not there stands alone.

    Raises:
        ValueError: Fewer than three sizes.

    Source: power laws of learning curves: Hestness et al. 2017; Figueroa et al. 2012 weigh points as here.
    """
    sizes = sorted({p.num_cases for p in points})
    if len(sizes) < 3:
        raise ValueError(f"{len(sizes)} sizes, expected at least three")
    rng = np.random.default_rng(seed)
    seeds = sorted({p.seed for p in points})
    noise = _training_noise(points)
    num_at = np.array([sum(p.num_cases == n for p in points) for n in sizes])
    draws = [_drawn_means(points, sizes, seeds, patient_of or {}, rng) for _ in range(NUM_DRAWS)]
    curves = np.array(draws)
    curves += rng.standard_normal(curves.shape) * noise / np.sqrt(num_at)
    # What a point is known to, besides what all sizes share: the noise, and how patients change the curve's form.
    shared = curves - curves.mean(axis=1, keepdims=True)
    error = np.maximum(shared.std(axis=0), 1e-4)
    x = np.array(sizes, float)
    ceilings, scales, misfits = [], [], []
    for exponent in EXPONENTS:
        ceiling, scale = _least_squares(x**-exponent, curves, 1 / error**2)
        fit = ceiling[:, None] - scale[:, None] * x**-exponent
        ceilings.append(ceiling)
        scales.append(scale)
        misfits.append((((curves - fit) / error) ** 2).sum(axis=1))
    weight = np.exp(-0.5 * (np.array(misfits) - np.min(misfits, axis=0)))
    weight /= weight.sum(axis=0)
    pick = (weight.cumsum(axis=0) < rng.random(NUM_DRAWS)).sum(axis=0).clip(0, len(EXPONENTS) - 1)
    which = np.arange(NUM_DRAWS)
    return Law(ceiling=np.array(ceilings)[pick, which], scale=np.array(scales)[pick, which], exponent=EXPONENTS[pick])


def _training_noise(points: Sequence[CurvePoint]) -> float:
    """Deviation of trainings of one size, less what a seed's fold is easier or harder by; 0 with one seed."""
    sizes, seeds = sorted({p.num_cases for p in points}), sorted({p.seed for p in points})
    table = {(p.num_cases, p.seed): p.dice for p in points if p.dice is not None}
    rows = [[table.get((n, s), math.nan) for s in seeds] for n in sizes]
    values = np.array(rows, float)
    values = values[~np.isnan(values).any(axis=1)]
    if values.shape[0] < 2 or values.shape[1] < 2:
        return 0.0
    rest = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
    return float(np.sqrt((rest**2).sum() / ((values.shape[0] - 1) * (values.shape[1] - 1))))


def _drawn_means(
    points: Sequence[CurvePoint],
    sizes: Sequence[int],
    seeds: Sequence[int],
    patient_of: Mapping[str, Hashable],
    rng: np.random.Generator,
) -> list[float]:
    """Mean Dice of each size with patients drawn anew, alike for all sizes of a seed."""
    means: dict[int, list[float]] = {n: [] for n in sizes}
    for one in seeds:
        own = [p for p in points if p.seed == one]
        groups: dict[Hashable, list[str]] = {}
        for name in own[0].cases:
            groups.setdefault(patient_of.get(name, ("case", name)), []).append(name)
        patients = [*groups.values()]
        taken = [name for i in rng.integers(0, len(patients), len(patients)) for name in patients[i]]
        for p in own:
            known = [p.cases[name] for name in taken if name in p.cases]
            means[p.num_cases].append(sum(known) / len(known) if known else math.nan)
    return [float(np.nanmean(means[n])) for n in sizes]


def _least_squares(basis: np.ndarray, curves: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ceiling and scale of curves (draws, sizes), the scale from 0 on, the ceiling at most 1."""
    total = weights.sum()
    mean_x, mean_y = (weights * basis).sum() / total, (curves * weights).sum(axis=1) / total
    spread = (weights * (basis - mean_x) ** 2).sum()
    scale = -((curves - mean_y[:, None]) * weights * (basis - mean_x)).sum(axis=1) / spread
    scale = np.maximum(scale, 0)
    ceiling = mean_y + scale * mean_x
    above = ceiling > 1
    scale = np.where(above, ((1 - curves) * weights * basis).sum(axis=1) / (weights * basis**2).sum(), scale)
    return np.minimum(ceiling, 1.0), np.maximum(scale, 0)


def predict_at(law: Law, num_cases: Sequence[int]) -> list[CurvePrediction]:
    """The median and the 95 % interval of the law's draws at numbers of cases."""
    ends = ((1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2)
    rows = []
    for n in num_cases:
        low, middle, high = (round(float(v), 6) for v in np.quantile(law.at(n), ends))
        rows.append(CurvePrediction(num_cases=n, dice=middle, low=low, high=high))
    return rows
