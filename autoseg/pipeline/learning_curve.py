"""`autoseg learning_curve`: what more cases would bring, from trainings on fewer of them.

work_dir/learning_curve/
  curve.json                              the trainings, the law through them and what it predicts
  n025_seed0/datalist.json                the cases of one training, and the fold that it is scored on
  n025_seed0/<algo>_<fold>/               its job, as a run's

Jobs are those of a run: planned as for all cases, so that all have one network and as many steps, trained by the same
trainer, gone on with where they were stopped. The cases of the sizes are nested, patients stay whole, and each seed
draws another order of them and is scored on another fold.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from autoseg.config.load import load_settings
from autoseg.config.settings import Settings
from autoseg.config.units import format_duration, parse_duration
from autoseg.data.datalists.cases import Case, Datalist
from autoseg.data.datalists.datalist import read_datalist, write_datalist
from autoseg.errors import ConfigError
from autoseg.evaluation.intervals import case_means
from autoseg.evaluation.learning_curve import CurvePoint, LearningCurve, fit_law, predict_at
from autoseg.evaluation.score_files import ValidationFile
from autoseg.evaluation.tables import format_rows
from autoseg.pipeline.networks import with_networks
from autoseg.version import __version__
from autoseg.workspace.files import log_to
from autoseg.workspace.stored import read_stored, write_stored
from autoseg.workspace.workspace import Workspace

if TYPE_CHECKING:
    from autoseg.config.networks import AlgoName

log = logging.getLogger(__name__)

FEWEST_CASES = 4
"""That a training learns from."""
FEWEST_POINTS = 3
"""Sizes, under which nothing tells how a curve bends."""
SHARE = 0.2
"""Of the run's budget, where the command has none of its own. A choice."""


def measure_curve(
    input_path: Path,
    overrides: Mapping[str, str],
    *,
    algo: AlgoName | None = None,
    points: int = 4,
    seeds: int = 2,
    at: Sequence[int] = (),
    budget: str | None = None,
) -> tuple[int, str]:
    """Train on nested shares of the cases, fit the law, write curve.json; started again, go on.

    Args:
        overrides: settings on the command line.
        algo: network; None: the fastest of the chosen combination, else the first of `algos`.
        points: sizes, each half of the next.
        seeds: orders of the cases, each scored on another fold.
        at: further numbers of cases to predict for, besides 1.5 and 2 times as many as there are.
        budget: time for all trainings, shared out evenly; None: a fifth of the run's; without one as planned.

    Returns:
        Exit code, 1 where a training failed, and a table.

    Raises:
        AutosegError: What the user can repair, before anything is trained.
    """
    from autoseg.pipeline.run import run_input

    settings, origins = load_settings(input_path, overrides)
    if points < FEWEST_POINTS:
        raise ConfigError(f"--points: expected at least {FEWEST_POINTS}, found {points}: else no bend is seen.")
    if seeds < 1:
        raise ConfigError(f"--seeds: expected at least 1, found {seeds}.")
    seconds = _seconds(settings, budget)
    run_input(("analyze",), input_path, overrides)
    workspace = Workspace(settings.work_dir)
    datalist = read_datalist(workspace.datalist, settings.dataroot)
    settings = settings.model_copy(update={"budget": None})
    with workspace.lock(), log_to(workspace.log):
        settings = with_networks(workspace, settings, anew=False)
        chosen = algo or _fastest(workspace, settings)
        trainings = _trainings(datalist, points, seeds, settings)
        each_s = None if seconds is None else seconds / len(trainings)
        log.info(
            "learning_curve: %d trainings of %s%s", len(trainings), chosen,
            "" if each_s is None else f", {format_duration(each_s)} each",
        )  # fmt: skip
        done: list[CurvePoint] = []
        failures: list[str] = []
        for number, (cases, seed, fold) in enumerate(trainings, 1):
            num = len(cases.train_cases(fold))
            log.info("learning_curve: %d of %d: %d cases, seed %d", number, len(trainings), num, seed)
            point = _train(workspace, datalist, cases, settings, origins, chosen, seed, fold, each_s)
            if isinstance(point, str):
                failures.append(f"{num} cases, seed {seed}: {point}")
            else:
                done.append(point)
        curve = _curve(chosen, datalist, done, failures, at)
        write_stored(workspace.learning_curve / "curve.json", curve)
    return (1 if failures else 0), words(curve)


def _seconds(settings: Settings, budget: str | None) -> float | None:
    """Seconds of all trainings together."""
    try:
        if budget is not None:
            return parse_duration(budget)
    except ConfigError as error:
        raise ConfigError(f"--budget: {error}") from None
    return None if settings.budget is None else SHARE * parse_duration(settings.budget)


def _fastest(workspace: Workspace, settings: Settings) -> AlgoName:
    """The fastest network of the chosen combination; before there is one, the first that is trained."""
    done = [job for job in workspace.finished().jobs() if job.state == "done" and job.algo in settings.networks]
    timed = [(job.inference_s, job.algo) for job in done if job.inference_s]
    if not timed:
        return settings.networks[0]
    _, name = min(timed)
    return next(algo for algo in settings.networks if algo == name)


