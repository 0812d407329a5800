"""Out-of-fold scoring on the launcher: the models of a fold merged and scored on its held-out cases, a task each.

A task is `autoseg ensemble --work_dir W --fold F`, on any machine that sees W. Where there are more places than folds,
a task does a share of a fold's cases: `--part 2/3`. A claim keeps two workers from one part; each case that is through
has its record, so that a worker which was killed goes on where it was. What is left to do at the end, such as a case
that cannot be read, the stage itself meets and says.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from autoseg.config.networks import LOCATOR
from autoseg.config.settings import EnsembleSettings, Settings
from autoseg.data.datalists.cases import Case, Datalist
from autoseg.data.datalists.datalist import read_cases
from autoseg.ensemble.out_of_fold import Fold, score_cases
from autoseg.errors import ConfigError, DataError, ResourceError, WorkspaceError, counted
from autoseg.hardware.limits import DEVICE_NAME
from autoseg.launch import Task, launch, stop_with_launcher
from autoseg.pipeline.training_jobs import USERS_FAULT, in_this_process, job_resources, task_device
from autoseg.pipeline.worker import latest_planned, planned_settings
from autoseg.workspace.claims import Claim
from autoseg.workspace.digests import DIGESTS
from autoseg.workspace.files import last_lines
from autoseg.workspace.layout import check_writable
from autoseg.workspace.workspace import Workspace

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some of a fold's held-out cases."""

    fold: int
    number: int = 1
    """From 1."""
    count: int = 1
    """Parts of the fold."""

    @property
    def name(self) -> str:
        """Of its task and its claim."""
        return f"fold_{self.fold}" + (f"_part_{self.number}_of_{self.count}" if self.count > 1 else "")

    def of(self, cases: Sequence[Case]) -> Sequence[Case]:
        """The part's cases among all of the fold; large and small ones are likely to be neighbours in the list."""
        return cases[self.number - 1 :: self.count]


def read_part(fold: int, text: str | None) -> Part:
    """Read a part as the command line has it, such as 2/3; None: the whole fold.

    Raises:
        ConfigError: It is none.
    """
    if text is None:
        return Part(fold=fold)
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ConfigError(f"--part: expected a number and how many parts there are, such as 2/3, found {text!r}.")
    return Part(fold=fold, number=int(number), count=int(count))


def score_folds(workspace: Workspace, datalist: Datalist, settings: Settings, jobs: Sequence[tuple[str, int]]) -> None:
    """Score the held-out cases of all folds on the launcher of the settings, as far as that is not done.

    One place on a CPU needs no process of its own: there the stage scores them itself.

    Args:
        workspace: of the run or the round.
        datalist: its cases.
        settings: of the run.
        jobs: algorithm and fold of each trained job.

    Raises:
        ResourceError: A worker failed as often as `retries` allows.
        WorkspaceError: A worker found something that the user has to change.
    """
    if in_this_process(settings):
        return
    how = settings.combining
    to_do: dict[int, int] = {}  # fold -> cases
    predicting = set[int]()
    for number in _folds(jobs):
        fold = _fold(workspace, number, jobs, how, settings.device)
        if cases := _open_cases(fold, datalist):
            to_do[number] = len(cases)
            if any(len(fold.kept(case)) < len(fold.algos) for case in cases):
                predicting.add(number)
    if not to_do:
        return
    parts = parts_of(to_do, _num_places(settings))
    memory_gib = {part.name: _memory_gib(workspace, part.fold, jobs) for part in parts}
    attempts = Attempts(workspace, settings.retries)
    launch(
        [_task(workspace, settings, part, predicts=part.fold in predicting) for part in parts],
        settings,
        attempts.ended,
        output=attempts.output,
        memory_gib=lambda task: memory_gib[task.name],
    )
    attempts.raise_failure()


def _folds(jobs: Sequence[tuple[str, int]]) -> list[int]:
    return sorted({fold for _, fold in jobs})


def _fold(workspace: Workspace, fold: int, jobs: Sequence[tuple[str, int]], how: EnsembleSettings, device: str) -> Fold:
    algos = tuple(sorted({algo for algo, other in jobs if other == fold}))
    return Fold(workspace=workspace, fold=fold, algos=algos, combine=how.combine, device=device)


def _open_cases(fold: Fold, datalist: Datalist) -> list[Case]:
    """Cases of a fold that are not scored yet; those whose files are missing are for the stage to report."""
    open_cases = []
    for case in datalist.val_cases(fold.fold):
        try:
            if fold.read(case) is None:
                open_cases.append(case)
        except DataError:
            continue
    return open_cases


