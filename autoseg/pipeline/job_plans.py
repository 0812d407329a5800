"""The jobs of a run that are asked for: their plans, made by the time they get, and their training.

With a run-wide budget a job is planned just before it starts, for the time that is then left; without one, all at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from autoseg.algos.inputs import PlanInputs, planning
from autoseg.config.networks import LOCATOR, AlgoName
from autoseg.config.settings import Settings
from autoseg.config.units import parse_duration
from autoseg.data.datalists.cases import Datalist
from autoseg.errors import ConfigError, some_of
from autoseg.pipeline.budget import RunBudget
from autoseg.pipeline.training_jobs import in_this_process, train_jobs
from autoseg.workspace.workspace import Workspace

log = logging.getLogger(__name__)


def select_jobs(
    settings: Settings, datalist: Datalist, algo: AlgoName | None, fold: int | None, *, num_fold: int | None = None
) -> list[tuple[AlgoName, int]]:
    """The jobs asked for, algorithm by algorithm within each fold, so that a first fold of all is done early.

    Args:
        settings: with `algos` settled.
        algo, fold: this one alone; None: those of the settings.
        num_fold: of the run; a first round of few cases may have fewer.

    Raises:
        ConfigError: There is no such fold.
    """
    folds = select_folds(settings, datalist, algo, fold, num_fold=num_fold)
    return [(a, f) for f in folds for a in ((algo,) if algo else settings.networks)]


def select_folds(
    settings: Settings, datalist: Datalist, algo: AlgoName | None, fold: int | None, *, num_fold: int | None = None
) -> tuple[int, ...]:
    """The folds of the jobs asked for. Args, Raises: as `select_jobs`."""
    folds = settings.folds if settings.folds is not None else tuple(range(datalist.num_fold))
    if num_fold is not None and datalist.num_fold < num_fold:
        folds = tuple(f for f in folds if f < datalist.num_fold) or tuple(range(datalist.num_fold))
    if algo == LOCATOR:
        folds = folds[:1]  # one is enough to find where the organs are
    folds = folds if fold is None else (fold,)
    faults = [
        f"fold {f}: no such fold. The datalist has folds 0 to {datalist.num_fold - 1}."
        for f in folds
        if f >= datalist.num_fold
    ]
    if faults:
        raise ConfigError(faults)
    return folds


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPlans:
    """The jobs of a stage, and what they are planned from."""

    workspace: Workspace
    datalist: Datalist
    settings: Settings
    origins: Mapping[str, str]
    jobs: Sequence[tuple[AlgoName, int]]
    budget: RunBudget | None
    """The run's; None: there is none, or each job has its own."""

    def generate(self) -> None:
        """Write the plans that are missing or were made from other inputs."""
        each = self._inputs(self.jobs, self._shares())
        written = [f"{inputs.algo}_{inputs.fold}" for inputs in each if self._write_plan(inputs)]
        log.info("generate: %s", f"wrote {', '.join(written)}" if written else "up to date")

    def edit(self) -> None:
        """Make the missing plans of jobs to be trained alone; bring the command line's values into the others.

        A plan that is there is never made anew by `train`, so that what was planned or edited is what is trained.
        """
        from autoseg.algos.draft import Fit
        from autoseg.algos.generate import edit_job, outdated
        from autoseg.algos.planner import make_plan
        from autoseg.plan import read_plan

        each_s = parse_duration(self.settings.budget) if self.settings.budget is not None else None
        older: dict[str, list[str]] = {}
        for inputs in self._inputs(self.jobs, self._shares(each_s)):
            paths = self.workspace.job_dir(inputs.algo, inputs.fold)
            if not paths.plan.exists():
                self._write_plan(inputs)
            elif "command line" in self.origins.values():
                plan, origins = make_plan(inputs, Fit(step_s=read_plan(paths).step_s))
                if keys := edit_job(self.workspace, plan, origins):
                    log.info("%s_%d: %s taken from the command line", inputs.algo, inputs.fold, ", ".join(keys))
            elif reasons := outdated(self.workspace, inputs):
                older.setdefault(" and ".join(reasons), []).append(f"{inputs.algo}_{inputs.fold}")
        for what, names in older.items():
            log.warning(
                "%s: planned before this: %s. The plans count as they are; run `autoseg generate`, or `autoseg run`, "
                "to plan anew.",
                *(some_of(names), what),
            )

    def train(self, *, begun: float, again: bool = False) -> bool:
        """Train every job that is not done.

        With a budget the time that is left is shared out anew before each job, or each wave of jobs; see budget.py.
        Without one, a budget of each job's own begins for the first where the command did: start and planning count.

        Args:
            begun: monotonic time at which the command began.

        Returns:
            Whether all are done at the end.
        """
        workspace, datalist, settings = self.workspace, self.datalist, self.settings
        jobs, budget = self.jobs, self.budget
        if budget is None or not jobs:
            own = jobs and settings.network(jobs[0][0]).budget
            since = begun if settings.budget is not None or own else None
            return train_jobs(workspace, datalist, settings, jobs, again=again, begun=since)
        started: set[tuple[AlgoName, int]] = set()

        def start(wave: Sequence[tuple[AlgoName, int]]) -> list[tuple[AlgoName, int]]:
            """Plan the jobs of a wave for the time that is left; those of dropped algorithms are left out."""
            budget.drop_weak(jobs)
            rest = [j for j in jobs if j not in started and not budget.is_dropped(*j, jobs)]
            running = [job for job in wave if job in rest]
            new = [job for job in running if again or not budget.is_begun(*job)]
            waiting = [job for job in rest if again or workspace.read_job(*job).state != "done"]
            budget.give(datalist, new, waiting)
            for inputs in self._inputs(new, budget.job_s):
                self._write_plan(inputs)
            started.update(running)
            return running

        with budget.kept():
            if in_this_process(settings):
                return train_jobs(
                    workspace,
                    datalist,
                    settings,
                    jobs,
                    again=again,
                    before=lambda algo, fold: bool(start([(algo, fold)])),
                )
            first = min(fold for _, fold in jobs)
            waves = [[j for j in jobs if j[1] == first], [j for j in jobs if j[1] != first]]
            results = [train_jobs(workspace, datalist, settings, start(wave), again=again) for wave in waves if wave]
            return all(results)

    def _shares(self, each_s: float | None = None) -> Callable[[str], float | None]:
        """Seconds of a job by its name: its share of the run's budget; without one `each_s`."""
        if self.budget is None:
            return lambda name: each_s
        self.budget.give_all(self.datalist, self.jobs)
        return self.budget.job_s

    def _inputs(
        self, jobs: Sequence[tuple[AlgoName, int]], budget_s: Callable[[str], float | None]
    ) -> Iterator[PlanInputs]:
        return planning(self.workspace, self.datalist, self.settings, self.origins, jobs, budget_s)

    def _write_plan(self, inputs: PlanInputs) -> bool:
        """Write a plan, measured on the device that jobs train on, unless that is another machine's."""
        from autoseg.algos.generate import generate_job
        from autoseg.hardware.device import pick_device

        device = pick_device(self.settings.device) if self.settings.launcher == "local" else None
        return generate_job(self.workspace, inputs, device)
