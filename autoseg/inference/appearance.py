"""How far a predicted image is from what training has seen, and how sure of it the models are: what quality is told by.

Everything is a distance: 0 is like the training cases, more is farther. The same is measured of cases out of fold, of
spoilt copies of them and of new images, from what `autoseg.inference.traits` counts while models run, from the labels,
and from the image's grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from pydantic import ConfigDict, Field

from autoseg.config.fields import Positive
from autoseg.evaluation.shapes import ClassShape, Triple
from autoseg.inference.traits import Traits, expected_dice, mirror_dice
from autoseg.workspace.stored import Stored

LEAST_DICE, MOST_DICE = 0.01, 0.995
"""Bounds within which a Dice is turned into log odds."""
EMPTY_SHARE = 0.01
"""Of the median volume, added to volumes before their logarithm is taken: of what is not there, too."""
OFTEN_THERE = 0.95
"""Share of the annotated cases that have a class from which one without it is odd."""
FEW = 3
"""Cases that a fold's own median must outweigh."""
WITHIN = ("doubt", "mirroring")
"""What quality is told by among images like the training ones: the log odds that the probabilities are wrong, and 1 -
Dice of mirrored passes."""
BEYOND = ("more doubt", "more mirroring", "volume", "shape", "pieces", "intensities", "texture", "grid")
"""What it is told by besides, for images that are not: how far they are beyond any case out of fold."""
FEATURES = (*WITHIN, *BEYOND)


class Figures(Stored):
    """Base of what holds figures, which are all finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True, allow_inf_nan=False)


PositiveTriple = tuple[Positive, Positive, Positive]


class ClassReference(Figures):
    """What a class is like in the labels of the training cases."""

    share_present: float
    """Of the cases annotated for it."""
    offset_ml: Positive
    """Added to volumes."""
    log_ml: tuple[float, Positive]
    """Mean and deviation of the logarithm of volumes, where the class is there; as in the others."""
    largest: tuple[float, Positive]
    centre_mm: tuple[Triple, PositiveTriple]
    log_size_mm: tuple[Triple, PositiveTriple]


class ChannelReference(Figures):
    """What a channel looks like in the training cases, to one algorithm's networks."""

    quantiles: tuple[tuple[float, ...], tuple[Positive, ...]]
    """`autoseg.inference.traits.QUANTILES`, mean and deviation, as in the other."""
    log_roughness: tuple[Triple, PositiveTriple]


class Usual(Figures):
    """What a figure of a class is out of fold: models are not equally sure of themselves."""

    median: dict[int, float] = Field(min_length=1)
    """By fold; of few cases, drawn to that of all folds."""
    most: float
    """The farthest above it of any case."""

    def above(self, value: float, fold: int) -> float:
        """How far a value is above the median."""
        return value - self.median.get(fold, sum(self.median.values()) / len(self.median))


class Reference(Figures):
    """What the training cases are like."""

    classes: tuple[ClassReference, ...]
    """Of the user."""
    channels: dict[str, tuple[ChannelReference, ...]]
    """By algorithm."""
    spacing_mm: tuple[PositiveTriple, PositiveTriple]
    """Least and most, along X, Y, Z (RAS)."""
    size_mm: tuple[PositiveTriple, PositiveTriple]
    """The same of the images' extents."""
    doubt: tuple[Usual, ...]
    """Of each class: the log odds that the probabilities are wrong."""
    mirroring: tuple[Usual, ...]
    """Of each class: the disagreement of mirrored passes."""
    most: dict[str, float]
    """Distance -> the most of it over the cases out of fold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Appearance:
    """A predicted image."""

    traits: Mapping[str, Traits]
    """By job."""
    shapes: Sequence[ClassShape]
    """Of the user's classes, in the labels that are handed out."""
    spacing_mm: Triple
    shape: tuple[int, int, int]
    """In RAS, voxels."""

    def by_fold(self) -> dict[int, Appearance]:
        """The same, as the models of each fold alone see it."""
        folds = sorted({fold_of(job) for job in self.traits})
        return {f: replace(self, traits={j: t for j, t in self.traits.items() if fold_of(j) == f}) for f in folds}

    @property
    def size_mm(self) -> Triple:
        """Field of view."""
        x, y, z = (n * mm for n, mm in zip(self.shape, self.spacing_mm, strict=True))
        return x, y, z


def algo_of(job: str) -> str:
    """The algorithm of a job's folder."""
    return job.rpartition("_")[0]


def fold_of(job: str) -> int:
    """Its fold."""
    return int(job.rpartition("_")[2])


def mean_expected_dice(appearance: Appearance, index: int) -> float:
    """Mean over the models of the Dice that each expects of its own labels of a class; NaN where none speaks for it."""
    values = [expected_dice(traits.classes[index]) for traits in appearance.traits.values()]
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan


