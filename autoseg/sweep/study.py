"""The study: where trials are stored, which comes next, and who has it.

Trials are handed out under a claim, so that there are never more than were asked for. Each trial's folder has a claim
of its own: one that is running for Optuna but held by nobody belonged to a worker that died, and is the next to go on.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import TPESampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalFileSymlinkLock
from optuna.trial import Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from autoseg.config.passwords import with_environment, without_passwords
from autoseg.config.settings import SweepSettings
from autoseg.errors import ConfigError, ResourceError
from autoseg.hardware.system import is_windows
from autoseg.sweep.space import Space
from autoseg.workspace.claims import Busy, Claim
from autoseg.workspace.files import digest
from autoseg.workspace.stamps import changed

log = logging.getLogger(__name__)

FULL = 100
"""The pruner's resource of a whole training; reports come at per cent of the schedule."""
FIRST_RUNG = 10
"""Per cent of the schedule before which no trial is stopped."""
FACTOR = 3
"""Of so many trials one goes on at each rung. Source: Li et al. 2018 (Hyperband) recommend 3 or 4."""
JOURNAL_GRACE_S = 10
"""Seconds after which the journal's lock of a worker that died is taken away; it is held for milliseconds."""
KEY = "autoseg"
optuna.logging.set_verbosity(optuna.logging.WARNING)


class Study:
    """A study in a work_dir, shared by all workers that open it.

    Args:
        folder: Its folder in the work_dir.
        settings: Of the sweep.
        space: What is searched.
        made_of: What else makes this search what it is: name -> text.
        seed: Of the sampler.
    """

    def __init__(
        self, folder: Path, settings: SweepSettings, space: Space, made_of: Mapping[str, str], *, seed: int
    ) -> None:
        self.folder, self.settings, self.space, self.seed = folder, settings, space, seed
        self.place = without_passwords(settings.storage) if settings.storage else str(folder / "study.journal")
        up, down = optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE
        folder.mkdir(parents=True, exist_ok=True)
        identity = {
            name: digest(text)
            for name, text in {
                **space.identity(),
                "folds": str(settings.folds),
                "objectives": str(settings.objectives),
                **made_of,
            }.items()
        }
        with self._asking(), self._reachable():
            self.optuna = optuna.create_study(
                storage=_open_storage(settings.storage, folder),
                study_name=settings.study,
                directions=[up if name == "dice" else down for name in settings.objectives],
                load_if_exists=True,
            )
            known = self.optuna.user_attrs.get(KEY)
            if known is None and not self.optuna.get_trials(deepcopy=False):
                self.optuna.set_user_attr(KEY, identity)
                known = identity
        if known != identity:
            what = ", ".join(changed(known, identity)) if known else "it was not made by autoseg"
            raise ConfigError(
                f"sweep.study: the study {settings.study} in {self.place} belongs to another search: {what}. "
                f"Set another sweep.study, or delete that one{'' if settings.storage else f' ({folder})'}."
            )
        self.optuna.pruner = self.pruner()

    @property
    def is_pruned(self) -> bool:
        """Whether trials are stopped early: Optuna does so for one objective alone."""
        return self.settings.pruner != "none" and len(self.settings.objectives) == 1

    def pruner(self) -> BasePruner:
        """The rule that stops trials."""
        if not self.is_pruned:
            return NopPruner()
        if self.settings.pruner == "hyperband":
            return HyperbandPruner(min_resource=FIRST_RUNG, max_resource=FULL, reduction_factor=FACTOR)
        return SuccessiveHalvingPruner(min_resource=FIRST_RUNG, reduction_factor=FACTOR)

    def trial_folder(self, number: int) -> Path:
        """Where a trial's jobs and settings lie."""
        return self.folder / f"trial_{number:04d}"

    def enqueue(self, values: Mapping[str, Any]) -> None:
        """Let the first trial have these values, unless there are trials already."""
        with self._asking(), self._reachable():
            if not self.optuna.get_trials(deepcopy=False):
                self.optuna.enqueue_trial(dict(values))

    def next_trial(self) -> tuple[Trial, Claim] | bool:
        """The next trial to work on, with its claim held by this process.

        Returns:
            A trial; or whether others are still working on theirs, which may yet have to be taken over.
        """
        with self._asking(), self._reachable():
            trials = [t for t in self.optuna.get_trials(deepcopy=False) if t.state != TrialState.WAITING]
            running = [t for t in trials if t.state == TrialState.RUNNING]
            for begun in running:
                claim = self._claim(begun.number)
                try:
                    claim.__enter__()
                except Busy:
                    continue
                log.info("sweep: going on with trial %d", begun.number)
                trial = Trial(self.optuna, begun._trial_id)
                self._seed(begun.number)
                return trial, claim
            if len(trials) >= self.settings.trials:
                return bool(running)
            self._seed(len(trials))
            trial = self.optuna.ask()
            claim = self._claim(trial.number)
            claim.__enter__()
            self.space.suggest(trial)  # under the claim, so that others see all of its values
            return trial, claim

    def _seed(self, number: int) -> None:
        """A sampler of its own for each trial: workers with one seed would all draw the same."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.optuna.sampler = TPESampler(seed=self.seed * 100_003 + number, constant_liar=True)

    def _claim(self, number: int) -> Claim:
        return Claim(self.trial_folder(number) / ".claims", f"trial {number}")

    def _asking(self) -> Claim:
        return Claim(self.folder / ".claims", f"study {self.settings.study}", wait=True, poll_s=0.1)

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        """Say which storage it was that failed, and why.

        Raises:
            ResourceError: It cannot be reached.
        """
        try:
            yield
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError, ImportError, OSError) as error:
            reason = next(iter(str(error.__cause__ or error).strip().splitlines()), type(error).__name__)
            reason = without_passwords(reason)
            raise ResourceError(
                f"sweep.storage: {self.place} cannot be reached ({reason}). Check the address, that the server runs "
                "and that its driver is installed; or leave sweep.storage out to use a file in the work_dir."
            ) from None


def _open_storage(url: str | None, folder: Path) -> BaseStorage:
    if url is None:
        path = str(folder / "study.journal")
        # A file that exists once is a lock on every file system, NFS among them.
        kind = JournalFileOpenLock if is_windows() else JournalFileSymlinkLock  # links need a right there
        lock = kind(path, grace_period=JOURNAL_GRACE_S)
        return JournalStorage(JournalFileBackend(path, lock_obj=lock))
    shown, address = without_passwords(url), with_environment(url)
    if "://" not in address:
        raise ConfigError(f"sweep.storage: expected a URL such as sqlite:///study.db, found {shown}.")
    try:
        return optuna.storages.get_storage(address)
    except ValueError as error:  # a kind of URL that Optuna does not take
        reason = str(error).splitlines()[0].replace(address, shown)
        raise ConfigError(f"sweep.storage: {shown}: {reason}") from None
