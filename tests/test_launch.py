"""Launchers: every place busy, failures tried again and given up, devices lost, signals passed on, extras missing."""

from __future__ import annotations

import builtins
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from processes import wait_for

from autoseg.config.settings import Settings
from autoseg.errors import ResourceError
from autoseg.hardware.gpus import Gpu
from autoseg.launch import Task, launch, start, stop
from autoseg.launch.local import Place, find_places, run_local

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Script(Task):
    """A task that runs Python instead of autoseg."""

    def command(self) -> list[str]:
        return [sys.executable, "-c", *self.words]


def script(name: str, code: str, **values: Any) -> Task:
    return Script(name=name, words=(code,), **values)


def settings(**changes: Any) -> Settings:
    return Settings(modality="MRI", datalist=Path("d"), dataroot=Path("r"), **changes)


CPUS = [Place(name=f"cpu:{i}", device="cpu") for i in range(2)]


RELAY = """
import os, sys, time
folder, number, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
names = os.listdir(folder)
assert len([n for n in names if n.startswith("began")]) - len([n for n in names if n.startswith("ends")]) < 2
open(f"{folder}/began_{number}", "w").close()
while number + 1 < count and not os.path.exists(f"{folder}/began_{number + 1}"):
    time.sleep(0.01)
open(f"{folder}/ends_{number}", "w").close()
"""


def test_two_places_are_kept_busy(tmp_path: Path) -> None:
    """No task ends before the next one has begun, so the run ends only where each free place is filled at once; and
    none begins where two are at work already.
    """
    (tmp_path / "relay").mkdir()
    tasks = [Script(name=f"t_{i}", words=(RELAY, str(tmp_path / "relay"), str(i), "6")) for i in range(6)]
    codes: list[int] = []
    run_local(tasks, CPUS, lambda task, code: bool(codes.append(code)), tmp_path)
    assert codes == [0] * 6
    assert len(list((tmp_path / "relay").iterdir())) == 12


def test_each_place_has_its_environment_and_output(tmp_path: Path) -> None:
    code = "import os; print(os.environ['AUTOSEG_DEVICE_NAME'], os.environ['OMP_NUM_THREADS'])"
    places = find_places(settings(device="cpu", jobs_per_device=2, cpus_per_job=3))
    run_local([script("a_0", code), script("a_1", code)], places, lambda task, code: False, tmp_path)
    assert {(tmp_path / f"a_{i}.out").read_text() for i in (0, 1)} == {"cpu:0 3\n", "cpu:1 3\n"}


def test_places_of_gpus() -> None:
    gpus = [Gpu(str(i), f"GPU-{i}", 40.0) for i in range(4)]
    names = [p.name for p in find_places(settings(jobs_per_device=2), gpus[:2])]
    assert names == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    pairs = find_places(settings(gpus_per_job=2), gpus)
    assert [p.environment["CUDA_VISIBLE_DEVICES"] for p in pairs] == ["GPU-0,GPU-1", "GPU-2,GPU-3"]
    assert {p.environment["CUDA_DEVICE_ORDER"] for p in pairs} == {"PCI_BUS_ID"}
    (jetson,) = find_places(settings(), [Gpu("0", "", 40.0)])
    assert (jetson.environment["CUDA_VISIBLE_DEVICES"], jetson.uuids) == ("0", ("0",))
    with pytest.raises(ResourceError, match=r"^gpus_per_job: 8 was set, but this machine has 4\.$"):
        find_places(settings(gpus_per_job=8), gpus)
    for part in (Gpu("0", "MIG-1111", 20.0), Gpu("0", "", 20.0, name="NVIDIA A100-SXM4-40GB MIG 3g.20gb")):
        assert len(find_places(settings(), [part] * 2)) == 2
        with pytest.raises(ResourceError, match=r"^gpus_per_job: 2 was set, .* divided \(MIG\), .* alone\. Set"):
            find_places(settings(gpus_per_job=2), [part] * 2)
    with pytest.raises(ResourceError, match=r"^gpus_per_job: 2 was set, but this machine has no GPU\.$"):
        find_places(settings(gpus_per_job=2), [])


