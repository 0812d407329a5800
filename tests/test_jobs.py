"""The unit of work: one job, many workers; taken over, tried again, given up, shown and started anew."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
from processes import Started, autoseg, wait_for, wait_for_epochs
from test_pipeline import make_data

from autoseg.config.load import load_settings
from autoseg.config.settings import Settings
from autoseg.data.datalists.datalist import read_cases, read_datalist
from autoseg.launch import Ended, Task
from autoseg.pipeline.training_jobs import train_jobs
from autoseg.plan import Plan
from autoseg.report.status import job_status
from autoseg.training.cache import CachedCase
from autoseg.workspace.claims import Claim
from autoseg.workspace.jobs import Job
from autoseg.workspace.workspace import Workspace


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of two planned jobs; not to be changed."""
    folder = tmp_path_factory.mktemp("planned")
    path = make_data(folder)
    for stage in ("analyze", "generate"):
        assert autoseg(stage, "--input", path).returncode == 0
    return folder


@pytest.fixture
def copied(planned: Path, tmp_path: Path) -> Path:
    shutil.copytree(planned, tmp_path / "run", copy_function=shutil.copy2)
    return tmp_path / "run"


def worker(work_dir: Path, *words: str, fold: int = 0) -> Started:
    return Started("train", "--work_dir", work_dir, "--algo", "segresnet", "--fold", str(fold), *words)


def set_epochs(work_dir: Path, count: int, fold: int = 0) -> None:
    plan = work_dir / f"segresnet_{fold}" / "configs" / "hyper_parameters.yaml"
    text = re.sub(r"^num_epochs: \d+", f"num_epochs: {count}", plan.read_text(), flags=re.M)
    every = f"num_epochs_per_validation: {count // 2}"
    plan.write_text(re.sub(r"^num_epochs_per_validation: \d+", every, text, flags=re.M))


def test_of_two_workers_one_trains(copied: Path) -> None:
    work = copied / "work_dir"
    set_epochs(work, 30)
    first = worker(work)
    wait_for_epochs(work / "segresnet_0" / "metrics.jsonl", 1)
    first.send_signal(signal.SIGSTOP)  # frozen, not dead: the claim holds
    refused, waiting = worker(work), worker(work, "--wait")
    assert refused.wait() == 2
    wait_for(lambda: waiting.stderr.endswith("(taken over after 120 s). Waiting for it.\n"))
    first.send_signal(signal.SIGCONT)
    assert re.fullmatch(
        rf"error: segresnet_0: process {first.pid} on {socket.gethostname()} is working on it since [0-9:]+, last "
        r"heartbeat \d+ s ago \(taken over after 120 s\)\.\n",
        refused.stderr,
    )
    assert (first.wait(), waiting.wait()) == (0, 0)
    assert "segresnet_0 is done (Dice" in waiting.stderr
    text = (work / "segresnet_0" / "train.log").read_text()
    assert text.count("after 60 steps") == 1, "one of them trained, to the end, once"


def test_a_killed_worker_is_followed_and_a_stopped_one_goes_on(copied: Path) -> None:
    work = copied / "work_dir"
    set_epochs(work, 60)
    stopped = worker(work)
    wait_for_epochs(work / "segresnet_0" / "metrics.jsonl", 2)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait() == 130
    assert "pending" in autoseg("status", "--work_dir", work).stdout
    epochs = len((work / "segresnet_0" / "metrics.jsonl").read_text().splitlines())
    killed = worker(work)
    wait_for_epochs(work / "segresnet_0" / "metrics.jsonl", epochs + 2)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert json.loads((work / "segresnet_0" / "job.json").read_text())["state"] == "running"
    last = worker(work)
    assert last.wait() == 0, last.stderr
    told = last.stderr
    assert f"segresnet_0: taking over from process {killed.pid} on {socket.gethostname()}, which is gone" in told
    resumed = re.search(r"going on after epoch (\d+), step", told)
    assert resumed is not None
    assert int(resumed[1]) >= epochs, "nothing that was saved is lost"
    lines = (work / "segresnet_0" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, 61))


