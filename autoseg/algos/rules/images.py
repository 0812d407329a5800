"""Rules for classes, intensities and voxels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autoseg.algos.draft import Draft
from autoseg.config.hyperparameters import PLANNED_AS
from autoseg.config.types import suggest
from autoseg.data.fingerprint import BackgroundIntensity, Fingerprint, ForegroundIntensity
from autoseg.data.labels import LabelMap
from autoseg.errors import ConfigError, some_of

MOST_VOXELS = 1e10
"""Of a median image as the network sees it: 40 GB as float32, fifty times a whole body at 1 mm."""


def check_class_names(draft: Draft) -> None:
    """Refuse weights and pairs of classes that there are not.

    Raises:
        ConfigError: All such names.
    """
    names = draft.inputs.label_map.names
    named = {key: list(draft.user.get(key, {})) for key in ("class_weights", "class_sampling")}
    named["lateral_pairs"] = [name for pair in draft.user.get("lateral_pairs", ()) for name in pair]
    unknown = [
        f"{key}: no class {name}. {suggest(name, names)}"
        for key, listed in named.items()
        for name in listed
        if name not in names
    ]
    if unknown:
        raise ConfigError(unknown)


def fold(draft: Draft) -> None:
    """The fold that is validated on."""
    draft.put("fold", draft.inputs.fold, "one job for each fold")


def classes(draft: Draft) -> None:
    """The classes of the outputs, and those of the user where some of them are merged."""
    label_map = draft.inputs.label_map
    merged = _class_plans(label_map.origin) if label_map.origin else []
    draft.put("user_classes", merged, "the classes before merging" if merged else "no class is merged")
    rule = "class_names, sigmoid and ignore_label of input.yaml, else the datalist's labels"
    draft.put("classes", _class_plans(label_map), rule)
    draft.put("sigmoid", label_map.sigmoid, rule)
    draft.put("ignore_label", label_map.ignore_label, rule)


def _class_plans(label_map: LabelMap) -> list[dict[str, Any]]:
    return [{"name": n, "values": list(v)} for n, v in zip(label_map.names, label_map.values, strict=True)]


SLIVER = 0.01
"""Share of the background's range, from its 0.5 to its 99.5 percentile, that must lie within a CT's bounds. A choice:
the bounds of organs and of bones hold a tenth and more; those of metal, or of a foreground of one value, hold none."""
WIDENED = "would hide what lies around it"
"""In the rule of bounds that hold more than the foreground."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Intensities that a CT is clipped to, and what is subtracted and divided by then."""

    bounds: tuple[float, float]
    mean: float
    std: float
    rule: str = ""
    """Why they are not the foreground's."""


def window(
    foreground: ForegroundIntensity,
    background: BackgroundIntensity | None,
    fixed: tuple[float, float] | None = None,
) -> Window:
    """The normalisation of a CT.

    The foreground's 0.5 and 99.5 percentiles, its mean and its deviation, as nnU-Net. Clipped so, a CT whose targets
    are brighter than all else (electrodes, clips, implants) or of one value shows nothing around them, or nothing at
    all. There the bounds take in the background's percentiles, too, and the least and the largest value where all of
    these are equal; the middle of the bounds and a quarter of their width then scale what lies between to -2..2,
    whatever the foreground's deviation is.

    Args:
        background: None: every voxel has a class.
        fixed: bounds that a user or a recipe wants.

    Raises:
        ConfigError: Every voxel has one value.
    """
    low, high = fixed or (foreground.p00_5, foreground.p99_5)
    beside = background or BackgroundIntensity(
        min=foreground.min, p00_5_least=low, p00_5=low, p99_5=high, p99_5_largest=high, max=foreground.max
    )
    shown = min(foreground.p99_5, beside.p99_5) - max(foreground.p00_5, beside.p00_5)
    if shown > SLIVER * (beside.p99_5 - beside.p00_5):
        return Window(bounds=(low, high), mean=foreground.mean, std=foreground.std or 1.0)
    rule = ""
    if fixed is None:
        low, high = min(low, beside.p00_5), max(high, beside.p99_5)
        if low == high:
            low, high = min(foreground.min, beside.min), max(foreground.max, beside.max)
        rule = (
            f"the foreground alone, {foreground.p00_5:g} to {foreground.p99_5:g}, {WIDENED}: bounds take in the "
            "background's percentiles (0.5 and 99.5, median of the images); its middle and a quarter of its width scale"
        )
    if low >= high:
        raise ConfigError(
            f"every voxel of the training images has the value {low:g}, so there is nothing to learn from. Expected "
            "images of something. Export them again."
        )
    return Window(bounds=(low, high), mean=(low + high) / 2, std=(high - low) / 4, rule=rule)