def test_a_task_is_started_again_as_often_as_told(tmp_path: Path) -> None:
    ends: list[tuple[str, int]] = []

    def ended(task: Task, code: int) -> bool:
        ends.append((task.name, code))
        return code != 0 and len([e for e in ends if e[0] == task.name]) < 3

    run_local([script("bad_0", "exit(7)"), script("good_0", "pass")], CPUS, ended, tmp_path)
    assert sorted(ends) == [("bad_0", 7)] * 3 + [("good_0", 0)]


def test_a_device_that_disappears_is_left_and_its_job_goes_on_elsewhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gpus = [Gpu("0", "GPU-a", 40.0), Gpu("1", "GPU-b", 40.0)]
    places = find_places(settings(), gpus)
    code = "import os; exit(int(os.environ['CUDA_VISIBLE_DEVICES'] == 'GPU-b'))"
    ends: list[tuple[str, int]] = []

    def ended(task: Task, code: int) -> bool:
        ends.append((task.name, code))
        return False

    tasks = [script(f"t_{i}", code) for i in range(4)]
    run_local(tasks, places, ended, tmp_path, gpus_now=lambda: gpus[:1])
    assert sorted(ends) == [(f"t_{i}", 0) for i in range(4)], "the loss is not counted as a failure"
    assert "cuda:1 is gone; t_1 goes on elsewhere" in caplog.text
    with pytest.raises(ResourceError) as error:
        run_local([script("t_0", "exit(1)")], places[1:], ended, tmp_path, gpus_now=lambda: gpus[:1])
    assert str(error.value) == (
        "no device is left: cuda:1 went away, 1 job is still to do. Repair the driver "
        "(`nvidia-smi` must list the GPU) and run again; nothing that was saved is lost."
    )


def test_the_other_share_of_a_lost_device_is_left_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [Gpu("0", "GPU-a", 40.0), Gpu("1", "GPU-b", 40.0)]
    used: list[str] = []

    class Ended:
        def __init__(self, command: Sequence[str], output: Path, environment: Mapping[str, str]) -> None:
            used.append(environment["CUDA_VISIBLE_DEVICES"])
            self.returncode = int(used[-1] == "GPU-b")  # all fail on the second GPU

        def poll(self) -> int:
            return self.returncode

    monkeypatch.setattr("autoseg.launch.local.start", Ended)
    monkeypatch.setattr("autoseg.launch.local.POLL_S", 0.0)
    places = find_places(settings(jobs_per_device=2), gpus)
    tasks = [script(f"t_{i}", "") for i in range(6)]
    codes: list[int] = []
    run_local(
        tasks, places, lambda t, code: bool(codes.append(code)), tmp_path,
        memory_gib=lambda task: 0.1, gpus_now=lambda: gpus[:1],
    )  # fmt: skip
    assert codes == [0] * 6
    assert used.count("GPU-b") == 1, "nothing was started there again"


STUBBORN = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(sys.argv[1], "w").close()
while True:
    time.sleep(1)
