"""Trackers, each with its own library and no network: what a run, a kill and a restart leave in their stores."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from autoseg.config.load import load_settings
from autoseg.config.passwords import TRACK_VARIABLE, VARIABLE
from autoseg.config.settings import TrackerName, TrackSettings
from autoseg.errors import ConfigError
from autoseg.tracking import table
from autoseg.tracking.follow import Follower, folder_name
from autoseg.tracking.tracker import LONGEST_PARAM, Ending, TrackedRun, by_class, metrics_of, params_of
from autoseg.tracking.wandb import Wandb
from autoseg.training.progress import Curve
from autoseg.workspace.workspace import Workspace

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*noload.*"),  # MLflow's, about its own database
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # MLflow leaves its connections to the collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

TOOLS = [
    pytest.param("tensorboard", marks=pytest.mark.extra("tensorboard")),
    pytest.param("mlflow", marks=pytest.mark.extra("mlflow")),
    pytest.param("wandb", marks=pytest.mark.extra("wandb")),
]
CLASSES = ("sphere", "Leber (links)/1.2")
TAGS = ("val_class/sphere", "val_class/Leber _links__1_2")


def line(epoch: int, *, dice: float | None = None) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    scores = {} if dice is None else {"val_class": {name: dice - i / 8 for i, name in enumerate(CLASSES)}}
    return {"epoch": epoch, "train_loss": 1 / epoch, "val_dice": dice, "lr": 0.001, **scores}


def follow(work_dir: Path, tool: TrackerName, **block: Any) -> Follower:
    """A job's follower, as the job makes it."""
    workspace = Workspace(work_dir)
    job = workspace.job_dir("segresnet", 0)
    job.root.mkdir(parents=True, exist_ok=True)
    params = {"batch_size": 2, "network": {"init_filters": 8}, "roi_size": [32, 32, 16], "mode": "x" * 900}
    return Follower(TrackSettings(tool=tool, **block), workspace, "segresnet_0", job.tracking, params)


# -- what the stores hold, read by the libraries themselves
Series = dict[str, list[tuple[int, float]]]


def read_tensorboard(work_dir: Path, name: str) -> tuple[Series, str, set[str], str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(work_dir / "tracking" / "tensorboard" / name))
    events.Reload()
    series = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    start = HParamsPluginData.FromString(events.PluginTagToContent("hparams")["_hparams_/session_start_info"])
    texts = {
        tag: events.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode()
        for tag in ("files", "state")
        if f"{tag}/text_summary" in events.Tags()["tensors"]
    }
    files = {texts["files"]} if "files" in texts else set()
    return series, start.session_start_info.hparams["batch_size"].string_value, files, texts.get("state", "")


def mlflow_runs(work_dir: Path, uri: str = "") -> tuple[Any, list[Any]]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri or f"sqlite:///{work_dir / 'tracking' / 'mlflow.db'}")
    experiments = [e.experiment_id for e in client.search_experiments() if e.name != "Default"]
    return client, list(client.search_runs(experiments)) if experiments else []


def read_mlflow(work_dir: Path, name: str) -> tuple[Series, str, set[str], str]:
    client, runs = mlflow_runs(work_dir)
    (run,) = [run for run in runs if run.info.run_name == name]
    series = {
        key: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)] for key in run.data.metrics
    }
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    status = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}.get(run.info.status, "")
    return series, run.data.params["batch_size"], files, status


def records(path: Path) -> Iterator[bytes]:
    """Records of a .wandb file: LevelDB's log format, with blocks of 32 KiB, after a header of 7 bytes."""
    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        size, kind = struct.unpack_from("<HB", data, place + 4)
        part = data[place + 7 : place + 7 + size]
        place += 7 + size
        whole = part if kind in (1, 2) else whole + part
        if kind in (1, 4):
            yield whole


def read_wandb(work_dir: Path, name: str) -> tuple[Series, str, set[str], str]:
    """W&B's helper writes the file, and is through a little after the run has ended."""
    folders = list((work_dir / "tracking" / "wandb").glob("offline-run-*"))
    (path,) = [path for folder in folders for path in folder.glob("*.wandb")]
    while not any(kind == "exit" for kind, _ in wandb_records(path)):
        time.sleep(0.1)
    values: Series = {}
    files: set[str] = set()
    params, state = {}, ""
    for kind, record in wandb_records(path):
        if kind == "run":
            assert record.display_name == name
            params = {item.key: item.value_json for item in record.config.update}
        elif kind == "history":
            entry = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.item}
            for key, value in entry.items():
                if not key.startswith("_"):
                    values.setdefault(key, []).append((entry["_step"], value))
        elif kind == "summary":
            final = {item.key or item.nested_key[0]: item.value_json for item in record.update}
            values.update({key: [(0, json.loads(text))] for key, text in final.items() if key.startswith("final")})
        elif kind == "files":
            files |= {item.path for item in record.files}
        elif kind == "exit":
            state = "finished" if record.exit_code == 0 else "failed"
    return values, json.loads(params["batch_size"]), files, state


