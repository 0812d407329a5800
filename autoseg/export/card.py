"""The card of a packed model: what it segments, how well, and what it learned from, without a case's name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import torch

from autoseg.config.templates import read_template_text
from autoseg.data.datastats import DataStats, Spread
from autoseg.errors import counted
from autoseg.evaluation.score_files import ClassScores, Scores, read_scores
from autoseg.evaluation.tolerances import words_of
from autoseg.export.markdown import cell
from autoseg.export.references import used_in
from autoseg.export.source import Source
from autoseg.export.statements import FEWEST, Statements
from autoseg.inference.ensemble_spec import EnsembleSpec
from autoseg.plan import Plan
from autoseg.terminal import printable
from autoseg.version import __version__
from autoseg.workspace.stored import read_stored

UNKNOWN_LICENCE = "not known; ask whoever made the data"


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """What the card is made of."""

    name: str
    modality: str
    """As the settings have it; empty: not known."""
    licence: str
    """Of the training data; empty: not known."""
    spec: EnsembleSpec
    plans: dict[str, Plan]
    """Job -> plan, the members first."""
    weights_bytes: dict[str, int]
    """Job -> size of its weights."""
    scores: Scores | None
    data: DataStats | None
    run: Statements
    """What the run says of itself, as `autoseg methods` has it."""


def weights_bytes(weights: Mapping[str, torch.Tensor]) -> int:
    """Size of a job's weights, however they are stored."""
    return sum(tensor.numel() * tensor.element_size() for tensor in weights.values())


def facts_of(model: Source, licence: str, sizes: dict[str, int]) -> CardFacts:
    """What a run's chosen ensemble has to say on its card."""
    assert model.spec is not None, "no jobs were named"
    stats = model.run.datastats
    return CardFacts(
        name=model.title,
        modality=model.text_of("modality"),
        licence=licence,
        spec=model.spec,
        plans=model.plans,
        weights_bytes=sizes,
        scores=read_scores(model.workspace),
        data=read_stored(stats, DataStats) if stats.exists() else None,
        run=Statements.of(model.run, marks=False),
    )


def card_text(facts: CardFacts) -> str:
    """README.md of a packed model: front matter as Hugging Face reads it, then Markdown."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(read_template_text("common", "card.md.j2"))
    return template.render(**_context(facts)).rstrip() + "\n"


def _context(facts: CardFacts) -> dict[str, Any]:
    modality = cell(facts.modality)
    return {
        "name": cell(facts.name) or "model",
        "version": __version__,
        "licence": cell(facts.licence) or UNKNOWN_LICENCE,
        "licence_line": yaml_text(facts.licence or UNKNOWN_LICENCE),
        "modality": modality,
        "modality_tag": re.sub(r"[^a-z0-9-]+", "-", modality.lower()).strip("-"),
        "num_channels": len(next(iter(facts.plans.values())).channels),
        **_scores(facts),
        "rules": [f"{cell(rule.name)}: {rule.words}" for rule in facts.spec.postprocessing],
        "data": _data_rows(facts.data) if facts.data is not None else None,
        "models": [_model_row(name, plan, facts.weights_bytes[name]) for name, plan in facts.plans.items()],
        **_sentences(facts.run),
        "combine": "vote" if facts.spec.combine == "vote" else "the mean of their probabilities",
    }


def _sentences(run: Statements) -> dict[str, Any]:
    """What the card shares with the methods section."""
    evaluation = [run.metrics(), run.statistics(), run.selection(), run.calibration()]
    evaluation += [run.predicted_quality(), run.robustness()]
    training = [run.preprocessing(), run.networks(), run.training(), run.initial_weights()]
    sentences: dict[str, Any] = {
        "external": run.external(),
        "evaluation": [text for text in evaluation if text],
        "training": [text for text in training if text],
        "subgroups": run.subgroup_table(),
        "limits": run.limits(),
        "software": run.software(),
        "fewest": FEWEST,
    }
    cited = "\n".join([*sentences["evaluation"], *sentences["training"]])
    return {**sentences, "references": used_in(cited)}


def _scores(facts: CardFacts) -> dict[str, Any]:
    """The table of classes: their values, and what each metric says of them."""
    label_map = next(iter(facts.plans.values())).label_map.named
    scores = facts.scores
    summaries = {} if scores is None else {k: s for k in ("dice", "nsd") if (s := scores.summary_of(k)) is not None}
    by_class = [{c.name: c for c in summary.classes} for summary in summaries.values()]
    classes = []
    for name, values in zip(label_map.names, label_map.values, strict=True):
        own = [table.get(name) for table in by_class]
        num = own[0].num if own and own[0] else 0
        classes.append([cell(name), ", ".join(map(str, values)), num, *(_score(s) for s in own)])
    num_scored = next((s.num_cases for s in summaries.values()), 0)
    if summaries:
        classes.append(["mean", "", num_scored, *(_mean(s.mean, s.low, s.high) for s in summaries.values())])
    return {
        "names": [cell(name) for name in label_map.names],
        "classes": classes,
        "metrics": list(summaries),
        "num_scored": num_scored,
        "tolerance": cell(words_of(scores.tolerance_mm)) if scores is not None and "nsd" in summaries else "",
    }


def yaml_text(text: str) -> str:
    """A text as a YAML scalar in quotes."""
    return '"' + printable(text, one_line=True).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _score(scores: ClassScores | None) -> str:
    return "" if scores is None else _mean(scores.mean, scores.low, scores.high)


def _mean(mean: float | None, low: float | None, high: float | None) -> str:
    if mean is None or mean != mean:
        return "not counted"
    known = low is not None and high is not None and low == low
    return f"{mean:.4f} ({low:.4f} to {high:.4f})" if known else f"{mean:.4f}"


def _data_rows(stats: DataStats) -> dict[str, Any]:
    """The figures of a data set: over all cases, never of one by its name."""
    data = stats.data_set
    rows = [
        _row("Voxels along X, Y, Z", data.shape, "{:.0f}"),
        _row("Voxel size (mm)", data.spacing_mm, "{:.3g}"),
        _row("Field of view (mm)", data.size_mm, "{:.0f}"),
    ]
    rows += [
        [f"{cell(c.name)} (ml, {counted(c.num_cases, 'case')})", *(f"{v:.3g}" for v in _ends(c.volume_ml))]
        for c in data.classes
        if c.volume_ml is not None
    ]
    groups = len(stats.label_groups)
    annotated = "all for the same classes" if groups <= 1 else f"in {groups} groups annotated for different classes"
    return {"rows": rows, "num_cases": stats.stats_summary.n_cases, "annotated": annotated}


def _ends(spread: Spread[Any]) -> tuple[Any, Any, Any]:
    """The middle, and between what most cases lie: the least and the most are some patient's own."""
    return spread.median, spread.percentile_10_0, spread.percentile_90_0


def _row(title: str, spread: Spread[tuple[float, float, float]], form: str) -> list[str]:
    return [title, *(" x ".join(form.format(v) for v in triple) for triple in _ends(spread))]


def _model_row(name: str, plan: Plan, weights_bytes: int) -> Sequence[str]:
    spacing = " x ".join(f"{mm:.4g}" for mm in plan.resample_resolution)
    patch = " x ".join(map(str, plan.roi_size))
    return cell(name), plan.algo, str(plan.fold), spacing, patch, f"{weights_bytes / 1e6:.1f} MB"
