"""What a job is planned from: the classes its network learns, the facts of its data set, settings, device and time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from autoseg.config.networks import LOCATOR, AlgoName
from autoseg.config.settings import Settings
from autoseg.config.types import suggest
from autoseg.config.units import parse_duration
from autoseg.data.datalists.cases import Datalist
from autoseg.data.datalists.channels import channel_words
from autoseg.data.fingerprint import Fingerprint
from autoseg.data.labels import LabelMap, check_classes, make_label_map, merge_left_right, region_map
from autoseg.data.terms import check_codes
from autoseg.errors import ConfigError
from autoseg.evaluation.tolerances import faults_of
from autoseg.workspace.workspace import Workspace

if TYPE_CHECKING:  # both load torch, which the commands that only look up what is planned do not need
    from autoseg.hardware.facts import Hardware
    from autoseg.plan import Plan
    from autoseg.weights.start import StartWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanInputs:
    """All that the planner needs to know of one job."""

    algo: AlgoName
    fold: int
    num_train: int
    """Cases that the fold trains on."""
    fingerprint: Fingerprint
    channel_names: tuple[str, ...] = ()
    """Words that the names of each case's files end in; empty where they have none."""
    label_map: LabelMap
    settings: Settings
    origins: Mapping[str, str] = field(default_factory=dict)
    """Setting -> where the user set it."""
    hardware: Hardware
    budget_s: float | None = None
    """Seconds for the job; None: it has no budget."""
    budget_origin: str = ""
    """Where the budget was set."""
    earlier: Plan | None = None
    """Of the round whose weights the job starts from: its network is taken over."""
    start: StartWeights | None = None
    """Weights from elsewhere that the job starts from; None: random ones, or those of a round before."""


def run_label_map(settings: Settings, datalist: Datalist, fingerprint: Fingerprint) -> LabelMap:
    """The classes that networks learn: those of the settings, the datalist or the label files, merged where asked for.

    Raises:
        ConfigError: Classes do not fit what the label files hold, or settings name others.
    """
    in_files = [value for values in fingerprint.class_values for value in values]
    label_map = make_label_map(
        settings, datalist.labels, in_files, regions=datalist.regions, ignore_label=datalist.ignore_label
    )
    check_classes(settings.inference, label_map.names)
    check_codes(settings.codes, label_map.names)
    if lost := [name for name in settings.colours if name not in label_map.names]:
        raise ConfigError([f"colours: {name} is no class. {suggest(name, label_map.names)}" for name in lost])
    if faults := faults_of(settings.surface_tolerance_mm, label_map.names, "surface_tolerance_mm"):
        raise ConfigError(faults)
    return merge_left_right(label_map) if settings.merge_left_right else label_map


def job_hardware(settings: Settings) -> Hardware:
    """The device that jobs are planned for."""
    from autoseg.hardware.device import pick_device
    from autoseg.hardware.facts import find_hardware

    return find_hardware(pick_device(settings.device))


def planning(
    workspace: Workspace,
    datalist: Datalist,
    settings: Settings,
    origins: Mapping[str, str],
    jobs: Sequence[tuple[AlgoName, int]],
    budget_s: Callable[[str], float | None] = lambda name: None,
    *,
    keeps_starts: bool = True,
) -> Iterator[PlanInputs]:
    """What each job is planned from. The weights that it starts from are copied into the run's folder here.

    Args:
        budget_s: a job's seconds by its name, where its algorithm has no budget of its own.
        keeps_starts: copy first weights; else jobs are planned without any, and what was copied stays.
    """
    from autoseg.networks import network_file
    from autoseg.weights.pretrained import keep_pretrained
    from autoseg.weights.start import keep_start

    fingerprint = Fingerprint.read(workspace.datastats)
    hardware = job_hardware(settings)
    if settings.launcher == "local" and not hardware.on_gpu:
        hardware = replace(hardware, num_cores=max(1, hardware.num_cores // settings.jobs_per_device))
    label_map = run_label_map(settings, datalist, fingerprint)
    names = channel_words([case.images for case in datalist.training])
    algos = {algo: 0 for algo, _ in jobs} if keeps_starts else {}
    pretrained = {algo for algo in algos if settings.is_pretrained(algo) and network_file(algo).LATENT}
    others = [algo for algo in algos if algo not in pretrained]
    starts = {algo: keep_start(workspace, algo, settings.first_weights(algo)) for algo in others}
    for algo, fold in jobs:
        own = settings.network(algo).budget
        job_s = parse_duration(own) if own else budget_s(f"{algo}_{fold}")
        yield PlanInputs(
            algo=algo,
            fold=fold,
            num_train=len(datalist.train_cases(fold)),
            fingerprint=fingerprint,
            channel_names=names,
            label_map=region_map(label_map, settings.inference.anywhere) if algo == LOCATOR else label_map,
            settings=settings,
            origins=dict(origins),
            hardware=hardware,
            budget_s=job_s,
            start=keep_pretrained(workspace, algo, fold) if algo in pretrained else starts.get(algo),
            budget_origin=origins.get(f"{algo}.budget" if own else "budget", "") if job_s else "",
        )
