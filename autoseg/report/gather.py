"""What a run has left in its work_dir, read for the report; whatever is not there yet is empty."""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from autoseg.config.nodes import load_plain
from autoseg.config.reader import read_model
from autoseg.data.datalists.cases import Datalist
from autoseg.data.datalists.datalist import read_cases
from autoseg.data.labels import LabelMap
from autoseg.errors import ConfigError, WorkspaceError
from autoseg.report.explain import Entry, plan_entries, stored_settings
from autoseg.workspace.files import digest, read_json
from autoseg.workspace.jobs import Job
from autoseg.workspace.stages import Stage
from autoseg.workspace.usage import read_lines, read_usage
from autoseg.workspace.workspace import Workspace


@dataclass(frozen=True)
class Run:
    """A run's files."""

    workspace: Workspace
    notes: list[str] = field(default_factory=list)
    """What could not be read or shown, in words."""

    @cached_property
    def settings(self) -> dict[str, Entry]:
        """Every setting of input.yaml with its origin; empty before the first stage."""
        if not self.workspace.settings.exists():
            return {}
        return {entry.key: entry for entry in stored_settings(self.workspace)}

    def setting(self, key: str, default: Any = None) -> Any:
        """The value of a setting."""
        return self.settings[key].value if key in self.settings else default

    @cached_property
    def dataroot(self) -> Path:
        """The folder the datalist's paths are relative to."""
        return Path(self.workspace.root, self.setting("dataroot", "."))

    @cached_property
    def datastats(self) -> dict[str, Any]:
        """Content of datastats.yaml."""
        return _yaml(self.workspace.datastats)

    @cached_property
    def cases(self) -> list[dict[str, Any]]:
        """Statistics of each training case."""
        return list(_yaml(self.workspace.datastats_by_case).get("stats_by_cases", []))

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The analysis' summary."""
        return _json(self.workspace.run / "state" / "summary.json")

    @cached_property
    def scores(self) -> dict[str, Any]:
        """Out-of-fold scores."""
        return _json(self.workspace.scores)

    @cached_property
    def audit(self) -> dict[str, Any]:
        """What became of the pseudo-labels of the last round."""
        return _json(self.workspace.latest().audit)

    @cached_property
    def earlier_audits(self) -> list[str]:
        """Where the audits of earlier rounds lie, from the run's folder."""
        places = self.workspace.rounds()[:-1]
        return [p.audit.relative_to(self.workspace.run).as_posix() for p in places if p.audit.exists()]

    @cached_property
    def audited(self) -> Datalist | None:
        """The cases of the last round with their completed labels; None where their files have moved."""
        try:
            return read_cases(self.workspace.latest(), self.dataroot)
        except (ConfigError, WorkspaceError) as error:
            self.notes.append(f"The pseudo-labels cannot be shown: {error.messages[0]}")
            return None

    @cached_property
    def ensemble(self) -> dict[str, Any]:
        """The chosen combination."""
        return _json(self.workspace.ensemble_spec)

    @cached_property
    def jobs(self) -> list[Job]:
        """Every job that was planned, by algorithm and fold; pending where it was not begun."""
        w = self.workspace
        return [job for job, _ in w.current_jobs() if w.job_dir(job.algo, job.fold).plan.exists()]

    @cached_property
    def plans(self) -> list[Entry]:
        """Every planned value of every job."""
        return [e for job in self.jobs for e in plan_entries(self.workspace.job_dir(job.algo, job.fold).root)]

    @cached_property
    def label_map(self) -> LabelMap | None:
        """The classes as the networks know them; None before generate."""
        from autoseg.plan import Plan  # it loads torch, which the report of an analysis has no need of

        for job in self.jobs:
            try:
                return read_model(self.workspace.job_dir(job.algo, job.fold).plan, Plan).label_map
            except (ConfigError, WorkspaceError) as error:
                self.notes.extend(error.messages)
        return None

    @cached_property
    def datalist(self) -> Datalist | None:
        """The cases; None before analyze, or where their files have moved."""
        if not self.workspace.datalist.exists():
            return None
        try:
            return read_cases(self.workspace, self.dataroot)
        except ConfigError as error:
            self.notes.append(f"The cases' files cannot be shown: {error.messages[0]}")
            return None

    @cached_property
    def usage(self) -> list[dict[str, Any]]:
        """What each stage used, every time it ran."""
        return read_usage(self.workspace)

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Machine and versions of the last run."""
        return _json(self.workspace.environment)

    @cached_property
    def commands(self) -> list[dict[str, Any]]:
        """The command lines of the run, oldest first."""
        path = self.workspace.commands
        return read_lines(path) if path.exists() else []

    def curve(self, job: Job) -> list[dict[str, Any]]:
        """The epochs of a job."""
        path = self.workspace.job_dir(job.algo, job.fold).metrics
        return [e for e in read_lines(path) if "epoch" in e] if path.exists() else []

    @property
    def name(self) -> str:
        """What the run is called: `name` of input.yaml, else the data's folder."""
        return str(self.setting("name") or self.dataroot.resolve().name)


def stages_shown(workspace: Workspace, table: Sequence[Stage[Any]]) -> list[tuple[str, str]]:
    """Each stage but those between rounds, and how far it is, in words."""
    return [(stage.name, stage.far(workspace)) for stage in table if stage.where != "between rounds"]


def inputs_digest(workspace: Workspace, table: Sequence[Stage[Any]]) -> str:
    """A digest of what a report shows, but for the files that every command writes."""
    w = workspace
    patterns = ("job.json", "metrics.jsonl", "configs/hyper_parameters.yaml")
    jobs = [path for pattern in patterns for path in sorted(w.root.glob(f"*_*/{pattern}"))]
    found = []
    for path in (w.settings, w.datastats, w.faults, w.scores, w.ensemble_spec, w.latest().audit, *jobs):
        try:  # by content: some are written by every command, mostly as they were
            found.append([path.name, hashlib.sha256(path.read_bytes()).hexdigest()])
        except FileNotFoundError:
            continue
    return digest([found, stages_shown(workspace, table)])


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    data = read_json(path)
    return data if isinstance(data, dict) else {}


def _yaml(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        data = load_plain(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        words = " ".join(str(error).split())
        raise WorkspaceError(f"{path}: not valid YAML ({words}). Run `autoseg analyze` again.") from None
    return data if isinstance(data, dict) else {}


def plain(values: Sequence[float | None]) -> list[float]:
    """Scores as floats, NaN where not counted."""
    return [math.nan if v is None else float(v) for v in values]


def by_number(name: str) -> tuple[Any, ...]:
    """A sort key that puts case_10 after case_9."""
    return tuple((0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"(\d+)", name))


def clock(seconds: float) -> str:
    """A moment as local date and time."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
