"""The report's page: sections made from a run's files, laid out by report.html.j2, written as one file.

Nothing on the page is fetched: style, script and pictures are part of it, and its policy forbids all requests.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from autoseg.config.units import format_duration
from autoseg.data.datalists.cases import Case
from autoseg.data.datastats import AnalysisSummary
from autoseg.data.formats.table import image_digest
from autoseg.data.labels import LabelMap
from autoseg.errors import AutosegError, ConfigError, WorkspaceError
from autoseg.evaluation.calibration import expected_error
from autoseg.evaluation.intervals import case_means, compare
from autoseg.evaluation.score_files import PerClass, Scores, ScoreSummary, floats
from autoseg.evaluation.tolerances import Tolerance, words_of
from autoseg.report import figures
from autoseg.report.gather import Run, by_number, clock, inputs_digest, last_finished, stages_shown
from autoseg.report.pictures import CasePicture, picture_case
from autoseg.terminal import printable
from autoseg.version import __version__
from autoseg.weights.tables import Table, read_table
from autoseg.workspace.files import digest, open_regular, write_text
from autoseg.workspace.jobs import EpochLine
from autoseg.workspace.layout import check_readable
from autoseg.workspace.stages import Stage
from autoseg.workspace.stored import Unreadable
from autoseg.workspace.workspace import Workspace

if TYPE_CHECKING:
    from autoseg.evaluation.scores import Metric
    from autoseg.pseudolabel.audit import AuditRow

log = logging.getLogger(__name__)

Content = dict[str, Any]
FEW = 12
"""Rows of a list that are shown at once; more are folded away."""
MOST_ROWS = 500
"""Rows of a long list that are on the page at all; audit.json has the others."""
MOST_PICTURES = 3
"""Cases whose pseudo-labels are shown in pictures."""


def check_run(workspace: Workspace) -> None:
    """Refuse a folder that is no run's.

    Raises:
        WorkspaceError: It is none.
    """
    check_readable(workspace.run)
    if not workspace.settings.exists() and not workspace.datastats.exists():
        raise WorkspaceError(f"{workspace.root}: not a run's folder. Give a run's folder with --work_dir.")


def is_current(workspace: Workspace, stages: Sequence[Stage[Any]]) -> bool:
    """Whether the report shows the run as it is; it carries a digest of what it was made from."""
    workspace = last_finished(workspace)
    if not workspace.report.exists():
        return False
    with open_regular(workspace.report) as file:
        return _mark(inputs_digest(workspace, stages)).encode() in file.read(4096)


def _mark(inputs: str) -> Markup:
    return Markup('<meta name="autoseg-inputs" content="{}">').format(inputs)


def make_report(
    work_dir: Path, stages: Sequence[Stage[Any]], *, output: Path | None = None, live: bool = False
) -> Path:
    """Write the report of a run, as far as it is.

    Args:
        work_dir: the run's folder.
        stages: the table of stages, whose progress stands on top.
        output: the file; None: `report.html` in the run's folder.
        live: for `autoseg report --serve`: the page asks its server for news.

    Returns:
        The file.

    Raises:
        WorkspaceError: The folder is no run's, or a file of it is damaged.
        ConfigError: The output cannot be written.
    """
    workspace = last_finished(Workspace(work_dir))
    target = output or workspace.report
    text = render(workspace, stages, live=live)
    try:
        write_text(target, text)
    except OSError as error:
        advice = "Give a file in a folder that you may write to with --output."
        raise ConfigError(f"{target}: cannot be written ({error.strerror}). {advice}") from None
    return target


def render(workspace: Workspace, stages: Sequence[Stage[Any]], *, live: bool = False) -> str:
    """The page's HTML.

    Raises:
        WorkspaceError: The folder is no run's.
    """
    check_run(workspace)
    run = Run(workspace)
    sections = []
    _shown_pictures.clear()
    for name, title, make, command in sections_of(workspace):
        try:
            content = make(run)
        except AutosegError as error:
            content = {"fault": " ".join(error.messages)}
        sections.append({"id": name, "title": title, "command": command, **(content or {"empty": True})})
    for key in set(_known_pictures) - _shown_pictures:
        del _known_pictures[key]
    environment = Environment(
        loader=PackageLoader("autoseg.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(
        score=_score,
        interval=_interval,
        signed=_signed,
        pvalue=_pvalue,
        number=_number,
        size=_size,
        duration=format_duration,
        figure=_figure,
        breakable=_breakable,
    )
    folder = Path(__file__).parent
    page = environment.get_template("report.html.j2").render(
        name=run.name,
        version=__version__,
        made=clock(time.time()),
        stages=stages_shown(workspace, stages),
        glance=_glance(run),
        sections=sections,
        notes=run.notes,
        style=Markup((folder / "report.css").read_text(encoding="utf-8")),
        script=Markup((folder / "report.js").read_text(encoding="utf-8")),
        mark=_mark(inputs_digest(workspace, stages)),
        live=live,
    )
    return printable(page)  # marks of direction and control characters of names, too, are only shown


# -- how values are shown


def _score(value: float | None, digits: int = 3) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _interval(item: Any) -> str:
    """`low` and `high` of a summary or a row; a dash where too few patients say nothing."""
    low, high = (item["low"], item["high"]) if isinstance(item, dict) else (item.low, item.high)
    return "-" if _score(low) == "-" else f"{_score(low)} to {_score(high)}"


def _signed(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:+.4f}"


def _pvalue(value: float | None) -> str:
    return "-" if value is None else "< 0.001" if value < 0.001 else _score(value)


def _number(value: float | None) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _size(num_bytes: float | None) -> str:
    if num_bytes is None:
        return "-"
    for unit in ("B", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def _figure(plot: figures.Plot, caption: str) -> Markup:
    return Markup(
        '<figure class="plot"><img src="data:image/svg+xml;base64,{}" alt="{}"><figcaption>{}</figcaption></figure>'
    ).format(plot.svg, plot.alt, caption)


def _breakable(text: str) -> Markup:
    """A name with + that may be broken after it."""
    return Markup("+<wbr>").join(text.split("+"))


def _value(value: Any, most: int = 120) -> str:
    """A setting as it would stand in YAML, cut where it is long."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else text[: most - 3] + "..."


