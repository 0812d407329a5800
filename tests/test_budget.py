"""A run's time: shared out, counted over restarts, taken from the weak."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from processes import wait_for

from autoseg.config.networks import AlgoName
from autoseg.config.settings import Settings
from autoseg.data.datalists.cases import Datalist
from autoseg.data.datalists.datalist import read_datalist
from autoseg.data.phantoms import make_phantoms
from autoseg.pipeline import budget as module
from autoseg.pipeline.budget import LEAST_KEPT, Rounds, RunBudget
from autoseg.pipeline.context import RunContext
from autoseg.pipeline.job_plans import JobPlans
from autoseg.pipeline.run import run_input
from autoseg.pipeline.stages import STAGES, stage_named
from autoseg.workspace.budget import read_afterwards
from autoseg.workspace.jobs import Job
from autoseg.workspace.stages import Outcome
from autoseg.workspace.workspace import Workspace

ALGOS: tuple[AlgoName, ...] = ("segresnet", "swinunetr", "dints")
JOBS: list[tuple[AlgoName, int]] = [(algo, fold) for fold in range(2) for algo in ALGOS]


class Clock:
    """A clock that stands still unless it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return time.time() + 1e6  # the process began long ago


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module, "time", found)
    return found


@pytest.fixture(scope="module")
def datalist(tmp_path_factory: pytest.TempPathFactory) -> Datalist:
    folder = tmp_path_factory.mktemp("data")
    path = make_phantoms(folder, num_cases=4, num_testing=2, shape=(26, 24, 24), num_fold=2)
    words = yaml.safe_load(path.read_text())
    return read_datalist(folder / words["datalist"], folder / words["dataroot"])


def open_budget(folder: Path, places: int = 1, budget: str = "1000s", **settings) -> RunBudget:  # type: ignore[no-untyped-def]
    paths = {"datalist": Path("d"), "dataroot": Path("r"), "work_dir": folder}
    return RunBudget(Workspace(folder), Settings(modality="MRI", budget=budget, **paths, **settings), places)


def finish(folder: Path, scores: dict[str, float | None], fold: int = 0, inference_s: float = 1.0) -> None:
    for algo, dice in scores.items():
        state = "failed" if dice is None else "done"
        job = Job(algo=algo, fold=fold, state=state, dice=dice, inference_s=inference_s)  # type: ignore[arg-type]
        Workspace(folder).write_job(job)


def test_all_jobs_get_the_same_and_leave_time_for_predictions(tmp_path: Path, clock: Clock, datalist: Datalist) -> None:
    budget = open_budget(tmp_path)
    budget.give(datalist, JOBS, JOBS)
    assert {budget.job_s(f"{a}_{f}") for a, f in JOBS} == {165.0}  # a hundredth is for the report
    # Each model's two held-out cases are merged, and it predicts two testing cases; four cases in 4 ways for each
    # algorithm, too few to learn from what is predicted of them.
    after = read_afterwards(budget.workspace, "dints_1")
    assert (after.cases, after.copies) == (pytest.approx(0.5 * 2 + 2), 3 * 16 / 6)
    assert after.seconds(1.0) == pytest.approx(3 + 0.02 * 165)
    assert after.seconds(0.1) == pytest.approx(0.3 + 0.8)
    assert after.seconds(1e3) == pytest.approx((0.3 + 0.02) * 165), "most of the time is the job's own"
    # Two at once, the first fold before the other: each place has two jobs of either one after the other. The
    # ensemble predicts alone, so each of the four leaves time for one and a half.
    two = open_budget(tmp_path / "two", places=2)
    two.give(datalist, JOBS, JOBS)
    assert two.job_s("dints_1") == 247.5
    assert read_afterwards(two.workspace, "dints_1").cases == pytest.approx(1.5 * 3)


def test_jobs_leave_no_time_once_it_is_known_what_predictions_take(
    tmp_path: Path, clock: Clock, datalist: Datalist
) -> None:
    assert read_afterwards(Workspace(tmp_path), "dints_0").seconds(1.0) == 0, "a job without a share of a budget"
    budget = open_budget(tmp_path)
    budget.give(datalist, JOBS[:1], JOBS)
    assert read_afterwards(budget.workspace, "segresnet_0").seconds(1.0) > 0
    finish(tmp_path, {"segresnet": 0.9}, inference_s=5.0)
    budget.give(datalist, JOBS[1:2], JOBS[1:])
    assert read_afterwards(budget.workspace, f"{JOBS[1][0]}_{JOBS[1][1]}").seconds(1.0) == 0
    assert read_afterwards(budget.workspace, "segresnet_0").seconds(1.0) > 0, "what is given is not changed"
    none = open_budget(tmp_path / "none", ensemble=False)
    none.give(datalist, JOBS, JOBS)
    assert read_afterwards(none.workspace, "dints_1").seconds(1.0) == 0


