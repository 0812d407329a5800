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

import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from autoseg import __version__
from autoseg.budget import Rounds, RunBudget, work_began
from autoseg.config import (
    LOCATOR,
    AlgoName,
    Settings,
    load_settings,
    read_settings_file,
    read_value,
    setting_docs,
)
from autoseg.data.datalist import Case, Datalist, files_digest, read_cases, read_datalist, write_datalist
from autoseg.data.fingerprint import Fingerprint
from autoseg.data.folds import deal_folds
from autoseg.data.labels import LabelMap
from autoseg.errors import AutosegError, ConfigError, WorkspaceError
from autoseg.jobs import work_on_job
from autoseg.planning import JobPlans, run_label_map
from autoseg.pseudolabel.rounds import How, cases_to_fill, count_rounds, first_round, why_one_round
from autoseg.terminal import Progress, paint_table
from autoseg.usage import environment, measured
from autoseg.workspace import (
    STAGES,
    Workspace,
    digest,
    log_to,
    read_json,
    write_json,
    write_text,
    write_yaml,
)

log = logging.getLogger(__name__)

ANALYSIS_KEYS = ("class_names", "sigmoid", "ignore_label", "partial_labels", "extra_modalities", "on_fault", "modality")


ROUND_KEYS = frozenset(("partial_labels", "strategy", "pseudolabel"))
"""Settings, and a block of them, that decide which rounds of training there are and what they learn from."""
SELECTS_WORK = frozenset(
    ("work_dir", "datalist", "dataroot", "algos", "folds", "device", "num_workers", "launcher", "address", "retries")
    + ("jobs_per_device", "gpus_per_job", "cpus_per_job")
)
"""Settings that say what to run now; the others on a command line belong to the run and stay with it."""


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


def _report(workspace: Workspace) -> None:
    """Bring the report up to date. It only shows what others did, so no fault of it stops them."""
    from autoseg.report import is_current, make_report

    try:
        if is_current(workspace):
            return
        write_json(workspace.environment, environment())
        make_report(workspace.root)
    except AutosegError as error:
        log.warning("report: not made: %s", error)
    except Exception:  # a bug of the report must not cost a run; it is said, with its traceback
        log.exception("report: not made; the run goes on")


# -- checks before anything runs


def _of_job(algo: str | None, fold: int | None) -> dict[str, str]:
    return {k: str(v) for k, v in (("algo", algo), ("fold", fold)) if v is not None}


def _relative(path: Path, root: Path) -> str:
    return os.path.relpath(path, root)


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


def _num_places(settings: Settings) -> int:
    """Jobs at once; on a cluster, which others use too, one, so that a budget is kept in any case."""
    from autoseg.launch.local import find_places

    return len(find_places(settings)) if settings.launcher == "local" else 1


def _remember_command(workspace: Workspace, stages: Sequence[str], input_path: Path, words: Mapping[str, str]) -> None:
    """Add a line to the commands of the run, with paths from the folder that holds the work_dir."""
    home = workspace.root.absolute().parent
    command = ["autoseg", "run" if tuple(stages) == STAGES else "+".join(stages)]
    for key, value in {"input": str(input_path.absolute()), **words}.items():
        command += [f"--{key}", os.path.relpath(value, home) if os.path.isabs(value) else value]
    line = {"time": round(time.time(), 1), "command": shlex.join(command), "version": __version__}
    workspace.commands.parent.mkdir(parents=True, exist_ok=True)
    with open(workspace.commands, "a") as file:
        file.write(json.dumps(line) + "\n")


def _memory(workspace: Workspace) -> Path:
    """Where the settings of command lines are kept for later runs."""
    return workspace.root / "state" / "command_line.json"