# -- the sections


def _glance(run: Run) -> list[tuple[str, str, str]]:
    """The few figures that matter: name, value, and what goes with it."""
    facts = []
    if run.scores:
        chosen = run.scores.dice  # the ensemble's, postprocessing included
        if chosen.mean is not None:
            interval = f"95 % interval {_interval(chosen)}"
            facts.append(("Mean Dice", _score(chosen.mean), f"{interval}, {chosen.num_cases} cases"))
            counted = [(c.mean, c.name) for c in chosen.classes if c.mean is not None]
            if len(chosen.classes) > 1 and counted:
                hardest = min(counted, key=lambda pair: pair[0])
                facts.append(("Hardest class", hardest[1], f"Dice {_score(hardest[0])}"))
        facts += _further_means(run.scores)
        facts.append(("Chosen", run.scores.chosen, "combination of networks"))
    if run.summary:
        num = run.summary.cases
        beside = f"{num.get('testing', 0)} testing, {num.get('unlabeled', 0)} unlabeled"
        facts.append(("Training cases", str(num.get("training", 0)), beside))
        faults, warnings = len(run.summary.faults), len(run.summary.warnings)
        facts.append(("Data faults", str(faults), f"{warnings} warning{'s' * (warnings != 1)}"))
    seconds = sum(line.seconds for line in run.usage)
    if seconds:
        facts.append(("Time", format_duration(seconds), "all stages together"))
    return facts


