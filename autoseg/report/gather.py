"""What a run has left in its work_dir, read for the report; whatever is not there yet is empty."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from autoseg.config.reader import read_model
from autoseg.data.datalists.cases import Datalist
from autoseg.data.datalists.datalist import read_cases
from autoseg.data.datastats import AnalysisSummary, CaseEntry, DataStats, StatsByCase, summary_path
from autoseg.data.labels import LabelMap
from autoseg.errors import ConfigError, WorkspaceError
from autoseg.evaluation.learning_curve import LearningCurve
from autoseg.evaluation.score_files import Robustness, Scores
from autoseg.report.explain import Entry, plan_entries, stored_settings
from autoseg.workspace.files import digest
from autoseg.workspace.jobs import EpochLine, Job
from autoseg.workspace.pretraining import pretraining_place
from autoseg.workspace.scratch import scratch_place
from autoseg.workspace.stages import Stage
from autoseg.workspace.stored import Unreadable, read_stored, read_stored_lines
from autoseg.workspace.usage import CommandLine, UsageLine, read_usage
from autoseg.workspace.workspace import Workspace

if TYPE_CHECKING:
    from autoseg.inference.ensemble_spec import EnsembleSpec
    from autoseg.pseudolabel.audit import Audit

T = TypeVar("T")
D = TypeVar("D")


@dataclass(frozen=True)
class Run:
    """A run's files."""

    workspace: Workspace
    notes: list[str] = field(default_factory=list)
    """What could not be read or shown, in words."""

    def read_or(self, default: D, read: Callable[[], T]) -> T | D:
        """What can be read; where a file is damaged, the default and a note that names the file."""
        unreadable = Unreadable()
        value = unreadable.or_else(default, read)
        self.notes.extend(message for message in unreadable.messages if message not in self.notes)
        return value

    def _stored(self, path: Path, kind: type[T]) -> T | None:
        """What a file holds; None where it is not there, or with a note, where it is damaged."""
        return self.read_or(None, lambda: read_stored(path, kind)) if path.exists() else None

    @cached_property
    def settings(self) -> dict[str, Entry]:
        """Every setting of input.yaml with its origin; empty before the first stage."""
        if not self.workspace.settings.exists():
            return {}
        return {entry.key: entry for entry in self.read_or((), partial(stored_settings, self.workspace))}

    def setting(self, key: str, default: Any = None) -> Any:
        """The value of a setting."""
        return self.settings[key].value if key in self.settings else default

    @property
    def seed(self) -> int:
        """The run's seed."""
        value = self.setting("seed", 0)
        return value if isinstance(value, int) and value >= 0 else 0

    @cached_property
    def dataroot(self) -> Path:
        """The folder the datalist's paths are relative to."""
        return Path(self.workspace.root, str(self.setting("dataroot", ".")))

    @cached_property
    def datastats(self) -> DataStats | None:
        """Content of datastats.yaml; None before the analysis."""
        return self._stored(self.workspace.datastats, DataStats)

    @cached_property
    def cases(self) -> tuple[CaseEntry, ...]:
        """Statistics of each training case."""
        stats = self._stored(self.workspace.datastats_by_case, StatsByCase)
        return () if stats is None else stats.stats_by_cases

    @cached_property
    def summary(self) -> AnalysisSummary | None:
        """The analysis' summary; None before it."""
        return self._stored(summary_path(self.workspace), AnalysisSummary)

    @cached_property
    def scores(self) -> Scores | None:
        """Out-of-fold scores; None before the ensemble stage."""
        return self._stored(self.workspace.scores, Scores)

    @cached_property
    def robustness(self) -> Robustness | None:
        """What changed images cost; None where it was not measured."""
        return self._stored(self.workspace.robustness, Robustness)

    @cached_property
    def learning_curve(self) -> LearningCurve | None:
        """What more cases would bring; None where `autoseg learning_curve` was not run."""
        return self._stored(self.workspace.learning_curve / "curve.json", LearningCurve)

    @cached_property
    def latest(self) -> Workspace:
        """The last round that was begun."""
        return self.read_or(self.workspace, self.workspace.latest)

    @cached_property
    def audit(self) -> Audit | None:
        """What became of the pseudo-labels of the last round; None where there are none."""
        if not self.latest.audit.exists():
            return None
        from autoseg.pseudolabel.audit import Audit  # it loads torch

        return self._stored(self.latest.audit, Audit)

    @cached_property
    def earlier_audits(self) -> list[str]:
        """Where the audits of earlier rounds lie, from the run's folder."""
        places = self.read_or((), self.workspace.rounds)[:-1]
        return [p.audit.relative_to(self.workspace.run).as_posix() for p in places if p.audit.exists()]

    @cached_property
    def audited(self) -> Datalist | None:
        """The cases of the last round with their completed labels; None where their files have moved."""
        try:
            return read_cases(self.latest, self.dataroot)
        except (ConfigError, WorkspaceError) as error:
            self.notes.append(f"The pseudo-labels cannot be shown: {error.messages[0]}")
            return None

    @cached_property
    def ensemble(self) -> EnsembleSpec | None:
        """The chosen combination; None before the ensemble stage."""
        if not self.workspace.ensemble_spec.exists():
            return None
        from autoseg.inference.ensemble_spec import EnsembleSpec  # it loads torch

        return self._stored(self.workspace.ensemble_spec, EnsembleSpec)

    @cached_property
    def jobs(self) -> list[Job]:
        """Every job that was planned, by algorithm and fold; pending where it was not begun."""
        w, unreadable = self.workspace, Unreadable()
        jobs = [job for job, _ in w.readable_jobs(unreadable) if w.job_dir(job.algo, job.fold).plan.exists()]
        self.notes.extend(unreadable.messages)
        return jobs

    @cached_property
    def plans(self) -> list[Entry]:
        """Every planned value of every job."""
        folders = [self.workspace.job_dir(job.algo, job.fold).root for job in self.jobs]
        return [e for folder in folders for e in self.read_or((), partial(plan_entries, folder))]

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
        except (ConfigError, WorkspaceError) as error:
            self.notes.append(f"The cases' files cannot be shown: {error.messages[0]}")
            return None

    @cached_property
    def usage(self) -> Sequence[UsageLine]:
        """What each stage used, every time it ran."""
        return self.read_or((), lambda: read_usage(self.workspace))

    @cached_property
    def environment(self) -> dict[str, str]:
        """Machine and versions of the last run."""
        return self._stored(self.workspace.environment, dict[str, str]) or {}

    @cached_property
    def commands(self) -> Sequence[CommandLine]:
        """The command lines of the run, oldest first."""
        return self.read_or((), lambda: read_stored_lines(self.workspace.commands, CommandLine))

    def curve(self, job: Job) -> Sequence[EpochLine]:
        """The epochs of a job."""
        path = self.workspace.job_dir(job.algo, job.fold).metrics
        return self.read_or((), lambda: read_stored_lines(path, EpochLine))

    @property
    def name(self) -> str:
        """What the run is called: `name` of input.yaml, else the data's folder."""
        return str(self.setting("name") or self.dataroot.resolve().name)


