"""The stage `ensemble`: score out of fold, choose, predict the testing cases, write it all down."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from autoseg.config.settings import EnsembleSettings, Settings
from autoseg.data.datalists.cases import Case, Datalist
from autoseg.data.datastats import StatsByCase
from autoseg.data.labels import LabelMap, check_classes
from autoseg.ensemble import suspicious
from autoseg.ensemble.cleaning import choose_rules
from autoseg.ensemble.combine import Candidate, CaseCost, CaseScore, Choosing, Chosen, costs_of, pareto_rows
from autoseg.ensemble.copies import Copies
from autoseg.ensemble.finish import Finished, finish_out_of_fold
from autoseg.ensemble.held_back import HeldBack, predict_held_back
from autoseg.ensemble.labels import OutOfFoldLabels, Speaking
from autoseg.ensemble.optimism import ChosenAgain, choose_again, speaking_for
from autoseg.ensemble.out_of_fold import Progress, score_out_of_fold
from autoseg.ensemble.quality import learn_quality
from autoseg.ensemble.results import Results
from autoseg.ensemble.robustness import held_out_robustness
from autoseg.errors import ConfigError, WorkspaceError
from autoseg.evaluation.metrics import mean_score
from autoseg.evaluation.scores import metric_named
from autoseg.evaluation.subgroups import Value, rows_to_csv
from autoseg.evaluation.suspicion import Suspicion
from autoseg.evaluation.tolerances import faults_of, of_classes
from autoseg.inference.ensemble_spec import EnsembleSpec, ParetoRow, seal_ensemble
from autoseg.inference.postprocess import ClassRule, set_rules
from autoseg.inference.quality import QualityModel
from autoseg.plan import read_plan
from autoseg.version import __version__
from autoseg.workspace.files import write_json, write_text
from autoseg.workspace.stored import read_stored, write_stored
from autoseg.workspace.workspace import Workspace

log = logging.getLogger(__name__)

NO_JOBS = "Run `autoseg train`; `autoseg status` says why jobs failed."


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
    spare_s: Callable[[], float] | None = None,
) -> EnsembleResult:
    """Score every combination of the trained algorithms out of fold, choose one, and predict with it.

    Writes what lies under `ensemble/`, the predictions for the testing cases and those held back for validation
    included. What was done before with the same models, files and settings is not done again.

    Args:
        jobs_done: algorithm and fold of each trained job.
        progress: called with (done, all, case) after each case.
        spare_s: seconds of the run's budget that are left now; None: it has none.

    Raises:
        WorkspaceError: No job was trained, or a model cannot be loaded.
    """
    if not jobs_done:
        raise WorkspaceError(f"{workspace.root}: no trained job to make an ensemble of. {NO_JOBS}")
    how, metric = settings.combining, metric_named(settings.combining.select_by)
    algos_by_fold = {f: sorted(a for a, g in set(jobs_done) if g == f) for f in sorted({f for _, f in jobs_done})}
    gaps = _gaps(workspace, algos_by_fold, settings, datalist)
    scored, failures = score_out_of_fold(
        workspace, datalist, algos_by_fold, combine=how.combine, device=settings.device, progress=progress,
        select_by=metric, tolerance_mm=settings.surface_tolerance_mm,
    )  # fmt: skip
    choosing = Choosing(how=how, metric=metric, algos_by_fold=algos_by_fold, costs=costs_of(scored))
    able, choice = _chosen(choosing, scored)
    trained = _classes_of(workspace, choice.candidate)
    done = _finished(workspace, datalist, settings, scored, choice, trained.named, choosing)
    spec = _spec(how, choice, done.finished, trained.named, pareto_rows(able, choosing.costs))
    cases = [*datalist.testing, *datalist.validation]
    copies = _copies(workspace, spec, choosing.costs, len(cases), settings.device, spare_s)
    quality, held_back = _look_at_new_images(copies, cases, settings, choice, done, trained, progress)
    _measure_robustness(copies, datalist, settings, scored, done.finished, progress)
    results = Results(
        candidates=tuple(able),
        chosen=choice.candidate,
        cases=tuple(scored),
        classes=trained.named.names,
        network_classes=trained.names,
        held_back=held_back,
        facts=_facts(workspace, (*datalist.training, *cases), trained.named),
        patients={c.name: c.group for c in (*datalist.training, *cases) if c.group is not None},
        finished=done.finished,
        again=done.again,
        suspicious=done.suspicious,
        quality=quality,
        metric=metric,
        spec=spec,
        gaps=tuple(gaps),
        failures=(*failures, *held_back.failures),
    )
    return _write(workspace, results)


def _look_at_new_images(
    copies: Copies,
    cases: Sequence[Case],
    settings: Settings,
    choice: Chosen,
    done: _Done,
    trained: LabelMap,
    progress: Progress | None,
) -> tuple[QualityModel | None, HeldBack]:
    """Learn what tells how good predictions are, write the ensemble with it, and predict the held-back cases."""
    workspace, spec, finished = copies.workspace, copies.spec, done.finished
    quality = learn_quality(done.labels, done.cases, choice, finished, spec, trained, copies)
    _write_spec(workspace, spec, quality)
    held_back = predict_held_back(
        workspace, cases, spec, settings, trained.named, finished.tolerance_mm, quality, progress
    )
    copies.kept_s = 0.0  # that was for these cases
    return quality, held_back


def _copies(
    workspace: Workspace,
    spec: EnsembleSpec,
    cost: CaseCost | None,
    num_held_back: int,
    device: str,
    spare_s: Callable[[], float] | None,
) -> Copies:
    """What predicts corrupted copies, in a budget as long as there is also time for the held-back cases."""

    def seconds(members: Sequence[tuple[str, int]]) -> float:
        return cost.of(members)[0] if cost is not None else 0.0

    by_fold = [[m for m in spec.members if m[1] == fold] for fold in {fold for _, fold in spec.members}]
    copies = Copies(workspace, spec, device=device, image_s=max(map(seconds, by_fold)), spare_s=spare_s)
    copies.kept_s = num_held_back * seconds(spec.members)
    return copies


def _measure_robustness(
    copies: Copies,
    datalist: Datalist,
    settings: Settings,
    scored: Sequence[CaseScore],
    finished: Finished,
    progress: Progress | None,
) -> None:
    """Write robustness.json in the last round, unless it is not wanted."""
    if settings.combining.robustness == "off" or not copies.workspace.is_last_round:
        copies.workspace.robustness.unlink(missing_ok=True)
        return
    by_name = {case.name: case for case in datalist.training}
    held_out_robustness(copies, scored, by_name, finished.dice, seed=settings.seed, progress=progress)


def _write_spec(workspace: Workspace, spec: EnsembleSpec, quality: QualityModel | None) -> None:
    """Write ensemble.json, quality.json and their seal."""
    workspace.ensemble_seal.unlink(missing_ok=True)  # at no moment is there one that does not belong to the others
    workspace.quality.unlink(missing_ok=True)
    write_json(workspace.ensemble_spec, spec.model_dump(mode="json"))
    if quality is not None:
        write_stored(workspace.quality, quality)
    seal_ensemble(workspace, spec)


def _facts(workspace: Workspace, cases: Sequence[Case], label_map: LabelMap) -> dict[str, dict[str, Value]]:
    """What each case may be grouped by: what the list says of it, its foreground's volume, its annotated classes."""
    volumes: dict[str, float] = {}
    if workspace.datastats_by_case.exists():
        values = sorted({value for of_class in label_map.values for value in of_class})
        stats = read_stored(workspace.datastats_by_case, StatsByCase).stats_by_cases
        volumes = {c.name: c.volume_ml(values) for c in stats if c.label_stats is not None}
    facts: dict[str, dict[str, Value]] = {}
    for case in cases:
        facts[case.name] = dict(case.meta)
        if case.name in volumes:
            facts[case.name]["size (ml)"] = round(volumes[case.name], 4)
        facts[case.name]["annotated"] = "all" if case.annotated is None else ", ".join(sorted(case.annotated)) or "none"
    return facts


