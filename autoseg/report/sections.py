"""The sections of the report's page: what stands in each, made from a run's files."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from autoseg.config.units import format_duration
from autoseg.data.datastats import AnalysisSummary
from autoseg.errors import AutosegError, counted
from autoseg.evaluation.score_files import ScoreSummary
from autoseg.export.checklists import CLAIM
from autoseg.export.markdown import plain
from autoseg.export.statements import Statements
from autoseg.report import figures, filters, score_sections
from autoseg.report.gather import Run, clock
from autoseg.report.pictures import KEPT
from autoseg.report.pretraining import pretrainings, scratch_tests
from autoseg.report.score_sections import FEW, MOST_PICTURES, MOST_ROWS, Content
from autoseg.weights.tables import Table, read_table
from autoseg.workspace.files import open_regular
from autoseg.workspace.jobs import EpochLine
from autoseg.workspace.pretraining import pretraining_place
from autoseg.workspace.stored import Unreadable
from autoseg.workspace.workspace import Workspace

if TYPE_CHECKING:
    from autoseg.pseudolabel.audit import AuditRow

ELSEWHERE = ("algo", "fold", "seed", "init_weights")
"""Values of a plan that stand in other sections."""


def glance(run: Run) -> list[tuple[str, str, str]]:
    """The few figures that matter: name, value, and what goes with it."""
    facts = []
    if run.scores:
        chosen = run.scores.dice  # the ensemble's, postprocessing included
        if chosen.mean is not None:
            interval = "" if chosen.low is None else f"95 % interval {filters.interval(chosen)}, "
            told = f"{interval}{_cases(chosen)}"
            again = run.scores.chosen_again
            if again is not None and again.dice.mean is not None:
                told += f"; chosen again without the fold that is scored {filters.score(again.dice.mean)}"
            facts.append(("Mean Dice", filters.score(chosen.mean), told))
            scored = [(c.mean, c.name) for c in chosen.classes if c.mean is not None]
            if len(chosen.classes) > 1 and scored:
                hardest = min(scored, key=lambda pair: pair[0])
                facts.append(("Hardest class", hardest[1], f"Dice {filters.score(hardest[0])}"))
        facts += score_sections.further_means(run.scores)
        facts.append(("Chosen", run.scores.chosen, "combination of networks"))
    if run.summary:
        num = run.summary.cases
        beside = f"{num.get('testing', 0)} testing, {num.get('unlabeled', 0)} unlabeled"
        facts.append(("Training cases", str(num.get("training", 0)), beside))
        faults, warnings = len(run.summary.faults), len(run.summary.warnings)
        facts.append(("Data faults", str(faults), counted(warnings, "warning")))
    seconds = sum(line.seconds for line in run.usage)
    if seconds:
        facts.append(("Time", format_duration(seconds), "all stages together"))
    return facts


def _cases(summary: ScoreSummary) -> str:
    """How many there are, and of how many patients where some have several."""
    cases, patients = summary.num_cases, summary.num_patients
    has_fewer = patients is not None and patients < cases
    return counted(cases, "case") + (f" of {counted(patients or 0, 'patient')}" if has_fewer else "")


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
    known = [v for v in values if v > 0]
    return (min(known), statistics.median(known), max(known)) if known else None


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
        keys = list(dict.fromkeys(e.key for e in entries if e.key not in ELSEWHERE))
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
    return {"rows": rows, "plots": plots, "starts": _starts(run), "tests": scratch_tests(run)}


def _pretraining(run: Run) -> Content | None:
    rows = pretrainings(run)
    return {"rows": rows, "notes": sorted({row["scores"] for row in rows})} if rows else None


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
            picture = KEPT.picture(shown, case.completed.label, run.label_map)
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


def _value(value: Any, most: int = 120) -> str:
    """A setting as it would stand in YAML, cut where it is long."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else text[: most - 3] + "..."


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


def _paper(run: Run) -> Content | None:
    """The items of CLAIM 2024 that the run answers, and what is left to its authors."""
    if not run.scores:
        return None
    statements = Statements.of(run.workspace, marks=False)
    rows = [(item.number, item.subject, plain(item.answer(statements)), item.to_write(statements)) for item in CLAIM]
    return {"rows": rows, "answered": sum(bool(told) for _, _, told, _ in rows)}


SECTIONS: tuple[tuple[str, str, Callable[[Run], Content | None], str], ...] = (
    ("data", "The data", _data, "autoseg analyze"),
    ("plan", "The plan", _plan, "autoseg generate"),
    ("pretraining", "Pretraining", _pretraining, "autoseg pretrain"),
    ("training", "Training", _training, "autoseg train"),
    ("scores", "Scores", score_sections.scores, "autoseg ensemble"),
    ("comparison", "Comparison", score_sections.comparison, "autoseg ensemble"),
    ("cases", "Cases", score_sections.cases, "autoseg ensemble"),
    ("quality", "Predicted quality", score_sections.quality, "autoseg ensemble"),
    ("suspicious", "Suspicious labels", score_sections.suspicious, "autoseg ensemble"),
    ("pseudolabels", "Pseudo-labels", _pseudolabels, "autoseg pseudolabel"),
    ("calibration", "Calibration", score_sections.calibration, "autoseg ensemble"),
    ("robustness", "Robustness", score_sections.robustness, "autoseg ensemble"),
    ("learning-curve", "More cases", score_sections.learning_curve, "autoseg learning_curve"),
    ("paper", "For the paper", _paper, "autoseg ensemble"),
    ("usage", "Time, memory, disk", _usage, "autoseg run"),
    ("reproduce", "How to make it again", _reproduce, "autoseg run"),
)
"""Each: anchor, title, what makes its content (None: not there yet), the command that gets it there."""


def sections_of(workspace: Workspace) -> list[tuple[str, str, Callable[[Run], Content | None], str]]:
    """The sections that a run has: pseudo-labels only where it has rounds of training, what is optional where it is."""
    has_rounds = Unreadable().or_else(True, lambda: workspace.num_rounds > 1)
    left_out = {
        "pseudolabels": not has_rounds,
        "pretraining": not pretraining_place(workspace).root.is_dir(),
        "robustness": not workspace.robustness.exists(),
        "learning-curve": not (workspace.learning_curve / "curve.json").exists(),
    }
    return [section for section in SECTIONS if not left_out.get(section[0], False)]
