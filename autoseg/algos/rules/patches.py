"""Rules for the network's size, its patches, and how they are cut, mirrored and put together."""

from __future__ import annotations

import math
from collections.abc import Sequence

from autoseg.algos.draft import Draft
from autoseg.algos.rules.schedule import planned_steps
from autoseg.algos.rules.start import adopted_network
from autoseg.data.frame import OBLIQUE_DEGREES
from autoseg.data.resampling import resampled_shape
from autoseg.data.windowing import fit_window, window_starts
from autoseg.errors import ConfigError
from autoseg.networks import network_file
from autoseg.networks.sizing import LEAST_GPU_BATCH, NetworkChoice, Sizing, round_up

SIDES_DEGREES = OBLIQUE_DEGREES
"""Between the networks' X and right up to which a mirrored image has left and right changed. A choice."""
ROUNDED_UP = "rounded up to what the network can halve"
"""In the rule of a patch that is not the one the user gave."""

MIRRORING_STEPS = 3000
"""Steps below which nothing is mirrored. Source: measured (docs/results.md): Dice is better without by 0.037 after 150
steps (five data sets), 0.010 after 400 to 500 (six) and 0.017 after 1,500 (two); twice of those is a guess."""

TTA_PASSES = 16
"""Windows times mirrorings of the median image up to which predictions are averaged over mirrorings. A choice: small
images are still segmented at once; a large one would take minutes more."""


def network(draft: Draft) -> None:
    """The network's own settings, as its file chooses them for the data, the device and the rung of its ladder."""
    inputs = draft.inputs
    fingerprint, hardware = inputs.fingerprint, inputs.hardware
    spacing_mm = tuple(draft["resample_resolution"])
    settled = draft.fixed("roi_size") or draft.fit.roi_size
    draft.sizing = Sizing(
        spacing_mm=spacing_mm,
        median_shape=resampled_shape((1, 1, 1), fingerprint.size_mm_seen(cropped=draft["crop_foreground"]), spacing_mm),
        num_outputs=inputs.label_map.num_outputs,
        memory_gib=hardware.memory_gib,
        on_gpu=hardware.on_gpu,
        size=draft.fit.size,
        roi_size=settled and tuple(settled),
    )
    draft.choice = network_file(inputs.algo).choose(draft.sizing)
    adopted = {} if inputs.start is None else adopted_network(inputs.start, draft.choice.network)
    source = "" if inputs.start is None else inputs.start.start.source
    for key, value in draft.choice.network.items():
        if key in adopted and inputs.earlier is None:
            draft.put(f"network.{key}", adopted[key], f"as in the weights it starts from ({source})")
        elif inputs.earlier is None:
            draft.put(f"network.{key}", value, draft.choice.rules.get(key, ""))
        else:
            draft.set(f"network.{key}", inputs.earlier.network[key], "planner", "that of the weights it starts from")


def roi_size(draft: Draft) -> None:
    """The patch: what fits memory by measurement, else the network's choice; rounded up to what it can halve.

    Raises:
        ConfigError: The user's leaves one voxel at the coarsest stage.
    """
    sizing, choice = _sized(draft)
    steps = network_file(draft.inputs.algo).divisor(draft.network)
    roi = draft.fit.roi_size or choice.roi_size
    draft.put("roi_size", _rounded_up(roi, steps), draft.fit.rule if draft.fit.roi_size else choice.rules["roi_size"])
    asked = draft["roi_size"]
    roi_size, origin = _rounded_up(asked, steps), draft.origins["roi_size"].origin
    if roi_size != asked:
        words = ", ".join(map(str, steps))
        rule = f"{_product(asked)} {ROUNDED_UP}: multiples of {words}"
        draft.set("roi_size", roi_size, origin, rule)
    if tuple(roi_size) == steps and str(draft.network.get("norm", "instance")).lower() == "instance":
        # One voxel at the coarsest stage has no variance to normalise by.
        if origin != "planner":
            raise ConfigError(
                [
                    f"{origin}: roi_size {_product(asked)} leaves {draft.inputs.algo} one voxel at its "
                    f"coarsest stage, of which nothing can be learned. Give at least {2 * steps[0]} along X."
                ]
            )
        axis = max(range(3), key=lambda a: sizing.median_shape[a])
        roi_size[axis] += steps[axis]
        draft.set("roi_size", roi_size, "planner", "two voxels at the coarsest stage")