SMALL_BOX = 0.75
"""Share of the image that the box around voxels other than 0 has, under which zeros are no part of the body. Source:
nnU-Net normalises by non-zero voxels then; it crops always, and here it pays from there on, by choice."""


def channels(draft: Draft) -> None:
    """Normalisation of each channel, primary modality first, then the extra ones.

    Source: nnU-Net; the share of 75 % of the box, too. `window` has the exception.
    """
    fingerprint, settings = draft.inputs.fingerprint, draft.inputs.settings
    modality = settings.modality.lower()
    by_modality = "ct" if modality == "ct" else "mri" if modality in ("mri", "mr") else "meanstd"
    extra = [mode.lower() for mode in settings.extra_modalities.values()]
    primary = draft.fixed("normalize_mode") or by_modality
    modes = [primary] * (fingerprint.num_channels - len(extra)) + extra
    plans, exceptions = [], list[str]()
    for mode, foreground, background in zip(modes, fingerprint.foreground, _backgrounds(fingerprint), strict=True):
        plan: dict[str, Any] = {"mode": mode}
        if mode in ("ct", "range"):
            clipped = window(foreground, background, draft.fixed("intensity_bounds"))
            plan |= {"bounds": list(clipped.bounds), "mean": clipped.mean, "std": clipped.std}
            exceptions += [clipped.rule] if clipped.rule else []
        else:
            plan["nonzero"] = fingerprint.nonzero_crop_ratio < SMALL_BOX
        plans.append(plan)
    rule = (
        "CT: clip to the foreground's 0.5 and 99.5 percentiles, then the foreground's z-score; others: each image's "
        "z-score, of non-zero voxels where images are under 75 % of their box (nnU-Net)"
    )
    exception = "; ".join(dict.fromkeys(exceptions))
    draft.put("channels", plans, exception or rule)
    # Both settings become part of the channels, whose origin is that of the first that is set.
    sources = [setting for setting, key in PLANNED_AS.items() if key == "channels"]
    if users := [setting for setting in sources if draft.user.get(setting)]:
        draft.set("channels", plans, draft.place(users[0]), exception)
    elif published := [draft.recipe[setting][1] for setting in sources if setting in draft.recipe]:
        draft.set("channels", plans, draft.recipe_name, "; ".join([published[0], *filter(None, [exception])]))


def _backgrounds(fingerprint: Fingerprint) -> tuple[BackgroundIntensity | None, ...]:
    """Of each channel; None where every voxel has a class."""
    return fingerprint.background or (None,) * fingerprint.num_channels


def image_ranges(draft: Draft) -> None:
    """Where the training images' intensities lie, which new images are judged by."""
    fingerprint = draft.inputs.fingerprint
    ranges = [
        [min(f.p00_5, b.p00_5_least), max(f.p99_5, b.p99_5_largest)] if b else [f.p00_5, f.p99_5]
        for f, b in zip(fingerprint.foreground, _backgrounds(fingerprint), strict=True)
    ]
    draft.put("image_ranges", ranges, "lowest 0.5 and highest 99.5 percentile of a training image; judges new ones")


def channel_names(draft: Draft) -> None:
    """What files of each channel are called, by which prediction finds them."""
    names = list(draft.inputs.channel_names)
    if len(names) != draft.inputs.fingerprint.num_channels:
        names = []
    draft.put("channel_names", names, "what the names of all training cases' files end in, where they have several")


def frame(draft: Draft) -> None:
    """The networks' axes, as the analysis has them; all outside the networks stays in RAS+."""
    found = draft.inputs.fingerprint.frame
    if found is None:
        draft.put("frame", None, "right, front and up: no slices that lie between them")
        return
    value = {"axes": [list(axis) for axis in found.axes], "slices": found.slices}
    rule = draft.inputs.fingerprint.frame_rule
    draft.put("frame", value, f"{rule}; images are turned to these axes for the networks, and labels back")


