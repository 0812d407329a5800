"""MLflow: `tracking/mlflow.db` in the work_dir, any database, or a server.

    mlflow ui --backend-store-uri sqlite:///work_dir/tracking/mlflow.db

What is in a store stays: a run that goes on adds the epochs that are missing, and leaves those that were logged.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from autoseg.config.passwords import with_environment
from autoseg.config.settings import SQLITE
from autoseg.tracking.tracker import Ending, Epoch, TrackedRun, TrackingError, faults_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

STATUS: dict[Ending, str] = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
ID = "autoseg.id"
"""Tag by which a run is known again, from whatever machine."""
WITH = {"val_class": "val/acc"}
"""Metrics of many classes -> the one that is logged with them, so that a server is asked for that alone."""
PARAMS_AT_ONCE = 100
"""Source: the most that MLflow's servers take in one batch."""
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # nothing is sent anywhere but to the store
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # a server that is gone must not stop a training for long: by default
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # it is asked 7 times, for 2 minutes each
}


class Mlflow:
    """A run in MLflow's store."""

    def __init__(self, run: TrackedRun) -> None:
        """Find the run in its store, or make it there."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        for library in ("mlflow", "alembic"):
            logging.getLogger(library).setLevel(logging.WARNING)
        self.run = run
        self.known: dict[str, frozenset[int]] = {}  # metric -> epochs that were logged before this start
        with _faults():
            self.client, artifacts = _open_store(run)
            experiment = self._experiment(artifacts)
            ours = self._found(experiment, run.id)
            self.run_id = ours or self._make(experiment)
            if ours:
                self.client.update_run(ours, status="RUNNING")

    def _experiment(self, artifacts: str | None) -> str:
        """The experiment's number; made where it is missing.

        A store keeps the absolute folder of its files: in a work_dir that was moved or copied, further runs belong to
        an experiment of another name, so that nothing is written where it lay before.
        """
        for number in range(1, 1000):
            name = self.run.experiment if number == 1 else f"{self.run.experiment} ({number})"
            there = self.client.get_experiment_by_name(name)
            if there is None:
                return self.client.create_experiment(name, artifact_location=artifacts)
            if artifacts is None or there.artifact_location == artifacts:
                return there.experiment_id
        raise TrackingError(f"more than {number} experiments of the name {self.run.experiment}")

    def _found(self, experiment: str, id: str) -> str | None:
        """MLflow's own name of a run of ours."""
        runs = self.client.search_runs([experiment], f"tags.`{ID}` = '{id}'", max_results=1) if id else []
        return runs[0].info.run_id if runs else None

    def _make(self, experiment: str) -> str:
        from mlflow.entities import Param

        parent = self._found(experiment, self.run.parent)
        tags = {ID: self.run.id, **({"mlflow.parentRunId": parent} if parent else {})}
        run_id: str = self.client.create_run(experiment, run_name=self.run.name, tags=tags).info.run_id
        params = [Param(key, value) for key, value in self.run.params.items()]
        for first in range(0, len(params), PARAMS_AT_ONCE):
            self.client.log_batch(run_id, params=params[first : first + PARAMS_AT_ONCE])
        return run_id

    def begin(self, epochs: Sequence[Epoch]) -> None:
        """As `Tracker`."""
        with _faults():
            for name in self.client.get_run(self.run_id).data.metrics:
                if name.partition("/")[0] not in WITH:
                    history = self.client.get_metric_history(self.run_id, name)
                    self.known[name] = frozenset(metric.step for metric in history)
        for epoch in epochs:
            self.log(epoch)

    def log(self, epoch: Epoch) -> None:
        """As `Tracker`; of an epoch that was logged before this start, what is new, such as a later validation."""
        known = {name for name, epochs in self.known.items() if epoch.number in epochs}
        new = {
            name: value for name, value in epoch.metrics.items() if WITH.get(name.partition("/")[0], name) not in known
        }
        if new:
            self._log(new, epoch.number)

    def _log(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        with _faults():  # one batch: all of an epoch, or nothing
            self.client.log_batch(self.run_id, metrics=[Metric(n, v, now_ms, step) for n, v in metrics.items()])

    def summarise(self, values: Mapping[str, float]) -> None:
        """As `Tracker`; MLflow shows the last value, and keeps the earlier ones."""
        with _faults():
            have = self.client.get_run(self.run_id).data.metrics
        self._log({name: value for name, value in values.items() if have.get(name) != value}, 0)

    def attach(self, file: Path) -> None:
        """As `Tracker`."""
        with _faults():
            self.client.log_artifact(self.run_id, str(file))

    def close(self, ending: Ending) -> None:
        """As `Tracker`."""
        with _faults():
            self.client.set_terminated(self.run_id, STATUS[ending])


@contextmanager
def _faults() -> Iterator[None]:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    with faults_of(MlflowException, SQLAlchemyError):
        yield


def _open_store(run: TrackedRun) -> tuple[MlflowClient, str | None]:
    """The store, and the folder for the files of its runs; None: the server has its own."""
    from mlflow import MlflowClient

    run.folder.mkdir(parents=True, exist_ok=True)
    uri = f"{SQLITE}{run.folder / 'mlflow.db'}"
    if run.uri is not None:
        uri = with_environment(run.uri, setting="track.uri")
    place = run.folder / "mlflow_files"
    if uri.startswith(SQLITE):
        database = Path(uri.removeprefix(SQLITE))
        database.parent.mkdir(parents=True, exist_ok=True)
        place = database.with_name(f"{database.stem}_files")
    artifacts = None if uri.startswith(("http://", "https://")) else str(place)
    return MlflowClient(tracking_uri=uri, registry_uri=uri), artifacts
