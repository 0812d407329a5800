"""Ray and Slurm for real: a faked two-node Ray cluster that loses a node, submitit's local executor."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import wait_for_epochs
from test_jobs import copied, planned, set_epochs

from autoseg.config.settings import Settings
from autoseg.errors import ResourceError
from autoseg.launch import Task, launch
from autoseg.launch.slurm_array import Work
from autoseg.workspace.workspace import Workspace

FIXTURES = (copied, planned)


def settings_of(work: Path, **changes: Any) -> Settings:
    return Settings(modality="MRI", datalist=work / "d", dataroot=work.parent, work_dir=work, device="cpu", **changes)


def job_task(work: Path, fold: int) -> Task:
    words = ("train", "--work_dir", str(work), "--algo", "segresnet", "--fold", str(fold), "--wait", "--device", "cpu")
    return Task(name=f"segresnet_{fold}", words=words)


def states(work: Path) -> list[str]:
    return [json.loads((work / f"segresnet_{fold}" / "job.json").read_text())["state"] for fold in range(2)]


def ends(work: Path, fold: int, steps: int) -> int:
    """How often a job ran to its end."""
    return (work / f"segresnet_{fold}" / "train.log").read_text().count(f"after {steps} steps")


@pytest.mark.extra("submitit")
def test_submitit_runs_the_array(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    work = copied / "work_dir"
    settings = settings_of(work, launcher="slurm", slurm={"cluster": "local"})
    codes: list[tuple[str, int]] = []

    def ended(task: Task, code: int) -> bool:
        codes.append((task.name, code))
        return False

    launch([job_task(work, fold) for fold in range(2)], settings, ended, output=work / "state" / "launch")
    assert sorted(codes) == [("segresnet_0", 0), ("segresnet_1", 0)]
    assert states(work) == ["done", "done"]
    assert [ends(work, fold, 4) for fold in range(2)] == [1, 1]
    assert not list(work.rglob("*.pkl")), "the work_dir holds no pickle"
    assert list((copied / "work_dir_slurm").rglob("*.pkl"))


@pytest.mark.extra("submitit")
def test_a_preempted_task_saves_and_goes_on(copied: Path) -> None:
    """What submitit does on Slurm's signal: call `checkpoint`, and later what that returned."""
    work = copied / "work_dir"
    set_epochs(work, 60)
    task, first = job_task(work, 0), Work()
    thread = threading.Thread(target=first, args=(task, str(work / "state")))
    thread.start()
    metrics = work / "segresnet_0" / "metrics.jsonl"
    wait_for_epochs(metrics, 2)
    delayed = first.checkpoint(task, str(work / "state"))
    thread.join()
    assert Workspace(work).read_job("segresnet", 0).state == "pending"
    assert delayed.function(*delayed.args) == 0
    assert Workspace(work).read_job("segresnet", 0).state == "done"
    log = (work / "segresnet_0" / "train.log").read_text()
    assert "going on after epoch" in log
    assert len(metrics.read_text().splitlines()) == 60


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU each, faked on this machine."""
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    made.victim = made.add_node(num_cpus=1)  # type: ignore[attr-defined]
    made.add_node(num_cpus=1)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.extra("ray")
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore")
def test_a_ray_cluster_that_loses_a_node_ends_the_run(cluster: Any, copied: Path) -> None:
    work = copied / "work_dir"
    for fold in range(2):
        set_epochs(work, 80, fold)
    settings = settings_of(work, launcher="ray", address=cluster.address)
    killed = threading.Event()

    def kill_when_both_train() -> None:
        for fold in range(2):
            wait_for_epochs(work / f"segresnet_{fold}" / "metrics.jsonl", 4)
        cluster.remove_node(cluster.victim, allow_graceful=False)
        killed.set()

    threading.Thread(target=kill_when_both_train, daemon=True).start()
    tasks = [job_task(work, fold) for fold in range(2)]
    launch(tasks, settings, lambda task, code: code != 0, output=work / "state" / "launch")
    assert killed.is_set()
    assert states(work) == ["done", "done"]
    assert [ends(work, fold, 160) for fold in range(2)] == [1, 1], "none ran twice to its end"
    logs = [(work / f"segresnet_{fold}" / "train.log").read_text() for fold in range(2)]
    assert sum("going on after epoch" in log for log in logs) == 1, "one was cut off, and lost nothing it had saved"


@pytest.mark.extra("ray")
@pytest.mark.filterwarnings("ignore")
def test_no_ray_cluster_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        ResourceError, match=r"^address: no Ray cluster at auto \(.*\)\. Start one with `ray start --head`"
    ):
        launch([], settings_of(tmp_path, launcher="ray"), lambda task, code: False, output=tmp_path)