def last_finished(workspace: Workspace) -> Workspace:
    """The last round with an ensemble; the run's folder where the files that tell are damaged, which `Run` names."""
    return Unreadable().or_else(workspace, workspace.finished)


def stages_shown(workspace: Workspace, table: Sequence[Stage[Any]]) -> list[tuple[str, str]]:
    """Each stage that the run has, but those between rounds, and how far it is, in words."""
    unreadable = Unreadable()
    shown = [stage for stage in table if stage.is_shown_of(workspace, unreadable)]
    return [(s.name, unreadable.or_else("not readable", partial(s.far, workspace))) for s in shown]


def inputs_digest(workspace: Workspace, table: Sequence[Stage[Any]]) -> str:
    """A digest of what a report shows, but for the files that every command writes."""
    w = workspace
    patterns = ("job.json", "metrics.jsonl", "init_weights.json", "lesson.json", "configs/hyper_parameters.yaml")
    places = (w.root, pretraining_place(w).root, scratch_place(w).root)
    jobs = [path for root in places for pattern in patterns for path in sorted(root.glob(f"*_*/{pattern}"))]
    digests = []
    audit = Unreadable().or_else(w, w.latest).audit
    for path in (
        w.settings,
        w.chosen_networks,
        w.datastats,
        w.faults,
        w.scores,
        w.ensemble_spec,
        w.robustness,
        audit,
        *jobs,
    ):
        try:  # by content: some are written by every command, mostly as they were
            digests.append([path.name, hashlib.sha256(path.read_bytes()).hexdigest()])
        except OSError:
            continue
    return digest([digests, stages_shown(workspace, table)])


def by_number(name: str) -> tuple[Any, ...]:
    """A sort key that puts case_10 after case_9."""
    return tuple((0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"(\d+)", name))


def clock(seconds: float) -> str:
    """A moment as local date and time."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
