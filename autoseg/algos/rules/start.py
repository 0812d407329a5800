"""Rules for jobs that start from weights from elsewhere (`init_weights`): what they take over, how they are fine-tuned.

What a job takes over from its weights: the network's width, depth and normalisation, without which they fit nowhere;
the voxel size and, of a CT, the window, where they suit the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoseg.algos.draft import Draft
from autoseg.weights.start import StartWeights

BY_STAGE = ("strides", "kernels")
"""A network's settings that follow the data's voxels, a row a stage, where the weights have as many stages: their
kernels of 3 are fitted to edges of 1. `resolution` always does, since it fits any number of stages."""
MOST_RATIO = 1.5
"""Voxels this many times longer or shorter than those that suit the data are not taken over. A choice: under it a
network sees structures at nearly the size that it knows, and no detail is lost."""
LEAST_SHOWN = 0.9
"""Share of the foreground's intensities, from its 0.5 to its 99.5 percentile, that a CT's window must hold to be taken
over. A choice."""


def adopted_network(start: StartWeights, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """What of a network's own settings is taken over from the weights.

    Args:
        chosen: what the network would choose for the data.
    """
    theirs = {key: value for key, value in start.start.network.items() if key in chosen and key != "resolution"}
    if "paths" in theirs:  # a topology that was searched: it is taken over, not searched again
        theirs["search"] = False
    lists = {key: value for key, value in theirs.items() if key in BY_STAGE and isinstance(value, list)}
    if all(len(chosen[key]) == len(value) for key, value in lists.items()):
        theirs = {key: value for key, value in theirs.items() if key not in BY_STAGE}
    return theirs


def resample_resolution(draft: Draft) -> None:
    """The voxel size of the weights, where it is near that of the data."""
    start = draft.inputs.start
    if start is None or start.start.spacing_mm is None or draft.inputs.earlier is not None:
        return
    if not _is_far(draft, start):
        rule = f"that of the weights it starts from ({start.start.source}), within {MOST_RATIO:g} times the data's"
        draft.put("resample_resolution", list(start.start.spacing_mm), rule)


def _is_far(draft: Draft, start: StartWeights) -> bool:
    """Whether weights are known to be of voxels of another size."""
    theirs, ours = start.start.spacing_mm, draft["resample_resolution"]
    return theirs is not None and max(max(a / b, b / a) for a, b in zip(theirs, ours, strict=True)) > MOST_RATIO


def channels(draft: Draft) -> None:
    """The window of a CT that the weights know, where it shows the classes."""
    start = draft.inputs.start
    theirs = None if start is None or draft.inputs.earlier is not None else start.start.channels
    ours = draft["channels"]
    if start is None or theirs is None or len(theirs) != len(ours) or draft.origins["channels"].origin != "planner":
        return
    plans, taken = [], False
    for plan, other, foreground in zip(ours, theirs, draft.inputs.fingerprint.foreground, strict=True):
        low, high = foreground.p00_5, foreground.p99_5
        bounds = other.bounds if plan["mode"] == other.mode == "ct" else None
        fits = bounds is not None and min(high, bounds[1]) - max(low, bounds[0]) >= LEAST_SHOWN * (high - low)
        plans.append(other.model_dump(mode="json") if fits else plan)
        taken = taken or fits
    if taken:
        rule = f"the window of the weights it starts from ({start.start.source}), which holds the foreground"
        draft.set("channels", plans, "planner", rule)


FINE_TUNING: dict[str, tuple[Any, str]] = {
    "warmup_fraction": (0.05, "50 of 1,000 epochs for all of the network (nnU-Net's PretrainedTrainer)"),
    "frozen_fraction": (
        0.05,
        "50 of 1,000 epochs for what is new alone, as many to warm up what was loaded (nnssl's sawtooth)",
    ),
    "loaded_rate": (
        0.25,
        "a higher rate makes a network forget what it knows in a few hundred steps (measured); nnU-Net's "
        "PretrainedTrainer has a tenth, for 1,000 epochs",
    ),
}
"""Hyperparameter -> value where a job starts from weights from elsewhere, and why."""
UNLABELED = {
    "loaded_rate": (1.0, "one rate for all after the warm-ups, since they have learned no classes yet (nnssl)")
}
"""What differs where weights have learned from images alone."""
FAR = f"of voxels over {MOST_RATIO:g} times longer or shorter: trained as random ones (measured)"
"""Source: measured (docs/results.md, "From the hippocampus to the heart")."""
FINE_TUNED = "starts from weights: "
"""What the rules of these values begin with."""


def is_kept(draft: Draft) -> bool:
    """Whether a job is to keep what its first weights know: classes, in voxels about as large as its own.

    In a later round they are the round's before, which has learned the classes.
    """
    start = draft.inputs.start
    if start is None or draft.inputs.earlier is not None:
        return start is not None
    return start.start.learned_classes and not _is_far(draft, start)


def fine_tuning(draft: Draft) -> None:
    """Warm-up, loaded weights frozen at first and a lower rate for them, unless the user or a recipe says otherwise."""
    start = draft.inputs.start
    if start is None or draft.inputs.earlier is not None:
        return
    values = FINE_TUNING | ({} if start.start.learned_classes else UNLABELED)
    if _is_far(draft, start):
        values |= {key: (draft[key], FAR) for key in ("frozen_fraction", "loaded_rate")}
    for key, (value, rule) in values.items():
        if draft.user.get(key) is None and key not in draft.recipe:
            draft.set(key, value, "planner", f"{FINE_TUNED}{rule}")
