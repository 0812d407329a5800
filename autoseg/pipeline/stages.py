"""The stages of a run: the table, and what each row does.

`run`, `status`, the report, `explain`, the command line and the tests of the documentation read the table: a stage is
added by a function and a row here (CONTRIBUTING.md). What a stage needs is imported when it runs, since the command
line reads this table to print its help.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from autoseg.errors import ConfigError, WorkspaceError, counted
from autoseg.terminal import SHOWN_ELSEWHERE
from autoseg.workspace.stages import DONE, NOT_YET, Outcome, Stage

if TYPE_CHECKING:
    from autoseg.pipeline.context import RunContext
    from autoseg.workspace.jobs import Job
    from autoseg.workspace.workspace import Workspace

log = logging.getLogger(__name__)


# -- analyze


def analysis_inputs(run: RunContext, place: Workspace) -> Mapping[str, str]:
    """Cases as they are listed, and settings that the analysis depends on."""
    from autoseg.pipeline import analysis

    return analysis.analysis_inputs(run.listed, run.settings)


def analyze(run: RunContext, place: Workspace) -> Outcome:
    """Read every image and label once, and settle what each case was annotated for, and the folds.

    Raises:
        DataError: The data have faults; all of them.
    """
    from autoseg import analyzer
    from autoseg.data.datalists.datalist import write_datalist
    from autoseg.data.datastats import summary_path
    from autoseg.pipeline.analysis import remember_data, settled_cases
    from autoseg.workspace.files import write_json

    analysis = analyzer.analyze(run.listed, run.settings, place, progress=not run.request.as_json)
    kept = settled_cases(run.listed, analysis.annotated, run.settings, left_out=analysis.quarantined)
    write_datalist(kept, place.datalist, run.settings.dataroot)
    remember_data(place, kept, run.settings)
    write_json(summary_path(place), analysis.summary())
    for fault in (*analysis.faults, *analysis.warnings):
        log.warning("analyze: %s", fault, extra=SHOWN_ELSEWHERE)  # the terminal has the command's result
    return Outcome(text=analysis.text())


def analysis_summary(place: Workspace) -> Any:
    """What `autoseg analyze --json` prints."""
    from autoseg.data.datastats import AnalysisSummary, summary_path
    from autoseg.workspace.stored import read_stored

    return read_stored(summary_path(place), AnalysisSummary).model_dump(mode="json")


# -- pretrain


def pretrain_left_out(run: RunContext, place: Workspace) -> str:
    """The settings may want none, as they do by default."""
    from autoseg.pipeline.pretraining_plans import left_out

    return left_out(run.job_settings)


def pretrain(run: RunContext, place: Workspace) -> Outcome:
    """Teach the networks' encoders by images alone; see pipeline/pretraining.py."""
    from autoseg.pipeline.pretraining import pretrain_run

    return Outcome(complete=pretrain_run(run))


def pretrained(place: Workspace) -> str:
    """How many of the planned pretrainings are done."""
    from autoseg.workspace.pretraining import how_far

    return how_far(place)


def pretrain_is_shown(place: Workspace) -> bool:
    """Whether the run's settings ask for pretraining, or it was done."""
    from autoseg.config.settings import PretrainSettings
    from autoseg.workspace.settings import read_any_settings
    from autoseg.workspace.stored import check_stored

    asked = read_any_settings(place).get("pretrain")
    if place.pretraining.is_dir() or asked is None:
        return place.pretraining.is_dir()
    return check_stored(asked.value, PretrainSettings, f"{place.settings}: pretrain").method != "none"


# -- generate and train


def generate(run: RunContext, place: Workspace) -> Outcome:
    """Write the plans that are missing or were made from other inputs; see job_plans.py."""
    from autoseg.pipeline.pretraining import warn_of_other_lessons

    warn_of_other_lessons(run)
    run.jobs_in(place).generate()
    return Outcome()