def test_two_at_once_and_one_that_always_fails(copied: Path) -> None:
    work = copied / "work_dir"
    in_the_way = work / "segresnet_0" / "models" / "model.pt"
    in_the_way.mkdir(parents=True)  # the weights cannot be written
    run = ("--input", copied / "input.yaml", "--device", "cpu", "--jobs_per_device", "2")
    done = autoseg("train", *run, "--retries", "1")
    assert done.returncode == 1
    assert "segresnet_0: starting on cpu:0" in done.stderr
    assert "segresnet_1: starting on cpu:1" in done.stderr
    said = (
        f"{in_the_way}: Is a directory. A file belongs there. Move the folder away; what was in the file is then made "
    )
    assert f"warning: segresnet_0: {said}again. Trying again, 1 of 1\n" in done.stderr
    assert f"error: segresnet_0: given up after it failed 2 times: {said}again.\n" in done.stderr
    assert re.search(r"segresnet_1: done, Dice 0\.\d{4}", done.stderr)
    assert "train: 1 of 2 jobs done" in done.stderr
    shown = autoseg("status", "--work_dir", work).stdout
    assert re.search(r"segresnet_0  failed .*Is a directory", shown)
    assert "Traceback" not in autoseg("status", "segresnet_0", "--work_dir", work).stdout
    wrong = autoseg("retry", "segresnet_1", "--input", copied / "input.yaml")
    assert wrong.stderr == "error: segresnet_1: is done, not failed. Failed: segresnet_0.\n"
    in_the_way.rmdir()
    again = autoseg("retry", "--input", copied / "input.yaml")
    assert again.returncode == 0, again.stderr
    assert "segresnet_1" not in again.stderr
    watched = autoseg("status", "--work_dir", work, "--watch")
    assert watched.returncode == 0
    assert "2 jobs: 2 done." in watched.stdout
    assert "retry: no job has failed" in autoseg("retry", "--input", copied / "input.yaml").stderr


Launched = Callable[..., bool]


@pytest.fixture
def launched(copied: Path, monkeypatch: pytest.MonkeyPatch) -> Launched:
    """A function that trains the planned jobs with a launcher that does what is given to it with each task, and starts
    it again where it is told so; returns whether all jobs are done.
    """
    workspace = Workspace(copied / "work_dir")
    settings, _ = load_settings(copied / "input.yaml", {"device": "cpu", "jobs_per_device": "2"})
    datalist = read_datalist(workspace.datalist, copied)

    def train(do: Callable[[Task], None], **options: bool) -> bool:
        def launch(tasks: Sequence[Task], settings: Settings, ended: Ended, **_: object) -> None:
            for task in tasks:
                do(task)
                while ended(task, 130):
                    do(task)

        monkeypatch.setattr("autoseg.pipeline.training_jobs.launch", launch)
        return train_jobs(workspace, datalist, settings, [("segresnet", 0), ("segresnet", 1)], **options)

    return train


def finish_job(work: Path, task: Task) -> None:
    fold = int(task.name[-1])
    Workspace(work).write_job(Job(algo="segresnet", fold=fold, state="done", dice=0.5))


def test_the_longest_job_is_started_first(copied: Path, launched: Launched) -> None:
    set_epochs(copied / "work_dir", 60, fold=1)
    started: list[str] = []

    def do(task: Task) -> None:
        started.append(task.name)
        finish_job(copied / "work_dir", task)

    assert launched(do)
    assert started == ["segresnet_1", "segresnet_0"]


