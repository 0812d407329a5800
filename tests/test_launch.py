"""Launchers: every place busy, failures tried again and given up, devices lost, signals passed on, extras missing."""

from __future__ import annotations

import builtins
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from autoseg.config.settings import Settings
from autoseg.errors import ResourceError
from autoseg.launch import Task, launch
from autoseg.launch.local import Gpu, Place, find_places, run_local

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


def test_two_places_are_kept_busy(tmp_path: Path) -> None:
    spans = tmp_path / "spans"
    code = f"import time; b = time.time(); time.sleep(%s); open({str(spans)!r}, 'a').write(f'{{b}} {{time.time()}}\\n')"
    tasks = [script(f"t_{i}", code % (0.2 + 0.1 * (i % 3))) for i in range(8)]
    begin = time.time()
    run_local(tasks, CPUS, lambda task, code: False, tmp_path)
    wall = time.time() - begin
    work = [tuple(map(float, line.split())) for line in spans.read_text().splitlines()]
    assert len(work) == 8
    together = max(sum(b <= t < e for b, e in work) for t, _ in work)
    assert together == 2
    assert sum(e - b for b, e in work) / 2 > 0.6 * wall, "Python's start, 30 ms a task, is not in the spans"


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
    assert [p.environment["CUDA_VISIBLE_DEVICES"] for p in pairs] == ["0,1", "2,3"]
    with pytest.raises(ResourceError, match=r"^gpus_per_job: 8 was set, but this machine has 4\.$"):
        find_places(settings(gpus_per_job=8), gpus)
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
    code = "import os, time; time.sleep(0.1); exit(int(os.environ['CUDA_VISIBLE_DEVICES'] == '1'))"
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
        "no device is left: cuda:1 went away, 1 jobs are still to do. Repair the driver "
        "(`nvidia-smi` must list the GPU) and run again; nothing that was saved is lost."
    )


@pytest.mark.parametrize(("free_gib", "known", "expected"), [(10.0, 4.0, 2), (4.5, 4.0, 1), (10.0, None, 1)])
def test_a_second_job_on_a_gpu_waits_for_memory(
    tmp_path: Path, free_gib: float, known: float | None, expected: int
) -> None:
    gpu = [Gpu("0", "GPU-a", free_gib)]
    code = f"import os, time; d = {str(tmp_path)!r}; f = f'{{d}}/on-{{os.getpid()}}'; open(f, 'w'); time.sleep(0.4);"
    code += " open(f'{d}/n', 'a').write(str(len([n for n in os.listdir(d) if n[:3] == 'on-']))); os.remove(f)"
    tasks = [script(f"t_{i}", code) for i in range(3)]
    places = find_places(settings(jobs_per_device=2), gpu)
    run_local(tasks, places, lambda t, c: False, tmp_path / "out", memory_gib=lambda task: known, gpus_now=lambda: gpu)
    assert max(map(int, (tmp_path / "n").read_text())) == expected


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
    assert launcher.wait(30) == (-9 if number == signal.SIGKILL else 130)
    wait_for(lambda: events.read_text().count("saved") == 2)


def wait_for(true: Callable[[], bool], limit_s: float = 40.0) -> None:
    begin = time.monotonic()
    while not true():
        assert time.monotonic() - begin < limit_s
        time.sleep(0.05)


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
    # From the checkout: nothing of that name is on PyPI.
    assert str(error.value) == (
        f"{message} Install it in autoseg's folder: pip install -c constraints.txt -e '.[{launcher}]'."
    )


def test_slurm_without_sbatch_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ResourceError) as error:
        launch([script("a_0", "pass")], settings(launcher="slurm"), lambda t, c: False, output=tmp_path)
    assert str(error.value) == (
        "launcher: slurm was set, but there is no sbatch here. Run this on a login node, or set launcher: local."
    )
