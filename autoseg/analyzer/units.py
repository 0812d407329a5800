"""Lengths that are hardly mm, CT values that are no Hounsfield units, and a background that is not 0."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autoseg.analyzer.case import CaseStats
from autoseg.analyzer.faults import Fault, Measured
from autoseg.config.settings import Settings
from autoseg.data.grid import in_mm
from autoseg.errors import counted, some_of

FINEST_MM = 0.005
"""Voxel edges below are finer than micro-CT: a microscope's, in micrometres for mm, or rightly in mm."""
OTHER_UNITS = 100.0
"""Factor between the voxels of a case and those of most cases from which on it has other units: metres, micrometres."""
FEWEST_CASES = 3
"""Cases from which on there is a most."""
MOST_GREY = 255
"""Largest value of an 8-bit picture."""
BACKGROUND_REMEDY = (
    "Only 0 is known as no tissue: such voxels count in the z-score, and borders of them are not cropped. Set them to "
    "0 if that is what they are, in later images, too."
)


def check_spacing(measured: Sequence[Measured]) -> list[Fault]:
    """Cases in other units than the rest, a fault; and voxels so fine that their edges are hardly in mm, a warning."""
    sound = [m for m in measured if not m.stats.is_faulty]
    if not sound:
        return []
    edges = np.array([m.stats.spacing_mm for m in sound])
    usual = np.median(edges, axis=0)
    apart = np.exp(np.abs(np.log(edges / usual).mean(1))) if len(sound) >= FEWEST_CASES else np.ones(len(sound))
    faults = [
        Fault(
            kind="spacing",
            finding=f"spacing of {in_mm(edges[number])} mm, where {in_mm(usual)} mm is usual",
            remedy="Correct the units, or leave it out.",
            case=sound[number].case.name,
            file=sound[number].files[0],
        )
        for number in np.flatnonzero(apart >= OTHER_UNITS).tolist()
    ]
    fine = int(((edges.min(1) < FINEST_MM) & (apart < OTHER_UNITS)).sum())
    if fine:
        num = "all cases" if fine == len(sound) else f"{fine} of {counted(len(sound), 'case')}"
        faults.append(
            Fault(
                kind="spacing",
                finding=f"spacing of {in_mm(usual)} mm in {num}, most likely micrometres written as mm",
                remedy="Plans go by ratios and need no change. Volumes in ml, distances in mm and surface Dice are "
                "right only if the spacing is.",
                severity="warning",
            )
        )
    return faults


def check_intensities(measured: Sequence[Measured], settings: Settings) -> list[Fault]:
    """CT without Hounsfield units, and other images whose background is their least value but not 0."""
    sound = [m for m in measured if not m.stats.is_faulty]
    num_channels = max((m.stats.num_channels for m in sound), default=0)
    extra = [mode.lower() for mode in settings.extra_modalities.values()]
    kinds = [settings.modality.lower()] * (num_channels - len(extra)) + extra
    faults = []
    for channel, kind in enumerate(kinds):
        is_ct = kind == "ct"
        having = [m for m in sound if m.stats.num_channels > channel]
        odd = [m for m in having if (_is_no_ct if is_ct else _has_other_background)(m.stats, channel)]
        if not odd:
            continue
        high = max(m.stats.intensity[channel].max for m in odd)
        what = f"no value below 0, and up to {high:g}," if is_ct else "a background that is not 0"
        where = f" in channel {channel}" if num_channels > 1 else ""
        names = "" if len(odd) == len(having) else f" ({some_of((m.case.name for m in odd), most=4)})"
        num = f"{len(odd)} of {counted(len(having), 'case')}"
        faults.append(
            Fault(
                kind="units",
                finding=f"{what}{where} in {num}{names}",
                remedy=_ct_remedy(high) if is_ct else BACKGROUND_REMEDY,
                severity="warning",
            )
        )
    return faults


def _is_no_ct(stats: CaseStats, channel: int) -> bool:
    """Whether nothing lies below 0, where air and fat are in Hounsfield units."""
    return all(s[channel].min >= 0 for s in (stats.intensity, stats.background) if s)


def _ct_remedy(high: float) -> str:
    likely = (
        "these look like a window's grey values" if high <= MOST_GREY else "an offset, such as 1024, may be missing"
    )
    return f"Expected Hounsfield units; {likely}. Export them again, or give all later images the same scale."


def _has_other_background(stats: CaseStats, channel: int) -> bool:
    """Whether a tenth of the voxels without a class have the least value, and that is not 0."""
    values = (stats.background or stats.intensity)[channel]
    return values.min != 0 and values.min == values.percentile_10_0
