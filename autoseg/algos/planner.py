"""The planner: statistics and hardware to hyperparameters, each value with the rule that made it.

Rules are Auto3DSeg's or nnU-Net's, whichever did better where both were measured; each names its source.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autoseg.config.settings import LOCATOR, RECIPE_ALGO, AlgoName, Settings
from autoseg.config.templates import FILLED, template_values
from autoseg.config.types import suggest
from autoseg.data.fingerprint import Fingerprint
from autoseg.data.labels import LabelMap
from autoseg.data.resampling import resampled_shape
from autoseg.errors import ConfigError
from autoseg.hardware.facts import Hardware
from autoseg.inference.windows import fit_window, window_starts
from autoseg.networks import network_module
from autoseg.networks.facts import NETWORK_KEYS, RATES, SECONDS_PER_MEGAVOXEL
from autoseg.networks.sizing import Choice, Sizing, round_up
from autoseg.plan import Origin, Plan

MINUTES_PER_CPU_JOB = 60
"""Without a budget a job on a CPU gets at most this long: somebody waits for it at a desk."""

TRAINING_SHARE = 0.8
"""Share of a job's budget that is steps, when their number is estimated; validation and scores take the rest. A guess
before anything is measured."""

SPARE, FASTEST_STEP_S = 3.0, 0.01
"""A budget's schedule has this many times the epochs that fit by what a step took, or by this guess on a GPU where none
was measured: a machine that turns out faster must not end it early."""

ROUNDED_UP = "rounded up"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What measuring on the device changes in a plan; the defaults change nothing."""

    size: int = 0
    """Rung of the network's ladder (`Sizing.size`)."""
    batch_size: int | None = None
    roi_size: tuple[int, int, int] | None = None
    rule: str = ""
    """Why batch or patch differ from the formula's."""
    step_s: float | None = None
    """Measured seconds of a step."""
    memory_gib: float | None = None
    """Predicted peak of memory."""


LOCATOR_MM = (4.0, 4.0, 4.0)
"""Voxels of the locator. Source: FLARE23 paper."""

FEW_PASSES, FEW_STEPS = 20, 500
"""Passes over the training cases, or steps, below which augmentation is light.
Source: measured on the hippocampus: Dice after 1.4 passes 0.815 without and 0.799 with nnU-Net's augmentation."""

SHORT_STEPS, SHORT_RATE = 250, 1e-2
"""Steps under which Muon takes at least this rate: a schedule that short does not get far with a lower one. The number
lies between the 60 steps below and the 400 of the hippocampus, where 5e-3 was better (docs/results.md).
Source: SegResNet on phantoms, 60 steps: 0.42 Dice with 3e-3, 0.72 to 0.86 with 5e-3, 0.90 to 0.92 with 1e-2."""


TTA_PASSES = 16
"""Windows times mirrorings of the median image up to which predictions are averaged over mirrorings. A choice: small
images are still segmented at once; a large one would take minutes more."""