def test_what_a_killed_run_spent_is_not_forgotten(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAVE_EVERY_S", 0.01)
    budget = open_budget(tmp_path)
    with budget.kept():
        clock.now += 100
        wait_for(lambda: open_budget(tmp_path).left_s < 950)
        assert open_budget(tmp_path).left_s == pytest.approx(900)  # as a kill would leave it
    assert budget.left_s == pytest.approx(900)


def test_a_job_with_a_budget_of_its_own_keeps_it(tmp_path: Path, clock: Clock, datalist: Datalist) -> None:
    budget = open_budget(tmp_path, segresnet={"budget": "100s"})
    budget.give(datalist, JOBS, JOBS)
    assert budget.job_s("segresnet_0") is None
    assert budget.job_s("dints_0") == pytest.approx((1000 - 10 - 200) / 4)
    # Their models are predicted with, too.
    assert read_afterwards(budget.workspace, "dints_0").cases == pytest.approx(6 * 3 / 4)


def test_time_is_counted_over_restarts_but_not_between_them(tmp_path: Path, clock: Clock) -> None:
    budget = open_budget(tmp_path)
    clock.now += 100
    budget.save()
    clock.now += 5000  # nothing runs
    again = open_budget(tmp_path)
    assert again.left_s == pytest.approx(900)
    clock.now += 50
    assert again.left_s == pytest.approx(850)
    other = open_budget(tmp_path, budget="2000s")
    assert other.left_s == pytest.approx(2000)


def test_what_predictions_take_is_kept_for_the_ensemble(tmp_path: Path, clock: Clock, datalist: Datalist) -> None:
    budget = open_budget(tmp_path)
    finish(tmp_path, {"segresnet": 0.9}, inference_s=5.0)
    # 6 models: 2 held-out cases each out of fold, and both testing cases by each; 2 % for corrupted copies.
    assert budget.reserved_s(datalist, JOBS) == pytest.approx(5 * (0.5 * 6 * 2 + 6 * 2) + 20)
    finish(tmp_path, {"segresnet": 0.9}, inference_s=500.0)
    assert budget.reserved_s(datalist, JOBS) == pytest.approx(300)
    assert open_budget(tmp_path, ensemble=False).reserved_s(datalist, JOBS) == pytest.approx(10.0)


def test_corrupted_copies_get_no_more_than_their_number_takes(tmp_path: Path, clock: Clock, datalist: Datalist) -> None:
    budget = open_budget(tmp_path, budget="100000s")
    finish(tmp_path, {"segresnet": 0.9}, inference_s=5.0)
    eight = replace(
        datalist, training=(*datalist.training, *(replace(c, name=c.name + "b") for c in datalist.training))
    )
    # Of a case each of the three models of its fold; 64 copies to learn from, and all cases in 4 ways.
    assert budget.reserved_s(eight, JOBS) == pytest.approx(max(1000, 5 * (24 + 3 * (64 + 8 * 4))))
    seven = replace(eight, training=eight.training[:-1])
    assert budget.reserved_s(seven, JOBS) == pytest.approx(max(1000, 5 * (22.5 + 3 * 7 * 4)))
    finish(tmp_path, {"segresnet": 0.9}, inference_s=500.0)
    # Where time is short, each has its share: to learn from and to try, or to try alone.
    assert budget.reserved_s(eight, JOBS) - budget.reserved_s(seven, JOBS) == pytest.approx(5000 + 500 * 1.5)
    finish(tmp_path, {"segresnet": 0.9}, inference_s=5.0)
    clock.now += 99_500
    assert budget.spare_s() == pytest.approx(500 - 1000)  # less than nothing: none is predicted


def test_one_slow_prediction_does_not_take_the_time_of_all(tmp_path: Path, clock: Clock, datalist: Datalist) -> None:
    budget = open_budget(tmp_path)
    for algo, inference_s in zip(ALGOS, (1.0, 2.0, 100.0), strict=True):
        finish(tmp_path, {algo: 0.9}, inference_s=inference_s)
    assert budget.reserved_s(datalist, JOBS) == pytest.approx(2 * (0.5 * 6 * 2 + 6 * 2) + 20)


def test_a_job_of_a_dropped_algorithm_that_is_done_stays_done(tmp_path: Path, clock: Clock) -> None:
    budget = open_budget(tmp_path)
    finish(tmp_path, {"segresnet": 0.9, "swinunetr": 0.2, "dints": 0.95})
    finish(tmp_path, {"swinunetr": 0.2}, fold=1)
    budget.drop_weak(JOBS)
    assert list(budget.state.dropped) == ["swinunetr"]
    assert not budget.is_dropped("swinunetr", 1, JOBS)
    assert Workspace(tmp_path).read_job("swinunetr", 1).state == "done"


def test_the_weakest_is_dropped_and_its_time_goes_to_the_others(
    tmp_path: Path, clock: Clock, datalist: Datalist, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "autoseg")
    budget = open_budget(tmp_path)
    finish(tmp_path, {"segresnet": 0.87, "swinunetr": 0.82}, inference_s=0.0)
    budget.drop_weak(JOBS)
    assert not budget.state.dropped  # the third is still to come
    finish(tmp_path, {"dints": 0.85}, inference_s=0.0)
    clock.now += 400
    budget.drop_weak(JOBS)
    assert list(budget.state.dropped) == ["swinunetr"]
    assert "swinunetr is dropped after fold 0: Dice 0.8200 against 0.8700 of segresnet" in caplog.text
    assert budget.is_dropped("swinunetr", 1, JOBS)
    assert not budget.is_dropped("swinunetr", 0, JOBS)
    assert not budget.is_dropped("dints", 1, JOBS)
    job = Workspace(tmp_path).read_job("swinunetr", 1)
    assert job.state == "pruned"
    assert job.error.startswith("dropped after fold 0")
    rest: list[tuple[AlgoName, int]] = [("segresnet", 1), ("dints", 1)]
    budget.give(datalist, rest, rest)
    assert budget.job_s("dints_1") == pytest.approx((600 - 10) / 2)
    assert json.loads((tmp_path / "state" / "budget.json").read_text())["dropped"]


def test_nothing_is_dropped_while_a_job_of_the_first_fold_is_to_come(tmp_path: Path, clock: Clock) -> None:
    budget = open_budget(tmp_path)
    finish(tmp_path, {"segresnet": 0.9, "swinunetr": 0.2})
    for state in ("pending", "running"):
        Workspace(tmp_path).write_job(Job(algo="dints", fold=0, state=state))  # type: ignore[arg-type]
        budget.drop_weak(JOBS)
        assert not budget.state.dropped
    finish(tmp_path, {"dints": 0.95})
    budget.drop_weak(JOBS)
    assert list(budget.state.dropped) == ["swinunetr"]


@pytest.mark.parametrize(("dice", "dropped"), [(0.82, []), (0.80, ["dints"])])
def test_of_two_networks_one_far_behind_leaves_its_time_to_the_other(
    tmp_path: Path, clock: Clock, dice: float, dropped: list[str]
) -> None:
    """Far behind is under nine tenths of the best; two that are close are both kept."""
    budget = open_budget(tmp_path)
    finish(tmp_path, {"segresnet": 0.9, "dints": dice})
    budget.drop_weak([(algo, fold) for algo, fold in JOBS if algo != "swinunetr"])
    assert list(budget.state.dropped) == dropped


@pytest.mark.parametrize(("age_s", "counts_s"), [(12.0, 12.0), (31.0, 0.0)])
def test_the_start_of_a_process_that_has_just_begun_counts(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, age_s: float, counts_s: float
) -> None:
    """A process that has run for longer did something else first."""
    monkeypatch.setattr(clock, "time", lambda: psutil.Process().create_time() + age_s)
    assert module.work_began() == pytest.approx(clock.now - counts_s)
    assert open_budget(tmp_path).left_s == pytest.approx(1000 - counts_s)


@given(dice=st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=1, max_size=3))
def test_the_best_is_never_dropped(tmp_path_factory: pytest.TempPathFactory, dice: list[float | None]) -> None:
    folder = tmp_path_factory.mktemp("run")
    budget = open_budget(folder)
    algos = ALGOS[: len(dice)]
    finish(folder, dict(zip(algos, dice, strict=True)))
    budget.drop_weak([(algo, fold) for fold in range(2) for algo in algos])
    scored = {a: d for a, d in zip(algos, dice, strict=True) if d is not None}
    kept = set(scored) - set(budget.state.dropped)
    assert set(budget.state.dropped) <= set(scored)  # what failed is not weak
    if scored:
        assert max(scored, key=lambda a: scored[a]) in kept or max(scored.values()) == max(scored[a] for a in kept)
        worst_kept = min(scored[a] for a in kept)
        assert all(scored[a] <= worst_kept for a in budget.state.dropped)
        assert len(kept) >= min(LEAST_KEPT, sum(d >= 0.9 * max(scored.values()) for d in scored.values()))