def _num_places(settings: Settings) -> int:
    """Tasks that can run at once; on a cluster nobody knows, and a task a fold is enough to queue."""
    from autoseg.launch.local import find_places

    return len(find_places(settings)) if settings.launcher == "local" else 1


def parts_of(num_cases: Mapping[int, int], num_places: int) -> list[Part]:
    """As many parts of each fold as leave no place empty, and none of them."""
    wanted = math.ceil(num_places / len(num_cases))
    return [
        Part(fold=fold, number=number, count=count)
        for fold, num in num_cases.items()
        for count in (min(wanted, num),)
        for number in range(1, count + 1)
    ]


def _memory_gib(workspace: Workspace, fold: int, jobs: Sequence[tuple[str, int]]) -> float | None:
    """Memory that scoring takes at most: less than training its models did."""
    trained = [workspace.read_job(algo, fold).memory_gib for algo, other in jobs if other == fold]
    return max((m for m in trained if m is not None), default=None)


def _task(workspace: Workspace, settings: Settings, part: Part, *, predicts: bool) -> Task:
    """A part as a command for a launcher; without a GPU where nothing is left to be predicted."""
    gpus, cpus = job_resources(settings)
    words = ["ensemble", "--work_dir", str(workspace.root), "--fold", str(part.fold), "--wait"]
    words += ["--device", task_device(settings, gpus) if predicts else "cpu"]
    if part.count > 1:
        words += ["--part", f"{part.number}/{part.count}"]
    return Task(name=part.name, words=tuple(words), gpus=min(gpus, 1) if predicts else 0, cpus=cpus)


class Attempts:
    """Says of each worker that ended whether it is started again, and at the end what went wrong."""

    def __init__(self, workspace: Workspace, retries: int) -> None:
        self.output = workspace.root / "state" / "launch"
        self._retries = retries
        self._failures: dict[str, int] = {}
        self._given_up: list[str] = []
        self._is_users_fault = False

    def ended(self, task: Task, code: int) -> bool:
        """As `autoseg.launch.Ended`."""
        if code == 0:
            return False
        printed = last_lines(self.output / f"{task.name}.out", 1)
        what = f"{task.name}: its process ended with code {code}" + (f": {printed[0]}" if printed else "")
        failures = self._failures[task.name] = self._failures.get(task.name, 0) + 1
        self._is_users_fault = self._is_users_fault or code == USERS_FAULT
        if code == USERS_FAULT or failures > self._retries:
            self._given_up.append(what)
            return False
        log.warning("ensemble: %s. Trying again, %d of %d", what.rstrip("."), failures, self._retries)
        return True

    def raise_failure(self) -> None:
        """Raise where a task was given up; all of them at once."""
        if self._given_up:
            kind = WorkspaceError if self._is_users_fault else ResourceError
            more = f"{self.output} holds all that the workers printed; run again to go on."
            raise kind([*self._given_up[:-1], f"{self._given_up[-1].rstrip('.')}. {more}"])


def work_on_fold(work_dir: Path, part: Part, *, device: str | None, wait: bool) -> int:
    """Merge and score the held-out cases of one fold of a run, or a part of them: what launchers start.

    Args:
        work_dir: of the run, or of a round.
        part: which cases.
        device: where networks run; None: as the run's settings say.
        wait: wait where another worker has the part.

    Returns:
        0; a case that cannot be scored is reported, and again by the stage itself.

    Raises:
        WorkspaceError: No model of the fold is trained, or one cannot be loaded.
        Busy: Another worker has it.
    """
    workspace = latest_planned(work_dir)
    check_writable(workspace.run)
    settings = planned_settings(workspace)
    DIGESTS.open(workspace.digests)
    jobs = [(job.algo, job.fold) for job in workspace.jobs() if job.state == "done" and job.algo != LOCATOR]
    if part.fold not in _folds(jobs):
        trained = ", ".join(map(str, _folds(jobs))) or "none"
        raise WorkspaceError(
            f"{workspace.root}: no model of fold {part.fold} is trained; folds with one: {trained}. "
            "Run `autoseg train` first."
        )
    stop_with_launcher()

    device = device or settings.device
    cases = part.of(read_cases(workspace, settings.dataroot).val_cases(part.fold))
    where = os.environ.get(DEVICE_NAME, device)
    with Claim(workspace.ensemble / ".claims" / part.name, part.name, device=where, wait=wait):
        models = _fold(workspace, part.fold, jobs, settings.combining, device)
        scores, failures = score_cases(models, cases)
    log.info("%s: %d of %s scored", part.name, len(scores), counted(len(scores) + len(failures), "case"))
    return 0