def batch_size(draft: Draft) -> None:
    """Patches of a step: what fits memory by measurement, else the network's choice; the same for each process.

    Raises:
        ConfigError: The processes of a job cannot share the user's.
    """
    fit, processes = draft.fit, draft.inputs.settings.gpus_per_job
    _, choice = _sized(draft)
    shared = f", in multiples of {processes}: gpus_per_job" if processes > 1 else ""
    batch, rule = choice.batch_size, choice.rules["batch_size"]
    if draft.inputs.hardware.on_gpu:
        # A batch of most cases at once is the same step again and again; two are nnU-Net's least.
        batch = min(batch, max(LEAST_GPU_BATCH, draft.inputs.num_train // 4))
    if fit.batch_size:
        batch, rule = fit.batch_size, fit.rule
    draft.put("batch_size", round_up(batch, processes), rule + shared)
    if draft["batch_size"] % processes:
        raise ConfigError(
            [
                f"{draft.origins['batch_size'].origin}: batch_size {draft['batch_size']} cannot be shared by "
                f"{processes} GPUs (gpus_per_job). Give a multiple of {processes}."
            ]
        )


def foreground_fraction(draft: Draft) -> None:
    """Share of patches centred on a class. Source: nnU-Net's third; two thirds is a choice."""
    sizing, _ = _sized(draft)
    whole = all(r >= s for r, s in zip(draft["roi_size"], sizing.median_shape, strict=True))
    draft.put(
        "foreground_fraction",
        0.33 if whole else 0.67,
        "a third of the patches where most images fit into one (nnU-Net); two thirds where background would fill "
        "the others",
    )


def annotators_share(draft: Draft) -> None:
    """Share of patches from cases whose annotators drew the class. Source: measured, 4 cases of 56; FLARE23 paper."""
    draft.put(
        "annotators_share",
        0.0 if draft.inputs.settings.strategy == "two_stage" else 0.5,
        "as many patches of a class from the cases whose annotators drew it as from all, where models filled it in for "
        "the others (4 cases of 56: every organ gains); two_stage: all cases alike (the FLARE23 paper)",
    )


def lateral_pairs(draft: Draft) -> None:
    """Classes that change places in a mirrored image: as the analysis knows them; a pair that is merged is none."""
    fingerprint, names = draft.inputs.fingerprint, draft.inputs.label_map.names
    pairs, rule = fingerprint.lateral_pairs, fingerprint.lateral_rule
    if pairs is None:
        sided = draft.inputs.label_map.sided_pairs
        pairs, rule = tuple((names[p.left], names[p.right]) for p in sided), "names that differ in left and right alone"
    draft.put("lateral_pairs", [list(pair) for pair in pairs if {*pair} <= {*names}], rule)


def mirror_axes(draft: Draft) -> None:
    """Axes along which patches are mirrored. Source: measured, 150 to 1,500 steps on six data sets (docs/results.md).

    Not along X where a class may have a counterpart that is not known: on 37 structures of the mouse brain without
    pairs, 124 steps come to 0.167 Dice with mirroring and to 0.347 without.
    """
    fingerprint = draft.inputs.fingerprint
    unsure = [name for name in fingerprint.one_sided if name in draft.inputs.label_map.names]
    if unsure and draft.fixed("lateral_pairs") is None:
        draft.put("mirror_axes", [], f"none: {fingerprint.one_sided_rule}; lateral_pairs or mirror_axes would say more")
        return
    frame = fingerprint.frame
    if frame is not None and frame.lateral_degrees > SIDES_DEGREES and draft["lateral_pairs"]:
        rule = f"none: X lies {frame.lateral_degrees:.0f} degrees from right, so a mirrored image is not its other side"
        draft.put("mirror_axes", [], rule)
        return
    if (num_steps := planned_steps(draft)) < MIRRORING_STEPS:
        rule = f"none in {num_steps:.0f} steps: under {MIRRORING_STEPS} a network learns more without (measured)"
        draft.put("mirror_axes", [], rule)
        return
    draft.put("mirror_axes", [0], "left and right alone: mirrored up and down or front to back no body exists")


def tta(draft: Draft) -> None:
    """Whether predictions are averaged over mirrorings. Source: nnU-Net; measured on the hippocampus."""
    if not draft["mirror_axes"]:
        draft.put("tta", False, "mirror_axes names none")
        return
    sizing, _ = _sized(draft)
    roi = tuple(draft["roi_size"])
    window = fit_window(sizing.median_shape, roi, network_file(draft.inputs.algo).divisor(draft.network))
    windows = (
        len(window_starts(max(s, w), w, draft["overlap"])) for s, w in zip(sizing.median_shape, window, strict=True)
    )
    passes = math.prod(windows) * 2 ** len(draft["mirror_axes"])
    draft.put(
        "tta",
        passes <= TTA_PASSES,
        f"{passes} passes for the median image; on up to {TTA_PASSES} (nnU-Net: always; SegResNet on the "
        "hippocampus: 0.8823 Dice with it, 0.8797 without)",
    )


def _sized(draft: Draft) -> tuple[Sizing, NetworkChoice]:
    """What the rule `network` left for those after it."""
    assert draft.sizing is not None
    assert draft.choice is not None
    return draft.sizing, draft.choice


def _rounded_up(roi: Sequence[int], steps: Sequence[int]) -> list[int]:
    return [round_up(size, step) for size, step in zip(roi, steps, strict=True)]


def _product(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
