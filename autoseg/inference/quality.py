"""How good a prediction is likely to be, class by class, how large the classes are, and whether to doubt all of it.

What is stored is plain numbers, fitted in the ensemble stage (`autoseg.ensemble.quality`); here they are applied. The
predicted Dice is the logistic of a sum, each term of which can only lower it: the worse a feature, the lower the Dice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import Field

from autoseg.config.fields import NotNegative
from autoseg.data.labels import LabelMap
from autoseg.evaluation.score_files import QualityCheck
from autoseg.inference.appearance import (
    FEATURES,
    Appearance,
    Figures,
    Reference,
    class_distances,
    features_of,
    fold_of,
    image_distances,
)
from autoseg.inference.traits import Traits

LEVEL = 0.9
"""Of every interval here."""
FAR = 1.25
"""Times the farthest training case from which an image is not like the training data."""
LEAST_FAR = 4.0
"""Standard deviations that are never odd, as extremes of few cases say little."""
LEAST_OUTSIDE = 0.1
"""How far, as a logarithm, spacing and extent may lie outside what training has seen."""
MOST_LOG = 50.0
"""Logarithm of a volume above which none is."""
SPREAD_FLOOR = 0.02
"""Least spread of a Dice around what was predicted, beside what is missing to 1."""


class ClassQuality(Figures):
    """What is known of a class."""

    name: str
    network_index: int
    """Of the networks' class that it is, or is part of."""
    intercepts: dict[int, float] = Field(min_length=1)
    """By fold, whose models are not equally good."""
    radius: NotNegative | None
    """Quantile of |Dice - predicted| / spread over cases out of fold; None: too few to tell."""
    radius_odd: NotNegative | None
    """The same for images that are not like the training data, from spoilt copies."""
    volumes: dict[int, tuple[float, ...]]
    """Fold -> how far, as a logarithm, each of its cases' volumes was from what its models said."""


class QualityModel(Figures):
    """What stands in ensemble/quality.json."""

    advice: ClassVar[str] = "Undo the edit, or delete the file and run `autoseg ensemble` again."

    version: str
    """Of autoseg that fitted it."""
    made_from: str
    """Digest of the ensemble that it speaks of, as `EnsembleSpec.key` has it."""
    features: tuple[str, ...]
    weights: tuple[NotNegative, ...]
    """Of the features."""
    classes: tuple[ClassQuality, ...]
    reference: Reference
    check: QualityCheck

    @property
    def faults(self) -> list[str]:
        """What does not fit together, in words."""
        faults, num = [], len(self.classes)
        if self.features != FEATURES or len(self.weights) != len(FEATURES):
            faults.append(f"features: found {len(self.features)} with {len(self.weights)} weights, expected {FEATURES}")
        known = self.reference
        if {len(known.classes), len(known.doubt), len(known.mirroring)} != {num}:
            faults.append(f"reference: not of {num} classes")
        return faults


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassVerdict:
    """What is thought of one class of a prediction; None: not known."""

    name: str
    dice: float | None
    low: float | None
    high: float | None
    volume_ml: float
    volume_low_ml: float | None
    volume_high_ml: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is thought of a prediction."""

    classes: tuple[ClassVerdict, ...]
    reasons: tuple[str, ...]
    """Why the image is not like the training data, in words; none where it is."""

    @property
    def dice(self) -> float | None:
        """Mean predicted Dice of the classes that one is known of."""
        known = [c.dice for c in self.classes if c.dice is not None]
        return sum(known) / len(known) if known else None


def worst_first(dice: float | None, is_odd: bool) -> float:
    """What cases are sorted by: of those that nothing is known of, odd ones come first, and the others last."""
    return dice if dice is not None else -1.0 if is_odd else math.inf


def network_indices(label_map: LabelMap) -> list[int]:
    """For each of the user's classes the networks' class that it is, or is part of."""
    of_part = {part: i for i, name in enumerate(label_map.names) for part in label_map.parts(name)}
    return [of_part[name] for name in label_map.named.names]


def spread(dice: float) -> float:
    """How far a Dice is likely to be off, up to a factor: the worse, the farther."""
    return SPREAD_FLOOR + (1 - dice)


def logistic(value: float) -> float:
    """1 / (1 + exp(-value))."""
    return 1 / (1 + math.exp(-value)) if value > -500 else 0.0


def judge(model: QualityModel, appearance: Appearance) -> Verdict:
    """Say what is thought of a prediction."""
    reasons = reasons_of(model.reference, [c.name for c in model.classes], appearance)
    classes = []
    for i, known in enumerate(model.classes):
        dice = predicted_dice(model, appearance, i)
        low = high = None
        if dice is not None:
            radius = known.radius_odd if reasons else known.radius
            if radius is not None:
                reach = radius * spread(dice)
                low, high = max(0.0, dice - reach), min(1.0, dice + reach)
        volume = appearance.shapes[i].volume_ml
        volume_low, volume_high = (None, None) if reasons else volume_interval(known, model.reference, appearance, i)
        classes.append(
            ClassVerdict(
                name=known.name,
                dice=dice,
                low=low,
                high=high,
                volume_ml=volume,
                volume_low_ml=volume_low,
                volume_high_ml=volume_high,
            )
        )
    return Verdict(classes=tuple(classes), reasons=tuple(reasons))


def predicted_dice(model: QualityModel, appearance: Appearance, index: int) -> float | None:
    """Mean over the folds of what is predicted of a class by each one's models; None where nothing is to be told."""
    known = model.classes[index]
    values = []
    image = image_distances(appearance, model.reference)
    for fold, part in appearance.by_fold().items():
        features = features_of(part, fold, model.reference, index, known.network_index, image)
        if features is None:
            return None
        intercept = known.intercepts.get(fold, sum(known.intercepts.values()) / len(known.intercepts))
        values.append(logistic(intercept - float(np.dot(model.weights, features))))
    return sum(values) / len(values) if values else None


