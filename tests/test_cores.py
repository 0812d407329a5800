"""Threads beside other work: what is left is told from the use of the cores, and followed only where time decides."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_trainer import make_trainer
from torch import nn

from autoseg.cli import demo
from autoseg.data.datalists.cases import Datalist
from autoseg.hardware import cores
from autoseg.hardware.cores import AGREEING_LOOKS, LOOK_S, LOOKS_FOR_MORE, ThreadsBesideOthers, following
from autoseg.hardware.limits import CoreUse, threads_left
from autoseg.inference.windows import WindowModel
from autoseg.pipeline.stages import ensemble
from autoseg.workspace.workspace import Workspace


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def use(wall_s: float, idle_s: float, own_s: float) -> CoreUse:
    return CoreUse(wall_s=wall_s, idle_s=idle_s, own_s=own_s)


@pytest.mark.parametrize(
    ("idle", "own", "most", "threads"),
    [
        (0.1, 1.9, 2, 2),  # alone on two cores
        (0.0, 1.3, 2, 1),  # two threads beside one busy process
        (0.0, 1.0, 2, 1),  # one thread beside it
        (0.9, 1.0, 2, 2),  # it has ended
        (0.0, 0.66, 2, 1),  # beside two
        (0.0, 0.1, 2, 1),  # never none
        (3.0, 12.5, 16, 15),
        (40.0, 8.0, 8, 8),  # a share of a large machine
    ],
)
def test_a_thread_for_each_core_that_others_leave(idle: float, own: float, most: int, threads: int) -> None:
    for wall_s in (2.0, 10.0):
        assert threads_left(use(5, 7, 3), use(5 + wall_s, 7 + idle * wall_s, 3 + own * wall_s), most) == threads


@given(idle_s=st.floats(0, 1e4), own_s=st.floats(0, 1e4), wall_s=st.floats(0, 1e3), most=st.integers(1, 256))
def test_at_least_one_thread_and_no_more_than_wanted(idle_s: float, own_s: float, wall_s: float, most: int) -> None:
    assert 1 <= threads_left(use(0, 0, 0), use(wall_s, idle_s, own_s), most) <= most


def test_the_use_of_the_cores_is_this_processes() -> None:
    before = CoreUse.now()
    while CoreUse.now().own_s - before.own_s < 0.3:
        pass
    after = CoreUse.now()
    wall_s = after.wall_s - before.wall_s
    assert 0.3 <= after.own_s - before.own_s <= 2 * wall_s + 0.1
    assert 0 <= after.idle_s - before.idle_s <= torch.get_num_threads() * 64 * wall_s + 1


class Machine:
    """Two cores, of which other work takes some."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.others, self.now = 0.0, CoreUse.now()
        monkeypatch.setattr(CoreUse, "now", lambda: self.now)
        monkeypatch.setattr(cores.time, "monotonic", lambda: self.now.wall_s)

    def pass_s(self, seconds: float) -> None:
        own = min(torch.get_num_threads(), 2 - self.others)
        idle = 2 - self.others - own
        now = self.now
        self.now = use(now.wall_s + seconds, now.idle_s + idle * seconds, now.own_s + own * seconds)


def followed(machine: Machine, threads: ThreadsBesideOthers, looks: int) -> list[int]:
    """Threads after each of some looks."""
    numbers = []
    for _ in range(looks):
        machine.pass_s(LOOK_S)
        threads.adjust()
        numbers.append(torch.get_num_threads())
    return numbers


def test_threads_follow_what_others_take(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    threads = ThreadsBesideOthers(fixed=False)
    assert followed(machine, threads, 3) == [2, 2, 2]
    machine.others = 1.0
    assert followed(machine, threads, 4) == [2] * (AGREEING_LOOKS - 1) + [1] * (5 - AGREEING_LOOKS)
    machine.others = 0.0
    assert followed(machine, threads, 6) == [1] * (LOOKS_FOR_MORE - 1) + [2] * (7 - LOOKS_FOR_MORE)
    machine.others = 1.0
    followed(machine, threads, 3)
    threads.restore()
    assert torch.get_num_threads() == 2


def test_a_moment_of_other_work_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    threads = ThreadsBesideOthers(fixed=False)
    for _ in range(4):
        machine.others = 1.0
        assert followed(machine, threads, 1) == [2]
        machine.others = 0.0
        assert followed(machine, threads, 1) == [2]


@pytest.mark.parametrize("budget_s", [None, 600.0])
def test_steps_on_a_busy_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, budget_s: float | None) -> None:
    """With a budget a job takes fewer threads there; without one the same steps give the same weights."""
    torch.set_num_threads(2)
    trainer = make_trainer(tmp_path, budget_s=budget_s)
    monkeypatch.setattr(cores, "LOOK_S", 0.0)
    monkeypatch.setattr(cores, "threads_left", lambda last, now, most: 1)
    for _ in range(3):
        trainer.train_step(0.3)
    assert torch.get_num_threads() == (2 if budget_s is None else 1)