def _write(workspace: Workspace, results: Results) -> EnsembleResult:
    """Write scores.txt and scores.json."""
    tables = tuple(results.tables())
    write_text(workspace.ensemble / "scores.txt", "\n\n".join([*tables, *results.gaps, *results.failures]) + "\n")
    write_json(workspace.scores, results.to_json())
    write_text(workspace.subgroups, rows_to_csv(results.subgroups))
    write_text(workspace.suspicious_labels, suspicious.rows_to_csv(results.suspicious))
    suspicious.write_points(workspace.suspicious_points, results.suspicious)
    return EnsembleResult(
        spec=results.spec,
        candidates=results.candidates,
        tables=tables,
        gaps=results.gaps,
        failures=results.failures,
    )


def _chosen(choosing: Choosing, scored: Sequence[CaseScore]) -> tuple[list[Candidate], Chosen]:
    """The candidates, and the one that the settings choose, within their budgets."""
    able = choosing.candidates(scored)
    choice = choosing.choose(able)
    if choice.given_up:
        log.warning("ensemble: given up for the budget: %s", choice.given_up)
    return able, choice


def _classes_of(workspace: Workspace, candidate: Candidate) -> LabelMap:
    """The classes of a candidate's networks; those of the user are its `named`."""
    algo, fold = candidate.members[0]
    return read_plan(workspace.job_dir(algo, fold)).label_map


