"""Write one job's plan, and keep what a user edited in it."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from typing import Any

import torch
from pydantic import ValidationError

from autoseg.algos.fit import fitted_plan
from autoseg.algos.inputs import PlanInputs
from autoseg.algos.measurements import Measurements
from autoseg.algos.planner import make_plan
from autoseg.algos.rules.images import WIDENED
from autoseg.algos.rules.patches import ROUNDED_UP
from autoseg.algos.rules.start import FAR
from autoseg.config.reader import read_model
from autoseg.config.templates import fill_template, template_text
from autoseg.errors import ConfigError
from autoseg.export.bundle import write_bundle
from autoseg.plan import Origin, Plan, read_plan
from autoseg.version import __version__
from autoseg.weights.tables import keep_table
from autoseg.workspace.files import digest, write_text
from autoseg.workspace.jobs import JobDir, read_origins
from autoseg.workspace.workspace import Workspace

log = logging.getLogger(__name__)

DERIVED = {
    "budget_s": ("num_epochs", "augment", "mirror_axes", "tta", "learning_rate"),
    "optimizer": ("learning_rate",),
    "lateral_pairs": ("mirror_axes", "tta"),
    "mirror_axes": ("tta",),
}
"""Keys of a plan that the planner derives from another: one on the command line brings them along."""


def edited_values(paths: JobDir) -> dict[str, Any]:
    """Values of a job's plan that differ from what was generated, by key."""
    if not (paths.plan.exists() and paths.origins.exists()):
        return {}
    now = read_plan(paths).model_dump(mode="json")
    origins = read_origins(paths)
    generated = {key: origins[key].value for key in now if key in origins}
    generated["network"] = {
        key: origins[f"network.{key}"].value for key in now["network"] if f"network.{key}" in origins
    }
    return {key: value for key, value in now.items() if value != generated.get(key)}


def edit_job(workspace: Workspace, plan: Plan, origins: dict[str, Origin]) -> list[str]:
    """Bring values given on the command line into a job's existing plan, as an edit by hand would.

    Args:
        plan, origins: the planner's, with the command line; what came from elsewhere stays as it is in the file.

    Returns:
        The keys that changed.

    Raises:
        ConfigError: The plan in the file is not valid.
    """
    paths = workspace.job_dir(plan.algo, plan.fold)
    now = read_plan(paths).model_dump(mode="json")
    planned = plan.model_dump(mode="json")
    edited = {**now, "network": dict(now["network"])}
    for key, origin in origins.items():
        if origin.origin != "command line":
            continue
        if key.startswith("network."):
            edited["network"][key.removeprefix("network.")] = planned["network"][key.removeprefix("network.")]
        else:
            edited[key] = planned[key]
    # What the planner derives from such a value goes with it, unless it was edited, too.
    by_hand = edited_values(paths)
    for key, derived in DERIVED.items():
        if edited[key] != now[key]:
            edited.update({k: planned[k] for k in derived if k not in by_hand and origins[k].origin == "planner"})
    keys = [key for key in edited if edited[key] != now[key]]
    if keys:
        rules = {key: o.rule or o.origin for key, o in read_origins(paths).items()}
        rules.update(dict.fromkeys(keys, "command line"))
        write_text(paths.plan, fill_template(plan.algo, Plan.model_validate(edited).model_dump(mode="json"), rules))
    return keys


def generate_job(workspace: Workspace, inputs: PlanInputs, device: torch.device | None = None) -> bool:
    """Write a job's bundle where it is missing or made from other inputs.

    A value that was edited by hand stays, whatever else changes.

    Args:
        inputs: what the job is planned from; the plan of an earlier round is looked up here.
        device: where a step of the plan is measured, so that it fits time and memory; None: formulas alone.

    Returns:
        Whether anything was written.
    """
    algo, fold = inputs.algo, inputs.fold
    paths = workspace.job_dir(algo, fold)
    earlier = workspace.earlier_plan(algo, fold)
    if earlier is not None:
        inputs = replace(inputs, earlier=read_model(earlier, Plan))
    stage, sources = _stage(inputs), plan_sources(inputs)
    if not workspace.stale(stage, sources) and paths.plan.exists():
        return False
    edits = edited_values(paths)
    if device is None:
        plan, origins = make_plan(inputs)
    else:
        plan, origins = fitted_plan(device, inputs, Measurements(workspace.steps))
    generated = plan.model_dump(mode="json")
    if ROUNDED_UP in origins["roi_size"].rule:
        log.warning("%s_%d: roi_size %s", algo, fold, origins["roi_size"].rule)
    if WIDENED in origins["channels"].rule:
        log.warning("%s_%d: intensities of a CT: %s", algo, fold, origins["channels"].rule)
    if FAR in origins["loaded_rate"].rule:
        text = "%s_%d: starts from weights %s. Another organ's may be worse than none: compare_scratch shows it"
        log.warning(text, algo, fold, FAR)
    if edits:
        log.info("%s_%d: keeping what was edited by hand: %s", algo, fold, ", ".join(edits))
        plan = _with_edits(generated, edits, paths)
    table = None if inputs.start is None or earlier is not None else inputs.start.check(plan)
    write_bundle(plan, origins, generated, paths)
    keep_table(paths, table)
    if table is not None:
        log.info("%s_%d: starts with %s", algo, fold, table.summary)
    workspace.stamp(stage, sources)
    return True


def outdated(workspace: Workspace, inputs: PlanInputs) -> list[str]:
    """What of the user's changed since a job was planned, by name; a new machine or version is none of it."""
    reasons = workspace.stale(_stage(inputs), plan_sources(inputs))
    return [reason for reason in reasons if reason.split(" ", 1)[0] in ("settings", "statistics", "classes")]


def _stage(inputs: PlanInputs) -> str:
    return f"generate/{inputs.algo}_{inputs.fold}"


def _with_edits(generated: dict[str, Any], edits: dict[str, Any], paths: JobDir) -> Plan:
    """A new plan with what was edited by hand in the one before it.

    Raises:
        ConfigError: The two do not fit together.
    """
    try:
        return Plan.model_validate({**generated, **edits})
    except ValidationError as error:
        faults = [str(fault.get("ctx", {}).get("error", fault["msg"])) for fault in error.errors()]
        raise ConfigError(
            f"{paths.plan}: what was edited by hand ({', '.join(edits)}) does not fit the new plan: {' '.join(faults)} "
            "Undo the edit, or delete the file."
        ) from None


def plan_sources(inputs: PlanInputs) -> dict[str, str]:
    """Digests of all that decides a plan, by name."""
    settings, label_map = inputs.settings, inputs.label_map
    sources = {
        "statistics": digest(asdict(inputs.fingerprint)),
        "settings": digest(
            [settings.hyper(inputs.algo), settings.seed, settings.modality, settings.extra_modalities]
            + [settings.recipe, settings.memory_share]
        ),
        "classes": digest([label_map.names, label_map.values, label_map.sigmoid, label_map.ignore_label]),
        "training cases": digest(inputs.num_train),
        "budget": digest(inputs.budget_s),
        "hardware": digest(asdict(inputs.hardware)),
        "template": digest(template_text(inputs.algo)),
        "version of autoseg": __version__,
    }
    if (earlier := inputs.earlier) is not None:
        sources["network of the previous round"] = digest([earlier.network, earlier.roi_size, earlier.batch_size])
    elif inputs.start is not None:
        sources["init_weights"] = inputs.start.start.digest
    return sources
