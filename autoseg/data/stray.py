"""Stray voxels: the few that lie so far from all others that a mean and a deviation would be theirs alone.

A voxel of 3e38 among a million, as a broken export leaves it, makes an image normalised by its mean and deviation one
constant. The analysis leaves stray voxels out of all its figures and names them; preprocessing gives them the nearest
usual value, in training and in prediction alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

STRAY = 10.0
"""Deviation of an image, as a share of the range of 99 % of its voxels, from which on stray voxels decide it. A choice:
in an image that has none it is under 1; ten needs a voxel in 200 at 140 times that range, or one of 10 million at
30,000 times."""
FARTHEST = 100.0
"""Distance from the range of 99 % of the voxels, as a share of it, from which on a voxel is stray in an image whose
deviation strays decide. By the figures above these do lie farther; metal in a CT is at a tenth of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usual:
    """The intensities that are usual in an image with stray voxels."""

    low: float
    high: float
    """From the 0.5 to the 99.5 percentile, as values that occur."""
    least: float
    most: float
    """What lies outside is stray."""

    def clip(self, values: np.ndarray) -> np.ndarray:
        """Values of which stray ones are the nearest usual one."""
        if not ((values < self.least) | (values > self.most)).any():
            return values
        clipped = np.where(values < self.least, np.asarray(self.low, values.dtype), values)
        return np.where(values > self.most, np.asarray(self.high, values.dtype), clipped)


def usual_of(low: float, high: float, stdev: float, typical: float) -> Usual | None:
    """What is usual in an image whose deviation stray voxels decide; None where none do.

    Args:
        low, high: 0.5 and 99.5 percentile, rounded outwards to values that occur.
        stdev: standard deviation, strays included.
        typical: absolute median of the voxels other than 0, for an image that is 0 in nearly all of them.
    """
    reach = high - low or typical
    if stdev <= STRAY * reach:
        return None
    return Usual(low=low, high=high, least=low - FARTHEST * reach, most=high + FARTHEST * reach)