def _remembered(workspace: Workspace) -> Callable[[], None]:
    """Note a run's settings and its number of rounds, and return what puts them back as they are now.

    What a mistaken command line has stored would make the plain `autoseg run` fail, or hide finished rounds. A run
    that was stopped, by a signal or by faults of the data, goes on with its own.
    """
    memory, number = _memory(workspace), workspace.num_rounds
    files = [memory, *(place.settings for place in (workspace, *workspace.rounds()))]
    before = {path: path.read_text(errors="replace") for path in files if path.exists()}

    def put_back() -> None:
        for path, content in before.items():
            write_text(path, content)
        if memory not in before:
            memory.unlink(missing_ok=True)
        if workspace.num_rounds != number:
            workspace.plan_rounds(number)

    return put_back


def _remember_input(workspace: Workspace, settings: Settings, origins: Mapping[str, str], input_path: Path) -> None:
    write_text(workspace.input, input_path.read_text())
    _remember_settings(workspace, settings, origins)


def _remember_settings(workspace: Workspace, settings: Settings, origins: Mapping[str, str]) -> None:
    resolved = settings.model_dump(mode="json")
    for key in ("datalist", "dataroot", "work_dir"):
        resolved[key] = _relative(Path(getattr(settings, key)), workspace.root)
    write_yaml(
        workspace.settings,
        {key: {"value": value, "origin": origins.get(key, "default")} for key, value in resolved.items()},
    )


# -- analyze


def _analysis_inputs(datalist: Datalist, settings: Settings) -> dict[str, str]:
    inputs = {key: digest(getattr(settings, key)) for key in ANALYSIS_KEYS}
    inputs["version of autoseg"] = __version__
    for case in datalist.training:
        inputs[f"case {case.name}"] = digest([files_digest(case), case.fold, case.annotated, case.group])
    inputs["testing, validation and unlabeled cases"] = digest(
        [[files_digest(c) for c in cases] for cases in (datalist.testing, datalist.validation, datalist.unlabeled)]
    )
    return inputs


def _analyze(workspace: Workspace, listed: Datalist, settings: Settings, *, as_json: bool) -> None:
    from autoseg.analyzer import analyze

    inputs = _analysis_inputs(listed, settings)
    reasons = workspace.stale("analyze", inputs)
    if reasons:
        _say_stage("analyze", reasons)
        analysis = analyze(listed, settings, workspace, progress=not as_json)
        kept = _settle(listed.without(analysis.quarantined), analysis.annotated, settings)
        write_datalist(kept, workspace.datalist, settings.dataroot)
        images = sorted(_relative(c.images[0], settings.dataroot) for c in kept.training)
        write_json(workspace.root / "state" / "data.json", {"images": images})
        write_json(workspace.root / "state" / "summary.json", analysis.summary())
        workspace.stamp("analyze", inputs)
        if not as_json:
            print(analysis.text())
    else:
        log.info("analyze: up to date")
    if as_json:
        print(json.dumps(read_json(workspace.root / "state" / "summary.json"), indent=1))


def _settle(listed: Datalist, annotated: Mapping[str, tuple[str, ...]], settings: Settings) -> Datalist:
    """The list with the classes each case was annotated for, as the analysis found; its folds balanced over them."""

    def settled(cases: Sequence[Case]) -> tuple[Case, ...]:
        return tuple(replace(c, annotated=annotated.get(c.name)) for c in cases)

    found = replace(
        listed,
        training=settled(listed.training),
        validation=settled(listed.validation),
        testing=settled(listed.testing),
        unlabeled=settled(listed.unlabeled),
    )
    if listed.folds_made and settings.partial_labels == "infer":  # when they were made, this was not known
        found = replace(found, training=deal_folds(found.training, num_fold=listed.num_fold, seed=settings.seed))
    return found


def _need_analysis(workspace: Workspace, listed: Datalist, settings: Settings) -> None:
    inputs = _analysis_inputs(listed, settings)
    reasons = workspace.stale("analyze", inputs)
    if reasons == ["not done yet"]:
        raise WorkspaceError(
            f"{workspace.root}: analyze has not been done. Run `autoseg analyze` or `autoseg run` first."
        )
    if reasons:
        raise WorkspaceError(
            f"{workspace.root}: the analysis is out of date ({', '.join(reasons)}). "
            "Run `autoseg analyze` or `autoseg run`."
        )