def _trainings(datalist: Datalist, points: int, seeds: int, settings: Settings) -> list[tuple[Datalist, int, int]]:
    """Cases, seed and fold of each training: the small ones first.

    Raises:
        ConfigError: There are too few cases for so many sizes.
    """
    trainings = []
    for seed in range(seeds):
        fold = seed % datalist.num_fold
        order = _ordered(datalist.train_cases(fold), settings.seed + seed)
        sizes = _sizes(len(order), points)
        if sizes[0] < FEWEST_CASES:
            remedy = "Give fewer points."
            if _sizes(len(order), FEWEST_POINTS)[0] < FEWEST_CASES:
                fewest = FEWEST_CASES * 2 ** (FEWEST_POINTS - 1)
                remedy = f"A curve takes {fewest} cases besides those of a fold: annotate more."
            raise ConfigError(
                f"--points: {points} sizes of {len(order)} cases begin with {sizes[0]}. Expected at least "
                f"{FEWEST_CASES}. {remedy}"
            )
        scored = {case.name for case in datalist.val_cases(fold)}
        # Patients of many cases may make two sizes one.
        for size in sorted({_whole_patients(order, size) for size in sizes}):
            kept = {case.name for case in order[:size]} | scored
            training = tuple(case for case in datalist.training if case.name in kept)
            trainings.append(
                (replace(datalist, training=training, testing=(), validation=(), unlabeled=()), seed, fold)
            )
    return sorted(trainings, key=lambda training: (len(training[0].train_cases(training[2])), training[1]))


def _sizes(num_cases: int, points: int) -> list[int]:
    """Numbers of cases to train on, each half of the next."""
    return [round(num_cases / 2 ** (points - 1 - i)) for i in range(points)]


def _ordered(cases: Sequence[Case], seed: int) -> list[Case]:
    """Cases in an order by chance, those of a patient next to each other."""
    rng = np.random.default_rng(seed)
    groups: dict[Hashable, list[Case]] = {}
    for case in sorted(cases, key=lambda c: c.name):
        groups.setdefault(("alone", case.name) if case.group is None else case.group, []).append(case)
    patients = [*groups.values()]
    return [case for i in rng.permutation(len(patients)) for case in patients[i]]


def _whole_patients(order: Sequence[Case], size: int) -> int:
    """How many cases to take so that no patient is cut in two: `size`, or a few more."""
    while size < len(order) and order[size].group is not None and order[size].group == order[size - 1].group:
        size += 1
    return size


def _train(
    workspace: Workspace,
    whole: Datalist,
    cases: Datalist,
    settings: Settings,
    origins: Mapping[str, str],
    algo: AlgoName,
    seed: int,
    fold: int,
    seconds: float | None,
) -> CurvePoint | str:
    """Train on some cases; why not, where it failed."""
    from autoseg.algos.generate import generate_job
    from autoseg.algos.inputs import planning
    from autoseg.training.job import run_job

    num = len(cases.train_cases(fold))
    folder = workspace.learning_curve / f"n{num:03d}_seed{seed}"
    place = Workspace(folder, data_of=workspace, own_cases=True)
    write_datalist(cases, place.datalist, settings.dataroot, extra_modalities=tuple(settings.extra_modalities))
    own = settings.model_copy(update={"seed": settings.seed + seed})
    # Planned as for all cases: a network of another size would bend the curve.
    for inputs in planning(workspace, whole, own, origins, [(algo, fold)], lambda name: seconds):
        generate_job(place, inputs)
    job = run_job(
        place, settings.dataroot, algo, fold, device=settings.device, num_workers=settings.num_workers, wait=True
    )
    paths = place.job_dir(algo, fold)
    if job.state != "done" or not paths.validation.exists():
        return job.error.strip().splitlines()[-1] if job.error.strip() else job.state
    stored = read_stored(paths.validation, ValidationFile)
    means = case_means({name: [*by_class.values()] for name, by_class in stored.dice.items()})
    return CurvePoint(
        num_cases=num, seed=seed, fold=fold, dice=stored.summary.mean, cases=means, seconds=round(job.seconds, 1)
    )


def _curve(
    algo: str, datalist: Datalist, points: Sequence[CurvePoint], failures: Sequence[str], at: Sequence[int]
) -> LearningCurve:
    scored = [point for point in points if point.cases]
    sizes = sorted({p.num_cases for p in scored})
    most = sizes[-1] if sizes else 0
    patients = {case.name: case.group for case in datalist.training if case.group is not None}
    predictions = []
    if len(sizes) >= FEWEST_POINTS:
        wanted = {*sizes, round(1.5 * most), 2 * most, *at}
        predictions = predict_at(fit_law(scored, patients), sorted(wanted))
    return LearningCurve(
        version=__version__, algo=algo, num_cases=most, points=tuple(points), predictions=tuple(predictions),
        failures=tuple(failures),
    )  # fmt: skip


def words(curve: LearningCurve) -> str:
    """The curve as a table."""
    rows = []
    for p in curve.predictions:
        known = [q.dice for q in curve.points if q.num_cases == p.num_cases and q.dice is not None]
        measured = f"{sum(known) / len(known):.4f}" if known else "-"
        rows.append([str(p.num_cases), measured, f"{p.dice:.4f}", f"{p.low:.4f} to {p.high:.4f}"])
    lines = ["Dice by number of training cases: measured, and by a power law with its 95 % interval"]
    if rows:
        lines.append(format_rows(["cases", "measured", "law", "95 % interval"], rows))
        lines.append("Beyond the cases that there are it is an extrapolation, for cases of the same kind.")
    else:
        lines.append("Fewer than three sizes were trained: no law can be fitted.")
    caveat = [curve.caveat] if rows and curve.caveat else []
    return "\n".join([*lines, *caveat, *curve.failures])