def test_a_job_that_is_stopped_again_and_again_is_given_up(copied: Path, launched: Launched) -> None:
    workspace = Workspace(copied / "work_dir")
    starts = [0, 0]

    def do(task: Task) -> None:
        fold = int(task.name[-1])
        starts[fold] += 1
        workspace.write_job(Job(algo="segresnet", fold=fold, state="pending", starts=starts[fold]))

    assert not launched(do)
    assert max(starts) < 20
    assert [workspace.read_job("segresnet", fold).state for fold in range(2)] == ["failed", "failed"]


def test_trained_again_is_from_the_start(copied: Path, launched: Launched) -> None:
    work = copied / "work_dir"
    checkpoint = Workspace(work).job_dir("segresnet", 0).checkpoint
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_bytes(b"of an earlier training")
    assert launched(lambda task: finish_job(work, task))
    assert checkpoint.exists()
    assert launched(lambda task: finish_job(work, task), again=True)
    assert not checkpoint.exists()


def test_two_runs_in_one_work_dir(planned: Path) -> None:
    work = planned / "work_dir"
    with Claim(work / ".claims", str(work)):
        done = autoseg("run", "--input", planned / "input.yaml")
    assert done.returncode == 2
    assert re.fullmatch(
        rf"error: {work}: process {os.getpid()} on {socket.gethostname()} is working on it since [0-9:]+, last "
        r"heartbeat \d+ s ago \(taken over after 120 s\)\. Wait for that autoseg run, or give another work_dir\.\n",
        done.stderr,
    )


