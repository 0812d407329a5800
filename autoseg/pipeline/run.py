"""The stages in order: the first file to read.

    analyze   -> datastats.yaml, faults.json, datalist.json as used
    generate  -> <algo>_<fold>/configs/hyper_parameters.yaml
    train     -> <algo>_<fold>/models/model.pt, validation.json
    ensemble  -> ensemble/scores.json, ensemble.json, predictions/

and after each of them report.html, but for an analysis alone. Where classes are missing from some labels, `strategy`
may ask for rounds of training: each in its folder round_1/, round_2/, ..., and between two of them

    pseudolabel -> round_2/pseudolabels/: completed labels; round_2/datalist.json

Stages meet in files alone. Each is redone only where an input changed, and says which.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from autoseg.config.docs import setting_docs
from autoseg.config.load import load_settings, read_settings_file
from autoseg.config.reader import read_value
from autoseg.config.settings import LOCATOR, AlgoName, Settings
from autoseg.data.datalists.cases import Datalist
from autoseg.data.datalists.datalist import read_cases, read_datalist
from autoseg.errors import AutosegError, ConfigError, WorkspaceError
from autoseg.pipeline.budget import Rounds, RunBudget, work_began
from autoseg.pipeline.job_plans import JobPlans
from autoseg.pipeline.jobs import work_on_job
from autoseg.pipeline.memory import (
    SELECTS_WORK,
    _memory,
    _of_job,
    _relative,
    _remember_command,
    _remember_input,
    _remembered,
)
from autoseg.pipeline.rounds import ROUND_KEYS, _rounds, _select_jobs, _steps
from autoseg.pipeline.stages import _analyze, _ensemble, _pseudolabel
from autoseg.workspace.files import log_to, read_json, write_json
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
    """Read input.yaml and run stages.

    Settings of an earlier command line are kept, unless the file or this command line has them, so that the plain
    `autoseg run` goes on with what `autoseg run --budget 2h` began.

    Args:
        overrides: settings on the command line: key -> text.
        more_settings: a YAML file of settings over those of input.yaml, such as a sweep's best.yaml.
        options: as `run_stages` takes them.

    Returns, Raises: as `run_stages`.
    """
    if more_settings is not None:
        overrides = {**read_settings_file(more_settings), **overrides}
    settings, origins = load_settings(input_path, overrides)
    memory = _memory(Workspace(settings.work_dir))
    earlier: dict[str, str] = read_json(memory) if memory.exists() else {}
    known = {
        key: text for key, text in earlier.items() if key not in overrides and origins.get(key, "default") == "default"
    }
    kept = known
    if "generate" not in stages:  # a plan stays as it was made, and rounds as they were begun
        kept = {key: text for key, text in known.items() if key.partition(".")[0] in ROUND_KEYS}
    if kept:
        log.info("as on an earlier command line: %s", " ".join(f"--{key} {text}" for key, text in kept.items()))
        settings, origins = load_settings(input_path, {**kept, **overrides})
    remembered = {key: text for key, text in {**known, **overrides}.items() if key not in SELECTS_WORK}
    return run_stages(stages, settings, origins, input_path, remember=remembered, words=overrides, **options)


def run_stages(
    stages: Sequence[str],
    settings: Settings,
    origins: Mapping[str, str],
    input_path: Path,
    *,
    algo: AlgoName | None = None,
    fold: int | None = None,
    only: Collection[str] | None = None,
    as_json: bool = False,
    again: bool = False,
    remember: Mapping[str, str] | None = None,
    words: Mapping[str, str] | None = None,
) -> int:
    """Run stages of the pipeline, each as far as it is not up to date.

    Args:
        stages: `STAGES`: everything, in all rounds; some of them: in the round that was begun last; `pseudolabel`:
            what the finished rounds' models say, for the next.
        settings, origins: of input.yaml and the command line.
        input_path: input.yaml, copied into the work_dir.
        algo, fold: restrict generate and train to these jobs.
        only: restrict them to jobs of these names.
        as_json: print the analysis' summary as JSON.
        again: train jobs from the start that are done or begun.
        remember: settings of the command line to keep for later runs, where plans are made; not where they turn out
            to be wrong.
        words: settings of this command line, for the report.

    Returns:
        0, or 1 where a job failed or a case could not be predicted to be completed.

    Raises:
        AutosegError: What the user can mend; nothing was half-written.
    """
    workspace = Workspace(settings.work_dir)
    # Read first: a faulty datalist must not leave a work_dir behind.
    listed = read_datalist(
        settings.datalist,
        settings.dataroot,
        num_fold=settings.num_fold,
        seed=settings.seed,
        extra_modalities=tuple(settings.extra_modalities),
    )
    _check_same_data(workspace, listed, settings)
    _select_jobs(settings, listed, algo, fold)
    with workspace.lock(), log_to(workspace.log):
        put_back = _remembered(workspace)
        _remember_input(workspace, settings, origins, input_path)
        _remember_command(workspace, stages, input_path, {**(words or {}), **_of_job(algo, fold)})
        if remember is not None and {"generate", "pseudolabel"} & set(stages):
            write_json(_memory(workspace), dict(remember))
        failed = False
        budgets: dict[Path, RunBudget] = {}
        begun = work_began()
        # An analysis alone is over sooner than its figures would be drawn, and is often repeated while data is mended.
        draws = tuple(stages) != ("analyze",)

        # A locator is trained beside the run, whose time is spent; a budget on its own command line is its own.
        beside = algo == LOCATOR and "budget" not in (words or {})
        for_jobs = settings.model_copy(update={"budget": None}) if beside else settings

        def budget_of(place: Workspace) -> RunBudget | None:
            """The run's as a round sees it; the first one counts from where the command began."""
            # Given to `train` alone, a budget is each job's.
            if for_jobs.budget is None or ("generate" not in stages and "budget" in (words or {})):
                return None
            if place.root not in budgets:
                since = max((b.counts_from for b in budgets.values()), default=begun)
                rounds = Rounds() if place.root == workspace.root else _rounds(workspace, settings, algo, fold)
                budgets[place.root] = RunBudget(place, settings, _num_places(settings), rounds=rounds, since=since)
            return budgets[place.root]

        def run_stage(place: Workspace, stage: str) -> None:
            nonlocal failed
            if stage == "analyze":
                _analyze(workspace, listed, settings, as_json=as_json)
                return
            budget = budget_of(place)
            if stage == "pseudolabel":
                failed = not _pseudolabel(place, settings) or failed
                return
            datalist = read_cases(place, settings.dataroot)
            chosen = _select_jobs(settings, datalist, algo, fold, num_fold=listed.num_fold)
            jobs = [(a, f) for a, f in chosen if only is None or f"{a}_{f}" in only]
            plans = JobPlans(
                workspace=place, datalist=datalist, settings=for_jobs, origins=origins, jobs=jobs, budget=budget
            )
            if stage == "generate":
                plans.generate()
            elif stage == "train":
                if "generate" not in stages:
                    plans.edit()
                failed = not plans.train(begun=begun, again=again) or failed
            elif stage == "ensemble":
                _ensemble(place, datalist, settings)

        steps = _steps(workspace, listed, settings, origins, stages)
        accepted = False  # by a stage after the analysis, which says nothing of most settings
        try:
            for place, stage in steps:
                name = stage if place.root == workspace.root else f"round {place.round}: {stage}"
                if place.root != workspace.root:
                    log.info("round %d of %d: %s", place.round, workspace.num_rounds, stage)
                try:
                    with measured(workspace, name, forks=stage == "analyze"):
                        run_stage(place, stage)
                finally:
                    if place.root in budgets:
                        budgets[place.root].save()
                accepted = accepted or stage != "analyze"
                if draws:
                    _report(workspace)
        except AutosegError as error:
            if isinstance(error, ConfigError | WorkspaceError) and not accepted:
                put_back()
            if draws:
                _report(workspace)  # with the faults that ended it
            raise
        if budgets:
            log.info("budget: %s", list(budgets.values())[-1].summary())  # its last round's knows of all
        log.info("report: %s", os.path.relpath(workspace.report) if draws else "`autoseg report` draws one")
    return 1 if failed else 0


