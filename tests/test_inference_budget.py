"""Prediction of time and memory, and what is given up for a budget."""

from __future__ import annotations

import logging
import mmap
from pathlib import Path

import numpy as np
import pytest
from processes import wait_for
from tiny_jobs import make_job

from autoseg.data.grid import Grid, Volume
from autoseg.data.streams import MemoryImage
from autoseg.errors import ResourceError
from autoseg.hardware.memory import PeakMemory
from autoseg.inference import cost as budget
from autoseg.inference.clock import Clock
from autoseg.inference.cost import Cost, Facts, Limits, WindowCost, choose_options, measure_rest
from autoseg.inference.options import Options
from autoseg.inference.predictor import Predictor
from autoseg.inference.windows import WindowModel, default_batch

GIB = 2**30
MIRRORED = {"tta": True, "mirror_axes": (0,), "overlap": 0.5, "resample_resolution": (1.0, 1.0, 1.0)}


def cost_of(tmp_path: Path, num: int = 4, *, seconds: float = 0.1, num_bytes: int = 10**7, **plan) -> Cost:
    """Of models whose windows take what is given; nothing is measured."""
    jobs = [make_job(tmp_path, "segresnet", i, seed=i, **{**MIRRORED, **plan}) for i in range(num)]
    cost = Cost(predictor=Predictor(jobs, device="cpu"))
    cost._rest_s = 1e-8
    cost._windows[0, (16, 16, 16), None, False] = WindowCost(seconds=seconds, num_bytes=num_bytes)
    return cost


def facts(*shape: int) -> Facts:
    return Facts(shape=shape, spacing_mm=(1.0, 1.0, 1.0), num_channels=1, axis=2)  # type: ignore[arg-type]


SMALL = facts(64, 64, 80)


def test_time_is_that_of_the_windows_that_will_be(tmp_path: Path) -> None:
    cost = cost_of(tmp_path)
    volume = Volume(array=np.zeros((1, 64, 64, 80), np.float32), grid=Grid(shape=(64, 64, 80), affine=np.eye(4)))
    for options in (Options(), Options(overlap=0.0), Options(overlap=0.25, num_models=2, mirror=False)):
        cost.predictor.options = options
        windows = sum(m.rows.num_windows * m.num_models for m in cost.predictor.grouped(MemoryImage(volume)))  # type: ignore[attr-defined]
        passes = windows * (1 if options.mirror is False else 2)
        found = cost.estimate(SMALL, options, 0).seconds
        assert found == pytest.approx(0.1 * passes + 1e-8 * 64 * 64 * 80)


def test_memory_does_not_grow_with_a_streamed_volume(tmp_path: Path) -> None:
    cost = cost_of(tmp_path)
    first, second = (cost.estimate(facts(512, 512, n), Options(), GIB).ram_bytes for n in (1500, 3000))
    assert second == first > GIB
    small = cost.estimate(SMALL, Options(), GIB)
    assert cost.estimate(facts(64, 64, 90), Options(), GIB).ram_bytes > small.ram_bytes  # held as a whole
    tight = cost.estimate(facts(512, 512, 1500), Options(slab_values=budget.SMALLEST_SLAB), GIB)
    assert tight.ram_bytes < first


def test_more_models_cost_time_and_not_memory(tmp_path: Path) -> None:
    cost = cost_of(tmp_path)
    one, all_of_them = (cost.estimate(SMALL, Options(num_models=n), GIB) for n in (1, None))
    assert all_of_them.seconds > 3.9 * one.seconds - 1
    # The sum of the logits of the models before stands beside those of the one at hand.
    assert all_of_them.ram_bytes - one.ram_bytes == 4 * 3 * 16**3 * default_batch((16, 16, 16), cost.predictor.device)


def test_models_that_average_logits_together_are_measured_with_their_last_layer(tmp_path: Path) -> None:
    classes = [{"name": f"c{i}", "values": [i]} for i in range(1, 12)]
    jobs = [make_job(tmp_path, "segresnet", i, seed=i, classes=classes) for i in range(2)]  # 8 filters, 12 outputs
    alone, both = Predictor(jobs[:1], device="cpu"), Predictor(jobs, device="cpu")
    assert (alone.window_model(alone.models).num_held, both.window_model(both.models).num_held) == (8, 12)
    for predictor, headless in ((alone, True), (both, False)):
        cost = Cost(predictor=predictor)
        cost.estimate(SMALL, Options(), 0)
        assert {key[3] for key in cost._windows} == {headless}


def test_windows_of_like_networks_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        budget, "measure_window", lambda *args: calls.append(args) or WindowCost(seconds=1, num_bytes=1)
    )
    cost = cost_of(tmp_path)
    cost._windows.clear()
    cost.estimate(SMALL, Options(), 0)
    assert len(calls) == 1


