"""The command at work: what it asks for, the run it works on, and the time it may take."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from autoseg.config.networks import LOCATOR, AlgoName
from autoseg.config.settings import Settings
from autoseg.data.datalists.cases import Datalist
from autoseg.data.datalists.datalist import read_cases
from autoseg.pipeline.analysis import run_cases
from autoseg.pipeline.budget import Rounds, RunBudget
from autoseg.pipeline.job_plans import JobPlans, select_jobs
from autoseg.pipeline.networks import warn_of_untrained, with_networks
from autoseg.pseudolabel.rounds import How, cases_to_fill
from autoseg.workspace.stages import Stage
from autoseg.workspace.workspace import Workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a command asks for."""

    stages: tuple[Stage[RunContext], ...]
    """Rows of the table, in its order."""
    is_whole: bool
    """Whether it is a run: all stages of one, in all rounds, those between rounds included."""
    algo: AlgoName | None = None
    """Plan and train jobs of this algorithm alone."""
    fold: int | None = None
    """Plan and train jobs of this fold alone."""
    only: Collection[str] | None = None
    """Plan and train jobs of these names alone."""
    again: bool = False
    """Train jobs from the start that are done or begun."""
    plans_alone: bool = False
    """Plan what is to be pretrained, and do none of it."""
    accept: bool = False
    """Take trained weights and plans as they are, from now on."""
    as_json: bool = False
    """Print JSON in place of tables."""
    words: Mapping[str, str] = field(default_factory=dict)
    """Settings on this command line: key -> text."""

    @property
    def plans_jobs(self) -> bool:
        """Whether jobs are planned; else plans stay as they were made, and rounds as they were begun."""
        return any(stage.plans_jobs for stage in self.stages)

    @property
    def keeps_settings(self) -> bool:
        """Whether the settings of the command line are kept for later commands."""
        return any(stage.keeps_settings for stage in self.stages)

    @property
    def draws_report(self) -> bool:
        """Not for an analysis alone: it is over sooner than its figures are drawn, and often repeated."""
        return any(stage.needs for stage in self.stages)


@dataclass(slots=True)
class RunContext:
    """One command at work on a run."""

    request: Request
    workspace: Workspace
    """The run's."""
    listed: Datalist
    """The cases as the datalist names them, before the analysis."""
    settings: Settings
    origins: Mapping[str, str]
    """Of each setting: default, FILE:LINE or command line."""
    begun: float
    """Monotonic time at which the command began."""
    budgets: dict[Path, RunBudget] = field(default_factory=dict)
    """Folder of the run or the round -> its budget, in the order in which they were opened."""
    up_to_date: set[tuple[Path, str]] = field(default_factory=set)
    """Folders and stages that were checked by this command."""
    networks: tuple[AlgoName, ...] | None = None
    """What `algos` comes to; None until the data are analyzed."""
    complete: bool = True
    """False once a part of a stage failed."""

    def settle_networks(self) -> None:
        """Settle `algos`, once the data are analyzed and the number of rounds is stored."""
        self.networks = with_networks(self.workspace, self.settings, anew=self.request.plans_jobs).networks
        if self.request.keeps_settings:
            warn_of_untrained(self.settings, self.origins, self.networks)

    @property
    def job_settings(self) -> Settings:
        """The settings that jobs are planned, trained and combined with: `algos` is settled.

        A locator is trained outside the run, whose time is spent; a budget on its own command line is its own.
        """
        settings = self.settings if self.networks is None else self.settings.model_copy(update={"algos": self.networks})
        if self.request.algo == LOCATOR and "budget" not in self.request.words:
            return settings.model_copy(update={"budget": None})
        return settings

    def jobs_in(self, place: Workspace) -> JobPlans:
        """The jobs asked for in the folder of the run or a round, and what they are planned from."""
        datalist = read_cases(place, self.settings.dataroot)
        request = self.request
        jobs = select_jobs(self.job_settings, datalist, request.algo, request.fold, num_fold=self.listed.num_fold)
        return JobPlans(
            workspace=place,
            datalist=datalist,
            settings=self.job_settings,
            origins=self.origins,
            jobs=[(algo, fold) for algo, fold in jobs if request.only is None or f"{algo}_{fold}" in request.only],
            budget=self.budget_in(place),
        )

    def budget_in(self, place: Workspace) -> RunBudget | None:
        """The run's budget as a round sees it; its time counts from the first call on.

        The first one counts from where the command began, each other from where the one before stopped counting.
        """
        if self.job_settings.budget is None or (not self.request.plans_jobs and "budget" in self.request.words):
            return None  # there is none; or it was given to `train` alone and is each job's
        if place.root not in self.budgets:
            since = max((budget.counts_from for budget in self.budgets.values()), default=self.begun)
            rounds = self._rounds() if place.run != place.root else Rounds()
            self.budgets[place.root] = RunBudget(
                place, self.job_settings, num_places(self.settings), rounds=rounds, since=since
            )
        return self.budgets[place.root]

    def _rounds(self) -> Rounds:
        """What the run's rounds have to do, for its budget."""
        datalist, label_map = run_cases(self.workspace, self.settings)
        num_to_fill = len(cases_to_fill(datalist, label_map.names, How.of(self.settings)))
        return Rounds(
            number=self.workspace.num_rounds,
            jobs=tuple(select_jobs(self.job_settings, datalist, self.request.algo, self.request.fold)),
            to_fill=num_to_fill,
            held_out=len(datalist.training) / datalist.num_fold,
        )


def num_places(settings: Settings) -> int:
    """Jobs at once; on a cluster, which others use too, one, so that a budget is kept in any case."""
    from autoseg.launch.local import find_places

    return len(find_places(settings)) if settings.launcher == "local" else 1
