"""The networks of a run: those of `algos`, or what `auto` comes to once the data are analyzed."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from autoseg.algos.inputs import job_hardware
from autoseg.config.networks import ALGOS, AUTO, AUTO_ALGOS, AlgoName
from autoseg.config.settings import Settings
from autoseg.config.units import parse_duration
from autoseg.data.datalists.datalist import read_datalist
from autoseg.data.fingerprint import Fingerprint
from autoseg.pipeline.budget import LEAST_KEPT
from autoseg.version import __version__
from autoseg.workspace.files import digest
from autoseg.workspace.networks import ChosenNetworks, read_chosen, write_chosen
from autoseg.workspace.stamps import changed
from autoseg.workspace.workspace import Workspace

if TYPE_CHECKING:
    from autoseg.algos.choice import Choice

log = logging.getLogger(__name__)


def with_networks(workspace: Workspace, settings: Settings, *, anew: bool) -> Settings:
    """The settings with `algos` settled.

    What `auto` comes to is stored, so that a run that goes on trains the same networks in all its rounds. It is chosen
    anew where something changed that it was chosen by, and said where it is another then.

    Args:
        workspace: of the run or a round; the data are analyzed.
        settings: those asked for.
        anew: whether jobs are planned, so that the choice may change; else it stays as it was made.
    """
    if settings.algos != AUTO:
        return settings
    chosen = read_chosen(workspace)
    if chosen is None or anew:
        chosen = _up_to_date(Workspace(workspace.run), settings, chosen)
    return settings.model_copy(update={"algos": chosen.networks})


def warn_of_untrained(settings: Settings, origins: Mapping[str, str], trained: Collection[AlgoName]) -> None:
    """Say what was set of networks that the run does not train."""
    given = {key.partition(".")[0] for key, origin in origins.items() if origin != "default"}
    weights = settings.init_weights if isinstance(settings.init_weights, dict) else {}
    others = [algo for algo in ALGOS if algo not in trained]
    unused = [*(f"init_weights: {algo}" for algo in others if algo in weights), *(a for a in others if a in given)]
    if unused:
        log.warning(
            "%s: without effect, since this run trains %s. Name the network in algos, or take the lines out.",
            ", ".join(unused),
            ", ".join(trained),
        )


def with_any_network(settings: Settings) -> Settings:
    """The settings with all networks that `auto` may pick: to check what depends on them before the data are read."""
    return settings.model_copy(update={"algos": AUTO_ALGOS}) if settings.algos == AUTO else settings


def _up_to_date(run: Workspace, settings: Settings, chosen: ChosenNetworks | None) -> ChosenNetworks:
    """The stored choice, or one that is made and stored now."""
    from autoseg.algos.choice import RunTime, choose_networks  # it loads torch, which an analysis alone does not need

    fingerprint, hardware = Fingerprint.read(run.datastats), job_hardware(settings)
    num_fold = read_datalist(run.datalist, settings.dataroot).num_fold
    run_time = RunTime(
        budget_s=None if settings.budget is None else parse_duration(settings.budget),
        num_folds=num_fold if settings.folds is None else len(settings.folds),
        num_kept=LEAST_KEPT,
        num_rounds=run.num_rounds,
    )
    resolutions = [settings.hyper(algo).get("resample_resolution") for algo in AUTO_ALGOS]
    inputs = {
        "voxel sizes": digest([fingerprint.spacing_mm_median, fingerprint.spacing_mm_p10, resolutions]),
        "image sizes": digest([fingerprint.shape_median, fingerprint.size_mm_median]),
        "device": digest(hardware.on_gpu or hardware.num_cores),
        "budget": digest(run_time.budget_s),
        "folds and rounds": digest([run_time.num_folds, run_time.num_rounds]),
        "version of autoseg": __version__,
    }
    reasons = changed(chosen.inputs, inputs) if chosen else []
    if chosen is not None and not reasons:
        return chosen
    choice = choose_networks(fingerprint, settings, hardware, run_time)
    _say(choice, chosen, reasons)
    chosen = ChosenNetworks(networks=choice.networks, rule=choice.rule, inputs=inputs)
    write_chosen(run, chosen)
    return chosen


def _say(choice: Choice, before: ChosenNetworks | None, reasons: list[str]) -> None:
    """Say what was chosen, where it is not what was chosen before."""
    if before is not None and before.networks == choice.networks:
        return
    names = ", ".join(choice.networks)
    if before is None:
        log.info("algos: auto comes to %s (%s)", names, choice.rule)
        return
    log.warning(
        "algos: auto now comes to %s, before to %s, because %s (%s). What was trained stays. Set algos to have others.",
        names,
        ", ".join(before.networks),
        ", ".join(reasons),
        choice.rule,
    )