def target_spacing(fingerprint: Fingerprint) -> tuple[tuple[float, float, float], str]:
    """The voxel size to work at.

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


def channel_plans(fingerprint: Fingerprint, settings: Settings, algo: AlgoName) -> tuple[list[dict[str, Any]], str]:
    """Normalisation of each channel, primary modality first, then the extra ones."""
    fixed = {**_recipe_norm(settings, algo), **settings.hyper(algo)}
    modality = settings.modality.lower()
    primary = fixed.get("normalize_mode") or (
        "ct" if modality == "ct" else "mri" if modality in ("mri", "mr") else "meanstd"
    )
    extra = [mode.lower() for mode in settings.extra_modalities.values()]
    num_primary = fingerprint.num_channels - len(extra)
    modes = [primary] * num_primary + extra
    nonzero = fingerprint.nonzero_crop_ratio < 0.75
    plans = []
    for mode, foreground in zip(modes, fingerprint.foreground, strict=True):
        plan: dict[str, Any] = {"mode": mode}
        if mode in ("ct", "range"):
            plan["bounds"] = list(fixed.get("intensity_bounds") or (foreground.p00_5, foreground.p99_5))
            plan["mean"], plan["std"] = foreground.mean, foreground.std or 1.0
        else:
            plan["nonzero"] = nonzero
        plans.append(plan)
    rule = (
        "CT: clip to the foreground's 0.5 and 99.5 percentiles, then the foreground's z-score; others: each image's "
        "z-score, of non-zero voxels where images are under 75 % of their box (nnU-Net)"
    )
    return plans, rule


def step_seconds(algo: AlgoName, batch: int, roi: tuple[int, int, int], num_cores: int) -> float:
    """Expected seconds of a training step on a CPU."""
    return SECONDS_PER_MEGAVOXEL[algo] * batch * math.prod(roi) / 1e6 * 2 / num_cores


def recipe_values(settings: Settings, algo: AlgoName) -> dict[str, tuple[Any, str]]:
    """What the recipe of the settings says for a network: key -> value and source; empty where it says nothing."""
    if RECIPE_ALGO.get(settings.recipe) != algo:
        return {}
    return template_values(algo, f"recipes/{settings.recipe}.yaml")


def _recipe_norm(settings: Settings, algo: AlgoName) -> dict[str, Any]:
    return {k: v for k, (v, _) in recipe_values(settings, algo).items() if k in ("normalize_mode", "intensity_bounds")}


def expected_seconds(plan: Plan, hardware: Hardware) -> float | None:
    """How long a job will train: its budget, or what its steps take on a CPU; None: not known before it runs."""
    if plan.budget_s is not None:
        return plan.budget_s
    if hardware.on_gpu and plan.step_s is None:
        return None
    steps = plan.num_epochs * plan.num_steps_per_epoch
    return steps * (plan.step_s or step_seconds(plan.algo, plan.batch_size, plan.roi_size, hardware.num_cores))


def _epochs(num_train: int, steps: int, step_s: float | None) -> tuple[int, str]:
    """The default number of epochs.

    Args:
        step_s: expected seconds of a step where it is known to be slow: on a CPU.
    """
    epochs = min(1250, max(300, math.ceil(80000 / max(1, num_train))))
    if step_s is not None and epochs * steps * step_s > MINUTES_PER_CPU_JOB * 60:
        fits = max(2, int(MINUTES_PER_CPU_JOB * 60 / (step_s * steps)))
        return fits, f"what this CPU does in about {MINUTES_PER_CPU_JOB} minutes; set num_epochs or budget for more"
    return epochs, "80,000 samples, 300 to 1,250 epochs (Auto3DSeg's SegResNet)"


def make_plan(
    *,
    algo: AlgoName,
    fold: int,
    num_train: int,
    fingerprint: Fingerprint,
    label_map: LabelMap,
    settings: Settings,
    origins: dict[str, str],
    hardware: Hardware,
    budget_s: float | None,
    budget_origin: str = "",
    fit: Fit = Fit(),
    earlier: Plan | None = None,
) -> tuple[Plan, dict[str, Origin]]:
    """Fill an algorithm's template for one fold.

    Args:
        num_train: cases this fold trains on.
        origins: where each of the user's settings stands.
        budget_s: seconds for this job, or None.
        budget_origin: where the budget was set.
        fit: what measuring on the device changes.
        earlier: of the round whose weights the job starts from: its network is taken over.

    Returns:
        The plan, and for each of its keys where it came from.

    Raises:
        ConfigError: A weight is given to a class that there is not, a patch is too small for the network, or a batch
            cannot be shared by the processes of a job.
    """
    fixed = settings.hyper(algo)
    recipe = recipe_values(settings, algo)

    unknown = [
        f"{key}: no class {name}. {suggest(name, label_map.names)}"
        for key in ("class_weights", "class_sampling")
        for name in fixed.get(key, {})  # type: ignore[attr-defined]
        if name not in label_map.names
    ]
    if unknown:
        raise ConfigError(unknown)

    def place(key: str) -> str:
        return origins.get(f"{algo}.{key}") or origins.get(key, "input.yaml")

    values: dict[str, Any] = {}
    found: dict[str, Origin] = {}

    def put(key: str, value: Any, rule: str, setting: str | None = None) -> None:
        user = fixed.get(setting or key)
        if user is not None:
            value, rule, origin = list(user) if isinstance(user, tuple) else user, "", place(setting or key)
        elif key in recipe:
            (value, rule), origin = recipe[key], f"recipe {settings.recipe}"
        else:
            origin = "planner"
        values[key] = value
        found[key] = Origin(value=value, origin=origin, rule=rule)

    for key, (value, rule) in template_values(algo).items():
        if value != FILLED:
            put(key, value, rule)
            if found[key].origin == "planner":
                found[key] = Origin(value=value, origin="template", rule=rule)

    put("fold", fold, "one job for each fold")
    classes, named = _class_plans(label_map), _class_plans(label_map.origin) if label_map.origin else []
    put("user_classes", named, "the classes before merging" if named else "no class is merged")
    for key, value in (("classes", classes), ("sigmoid", label_map.sigmoid), ("ignore_label", label_map.ignore_label)):
        put(key, value, "class_names, sigmoid and ignore_label of input.yaml, else the datalist's labels")
    channels, rule = channel_plans(fingerprint, settings, algo)
    put("channels", channels, rule)
    if fixed.get("normalize_mode") or fixed.get("intensity_bounds"):
        found["channels"] = Origin(value=channels, origin=place("normalize_mode"), rule="")
    elif "normalize_mode" in recipe:
        source = recipe["normalize_mode"][1]
        found["channels"] = Origin(value=channels, origin=f"recipe {settings.recipe}", rule=source)
    spacing, rule = target_spacing(fingerprint)
    if algo == LOCATOR:
        spacing, rule = LOCATOR_MM, "4 mm, enough to tell where the organs are (FLARE23 paper)"
    put("resample_resolution", list(spacing), rule)
    put("crop_foreground", False, "off: zero borders are cheap to skip and a crop moves windows")
    spacing = tuple(values["resample_resolution"])

    settled: Any = fixed.get("roi_size") or (recipe["roi_size"][0] if "roi_size" in recipe else fit.roi_size)
    sizing = Sizing(
        spacing_mm=spacing,
        median_shape=_shape(fingerprint.size_mm_median, spacing),
        p90_shape=_shape(fingerprint.size_mm_p90, spacing),
        num_outputs=label_map.num_outputs,
        memory_gib=hardware.memory_gib,
        on_gpu=hardware.on_gpu,
        size=fit.size,
        roi_size=settled and tuple(settled),
    )
    choice: Choice = network_module(algo).choose(sizing)
    network = dict(choice.network)
    for key, value in network.items():
        origin, rule = "planner", choice.rules.get(key, "")
        if key in NETWORK_KEYS[algo] and key in fixed:
            value, origin, rule = fixed[key], place(key), ""
        elif f"network.{key}" in recipe:
            (value, rule), origin = recipe[f"network.{key}"], f"recipe {settings.recipe}"
        if earlier is not None:
            value, origin, rule = earlier.network[key], "planner", "that of the weights it starts from"
        network[key] = value = list(value) if isinstance(value, tuple) else value
        found[f"network.{key}"] = Origin(value=value, origin=origin, rule=rule)
    values["network"] = network
    steps_of_roi = network_module(algo).divisor(network)
    roi = [round_up(s, d) for s, d in zip(fit.roi_size or choice.roi_size, steps_of_roi, strict=True)]
    put("roi_size", roi, fit.rule if fit.roi_size else choice.rules["roi_size"])
    given_roi = values["roi_size"]
    values["roi_size"] = [round_up(s, d) for s, d in zip(given_roi, steps_of_roi, strict=True)]
    if values["roi_size"] != given_roi:
        origin, words = found["roi_size"].origin, ", ".join(map(str, steps_of_roi))
        rule = f"{_product(given_roi)} {ROUNDED_UP} to what the network can halve: multiples of {words}"
        found["roi_size"] = Origin(value=values["roi_size"], origin=origin, rule=rule)
    if tuple(values["roi_size"]) == steps_of_roi and str(network.get("norm", "instance")).lower() == "instance":
        # One voxel at the coarsest stage has no variance to normalise by.
        if found["roi_size"].origin != "planner":
            raise ConfigError(
                [
                    f"{found['roi_size'].origin}: roi_size {_product(given_roi)} leaves {algo} one voxel at its "
                    f"coarsest stage, of which nothing can be learned. Give at least {2 * steps_of_roi[0]} along X."
                ]
            )
        axis = max(range(3), key=lambda a: sizing.median_shape[a])
        values["roi_size"][axis] += steps_of_roi[axis]
        found["roi_size"] = Origin(value=values["roi_size"], origin="planner", rule="two voxels at the coarsest stage")
    processes = settings.gpus_per_job
    batch = round_up(fit.batch_size or choice.batch_size, processes)
    shared = f", in multiples of {processes}: gpus_per_job" if processes > 1 else ""
    put("batch_size", batch, (fit.rule if fit.batch_size else choice.rules["batch_size"]) + shared)
    if values["batch_size"] % processes:
        raise ConfigError(
            [
                f"{found['batch_size'].origin}: batch_size {values['batch_size']} cannot be shared by {processes} GPUs "
                f"(gpus_per_job). Give a multiple of {processes}."
            ]
        )
    whole = all(r >= s for r, s in zip(values["roi_size"], sizing.median_shape, strict=True))
    put(
        "foreground_fraction",
        0.33 if whole else 0.67,
        "a third of the patches where most images fit into one (nnU-Net); two thirds where background would fill "
        "the others",
    )
    put(
        "annotators_share",
        0.0 if settings.strategy == "two_stage" else 0.5,
        "as many patches of a class from the cases whose annotators drew it as from all, where models filled it in for "
        "the others (4 cases of 56: every organ gains); two_stage: all cases alike (the FLARE23 paper)",
    )
    put("mirror_axes", [0], "left and right alone: mirrored up and down or front to back no body exists")
    if algo != LOCATOR:  # which need not be exact, as its template says
        window = fit_window(sizing.median_shape, tuple(values["roi_size"]), steps_of_roi)
        windows = (
            len(window_starts(max(s, w), w, values["overlap"]))
            for s, w in zip(sizing.median_shape, window, strict=True)
        )
        passes = math.prod(windows) * 2 ** len(values["mirror_axes"])
        put(
            "tta",
            passes <= TTA_PASSES,
            f"{passes} passes for the median image; on up to {TTA_PASSES} (nnU-Net: always; SegResNet on the "
            "hippocampus: 0.8823 Dice with it, 0.8797 without)",
        )
    put("num_steps_per_epoch", max(1, math.ceil(num_train / values["batch_size"])), "every training case once an epoch")
    step_s = fit.step_s
    if step_s is None and not hardware.on_gpu:
        step_s = step_seconds(algo, values["batch_size"], tuple(values["roi_size"]), hardware.num_cores)
    epochs, rule = _epochs(num_train, values["num_steps_per_epoch"], None if hardware.on_gpu else step_s)
    if budget_s is not None:
        steps_s = values["num_steps_per_epoch"] * (step_s or FASTEST_STEP_S)
        epochs, rule = max(epochs, math.ceil(SPARE * budget_s / steps_s)), "more than fit: the budget ends the job"
    put("num_epochs", epochs, rule)
    num_steps = float(values["num_epochs"] * values["num_steps_per_epoch"])
    if budget_s is not None and step_s is not None:
        num_steps = min(num_steps, TRAINING_SHARE * budget_s / step_s)
    passes = num_steps / values["num_steps_per_epoch"]
    put(
        "augment",
        "light" if passes < FEW_PASSES or num_steps < FEW_STEPS else "default",
        f"about {passes:.0f} passes over the cases in {num_steps:.0f} steps: light under {FEW_PASSES} or {FEW_STEPS}, "
        "where a network has no time to learn by heart and strong changes only slow it (measured); else nnU-Net's "
        "probabilities and ranges",
    )
    values["budget_s"] = budget_s
    found["budget_s"] = Origin(
        value=budget_s,
        origin=budget_origin or "planner",
        rule="the job's share of the budget" if budget_s else "no budget given",
    )
    every = max(1, math.ceil(values["num_epochs"] / 20))
    put(
        "num_epochs_per_validation",
        every,
        "20 validations over the schedule; with a budget, as many as a twentieth of the time allows",
    )
    put(
        "optimizer",
        "adamw" if hardware.on_gpu else "muon",
        "AdamW on a GPU (Auto3DSeg's SegResNet, the FLARE23 paper)"
        if hardware.on_gpu
        else "Muon on a CPU: SegResNet came to 0.877 Dice with it, to 0.852 with AdamW in as many steps (measured)",
    )
    on_gpu, on_cpu, muon, source = RATES[algo]
    if values["optimizer"] == "muon":
        short = num_steps < SHORT_STEPS
        put(
            "learning_rate",
            max(muon, SHORT_RATE) if short else muon,
            f"Muon's for fewer than {SHORT_STEPS} steps (measured)" if short else "Muon's (measured on a CPU)",
        )
    elif hardware.on_gpu:
        put("learning_rate", on_gpu, source)
    else:
        put(
            "learning_rate",
            on_cpu,
            "ten to twenty-five times a GPU's, for small networks and short schedules (measured)",
        )
    put("cache", "ram", "in memory, as far as half of what is free allows, the rest on disk (the FLARE23 paper)")
    put("cache_gib", None, "half of what is free")
    measured = "measured by a step on the device that planned" if fit.step_s is not None else "not measured"
    put("step_s", fit.step_s and float(f"{fit.step_s:.3g}"), measured)
    put("memory_gib", fit.memory_gib and round(fit.memory_gib, 2), measured)
    values["seed"] = settings.seed * 1000 + fold
    found["seed"] = Origin(value=values["seed"], origin="planner", rule="1000 x seed of input.yaml + fold")
    return Plan.model_validate(values), found


def _product(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _class_plans(label_map: LabelMap) -> list[dict[str, Any]]:
    return [{"name": n, "values": list(v)} for n, v in zip(label_map.names, label_map.values, strict=True)]


def _shape(size_mm: tuple[float, float, float], spacing_mm: tuple[float, float, float]) -> tuple[int, int, int]:
    return resampled_shape((1, 1, 1), size_mm, spacing_mm)
