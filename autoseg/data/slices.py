"""How slices are shown: which planes, in which window, and which side is where.

Planes are shown as radiologists look at them: the patient's right on the left, front and head up.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PLANES = (("axial", 2), ("coronal", 1), ("sagittal", 0))
"""Name -> the axis across it, in RAS."""


def gray_window(image: np.ndarray) -> tuple[float, float]:
    """The middle 98 % of the intensities: those shown as black and white."""
    low, high = np.percentile(image, [1, 99])
    return float(low), float(high) if high > low else float(low) + 1.0


def to_gray(image: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Intensities as uint8; `image` is overwritten."""
    low, high = window
    image -= low
    image *= 255.0 / (high - low)
    return np.clip(image, 0, 255, out=image).astype(np.uint8)


def as_seen(plane: np.ndarray, step: Sequence[int] = (1, 1)) -> np.ndarray:
    """(across, up) in RAS to rows and columns as shown, thinned: rows from top, columns from left."""
    plane = plane[:: step[0], :: step[1]]
    plane = plane[:, ::-1]  # up is the high end
    plane = plane[::-1]  # right, or the front, is on the left
    return np.ascontiguousarray(plane.T)
