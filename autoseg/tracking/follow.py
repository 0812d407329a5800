"""One run of a tracker as jobs and the pipeline work on it: named once, told what is stored, left where it fails."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from autoseg.config.settings import TrackSettings
from autoseg.tracking.table import TRACKERS
from autoseg.tracking.tracker import Ending, Epoch, TrackedRun, Tracker, TrackingError, metrics_of, params_of
from autoseg.workspace.stored import Stored, read_stored, write_stored
from autoseg.workspace.workspace import Workspace

log = logging.getLogger(__name__)

WHOLE = "run"
"""Name of the run as a whole, beside those of its jobs."""


class TrackedName(Stored):
    """What stands in a tracking.json."""

    id: str = Field(pattern="^[0-9a-f]{32}$")
    """As `TrackedRun.id`."""


def name_of(path: Path, *, anew: bool) -> str:
    """The name that a file keeps; a new one where there is none, or `anew`."""
    if anew or not path.exists():
        write_stored(path, TrackedName(id=uuid.uuid4().hex))
    return read_stored(path, TrackedName).id


class Follower:
    """Tells a tracker of one run. Training never fails for it: what it cannot be told is said once, and made up for
    when the job starts next.
    """

    def __init__(
        self, settings: TrackSettings, workspace: Workspace, name: str, kept: Path, params: Mapping[str, Any]
    ) -> None:
        """Set up; nothing is opened yet.

        Args:
            settings: `track`, as a block with a tool.
            workspace: of the run, a round or a trial.
            name: as `TrackedRun`.
            kept: the file that keeps the run's id.
            params: what the run is made from, as plain data.
        """
        assert settings.tool is not None, "nothing follows where there is no tracker"
        self.settings, self.workspace, self.name, self.kept, self.params = settings, workspace, name, kept, params
        self.tool = settings.tool
        self.tracker: Tracker | None = None

    def begin(self, lines: Sequence[Mapping[str, Any]], *, anew: bool) -> None:
        """Open the run.

        Args:
            lines: of metrics.jsonl, which the run is to have.
            anew: whether the training starts anew, which makes it another run.
        """
        if self.tracker is not None:
            self.end("failed")
        whole = self.workspace.tracked
        run = TrackedRun(
            id=name_of(self.kept, anew=anew),
            name=self.name,
            experiment=self.settings.experiment or folder_name(self.workspace.tracking.parent),
            parent=name_of(whole, anew=False) if whole.exists() and whole != self.kept else "",
            folder=self.workspace.tracking.absolute(),
            uri=self.settings.uri,
            params=params_of(self.params),
        )
        epochs = [Epoch(line["epoch"], metrics_of(line)) for line in lines]

        def opened() -> None:
            self.tracker = TRACKERS[self.tool].open(run)
            self.tracker.begin(epochs)

        self._tell(opened)

    def _tell(self, words: Callable[[], None]) -> None:
        try:
            words()
        except TrackingError as error:
            self.tracker = None
            log.warning(
                "%s: track: %s failed: %s. The run goes on without it; what it misses is in work_dir.",
                self.name, self.tool, error,
            )  # fmt: skip

    def add(self, line: Mapping[str, Any]) -> None:
        """Tell of an epoch, or of further scores of the last one, by its line of metrics.jsonl."""
        if tracker := self.tracker:
            self._tell(lambda: tracker.log(Epoch(line["epoch"], metrics_of(line))))

    def change_last(self, line: Mapping[str, Any]) -> None:
        """Tell of the last epoch's scores, which it had none of before."""
        if tracker := self.tracker:
            scores = {name: value for name, value in metrics_of(line).items() if name.startswith("val")}
            self._tell(lambda: tracker.log(Epoch(line["epoch"], scores)))

    def summarise(self, values: Mapping[str, float]) -> None:
        """Tell of numbers of the run as a whole."""
        if (tracker := self.tracker) and values:
            self._tell(lambda: tracker.summarise(values))

    def attach(self, files: Iterable[Path]) -> None:
        """Add those of some files that are there."""
        for file in files:
            if (tracker := self.tracker) and file.is_file():
                self._attach(tracker, file)

    def _attach(self, tracker: Tracker, file: Path) -> None:
        self._tell(lambda: tracker.attach(file))

    def end(self, ending: Ending) -> None:
        """End the work on the run."""
        if tracker := self.tracker:
            self.tracker = None  # first: whatever comes of it, it is closed once
            self._tell(lambda: tracker.close(ending))


def folder_name(folder: Path) -> str:
    """What people call a run without a name: its folder, or what that lies in where it has the usual name."""
    folder = folder.absolute()
    return (folder.parent.name if folder.name == "work_dir" else folder.name) or "autoseg"
