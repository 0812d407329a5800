"""Which stages run in which folder: the run's, or that of a round of training."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

from autoseg.config.settings import LOCATOR, AlgoName, Settings
from autoseg.data.datalists.cases import Datalist
from autoseg.data.datalists.datalist import write_datalist
from autoseg.errors import ConfigError
from autoseg.pipeline.budget import Rounds
from autoseg.pipeline.memory import _remember_settings
from autoseg.pipeline.stages import _need_analysis, _need_pseudolabels, _run_cases
from autoseg.pseudolabel.rounds import How, cases_to_fill, count_rounds, first_round, why_one_round
from autoseg.workspace.workspace import STAGES, Workspace

log = logging.getLogger(__name__)


ROUND_KEYS = frozenset(("partial_labels", "strategy", "pseudolabel"))
"""Settings, and a block of them, that decide which rounds of training there are and what they learn from."""


def _steps(
    workspace: Workspace, listed: Datalist, settings: Settings, origins: Mapping[str, str], stages: Sequence[str]
) -> Iterator[tuple[Workspace, str]]:
    """Every stage to run, and the folder it works in: the run's, or that of a round of training.

    How many rounds there are is known once the analysis is done.

    Raises:
        AutosegError: A stage that comes before has not been done, or the strategy does not fit the labels.
    """
    if "analyze" in stages:
        yield workspace, "analyze"
    later = [stage for stage in stages if stage != "analyze"]
    if not later:
        return
    _need_analysis(workspace, listed, settings)
    datalist, label_map = _run_cases(workspace, settings)
    if {"generate", "pseudolabel"} & set(later):
        _warn_of_unused(settings, origins)
    number = count_rounds(datalist, label_map, settings)
    if number == 1:
        if "pseudolabel" in later:
            why = why_one_round(datalist, label_map, settings)
            raise ConfigError(f"pseudolabel: there is nothing to fill in: {why}.")
        workspace.plan_rounds(number)
        for stage in later:
            yield workspace, stage
        return
    how = How.of(settings)
    first = first_round(datalist, label_map, settings)
    if later == ["pseudolabel"]:
        from autoseg.pseudolabel.build import class_dice

        class_dice(Workspace(workspace.root / "round_1"))  # says what is missing, before anything is stored
    workspace.plan_rounds(number)
    place = workspace.begin_round(1, continues=False)
    write_datalist(first, place.datalist, settings.dataroot)
    _remember_settings(place, settings, origins)
    if tuple(stages) == STAGES or later == ["pseudolabel"]:
        for n in range(1, number + 1):
            if n > 1:
                if later == ["pseudolabel"] and not place.ensemble_spec.exists():
                    return
                place = workspace.begin_round(n, continues=how.continues)
                _remember_settings(place, settings, origins)
                yield place, "pseudolabel"
            if later != ["pseudolabel"]:
                for stage in later:
                    yield place, stage
        return
    place = workspace.latest()
    _remember_settings(place, settings, origins)
    if place.round > 1:
        _need_pseudolabels(place, settings)
    for stage in later:
        yield place, stage


def _warn_of_unused(settings: Settings, origins: Mapping[str, str]) -> None:
    """Say where settings of rounds were given that do nothing."""
    named = {key.partition(".")[0] for key, origin in origins.items() if origin != "default"}
    given = sorted(named & {"strategy", "pseudolabel"})
    if given and settings.partial_labels == "off":
        log.warning(
            "%s: without effect, since partial_labels is off: every case counts as annotated for all classes. "
            "Set `partial_labels: declared` or `infer`.",
            ", ".join(given),
        )


def _select_jobs(
    settings: Settings, datalist: Datalist, algo: AlgoName | None, fold: int | None, *, num_fold: int | None = None
) -> list[tuple[AlgoName, int]]:
    """The jobs asked for, algorithm by algorithm within each fold, so that a first fold of all is done early.

    Args:
        num_fold: of the run; a first round of few cases may have fewer.
    """
    folds = settings.folds if settings.folds is not None else tuple(range(datalist.num_fold))
    if num_fold is not None and datalist.num_fold < num_fold:
        folds = tuple(f for f in folds if f < datalist.num_fold) or tuple(range(datalist.num_fold))
    if algo == LOCATOR:
        folds = folds[:1]  # one is enough to find where the organs are
    folds = folds if fold is None else (fold,)
    faults = [
        f"fold {f}: no such fold. The datalist has folds 0 to {datalist.num_fold - 1}."
        for f in folds
        if f >= datalist.num_fold
    ]
    if faults:
        raise ConfigError(faults)
    return [(a, f) for f in folds for a in ((algo,) if algo else settings.algos)]


def _rounds(workspace: Workspace, settings: Settings, algo: AlgoName | None, fold: int | None) -> Rounds:
    """What the run's rounds have to do, for its budget."""
    datalist, label_map = _run_cases(workspace, settings)
    num_to_fill = len(cases_to_fill(datalist, label_map.names, How.of(settings)))
    return Rounds(
        number=workspace.num_rounds,
        jobs=tuple(_select_jobs(settings, datalist, algo, fold)),
        predictions=num_to_fill + len(datalist.training) / datalist.num_fold,
    )