def _say_stage(stage: str, reasons: Sequence[str]) -> None:
    log.info(
        "%s: %s", stage, "starting" if list(reasons) == ["not done yet"] else "again, because " + ", ".join(reasons)
    )


# -- rounds of training


def _run_cases(workspace: Workspace, settings: Settings) -> tuple[Datalist, LabelMap]:
    """The run's cases as the analysis settled them, and its classes as the user named them."""
    datalist = read_datalist(workspace.datalist, settings.dataroot)
    return datalist, run_label_map(settings, datalist, Fingerprint.read(workspace.datastats)).named


def _rounds(workspace: Workspace, settings: Settings, algo: AlgoName | None, fold: int | None) -> Rounds:
    """What the run's rounds have to do, for its budget."""
    datalist, label_map = _run_cases(workspace, settings)
    num_to_fill = len(cases_to_fill(datalist, label_map.names, How.of(settings)))
    return Rounds(
        number=workspace.num_rounds,
        jobs=tuple(_select_jobs(settings, datalist, algo, fold)),
        predictions=num_to_fill + len(datalist.training) / datalist.num_fold,
    )


def _pseudolabel(place: Workspace, settings: Settings) -> bool:
    """Complete the labels that a round learns from, with the models of the round before.

    Returns:
        Whether every case could be predicted. One that could not goes without, and the next run tries it again.
    """
    from autoseg.pseudolabel.build import make_pseudolabels, missing_files, not_predicted, stage_inputs

    source = _previous(place)
    datalist, label_map = _run_cases(Workspace(place.run), settings)
    inputs = stage_inputs(source, datalist, settings, label_map)
    reasons = place.stale("pseudolabel", inputs)
    if not reasons:
        reasons = ["files are missing"] if missing_files(place) else []
        reasons += [f"{name} could not be predicted" for name in not_predicted(place)]
    if not reasons:
        log.info("pseudolabel: up to date")
        return True
    _say_stage("pseudolabel", reasons)
    with _bar("pseudolabel") as progress:
        result = make_pseudolabels(source, place, datalist, settings, label_map, progress=progress)
    place.stamp("pseudolabel", inputs)
    print(result.text)
    return not result.failures


def _previous(place: Workspace) -> Workspace:
    return next(r for r in place.rounds() if r.round == place.round - 1)


def _need_pseudolabels(place: Workspace, settings: Settings) -> None:
    """Make sure that a round's pseudo-labels were made from the models, cases and settings of now."""
    from autoseg.pseudolabel.build import stage_inputs

    datalist, label_map = _run_cases(Workspace(place.run), settings)
    reasons = place.stale("pseudolabel", stage_inputs(_previous(place), datalist, settings, label_map))
    if reasons:
        raise WorkspaceError(
            f"{place.root}: the pseudo-labels are out of date ({', '.join(reasons)}). "
            "Run `autoseg pseudolabel` or `autoseg run`."
        )


# -- ensemble


def _ensemble(workspace: Workspace, datalist: Datalist, settings: Settings) -> None:
    from autoseg.ensemble.build import build_ensemble

    is_last = workspace.root == workspace.run or workspace.round == workspace.num_rounds
    if settings.ensemble is False and is_last:
        log.info("ensemble: left out (ensemble: false)")
        return
    if not is_last:  # the last round predicts them
        datalist = replace(datalist, testing=(), validation=())
    done = [(j.algo, j.fold) for j in workspace.jobs() if j.state == "done" and j.algo != LOCATOR]
    if not done:
        raise WorkspaceError(f"{workspace.root}: no job is trained yet. Run `autoseg train` or `autoseg run` first.")
    with _bar("ensemble") as progress:
        result = build_ensemble(workspace, datalist, settings, done, progress=progress)
    print("\n\n".join(paint_table(table, sys.stdout) for table in result.tables))


@contextmanager
def _bar(stage: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar for a stage that goes through cases, once or several times."""
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
