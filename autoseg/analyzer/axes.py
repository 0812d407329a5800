"""Whether slices lie between right, front and up, so that a data set needs axes of its own; and what is said of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from autoseg.analyzer.faults import Fault, Measured
from autoseg.data.frame import NEAR_DEGREES, OBLIQUE_DEGREES, Frame, find_frame, slice_axis

NAMES = ("right", "front", "up")


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """The axes that a data set's figures are in."""

    frame: Frame | None = None
    """None: X, Y, Z of RAS+."""
    rule: str = ""
    """Why these."""

    def of(self, measured: Sequence[Measured]) -> list[Measured]:
        """The cases with their figures in these axes."""
        return [replace(m, stats=m.stats.in_frame(self.frame)) for m in measured]


def find_axes(measured: Sequence[Measured]) -> Axes:
    """The axes that suit the training cases; all cases where none is for training."""
    sound = [m for m in measured if not m.stats.is_faulty]
    training = [m for m in sound if m.role == "training"] or sound
    frame = find_frame([m.stats.directions for m in training])
    if frame is None:
        return Axes()
    normal = frame.axes[frame.slices]
    degrees = np.degrees(np.arccos(np.clip(np.abs(normal), 0, 1)))
    words = ", ".join(f"{d:.0f} from {name}" for d, name in zip(degrees, NAMES, strict=True))
    apart = {axis for m in training if (axis := slice_axis(m.stats.spacing_mm)) is not None}
    differ = ", and rounded to these they would lie along different axes" if len(apart) > 1 else ""
    rule = (
        f"slices are over {OBLIQUE_DEGREES:g} degrees oblique{differ} (on average {words} degrees): "
        f"axes of the data set's own, {'XYZ'[frame.slices]} along the slices' direction"
    )
    return Axes(frame=frame, rule=rule)


def check_axes(measured: Sequence[Measured], axes: Axes) -> list[Fault]:
    """Cases whose slices lie along another axis than those of most: RAS+, or the data set's own.

    Args:
        measured: in these axes.
    """
    thick = [(m, axis) for m in measured if (axis := slice_axis(m.stats.spacing_mm)) is not None]
    along = [axis for _, axis in thick]
    if len(set(along)) < 2:
        return []
    usual = max(range(3), key=along.count)
    reason = f"over {NEAR_DEGREES:g} degrees from the others'" if axes.frame is not None else "of another plane"
    return [
        Fault(
            kind="axes",
            finding=f"slices lie along {'XYZ'[axis]}, those of most cases along {'XYZ'[usual]} ({reason})",
            remedy="No voxel size suits both. Leave it out, or train models for each plane.",
            case=m.case.name,
            file=m.files[0],
            severity="warning",
        )
        for m, axis in thick
        if axis != usual
    ]