def doubt_of(appearance: Appearance, index: int) -> float:
    """The log odds that the probabilities of a class are wrong, by the Dice that they expect."""
    expected = mean_expected_dice(appearance, index)
    dice = LEAST_DICE if math.isnan(expected) else min(max(expected, LEAST_DICE), MOST_DICE)
    return math.log(1 / dice - 1)


def mean_mirror_distance(appearance: Appearance, index: int) -> float:
    """Mean over the models of 1 - Dice of mirrored passes; NaN where nothing was mirrored, or nothing is there."""
    values = [1 - mirror_dice(traits.classes[index]) for traits in appearance.traits.values()]
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan


def volume_log(shape: ClassShape, reference: ClassReference) -> float:
    """The logarithm that volumes are compared by."""
    return math.log(shape.volume_ml + reference.offset_ml)


def class_distances(shape: ClassShape, reference: ClassReference) -> dict[str, float]:
    """How far a class of a prediction is from the training labels, in standard deviations."""
    mean, deviation = reference.log_ml
    if shape.centre_mm is None or shape.size_mm is None:
        odd = reference.share_present >= OFTEN_THERE
        return {"volume": abs(volume_log(shape, reference) - mean) / deviation if odd else 0.0}
    centre, size = reference.centre_mm, reference.log_size_mm
    away = [_away(value, *of_axis) for value, *of_axis in zip(shape.centre_mm, *centre, strict=True)]
    away += [_away(math.log(value), *of_axis) for value, *of_axis in zip(shape.size_mm, *size, strict=True)]
    return {
        "volume": _away(volume_log(shape, reference), mean, deviation),
        "shape": max(away),
        "pieces": max(0.0, reference.largest[0] - shape.largest) / reference.largest[1],
    }


def image_distances(appearance: Appearance, reference: Reference) -> dict[str, float]:
    """How far an image is from the training images: intensities and texture in deviations, its grid in log units."""
    distances = {
        "spacing": max(map(_outside, appearance.spacing_mm, *reference.spacing_mm)),
        "extent": max(map(_outside, appearance.size_mm, *reference.size_mm)),
    }
    intensities, texture = [], []
    for algo, known in reference.channels.items():
        # All models of an algorithm prepare the image alike.
        traits = next((t for job, t in appearance.traits.items() if algo_of(job) == algo and t.channels), None)
        if traits is None or traits.channels is None:
            continue
        for channel, of_channel in zip(traits.channels, known, strict=False):  # the file says how many are known
            intensities.append(float(np.mean([*map(_away, channel.quantiles, *of_channel.quantiles)])))
            rough = [math.log(max(value, 1e-6)) for value in channel.roughness]
            texture.append(max(map(_away, rough, *of_channel.log_roughness)))
    if intensities:
        distances |= {"intensities": max(intensities), "texture": max(texture)}
    return distances


def features_of(
    appearance: Appearance,
    fold: int,
    reference: Reference,
    index: int,
    network_index: int,
    image: Mapping[str, float],
) -> list[float] | None:
    """What the quality of a class is told by: `FEATURES`, each the worse the larger; None where nothing is to be told.

    Distances are logarithms of how many times as far an image is as the farthest case out of fold.

    Args:
        appearance: of the prediction, by the models of one fold.
        fold: theirs.
        reference: the training cases.
        index: of the user's class.
        network_index: of the networks' class that it is, or is part of.
        image: distances of the image, as `image_distances` has them.
    """
    shape, known = appearance.shapes[index], reference.classes[index]
    if shape.volume_ml == 0 and known.share_present < OFTEN_THERE:
        return None  # such images are in the training data, and whether this is one the probabilities do not tell
    of_doubt, of_mirroring = reference.doubt[index], reference.mirroring[index]
    doubt = of_doubt.above(doubt_of(appearance, network_index), fold)
    mirrored = mean_mirror_distance(appearance, network_index)
    mirroring = 0.0 if math.isnan(mirrored) else of_mirroring.above(mirrored, fold)
    distances = {**class_distances(shape, known), **image}
    names = ("volume", "shape", "pieces", "intensities", "texture")
    return [
        doubt,
        mirroring,
        max(0.0, doubt - of_doubt.most),
        max(0.0, mirroring - of_mirroring.most),
        *(math.log(max(1.0, distances.get(n, 0.0) / max(reference.most.get(n, 0.0), 1.0))) for n in names),
        distances["spacing"] + distances["extent"],
    ]


def _away(value: float, mean: float, deviation: float) -> float:
    return abs(value - mean) / deviation


def _outside(value: float, least: float, most: float) -> float:
    """How far a length lies outside a range, as a logarithm."""
    return max(0.0, math.log(least / value), math.log(value / most))


# -- the training cases


