"""The time of a whole run: what is spent, what each job gets, and which algorithms it is taken from.

Every algorithm trains the first fold. The weaker half is then dropped (successive halving, Jamieson and Talwalkar
2016), and its time goes to the folds of the others. What a job gets is decided just before it starts, from the time
that is then left, so that neither a slow machine nor a stop in between lets the run end late. Jobs of later rounds get
as much as those of the first, and what is predicted between the rounds is kept for it. All of it stands in
state/budget.json of a run or a round.
"""

from __future__ import annotations

import logging
import math
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from autoseg.config.networks import AlgoName
from autoseg.config.settings import Settings
from autoseg.config.units import format_duration, parse_duration
from autoseg.data.datalists.cases import Datalist
from autoseg.workspace.budget import Afterwards, BudgetState
from autoseg.workspace.jobs import Job
from autoseg.workspace.pretraining import pretraining_place
from autoseg.workspace.stored import read_stored, write_stored
from autoseg.workspace.workspace import Workspace

log = logging.getLogger(__name__)

RESERVED_SHARE = 0.1
"""Share of a run's budget kept for each of several rounds' predictions before a job has shown what one takes. A guess;
a single round's first jobs measure it before they share out their time."""
LEAST_RESERVED_SHARE, MOST_RESERVED_SHARE = 0.01, 0.3
"""Bounds of what is kept for each round: a busy moment while a job was scored must not take the time of all others."""
MERGE_SHARE = 0.5
"""Seconds in which the ensemble merges and scores what a job predicted of a case, over those of the prediction. Between
0.14 (hippocampus, docs/results.md, "Held-out cases") and 0.7 (eight classes of 4 million voxels), as measured."""
FILL_FACTOR = 1.3
"""Seconds of pseudo-labels over those of the same predictions alone: probabilities are merged, judged and written; 1.17
was measured. Held-back cases need no such factor: five models took 0.87 of five predictions, each of them scored
(docs/results.md)."""
PRETRAINING_SHARE = 0.25
"""Share of a run's budget for pretraining, where its settings say nothing else. A choice."""
LEAST_KEPT = 2
"""Algorithms that are always kept, so that there is something to make an ensemble of."""
HOPELESS = 0.9
"""Under this share of the best Dice an algorithm is dropped even where few are left. A choice."""
SAVE_EVERY_S = 30.0
"""Between two notes of the time that was spent, while jobs are trained."""
STARTING_S = 30.0
"""A process that began at most this long ago began for this run: its start counts."""


