"""A bundle in a folder of its own, without the files of a job: one model, one at two resolutions, or an ensemble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from autoseg.errors import ConfigError
from autoseg.export import bundle_configs
from autoseg.export.bundle import network_def, outputs, write_configs, write_readme, write_shared
from autoseg.export.bundle_metadata import left_out, metadata
from autoseg.export.card import card_text, facts_of, weights_bytes
from autoseg.export.source import Source, licence_of, read_source, without_run
from autoseg.export.targets import Request
from autoseg.inference.predictor import group_key, read_weights
from autoseg.plan import Plan, read_plan
from autoseg.workspace.archive import is_packed
from autoseg.workspace.files import write_atomic, write_folder, write_json, write_text
from autoseg.workspace.jobs import JobDir

Weights = dict[str, torch.Tensor]
CARD = "model_card.md"
"""In a bundle's docs/."""
ENSEMBLE_LIMIT = "An ensemble has no configs for training; each job's own bundle has."


def export_bundle(
    jobs: Sequence[JobDir],
    target: Path,
    *,
    plans: Sequence[Plan] = (),
    name: str = "",
    combine: Literal["mean", "vote"] = "mean",
    rules: Sequence[Mapping[str, Any]] = (),
    scores: Mapping[str, float] | None = None,
    lowres: JobDir | None = None,
    also_left_out: Sequence[str] = (),
) -> list[Path]:
    """Write a bundle of trained jobs.

    Args:
        jobs: whose models predict together, sure to be whole and alike; one of them: it can be trained on, too.
        target: folder to write.
        plans: of the jobs, where they are to predict otherwise than planned; empty: the jobs' own.
        name: of the bundle; empty: its folder's.
        combine: mean of probabilities, or vote.
        rules: how the labels are cleaned, as plain data of the postprocessing's rules.
        scores: of the model, such as {"mean_dice": 0.9}, for its metadata.
        lowres: a job of the same network at larger voxels, that `--highres false` chooses; for one job alone.
        also_left_out: what of the run is not in the bundle, in sentences for its metadata and README.

    Returns:
        The folder.

    Raises:
        ConfigError: The low-resolution model does not fit, or a rule is about a class that is not an output.
    """
    plans = plans or [read_plan(job) for job in jobs]
    plan = plans[0]
    low = read_plan(lowres) if lowres is not None else None
    if low is not None:
        _check_lowres(plans, low)
    names = {c.name for c in plan.classes}
    if unknown := [rule["name"] for rule in rules if rule["name"] not in names]:
        raise ConfigError(
            f"the rule for {unknown[0]} is about one side of a class that was trained as one, and bundles tell no "
            "sides apart. Leave the rule out, or predict with autoseg."
        )
    single = len(jobs) == 1
    (target / "models").mkdir(parents=True, exist_ok=True)
    if single:
        write_configs(plan, target, lowres=low, rules=rules)
        weights = read_weights(jobs[0])
    else:
        config, weights = _ensemble(jobs, plans, combine, rules)
        write_json(target / "configs" / "inference.json", config)
    _save(weights, target / "models" / "model.pt")
    if lowres is not None:
        _save(read_weights(lowres), target / "models" / "model_lowres.pt")
    limits = [*left_out(plan, finished=True), *also_left_out, *([] if single else [ENSEMBLE_LIMIT])]
    name = name or target.name
    described = metadata(plans, name=name, channels=outputs(plan), limits=limits, scores=scores, cleans=bool(rules))
    write_json(target / "configs" / "metadata.json", described)
    write_shared(target)
    write_readme(target, plans, name=name, limits=limits, cleans=bool(rules))
    return [target]


def write(request: Request) -> list[Path]:
    """Write the chosen ensemble, or the jobs that were named, as the bundle `<name>/`; all of it or nothing.

    Raises:
        ConfigError: It is there already, or as `export_bundle`.
    """
    source = read_source(request.workspace, algo=request.algo, fold=request.fold)
    name = request.name or source.slug
    target = request.folder / name
    if Path(name).name != name or name.startswith(".") or name != name.strip():
        raise ConfigError(f"--name: found {name!r}, expected the name of a folder.")
    if target.exists():
        raise ConfigError(f"--output: {target} is there already. Remove it, or give another folder or --name.")
    spec = source.spec
    trained = {*source.label_map.names}
    sided = [rule.name for rule in source.rules if rule.name not in trained]
    with write_folder(target) as folder:
        export_bundle(
            [*source.jobs.values()],
            folder,
            plans=[*source.predicting.values()],
            name=name,
            combine=spec.combine if spec is not None else "mean",
            rules=[rule.model_dump(mode="json") for rule in source.rules if rule.name in trained],
            scores={"mean_dice": spec.dice} if spec is not None and spec.dice is not None else None,
            also_left_out=[*_without_rules(sided), *without_run(source)],
        )
        if spec is not None:
            write_text(folder / "docs" / CARD, _card(source))
    return [target]


def _without_rules(names: Sequence[str]) -> list[str]:
    """What is said of rules for one side of classes that were trained as one."""
    return [f"Rules that clean {', '.join(names)} are not in this bundle, which tells no sides apart."] if names else []


def _card(source: Source) -> str:
    """The model card of the chosen ensemble; of a packed model its own."""
    packed = source.run.root / "README.md"
    if is_packed(source.run.root):
        return packed.read_text(encoding="utf-8")
    sizes = {name: weights_bytes(read_weights(job)) for name, job in source.jobs.items()}
    return card_text(facts_of(source, licence_of(source), sizes))


def _check_lowres(plans: Sequence[Plan], low: Plan) -> None:
    plan = plans[0]
    shared = ("network", "classes", "channels", "roi_size", "sigmoid", "crop_foreground", "frame", "algo")
    differing = [key for key in shared if getattr(plan, key) != getattr(low, key)]
    if len(plans) > 1 or differing:
        why = f"its {differing[0]} is another" if differing else "an ensemble has no place for one"
        raise ConfigError(f"the model for --highres false: {why}. Give a job with the same plan but for its spacing.")


def _save(weights: Weights, path: Path) -> None:
    write_atomic(path, lambda file: torch.save(weights, file))


def _ensemble(
    jobs: Sequence[JobDir], plans: Sequence[Plan], combine: str, rules: Sequence[Mapping[str, Any]]
) -> tuple[bundle_configs.Config, Weights]:
    """The config and the weights of several networks; those of one preprocessing are one member, unless they vote."""
    vote = combine == "vote"
    groups: dict[Any, list[int]] = {}
    for place, plan in enumerate(plans):
        groups.setdefault(place if vote else group_key(plan), []).append(place)
    members, weights = [], Weights()
    for number, places in enumerate(groups.values()):
        members.append(bundle_configs.member(plans[places[0]], [network_def(plans[i]) for i in places]))
        for k, place in enumerate(places):
            for key, tensor in read_weights(jobs[place]).items():
                weights[f"members.{number}.networks.{k}.{key}"] = tensor
    sizes = [float(len(places)) for places in groups.values()]
    if vote and not plans[0].sigmoid:  # in a tie, what the earliest says: its excess is more than all after it have
        sizes = [1 + 2.0 ** -(place + 2) / len(jobs) for place in range(len(jobs))]
    finishing = bundle_configs.cleaning(plans[0], rules)
    config = bundle_configs.ensemble_inference(plans[0], members, sizes, vote=vote, finishing=finishing)
    return config, weights
