"""The stages: what each needs, when it is up to date, and what it runs."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from autoseg.algos.inputs import run_label_map
from autoseg.config.settings import LOCATOR, Settings
from autoseg.data.datalists.cases import Case, Datalist, files_digest
from autoseg.data.datalists.datalist import read_datalist, write_datalist
from autoseg.data.datalists.folds import deal_folds
from autoseg.data.fingerprint import Fingerprint
from autoseg.data.labels import LabelMap
from autoseg.errors import WorkspaceError
from autoseg.pipeline.memory import _relative
from autoseg.terminal import Progress, paint_table
from autoseg.version import __version__
from autoseg.workspace.files import digest, read_json, write_json
from autoseg.workspace.workspace import Workspace

log = logging.getLogger(__name__)


ANALYSIS_KEYS = ("class_names", "sigmoid", "ignore_label", "partial_labels", "extra_modalities", "on_fault", "modality")


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