def _data(run: Run) -> Content | None:
    if not run.datastats:
        return None
    data_set = run.datastats.data_set
    labelled = [c for c in run.cases if c.label_stats is not None]
    volumes = {c.name: [case.volume_ml(c.values) for case in labelled] for c in data_set.classes}
    plots = []
    if run.cases:  # none where their file cannot be read
        sizes = figures.geometry(
            [c.image_stats.shape[0] for c in run.cases], [c.image_stats.spacing for c in run.cases]
        )
        plots.append(
            (sizes, f"Sizes and spacings of {len(run.cases)} training cases, along X (right), Y (front), Z (head).")
        )
    ranges = {
        c.name: [(i.percentile_00_5, i.median, i.percentile_99_5) for i in c.image_foreground_stats.intensity]
        for c in labelled
        if c.image_foreground_stats is not None and c.image_foreground_stats.intensity
    }
    if ranges:
        plots.append((figures.intensities(ranges), "Intensities inside the classes, case by case."))
    if any(v > 0 for sizes in volumes.values() for v in sizes):
        plots.append((figures.volumes(volumes), "Volume of each class, in the cases where it occurs."))
    return {
        "plots": plots,
        "classes": [{**c.model_dump(), "median": _median_of(volumes[c.name])} for c in data_set.classes],
        "intensity": data_set.foreground_intensity,
        "orientations": data_set.orientations,
        "frame_rule": data_set.frame_rule,
        "lateral": data_set.lateral,
        "groups": run.datastats.label_groups,
        "few": FEW,
        **_judged(run.summary),
    }


def _judged(summary: AnalysisSummary | None) -> Content:
    """What the analysis found wrong, and how many cases of each role there are."""
    if summary is None:
        return {"roles": {}, "hint": "", "quarantined": (), "faults": []}
    faults = [("fault", f) for f in summary.faults] + [("warning", f) for f in summary.warnings]
    return {"roles": summary.cases, "hint": summary.hint, "quarantined": summary.quarantined, "faults": faults}