def reference_of(
    appearances: Sequence[Appearance],
    folds: Sequence[int],
    truths: Sequence[Sequence[ClassShape | None]],
    network_index: Sequence[int],
) -> Reference:
    """What cases out of fold are like.

    Args:
        appearances: of their predictions.
        folds: theirs.
        truths: the classes in their labels; None for those a case is not annotated for.
        network_index: of each of the user's classes.
    """
    classes = [_class_reference([truth[i] for truth in truths]) for i in range(len(network_index))]
    spacings, sizes = (
        np.array([appearance.spacing_mm for appearance in appearances]),
        np.array([appearance.size_mm for appearance in appearances]),
    )
    doubt, mirroring = [], []
    for i, index in enumerate(network_index):
        there = [
            (fold, appearance)
            for fold, appearance in zip(folds, appearances, strict=True)
            if appearance.shapes[i].volume_ml > 0
        ]
        doubt.append(_usual([(fold, doubt_of(appearance, index)) for fold, appearance in there]))
        mirroring.append(_usual([(fold, mean_mirror_distance(appearance, index)) for fold, appearance in there]))
    bare = Reference(
        classes=tuple(classes),
        channels=_channel_references(appearances),
        spacing_mm=(_triple(spacings.min(axis=0)), _triple(spacings.max(axis=0))),
        size_mm=(_triple(sizes.min(axis=0)), _triple(sizes.max(axis=0))),
        doubt=tuple(doubt),
        mirroring=tuple(mirroring),
        most={},
    )
    by_name: dict[str, list[float]] = {}
    for appearance in appearances:
        each = [image_distances(appearance, bare), *map(class_distances, appearance.shapes, bare.classes)]
        for distances in each:
            for name, value in distances.items():
                by_name.setdefault(name, []).append(value)
    return bare.model_copy(update={"most": {name: max(values) for name, values in by_name.items()}})


def _usual(values: Sequence[tuple[int, float]]) -> Usual:
    """Medians by fold and the most above them; values that are NaN do not count."""
    known = [(fold, value) for fold, value in values if not math.isnan(value)]
    if not known:
        return Usual(median={0: 0.0}, most=0.0)
    middle = float(np.median([value for _, value in known]))
    median = {}
    for fold in sorted({fold for fold, _ in known}):
        own = [value for f, value in known if f == fold]
        median[fold] = (len(own) * float(np.median(own)) + FEW * middle) / (len(own) + FEW)
    return Usual(median=median, most=max(value - median[fold] for fold, value in known))


def _class_reference(shapes: Sequence[ClassShape | None]) -> ClassReference:
    annotated = [s for s in shapes if s is not None]
    there = [s for s in annotated if s.centre_mm is not None and s.size_mm is not None]
    volumes = np.array([s.volume_ml for s in there] or [1.0])
    offset = EMPTY_SHARE * float(np.median(volumes))
    centres = np.array([s.centre_mm for s in there] or [(0.0, 0.0, 0.0)])
    sizes = np.log(np.array([s.size_mm for s in there] or [(1.0, 1.0, 1.0)]))
    return ClassReference(
        share_present=len(there) / len(annotated) if annotated else 0.0,
        offset_ml=offset,
        log_ml=_mean_and_deviation(np.log(volumes + offset), 0.05),
        largest=_mean_and_deviation(np.array([s.largest for s in there] or [1.0]), 0.02),
        centre_mm=(_triple(centres.mean(axis=0)), _triple(np.maximum(centres.std(axis=0), 0.5))),
        log_size_mm=(_triple(sizes.mean(axis=0)), _triple(np.maximum(sizes.std(axis=0), 0.05))),
    )


def _channel_references(appearances: Sequence[Appearance]) -> dict[str, tuple[ChannelReference, ...]]:
    by_algo: dict[str, list[Traits]] = {}
    for appearance in appearances:
        for job, traits in appearance.traits.items():
            if traits.channels is not None:
                by_algo.setdefault(algo_of(job), []).append(traits)
    references = {}
    for algo, each in by_algo.items():
        channels = []
        for of_channel in zip(*(traits.channels or () for traits in each), strict=True):
            quantiles = np.array([appearance.quantiles for appearance in of_channel])
            span = max(float(np.ptp(quantiles.mean(axis=0))), 1e-6)
            rough = np.log(np.maximum([appearance.roughness for appearance in of_channel], 1e-6))
            channels.append(
                ChannelReference(
                    quantiles=(
                        tuple(quantiles.mean(axis=0).tolist()),
                        tuple(np.maximum(quantiles.std(axis=0), 0.01 * span).tolist()),
                    ),
                    log_roughness=(_triple(rough.mean(axis=0)), _triple(np.maximum(rough.std(axis=0), 0.02))),
                )
            )
        references[algo] = tuple(channels)
    return references


def _mean_and_deviation(values: np.ndarray, least: float) -> tuple[float, float]:
    return float(values.mean()), max(float(values.std()), least)


def _triple(values: np.ndarray) -> Triple:
    x, y, z = (float(v) for v in values)
    return x, y, z