def train(run: RunContext, place: Workspace) -> Outcome:
    """Train every job that is not done, by its plan; see job_plans.py and training_jobs.py."""
    from autoseg.inference.seals import accept_jobs

    jobs = run.jobs_in(place)
    if run.request.accept:
        accept_jobs([place.job_dir(algo, fold) for algo, fold in trained_models(place)])
    if not run.request.plans_jobs:
        jobs.edit()
    complete, text = jobs.train(begun=run.begun, again=run.request.again), ""
    if run.settings.compare_scratch:
        from autoseg.pipeline.scratch import train_scratch

        all_done, text = train_scratch(place, jobs.datalist, jobs.settings, jobs.jobs, again=run.request.again)
        complete = complete and all_done
    return Outcome(text=text, complete=complete)


def planned_jobs(place: Workspace) -> list[Job]:
    """Every job that has a plan; one whose worker is dead counts as pending."""
    return [job for job, _ in place.current_jobs() if place.job_dir(job.algo, job.fold).plan.exists()]


def jobs_trained(place: Workspace) -> str:
    """How many of the planned jobs are done, or need not be done any more."""
    jobs = planned_jobs(place)
    num_ended = sum(job.state in ("done", "pruned") for job in jobs)
    if num_ended == len(jobs):
        return DONE if jobs else NOT_YET
    return f"{num_ended} of {counted(len(jobs), 'job')}"


# -- ensemble


def trained_models(place: Workspace) -> list[tuple[str, int]]:
    """Algorithm and fold of every trained job but the locator, which segments no class."""
    from autoseg.config.networks import LOCATOR

    return [(job.algo, job.fold) for job in place.jobs() if job.state == "done" and job.algo != LOCATOR]


def ensemble_left_out(run: RunContext, place: Workspace) -> str:
    """The settings may want none; between rounds one is needed to complete the labels."""
    return "ensemble: false" if run.settings.ensemble is False and place.is_last_round else ""


def need_models(run: RunContext, place: Workspace) -> None:
    """Raise a WorkspaceError where there is nothing to combine."""
    if not trained_models(place):
        raise WorkspaceError(f"{place.root}: no job is trained yet. Run `autoseg train` or `autoseg run` first.")


def ensemble(run: RunContext, place: Workspace) -> Outcome:
    """Score the models out of fold, choose the combination, predict the held-back cases in the last round."""
    from autoseg.data.datalists.datalist import read_cases
    from autoseg.ensemble.build import build_ensemble
    from autoseg.hardware.cores import ThreadsBesideOthers, following
    from autoseg.inference.seals import accept_jobs, check_jobs
    from autoseg.pipeline.fold_tasks import score_folds
    from autoseg.terminal import paint_table

    datalist = read_cases(place, run.settings.dataroot)
    if not place.is_last_round:  # the last round predicts them
        datalist = replace(datalist, testing=(), validation=())
    models = trained_models(place)
    trained = [place.job_dir(algo, fold) for algo, fold in models]
    if run.request.accept:
        accept_jobs(trained)
    check_jobs(trained)
    score_folds(place, datalist, run.job_settings, models)
    budget = run.budget_in(place)
    spare_s = None if budget is None else budget.spare_s
    with case_progress("ensemble") as progress, following(ThreadsBesideOthers(fixed=budget is None)):
        result = build_ensemble(place, datalist, run.job_settings, models, progress=progress, spare_s=spare_s)
    return Outcome(text="\n\n".join(paint_table(table, sys.stdout) for table in result.tables))


# -- pseudolabel


def pseudolabel_inputs(run: RunContext, place: Workspace) -> Mapping[str, str]:
    """The models of the round before, the run's cases, and settings that pseudo-labels depend on."""
    from autoseg.pipeline.analysis import run_cases
    from autoseg.pseudolabel.build import stage_inputs

    datalist, label_map = run_cases(run.workspace, run.settings)
    return stage_inputs(round_before(place), datalist, run.settings, label_map)