def _median_of(values: Sequence[float]) -> tuple[float, float, float] | None:
    known = sorted(v for v in values if v > 0)
    return (known[0], known[len(known) // 2], known[-1]) if known else None


def _plan(run: Run) -> Content | None:
    if not run.plans:
        return None
    algos: dict[str, list[Content]] = {}
    for algo in dict.fromkeys(job.algo for job in run.jobs):
        entries = [e for e in run.plans if e.place.rpartition("_")[0] == algo]
        places = list(dict.fromkeys(e.place for e in entries))
        rows: dict[tuple[str, ...], list[str]] = {}
        for e in entries:
            rows.setdefault((e.key, _value(e.value), e.origin, e.rule), []).append(e.place)
        keys = list(dict.fromkeys(e.key for e in entries if e.key not in ("algo", "fold", "seed")))
        algos[algo] = [
            {
                "key": key, "value": value, "origin": origin, "rule": rule,
                "folds": "" if where == places else ", ".join(p.rpartition("_")[2] for p in where),
            }
            for key in keys
            for (other, value, origin, rule), where in rows.items()
            if other == key
        ]  # fmt: skip
    return {"algos": algos, "networks": run.settings.get("algos")}


def _training(run: Run) -> Content | None:
    if not run.jobs:
        return None
    curves: dict[str, dict[int, Sequence[EpochLine]]] = {}
    rows = []
    for job in run.jobs:
        epochs = run.curve(job)
        if epochs:
            curves.setdefault(job.algo, {})[job.fold] = epochs
        last = epochs[-1] if epochs else None
        left = last.time_left_s if last is not None and job.state == "running" else None
        rows.append(
            {
                "name": job.name, "state": job.state, "dice": job.dice, "seconds": job.seconds,
                "epoch": last.epoch if last else None, "step": last.step if last else None,
                "loss": last.train_loss if last else None, "left": left,
                "error": job.error.strip().splitlines()[0] if job.error.strip() else "", "warnings": job.warnings,
            }
        )  # fmt: skip
    plots = [(figures.learning_curves(a, f), f"{a}: loss and Dice on the held-out fold.") for a, f in curves.items()]
    return {"rows": rows, "plots": plots, "starts": _starts(run)}


def _starts(run: Run) -> list[Content]:
    """What networks started with in place of random numbers; jobs that started alike stand together."""
    together: dict[str, tuple[Table, list[str]]] = {}
    for job in run.jobs:
        paths = run.workspace.job_dir(job.algo, job.fold)
        table = run.read_or(None, partial(read_table, paths))
        if table is not None:
            together.setdefault(f"{job.algo} {table.model_dump_json()}", (table, []))[1].append(job.name)
    return [
        {"jobs": ", ".join(names), "summary": table.summary, "rows": table.notable[:MOST_ROWS]}
        for table, names in together.values()
    ]


def _scores(run: Run) -> Content | None:
    """Tables of class by fold and boxes of all cases, for each network and the ensemble."""
    if not run.scores:
        return None
    classes, chosen = run.scores.classes, run.scores.chosen
    fold_of = {c.name: c.fold for c in run.scores.cases}
    by_algo = _by_segmenter(run.scores)
    label = f"ensemble ({chosen})" if chosen not in by_algo else chosen
    ensemble = {n: floats(scores["dice"]) for n, scores in run.scores.ensemble.items()}
    groups = {label: list(ensemble.values())} if ensemble else {}
    groups |= {name: [floats(v) for v in cases.values()] for name, cases in by_algo.items() if name != label}
    patients, spec = run.scores.patients, run.ensemble
    tables = [(f"Dice of the {label}", _fold_table(classes, ensemble, fold_of, patients))] if ensemble else []
    others = [
        (f"Dice of {name}", _fold_table(classes, {n: floats(v) for n, v in cases.items()}, fold_of, patients))
        for name, cases in by_algo.items()
        if name != label
    ]
    plots = [(figures.score_boxes("Dice", classes, groups), "Every case's Dice on data its models never saw.")]
    lesions: list[tuple[str, Content]] = []
    for metric, by_case in _further_scores(run.scores):
        title, axis, caption = metric.texts(run.scores.tolerance_mm)
        table = f"{title} of the {label}", _fold_table(classes, by_case, fold_of, patients, metric)
        (lesions if metric.family == "lesions" else tables).append(table)
        if metric.family == "lesions":
            continue
        boxes = figures.score_boxes(axis, classes, {label: list(by_case.values())}, is_share=metric.is_share)
        plots.append((boxes, caption))
    return {
        "tables": tables,
        "others": others,
        "lesions": lesions,
        "again": run.scores.chosen_again,
        "subgroups": run.scores.subgroups,
        "select_by": _words_of_metric(run.scores.metric),
        "plots": plots,
        "testing": _testing(run, run.scores),
        "rules": () if spec is None else spec.postprocessing,
        "raw": None if spec is None else spec.dice_raw,
        "mean": None if spec is None else spec.dice,
        "gaps": run.scores.gaps,
        "failures": run.scores.failures,
    }


def _further_scores(scores: Scores) -> list[tuple[Metric, dict[str, list[float]]]]:
    """Every metric besides Dice that was computed for the ensemble: case -> value per class."""
    from autoseg.evaluation.scores import METRICS  # it loads torch

    by_case = scores.ensemble
    computed = [m for m in METRICS[1:] if by_case and all(m.name in values for values in by_case.values())]
    return [(m, {n: floats(values[m.name]) for n, values in by_case.items()}) for m in computed]


def _words_of_metric(name: str) -> str:
    from autoseg.evaluation.scores import metric_named  # it loads torch

    return metric_named(name).short_title


def _further_summaries(
    summaries: Mapping[str, ScoreSummary], tolerance_mm: Tolerance
) -> list[tuple[str, ScoreSummary]]:
    """Title of each metric besides Dice, and its summary."""
    from autoseg.evaluation.scores import METRICS  # it loads torch

    return [(m.texts(tolerance_mm)[0], summaries[m.name]) for m in METRICS[1:] if m.name in summaries]


def _further_means(scores: Scores) -> list[tuple[str, str, str]]:
    """The mean of every metric besides Dice."""
    means = []
    for metric, _ in _further_scores(scores):
        summary = scores.summary_of(metric.name)
        if metric.is_headline and summary is not None and summary.mean is not None:
            measure = f"within {words_of(scores.tolerance_mm)}" if metric.needs_tolerance else metric.unit
            means.append((f"Mean {metric.short_title}", _score(summary.mean), measure))
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
    from autoseg.evaluation.metrics import mean_score  # it loads torch
    from autoseg.evaluation.scores import DICE

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
    from autoseg.evaluation.scores import DICE  # it loads torch

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


def _comparison(run: Run) -> Content | None:
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


def _cases(run: Run) -> Content | None:
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
    wanted = {"Worst": ranked[0], "Median": ranked[len(ranked) // 2], "Best": ranked[-1]}
    if len(ranked) < 3:
        wanted = {"Worst": ranked[0], "Best": ranked[-1]} if len(ranked) > 1 else {"Only": ranked[0]}
    return {"classes": classes, "rows": rows, "few": FEW, "plot": plot, "pictures": _pictures(run, wanted, means)}


_known_pictures: dict[str, CasePicture] = {}
"""Of the last page, so that a live view does not make them anew."""
_shown_pictures: set[str] = set()
"""Keys of those on the page that is being made."""


def _picture(case: Case, prediction: Path, label_map: LabelMap) -> CasePicture:
    """As `picture_case`, made once as long as the files stay as they are."""
    files = [*case.images, *([] if case.label is None else [case.label]), prediction]
    key = digest([str(prediction), case.segment_values, *(image_digest(p) for p in files if p.exists())])
    if key not in _known_pictures:
        _known_pictures[key] = picture_case(case, prediction, label_map)
    _shown_pictures.add(key)
    return _known_pictures[key]


def _pictures(run: Run, wanted: dict[str, str], means: dict[str, float]) -> list[Content]:
    by_name = {c.name: c for c in run.datalist.training} if run.datalist else {}
    label_map = run.label_map
    contents = []
    for rank, name in wanted.items():
        case = by_name.get(name)
        prediction = run.workspace.out_of_fold / "ensemble" / f"{name}.nii.gz"
        if case is None or case.label is None or label_map is None:
            continue
        try:
            picture = _picture(case, prediction, label_map)
        except AutosegError as error:
            run.notes.append(f"No picture of {name}: {' '.join(error.messages)}")
            continue
        contents.append(
            {
                "title": f"{rank} case: {name}",
                "text": f"Mean Dice {_score(means[name])}, fold {case.fold}.",
                "alt": f"{name}, {rank.lower()} case, Dice {_score(means[name])}",
                "picture": picture,
            }
        )
    return contents


def _suspicious(run: Run) -> Content | None:
    """Labels that the models contradict, the most suspicious first."""
    if not run.scores:
        return None
    return {"rows": run.scores.suspicious[:MOST_ROWS], "num_rows": len(run.scores.suspicious), "few": FEW}


def _pseudolabels(run: Run) -> Content | None:
    """What was accepted and rejected, and pictures of the most suspicious labels that were accepted."""
    if not run.audit:
        return None
    rows = run.audit.rows
    accepted = [row for row in rows if not row.rejected]
    cases = list(dict.fromkeys(row.case for row in accepted))[:MOST_PICTURES]
    roles = run.audited.training if run.audited else ()
    by_name = {case.name: case for case in roles}
    pictures = []
    for name in cases:
        case = by_name.get(name)
        if case is None or case.completed is None or run.label_map is None:
            continue
        why = [row for row in accepted if row.case == name][0]
        try:
            shown = case if case.label is not None else case.for_training()
            picture = _picture(shown, case.completed.label, run.label_map)
        except AutosegError as error:
            run.notes.append(f"No picture of {name}: {' '.join(error.messages)}")
            continue
        what = f"{why.name}: {_words_of(why)}"
        title = name if case.label is not None else f"{name}, an unlabeled image: all lines are pseudo-labels"
        pictures.append({"title": title, "text": what, "alt": f"pseudo-labels of {name}", "picture": picture})
    return {
        **dict(run.audit),
        "few": FEW,
        "rows": rows[:MOST_ROWS],
        "num_rows": len(rows),
        "pictures": pictures,
        "earlier": run.earlier_audits,
    }


def _words_of(row: AuditRow) -> str:
    """What speaks against a pseudo-label, in words."""
    figures_of = (("disagreement", row.disagreement), ("confidence", row.confidence))
    words = [f"{name} {value:.2f}" for name, value in figures_of if value is not None]
    if row.volume_z is not None:
        words.append(f"volume {row.volume_ml:.3g} ml, {row.volume_z:+.1f} deviations from the labelled cases")
    return ", ".join(words) + "."


def _calibration(run: Run) -> Content | None:
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
            "lean": "too sure" if s > c + 0.01 else "too unsure" if s < c - 0.01 else "fair",
        }
        for (n, e, v), s, c in zip(rows, said, came, strict=True)
    ]
    return {"plot": figures.reliability(classes, counts), "rows": table}


def _usage(run: Run) -> Content | None:
    if not run.usage:
        return None
    stages: dict[str, Content] = {}
    for line in run.usage:
        row = stages.setdefault(
            line.stage, {"times": 0, "seconds": 0.0, "cpu_s": 0.0, "peak_bytes": 0, "gpu_bytes": None, "last": 0.0}
        )
        row["times"] += 1
        row["seconds"] += line.seconds
        row["cpu_s"] += line.cpu_s
        row["peak_bytes"] = max(row["peak_bytes"], line.peak_bytes)
        if line.gpu_bytes is not None:
            row["gpu_bytes"] = max(row["gpu_bytes"] or 0, line.gpu_bytes)
        row["last"], row["ended"], row["disk_bytes"] = clock(line.started), line.ended, line.disk_bytes
    jobs = sum(job.seconds for job in run.jobs)
    most = max(row["seconds"] for row in stages.values()) or 1.0
    return {"rows": list(stages.items()), "most": most, "jobs_s": jobs}


def _input_text(run: Run) -> str:
    """The run's copy of input.yaml; a link, which might show any file of this machine on the page, is not followed."""
    try:
        with open_regular(run.workspace.input, follow=False) as file:
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        run.notes.append(f"{run.workspace.input}: cannot be read ({error.strerror}).")
        return ""


def _reproduce(run: Run) -> Content | None:
    if not run.settings:
        return None
    entries = [(e.key, _value(e.value), e.origin) for e in run.settings.values()]
    return {
        "given": [e for e in entries if e[2] != "default"],
        "default": [e for e in entries if e[2] == "default"],
        "seed": run.seed,
        "environment": run.environment,
        "commands": [{"command": line.command, "when": clock(line.time)} for line in run.commands],
        "input": _input_text(run),
    }


SECTIONS: tuple[tuple[str, str, Callable[[Run], Content | None], str], ...] = (
    ("data", "The data", _data, "autoseg analyze"),
    ("plan", "The plan", _plan, "autoseg generate"),
    ("training", "Training", _training, "autoseg train"),
    ("scores", "Scores", _scores, "autoseg ensemble"),
    ("comparison", "Comparison", _comparison, "autoseg ensemble"),
    ("cases", "Cases", _cases, "autoseg ensemble"),
    ("suspicious", "Suspicious labels", _suspicious, "autoseg ensemble"),
    ("pseudolabels", "Pseudo-labels", _pseudolabels, "autoseg pseudolabel"),
    ("calibration", "Calibration", _calibration, "autoseg ensemble"),
    ("usage", "Time, memory, disk", _usage, "autoseg run"),
    ("reproduce", "How to make it again", _reproduce, "autoseg run"),
)
"""Each: anchor, title, what makes its content (None: not there yet), the command that gets it there."""


def sections_of(workspace: Workspace) -> list[tuple[str, str, Callable[[Run], Content | None], str]]:
    """The sections that a run has: pseudo-labels only where it has rounds of training."""
    has_rounds = Unreadable().or_else(True, lambda: workspace.num_rounds > 1)
    return [section for section in SECTIONS if section[0] != "pseudolabels" or has_rounds]
