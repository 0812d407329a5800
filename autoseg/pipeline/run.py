"""A run from start to end: the first file to read.

    analyze   -> datastats.yaml, faults.json, datalist.json as used
    pretrain  -> pretraining/<algo>_<fold>/models/model.pt, where pretrain.method says how
    generate  -> <algo>_<fold>/configs/hyper_parameters.yaml
    train     -> <algo>_<fold>/models/model.pt, validation.json
    ensemble  -> ensemble/scores.json, ensemble.json, predictions/
    report    -> report.html, after each of them but an analysis by itself

Each stage is a row of the table in stages.py, with the function that does it. Where classes are missing from some
labels, `strategy` may ask for rounds of training: each works in its folder round_1/, round_2/, ..., and before every
round but the first

    pseudolabel -> round_2/pseudolabels/: completed labels; round_2/datalist.json

Stages meet in files alone. Each is done again only where an input changed, and says which.

    run_input     input.yaml and the command line -> settings
    run_stages    the run's folder is locked; stage by stage; the report after each
    rounds.steps  which stage works in which folder
    run_stage     one stage, as far as it is not up to date
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autoseg.config.load import read_settings_file
from autoseg.config.settings import Settings
from autoseg.data.datalists.cases import Datalist
from autoseg.data.datalists.datalist import read_datalist
from autoseg.errors import AutosegError, ConfigError, WorkspaceError
from autoseg.pipeline.analysis import check_num_fold, check_same_data
from autoseg.pipeline.budget import work_began
from autoseg.pipeline.context import Request, RunContext
from autoseg.pipeline.freshness import reasons_to_run, require
from autoseg.pipeline.history import keep_settings, load_with_kept, note_settings, remember_command, remember_input
from autoseg.pipeline.job_plans import select_folds
from autoseg.pipeline.rounds import steps
from autoseg.pipeline.stages import STAGES, stages_named
from autoseg.pipeline.tracked import tracked
from autoseg.terminal import SHOWN_ELSEWHERE, show
from autoseg.tracking.table import check_tracker
from autoseg.workspace.files import log_to, write_json
from autoseg.workspace.stages import Outcome, Stage
from autoseg.workspace.stamps import NOT_DONE
from autoseg.workspace.usage import environment, measured
from autoseg.workspace.workspace import Workspace

log = logging.getLogger(__name__)


def run_input(
    stages: Sequence[str],
    input_path: Path,
    overrides: Mapping[str, str],
    *,
    more_settings: Path | None = None,
    **options: Any,
) -> int:
    """Read input.yaml, with what earlier command lines and this one say, and run stages.

    Args:
        stages: names; `PLAIN_RUN`: everything, in all rounds; some of them: in the round that was begun last;
            `pseudolabel`: what the finished rounds' models say, for the next.
        overrides: settings on the command line: key -> text.
        more_settings: a YAML file of settings over those of input.yaml, such as a sweep's best.yaml.
        options: the others of `Request`.

    Returns, Raises: as `run_stages`.
    """
    rows, is_whole = stages_named(stages)
    if more_settings is not None:
        overrides = {**read_settings_file(more_settings), **overrides}
    request = Request(stages=rows, is_whole=is_whole, words=overrides, **options)
    settings, origins, keep = load_with_kept(input_path, request)
    return run_stages(request, settings, origins, input_path, keep=keep)


def run_stages(
    request: Request,
    settings: Settings,
    origins: Mapping[str, str],
    input_path: Path,
    *,
    keep: Mapping[str, str] | None = None,
) -> int:
    """Run stages of the pipeline, each as far as it is not up to date.

    Args:
        settings, origins: of input.yaml and the command line.
        input_path: input.yaml, copied into the work_dir.
        keep: settings of command lines for later commands to go on with, where what a stage makes follows from them;
            not where they turn out to be wrong.

    Returns:
        0, or 1 where a job failed or a case could not be predicted to be completed.

    Raises:
        AutosegError: What the user can repair; nothing was half-written.
    """
    workspace = Workspace(settings.work_dir)
    # Read first: a faulty datalist must not leave a work_dir behind.
    listed = _listed_cases(request, workspace, settings, origins)
    with workspace.lock(), log_to(workspace.log):
        put_back = note_settings(workspace)
        remember_input(workspace, settings, origins, input_path)
        remember_command(workspace, request, input_path)
        if keep is not None and request.keeps_settings:
            keep_settings(workspace, keep, settings)
        run = RunContext(request, workspace, listed, settings, origins, begun=work_began())
        accepted = False  # by a stage of a round; an analysis says nothing of most settings
        try:
            with tracked(run):
                for place, stage in steps(run):
                    _measured_stage(run, place, stage)
                    accepted = accepted or stage.where != "run"
                    draw_report(run)
        except AutosegError as error:
            if isinstance(error, ConfigError | WorkspaceError) and not accepted:
                put_back()
            for message in error.messages:
                log.error("%s", message, extra=SHOWN_ELSEWHERE)  # the command line shows it as it ends
            draw_report(run)  # with the faults that ended it
            raise
        if run.budgets:
            log.info("budget: %s", list(run.budgets.values())[-1].summary())  # its last round's knows of all
        drawn = os.path.relpath(workspace.report) if request.draws_report else "`autoseg report` draws one"
        log.info("report: %s", drawn)
    return 0 if run.complete else 1


def _listed_cases(request: Request, workspace: Workspace, settings: Settings, origins: Mapping[str, str]) -> Datalist:
    """The cases as the datalist names them, checked against the settings and the run that is there."""
    listed = read_datalist(
        settings.datalist,
        settings.dataroot,
        num_fold=settings.num_fold,
        may_be_fewer=origins.get("num_fold", "default") == "default",
        seed=settings.seed,
        extra_modalities=tuple(settings.extra_modalities),
        meta=settings.meta,
        folds_by=settings.folds_by,
    )
    check_num_fold(listed, settings, origins)
    check_same_data(workspace, listed, settings)
    select_folds(settings, listed, request.algo, request.fold)  # a fold that is not there is said now, not in an hour
    check_tracker(settings.tracking)
    return listed


def _measured_stage(run: RunContext, place: Workspace, stage: Stage[RunContext]) -> None:
    """Run one stage, unless it is left out; note its time, memory and disk, also where it ends in an error."""
    is_round = place.root != run.workspace.root
    if is_round:
        log.info("round %d of %d: %s", place.round, run.workspace.num_rounds, stage.name)
    if reason := stage.left_out(run, place):
        log.info("%s: left out (%s)", stage.name, reason)
        return
    name = f"round {place.round}: {stage.name}" if is_round else stage.name
    try:
        with measured(run.workspace, name, forks=stage.forks):
            run_stage(run, place, stage)
    finally:
        if "torch" in sys.modules:  # what a stage predicted with; jobs of the next train in processes of their own
            from autoseg.hardware.memory import give_back

            give_back()
        if place.root in run.budgets:
            run.budgets[place.root].save()


def run_stage(run: RunContext, place: Workspace, stage: Stage[RunContext]) -> None:
    """Run one stage in one folder, as far as it is not up to date, and print its tables."""
    if stage.where != "run":
        run.budget_in(place)  # its time counts from here on
    for needed in stage.needs:
        require(run, place, needed)
    stage.ready(run, place)
    outcome = Outcome()
    if stage.inputs is None:
        outcome = stage.run(run, place)
    else:
        inputs, reasons = reasons_to_run(run, place, stage)
        if reasons:
            is_first = reasons == [NOT_DONE]
            log.info("%s: %s", stage.name, "starting" if is_first else "again, because " + ", ".join(reasons))
            outcome = stage.run(run, place)
            place.stamp(stage.name, stage.inputs(run, place) if inputs is None else inputs)
        else:
            log.info("%s: up to date", stage.name)
    run.complete = run.complete and outcome.complete
    if run.request.as_json and stage.as_json is not None:
        show(json.dumps(stage.as_json(place), indent=1))
    elif outcome.text:
        show(outcome.text)


def draw_report(run: RunContext) -> None:
    """Bring the report up to date. It only shows what others did, so no fault of it stops them."""
    if not run.request.draws_report:
        return
    from autoseg.report.page import is_current, make_report

    workspace = run.workspace
    try:
        if is_current(workspace, STAGES):
            return
        write_json(workspace.environment, environment())
        make_report(workspace.root, STAGES)
    except AutosegError as error:
        log.warning("report: not made: %s", error)
    except Exception:  # a bug of the report must not cost a run; it is said, with its traceback
        log.exception("report: not made; the run goes on")
