"""The stage `ensemble`: score out of fold, choose, predict the testing cases, write it all down."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autoseg.config.reader import read_model
from autoseg.config.settings import EnsembleSettings, Settings
from autoseg.config.units import parse_duration, parse_size
from autoseg.data.datalists.cases import Case, Datalist
from autoseg.data.formats.nifti import read_grid
from autoseg.data.labels import check_classes
from autoseg.data.volumes import read_label
from autoseg.ensemble.combine import Candidate, CaseScore, candidates, choose, costs_of, pareto_rows
from autoseg.ensemble.out_of_fold import (
    Finished,
    Progress,
    case_digest,
    finish_out_of_fold,
    read_record,
    score_of,
    score_out_of_fold,
)
from autoseg.errors import DataError, ResourceError, WorkspaceError
from autoseg.evaluation.metrics import TOLERANCE_MM, mean_score, summarise, to_plain
from autoseg.evaluation.tables import format_rows, format_score, format_table
from autoseg.inference.ensemble_spec import EnsembleSpec
from autoseg.inference.files import segment
from autoseg.inference.postprocess import ClassRule, set_rules
from autoseg.inference.predictor import Predictor, model_digest
from autoseg.plan import Plan
from autoseg.version import __version__
from autoseg.workspace.files import digest, write_json, write_text
from autoseg.workspace.workspace import Workspace

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsembleResult:
    """What the stage came to."""

    spec: EnsembleSpec
    candidates: tuple[Candidate, ...]
    tables: tuple[str, ...]
    """Text: the candidates; each algorithm and the ensemble, class by fold; the testing cases with a label."""
    gaps: tuple[str, ...]
    """Jobs that are missing from the ensemble, in words."""
    failures: tuple[str, ...]
    """Cases that could not be scored or predicted, with the reason."""


def build_ensemble(
    workspace: Workspace,
    datalist: Datalist,
    settings: Settings,
    jobs_done: Sequence[tuple[str, int]],
    *,
    progress: Progress | None = None,
) -> EnsembleResult:
    """Score every combination of the trained algorithms out of fold, choose one, and predict with it.

    Writes, under `ensemble/`: scores.json and scores.txt, ensemble.json, out_of_fold/<combination>/ and
    out_of_fold/ensemble/, and predictions/ for the testing cases and those held back for validation. What was
    done before with the same models, files and settings is not done again.

    Args:
        jobs_done: algorithm and fold of each trained job.
        progress: called with (done, all, case) after each case.

    Raises:
        WorkspaceError: No job was trained, or a model cannot be loaded.
    """
    if not jobs_done:
        raise WorkspaceError(
            f"{workspace.root}: no trained job to make an ensemble of. Run `autoseg train`; "
            "`autoseg status` says why jobs failed."
        )
    how = settings.ensemble if isinstance(settings.ensemble, EnsembleSettings) else EnsembleSettings()
    algos_by_fold = {f: sorted(a for a, g in set(jobs_done) if g == f) for f in sorted({f for _, f in jobs_done})}
    gaps = _gaps(workspace, algos_by_fold, settings, datalist)
    for gap in gaps:
        log.warning("ensemble: %s", gap)
    cases, failures = score_out_of_fold(
        workspace,
        datalist,
        algos_by_fold,
        combine=how.combine,
        device=settings.device,
        progress=progress,
    )
    made = candidates(cases, algos_by_fold, how)
    costs = costs_of(cases)
    choice = choose(
        made,
        how,
        costs,
        max_s=parse_duration(how.max_time) if how.max_time else None,
        max_gb=parse_size(how.max_memory) / 1e9 if how.max_memory else None,
    )
    chosen = choice.candidate
    if choice.given_up:
        log.warning("ensemble: given up for the budget: %s", choice.given_up)
    algo, fold = chosen.members[0]
    trained = read_model(workspace.job_dir(algo, fold).plan, Plan).label_map
    label_map = trained.named
    names = label_map.names
    check_classes(settings.inference, names)
    by_name = {case.name: case for case in datalist.training}
    spoken = {c.name: (by_name[c.name], chosen.combination(c.fold).name) for c in cases if c.name in chosen.scores}
    finished = finish_out_of_fold(
        workspace,
        spoken,
        label_map,
        given=set_rules(names, settings.inference.slice_run, settings.inference.min_voxels),
        choose_rules=how.postprocess == "auto",
    )
    for rule in finished.rules:
        log.info("ensemble: %s: %s%s", rule.name, rule.words, _gain(rule))
    mean, raw = mean_score([*finished.dice.values()]), mean_score([*finished.raw.values()])
    spec = EnsembleSpec(
        name=chosen.name,
        method=how.method,
        combine="vote" if how.combine == "vote" else chosen.combine,
        members=choice.members,
        classes=names,
        dice=None if math.isnan(mean) else round(mean, 6),
        dice_raw=None if math.isnan(raw) else round(raw, 6),
        postprocessing=finished.rules,
        pareto=pareto_rows(made, costs),
        given_up=choice.given_up,
        version=__version__,
    )
    write_json(workspace.ensemble_spec, spec.model_dump(mode="json"))
    held = [*datalist.testing, *datalist.validation]
    test_scores, lost = _predict_testing(workspace, held, spec, settings, progress)
    failures += lost

    tables = _tables(made, chosen, cases, names, test_scores, spec, finished)
    write_text(workspace.ensemble / "scores.txt", "\n\n".join([*tables, *gaps, *failures]) + "\n")
    scores = _scores_json(made, chosen, cases, names, test_scores, gaps, failures, settings.seed)
    write_json(workspace.scores, {**scores, **_ensemble_json(finished, names, trained.names, settings.seed)})
    return EnsembleResult(
        spec=spec, candidates=tuple(made), tables=tuple(tables), gaps=tuple(gaps), failures=tuple(failures)
    )


def _gaps(
    workspace: Workspace, algos_by_fold: dict[int, list[str]], settings: Settings, datalist: Datalist
) -> list[str]:
    """Say which jobs of the plan have no model, and why."""
    folds = range(datalist.num_fold) if settings.folds is None else settings.folds
    lost = [(a, f) for f in folds for a in settings.algos if a not in algos_by_fold.get(f, ())]
    dropped = [f"{a}_{f}" for a, f in lost if workspace.read_job(a, f).state == "pruned"]
    failed = [f"{a}_{f}" for a, f in lost if f"{a}_{f}" not in dropped]
    told = []
    if dropped:
        told.append(f"not trained, since the budget went to better algorithms: {', '.join(dropped)}.")
    if failed:
        names = ", ".join(failed)
        told.append(f"not trained, so left out: {names}. `autoseg status` says why; `autoseg train` tries again.")
    return told


def _gain(rule: ClassRule) -> str:
    if rule.dice_before is None or rule.dice_after is None:
        return ", as was set"
    return f", Dice {rule.dice_before:.4f} -> {rule.dice_after:.4f}"


def _predict_testing(
    workspace: Workspace, cases: Sequence[Case], spec: EnsembleSpec, settings: Settings, progress: Progress | None
) -> tuple[dict[str, list[float]], list[str]]:
    """Predict the cases with the ensemble, and score those with a label.

    Returns:
        Case -> Dice per class, and a message for each case that failed.
    """
    models = {f"{a}_{f}": model_digest(workspace, a, f) for a, f in spec.members}
    predictor: Predictor | None = None
    scores: dict[str, list[float]] = {}
    failures: list[str] = []
    for done, case in enumerate(cases, 1):
        target = workspace.predictions / f"{case.name}.nii.gz"
        path = workspace.ensemble / "records" / f"{case.name}.json"
        try:
            rules = [rule.model_dump(exclude={"dice_before", "dice_after"}) for rule in spec.postprocessing]
            key = case_digest(case, models, digest([spec.combine, rules]))
            record = read_record(path, key, [target])
            if record is None:
                if predictor is None:
                    jobs = [workspace.job_dir(a, f) for a, f in spec.members]
                    predictor = Predictor(jobs, device=settings.device, combine=spec.combine, rules=spec.postprocessing)
                record = {"made_from": key, "dice": _predict_case(predictor, case, target)}
                write_json(path, record)
            if record["dice"] is not None:
                scores[case.name] = [math.nan if v is None else float(v) for v in record["dice"]]
        except (DataError, ResourceError) as error:
            log.error("%s: not predicted: %s", case.name, error)
            failures.extend(f"{case.name}: {message}" for message in error.messages)
        if progress is not None:
            progress(done, len(cases), case.name)
    return scores, failures


def _predict_case(predictor: Predictor, case: Case, target: Path) -> list[float | None] | None:
    segment(predictor, case.images, target)
    if case.label is None:
        return None
    label, pred = read_label(case.label), read_label(target).array[0]
    if found := label.grid.differs_from(read_grid(case.images[0])[0]):
        raise DataError(f"{case.label}: not on the grid of {case.images[0].name} ({found}). Export the label again.")
    scores: list[float | None] = to_plain(score_of(case, pred, label, predictor.label_map.named))
    return scores


def _tables(
    made: Sequence[Candidate],
    chosen: Candidate,
    cases: Sequence[CaseScore],
    names: Sequence[str],
    test_scores: dict[str, list[float]],
    spec: EnsembleSpec,
    finished: Finished,
) -> list[str]:
    fold_of = {case.name: case.fold for case in cases}

    def by_fold(candidate: Candidate) -> list[tuple[int, Sequence[float]]]:
        return [(fold_of[name], values) for name, values in candidate.scores.items()]

    costs = {row.name: row for row in spec.pareto}
    rows = []
    for c in sorted(made, key=lambda c: -1.0 if math.isnan(c.mean) else c.mean, reverse=True):
        row = costs.get(c.name)
        told = ["-", "-", ""] if row is None else [f"{row.seconds:.2f}", f"{row.gb:.2f}", "x" if row.on_front else ""]
        name = ("* " if c is chosen else "  ") + c.name
        rows.append([name, format_score(c.mean), *told, str(len(c.scores)), str(len(c.members))])
    header = ["  combination", "dice", "s/image", "GB", "front", "cases", "models"]
    tables = ["Out-of-fold Dice of each combination and what it takes, * chosen\n" + format_rows(header, rows)]
    if spec.given_up:
        tables[0] += f"\nGiven up for the budget: {spec.given_up}."
    if finished.rules:
        told_rules = [
            [
                rule.name,
                *(format_score(math.nan if v is None else v) for v in (rule.dice_before, rule.dice_after)),
                rule.words,
            ]
            for rule in finished.rules
        ]
        title = "Postprocessing, by the out-of-fold Dice before and after; a dash: as was set"
        tables.append(f"{title}\n" + format_rows(["class", "before", "after", "what"], told_rules))
    singles = [c for c in made if "+" not in c.name and not c.name.startswith("best_")]
    tables += [format_table(f"Dice of {c.name}", names, by_fold(c)) for c in singles]
    if chosen not in singles or finished.rules:
        title = f"Dice of the ensemble ({chosen.name})" + (", postprocessing included" if finished.rules else "")
        tables.append(format_table(title, names, [(fold_of[n], values) for n, values in finished.dice.items()]))
    if test_scores:
        summary = summarise(list(test_scores.values()), names)
        rows = [[c.name, format_score(c.mean), format_score(c.std), str(c.num)] for c in summary.classes]
        rows.append(["mean", format_score(summary.mean), "", str(summary.num_cases)])
        tables.append("Dice of the ensemble on the testing cases\n" + format_rows(["class", "mean", "std", "n"], rows))
    return tables


def _scores_json(
    made: Sequence[Candidate],
    chosen: Candidate,
    cases: Sequence[CaseScore],
    names: Sequence[str],
    test_scores: dict[str, list[float]],
    gaps: Sequence[str],
    failures: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    return {
        "version": __version__,
        "metric": "dice",
        "classes": list(names),
        "chosen": chosen.name,
        "candidates": [
            {
                "name": c.name,
                "combine": c.combine,
                "members": [list(m) for m in c.members],
                **summarise(list(c.scores.values()), names, seed=seed).to_json(),
            }
            for c in made
        ],
        "cases": [{"name": c.name, "fold": c.fold, "dice": to_plain(dict(c.dice))} for c in cases],
        "testing": to_plain(test_scores),
        "gaps": list(gaps),
        "failures": list(failures),
    }


def _ensemble_json(finished: Finished, names: Sequence[str], trained: Sequence[str], seed: int) -> dict[str, Any]:
    """The chosen ensemble's own part of scores.json, postprocessing included.

    Per case Dice and NSD; over all cases Dice, NSD and calibration (of the probabilities, before postprocessing).

    Args:
        names: of the user's classes.
        trained: of the networks' classes, which have the probabilities; merged sides are one.
    """
    counted = [c for c in finished.calibration.values() if c is not None]
    return {
        "tolerance_mm": TOLERANCE_MM,
        "dice": summarise([*finished.dice.values()], names, seed=seed).to_json(),
        "nsd": summarise([*finished.nsd.values()], names, seed=seed).to_json(),
        "calibration": np.sum(counted, axis=0).round(3).tolist() if counted else None,
        "calibrated": list(trained),
        "ensemble": {n: to_plain({"dice": d, "nsd": finished.nsd[n]}) for n, d in finished.dice.items()},
    }