def resample_resolution(draft: Draft) -> None:
    """The voxel size to work at; see `target_spacing`.

    Raises:
        ConfigError: At the user's, images have more voxels than can be worked on.
    """
    spacing_mm, rule = target_spacing(draft.inputs.fingerprint)
    draft.put("resample_resolution", list(spacing_mm), rule)
    size_mm, wanted = draft.inputs.fingerprint.size_mm_median, draft.fixed("resample_resolution")
    if wanted and math.prod(mm / step for mm, step in zip(size_mm, wanted, strict=True)) > MOST_VOXELS:
        raise ConfigError(
            f"{draft.origins['resample_resolution'].origin}: resample_resolution: at {_in_mm(wanted)} mm the median "
            f"image of {_in_mm(size_mm)} mm has over {MOST_VOXELS:.0e} voxels. Expected a voxel size in mm near that "
            f"of the images, {_in_mm(spacing_mm)}."
        )


def _in_mm(values: Sequence[float]) -> str:
    return "x".join(f"{value:.4g}" for value in values)


def target_spacing(fingerprint: Fingerprint) -> tuple[tuple[float, float, float], str]:
    """The voxel size that suits a data set, in mm, and the rule.

    Source: nnU-Net takes the median of each axis, and for an axis more than three times coarser than the next (and
    with as few slices) its 10th percentile, so that thick-slice data sets are not blurred along the slices.
    """
    spacing = list(fingerprint.spacing_mm_median)
    coarse = max(range(3), key=lambda a: spacing[a])
    others = [a for a in range(3) if a != coarse]
    rule = "median spacing of each axis (nnU-Net)"
    if spacing[coarse] > 3 * max(spacing[a] for a in others) and fingerprint.shape_median[coarse] * 3 < min(
        fingerprint.shape_median[a] for a in others
    ):
        spacing[coarse] = max(fingerprint.spacing_mm_p10[coarse], *(spacing[a] for a in others))
        rule = f"median spacing; axis {'XYZ'[coarse]} is over 3 times coarser: its 10th percentile (nnU-Net)"
    return (_rounded(spacing[0]), _rounded(spacing[1]), _rounded(spacing[2])), rule


def _rounded(length_mm: float) -> float:
    """A length in at least four digits, and to a tenth of a micrometre."""
    return round(length_mm, max(4, 3 - math.floor(math.log10(length_mm))))


MOST_OUTSIDE = 0.005
"""Share of a class' voxels outside the box up to which images are cropped: its Dice loses half of that. A choice."""


def is_cropped(fingerprint: Fingerprint) -> bool:
    """Whether the rule below crops images: what their networks then see is the box alone."""
    return fingerprint.nonzero_crop_ratio < SMALL_BOX and fingerprint.outside_fraction <= MOST_OUTSIDE


def crop_foreground(draft: Draft) -> None:
    """Whether images are cropped to their voxels other than 0, as nnU-Net does with all; outside is background.

    Where the box is most of the image, a crop gains little; where a class lies outside of it, it would be lost.
    """
    fingerprint = draft.inputs.fingerprint
    share, cases, lost = fingerprint.nonzero_crop_ratio, fingerprint.labelled_outside, fingerprint.outside_fraction
    words = f"the box around voxels other than 0 is {share:.2f} of the median image"
    outside = f"{100 * lost:.2g} % of a class at most lies outside of it, in {some_of(cases, most=3)}"
    if share >= SMALL_BOX:
        draft.put("crop_foreground", False, f"{words}, so there is little to crop (under {SMALL_BOX:g}: cropped)")
    elif lost > MOST_OUTSIDE:
        draft.put("crop_foreground", False, f"{words}, but {outside} (over {100 * MOST_OUTSIDE:g} %: not cropped)")
    else:
        rest = f"{outside}: learned from as a whole" if cases else "no class lies outside of it"
        draft.put("crop_foreground", True, f"{words}, under {SMALL_BOX:g} (nnU-Net crops always); {rest}")
