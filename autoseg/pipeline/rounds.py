"""Which stages run in which folder: the run's, or that of a round of training."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

from autoseg.config.settings import Settings
from autoseg.data.datalists.cases import Datalist
from autoseg.data.datalists.datalist import write_datalist
from autoseg.data.labels import LabelMap
from autoseg.errors import ConfigError
from autoseg.pipeline.analysis import run_cases
from autoseg.pipeline.context import RunContext
from autoseg.pipeline.freshness import require
from autoseg.pipeline.history import remember_settings
from autoseg.pipeline.pretraining_plans import unused_settings
from autoseg.pseudolabel.rounds import How, count_rounds, first_round, why_one_round
from autoseg.workspace.stages import Stage
from autoseg.workspace.workspace import Workspace

log = logging.getLogger(__name__)

Step = tuple[Workspace, Stage[RunContext]]
"""A folder, and the stage to run in it."""


def steps(run: RunContext) -> Iterator[Step]:
    """Every stage to run, with the folder it works in, each yielded when those before are done.

    How many rounds of training there are is known once the analysis is done: where classes are missing from labels,
    `strategy` may ask for some, each in its own folder.

    Raises:
        AutosegError: A stage that comes before has not been done, or the strategy does not fit the labels.
    """
    workspace, settings = run.workspace, run.settings
    once = [stage for stage in run.request.stages if stage.where == "run" and stage.needs]
    for stage in run.request.stages:
        if stage.where == "run" and stage not in once:
            yield workspace, stage
    between = [stage for stage in run.request.stages if stage.where == "between rounds"]
    each = [stage for stage in run.request.stages if stage.where == "each round"]
    if not between and not each and not once:
        return
    require(run, workspace, "analyze")
    datalist, label_map = run_cases(workspace, settings)
    if run.request.keeps_settings:
        warn_of_unused(settings, run.origins)
    number = count_rounds(datalist, label_map, settings)
    if between and not run.request.is_whole:
        _check_alone(run, between[0], datalist, label_map, number)
    first = datalist if number == 1 else first_round(datalist, label_map, settings)
    workspace.plan_rounds(number)
    run.settle_networks()
    yield from ((workspace, stage) for stage in once)
    if number == 1:
        yield from ((workspace, stage) for stage in each)
    elif between or each:
        yield from _in_rounds(run, first, number, between, each)


def _check_alone(
    run: RunContext, stage: Stage[RunContext], datalist: Datalist, label_map: LabelMap, number: int
) -> None:
    """Say what speaks against a stage between rounds by itself, before anything is stored.

    Raises:
        ConfigError: There is one round.
        WorkspaceError: The first one is not done.
    """
    if number == 1:
        why = why_one_round(datalist, label_map, run.settings)
        raise ConfigError(f"{stage.name}: there is nothing to fill in: {why}.")
    from autoseg.pseudolabel.build import class_dice

    class_dice(Workspace(run.workspace.root / "round_1"))


def _in_rounds(
    run: RunContext, first: Datalist, number: int, between: list[Stage[RunContext]], each: list[Stage[RunContext]]
) -> Iterator[Step]:
    """The stages of a run with several rounds: in all of them, or in the one that was begun last.

    Args:
        first: the cases of the first round.
    """
    place = _begin(run, 1)
    write_datalist(first, place.datalist, run.settings.dataroot)
    if run.request.is_whole or not each:
        yield from _all_rounds(run, place, number, between, each)
        return
    place = run.workspace.latest()
    remember_settings(place, run.settings, run.origins)
    yield from ((place, stage) for stage in each)


def _all_rounds(
    run: RunContext,
    place: Workspace,
    number: int,
    between: list[Stage[RunContext]],
    each: list[Stage[RunContext]],
) -> Iterator[Step]:
    """Stages in every round from the first, whose folder is given; those between rounds alone as far as models are."""
    yield from ((place, stage) for stage in each)
    for n in range(2, number + 1):
        if not each and not place.ensemble_spec.exists():
            return
        place = _begin(run, n)
        yield from ((place, stage) for stage in (*between, *each))


def _begin(run: RunContext, number: int) -> Workspace:
    """Make the folder of a round, with the settings that it is done with."""
    continues = number > 1 and How.of(run.settings).continues
    place = run.workspace.begin_round(number, continues=continues)
    remember_settings(place, run.settings, run.origins)
    return place


def warn_of_unused(settings: Settings, origins: Mapping[str, str]) -> None:
    """Say where settings of rounds or of pretraining were set that have no effect."""
    blocks = {key.partition(".")[0] for key, origin in origins.items() if origin != "default"}
    unused = sorted(blocks & {"strategy", "pseudolabel"})
    if unused and settings.partial_labels == "off":
        log.warning(
            "%s: without effect, since partial_labels is off: every case counts as annotated for all classes. "
            "Set `partial_labels: declared` or `infer`.",
            ", ".join(unused),
        )
    if sentence := unused_settings(settings):
        log.warning("%s", sentence)
