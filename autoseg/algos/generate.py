"""Write one job's plan, and keep what a user edited in it."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

import torch

from autoseg.algos.fit import fitted_plan
from autoseg.algos.planner import ROUNDED_UP, make_plan
from autoseg.config.reader import read_model
from autoseg.config.settings import AlgoName, Settings
from autoseg.config.templates import fill_template, read_template_text
from autoseg.data.fingerprint import Fingerprint
from autoseg.data.labels import LabelMap
from autoseg.export.bundle import write_bundle
from autoseg.hardware.facts import Hardware
from autoseg.plan import Origin, Plan
from autoseg.version import __version__
from autoseg.workspace.files import digest, write_text
from autoseg.workspace.jobs import JobDir, read_origins
from autoseg.workspace.workspace import Workspace

log = logging.getLogger(__name__)

DERIVED = {"budget_s": ("num_epochs", "augment", "learning_rate"), "optimizer": ("learning_rate",)}
"""Keys of a plan that the planner derives from another: one on the command line brings them along."""


def edited_values(paths: JobDir) -> dict[str, Any]:
    """Values of a job's plan that differ from what was generated, by key."""
    if not (paths.plan.exists() and paths.origins.exists()):
        return {}
    now = read_model(paths.plan, Plan).model_dump(mode="json")
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
    now = read_model(paths.plan, Plan).model_dump(mode="json")
    given = plan.model_dump(mode="json")
    edited = {**now, "network": dict(now["network"])}
    for key, origin in origins.items():
        if origin.origin != "command line":
            continue
        if key.startswith("network."):
            edited["network"][key.removeprefix("network.")] = given["network"][key.removeprefix("network.")]
        else:
            edited[key] = given[key]
    # What the planner derives from such a value goes with it, unless it was edited, too.
    by_hand = edited_values(paths)
    for key, derived in DERIVED.items():
        if edited[key] != now[key]:
            edited.update({k: given[k] for k in derived if k not in by_hand and origins[k].origin == "planner"})
    keys = [key for key in edited if edited[key] != now[key]]
    if keys:
        rules = {key: o.rule or o.origin for key, o in read_origins(paths).items()}
        rules.update(dict.fromkeys(keys, "command line"))
        write_text(paths.plan, fill_template(plan.algo, Plan.model_validate(edited).model_dump(mode="json"), rules))
    return keys


def generate_job(
    workspace: Workspace,
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
    device: torch.device | None = None,
) -> bool:
    """Write a job's bundle where it is missing or made from other inputs.

    A value that was edited by hand stays, whatever else changes.

    Args:
        device: where a step of the plan is measured, so that it fits time and memory; None: formulas alone.

    Returns:
        Whether anything was written.
    """
    paths = workspace.job_dir(algo, fold)
    stage = f"generate/{algo}_{fold}"
    inputs = {
        "statistics": digest(asdict(fingerprint)),
        "settings": digest(
            [settings.hyper(algo), settings.seed, settings.modality, settings.extra_modalities]
            + [settings.recipe, settings.memory_share]
        ),
        "classes": digest([label_map.names, label_map.values, label_map.sigmoid, label_map.ignore_label]),
        "training cases": digest(num_train),
        "budget": digest(budget_s),
        "hardware": digest(asdict(hardware)),
        "template": digest(read_template_text(algo, "configs/hyper_parameters.yaml")),
        "version of autoseg": __version__,
    }
    earlier = workspace.earlier_plan(algo, fold)
    begun = None if earlier is None else read_model(earlier, Plan)
    if begun is not None:
        inputs["network of the previous round"] = digest([begun.network, begun.roi_size, begun.batch_size])
    reasons = workspace.stale(stage, inputs)
    if not reasons and paths.plan.exists():
        return False
    edits = edited_values(paths)
    known: dict[str, Any] = {
        "algo": algo,
        "fold": fold,
        "num_train": num_train,
        "fingerprint": fingerprint,
        "label_map": label_map,
        "settings": settings,
        "origins": origins,
        "hardware": hardware,
        "budget_s": budget_s,
        "budget_origin": budget_origin,
        "earlier": begun,
    }
    plan, found = make_plan(**known) if device is None else fitted_plan(device, **known)
    generated = plan.model_dump(mode="json")
    if ROUNDED_UP in found["roi_size"].rule:
        log.warning("%s_%d: roi_size %s", algo, fold, found["roi_size"].rule)
    if edits:
        log.info("%s_%d: keeping what was edited by hand: %s", algo, fold, ", ".join(edits))
        plan = Plan.model_validate({**generated, **edits})
    write_bundle(plan, found, generated, paths)
    workspace.stamp(stage, inputs)
    return True