def _report(workspace: Workspace) -> None:
    """Bring the report up to date. It only shows what others did, so no fault of it stops them."""
    from autoseg.report.page import is_current, make_report

    try:
        if is_current(workspace):
            return
        write_json(workspace.environment, environment())
        make_report(workspace.root)
    except AutosegError as error:
        log.warning("report: not made: %s", error)
    except Exception:  # a bug of the report must not cost a run; it is said, with its traceback
        log.exception("report: not made; the run goes on")


def _check_same_data(workspace: Workspace, datalist: Datalist, settings: Settings) -> None:
    """Refuse a work_dir that holds the run of another data set."""
    path = workspace.root / "state" / "data.json"
    if not path.exists():
        return
    known = set(read_json(path)["images"])
    now = {_relative(c.images[0], settings.dataroot) for c in datalist.training}
    if known and not known & now:
        raise WorkspaceError(
            f"{workspace.root}: this work_dir belongs to another data set ({len(known)} training cases, none "
            f"of them in {settings.datalist.name}). Set another work_dir, or delete this one."
        )


def _num_places(settings: Settings) -> int:
    """Jobs at once; on a cluster, which others use too, one, so that a budget is kept in any case."""
    from autoseg.launch.local import find_places

    return len(find_places(settings)) if settings.launcher == "local" else 1


