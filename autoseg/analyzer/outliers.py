"""Cases unlike the rest: another modality or scale, another size, left and right swapped. Warnings only.

Distances are robust: from the median, in units of the median absolute deviation, on a logarithmic scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autoseg.analyzer.faults import Fault, Measured
from autoseg.analyzer.lateral import Places
from autoseg.data.grid import in_mm
from autoseg.data.labels import LabelMap

FAR = 8.0
"""Robust standard deviations from the median that are reported."""
FEWEST = 5
"""Sound cases from which on there is a rest to compare with."""
INTENSITY_FLOOR = 0.35
"""Least standard deviation of log intensities: below a factor of 16 (e ** (8 * 0.35)) nothing is reported."""
SIZE_FLOOR = 0.2
"""The same for log sizes: a factor of 5."""
AGREEMENT = 0.9
"""Share of cases in which one class lies to the right of another that makes it a rule."""
APART = 0.1
"""Median distance of such two classes, as a share of the field of view."""


def check_outliers(measured: Sequence[Measured]) -> list[Fault]:
    """Intensities, sizes or spacings far from those of the other cases."""
    sound = [m for m in measured if not m.stats.is_faulty]
    if len(sound) < FEWEST:
        return []
    faults = []
    channels = min(m.stats.num_channels for m in sound)
    for channel in range(channels):
        where = f" in channel {channel}" if channels > 1 else ""
        stats = [m.stats.intensity[channel] for m in sound]
        for number in _far(
            np.arcsinh([[s.percentile_00_5, s.median, s.percentile_99_5] for s in stats]), INTENSITY_FLOOR
        ):
            own = stats[number]
            low = float(np.median([s.percentile_00_5 for s in stats]))
            high = float(np.median([s.percentile_99_5 for s in stats]))
            faults.append(
                Fault(
                    kind="intensity",
                    finding=f"intensities from {own.percentile_00_5:.4g} to {own.percentile_99_5:.4g}{where}, "
                    f"while {low:.4g} to {high:.4g} is usual",
                    remedy="Is it of another modality or scale? Leave it out if so.",
                    case=sound[number].case.name,
                    file=sound[number].files[0],
                    severity="warning",
                )
            )
    for what, values in (
        ("field of view", np.array([m.stats.size_mm for m in sound])),
        ("spacing", np.array([m.stats.spacing_mm for m in sound])),
    ):
        usual = np.median(values, axis=0)
        for number in _far(np.log(values), SIZE_FLOOR):
            faults.append(
                Fault(
                    kind="size",
                    finding=f"{what} of {in_mm(values[number])} mm, while {in_mm(usual)} mm is usual",
                    remedy="Check the header's spacing, and whether the case belongs here.",
                    case=sound[number].case.name,
                    file=sound[number].files[0],
                    severity="warning",
                )
            )
    return faults


def check_ranges(measured: Sequence[Measured], modality: str) -> list[Fault]:
    """Cases of CT that are predicted, most of whose voxels lie outside of where the training images' lie.

    `predict` warns of such an image, too (`inference.checks`). Other modalities have no scale in common.
    """
    if modality.lower() != "ct":
        return []
    sound = [m for m in measured if not m.stats.is_faulty]
    training = [m for m in sound if m.role == "training"]
    faults = []
    for channel in range(min((m.stats.num_channels for m in sound), default=0)):
        where = f" in channel {channel}" if sound[0].stats.num_channels > 1 else ""
        known = [s[channel] for m in training for s in (m.stats.background, m.stats.foreground) if s]
        low = min((s.percentile_00_5 for s in known), default=-np.inf)
        high = max((s.percentile_99_5 for s in known), default=np.inf)
        for m in sound:
            if m.role == "training" or not m.stats.background or low <= m.stats.background[channel].median <= high:
                continue
            stats = m.stats.background[channel]
            faults.append(
                Fault(
                    kind="intensity",
                    finding=f"intensities from {stats.min:.4g} to {stats.max:.4g}{where}, half of them and more "
                    f"outside of {low:.4g} to {high:.4g}, where the training images lie",
                    remedy="Is it of another modality, or not in Hounsfield units? Do not trust its labels if so.",
                    case=m.case.name,
                    file=m.files[0],
                    severity="warning",
                )
            )
    return faults


def check_sides(measured: Sequence[Measured], label_map: LabelMap) -> list[Fault]:
    """Cases whose left and right are the other way round than in the rest, or than the names say."""
    sound = [m for m in measured if m.stats.classes and not m.stats.is_faulty]
    if not sound:
        return []
    places = Places.of(sound, label_map)
    centre = places.centre[:, :, 0]
    votes = np.zeros((len(sound), 2), int)
    for pair in label_map.sided_pairs:
        apart = centre[:, pair.right] - centre[:, pair.left]
        votes[:, 0] += apart > 0
        votes[:, 1] += apart < 0
    faults: list[Fault] = []
    swapped = votes[:, 1] > votes[:, 0]
    judged = votes.sum(1) > 0
    all_reversed = bool(swapped.sum() > judged.sum() / 2)
    if all_reversed:
        faults.append(
            Fault(
                kind="sides",
                finding=f"in {swapped.sum()} of {judged.sum()} cases left structures lie to the right of right ones",
                remedy="Are the class names swapped, or the images stored mirrored? Correct names or affines.",
                severity="warning",
            )
        )
        swapped = judged & ~swapped
    mirrored = _against_the_rule(centre, places.width) if len(sound) >= FEWEST else np.zeros(len(sound), bool)
    for number in np.flatnonzero(swapped | mirrored).tolist():
        finding = (
            "left and right are swapped: its left structures lie to the right of its right ones"
            if swapped[number] and not all_reversed
            else "left and right are the other way round than in the other cases"
        )
        faults.append(
            Fault(
                kind="sides",
                finding=finding,
                remedy="Check the affine of image and label, and the class names.",
                case=sound[number].case.name,
                file=sound[number].label_file,
                severity="warning",
            )
        )
    return faults


def _against_the_rule(centre: np.ndarray, width_mm: np.ndarray) -> np.ndarray:
    """Cases in which most classes lie mirrored against the others, such as a liver on the left of the spleen.

    Args:
        centre: (N, K) X of each class in mm, NaN where it does not occur.
        width_mm: (N,) field of view along X.

    Returns:
        (N,) booleans.
    """
    num_classes = centre.shape[1]
    for_rule, against = np.zeros(len(centre), int), np.zeros(len(centre), int)
    for a in range(num_classes):
        apart = centre[:, a + 1 :] - centre[:, a, None]  # (N, K - a - 1)
        seen = np.isfinite(apart)
        num_seen = seen.sum(0)
        right = (apart > 0).sum(0)
        ratios = np.sort(np.abs(apart) / width_mm[:, None], axis=0)  # NaN comes last
        columns = np.arange(apart.shape[1])
        middle = np.maximum(num_seen - 1, 0)
        medians = (ratios[middle // 2, columns] + ratios[(middle + 1) // 2, columns]) / 2
        far_enough = (num_seen >= FEWEST) & (medians > APART)
        share = right / np.maximum(num_seen, 1)
        for k in np.flatnonzero(far_enough & ((share >= AGREEMENT) | (share <= 1 - AGREEMENT))).tolist():
            sign = 1 if share[k] > 0.5 else -1
            for_rule += sign * apart[:, k] > 0
            against += sign * apart[:, k] < 0
    return against > for_rule


def _far(features: np.ndarray, floor: float) -> list[int]:
    """Rows of (N, F) with a feature more than FAR robust standard deviations from its median."""
    away = np.abs(features - np.median(features, axis=0))
    deviation = np.maximum(1.4826 * np.median(away, axis=0), floor)
    return [int(i) for i in np.flatnonzero((away / deviation > FAR).any(axis=1))]
