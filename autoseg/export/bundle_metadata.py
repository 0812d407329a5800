"""A bundle's metadata.json and README: what it is, what it needs, and what of a prediction it leaves out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from autoseg.plan import Plan
from autoseg.terminal import printable
from autoseg.version import __version__

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
MODALITIES = {"ct": "CT", "mri": "MR", "pet": "PT"}
"""Normalisation of a channel -> what kind of image it is; n/a for the others."""
TESTED = {"pytorch-ignite": "0.5.5"}
"""Versions of packages that a bundle needs and autoseg does not, as they were tested."""
SPECIAL = re.compile(r"^[$@%]+|[@%](?=#|::)")
"""What MONAI's parser would read as an expression or a reference in a text."""


def plain(text: str) -> str:
    """A name from a data set as text that MONAI's parser leaves as it is, on one line."""
    return SPECIAL.sub("", printable(text, one_line=True)).strip() or "unnamed"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Installed versions, else the tested ones."""
    table = {}
    for name in packages:
        try:
            table[name] = version(name).split("+")[0]
        except PackageNotFoundError:
            table[name] = TESTED[name]
    return table


def left_out(plan: Plan, *, finished: bool) -> list[str]:
    """What autoseg does beyond what the bundle's configs do, in sentences.

    Args:
        finished: the bundle was exported, with what the run's settings and its ensemble do beyond the plan.
    """
    sentences = []
    if not finished:
        sentences.append(
            "Rules that clean the labels (the ensemble's postprocessing, inference.slice_run and min_voxels) are not "
            "in this bundle, nor are inference.overlap and inference.mirror: give --overlap and --mirror_axes."
        )
    if plan.label_map.merged_sides:
        sentences.append("Left and right were trained as one class and are not told apart here.")
    sentences.append("The locator, crop_to_first and skip_empty of `autoseg predict --fast` are not used.")
    if plan.ignore_label is not None:
        sentences.append(f"Training by the bundle takes voxels of the ignore label {plan.ignore_label} for background.")
    if plan.class_weights or plan.class_sampling:
        sentences.append("Training by the bundle knows no class_weights and no class_sampling.")
    return sentences


def needed(plans: Sequence[Plan], *, cleans: bool = False) -> tuple[str, ...]:
    """Packages that a bundle's commands need besides torch and NumPy.

    Args:
        plans: of its networks.
        cleans: its labels are cleaned, by scripts/finishing.py.
    """
    transformers = any(plan.algo in ("swinunetr", "unetr") for plan in plans)
    return "monai", "pytorch-ignite", "nibabel", *(["einops"] * transformers), *(["scipy"] * cleans)


def metadata(
    plans: Sequence[Plan],
    *,
    name: str,
    channels: Sequence[str],
    limits: Sequence[str],
    scores: Mapping[str, float] | None = None,
    cleans: bool = False,
) -> dict[str, Any]:
    """The bundle's metadata.json, by MONAI's schema.

    Args:
        plans: of the bundle's networks; the first gives the format of the data.
        channels: names of the outputs.
        limits: what is left out, in sentences.
        scores: of the model, by name.
        cleans: as in `needed`.
    """
    plan = plans[0]
    names = [plain(c.name) for c in plan.classes]
    painted = dict(zip(names, plan.label_map.painted_values, strict=True))
    kinds = [MODALITIES.get(c.mode, "n/a") for c in plan.channels]
    base = versions(("monai", "torch", "numpy"))
    return {
        "schema": SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": f"made by autoseg {__version__}"},
        "monai_version": base["monai"],
        "pytorch_version": base["torch"],
        "numpy_version": base["numpy"],
        "required_packages_version": versions(needed(plans, cleans=cleans)[1:]),
        "supported_apps": {},
        "name": name,
        "task": f"segmentation of {', '.join(names)}",
        "description": f"{', '.join(dict.fromkeys(p.algo for p in plans))}, trained by autoseg. {' '.join(limits)}",
        "authors": "trained with autoseg",
        "copyright": "as the training data",
        "data_source": "the data set it was trained on; autoseg does not know where that came from",
        "data_type": "nibabel",
        "image_classes": f"{len(kinds)} channel{'s' * (len(kinds) > 1)}: {', '.join(kinds)}",
        "label_classes": ", ".join(["0 is everything else", *(f"{v} is {n}" for n, v in painted.items())]),
        "pred_classes": f"{plan.num_outputs} channels, "
        + ("each region by itself" if plan.sigmoid else "softmax over background and classes"),
        "eval_metrics": dict(scores or {}),
        "intended_use": "Research. It is no medical device and was not cleared or approved as one.",
        "references": [],
        "network_data_format": _data_format(plan, channels, kinds),
    }


def _data_format(plan: Plan, channels: Sequence[str], kinds: Sequence[str]) -> dict[str, Any]:
    """What goes into the network and what comes out."""
    patch = {"spatial_shape": list(plan.roi_size), "dtype": "float32", "value_range": [], "is_patch_data": True}
    return {
        "inputs": {
            "image": {
                "type": "image",
                "format": "hounsfield" if set(kinds) == {"CT"} else "magnitude",
                "modality": kinds[0] if len(set(kinds)) == 1 else "n/a",
                "num_channels": len(plan.channels),
                **patch,
                "channel_def": {str(i): c.mode for i, c in enumerate(plan.channels)},
            }
        },
        "outputs": {
            "pred": {
                "type": "image",
                "format": "segmentation",
                "num_channels": plan.num_outputs,
                **patch,
                "channel_def": {str(i): plain(channel) for i, channel in enumerate(channels)},
            }
        },
    }