SMALL = {
    "algos": ["segresnet", "unet", "dints"],
    "batch_size": 1,
    "precision": "fp32",
    "num_workers": 1,
    "roi_size": [16, 16, 16],
    "segresnet": {"init_filters": 8, "blocks_down": [1, 1]},
    "unet": {"features": [8, 16]},
    "dints": {"channel_mul": 0.125},
}


def test_the_analysis_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes: a process that has run for a while is not taken for one that has just begun."""
    monkeypatch.setattr(module, "STARTING_S", 0.0)
    row = stage_named("analyze")

    def slow(run: RunContext, place: Workspace) -> Outcome:
        outcome = row.run(run, place)
        time.sleep(0.2)  # of the real clock, which counts here
        return outcome

    rows = tuple(replace(stage, run=slow) if stage is row else stage for stage in STAGES)
    monkeypatch.setattr("autoseg.pipeline.stages.STAGES", rows)
    monkeypatch.setattr(JobPlans, "generate", lambda self: None)  # whose own time would hide that of the analysis
    path = make_phantoms(tmp_path, num_cases=4, num_testing=0, shape=(26, 24, 24), num_fold=2)
    path.write_text(path.read_text() + yaml.safe_dump({**SMALL, "algos": ["segresnet"]}))
    assert run_input(("analyze", "generate"), path, {"budget": "100s"}) == 0
    assert json.loads((tmp_path / "work_dir" / "state" / "budget.json").read_text())["spent_s"] >= 0.2


PAIR: list[tuple[AlgoName, int]] = [("segresnet", 0), ("segresnet", 1)]


def rounds_budget(folder: Path, number: int, since: float, num_to_fill: int = 0) -> RunBudget:
    """A round of two, each with two jobs."""
    run = Workspace(folder)
    run.plan_rounds(2)
    settings = Settings(modality="MRI", budget="1000s", datalist=Path("d"), dataroot=Path("r"), work_dir=folder)
    rounds = Rounds(number=2, jobs=tuple(PAIR), to_fill=num_to_fill, held_out=4 / 2)
    return RunBudget(run.begin_round(number, continues=True), settings, 1, rounds=rounds, since=since)


def test_jobs_of_every_round_get_the_same(tmp_path: Path, clock: Clock, datalist: Datalist) -> None:
    first = rounds_budget(tmp_path, 1, clock.now - 40, num_to_fill=10)
    assert first.left_s == 960
    place = first.workspace.root
    first.give(datalist, PAIR[:1], PAIR)
    assert first.job_s("segresnet_0") == (960 - 200) / 4  # nothing is known of predictions: a tenth for each round
    clock.now += 190
    finish(place, {"segresnet": 0.9}, inference_s=4.0)
    # Two models out of fold, 2 cases each, in two rounds; 10 cases to complete by both; two testing cases by both;
    # and 2 % of a round's time for the last one's corrupted copies.
    kept = 4 * (0.5 * 2 * 2 + 2 * (1.3 * 10 + 0.5 * 2) + 2 * 2) + 0.02 * 500
    assert first.reserved_s(datalist, PAIR[1:]) == pytest.approx(kept)
    first.give(datalist, PAIR[1:], PAIR[1:])
    share_s = first.job_s("segresnet_1")
    assert share_s == pytest.approx((770 - kept) / 3, abs=0.1)
    clock.now += share_s
    finish(place, {"segresnet": 0.9}, fold=1, inference_s=4.0)
    clock.now += 4 * 2 * (0.5 * 2 + 1.3 * 10)  # both rounds' predictions take what was kept for them
    first.save()
    second = rounds_budget(tmp_path, 2, clock.now, num_to_fill=10)
    second.give(datalist, PAIR, PAIR)
    assert second.job_s("segresnet_0") == second.job_s("segresnet_1") == pytest.approx(share_s, abs=0.5)


def test_a_first_round_of_fewer_folds_leaves_the_later_ones_as_much_for_each(
    tmp_path: Path, clock: Clock, datalist: Datalist
) -> None:
    first = rounds_budget(tmp_path, 1, clock.now)  # two_stage, whose fully annotated cases make one fold alone
    first.give(datalist, PAIR[:1], PAIR[:1])
    assert first.job_s("segresnet_0") == pytest.approx((1000 - 200) / 3, abs=0.1)


def test_later_rounds_jobs_with_budgets_of_their_own_keep_them(
    tmp_path: Path, clock: Clock, datalist: Datalist
) -> None:
    run, four = Workspace(tmp_path), (*PAIR, ("dints", 0), ("dints", 1))
    run.plan_rounds(2)
    paths = {"datalist": Path("d"), "dataroot": Path("r"), "work_dir": tmp_path}
    settings = Settings(modality="MRI", budget="1000s", segresnet={"budget": "100s"}, **paths)  # type: ignore[arg-type]
    rounds = Rounds(number=2, jobs=four, to_fill=0.0)
    first = RunBudget(run.begin_round(1, continues=True), settings, 1, rounds=rounds, since=clock.now)
    first.give(datalist, four, four)
    # Two of 100 s in each round; a tenth is kept for each round's predictions; four jobs share the rest.
    assert first.job_s("dints_0") == pytest.approx((1000 - 2 * 200 - 200) / 4)


def test_what_a_round_leaves_goes_to_the_next(tmp_path: Path, clock: Clock) -> None:
    first = rounds_budget(tmp_path, 1, clock.now)
    clock.now += 100
    first.save()
    clock.now += 50  # until the next is opened
    second = rounds_budget(tmp_path, 2, first.counts_from)
    assert second.left_s == 850
    assert "2m30s of 16m40s used (15%)" in second.summary()


def test_what_a_round_dropped_stays_dropped(tmp_path: Path, clock: Clock) -> None:
    first = rounds_budget(tmp_path, 1, clock.now)
    finish(first.workspace.root, {"segresnet": 0.87, "swinunetr": 0.82, "dints": 0.85})
    first.drop_weak(JOBS)
    second = rounds_budget(tmp_path, 2, clock.now)
    assert [second.is_dropped(algo, 0, JOBS) for algo in ALGOS] == [False, True, False]
    finish(second.workspace.root, {"segresnet": 0.87, "dints": 0.2})
    second.drop_weak(JOBS)
    assert not second.is_dropped("dints", 1, JOBS)  # that is decided once
    assert second.workspace.read_job("swinunetr", 0).error.startswith("dropped after fold 0")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_ends_on_time_without_the_weakest(tmp_path: Path) -> None:
    path = make_phantoms(tmp_path, num_cases=6, num_testing=1, shape=(26, 24, 24), num_fold=3)
    path.write_text(path.read_text() + yaml.safe_dump(SMALL))
    command = [sys.executable, "-m", "autoseg", "run", "--input", str(path), "--budget", "100s"]
    begin = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    wall_s = time.monotonic() - begin
    assert done.returncode == 0, done.stderr
    assert 95 <= wall_s <= 105
    jobs = Workspace(tmp_path / "work_dir").jobs()
    dropped = {job.algo for job in jobs if job.state == "pruned"}
    first = {job.algo: job.dice or 0.0 for job in jobs if job.fold == 0}
    # One is always dropped of three; a second one where it is hopeless, which is a matter of the machine's speed.
    assert [job.state for job in jobs if job.fold == 0] == ["done"] * 3
    assert all(job.state == ("pruned" if job.algo in dropped else "done") for job in jobs if job.fold)
    assert dropped in ({a for a in first if first[a] <= limit} for limit in sorted(first.values())[:2])
    assert "its time goes to the others" in done.stderr
    assert "its time goes to the others" in (tmp_path / "work_dir" / "report.html").read_text()
    again = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert again.returncode == 0
    assert "training on" not in again.stderr