@dataclass(frozen=True, slots=True, kw_only=True)
class _Done:
    """What the chosen candidate came to out of fold."""

    labels: OutOfFoldLabels
    cases: dict[str, Speaking]
    finished: Finished
    again: ChosenAgain | None
    suspicious: list[Suspicion]


def _finished(
    workspace: Workspace,
    datalist: Datalist,
    settings: Settings,
    scored: Sequence[CaseScore],
    choice: Chosen,
    label_map: LabelMap,
    choosing: Choosing,
) -> _Done:
    """Postprocess and score what the chosen candidate says of every case; choose again without each fold."""
    names = label_map.names
    check_classes(settings.inference, names)
    if faults := faults_of(settings.surface_tolerance_mm, names, "surface_tolerance_mm"):
        raise ConfigError(faults)
    by_name = {case.name: case for case in datalist.training}
    labels = OutOfFoldLabels(
        workspace=workspace, label_map=label_map, tolerance_mm=of_classes(settings.surface_tolerance_mm, names)
    )
    base = set_rules(names, settings.inference.slice_run, settings.inference.min_voxels)
    cases, rules = speaking_for(choice.candidate, scored, by_name), tuple(base)
    if choosing.how.postprocess == "auto":
        rules = choose_rules(labels, cases, base, choosing.metric)
    for rule in rules:
        log.info("ensemble: %s: %s%s", rule.name, rule.words, _gain(rule))
    again = choose_again(labels, scored, by_name, choosing, base)
    return _Done(
        labels=labels,
        cases=cases,
        finished=finish_out_of_fold(labels, cases, rules),
        again=again,
        suspicious=suspicious.suspicious_labels(labels, cases, rules),
    )


def _spec(
    how: EnsembleSettings, choice: Chosen, finished: Finished, label_map: LabelMap, pareto: tuple[ParetoRow, ...]
) -> EnsembleSpec:
    """What is stored of the choice."""
    mean, raw = mean_score([*finished.dice.values()]), mean_score([*finished.raw.values()])
    return EnsembleSpec(
        name=choice.candidate.name,
        method=how.method,
        combine="vote" if how.combine == "vote" else choice.candidate.combine,
        members=choice.members,
        classes=label_map.names,
        dice=None if math.isnan(mean) else round(mean, 6),
        dice_raw=None if math.isnan(raw) else round(raw, 6),
        postprocessing=finished.rules,
        pareto=pareto,
        given_up=choice.given_up,
        version=__version__,
    )


def _gaps(
    workspace: Workspace, algos_by_fold: dict[int, list[str]], settings: Settings, datalist: Datalist
) -> list[str]:
    """Say which jobs of the plan have no model, and why."""
    folds = range(datalist.num_fold) if settings.folds is None else settings.folds
    missing = [(a, f) for f in folds for a in settings.networks if a not in algos_by_fold.get(f, ())]
    dropped = [f"{a}_{f}" for a, f in missing if workspace.read_job(a, f).state == "pruned"]
    failed = [f"{a}_{f}" for a, f in missing if f"{a}_{f}" not in dropped]
    gaps = []
    if dropped:
        gaps.append(f"not trained, since the budget went to better algorithms: {', '.join(dropped)}.")
    if failed:
        names = ", ".join(failed)
        gaps.append(f"not trained, so left out: {names}. `autoseg status` says why; `autoseg train` tries again.")
    for gap in gaps:
        log.warning("ensemble: %s", gap)
    return gaps


def _gain(rule: ClassRule) -> str:
    if rule.dice_before is None or rule.dice_after is None:
        return ", as was set"
    return f", Dice {rule.dice_before:.4f} -> {rule.dice_after:.4f}"
