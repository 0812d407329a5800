"""Rules for classes, intensities and voxels."""

from __future__ import annotations

from typing import Any

from autoseg.algos.draft import Draft
from autoseg.config.hyperparameters import PLANNED_AS
from autoseg.config.types import suggest
from autoseg.data.fingerprint import Fingerprint
from autoseg.data.labels import LabelMap
from autoseg.errors import ConfigError


def check_class_names(draft: Draft) -> None:
    """Refuse weights of classes that there are not.

    Raises:
        ConfigError: All such names.
    """
    names = draft.inputs.label_map.names
    unknown = [
        f"{key}: no class {name}. {suggest(name, names)}"
        for key in ("class_weights", "class_sampling")
        for name in draft.user.get(key, {})
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


def channels(draft: Draft) -> None:
    """Normalisation of each channel, primary modality first, then the extra ones.

    Source: nnU-Net; the share of 75 % of the box, too.
    """
    fingerprint, settings = draft.inputs.fingerprint, draft.inputs.settings
    modality = settings.modality.lower()
    by_modality = "ct" if modality == "ct" else "mri" if modality in ("mri", "mr") else "meanstd"
    extra = [mode.lower() for mode in settings.extra_modalities.values()]
    primary = draft.fixed("normalize_mode") or by_modality
    modes = [primary] * (fingerprint.num_channels - len(extra)) + extra
    plans = []
    for mode, foreground in zip(modes, fingerprint.foreground, strict=True):
        plan: dict[str, Any] = {"mode": mode}
        if mode in ("ct", "range"):
            plan["bounds"] = list(draft.fixed("intensity_bounds") or (foreground.p00_5, foreground.p99_5))
            plan["mean"], plan["std"] = foreground.mean, foreground.std or 1.0
        else:
            plan["nonzero"] = fingerprint.nonzero_crop_ratio < 0.75
        plans.append(plan)
    draft.put(
        "channels",
        plans,
        "CT: clip to the foreground's 0.5 and 99.5 percentiles, then the foreground's z-score; others: each image's "
        "z-score, of non-zero voxels where images are under 75 % of their box (nnU-Net)",
    )
    # Both settings become part of the channels, whose origin is that of the first that is set.
    sources = [setting for setting, key in PLANNED_AS.items() if key == "channels"]
    if users := [setting for setting in sources if draft.user.get(setting)]:
        draft.set("channels", plans, draft.place(users[0]))
    elif published := [draft.recipe[setting][1] for setting in sources if setting in draft.recipe]:
        draft.set("channels", plans, draft.recipe_name, published[0])


def resample_resolution(draft: Draft) -> None:
    """The voxel size to work at; see `target_spacing`."""
    spacing_mm, rule = target_spacing(draft.inputs.fingerprint)
    draft.put("resample_resolution", list(spacing_mm), rule)


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
    return (round(spacing[0], 4), round(spacing[1], 4), round(spacing[2], 4)), rule


def crop_foreground(draft: Draft) -> None:
    """Whether zero borders are cropped away."""
    draft.put("crop_foreground", False, "off: zero borders are cheap to skip and a crop moves windows")
