"""The trackers by name. One more is a file beside this one and a row here (CONTRIBUTING.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

from autoseg.config.settings import TrackerName, TrackSettings
from autoseg.errors import ConfigError
from autoseg.hardware.packages import install_advice
from autoseg.tracking.tracker import TrackedRun, Tracker


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackerRow:
    """One tracker."""

    packages: tuple[str, ...]
    """Modules that it needs, of the extra `track`; empty: none."""
    place: str
    """Its class, as `module:class`; imported when a run is tracked."""

    def open(self, run: TrackedRun) -> Tracker:
        """A run's tracker. Raises: TrackingError, ConfigError."""
        module, _, name = self.place.partition(":")
        make: Callable[[TrackedRun], Tracker] = getattr(import_module(module), name)
        return make(run)


TRACKERS: dict[TrackerName, TrackerRow] = {
    "tensorboard": TrackerRow(packages=("tensorboard",), place="autoseg.tracking.tensorboard:TensorBoard"),
    "mlflow": TrackerRow(packages=("mlflow",), place="autoseg.tracking.mlflow:Mlflow"),
    "wandb": TrackerRow(packages=("wandb",), place="autoseg.tracking.wandb:Wandb"),
}


def check_tracker(settings: TrackSettings | None) -> None:
    """Raise a ConfigError where the packages of the chosen tracker, if there is one, are missing."""
    if settings is None or settings.tool is None:
        return
    missing = [name for name in TRACKERS[settings.tool].packages if find_spec(name) is None]
    if missing:
        lacks = f"track: {settings.tool} needs {', '.join(missing)}, which is not installed."
        raise ConfigError(f"{lacks} {install_advice('track')}")