def wandb_records(path: Path) -> list[tuple[str, Any]]:
    from wandb.proto import wandb_internal_pb2

    parsed = [wandb_internal_pb2.Record.FromString(data) for data in records(path)]
    kinds = [record.WhichOneof("record_type") for record in parsed]
    return [(kind, getattr(record, kind)) for kind, record in zip(kinds, parsed, strict=True)]


READERS: dict[str, Callable[[Path, str], tuple[Series, str, set[str], str]]] = {
    "tensorboard": read_tensorboard,
    "mlflow": read_mlflow,
    "wandb": read_wandb,
}


def near(points: list[tuple[int, float]]) -> list[tuple[int, Any]]:
    return [(step, pytest.approx(value, abs=1e-6)) for step, value in points]


# -- one run
@pytest.mark.parametrize("tool", TOOLS)
def test_a_run_is_in_its_store(tmp_path: Path, tool: TrackerName) -> None:
    follower = follow(tmp_path, tool)
    follower.begin([], anew=True)
    follower.add(line(1))
    follower.add(line(2, dice=0.5))
    follower.add(line(3))
    follower.change_last(line(3, dice=0.75))
    follower.summarise({"final/dice": 0.7})
    (tmp_path / "report.html").write_text("<p>all of it")
    follower.attach([tmp_path / "report.html", tmp_path / "missing"])
    follower.end("finished")
    series, batch_size, files, state = READERS[tool](tmp_path, "segresnet_0")
    assert series["train/loss"] == near([(1, 1.0), (2, 0.5), (3, 1 / 3)])
    assert series["val/acc"] == near([(2, 0.5), (3, 0.75)])
    assert series[TAGS[0]] == near([(2, 0.5), (3, 0.75)])
    assert series[TAGS[1]] == near([(2, 0.375), (3, 0.625)])
    assert series["final/dice"] == near([(0, 0.7)])
    assert (batch_size, files, state) == ("2", {"report.html"}, "finished")


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_tracking import follow, line
follower = follow(Path(sys.argv[1]), sys.argv[2])
follower.begin([], anew=True)
for epoch in (1, 2, 3, 4):
    follower.add(line(epoch, dice=epoch / 8))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("tool", TOOLS)
def test_a_killed_run_goes_on_with_each_epoch_once(tmp_path: Path, tool: TrackerName) -> None:
    """Its checkpoint knows of 2 of 4 epochs."""
    code = KILLED.format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", code, str(tmp_path), tool]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    before = (tmp_path / "segresnet_0" / "tracking.json").read_text()
    follower = follow(tmp_path, tool)
    follower.begin([line(1, dice=1 / 8), line(2, dice=2 / 8)], anew=False)
    for epoch in (3, 4, 5):
        follower.add(line(epoch, dice=epoch / 8))
    follower.end("stopped")
    follower = follow(tmp_path, tool)
    follower.begin([line(n, dice=n / 8) for n in (1, 2, 3, 4, 5)] + [line(6)], anew=False)
    follower.end("stopped")
    follower = follow(tmp_path, tool)  # validated once more, when all epochs were through
    follower.begin([line(n, dice=n / 8) for n in (1, 2, 3, 4, 5)] + [line(6)], anew=False)
    follower.change_last(line(6, dice=6 / 8))
    follower.end("finished")
    series, *_ = READERS[tool](tmp_path, "segresnet_0")
    assert series["val/acc"] == near([(n, n / 8) for n in (1, 2, 3, 4, 5, 6)])
    assert series[TAGS[0]] == near([(n, n / 8) for n in (1, 2, 3, 4, 5, 6)])
    assert series["train/loss"] == near([(n, 1 / n) for n in (1, 2, 3, 4, 5, 6)])
    assert (tmp_path / "segresnet_0" / "tracking.json").read_text() == before