def _copies(num_cases: int) -> tuple[int, float]:
    """Predictions of corrupted copies that an algorithm's models make at most, and the share of a budget for them.

    Args:
        num_cases: out of fold, as far as they are trained.
    """
    from autoseg.ensemble.corruptions import MOST_DRAWN, MOST_TRIED, SHARE, TRYING_SHARE, USUAL
    from autoseg.ensemble.quality import FEWEST_CASES

    tried = min(MOST_TRIED, num_cases) * len(USUAL)
    return (tried + MOST_DRAWN, SHARE) if num_cases >= FEWEST_CASES else (tried, TRYING_SHARE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """The rounds of training of a run; all after the first are alike."""

    number: int = 1
    jobs: tuple[tuple[AlgoName, int], ...] = ()
    """Of each round after the first, where no algorithm is dropped."""
    to_fill: float = 0.0
    """Cases that each of these jobs' models predict before the round, so that they are completed."""
    held_out: float = 0.0
    """Cases out of fold that the round's ensemble merges of each of these jobs."""


def work_began() -> float:
    """Monotonic time from which the work at hand counts: this process' start where that was just now, else now."""
    age_s = time.time() - psutil.Process().create_time()
    return time.monotonic() - (age_s if age_s < STARTING_S else 0.0)


def pretraining_s(settings: Settings) -> float | None:
    """Seconds for all pretraining of a run; None: it has no budget."""
    if settings.pretrain.budget is not None:
        return parse_duration(settings.pretrain.budget)
    return None if settings.budget is None else PRETRAINING_SHARE * parse_duration(settings.budget)


class RunBudget:
    """A run's budget, kept over restarts."""

    def __init__(
        self,
        workspace: Workspace,
        settings: Settings,
        num_places: int,
        *,
        rounds: Rounds | None = None,
        since: float | None = None,
    ) -> None:
        """Open it; one of another length starts anew.

        Args:
            workspace: the run's, or a round's.
            num_places: jobs at once.
            rounds: of the run; None: one alone.
            since: monotonic time from which on work counts; None: as `work_began`.
        """
        assert settings.budget is not None
        self.workspace, self.settings, self.num_places = workspace, settings, num_places
        self._lock = threading.Lock()
        self.rounds = rounds or Rounds()
        self.state = BudgetState(budget_s=parse_duration(settings.budget))
        self.before_s, self.dropped_before = 0.0, dict[str, str]()
        """Seconds of pretraining and of the rounds before this one; algorithms that they dropped."""
        first = pretraining_place(workspace)
        if workspace.root != first.root and (stored := self._stored(first)):
            self.before_s += stored.spent_s
        for earlier in workspace.rounds():
            if earlier.round < workspace.round and (stored := self._stored(earlier)):
                self.before_s += stored.spent_s
                self.dropped_before |= stored.dropped
        self.state = self._stored(workspace) or self.state
        self.counts_from = work_began() if since is None else since
        """Monotonic time up to which all is stored."""

    def _stored(self, place: Workspace) -> BudgetState | None:
        """What a round has stored of a budget of this length."""
        if not place.budget.exists():
            return None
        stored = read_stored(place.budget, BudgetState)
        return stored if stored.budget_s == self.state.budget_s else None

    def save(self) -> None:
        """Add the time since the last call, and store all."""
        with self._lock:
            now = time.monotonic()
            self.state.spent_s += now - self.counts_from
            self.counts_from = now
            write_stored(self.workspace.budget, self.state)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Save it every now and then while a block runs, so that a run killed in a long job does not lose count."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(SAVE_EVERY_S):
                self.save()

        thread = threading.Thread(target=watch, name="autoseg-budget", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    @property
    def left_s(self) -> float:
        """Seconds left to this and all later rounds."""
        with self._lock:
            return self.state.budget_s - self.before_s - self.state.spent_s - (time.monotonic() - self.counts_from)

    def job_s(self, name: str) -> float | None:
        """Seconds a job was given; None: nothing yet."""
        return self.state.jobs.get(name)

    def give(
        self, datalist: Datalist, jobs: Sequence[tuple[AlgoName, int]], among: Sequence[tuple[AlgoName, int]]
    ) -> None:
        """Give some jobs their equal shares of the time that is left.

        Args:
            jobs: those that are to get theirs.
            among: all that still have to run, those included.
        """
        again = self._again()
        own = {algo: getattr(self.settings, algo).budget for algo, _ in (*among, *again)}
        sharing = [job for job in among if not own[job[0]]]
        if not sharing:
            return
        fixed_s = sum(parse_duration(own[algo]) for algo, _ in among if own[algo])
        fixed_s += self.later * sum(parse_duration(own[algo]) for algo, _ in again if own[algo])
        num_waves = self._waves(sharing) + self.later * self._waves([job for job in again if not own[job[0]]])
        free_s = self.left_s - self.reserved_s(datalist, among) - fixed_s / self.num_places
        if self.settings.compare_scratch:  # each job that starts from weights has a twin of its own length
            open_jobs = {f"{algo}_{fold}" for algo, fold in among}
            twins_s = sum(s for name, s in self.state.jobs.items() if name not in open_jobs and self._has_twin(name))
            free_s -= twins_s / self.num_places
            num_waves *= 2
        share_s = max(1.0, free_s / num_waves)
        afterwards = self._afterwards(datalist, among, self._waves(sharing), share_s)
        for name in (f"{algo}_{fold}" for algo, fold in jobs if not own[algo]):
            self.state.jobs[name], self.state.afterwards[name] = round(share_s, 1), afterwards
        self.save()

    def _has_twin(self, name: str) -> bool:
        algo, _, fold = name.rpartition("_")
        return self.workspace.read_job(algo, int(fold)).state == "done"

    def _waves(self, jobs: Sequence[tuple[AlgoName, int]]) -> int:
        """How many jobs one place does after the other; the first fold is through before any other begins."""
        first = min(self.settings.folds or [0])
        num_first = sum(fold == first for _, fold in jobs)
        return math.ceil(num_first / self.num_places) + math.ceil((len(jobs) - num_first) / self.num_places)

    def give_all(self, datalist: Datalist, jobs: Sequence[tuple[AlgoName, int]]) -> None:
        """Give each job that has none yet its share, all of them being still to run."""
        self.give(datalist, [(algo, fold) for algo, fold in jobs if self.job_s(f"{algo}_{fold}") is None], jobs)

    def reserved_s(self, datalist: Datalist, among: Sequence[tuple[AlgoName, int]]) -> float:
        """Seconds to keep for what is predicted in this and later rounds, from what finished jobs' predictions took.

        A round's ensemble merges what the jobs predicted out of fold; the last round's predicts the held-back cases,
        too; in between, cases are predicted to be completed. Before any job is finished the last round's jobs keep
        this time themselves (`_afterwards`), and earlier ones a share that is a guess.
        """
        budget_s, later = self.state.budget_s, self.later
        case_s = self._case_s()
        if not later and (self.settings.ensemble is False or case_s is None):
            return LEAST_RESERVED_SHARE * budget_s
        if case_s is None:
            return RESERVED_SHARE * (1 + later) * budget_s
        predictions, copies, copies_share = self._predictions(datalist, among)
        of_later_model = FILL_FACTOR * self.rounds.to_fill + MERGE_SHARE * self.rounds.held_out
        predictions += later * len(self._again()) * of_later_model
        least, most = (share * (1 + later) * budget_s for share in (LEAST_RESERVED_SHARE, MOST_RESERVED_SHARE))
        copies_s = min(case_s * copies, copies_share * budget_s / self.rounds.number)
        return min(max(case_s * predictions + copies_s, least), most)

    def _case_s(self) -> float | None:
        """Seconds that finished jobs' predictions took; None: there are none."""
        done = self._predicted(self.workspace)
        predicted = done or [job for place in self.workspace.rounds() for job in self._predicted(place)]
        return statistics.median(job.inference_s or 0.0 for job in predicted) if predicted else None

    def _predictions(self, datalist: Datalist, among: Sequence[tuple[AlgoName, int]]) -> tuple[float, int, float]:
        """Predictions that this round's ensemble makes, merging included, by all its models.

        Also those of corrupted copies, and the share of the budget that they may take.

        Args:
            among: jobs that are still to be trained.
        """
        models = {(job.algo, job.fold) for job in self._predicted(self.workspace)} | set(among)
        predictions = MERGE_SHARE * sum(len(datalist.val_cases(fold)) for _, fold in models)
        if self.settings.ensemble is False:
            return predictions, 0, 0.0
        predictions += len(models) * (len(datalist.testing) + len(datalist.validation))
        copies, share = _copies(sum(len(datalist.val_cases(fold)) for fold in {fold for _, fold in models}))
        return predictions, copies * len({algo for algo, _ in models}), share

    def _afterwards(
        self, datalist: Datalist, among: Sequence[tuple[AlgoName, int]], num_waves: int, share_s: float
    ) -> Afterwards:
        """What each of some jobs leaves time for, that gets a share of so many seconds, one of so many in a row."""
        if self.later or self.settings.ensemble is False or self._case_s() is not None:
            return Afterwards()
        predictions, copies, copies_share = self._predictions(datalist, among)
        return Afterwards(
            cases=predictions / num_waves,
            copies=copies / num_waves,
            most_s=MOST_RESERVED_SHARE * share_s,
            most_copies_s=copies_share * share_s,
        )

    def spare_s(self) -> float:
        """Seconds left to what the ensemble stage does beyond its predictions, so that the report still fits in."""
        return self.left_s - LEAST_RESERVED_SHARE * self.state.budget_s

    @property
    def later(self) -> int:
        """Rounds after this one."""
        return self.rounds.number - self.workspace.round

    def _again(self) -> list[tuple[AlgoName, int]]:
        """Jobs that each later round is to have."""
        dropped = self.state.dropped | self.dropped_before
        return [(algo, fold) for algo, fold in self.rounds.jobs if algo not in dropped]

    def _predicted(self, place: Workspace) -> list[Job]:
        return [job for job in place.jobs() if job.state == "done" and job.inference_s is not None]

    def drop_weak(self, jobs: Sequence[tuple[AlgoName, int]]) -> None:
        """Once the first fold is through, drop the algorithms that did worse on it, if that has not been done."""
        first = min(fold for _, fold in jobs)
        algos = [algo for algo, fold in jobs if fold == first]
        is_decided = self.state.dropped or self.dropped_before
        if is_decided or len(algos) < 2 or all(fold == first for _, fold in jobs):
            return
        job_of = {algo: self.workspace.read_job(algo, first) for algo in algos}
        if any(job.state in ("pending", "running") for job in job_of.values()):
            return
        scored = sorted(
            (algo for algo in algos if job_of[algo].dice is not None or job_of[algo].state == "diverged"),
            key=lambda algo: -(job_of[algo].dice or 0.0),
        )
        if len(scored) < 2:
            return
        best = job_of[scored[0]].dice or 0.0
        num_kept = max(LEAST_KEPT, math.ceil(len(scored) / 2))
        for rank, algo in enumerate(scored):
            dice = job_of[algo].dice or 0.0
            if rank and (rank >= num_kept or dice < HOPELESS * best):
                self.state.dropped[algo] = (
                    f"dropped after fold {first}: Dice {dice:.4f} against {best:.4f} of {scored[0]}; "
                    "its time goes to the others"
                )
                log.info("budget: %s is %s", algo, self.state.dropped[algo])
        self.save()

    def is_dropped(self, algo: str, fold: int, jobs: Sequence[tuple[AlgoName, int]]) -> bool:
        """Whether a job is not to be trained; then its state says so."""
        reason = self.dropped_before.get(algo)
        if reason is None and fold != min(f for _, f in jobs):
            reason = self.state.dropped.get(algo)
        if reason is None:
            return False
        job: Job = self.workspace.read_job(algo, fold)
        if job.state == "done":
            return False
        job.state, job.error = "pruned", reason
        self.workspace.write_job(job)
        return True

    def is_begun(self, algo: str, fold: int) -> bool:
        """Whether a job has a share that it trains by: done, or with a checkpoint to go on from."""
        if f"{algo}_{fold}" not in self.state.jobs:
            return False
        return self.workspace.job_dir(algo, fold).checkpoint.exists() or (
            self.workspace.read_job(algo, fold).state == "done"
        )

    def summary(self) -> str:
        """How the time was kept so far, in a line."""
        spent_s = self.state.budget_s - self.left_s
        return (
            f"{format_duration(spent_s)} of {format_duration(self.state.budget_s)} used "
            f"({spent_s / self.state.budget_s:.0%})"
        )
