"""Where every value of a run came from: settings and plans, with origin and rule; and what its stages do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from autoseg.config.docs import doc_lines, setting_docs
from autoseg.config.load import load_settings
from autoseg.config.networks import AUTO
from autoseg.config.settings import Settings
from autoseg.config.types import suggest
from autoseg.errors import ConfigError, WorkspaceError, some_of
from autoseg.weights.tables import Table, read_table
from autoseg.workspace.jobs import JobDir, StoredOrigin, read_origins
from autoseg.workspace.layout import check_readable
from autoseg.workspace.networks import read_chosen
from autoseg.workspace.settings import read_settings
from autoseg.workspace.stages import Stage
from autoseg.workspace.stored import read_stored
from autoseg.workspace.workspace import Workspace

MOST_TENSORS = 12
"""Tensors that were not taken as they are which `explain` names; the job's init_weights.json has all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One value and all that is known of its making."""

    place: str
    """`settings`, or the name of a job."""
    key: str
    """Dotted where nested."""
    value: Any
    origin: str
    """default, planner, FILE:LINE, command line, or edited by hand."""
    rule: str = ""
    """How it was derived, with the numbers that went in."""
    derived: Any = None
    """What the rule gave, where a hand changed it afterwards."""


def explain(work_dir_or_input: Path, stages: Sequence[Stage[Any]], key: str | None = None) -> str:
    """Tell each value of a run, or one of them in full, or what a stage does.

    Args:
        work_dir_or_input: A run's folder, or the input.yaml whose work_dir is meant.
        stages: The table of stages.
        key: A setting or planned value, dotted inside a block or a job (`segresnet.batch_size`, `dints_0.roi_size`), or
            the name of a stage.

    Returns:
        Lines to print.

    Raises:
        ConfigError: input.yaml is faulty, or there is no such key.
        WorkspaceError: The folder is no run.
    """
    if work_dir_or_input.is_dir():
        workspace = Workspace(work_dir_or_input)
        if not workspace.settings.exists():
            raise WorkspaceError(
                f"{work_dir_or_input}: no settings.yaml, so not a run's folder. Give a run's work_dir."
            )
        check_readable(workspace.run)
        entries = stored_settings(workspace)
    else:
        settings, origins = load_settings(work_dir_or_input)
        workspace = Workspace(settings.work_dir)
        entries = _with_choice(workspace, _current_settings(settings, origins))
    workspace = workspace.latest()
    entries += [entry for folder in job_folders(workspace) for entry in plan_entries(folder)]
    if key is None:
        return _table(entries)
    named = [_stage_text(stage, workspace) for stage in stages if stage.name == key]
    if named and key not in setting_docs():
        return named[0]
    return "\n\n".join([*named, _detail(entries, key)])


def _stage_text(stage: Stage[Any], place: Workspace) -> str:
    """What a stage does, and how far it is in the last round."""
    folder = {
        "run": "the run's folder",
        "each round": "the run's folder, or that of each round of training",
        "between rounds": "the folder of each round of training but the first, before its other stages",
    }[stage.where]
    return "\n".join(
        [
            f"{stage.name}: a stage of the run. {stage.doc}",
            f"  reads:    {stage.reads.replace('`', '')}",
            f"  writes:   {stage.writes.replace('`', '')}",
            f"  works in: {folder}",
            f"  so far:   {stage.far(place)}",
        ]
    )


def stored_settings(workspace: Workspace) -> list[Entry]:
    """Every setting the run was started with; those left to the planner are not among them."""
    entries = []
    for key, item in read_settings(workspace).items():
        values = dict(_flatten(item.value, f"{key}.")) if isinstance(item.value, dict) and item.value else {}
        values = values or {key: item.value}
        entries += [
            Entry(place="settings", key=k, value=v, origin=item.origin) for k, v in values.items() if v is not None
        ]
    return _with_choice(workspace, entries)


def _with_choice(workspace: Workspace, entries: list[Entry]) -> list[Entry]:
    """The settings with what `algos: auto` came to, once that is known."""
    return [
        Entry(place=entry.place, key=entry.key, value=list(chosen.networks), origin="planner", rule=chosen.rule)
        if (entry.key, entry.value) == ("algos", AUTO) and (chosen := read_chosen(workspace))
        else entry
        for entry in entries
    ]


def _current_settings(settings: Settings, origins: dict[str, str]) -> list[Entry]:
    values = dict(_flatten(settings.model_dump(mode="json")))
    return [
        Entry(place="settings", key=key, value=value, origin=origins.get(key, "default"))
        for key, value in values.items()
        if value is not None
    ]