@pytest.mark.extra("mlflow")
def test_a_training_from_the_start_is_another_run_and_its_runs_belong_together(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    whole = Follower(TrackSettings(tool="mlflow", experiment="liver"), workspace, "run", workspace.tracked, {})
    whole.begin([], anew=False)
    follower = follow(tmp_path, "mlflow", experiment="liver")
    follower.begin([], anew=True)
    follower.add(line(1))
    follower.begin([], anew=True)  # after a divergence
    follower.end("finished")
    whole.end("finished")
    _, runs = mlflow_runs(tmp_path)
    assert sorted((r.info.run_name, r.info.status) for r in runs) == [
        ("run", "FINISHED"), ("segresnet_0", "FAILED"), ("segresnet_0", "FINISHED"),
    ]  # fmt: skip
    (top,) = [r.info.run_id for r in runs if r.info.run_name == "run"]
    assert {r.data.tags.get("mlflow.parentRunId") for r in runs if r.info.run_name != "run"} == {top}


@pytest.mark.extra("mlflow")
def test_a_moved_store_writes_nothing_where_it_lay(tmp_path: Path) -> None:
    follow(tmp_path / "here", "mlflow", experiment="liver").begin([], anew=True)
    (tmp_path / "here").rename(tmp_path / "there")
    follower = follow(tmp_path / "there", "mlflow", experiment="liver")
    follower.begin([line(1)], anew=False)
    (tmp_path / "plan.yaml").write_text("a: 1")
    follower.attach([tmp_path / "plan.yaml"])
    follower.end("finished")
    assert not (tmp_path / "here").exists()
    assert len(list((tmp_path / "there" / "tracking" / "mlflow_files").rglob("plan.yaml"))) == 1


@pytest.mark.extra("mlflow")
@pytest.mark.extra("wandb")
@pytest.mark.extra("tensorboard")
@pytest.mark.parametrize("tool", ["tensorboard", "mlflow", "wandb"])
def test_a_store_that_fails_is_said_once_and_training_goes_on(
    tmp_path: Path, tool: TrackerName, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tracking").write_text("a file where a folder should be")
    follower = follow(tmp_path, tool)
    follower.begin([], anew=True)
    follower.add(line(1))
    follower.summarise({"final/dice": 1.0})
    follower.attach([tmp_path / "tracking"])
    follower.end("finished")
    (message,) = caplog.messages
    assert message.startswith(f"segresnet_0: track: {tool} failed: ")
    assert message.endswith("The run goes on without it; what it misses is in work_dir.")


@pytest.mark.extra("wandb")
@pytest.mark.parametrize("error", ["MailboxClosedError", "HandleAbandonedError"])
def test_a_helper_of_wandb_that_died_fails_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: str
) -> None:
    """W&B's own process was killed, for want of memory: `finish` raises what is none of W&B's errors."""
    import wandb.sdk.mailbox as mailbox

    class Open:
        def finish(self, *, exit_code: int) -> None:
            raise getattr(mailbox, error)

    follower = follow(tmp_path, "wandb")
    follower.tracker = opened = Wandb(
        TrackedRun(id="0" * 32, name="segresnet_0", experiment="e", folder=tmp_path, params={})
    )
    opened.open = Open()
    follower.end("finished")
    assert follower.tracker is None
    (message,) = caplog.messages
    assert message.startswith(f"segresnet_0: track: wandb failed: {error}. The run goes on without it")


def test_a_run_is_closed_once_whatever_comes_of_it(tmp_path: Path) -> None:
    """A bug of a tracker while a finished job is closed: the job's failure closes nothing a second time."""
    told = []

    class Broken:
        def close(self, ending: Ending) -> None:
            told.append(ending)
            raise RuntimeError("a bug")

    follower = follow(tmp_path, "wandb")
    follower.tracker = Broken()  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="a bug"):
        follower.end("finished")
    follower.end("failed")
    assert told == ["finished"]


@pytest.mark.extra("mlflow")
def test_a_password_of_a_server_is_in_no_message_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv(TRACK_VARIABLE, "hunter2")
    follow(tmp_path, "mlflow", uri=f"http://me:${TRACK_VARIABLE}@127.0.0.1:9/").begin([], anew=True)
    (message,) = caplog.messages
    assert "127.0.0.1" in message
    files = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any("hunter2" in text for text in (message, *files))


# -- who is told, and what
def test_the_first_process_alone_tells(tmp_path: Path) -> None:
    told = []

    class Noted(Follower):
        def __init__(self) -> None:
            self.tracker = None

        def begin(self, lines: Any, *, anew: bool) -> None:
            told.append(("begin", [entry["epoch"] for entry in lines], anew))

        def add(self, line: Any) -> None:
            told.append(("add", line["epoch"]))

        def change_last(self, line: Any) -> None:
            told.append(("change", line["val_dice"]))

    for is_written in (False, True):
        curve = Curve(tmp_path / "metrics.jsonl", is_written=is_written, follower=Noted())
        curve.start()
        for epoch in (1, 2, 3):
            curve.add(line(epoch))
        assert told == [] or is_written
    curve.go_on_after(2)
    curve.change_last({"val_dice": 0.5})
    assert told == [
        ("begin", [], True), ("add", 1), ("add", 2), ("add", 3), ("begin", [1, 2], False), ("change", 0.5)
    ]  # fmt: skip


