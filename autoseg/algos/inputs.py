"""What planning a run's jobs needs to know: the label map of its networks, and the facts of its data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from autoseg.config.settings import LOCATOR, AlgoName, Settings
from autoseg.config.units import parse_duration
from autoseg.data.datalists.cases import Datalist
from autoseg.data.fingerprint import Fingerprint
from autoseg.data.labels import LabelMap, check_classes, make_label_map, merge_left_right, region_map
from autoseg.workspace.workspace import Workspace


def run_label_map(settings: Settings, datalist: Datalist, fingerprint: Fingerprint) -> LabelMap:
    """The classes that networks learn: those of the settings, the datalist or the label files, merged where asked for.

    Raises:
        ConfigError: Classes do not fit what the label files hold, or settings name others.
    """
    found = [v for values in fingerprint.class_values for v in values]
    label_map = make_label_map(
        settings, datalist.labels, found, regions=datalist.regions, ignore_label=datalist.ignore_label
    )
    check_classes(settings.inference, label_map.names)
    return merge_left_right(label_map) if settings.merge_left_right else label_map


def planning(
    workspace: Workspace,
    datalist: Datalist,
    settings: Settings,
    origins: Mapping[str, str],
    jobs: Sequence[tuple[AlgoName, int]],
    budget_s: Callable[[str], float | None] = lambda name: None,
) -> Iterator[tuple[AlgoName, int, dict[str, Any]]]:
    """For each job, all that the planner wants to know: algorithm, fold, arguments of `make_plan`.

    Args:
        budget_s: a job's seconds by its name, where its algorithm has no budget of its own.
    """
    from autoseg.hardware.device import pick_device
    from autoseg.hardware.facts import find_hardware

    fingerprint = Fingerprint.read(workspace.datastats)
    hardware = find_hardware(pick_device(settings.device))
    if settings.launcher == "local" and not hardware.on_gpu:
        hardware = replace(hardware, num_cores=max(1, hardware.num_cores // settings.jobs_per_device))
    label_map = run_label_map(settings, datalist, fingerprint)
    common = {
        "fingerprint": fingerprint,
        "label_map": label_map,
        "settings": settings,
        "origins": dict(origins),
        "hardware": hardware,
    }
    for algo, fold in jobs:
        own: str | None = getattr(settings, algo).budget
        key = f"{algo}.budget" if own else "budget"
        given_s = parse_duration(own) if own else budget_s(f"{algo}_{fold}")
        seconds: dict[str, Any] = {"budget_s": given_s, "budget_origin": origins.get(key, "") if given_s else ""}
        if algo == LOCATOR:
            seconds["label_map"] = region_map(label_map, settings.inference.anywhere)
        yield algo, fold, {**common, **seconds, "num_train": len(datalist.train_cases(fold))}