# -- one job alone, on any machine

WORKER_KEYS = frozenset(("work_dir", "device", "num_workers"))


def is_planned(overrides: Mapping[str, str]) -> bool:
    """Whether a command line names a planned job by its work_dir alone, and no setting that would change its plan."""
    work_dir = overrides.get("work_dir")
    return work_dir is not None and set(overrides) <= WORKER_KEYS and Workspace(Path(work_dir)).settings.exists()


def work_alone(overrides: Mapping[str, str], algo: AlgoName, fold: int, *, wait: bool) -> int:
    """Train one planned job; the work_dir's settings say all else. Returns, raises: as `work_on_job`."""
    docs = setting_docs()
    device, workers = (
        read_value(key, overrides[key], docs[key].annotation) if key in overrides else None
        for key in ("device", "num_workers")
    )
    root = Path(overrides["work_dir"])
    return work_on_job(root, algo, fold, device=device, num_workers=workers, wait=wait)


# -- failed jobs

_FAILED = ("failed", "diverged")
"""States of the jobs that are trained again."""


def retry(input_path: Path, overrides: Mapping[str, str], name: str | None) -> int:
    """Train failed and diverged jobs again, all or the one named; each goes on from its checkpoint where it has one.

    Only those of the round that was begun last: what later rounds learned hangs on the jobs of an earlier one.

    Returns:
        0 where all are done, else 1.

    Raises:
        ConfigError: The one named is no job, did not fail, or is of an earlier round alone.
    """
    settings, _ = load_settings(input_path, overrides)
    workspace = Workspace(settings.work_dir)
    states = {job.name: job.state for job in workspace.latest().jobs()}
    failed = [key for key, state in states.items() if state in _FAILED]
    earlier = [
        f"{place.root.name}/{job.name}"
        for place in workspace.rounds()[:-1]
        for job in place.jobs()
        if job.state in _FAILED
    ]
    how = "`autoseg run` trains jobs of earlier rounds again, and then what later rounds learned from them"
    if name is not None and name not in failed:
        why = f"is {states[name]}, not failed" if name in states else "no such job"
        told = f" {how}: {', '.join(earlier)}." if earlier else ""
        raise ConfigError(f"{name}: {why}. Failed: {', '.join(failed) or 'none'}.{told}")
    if earlier:
        log.warning("retry: %s: %s", how, ", ".join(earlier))
    if not failed:
        log.info("retry: no job%s has failed", " of the last round" if earlier else "")
        return 1 if earlier else 0
    code = run_input(("train",), input_path, overrides, only=failed if name is None else [name])
    return 1 if earlier else code