def test_a_worker_says_what_is_missing(copied: Path) -> None:
    work = copied / "work_dir"
    refused = worker(work, fold=7)
    assert refused.wait() == 2
    assert refused.stderr == f"error: {work}: segresnet_7 is not planned. Run `autoseg generate` first.\n"
    settings = work / "settings.yaml"
    settings.write_text(re.sub(r"(dataroot: \{value: )[^,]+", r"\g<1>../gone", settings.read_text()))
    moved = worker(work)
    assert moved.wait() == 2
    assert moved.stderr == (
        f"error: {settings}: the data folder {copied}/gone is not there. Mount it, or give --input input.yaml.\n"
    )


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def test_two_nodes_train_one_job_as_one_does(copied: Path) -> None:
    """torchrun with two nodes of one process each, over gloo."""
    work = copied / "work_dir"
    alone = copied.parent / "alone"
    shutil.copytree(copied, alone, copy_function=shutil.copy2)
    single = worker(alone / "work_dir")
    assert single.wait() == 0, single.stderr
    port = free_port()
    nodes = []
    for rank in range(2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
        command += [f"--node_rank={rank}", "--master_addr=127.0.0.1", f"--master_port={port}", "-m", "autoseg", "train"]
        command += ["--work_dir", str(work), "--algo", "segresnet", "--fold", "0"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        nodes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
    heard = "".join(node.communicate()[1][-3000:] for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], heard
    job, other = (Workspace(w).read_job("segresnet", 0) for w in (work, alone / "work_dir"))
    assert job.state == "done"
    curves = [
        [json.loads(line) for line in (w / "segresnet_0" / "metrics.jsonl").read_text().splitlines()]
        for w in (work, alone / "work_dir")
    ]
    for both in zip(*curves, strict=True):
        assert both[0]["val_dice"] == pytest.approx(both[1]["val_dice"], abs=0.02)
    assert job.dice == pytest.approx(other.dice, abs=0.02)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_diverged_job_starts_once_more_with_a_lower_rate_and_is_then_given_up(
    copied: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """And in fp32, where it was bf16."""
    import torch

    from autoseg.training.errors import Diverged
    from autoseg.training.job import run_job
    from autoseg.training.progress import TrainResult
    from autoseg.training.trainer import Trainer

    torch.set_num_threads(1)
    workspace = Workspace(copied / "work_dir")
    rates: list[float] = []
    run = Trainer.run

    def above(limit: float):  # type: ignore[no-untyped-def]
        def diverge(trainer: Trainer) -> TrainResult:
            rates.append(trainer.plan.learning_rate)
            if rates[-1] > limit:
                trainer.train_step()
                trainer.save()
                raise Diverged(
                    "segresnet_0: the loss became nan in epoch 1. Lower learning_rate (...) and train again."
                )
            return run(trainer)

        monkeypatch.setattr(Trainer, "run", diverge)

    dataroot = copied
    paths = workspace.job_dir("segresnet", 0)
    paths.plan.write_text(paths.plan.read_text().replace("precision: fp32", f"precision: {precision}"))
    above(0.0)
    job = run_job(workspace, dataroot, "segresnet", 0, device="cpu", num_workers=1)
    assert rates == [0.003, 0.00075]
    assert (job.state, job.can_retry, job.dice) == ("diverged", False, None)
    assert not paths.checkpoint.exists()
    assert not paths.model.exists()
    rates.clear()
    above(0.001)
    job = run_job(workspace, dataroot, "segresnet", 0, device="cpu", num_workers=1)
    assert rates == [0.003, 0.00075]
    assert job.state == "done"
    assert job.restart == {"learning_rate": 0.00075, **({"precision": "fp32"} if precision == "bf16" else {})}
    words = "0.00075 in fp32." if precision == "bf16" else "0.00075."
    assert f"Starting once more with learning_rate {words}" in paths.log.read_text()


def test_a_job_that_learned_nothing_by_its_end_is_not_trained(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no validation fitted into the time, the final scores tell."""
    import torch

    from autoseg.training import job as module

    torch.set_num_threads(1)
    workspace = Workspace(copied / "work_dir")
    paths = workspace.job_dir("segresnet", 0)
    monkeypatch.setattr(module, "DIVERGED_STEPS", 1)
    monkeypatch.setattr(module, "score_validation", lambda *words: 0.002)
    job = module.run_job(workspace, copied, "segresnet", 0, device="cpu", num_workers=1)
    assert (job.state, job.can_retry) == ("diverged", False)
    assert "Dice 0.0020 at the end of the schedule: nothing was learned" in job.error
    assert not paths.model.exists()
    assert not paths.checkpoint.exists()


def test_a_job_that_its_budget_left_a_few_steps_is_not_done(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 3 steps is none: its folder says so, and the ensemble does not take it. A short schedule is a wish."""
    import torch

    from autoseg.training import job as module

    torch.set_num_threads(1)
    workspace = Workspace(copied / "work_dir")
    paths = workspace.job_dir("segresnet", 0)
    plan = paths.plan.read_text()
    for epochs, state in ((50, "failed"), (1, "done")):
        text = re.sub(r"^num_epochs: \d+", f"num_epochs: {epochs}", plan, flags=re.M)
        text = re.sub(r"^num_steps_per_epoch: \d+", "num_steps_per_epoch: 1", text, flags=re.M)
        paths.plan.write_text(re.sub(r"^budget_s: \S+", "budget_s: 0.01", text, flags=re.M))
        job = module.run_job(workspace, copied, "segresnet", 0, device="cpu", num_workers=1)
        assert (job.state, job.can_retry) == (state, False if state == "failed" else job.can_retry), job.error
        if state == "failed":
            assert "its 0s of the budget were enough for 1 of the 10 steps that a model needs at least" in job.error
            assert job.dice is None
        paths.checkpoint.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("steps", "num_epochs", "budget_s", "warned"),
    [(59, 100, 9.0, True), (60, 100, 9.0, False), (59, 100, None, False), (12, 12, 9.0, False)],
)
def test_few_steps_are_warned_of(
    steps: int, num_epochs: int, budget_s: float | None, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Where a budget ended the job; who asks for a short schedule knows of it."""
    from plans import tiny_plan

    from autoseg.training.job import TrainingRun
    from autoseg.training.progress import TrainResult

    plan = tiny_plan("segresnet", num_epochs=num_epochs, num_steps_per_epoch=1, budget_s=budget_s)
    result = TrainResult(best_score=0.5, best_epoch=1, epochs=steps, steps=steps, seconds=9.0)
    run = SimpleNamespace(job=Job(algo="segresnet", fold=0), processes=SimpleNamespace(is_first=True))
    TrainingRun._warn_of_few_steps(run, plan, result)  # type: ignore[arg-type]
    text = "segresnet_0: its 9s of the budget were enough for 59 steps. Under 60 a model is rarely of use"
    assert (text in caplog.text) == warned
    assert bool(caplog.records) == warned


@pytest.mark.parametrize("file", ["checkpoint.pt", "model.pt"])
def test_a_full_disk_while_weights_are_written_is_a_sentence_and_the_job_goes_on_later(
    copied: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """torch hides what the disk says behind an error of its own about the length of an archive."""
    import torch

    from autoseg.training import job as module
    from autoseg.workspace import files

    class Full:
        """A file that has no room."""

        def __init__(self, file: IO[bytes]) -> None:
            self.file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    torch.set_num_threads(1)
    workspace = Workspace(copied / "work_dir")
    paths = workspace.job_dir("segresnet", 0)
    open_half, is_full = files.open_half, True

    def open_on_full_disk(path: Path, **options: Any) -> tuple[Path, Any]:
        half, opened = open_half(path, **options)
        return half, Full(opened) if is_full and path.name == file else opened

    monkeypatch.setattr(files, "open_half", open_on_full_disk)
    monkeypatch.setattr("autoseg.training.checkpoint.CHECKPOINT_S", 0.0)
    job = module.run_job(workspace, copied, "segresnet", 0, device="cpu", num_workers=1)
    assert (job.state, job.can_retry) == ("failed", True)
    assert job.error == (
        f"{paths.root}: No space left on device. Free some space, or give a work_dir on another disk. The same command "
        "then goes on from here."
    )
    assert not list(copied.rglob(".part-*"))
    is_full = False
    assert module.run_job(workspace, copied, "segresnet", 0, device="cpu", num_workers=1).state == "done"


def test_a_damaged_checkpoint_is_said_and_training_begins_anew(
    copied: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    from autoseg.training import job as module

    torch.set_num_threads(1)
    workspace = Workspace(copied / "work_dir")
    paths = workspace.job_dir("segresnet", 0)
    paths.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    for content in (b"", b"no tensors", b"PK\x03\x04" + bytes(100)):
        paths.checkpoint.write_bytes(content)
        with caplog.at_level("WARNING", "autoseg"):
            job = module.run_job(workspace, copied, "segresnet", 0, device="cpu", num_workers=1)
        assert job.state == "done"
        assert f"{paths.checkpoint}: damaged (" in caplog.text
        caplog.clear()
        job.state = "running"
        workspace.write_job(job)


def test_classes_lost_in_resampling_stand_in_log_status_and_report(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from autoseg.training import job as module

    torch.set_num_threads(1)
    workspace = Workspace(copied / "work_dir")
    warning = "at 9x9x9 mm no voxel of box is left in 2 of the 4 cases that have it"
    given: list[tuple[str, ...]] = []

    def warn(cases: Sequence[CachedCase], plan: Plan) -> list[str]:
        given.append(tuple(case.name for case in cases))
        return [warning]

    monkeypatch.setattr(module, "resampling_warnings", warn)
    monkeypatch.setattr(module, "score_validation", lambda *words: 0.5)
    job = module.run_job(workspace, copied, "segresnet", 0, device="cpu", num_workers=1)
    train_cases = read_cases(workspace, copied).train_cases(0)
    assert given == [tuple(case.name for case in train_cases)]
    assert (job.state, job.warnings) == ("done", (warning,))
    assert f"segresnet_0: {warning}" in workspace.job_dir("segresnet", 0).log.read_text()
    assert warning in job_status(workspace.root, "segresnet_0")
    assert autoseg("report", "--work_dir", workspace.root).returncode == 0
    assert warning in (workspace.root / "report.html").read_text()