def _flatten(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def job_folders(workspace: Workspace) -> list[Path]:
    """The folders of all planned jobs, by name."""
    jobs = [workspace.job_dir(algo, fold) for algo, fold in workspace.job_names()]
    return [job.root for job in jobs if job.plan.exists()]


def plan_entries(folder: Path) -> list[Entry]:
    """A job's hyperparameters, each with its origin; one that differs from what was derived was edited."""
    paths = JobDir(folder)
    remedy = "Undo the edit, or delete the job's folder and run `autoseg generate` again."
    plan = read_stored(paths.plan, dict[str, JsonValue], remedy=remedy)
    origins = read_origins(paths) if paths.origins.exists() else {}
    entries = []
    for key, value in _flatten(plan):
        known = origins.get(key, StoredOrigin(origin="unknown"))
        edited = "value" in known.model_fields_set and known.value != value
        entries.append(
            Entry(
                place=folder.name,
                key=key,
                value=value,
                origin="edited by hand" if edited else known.origin,
                rule=known.rule or "",
                derived=known.value if edited else None,
            )
        )
    if (table := read_table(paths)) is not None:
        entries.append(_start_entry(folder.name, table))
    return entries


def _start_entry(place: str, table: Table) -> Entry:
    """What a job's network starts with, as a value among those of its plan."""
    notable = [f"{row.state} {row.place}" + f": {row.note}" * bool(row.note) for row in table.notable]
    told = some_of([table.counts, *notable], MOST_TENSORS + 1, "; ")
    return Entry(
        place=place,
        key="init_weights",
        value=f"{table.share:.1%} of the weights from {table.source}",
        origin="the file" + f", {table.kind}" * bool(table.kind),
        rule=told + " (init_weights.json)" * (len(notable) > MOST_TENSORS),
    )


def _table(entries: list[Entry]) -> str:
    """All values: a block for the settings and one for each network, in which folds that agree stand together."""
    blocks: dict[str, list[Entry]] = {}
    for entry in entries:
        blocks.setdefault(entry.place if entry.place == "settings" else _algo(entry), []).append(entry)
    lines: list[str] = []
    for block, members in blocks.items():
        places = list(dict.fromkeys(entry.place for entry in members))
        rows: dict[tuple[str, str], list[str]] = {}
        for entry in members:
            rule = f": {_short(entry.rule, 90)}" if entry.rule and entry.origin != "edited by hand" else ""
            row = f"{_short(entry.value, 44):<32}  {entry.origin}{rule}".rstrip()
            rows.setdefault((entry.key, row), []).append(entry.place)
        width = max(len(entry.key) for entry in members)
        lines += [*([""] if lines else []), block if block == "settings" else ", ".join(places)]
        for key in dict.fromkeys(entry.key for entry in members):
            for (other, row), where in rows.items():
                if other == key:
                    only = "" if where == places else f"  ({', '.join(where)})"
                    lines.append(f"  {key:<{width}}  {row}{only}")
    return "\n".join([*lines, "", "autoseg explain KEY tells one of them in full."])


def _detail(entries: list[Entry], key: str) -> str:
    """One value in full, wherever it occurs; jobs that agree stand together."""
    named = [e for e in entries if key in (e.key, f"{e.place}.{e.key}") or key == f"{_algo(e)}.{e.key}"]
    docs = setting_docs()
    doc = docs.get(key) or docs.get(key.rpartition(".")[2])
    if not named and key not in docs:
        known = {e.key for e in entries} | set(docs)
        raise ConfigError(f"{key}: no such setting or planned value. {suggest(key, known)}")
    lines = doc_lines(doc) if doc else []
    groups: dict[str, list[str]] = {}
    for entry in named:
        text = [f"  value:  {_short(entry.value, 200)}", f"  origin: {entry.origin}"]
        text += [f"  derived: {_short(entry.derived, 200)}, before the edit"] if entry.derived is not None else []
        text += [f"  rule:   {entry.rule}"] if entry.rule else []
        groups.setdefault("\n".join(text), []).append(entry.place)
    for text_block, places in groups.items():
        lines += ["", ", ".join(places), text_block] if lines else [", ".join(places), text_block]
    if not named:
        inside = [f"  {e.key}: {_short(e.value)} ({e.origin})" for e in entries if e.key.startswith(f"{key}.")]
        lines += ["", *(inside or ["Not set, and no plan has it yet."])]
    return "\n".join(lines)


def _algo(entry: Entry) -> str:
    """The network of a job's value."""
    return entry.place.rpartition("_")[0]


def _short(value: Any, width: int = 60) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list | tuple):
        text = "[" + ", ".join(_short(v) for v in value) + "]"
    elif isinstance(value, dict):
        text = "{" + ", ".join(f"{k}: {_short(v)}" for k, v in value.items()) + "}"
    else:
        text = str(value)
    return text if len(text) <= width else text[: width - 3] + "..."