def test_another_precision_is_measured_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a budget could never gain by half precision."""

    def measured(model: WindowModel, window: object, channels: int) -> WindowCost:
        return WindowCost(seconds=3 if model.precision == "fp32" else 1, num_bytes=1)

    monkeypatch.setattr(budget, "measure_window", measured)
    cost = cost_of(tmp_path, 1)
    cost._windows.clear()
    exact, half = (cost.estimate(SMALL, Options(precision=p), 0).seconds for p in (None, "bf16"))
    rest = cost.rest_s * SMALL.voxels
    assert exact - rest == pytest.approx(3 * (half - rest))


def test_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cost = cost_of(tmp_path, 1)
    found = budget.measure_window(cost.predictor.window_model(cost.predictor.models), (16, 16, 16), 1)
    assert found.seconds > 0
    assert found.num_bytes >= 4 * 3 * 16**3
    # On a clock that moves 8 s between two looks: seconds by voxel.
    monkeypatch.setattr("autoseg.inference.cost.time.perf_counter", iter((0.0, 8.0)).__next__)
    assert measure_rest(cost.predictor.label_map, cost.predictor.device) == 8.0 / (32 * 128 * 128)
    monkeypatch.undo()
    with PeakMemory() as peak, mmap.mmap(-1, 64 * 2**20) as block:  # the allocator may have as much in hand
        block.write(b"x" * len(block))
        wait_for(lambda: peak.most - peak.before > 50 * 2**20)  # while it is held, not at its end alone


def test_the_next_estimate_goes_by_the_last_image(tmp_path: Path) -> None:
    cost = cost_of(tmp_path, 1)
    before = cost.estimate(SMALL, Options(), 0).seconds
    cost.learn(SMALL, 2.0)
    after = cost.estimate(SMALL, Options(), 0).seconds
    assert after - before == pytest.approx(2.0 - 1e-8 * SMALL.voxels)
    cost.learn(SMALL, 1.0)
    assert cost.estimate(SMALL, Options(), 0).seconds == pytest.approx(after - 1.0)


def test_what_the_first_model_found_is_counted(tmp_path: Path) -> None:
    cost = cost_of(tmp_path)
    plain, cropped = (cost.estimate(SMALL, Options(crop_to_first=on), 0).ram_bytes for on in (False, True))
    assert cropped - plain == 2 * 3 * SMALL.voxels


# -- what is given up


def choose(cost: Cost, limits: Limits, options: Options = Options()):  # noqa: B008 - frozen
    return choose_options(cost, SMALL, options, limits, 10**9)


def seconds_of(cost: Cost, **options) -> float:
    return cost.estimate(SMALL, Options(**options), 0).seconds / 0.9 + 1e-6


def test_nothing_where_all_fits(tmp_path: Path) -> None:
    found = choose(cost_of(tmp_path), Limits(ram_bytes=20 * GIB, seconds=1e5))
    assert found.options == Options()
    assert found.given_up == ()


def test_in_time_the_least_harmful_first(tmp_path: Path) -> None:
    cost = cost_of(tmp_path)
    steps = [
        ({"mirror": False}, ("no mirroring",)),
        ({"mirror": False, "overlap": 0.25}, ("no mirroring", "overlap 0.25")),
        ({"mirror": False, "overlap": 0.25, "num_models": 3}, ("no mirroring", "overlap 0.25", "3 of 4 models")),
        ({"mirror": False, "overlap": 0.0, "num_models": 1}, ("no mirroring", "overlap 0", "1 of 4 models")),
    ]
    for options, words in steps:
        found = choose(cost, Limits(seconds=seconds_of(cost, **options)))
        assert found.given_up == words
        assert found.options == Options(**options)


def test_what_the_user_set_is_not_given_up(tmp_path: Path) -> None:
    cost = cost_of(tmp_path)
    found = choose(cost, Limits(seconds=seconds_of(cost, overlap=0.5, num_models=2, mirror=True)), Options(mirror=True))
    assert found.options.mirror is True
    assert "no mirroring" not in found.given_up


def test_memory_first_takes_what_costs_nothing(tmp_path: Path) -> None:
    cost = cost_of(tmp_path)
    whole = cost.estimate(SMALL, Options(), 10**9).ram_bytes
    least = cost.estimate(SMALL, Options(window_batch=1), 10**9).ram_bytes
    assert least < whole
    found = choose(cost, Limits(ram_bytes=int(least / 0.9) + 10))
    assert found.options == Options(window_batch=1)
    assert found.given_up == ()
    # On a CPU the device's memory is the process'.
    assert choose(cost, Limits(device_bytes=int(least / 0.9) + 10)).options == Options(window_batch=1)


def test_a_budget_that_cannot_be_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cost = cost_of(tmp_path)
    with pytest.raises(ResourceError, match=r"this image needs 0\.\d\d GB more than --max_memory and --max_ram allow"):
        choose(cost, Limits(ram_bytes=10**9))
    with caplog.at_level(logging.WARNING):
        found = choose(cost, Limits(seconds=0.01))
    assert found.options == Options(mirror=False, overlap=0.0, num_models=1)
    assert "will not be kept: the quickest way takes about" in caplog.text


# -- the clock


def test_inner_phases_stop_the_outer_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("autoseg.inference.clock.time.perf_counter", lambda: now[0])
    clock = Clock()
    with clock.at("invert"):
        now[0] += 2
        with clock.at("infer"):
            now[0] += 5
            with clock.at("load"):
                now[0] += 3
        now[0] += 2
    assert clock.seconds == {"load": 3, "pre": 0, "infer": 5, "invert": 4, "post": 0, "write": 0}
    assert clock.total_s == 12