"""


def test_a_process_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoseg.launch.SAVING_S", 0.1)
    process = start([sys.executable, "-c", STUBBORN, str(tmp_path / "began")], tmp_path / "out", {})
    wait_for((tmp_path / "began").exists)
    stop([process])
    assert process.returncode == -signal.SIGKILL


class Counted:
    """Processes that only count: each runs for a while of three looks at it."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def start(self, command: Sequence[str], output: Path, environment: Mapping[str, str]) -> Counted.Process:
        self.now += 1
        self.most = max(self.most, self.now)
        return Counted.Process(self)

    class Process:
        def __init__(self, count: Counted) -> None:
            self.count, self.looks, self.returncode = count, 0, 0

        def poll(self) -> int | None:
            self.looks += 1
            if self.looks < 3:
                return None
            self.count.now -= 1
            return 0


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Such processes, on GPUs that answer at once."""

    class AtOnce(ThreadPoolExecutor):
        def submit(self, ask: Callable[[], Any]) -> Future[Any]:  # type: ignore[override]
            answer = Future[Any]()
            answer.set_result(ask())
            return answer

    count = Counted()
    monkeypatch.setattr("autoseg.launch.local.start", count.start)
    monkeypatch.setattr("autoseg.launch.local.POLL_S", 0.0)
    monkeypatch.setattr("autoseg.launch.local.ThreadPoolExecutor", AtOnce)
    return count


@pytest.mark.parametrize(("free_gib", "known", "expected"), [(10.0, 4.0, 2), (4.5, 4.0, 1), (10.0, None, 1)])
def test_a_second_job_on_a_gpu_waits_for_memory(
    tmp_path: Path, counted: Counted, free_gib: float, known: float | None, expected: int
) -> None:
    gpu = [Gpu("0", "GPU-a", free_gib)]
    tasks = [script(f"t_{i}", "") for i in range(4)]
    places = find_places(settings(jobs_per_device=2), gpu)
    run_local(tasks, places, lambda t, c: False, tmp_path, memory_gib=lambda task: known, gpus_now=lambda: gpu)
    assert (counted.most, counted.now) == (expected, 0)


def test_jobs_end_and_begin_while_a_gpu_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes seconds: its answer is not there before the first of the jobs has ended, and the next has begun."""
    count, ended, seen = Counted(), threading.Event(), list[bool]()
    monkeypatch.setattr("autoseg.launch.local.start", count.start)
    gpu = [Gpu("0", "GPU-a", 40.0)]

    def asked() -> list[Gpu]:
        seen.append(ended.wait(20))
        return gpu

    run_local(
        [script(f"t_{i}", "") for i in range(4)], find_places(settings(jobs_per_device=2), gpu),
        lambda t, c: bool(ended.set()), tmp_path, memory_gib=lambda task: 4.0, gpus_now=asked,
    )  # fmt: skip
    assert all(seen)
    assert seen


@pytest.mark.parametrize(("known", "expected"), [(1e-6, 2), (1e9, 1), (None, 2)])
def test_a_second_job_on_a_cpu_waits_for_memory(
    tmp_path: Path, counted: Counted, known: float | None, expected: int
) -> None:
    """What was measured of one job has to be free for the next; no machine has a billion GiB."""
    places = find_places(settings(device="cpu", jobs_per_device=2))
    tasks = [script(f"t_{i}", "") for i in range(4)]
    run_local(tasks, places, lambda t, c: False, tmp_path, memory_gib=lambda task: known)
    assert (counted.most, counted.now) == (expected, 0)


LAUNCHER = """
import sys
from pathlib import Path
from test_launch import CPUS, script
from autoseg.launch.local import run_local
code = '''
import signal, sys, time
from autoseg.launch import stop_with_launcher
signal.signal(signal.SIGTERM, lambda *_: (open(sys.argv[1], "a").write("saved\\\\n"), sys.exit(130)))
stop_with_launcher()
open(sys.argv[1], "a").write("began\\\\n")
time.sleep(60)
'''
from test_launch import Script
tasks = [Script(name=f"t_{i}", words=(code, sys.argv[1])) for i in range(2)]
try:
    run_local(tasks, CPUS, lambda task, code: False, Path(sys.argv[2]))
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_workers_save_when_their_launcher_is_stopped_or_dies(tmp_path: Path, number: int) -> None:
    events = tmp_path / "events"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(events), str(tmp_path)], env=environment)
    wait_for(lambda: events.exists() and events.read_text().count("began") == 2)
    launcher.send_signal(number)
    assert launcher.wait() == (-9 if number == signal.SIGKILL else 130)
    wait_for(lambda: events.read_text().count("saved") == 2)


@pytest.mark.parametrize(
    ("launcher", "module", "message"),
    [
        ("ray", "ray", "launcher: ray is not installed."),
        ("slurm", "submitit", "launcher: submitit is not installed."),
    ],
)
def test_a_missing_extra_is_named(
    launcher: str, module: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **named: Any) -> Any:
        if name.split(".")[0] == module:
            raise ImportError(name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ResourceError) as error:
        launch([script("a_0", "pass")], settings(launcher=launcher), lambda t, c: False, output=tmp_path)
    assert str(error.value) == f"{message} In the folder of autoseg: pip install -c constraints.txt -e '.[{launcher}]'"


@pytest.mark.extra("submitit")
def test_slurm_without_sbatch_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ResourceError) as error:
        launch([script("a_0", "pass")], settings(launcher="slurm"), lambda t, c: False, output=tmp_path)
    assert str(error.value) == (
        "launcher: slurm was set, but there is no sbatch here. Run this on a login node, or set launcher: local."
    )
