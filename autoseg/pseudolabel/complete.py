"""The label that the next round learns from: the annotators' own, with accepted pseudo-labels where it was silent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autoseg.data.labels import UNSURE_VALUE, LabelMap


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CompletedLabel:
    """A completed label and what was done to it."""

    label: np.ndarray
    """(X, Y, Z) values of a label file, `UNSURE_VALUE` among them."""
    filled: dict[str, int]
    """Voxels filled in, by class."""
    unsure: dict[str, int]
    """Voxels of which the models are not sure, by the accepted class they lean to; `background`: to none."""


def complete_label(
    label: np.ndarray | None,
    predicted: np.ndarray,
    percent: np.ndarray,
    *,
    label_map: LabelMap,
    accepted: Sequence[str],
    confidence: float,
    background_confidence: float,
) -> CompletedLabel:
    """Fill in accepted classes where the annotators left background.

    Args:
        label: (X, Y, Z) values as the annotators made them; None: there is no label.
        predicted, percent: (X, Y, Z) as `Prediction` has them.
        accepted: classes to fill in; others stay background, as the annotators left them.
        confidence: probability under which a voxel of a class is unsure; at 0 none is.
        background_confidence: the same for one of none of the predicted classes. Whole percents are kept, so 0.995
            asks for 100. Source of the settings' defaults: measured, docs/results.md, "Partial labels".

    Whatever has a value in `label` keeps it. A voxel that leans to a class that was not accepted may be that class or
    background; where the models are sure of it, it stays background, and the loss counts it as either of them. An
    unsure voxel says what the annotators said by leaving it out: that it is of none of the classes they drew.
    """
    result = np.zeros(predicted.shape, np.uint16) if label is None else label.astype(np.uint16)
    free = np.ones(predicted.shape, bool) if label is None else label == 0
    unsure = free & np.where(predicted == 0, percent < 100 * background_confidence, percent < 100 * confidence)
    filled, left = {}, {}
    painted = {name: label_map.painted_values[label_map.names.index(name)] for name in accepted}
    for name, value in painted.items():
        of_class = free & (predicted == value)
        sure = of_class & ~unsure
        result[sure] = value
        filled[name], left[name] = int(sure.sum()), int((of_class & unsure).sum())
    # What leans to a rejected class may as well be an accepted one, which the case will count as annotated for.
    result[unsure] = UNSURE_VALUE
    if max(confidence, background_confidence) > 0:
        left["background"] = int((unsure & ~np.isin(predicted, list(painted.values()))).sum())
    return CompletedLabel(label=result, filled=filled, unsure=left)


def voxel_weights(label: np.ndarray | None, percent: np.ndarray, completed: np.ndarray) -> np.ndarray:
    """(X, Y, Z) uint8: what each voxel counts in training, in percent.

    All of it where the annotators set a value, or where theirs is the only word since the models are unsure; elsewhere
    the probability of what the models say.

    Args:
        label, percent: as `complete_label` takes them.
        completed: what it makes of them.
    """
    by_models = completed != UNSURE_VALUE
    if label is not None:
        by_models &= label == 0
    return np.where(by_models, percent, 100).astype(np.uint8)
