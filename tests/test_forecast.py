"""The forecast: list scheduling, the sum of a job's parts, and `autoseg plan` on phantoms."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from plans import tiny_plan
from processes import autoseg
from test_pipeline import make_data
from test_pretraining_run import make_data as make_unlabeled

from autoseg.config.units import parse_duration
from autoseg.pipeline.forecast import Forecast, makespan
from autoseg.pipeline.job_costs import SCORING, Cost, job_cost


@pytest.mark.parametrize(
    ("seconds", "devices", "expected"),
    [
        ([3.0, 3.0, 2.0, 2.0, 2.0], 1, 12.0),
        ([3.0, 3.0, 2.0, 2.0, 2.0], 2, 7.0),
        ([3.0, 3.0, 2.0, 2.0, 2.0], 5, 3.0),
        ([3.0, 3.0, 2.0, 2.0, 2.0], 32, 3.0),
    ],
)
def test_each_job_goes_to_the_device_that_is_free_first(seconds: list[float], devices: int, expected: float) -> None:
    assert makespan(seconds, devices) == pytest.approx(expected)


def test_a_job_is_its_steps_and_validations() -> None:
    plan = tiny_plan(num_epochs=10, num_steps_per_epoch=7, num_epochs_per_validation=5)
    cost = job_cost(plan, 0.5, 20.0, 1.0)
    assert cost.seconds == pytest.approx(10 * 7 * 0.5 + 2 * 20 + SCORING * 20)
    assert job_cost(plan.model_copy(update={"budget_s": 30.0}), 0.5, 20.0, 1.0).seconds == 30.0


def test_devices_share_the_jobs() -> None:
    costs = {f"a_{i}": Cost(step_s=1, validation_s=1, memory_gib=1, seconds=100) for i in range(4)}
    forecast = Forecast(costs=costs, done=0, device="", preparing_s=10, cache_gib=0, models_gib=0)
    assert [forecast.seconds_on(n) for n in (1, 2, 4, 32)] == [410, 210, 110, 110]
    first = {name: replace(cost, seconds=30) for name, cost in costs.items()}
    after = replace(forecast, pretraining=first)
    assert [after.seconds_on(n) for n in (1, 2, 4)] == [530, 270, 140], "no job starts before all is pretrained"


def test_plan_tells_what_a_run_takes(tmp_path: Path) -> None:
    path = make_data(tmp_path)
    done = autoseg("plan", "--input", path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^segresnet_0 +\d+\.\d{3} +\S+ +\d\.\d GiB +\S+$", done.stdout, re.MULTILINE)
    assert re.search(r"^2 jobs to train: \S+ of CPU, \d+ cores? in all$", done.stdout, re.MULTILINE)
    assert re.search(r"^Memory: up to \d\.\d GiB a job; disk: cache 0\.00 GiB, models", done.stdout, re.MULTILINE)
    rows = re.findall(r"^ +(1|4|32)  (\S+)$", done.stdout, re.MULTILINE)
    assert [number for number, _ in rows] == ["1", "4", "32"]
    one, four, many = (0.0 if text == "0s" else parse_duration(text) for _, text in rows)
    assert one >= four == many


def test_pretraining_is_forecast_before_it_is_done(tmp_path: Path) -> None:
    path = make_unlabeled(tmp_path, folds=[0], compare_scratch=True, pretrain={"method": "mae", "epochs": 10**6})
    done = autoseg("plan", "--input", path, "--budget", "1000s")
    assert done.returncode == 0, done.stderr
    assert "plan: measuring the pretraining of segresnet\n" in done.stderr
    rows = re.findall(r"^(\S.*?) {2,}\d+\.\d{3} +\S+ +\d\.\d GiB +(\S+)$", done.stdout, re.MULTILINE)
    assert [name for name, _ in rows] == ["pretrain segresnet_0", "segresnet_0", "segresnet_0 from scratch"]
    assert rows[0][1] == "4m10s", "its quarter of the budget, which its epochs alone would not end"
    assert re.search(r"^1 to pretrain, then 2 jobs to train: \S+ of CPU, \d+ cores? in all$", done.stdout, re.MULTILINE)
    work = tmp_path / "work_dir"
    assert not (work / "segresnet_0" / "configs").exists(), "no plan that lacks what the job is to start from"
    assert not (work / "pretraining" / "segresnet_0" / "models").exists()