# -- volumes


def cv_plus(by_fold: Mapping[int, tuple[float, Sequence[float]]], level: float = LEVEL) -> tuple[float, float] | None:
    """The interval of CV+: what each fold's models say, widened by how far they were from the cases they never saw.

    Args:
        by_fold: fold -> what its models say now, and the absolute errors that they made on its cases.
        level: that the interval aims at; what is guaranteed for cases drawn like the training ones is 2 * level - 1,
            what is reached is about the level.

    Returns:
        Low and high; None where there are too few cases for the level.

    Source: Barber, Candes, Ramdas and Tibshirani 2021, Predictive inference with the jackknife+, section 3.
    """
    lows = sorted(said - error for said, errors in by_fold.values() for error in errors)
    highs = sorted(said + error for said, errors in by_fold.values() for error in errors)
    beyond = math.floor((1 - level) * (len(lows) + 1) + 1e-9)
    if beyond < 1:
        return None
    return lows[beyond - 1], highs[len(highs) - beyond]


def volume_interval(
    known: ClassQuality, reference: Reference, appearance: Appearance, index: int
) -> tuple[float | None, float | None]:
    """The interval of a class' true volume, ml; None, None where there are too few cases, or none to compare."""
    shape, of_class = appearance.shapes[index], reference.classes[index]
    if shape.volume_ml == 0:
        return None, None
    shares = _shares_by_fold(appearance.traits, known.network_index)
    said = {
        fold: math.log(shape.volume_ml * shares.get(fold, 1.0) + of_class.offset_ml)
        for fold, errors in known.volumes.items()
        if errors
    }
    interval = cv_plus({fold: (value, [abs(e) for e in known.volumes[fold]]) for fold, value in said.items()})
    if interval is None:
        return None, None
    low, high = (max(0.0, math.exp(min(end, MOST_LOG)) - of_class.offset_ml) for end in interval)
    return low, high


def volume_error(said_ml: float, true_ml: float, offset_ml: float) -> float:
    """How far a volume was from what was said, as a logarithm."""
    return math.log((true_ml + offset_ml) / (said_ml + offset_ml))


def _shares_by_fold(traits: Mapping[str, Traits], network_index: int) -> dict[int, float]:
    """Fold -> how many voxels its models give a class, over the mean of all folds."""
    by_fold: dict[int, list[float]] = {}
    for job, of_job in traits.items():
        by_fold.setdefault(fold_of(job), []).append(of_job.classes[network_index][0])
    means = {fold: sum(voxels) / len(voxels) for fold, voxels in by_fold.items()}
    mean = sum(means.values()) / len(means) if means else 0.0
    return {fold: value / mean for fold, value in means.items()} if mean > 0 else {}


# -- what is odd


def reasons_of(reference: Reference, names: Sequence[str], appearance: Appearance) -> list[str]:
    """Why an image is not like the training data, in words; empty where it is."""
    reasons = []
    image = image_distances(appearance, reference)
    for name, words in (("spacing", "voxels of {} mm"), ("extent", "an extent of {} mm")):
        if image[name] > LEAST_OUTSIDE:
            values = appearance.spacing_mm if name == "spacing" else appearance.size_mm
            least, most = reference.spacing_mm if name == "spacing" else reference.size_mm
            seen = _lengths(least) if least == most else f"{_lengths(least)} to {_lengths(most)}"
            reasons.append(f"{words.format(_lengths(values))}, training images have {seen}")
    for name, words in (
        ("intensities", "intensities are distributed otherwise than in the training images"),
        ("texture", "noise, sharpness or contrast are other than in the training images"),
    ):
        if name in image and image[name] > _limit(reference, name):
            reasons.append(f"{words} ({_times(image[name], reference, name)})")
    for name, shape, known in zip(names, appearance.shapes, reference.classes, strict=True):
        away = class_distances(shape, known)
        for distance, words in (
            ("volume", _volume_words(shape.volume_ml, math.exp(min(known.log_ml[0], MOST_LOG)) - known.offset_ml)),
            ("shape", "lies or is stretched otherwise than in the training labels"),
            ("pieces", "is in more pieces than in the training labels"),
        ):
            if away.get(distance, 0.0) > _limit(reference, distance):
                reasons.append(f"{name} {words} ({_times(away[distance], reference, distance)})")
    return reasons


def _volume_words(volume_ml: float, usual_ml: float) -> str:
    if volume_ml == 0:
        return "is not found"
    return f"has {volume_ml:.3g} ml, usual in training are {usual_ml:.3g}"


def _limit(reference: Reference, name: str) -> float:
    return max(LEAST_FAR, FAR * reference.most.get(name, 0.0))


def _times(value: float, reference: Reference, name: str) -> str:
    return f"{value:.1f} deviations away, at most {reference.most.get(name, 0.0):.1f} in training"


def _lengths(values: Sequence[float]) -> str:
    return "x".join(f"{v:.3g}" for v in values)
