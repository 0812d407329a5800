"""The scores of the FLARE23 challenge, rule by rule as its organisers compute them, traps included.

They differ from this package's own: a class that is in neither counts as 1, three tubes are scored in the slices where
the truth has them alone and without the last of these, and surfaces do not count where volumes hardly meet.

Source: FLARE23_DSC_NSD_Eval.py of the challenge's repository.
"""

from __future__ import annotations

import math

import numpy as np

from autoseg.data.grid import Grid
from autoseg.data.volumes import stored_array
from autoseg.evaluation.surfaces import nsd

TOLERANCES_MM: dict[str, float] = {
    "liver": 5,
    "right kidney": 3,
    "spleen": 3,
    "pancreas": 5,
    "aorta": 2,
    "inferior vena cava": 2,
    "right adrenal gland": 2,
    "left adrenal gland": 2,
    "gallbladder": 2,
    "esophagus": 3,
    "stomach": 5,
    "duodenum": 7,
    "left kidney": 3,
    "tumor": 2,
}
"""Accepted deviation of the surface of label values 1, 2, ..., 14."""
TUBES = frozenset({5, 6, 10})
"""Label values that are scored between the truth's first and last slice alone: aorta, vena cava, esophagus."""
LEAST_DICE = 0.2
"""Dice under which the surface scores 0."""


def flare23_scores(pred: np.ndarray, truth: np.ndarray, grid: Grid) -> tuple[list[float], list[float]]:
    """Dice and surface Dice of the 14 classes, rounded to 4 digits as the challenge does.

    Args:
        pred, truth: (X, Y, Z) label values in RAS+ on one grid.
        grid: of the files. Slices are those of the file's third axis, whichever way it points.

    Returns:
        Values in [0, 1]; NaN for a tube that the truth has in one slice alone, of which none is left to score.
    """
    stored_pred, stored_truth = stored_array(pred, grid), stored_array(truth, grid)
    dice, surface = [], []
    for value, tolerance_mm in enumerate(TOLERANCES_MM.values(), start=1):
        p, t = stored_pred == value, stored_truth == value
        if not t.any():
            score = 0.0 if p.any() else 1.0
            dice.append(score)
            surface.append(score)
            continue
        if value in TUBES:
            slices = np.flatnonzero(t.any(axis=(0, 1)))
            scored = slice(int(slices[0]), int(slices[-1]))  # the last one is left out, as there
            p, t = p[:, :, scored], t[:, :, scored]
        total = int(p.sum()) + int(t.sum())
        overlap = 2 * int((p & t).sum()) / total if total else math.nan
        dice.append(round(overlap, 4))
        surface.append(0.0 if overlap < LEAST_DICE else round(nsd(p, t, grid.spacing_mm, tolerance_mm), 4))
    return dice, surface
