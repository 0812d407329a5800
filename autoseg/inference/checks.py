"""Whether an image can be what the models were trained on, before any time is spent on it."""

from __future__ import annotations

import logging
import math

import numpy as np

from autoseg.data.streams import ImageRows
from autoseg.errors import DataError
from autoseg.plan import Plan

log = logging.getLogger(__name__)

SAMPLED_ROWS = 24
"""Rows, spread evenly, whose intensities are looked at."""
LARGEST_MM = 4000.0
"""Length of an image above which its spacing must be wrong: nobody is that tall."""
SMALLEST_VOXELS = 2.0
"""Of the network, along the two longer axes, below which there is nothing to see in an image."""
MOST_STRETCH = 512.0
"""Voxels of the network that a voxel of an image may become: 8 along each axis. The windows grow with it: 24 voxels of
50 mm are 1,000 of 1.2 mm along each axis, 70,000 times the work. A choice above what slices of 10 mm are, where
networks see 1 mm in all directions."""
OUTSIDE = 0.5
"""Share of voxels above which an image lies outside the range of the training images, of which each has a hundredth
outside at most. A choice, high enough for an image of another field of view, with more air or less."""
OUT_OF_BOUNDS = 0.999
"""The same share where a plan of the first versions tells no range, but the bounds of its normalisation alone."""
AIR_HU = (-1100.0, -900.0)
"""Intensities that air has in a CT, and that a magnetic resonance or emission image has nowhere."""
AIR = 0.05
"""Share of voxels that are air above which an image is a CT; around a body it is far more, in a lung's too."""


def check_image(name: str, image: ImageRows, plan: Plan) -> None:
    """Refuse what cannot come out right.

    Args:
        name: of the image, for messages.
        image: in the files' intensities.
        plan: of the models.

    Raises:
        DataError: The spacing is absurd, or every voxel has one value. Intensities unlike those of the training images
            are warned of: what is unusual may be right.
    """
    faults = [*_spacing_faults(name, image, plan)]
    if image.num_channels == len(plan.channels):
        faults += _intensity_faults(name, image, plan)
    if faults:
        raise DataError(faults)
    _tell_coarse(name, image, plan)


def _tell_coarse(name: str, image: ImageRows, plan: Plan) -> None:
    """Warn of an image far coarser than what the models work at: most of the work is for what it does not show."""
    target_mm = _target_mm(image, plan)
    stretch = [s / target for s, target in zip(image.spacing_mm, target_mm, strict=True)]
    each = math.prod(max(1.0, s) for s in stretch)
    if each <= MOST_STRETCH:
        return
    log.warning(
        "%s: voxels of %s mm, each of which becomes %.0f of the models' (%s mm), so it takes long and its labels are "
        "no finer than its voxels. Is the spacing in mm?",
        name, "x".join(f"{s:.4g}" for s in image.spacing_mm), each,
        "x".join(f"{s:.4g}" for s in target_mm),
    )  # fmt: skip


def _target_mm(image: ImageRows, plan: Plan) -> tuple[float, float, float]:
    """The models' voxel size in the order of the image's axes."""
    return plan.preprocessing.turn_of(image.grid).triple_back(plan.resample_resolution)


def _spacing_faults(name: str, image: ImageRows, plan: Plan) -> list[str]:
    mm = [n * s for n, s in zip(image.shape, image.spacing_mm, strict=True)]
    seen = sorted(length / target for length, target in zip(mm, _target_mm(image, plan), strict=True))
    words = "x".join(f"{s:.4g}" for s in image.spacing_mm)
    if max(mm) > LARGEST_MM:
        what = f"so the image is {max(mm) / 1000:.4g} m long"
    elif seen[1] < SMALLEST_VOXELS:
        what = f"so the image is {'x'.join(f'{length:.3g}' for length in mm)} mm, less than what the models can tell"
    else:
        return []
    work = "x".join(f"{s:g}" for s in plan.resample_resolution)
    return [
        f"{name}: voxels of {words} mm, {what}. Expected a spacing in mm (the models work at {work}). Correct the "
        "spacing in the file's header; is it in metres or micrometres?"
    ]


def _intensity_faults(name: str, image: ImageRows, plan: Plan) -> list[str]:
    length = image.shape[image.axis]
    places = np.unique(np.linspace(0, length - 1, min(length, SAMPLED_ROWS)).round().astype(int))
    sample = np.concatenate([image.rows(row, row + 1) for row in places.tolist()], image.axis + 1)
    flat = sample.reshape(len(plan.channels), -1)
    faults = []
    for c, (values, channel) in enumerate(zip(flat, plan.channels, strict=True)):
        which = "" if len(flat) == 1 else f"channel {c}: "
        low, high = float(values.min()), float(values.max())
        if low == high and _is_constant(image, c, low, places):
            faults.append(
                f"{name}: {which}every voxel has the value {low:g}. Expected an image of something. Export it again."
            )
        elif low < high and (away := _outside(values, plan, c)):
            log.warning(
                "%s: %sintensities from %g to %g, %.0f%% of the voxels outside of %g to %g, where the training images "
                "lie. Expected intensities like theirs (of a CT: Hounsfield units); is it of another modality, or not "
                "rescaled? If so, do not trust the labels.",
                name, which, low, high, 100 * away[0], *away[1],
            )  # fmt: skip
        elif low < high and channel.mode in ("mri", "pet") and (air := _share_of_air(values)) > AIR:
            # Not refused: some MRI is padded so, and the plan does not tell what the training images had.
            log.warning(
                "%s: %s%.0f%% of the voxels lie between %g and %g, as air does in a CT. Expected %s, as the training "
                "images are. If it is a CT, do not trust the labels.",
                name, which, 100 * air, *AIR_HU, "an MRI" if channel.mode == "mri" else "a PET",
            )  # fmt: skip
    return faults


def _share_of_air(values: np.ndarray) -> float:
    return float(((values >= AIR_HU[0]) & (values <= AIR_HU[1])).mean())


def _outside(values: np.ndarray, plan: Plan, channel: int) -> tuple[float, tuple[float, float]] | None:
    """Share of the voxels outside the training images' range, and that range; None where it is no matter.

    Modalities without a common scale are not judged.
    """
    norm = plan.channels[channel]
    if norm.mode not in ("ct", "range") or norm.bounds is None:
        return None
    known = plan.image_ranges is not None
    low, high = span = plan.image_ranges[channel] if plan.image_ranges is not None else norm.bounds
    share = float(((values < low) | (values > high)).mean())
    return (share, span) if share > (OUTSIDE if known else OUT_OF_BOUNDS) else None


def _is_constant(image: ImageRows, channel: int, level: float, seen: np.ndarray) -> bool:
    """Whether the rows that were not looked at have the same value, too."""
    known = set(seen.tolist())
    rest = (row for row in range(image.shape[image.axis]) if row not in known)
    return all(bool((image.rows(row, row + 1)[channel] == level).all()) for row in rest)
