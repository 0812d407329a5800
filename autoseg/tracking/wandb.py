"""Weights & Biases, offline: `tracking/wandb/offline-run-*`. Nothing is sent; who wants it on a server says so himself:

    wandb sync work_dir/tracking/wandb/offline-run-*

The files follow from what autoseg stores anyway, so a run that goes on is written anew under its own id.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from autoseg.tracking.tracker import Ending, Epoch, TrackedRun, faults_of

SERVICE = "WANDB_SERVICE"
"""Environment variable by which processes share the helper that writes the files. It would take a job that was killed
and is begun again for one that still runs, so each of our processes has its own."""


class Wandb:
    """A run of W&B, offline."""

    def __init__(self, run: TrackedRun) -> None:
        """Say which; nothing is written before `begin`."""
        self.run = run

    def begin(self, epochs: Sequence[Epoch]) -> None:
        """As `Tracker`."""
        os.environ.pop(SERVICE, None)
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # else its own faults are sent to a server, offline or not
        import wandb

        with _faults():
            self.run.folder.mkdir(parents=True, exist_ok=True)
            for earlier in (self.run.folder / "wandb").glob(f"offline-run-*-{self.run.id}"):
                shutil.rmtree(earlier, ignore_errors=True)  # a killed process' helper may be writing its log
            # No console, code, command line, machine or user: what stands in the files is what autoseg says.
            quiet = wandb.Settings(
                mode="offline",
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,
                x_disable_machine_info=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
            )
            self.open = wandb.init(
                id=self.run.id,
                name=self.run.name,
                project=_plain(self.run.experiment),
                group=self.run.parent or None,
                config=dict(self.run.params),
                dir=str(self.run.folder),
                settings=quiet,
                reinit="create_new",  # the run as a whole is open, too, while this process trains its jobs
            )
        os.environ.pop(SERVICE, None)
        for epoch in epochs:
            self.log(epoch)

    def log(self, epoch: Epoch) -> None:
        """As `Tracker`, but W&B keeps an epoch open for further metrics, and writes it with the next, or at the end."""
        with _faults():
            self.open.log(dict(epoch.metrics), step=epoch.number)

    def summarise(self, values: Mapping[str, float]) -> None:
        """As `Tracker`."""
        with _faults():
            self.open.summary.update(dict(values))

    def attach(self, file: Path) -> None:
        """As `Tracker`."""
        with _faults():
            copied = Path(self.open.dir) / file.name  # W&B would lay a link
            shutil.copyfile(file, copied)
            self.open.save(str(copied), base_path=self.open.dir, policy="now")

    def close(self, ending: Ending) -> None:
        """As `Tracker`."""
        with _faults():
            self.open.finish(exit_code=int(ending != "finished"))


def _plain(name: str) -> str:
    """A name without what W&B refuses in those of projects."""
    return "".join("_" if c in "/\\#?%:" or not c.isprintable() else c for c in name)[:128]


@contextmanager
def _faults() -> Iterator[None]:
    """As `faults_of`; where the helper that writes the files has died, W&B raises two that are no errors of its own."""
    import wandb
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

    with faults_of(wandb.Error, HandleAbandonedError, MailboxClosedError):
        yield