def pseudolabel_gaps(place: Workspace) -> list[str]:
    """Files that are gone, and cases that could not be predicted and are tried again."""
    from autoseg.pseudolabel.build import missing_files, not_predicted

    reasons = ["files are missing"] if missing_files(place) else []
    return reasons + [f"{name} could not be predicted" for name in not_predicted(place)]


def pseudolabel(run: RunContext, place: Workspace) -> Outcome:
    """Complete the labels that a round learns from, with the models of the round before.

    A case that cannot be predicted goes without, and the next run tries it again.
    """
    from autoseg.hardware.cores import ThreadsBesideOthers, following
    from autoseg.pipeline.analysis import run_cases
    from autoseg.pseudolabel.build import make_pseudolabels

    datalist, label_map = run_cases(run.workspace, run.settings)
    threads = ThreadsBesideOthers(fixed=run.budget_in(place) is None)
    with case_progress("pseudolabel") as progress, following(threads):
        result = make_pseudolabels(round_before(place), place, datalist, run.settings, label_map, progress=progress)
    return Outcome(text=result.text, complete=not result.failures)


def round_before(place: Workspace) -> Workspace:
    """The folder of the round before one."""
    return next(r for r in place.rounds() if r.round == place.round - 1)


@contextmanager
def case_progress(stage: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar for a stage that goes through cases, once or several times."""
    from autoseg.terminal import Progress

    bar: Progress | None = None

    def progress(num_done: int, total: int, case: str) -> None:
        nonlocal bar
        log.debug("%s: %s", stage, case)
        if bar is None or num_done <= bar.done:
            if bar is not None:
                bar.close()
            bar = Progress(stage, total)
        bar.to(num_done)

    try:
        yield progress
    finally:
        if bar is not None:
            bar.close()


# -- the table

STAGES: tuple[Stage[RunContext], ...] = (
    Stage(
        name="analyze",
        doc="Take the statistics of the data set and list all its faults.",
        help="Exit code 2 where there are faults.",
        example="autoseg analyze --input input.yaml\nautoseg analyze --data my_images --json",
        reads="`input.yaml`, the datalist, all images",
        writes="`datastats.yaml`, `datastats_by_case.yaml`, `faults.json`, `datalist.json` with folds",
        where="run",
        inputs=analysis_inputs,
        run=analyze,
        as_json=analysis_summary,
        how_far=lambda place: DONE if place.datastats.exists() else NOT_YET,
        out_of_date="the analysis is out of date",
        digests_what_it_reads=True,
        forks=True,
    ),
    Stage(
        name="pretrain",
        doc="Teach the networks' encoders by images alone, without labels, where pretrain.method says how.",
        help=(
            "A --budget of this command is all for pretraining. With --work_dir, --algo and --fold but no --input it "
            "does that\none planned pretraining, on any machine that sees the folder."
        ),
        example="autoseg pretrain --pretrain.method contrastive --algos unetr",
        reads="images of cases that the models it is for are not scored on",
        writes="`pretraining/<algo>_<fold>/`: the encoder's weights, `lesson.json`, `metrics.jsonl`",
        where="run",
        needs=("analyze",),
        left_out=pretrain_left_out,
        run=pretrain,
        how_far=pretrained,
        is_shown=pretrain_is_shown,
        keeps_settings=True,
    ),
    Stage(
        name="generate",
        doc="Plan every training job and write its bundle, ready to be read and edited.",
        example="autoseg generate --input input.yaml --algos segresnet",
        reads="the statistics, the hardware",
        writes="`<algo>_<fold>/configs/`: every hyperparameter, complete and editable, with its origin",
        where="each round",
        needs=("analyze", "pseudolabel"),
        run=generate,
        how_far=lambda place: DONE if planned_jobs(place) else NOT_YET,
        plans_jobs=True,
        keeps_settings=True,
    ),
    Stage(
        name="train",
        doc="Train the jobs that are not done or whose plan or cases changed, or those named by --algo and --fold.",
        help=(
            "With --work_dir, --algo and --fold but no --input it trains that one planned job, on any machine that "
            "sees the\nfolder: this is what launchers and torchrun start. No two of them ever work on one job."
        ),
        example=(
            "autoseg train --algo segresnet --fold 2\n"
            "autoseg train --work_dir work_dir --algo segresnet --fold 0 --wait"
        ),
        reads="a job's `hyper_parameters.yaml`",
        writes="`<algo>_<fold>/models/`, `metrics.jsonl`, `validation.json`",
        where="each round",
        needs=("analyze", "pseudolabel"),
        run=train,
        how_far=jobs_trained,
    ),
    Stage(
        name="ensemble",
        doc="Score the models out of fold, choose how to combine them, predict the testing cases.",
        help="With --work_dir and --fold it is a worker's part of it, on any machine that sees the folder.",
        example=(
            "autoseg ensemble --input input.yaml --ensemble.method best_n\n"
            "autoseg ensemble --work_dir work_dir --fold 0 --wait"
        ),
        reads="all trained models",
        writes="`ensemble/`: out-of-fold scores, the chosen combination, predictions for `testing`",
        where="each round",
        needs=("analyze", "pseudolabel"),
        left_out=ensemble_left_out,
        ready=need_models,
        run=ensemble,
        how_far=lambda place: DONE if place.ensemble_spec.exists() else NOT_YET,
    ),
    Stage(
        name="pseudolabel",
        doc=(
            "Fill in the classes that cases were not annotated for, by the ensemble of the round before, for the next."
        ),
        help="After it, generate, train and ensemble work on that round; run does it all.",
        settings_doc="The settings; strategy and pseudolabel say how.",
        reads="the models of the round before",
        writes="`round_2/pseudolabels/`: completed labels; `round_2/datalist.json`; and so on for each later round",
        where="between rounds",
        needs=("analyze",),
        inputs=pseudolabel_inputs,
        gaps=pseudolabel_gaps,
        run=pseudolabel,
        product="pseudo-labels",
        out_of_date="the pseudo-labels are out of date",
        keeps_settings=True,
    ),
)
"""Every stage, in the order in which help and documentation list them. A run does those of its own folder first, then
in each round those between rounds, where there is one before, and those of each round, in the order of the table."""

PLAIN_RUN = tuple(stage.name for stage in STAGES if stage.in_run and stage.where != "between rounds")
"""Names of the stages of a plain `autoseg run`. Where there are rounds, those between them belong to it, too."""


def stage_named(name: str) -> Stage[RunContext]:
    """A row of the table."""
    return next(stage for stage in STAGES if stage.name == name)


def stages_named(names: Sequence[str]) -> tuple[tuple[Stage[RunContext], ...], bool]:
    """Rows to do what is asked for, in the order of the table, and whether that is a whole run.

    A whole run has those between rounds as well.

    Raises:
        ConfigError: There is no such stage, or one between rounds is to run with some of the others.
    """
    from autoseg.config.types import suggest

    known = [stage.name for stage in STAGES]
    if faults := [f"{name}: no such stage. {suggest(name, known)}" for name in names if name not in known]:
        raise ConfigError(faults)
    is_whole = set(names) >= set(PLAIN_RUN)
    chosen = tuple(
        stage
        for stage in STAGES
        if stage.name in names or (is_whole and stage.in_run and stage.where == "between rounds")
    )
    places = {stage.where for stage in chosen}
    if not is_whole and {"between rounds", "each round"} <= places:
        between = next(stage.name for stage in chosen if stage.where == "between rounds")
        raise ConfigError(f"{between}: runs between rounds. Run it by itself, or {', '.join(PLAIN_RUN)} together.")
    return chosen, is_whole