def test_names_of_metrics_and_params() -> None:
    assert metrics_of({"epoch": 1, "train_loss": 0.5}) == {"train/loss": 0.5}
    assert metrics_of(line(2, dice=0.5)) == {
        "train/loss": 0.5, "train/learning_rate": 0.001, "val/acc": 0.5, TAGS[0]: 0.5, TAGS[1]: 0.375,
    }  # fmt: skip
    assert metrics_of({"epoch": 1, "train_loss": 0.5, "val_l1": 0.25}) == {"train/loss": 0.5, "val/l1": 0.25}
    assert by_class("c", {"a/b": 1.0, "a.b": 2.0, "a_b": None, "..": 3.0, "": 4.0}) == {
        "c/a_b": 1.0, "c/a_b_2": 2.0, "c/__": 3.0, "c/_": 4.0
    }  # fmt: skip
    params = params_of({"a": {"b": None, "c": 1}, "d": [], "e": "x" * 900, "f": {"a class": 2}})
    assert params == {"a.c": "1", "e": "x" * (LONGEST_PARAM - 3) + "...", "f": "{'a class': 2}"}
    assert folder_name(Path("/data/liver/work_dir")) == "liver"
    assert folder_name(Path("/data/liver/run_2")) == "run_2"


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"track: mlflow needs mlflow, which is not installed\. .*\[track\]"):
        table.check_tracker(TrackSettings(tool="mlflow"))


# -- settings
def load(folder: Path, text: str, **words: str) -> Any:
    for name in ("datalist.json", "data"):
        (folder / name).mkdir(exist_ok=True) if name == "data" else (folder / name).write_text("{}")
    path = folder / "input.yaml"
    path.write_text(f"modality: CT\ndatalist: datalist.json\ndataroot: data\n{text}")
    return load_settings(path, words)[0]


def test_the_setting_is_a_name_or_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRACK_VARIABLE, "")
    assert load(tmp_path, "").tracking is None
    assert load(tmp_path, "track: wandb\nname: liver").tracking == TrackSettings(tool="wandb", experiment="liver")
    block = load(tmp_path, "track: {tool: mlflow, uri: 'sqlite:///runs/m.db'}")
    assert block.tracking.uri == f"sqlite:///{tmp_path}/runs/m.db"
    assert load(tmp_path, "", track="tensorboard").tracking.tool == "tensorboard"
    for text, message in {
        "track: mflow": f"one of {', '.join(table.TRACKERS)} or {{tool, uri, experiment, report}}, found mflow",
        "track: {tool: wandb, uri: 'https://a.b'}": "wandb writes into work_dir",
        "track: {tool: mlflow, uri: mlruns}": "MLflow has given up folders",
        "track: {uri: 'https://a.b'}": "uri: without a tool it has no effect",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load(tmp_path, text)


def test_auto3dsegs_keys_are_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    address, name = "mlflow_tracking_uri: http://127.0.0.1:5000", "mlflow_experiment_name: Auto3DSeg"
    assert load(tmp_path, f"{address}\n{name}").tracking == TrackSettings(
        tool="mlflow", uri="http://127.0.0.1:5000", experiment="Auto3DSeg"
    )
    assert load(tmp_path, "mlflow_tracking_uri: mlruns").tracking.uri == f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    for text in (name, f"mlflow_tracking_uri: null\n{name}"):  # as Auto3DSeg: no address, no MLflow
        assert load(tmp_path, text).tracking is None
    assert load(tmp_path, "", mlflow_tracking_uri="http://127.0.0.1:1").tracking.uri == "http://127.0.0.1:1"
    assert caplog.messages == []
    assert load(tmp_path, f"{address}\n{name}\ntrack: wandb").tracking.tool == "wandb"
    assert caplog.messages == [
        f"{tmp_path}/input.yaml:{number}: {key}: has no effect: track is set, which {setting} belongs to."
        for number, key, setting in [
            (4, "mlflow_tracking_uri", "track.uri"), (5, "mlflow_experiment_name", "track.experiment"),
        ]
    ]  # fmt: skip


def test_two_passwords_of_a_run_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setenv(TRACK_VARIABLE, "")
    uri, storage = "https://me:one%21@mlflow.example.org", "postgresql://me:two@db.example.org/study"
    settings = load(tmp_path, f"track: {{tool: mlflow, uri: '{uri}'}}\nsweep: {{storage: '{storage}'}}")
    assert settings.tracking.uri == f"https://me:${TRACK_VARIABLE}@mlflow.example.org"
    assert settings.sweep.storage == f"postgresql://me:${VARIABLE}@db.example.org/study"
    assert (os.environ[TRACK_VARIABLE], os.environ[VARIABLE]) == ("one!", "two")