@pytest.mark.parametrize(("others", "threads"), [(0.0, 2), (1.0, 1)])
def test_the_demo_computes_with_the_cores_that_are_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], others: float, threads: int
) -> None:
    """Its steps are fixed: two threads would do them later than one that waits for none."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # and so that it is as before when the test ends
    machine = Machine(monkeypatch)
    machine.others = others
    monkeypatch.setattr(demo.time, "sleep", machine.pass_s)
    monkeypatch.setattr(demo, "LOOK_S", 60.0)
    told = []
    monkeypatch.setattr(demo, "run_stages", lambda request, settings, origins, path: told.append(settings) or 0)
    assert demo.run_demo(tmp_path / "demo") == 0
    assert [settings.cpus_per_job for settings in told] == [None], "jobs on several GPUs share the cores, as ever"
    assert os.environ["OMP_NUM_THREADS"] == str(threads)
    assert ("Other work runs here, so this takes 1 of 2 cores." in capsys.readouterr().out) == (others > 0)


@pytest.mark.parametrize("fixed", [False, True])
def test_predictions_follow_what_others_take(monkeypatch: pytest.MonkeyPatch, fixed: bool) -> None:
    """A network computes its second window on the core that is left; where nothing may change, on both."""
    torch.set_num_threads(2)
    monkeypatch.setattr(cores, "LOOK_S", 0.0)
    monkeypatch.setattr(cores, "threads_left", lambda last, now, most: 1)
    seen: list[int] = []

    class Network(nn.Module):
        def forward(self, windows: torch.Tensor) -> torch.Tensor:
            seen.append(torch.get_num_threads())
            return windows

    model = WindowModel([Network()], num_outputs=1, sigmoid=True, device=torch.device("cpu"), precision="fp32")
    window = torch.zeros(1, 1, 2, 2, 2)
    with following(ThreadsBesideOthers(fixed=fixed)):
        for _ in range(AGREEING_LOOKS + 1):
            model(window)
    assert seen == ([2] * 3 if fixed else [2] * (AGREEING_LOOKS - 1) + [1] * 2)
    assert torch.get_num_threads() == 2
    model(window)
    assert seen[-1] == 2, "nobody asked for it any more"


@pytest.mark.parametrize("spare_s", [None, 60.0])
def test_the_ensemble_follows_where_there_is_a_budget(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spare_s: float | None
) -> None:
    torch.set_num_threads(2)
    found: list[tuple[bool, float | None]] = []

    def build(*_: object, spare_s: Callable[[], float] | None, **__: object) -> SimpleNamespace:
        threads = cores._followed.get()
        assert threads is not None
        found.append((threads.fixed, None if spare_s is None else spare_s()))
        return SimpleNamespace(tables=())

    monkeypatch.setattr("autoseg.ensemble.build.build_ensemble", build)
    monkeypatch.setattr("autoseg.data.datalists.datalist.read_cases", lambda *_: Datalist(training=()))
    monkeypatch.setattr("autoseg.pipeline.fold_tasks.score_folds", lambda *_: None)
    budget = None if spare_s is None else SimpleNamespace(spare_s=lambda: spare_s)
    run = SimpleNamespace(
        settings=SimpleNamespace(dataroot=tmp_path),
        job_settings=None,
        request=SimpleNamespace(accept=False),
        budget_in=lambda place: budget,
    )
    ensemble(run, Workspace(tmp_path))  # type: ignore[arg-type]
    assert found == [(spare_s is None, spare_s)]
    assert cores._followed.get() is None


def test_predictions_are_timed_once_the_threads_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On more threads than the machine has to spare they would seem slower than they will be."""
    torch.set_num_threads(2)
    trainer = make_trainer(tmp_path, budget_s=600.0)
    monkeypatch.setattr(cores, "LOOK_S", 1e9)
    for _ in range(4):
        trainer.train_step(0.3)
    assert trainer.progress.voxel_s == 0
    trainer.threads._all_looks = AGREEING_LOOKS
    trainer.train_step(0.3)
    assert trainer.progress.voxel_s > 0
    kept_s = trainer.validator.reserve_s()
    trainer.validator.later_s = lambda case_s: 50 * case_s
    with_later_s = trainer.validator.reserve_s()
    p, cases = trainer.progress, trainer.validator.cases
    case_s = (p.scoring_voxel_s or p.voxel_s) * sum(map(trainer.validator.voxels, cases)) / len(cases)
    assert with_later_s - kept_s == pytest.approx(50 * case_s)


def test_predictions_are_timed_where_the_budget_is_too_short_to_look(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    trainer = make_trainer(tmp_path, budget_s=0.5)
    for _ in range(3):
        trainer.train_step(0.3)
    assert trainer.progress.voxel_s > 0
