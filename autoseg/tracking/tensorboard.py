"""TensorBoard: event files in `tracking/tensorboard/<name>`, one folder a run.

    tensorboard --logdir work_dir/tracking/tensorboard

The files follow from what autoseg stores anyway, so a run that goes on writes its file anew: it holds each epoch once,
and the half record that a kill may leave at the end of a file goes with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autoseg.tracking.tracker import Ending, Epoch, TrackedRun, faults_of


class TensorBoard:
    """A run's folder of events."""

    def __init__(self, run: TrackedRun) -> None:
        """Say which; nothing is written before `begin`."""
        self.run = run
        self.folder = run.folder / "tensorboard" / run.name
        self.params: dict[str, str] = dict(run.params)
        self.writer: Any = None  # SummaryWriter's types leave out the writer of files, which alone takes parameters

    def begin(self, epochs: Sequence[Epoch]) -> None:
        """As `Tracker`."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        with faults_of():
            earlier = [path for path in self.folder.glob("events.out.tfevents.*") if path.is_file()]
            # A viewer that is open drops what it had read of the earlier files.
            self.writer = SummaryWriter(str(self.folder), purge_step=0)
            for summary in hparams(self.params, {"val/acc": None, "final/dice": None}):
                self.writer.file_writer.add_summary(summary)
            for epoch in epochs:
                self._add(epoch)
            self.writer.flush()
            for path in earlier:
                path.unlink()

    def _add(self, epoch: Epoch) -> None:
        for name, value in epoch.metrics.items():
            self.writer.add_scalar(name, value, epoch.number)

    def log(self, epoch: Epoch) -> None:
        """As `Tracker`."""
        with faults_of():
            self._add(epoch)
            self.writer.flush()

    def summarise(self, values: Mapping[str, float]) -> None:
        """As `Tracker`."""
        self.log(Epoch(0, values))

    def attach(self, file: Path) -> None:
        """TensorBoard keeps no files: their names."""
        with faults_of():
            self.writer.add_text("files", file.name)
            self.writer.flush()

    def close(self, ending: Ending) -> None:
        """As `Tracker`."""
        with faults_of():
            self.writer.add_text("state", ending)
            self.writer.close()
