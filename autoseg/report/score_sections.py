"""The sections of the report's page that are made of scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autoseg.errors import AutosegError
from autoseg.evaluation.calibration import expected_error
from autoseg.evaluation.intervals import case_means, compare
from autoseg.evaluation.metrics import mean_score
from autoseg.evaluation.score_files import PerClass, Scores, ScoreSummary, floats
from autoseg.evaluation.tolerances import Tolerance, words_of
from autoseg.report import figures, filters
from autoseg.report.gather import Run, by_number
from autoseg.report.pictures import KEPT

if TYPE_CHECKING:
    from autoseg.evaluation.scores import Metric

Content = dict[str, Any]
"""What report.html.j2 shows of a section."""
FEW = 12
"""Rows of a list that are shown at once; more are folded away."""
MOST_PICTURES = 3
"""Cases of a list that are shown in pictures."""
MOST_ROWS = 500
"""Rows of a long list that are on the page at all; its file has the others."""


def scores(run: Run) -> Content | None:
    """Tables of class by fold and boxes of all cases, for each network and the ensemble."""
    if not run.scores:
        return None
    classes, chosen = run.scores.classes, run.scores.chosen
    fold_of = {c.name: c.fold for c in run.scores.cases}
    by_algo = _by_segmenter(run.scores)
    label = f"ensemble ({chosen})" if chosen not in by_algo else chosen
    whose = chosen if chosen in by_algo else f"the {label}"
    ensemble = {n: floats(scores["dice"]) for n, scores in run.scores.ensemble.items()}
    groups = {label: list(ensemble.values())} if ensemble else {}
    groups |= {name: [floats(v) for v in cases.values()] for name, cases in by_algo.items() if name != label}
    patients, spec = run.scores.patients, run.ensemble
    tables = [(f"Dice of {whose}", _fold_table(classes, ensemble, fold_of, patients))] if ensemble else []
    others = [
        (f"Dice of {name}", _fold_table(classes, {n: floats(v) for n, v in cases.items()}, fold_of, patients))
        for name, cases in by_algo.items()
        if name != label
    ]
    plots = [(figures.score_boxes("Dice", classes, groups), "Every case's Dice on data its models never saw.")]
    lesions: list[tuple[str, Content]] = []
    uncounted: list[str] = []
    for metric, by_case in _further_scores(run.scores):
        title, axis, caption = metric.texts(run.scores.tolerance_mm)
        if all(math.isnan(v) for values in by_case.values() for v in values):
            uncounted.append(metric.short_title)
            continue
        table = f"{title} of {whose}", _fold_table(classes, by_case, fold_of, patients, metric)
        (lesions if metric.family == "lesions" else tables).append(table)
        if metric.family == "lesions":
            continue
        boxes = figures.score_boxes(axis, classes, {label: list(by_case.values())}, is_share=metric.is_share)
        plots.append((boxes, caption))
    return {
        "tables": tables,
        "others": others,
        "lesions": lesions,
        "uncounted": uncounted,
        "again": run.scores.chosen_again,
        "is_chosen_here": _is_chosen_here(run),
        "subgroups": run.scores.subgroups,
        "subgroup_notes": run.scores.subgroup_notes,
        "select_by": _words_of_metric(run.scores.metric),
        "plots": plots,
        "testing": _testing(run, run.scores),
        "rules": () if spec is None else spec.postprocessing,
        "raw": None if spec is None else spec.dice_raw,
        "mean": None if spec is None else spec.dice,
        "gaps": run.scores.gaps,
        "failures": run.scores.failures,
    }


def _is_chosen_here(run: Run) -> bool:
    """Whether a combination or a rule was chosen by the scores that are shown."""
    rules = () if run.ensemble is None else run.ensemble.postprocessing
    has_choice = run.scores is not None and len(run.scores.candidates) > 1
    return has_choice or any(rule.gain is not None for rule in rules)


def _further_scores(scores: Scores) -> list[tuple[Metric, dict[str, list[float]]]]:
    """Every metric besides Dice that was computed for the ensemble: case -> value per class."""
    from autoseg.evaluation.scores import METRICS  # it loads SciPy

    by_case = scores.ensemble
    computed = [m for m in METRICS[1:] if by_case and all(m.name in values for values in by_case.values())]
    return [(m, {n: floats(values[m.name]) for n, values in by_case.items()}) for m in computed]


def _words_of_metric(name: str) -> str:
    from autoseg.evaluation.scores import metric_named  # it loads SciPy

    return metric_named(name).short_title


def _further_summaries(
    summaries: Mapping[str, ScoreSummary], tolerance_mm: Tolerance
) -> list[tuple[str, ScoreSummary]]:
    """Title of each metric besides Dice, and its summary."""
    from autoseg.evaluation.scores import METRICS  # it loads SciPy

    return [(m.texts(tolerance_mm)[0], summaries[m.name]) for m in METRICS[1:] if m.name in summaries]


def further_means(scores: Scores) -> list[tuple[str, str, str]]:
    """The mean of every metric besides Dice."""
    means = []
    for metric, _ in _further_scores(scores):
        summary = scores.summary_of(metric.name)
        if metric.is_headline and summary is not None and summary.mean is not None:
            measure = f"within {words_of(scores.tolerance_mm)}" if metric.needs_tolerance else metric.unit
            measure += "" if summary.low is None else f", 95 % interval {filters.interval(summary)}"
            means.append((f"Mean {metric.short_title}", filters.score(summary.mean), measure))
    return means


def _by_segmenter(scores: Scores) -> dict[str, dict[str, PerClass]]:
    """Network -> case -> Dice per class."""
    by_segmenter: dict[str, dict[str, PerClass]] = {}
    algos = dict.fromkeys(algo for c in scores.candidates for algo, _ in c.members)
    for case in scores.cases:
        for algo in algos:
            if algo in case.dice:
                by_segmenter.setdefault(algo, {})[case.name] = case.dice[algo]
    return by_segmenter


def _fold_table(
    classes: Sequence[str],
    scores: dict[str, list[float]],
    fold_of: dict[str, int],
    patients: Mapping[str, int],
    metric: Metric | None = None,
) -> dict[str, Any]:
    from autoseg.evaluation.scores import DICE  # it loads SciPy

    folds = sorted({fold_of[n] for n in scores})
    summary = (metric or DICE).summary(list(scores.values()), classes, [patients.get(n) for n in scores])
    by_fold = {f: [v for n, v in scores.items() if fold_of[n] == f] for f in folds}
    rows = []
    for i, c in enumerate(summary.classes):
        cells = [mean_score([[v[i]] for v in by_fold[f]]) for f in folds]
        rows.append(
            {"name": c.name, "folds": cells, "mean": c.mean, "low": c.low, "high": c.high, "std": c.std,
             "median": c.median, "q25": c.q25, "q75": c.q75, "num": c.num}
        )  # fmt: skip
    cells = [mean_score(by_fold[f]) for f in folds]
    nothing = math.nan
    rows.append(
        {"name": "mean", "folds": cells, "mean": summary.mean, "low": summary.low, "high": summary.high,
         "std": nothing, "median": nothing, "q25": nothing, "q75": nothing, "num": summary.num_cases}
    )  # fmt: skip
    return {"folds": folds, "rows": rows}


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _testing(run: Run, scores: Scores) -> Content | None:
    held = {n: floats(v) for n, v in scores.testing.items()}
    num = 0 if run.summary is None else run.summary.cases.get("testing", 0)
    if not num and not held:
        return None
    from autoseg.evaluation.scores import DICE  # it loads SciPy

    external = scores.external
    return {
        "num": num,
        "scored": len(held),
        "summary": DICE.summary([*held.values()], scores.classes, [scores.patients.get(n) for n in held])
        if held
        else None,
        "external": external,
        "further": [] if external is None else _further_summaries(external.metrics, scores.tolerance_mm),
    }


def comparison(run: Run) -> Content | None:
    """All combinations by mean Dice, and paired tests of the chosen one and of the networks."""
    if not run.scores or len(run.scores.candidates) < 2:
        return None
    chosen, spec = run.scores.chosen, run.ensemble
    known = [(c.mean, c) for c in run.scores.candidates if c.mean is not None]
    known.sort(key=lambda pair: -pair[0])
    rows = [(c.name, mean, _or_nan(c.low), _or_nan(c.high)) for mean, c in known]
    means = {name: case_means(cases) for name, cases in _by_segmenter(run.scores).items()}
    # Without postprocessing, which the others do not have; best_n and best_by_fold have no scores of that kind.
    raw = {case.name: case.dice[chosen] for case in run.scores.cases if chosen in case.dice}
    ensemble = case_means(raw or {n: s["dice"] for n, s in run.scores.ensemble.items()})
    algos = list(means)
    pairs = [(chosen, a) for a in algos if a != chosen] if ensemble else []
    means = {**means, chosen: ensemble} if ensemble else means
    pairs += [(a, b) for i, a in enumerate(algos) for b in algos[i + 1 :] if chosen not in (a, b)]
    return {
        "candidates": [c for _, c in known],
        "costs": {} if spec is None else {row.name: row for row in spec.pareto},
        "given_up": "" if spec is None else spec.given_up,
        "chosen": chosen,
        "raw": bool(raw),
        "plot": figures.intervals(rows, chosen),
        "tests": compare(means, pairs, run.scores.patients),
    }


def cases(run: Run) -> Content | None:
    """Pictures of the worst, median and best case; the table of all."""
    if not run.scores or not run.scores.ensemble:
        return None
    scores, classes = run.scores.ensemble, run.scores.classes
    fold_of = {c.name: c.fold for c in run.scores.cases}
    means = case_means({n: s["dice"] for n, s in scores.items()})
    ranked = sorted(means, key=lambda n: (means[n], by_number(n)))
    if not ranked:
        return None
    warned: dict[str, list[str]] = {}
    for fault in () if run.summary is None else run.summary.warnings:
        warned.setdefault(fault.case, []).append(fault.finding)
    rows = [
        {"name": n, "fold": fold_of[n], "mean": means[n], "dice": scores[n]["dice"],
         "warned": "; ".join(warned.get(n, []))}
        for n in ranked
    ]  # fmt: skip
    volumes = {c.name: c for c in run.cases if c.label_stats is not None}
    values = {} if run.datastats is None else {c.name: c.values for c in run.datastats.data_set.classes}
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in classes}
    for n in ranked:
        for name, dice in zip(classes, scores[n]["dice"], strict=True):
            if dice is not None and n in volumes and name in values:
                points[name].append((volumes[n].volume_ml(values[name]), dice))
    plot = figures.dice_by_volume(classes, points) if any(points.values()) else None
    shown = {
        name: (f"{rank} case", f"Mean Dice {filters.score(means[name])}, fold {fold_of[name]}.", None)
        for rank, name in _worst_to_best(ranked).items()
    }
    return {"classes": classes, "rows": rows, "few": FEW, "plot": plot, "pictures": _pictures(run, shown)}


def _worst_to_best(ranked: Sequence[str]) -> dict[str, str]:
    """The cases to show of those ranked from the worst on, by what they are."""
    if len(ranked) < 3:
        return {"Worst": ranked[0], "Best": ranked[-1]} if len(ranked) > 1 else {"Only": ranked[0]}
    return {"Worst": ranked[0], "Median": ranked[len(ranked) // 2], "Best": ranked[-1]}


def _pictures(run: Run, wanted: Mapping[str, tuple[str, str, Sequence[int] | None]]) -> list[Content]:
    """Pictures of cases: case -> what it is, a sentence, and the voxel to show first, of none the fullest slices."""
    by_name = {c.name: c for c in run.datalist.training} if run.datalist else {}
    label_map = run.label_map
    contents = []
    for name, (what, text, at) in wanted.items():
        case = by_name.get(name)
        prediction = run.workspace.out_of_fold / "ensemble" / f"{name}.nii.gz"
        if case is None or case.label is None or label_map is None:
            continue
        try:
            picture = KEPT.picture(case, prediction, label_map, at)
        except AutosegError as error:
            run.notes.append(f"No picture of {name}: {' '.join(error.messages)}")
            continue
        contents.append(
            {
                "title": f"{what}: {name}" if at is None else f"{name}, {what}",
                "text": text,
                "alt": f"{name}, {what}",
                "picture": picture,
            }
        )
    return contents


def suspicious(run: Run) -> Content | None:
    """Labels that the models contradict, the most suspicious first."""
    if not run.scores:
        return None
    first = list({row.case: row for row in reversed(run.scores.suspicious) if row.parts}.values())[::-1]
    first.sort(key=lambda row: -row.suspicion)
    shown = {
        row.case: (f"{row.name}: {row.kind}", f"{row.words.capitalize()}; {row.parts[0].words}.", row.parts[0].seen)
        for row in first[:MOST_PICTURES]
    }
    return {
        "rows": run.scores.suspicious[:MOST_ROWS],
        "num_rows": len(run.scores.suspicious),
        "few": FEW,
        "pictures": _pictures(run, shown),
    }


def quality(run: Run) -> Content | None:
    """How well the Dice of predictions is predicted, and which of the held-back cases to look at first."""
    if not run.scores:
        return None
    found = run.scores.quality
    if found is None:
        return {"check": None}
    return {
        "check": found.check,
        "plot": figures.predicted_dice(found.check.points) if found.check.points else None,
        "rows": found.held_back[:MOST_ROWS],
        "num_rows": len(found.held_back),
        "few": FEW,
    }


def calibration(run: Run) -> Content | None:
    """How far probabilities can be believed, class by class."""
    if not run.scores or not run.scores.calibration:
        return None
    counts, classes = run.scores.calibration, run.scores.calibrated
    rows = [(name, expected_error(bins), sum(b[0] for b in bins)) for name, bins in zip(classes, counts, strict=True)]
    said = [sum(b[1] for b in bins) / max(1, sum(b[0] for b in bins)) for bins in counts]
    came = [sum(b[2] for b in bins) / max(1, sum(b[0] for b in bins)) for bins in counts]
    table = [
        {
            "name": n,
            "error": e,
            "voxels": v,
            "lean": "too high" if s > c + 0.01 else "too low" if s < c - 0.01 else "fair",
        }
        for (n, e, v), s, c in zip(rows, said, came, strict=True)
    ]
    temperature = run.scores.temperature
    after = [None] * len(table) if temperature is None else temperature.classes_after
    rows_after = [{**row, "after": value} for row, value in zip(table, after, strict=True)]
    return {"plot": figures.reliability(classes, counts), "rows": rows_after, "temperature": temperature}


def robustness(run: Run) -> Content | None:
    """What changed images cost."""
    measured = run.robustness
    return (
        None if measured is None else {"changes": measured.changes, "num": len(measured.cases), "dice": measured.dice}
    )


def learning_curve(run: Run) -> Content | None:
    """What more cases would bring."""
    curve = run.learning_curve
    if curve is None:
        return None
    measured: dict[int, list[float]] = {}
    for point in curve.points:
        if point.dice is not None:
            measured.setdefault(point.num_cases, []).append(point.dice)
    rows = [(p, sum(known) / len(known) if (known := measured.get(p.num_cases)) else None) for p in curve.predictions]
    plot = figures.cases_curve(
        [(p.num_cases, p.dice) for p in curve.points if p.dice is not None],
        [(p.num_cases, p.dice, p.low, p.high) for p in curve.predictions],
    )
    shown = {"algo": curve.algo, "num_cases": curve.num_cases, "caveat": curve.caveat, "failures": curve.failures}
    return {**shown, "rows": rows, "plot": plot}
