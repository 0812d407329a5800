"""Plans that fit time and memory: the planner's choice, measured by a made-up device and by this one."""

from __future__ import annotations

import logging
import math
import mmap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plans import CPU, GPU, make_fingerprint, plan_and_origins, tiny_plan
from processes import wait_for

from autoseg.algos import measurements
from autoseg.algos.fit import fitted_plan
from autoseg.algos.inputs import PlanInputs
from autoseg.algos.measurements import Measurements
from autoseg.config.networks import ALGOS, AlgoName, RecipeName
from autoseg.config.settings import Settings
from autoseg.data.labels import LabelMap
from autoseg.errors import ResourceError
from autoseg.hardware.facts import Hardware
from autoseg.hardware.memory import MemoryWatch
from autoseg.networks import build_network, heads
from autoseg.plan import Origin, Plan
from autoseg.training import measure
from autoseg.training.measure import StepCost, measure_step
from autoseg.weights.start import Start, StartWeights

DEVICE = torch.device("cpu")
LARGE = {f"size_mm_{k}": (96.0, 96.0, 96.0) for k in ("median", "p90")}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Plan]]:
    """Make up what a step takes, a million voxels of the smallest network; returns what was measured."""

    def make_up(seconds: float, gib: float, base_gib: float = 0.5) -> list[Plan]:
        seen: list[Plan] = []

        def measure(plan: Plan, device: torch.device, most_s: float) -> StepCost | None:
            seen.append(plan)
            width = plan.network.get("init_filters", 16) / 16
            million = plan.batch_size * math.prod(plan.roi_size) / 1e6 * width
            memory_gib = base_gib + gib * million
            return None if memory_gib > 90 else StepCost(step_s=seconds * million, memory_gib=memory_gib)

        monkeypatch.setattr(measurements, "measure_step", measure)
        return seen

    return make_up


def planned(
    algo: AlgoName = "segresnet",
    *,
    hardware: Hardware = CPU,
    budget_s: float | None = None,
    num_train: int = 160,
    data: dict[str, Any] | None = None,
    earlier: Plan | None = None,
    measured: Measurements | None = None,
    start: StartWeights | None = None,
    **settings: Any,
) -> tuple[Plan, dict[str, Origin]]:
    inputs = PlanInputs(
        algo=algo,
        fold=0,
        num_train=num_train,
        fingerprint=make_fingerprint(**(data or {})),
        label_map=LabelMap(names=("sphere", "box"), values=((1,), (2,)), sigmoid=False),
        settings=Settings(**{"modality": "MRI", "datalist": Path("d"), "dataroot": Path("r"), **settings}),
        hardware=hardware,
        budget_s=budget_s,
        earlier=earlier,
        start=start,
    )
    return fitted_plan(DEVICE, inputs, measured)


def test_a_long_budget_pays_for_a_wider_network(device: Callable[..., list[Plan]]) -> None:
    device(seconds=2.0, gib=1.0)
    widths, steps = [], []
    for minutes in (0.1, 2, 10, 30, 600):
        plan, _ = planned(budget_s=60.0 * minutes)
        assert plan.step_s is not None
        widths.append(plan.network["init_filters"])
        steps.append(0.8 * 60 * minutes / plan.step_s)
    assert widths[:2] == [8, 16]
    assert widths == sorted(widths)
    assert widths[-1] == 32
    assert all(s >= 2000 for s, w in zip(steps, widths, strict=True) if w > 16)
    assert all(s >= 300 for s, w in zip(steps, widths, strict=True) if w > 8)
    assert planned()[0].network["init_filters"] == 16  # without a budget


def test_a_short_budget_measures_no_step_of_a_larger_network(device: Callable[..., list[Plan]], tmp_path: Path) -> None:
    seen = device(seconds=10.0, gib=1.0)
    for num_train in (160, 159):  # another fold, perhaps after a stop: the same steps
        measured = Measurements(tmp_path / "steps.json")
        plan, found = planned(budget_s=30.0, num_train=num_train, measured=measured)
        assert plan.network["init_filters"] == 8
        assert "too few steps" in found["network.init_filters"].rule
    assert [plan.network["init_filters"] for plan in seen] == [16, 8]
    fixed, _ = planned(budget_s=30.0, segresnet={"init_filters": 16})
    assert fixed.network["init_filters"] == 16


@pytest.mark.parametrize(("budget_s", "width"), [(60.0, 8), (100_000.0, 16)])
def test_measuring_has_its_share_of_the_budget(device: Callable[..., list[Plan]], budget_s: float, width: int) -> None:
    """A step is measured even if nothing is left; a smaller network is then taken for half of it, none is larger."""
    seen = device(seconds=1.0, gib=1.0)
    measured = Measurements()
    measured.state.spent_s["segresnet"] = 0.05 * budget_s
    plan, _ = planned(budget_s=budget_s, measured=measured, data=LARGE)
    assert [plan.network["init_filters"] for plan in seen] == [16]
    assert plan.network["init_filters"] == width
    free = {8: 8, 16: 32}[width]
    assert planned(budget_s=budget_s, data=LARGE)[0].network["init_filters"] == free
    # Of a run's budget, that is, not of a job's.
    run = planned(
        algos=("segresnet", "swinunetr", "dints"), budget="1000h", budget_s=budget_s, measured=measured, data=LARGE
    )[0]
    assert run.network["init_filters"] == free


def test_what_was_measured_is_known_where_no_time_is_left(device: Callable[..., list[Plan]]) -> None:
    """As where a pretraining was planned before the jobs that start from it: its share is spent, its steps known."""
    seen = device(seconds=1.0, gib=1.0)
    measured = Measurements()
    first, _ = planned(budget_s=60.0, measured=measured, data=LARGE)
    assert len(seen) == 3
    measured.state.spent_s["segresnet"] = 1e6
    again, _ = planned(budget_s=60.0, measured=measured, data=LARGE)
    assert (again, len(seen)) == (first, 3)


def test_weights_keep_their_width_and_a_guess_follows_the_patch(device: Callable[..., list[Plan]]) -> None:
    """A rung whose patch is no smaller is no faster then: taken for half, it left jobs a third of their steps."""
    device(seconds=1.2, gib=1.0)
    network = {"init_filters": 16, "blocks_down": [1, 2, 2, 4], "norm": "INSTANCE"}
    start = StartWeights(start=Start(kind="mae", network=network, source="w", digest="d"), path=Path("w"))
    known = planned(budget_s=200.0, start=start, data=LARGE)[0]
    measured = Measurements()
    measured.state.spent_s["segresnet"] = 1e6
    guessed = planned(budget_s=200.0, start=start, measured=measured, data=LARGE)[0]
    for plan in (known, guessed):
        assert plan.network["init_filters"] == 16
        assert plan.roi_size == (48, 48, 48)
    assert guessed.step_s == pytest.approx(known.step_s, rel=0.01)


def test_memory_is_met_by_a_smaller_batch_then_patch(device: Callable[..., list[Plan]]) -> None:
    device(seconds=1.0, gib=80.0)  # two patches of 64^3 would take 42 GiB, one 21
    plan, found = planned(data=LARGE)
    assert plan.batch_size == 1
    assert math.prod(plan.roi_size) < 64**3
    assert plan.memory_gib is not None
    assert plan.memory_gib <= 0.8 * CPU.memory_gib + 0.1
    assert "over 80% of 24.0 GiB (measured)" in found["batch_size"].rule
    assert found["batch_size"].rule == found["roi_size"].rule
    assert plan.num_steps_per_epoch == 160


def test_what_the_user_fixed_is_kept_and_said(
    device: Callable[..., list[Plan]], caplog: pytest.LogCaptureFixture
) -> None:
    device(seconds=1.0, gib=80.0)
    plan, _ = planned(data=LARGE, batch_size=2, roi_size=(64, 64, 64))
    assert (plan.batch_size, plan.roi_size) == (2, (64, 64, 64))
    assert "batch_size and roi_size are fixed" in caplog.text


def test_memory_of_a_gpu_buys_no_batch_beyond_a_handful(device: Callable[..., list[Plan]]) -> None:
    """What 80 GB would hold leaves fewer steps; a step that does not fit is made smaller all the same."""
    device(seconds=0.01, gib=5.0)
    plan, origins = planned(hardware=GPU, num_train=1000, data=LARGE)
    assert plan.batch_size == 4
    assert plan.num_epochs * plan.num_steps_per_epoch == 300 * 1000 / 4
    assert "steps count for more than samples" in origins["batch_size"].rule
    tight, origins = planned(hardware=GPU, num_train=1000, data=LARGE, memory_share=0.1)
    assert tight.batch_size < 4
    assert "over 10% of 80.0 GiB (measured)" in origins["batch_size"].rule
    assert planned(hardware=GPU, num_train=6, data=LARGE)[0].batch_size == 2
    assert planned(hardware=GPU, num_train=1000, data=LARGE, batch_size=3)[0].batch_size == 3


def test_a_budget_on_a_gpu_shrinks_patch_and_network(device: Callable[..., list[Plan]]) -> None:
    device(seconds=0.1, gib=1.0)
    body = {f"size_mm_{k}": (400.0, 400.0, 400.0) for k in ("median", "p90")}
    voxels = []
    for budget_s in (100_000.0, 5000.0, 2000.0, 300.0):
        plan, _ = planned(hardware=GPU, num_train=1000, data=body, budget_s=budget_s)
        assert plan.step_s is not None
        assert 0.8 * budget_s / plan.step_s >= 2000
        voxels.append(math.prod(plan.roi_size))
    assert voxels == sorted(voxels, reverse=True)
    assert len(set(voxels)) == 4


def test_the_rate_follows_the_batch(device: Callable[..., list[Plan]]) -> None:
    device(seconds=0.01, gib=1.0)
    rates = [planned(hardware=GPU, batch_size=n)[0].learning_rate for n in (1, 2, 8)]
    assert rates == pytest.approx([2e-4 / 2**0.5, 2e-4, 4e-4], rel=1e-2)


@pytest.mark.parametrize("algo", ALGOS)
def test_a_real_step_is_measured(algo: AlgoName) -> None:
    small = {"segresnet": {"init_filters": 8, "blocks_down": (1, 1)}, "dints": {"channel_mul": 0.125}}
    plan = tiny_plan(algo, batch_size=1, unet={"features": (8, 16)}, **{k: v for k, v in small.items() if k == algo})
    cost = measure_step(plan, DEVICE)
    assert cost is not None
    assert 0 < cost.step_s < 60
    assert 0.1 < cost.memory_gib < 20


def test_what_other_work_takes_is_not_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that mostly waits for the processor: counted is what it computes itself."""

    def waiting() -> None:
        begin = time.process_time()
        while time.process_time() - begin < 0.01:
            pass
        time.sleep(0.2)

    monkeypatch.setattr(measure, "bare_step", lambda *_: waiting)
    cost = measure_step(tiny_plan(), DEVICE)
    assert cost is not None
    assert cost.slowed > measure.BUSY
    assert cost.step_s * cost.slowed >= 0.2
    monkeypatch.setattr(measure, "bare_step", lambda *_: lambda: seen.append(1))
    seen: list[int] = []
    measure_step(tiny_plan(), DEVICE, most_s=0.0)
    assert len(seen) == 1


def test_another_process_measures_for_a_gpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Shown on a CPU: the same answer as here; the error of one that fails is seen, and not tried here."""
    monkeypatch.setattr(measure, "measured_here", lambda *_: pytest.fail("measured here"))
    cost = measure._measured_apart(tiny_plan(), DEVICE, math.inf)
    assert cost is not None
    assert cost.step_s > 0
    assert cost.memory_gib > 0.05
    assert cost.start_s > 0.1  # torch alone takes longer to be imported
    with pytest.raises(
        ResourceError, match=r"^segresnet: .* on xla ended with code 1: .+[^.]\. Look at .*autoseg doctor"
    ):
        measure._measured_apart(tiny_plan(), torch.device("xla"), math.inf)  # no machine of ours has one
    assert "Traceback" in caplog.text


@pytest.mark.parametrize(("start_s", "measured"), [(1e6, [16, 8]), (0.0, [16])])
def test_the_start_of_a_process_decides_no_rung(
    monkeypatch: pytest.MonkeyPatch, start_s: float, measured: list[int]
) -> None:
    """Torch and CUDA start for seconds, which a short budget would have for all its steps together."""
    seen: list[int] = []
    now = [0.0]

    def measure_step(plan: Plan, device: torch.device, most_s: float) -> StepCost:
        seen.append(plan.network["init_filters"])
        now[0] += 1e6 + 0.01
        return StepCost(step_s=plan.network["init_filters"] / 16, memory_gib=1.0, start_s=start_s)

    monkeypatch.setattr(measurements, "measure_step", measure_step)
    monkeypatch.setattr(measurements.time, "perf_counter", lambda: now[0])
    planned(budget_s=100.0)
    assert seen == measured


def test_a_lack_of_memory_is_an_answer_and_other_faults_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception):  # type: ignore[no-untyped-def]
        def bare_step(plan: Plan, device: torch.device, channels_last: bool | None) -> Callable[[], None]:
            raise error

        monkeypatch.setattr(measure, "bare_step", bare_step)

    fail(torch.OutOfMemoryError("no memory"))
    assert measure_step(tiny_plan(), DEVICE) is None
    fail(RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        measure_step(tiny_plan(), DEVICE)


RECIPES = {
    "flare23": {
        "algo": "segresnet", "optimizer": "adamw", "learning_rate": 2e-4, "weight_decay": 1e-5, "loss": "dice_focal",
        "num_epochs": 300, "batch_size": 8, "roi_size": (224, 224, 224), "augment": "axial", "schedule": "cosine",
    },
    "spleen": {
        "algo": "unet", "optimizer": "novograd", "learning_rate": 2e-3, "loss": "dice_ce", "roi_size": (96, 96, 96),
        "num_epochs": 1260, "batch_size": 4,
    },
    "btcv": {
        "algo": "swinunetr", "optimizer": "adam", "learning_rate": 2e-4, "loss": "dice_ce", "roi_size": (96, 96, 96),
        "num_epochs": 5000, "batch_size": 4, "resample_resolution": (1.5, 1.5, 2.0), "foreground_fraction": 0.5,
    },
    "wholebody_highres": {
        "algo": "segresnet", "optimizer": "adamw", "learning_rate": 1e-4, "weight_decay": 1e-5, "loss": "dice_ce",
        "num_epochs": 4000, "batch_size": 16, "roi_size": (96, 96, 96), "resample_resolution": (1.5, 1.5, 1.5),
        "augment": "none", "mirror_axes": (), "foreground_fraction": 0.0, "schedule": "constant", "overlap": 0.4,
    },
    "wholebody_lowres": {
        "algo": "segresnet", "optimizer": "adamw", "learning_rate": 1e-4, "weight_decay": 1e-5, "loss": "dice_ce",
        "num_epochs": 4000, "batch_size": 16, "roi_size": (96, 96, 96), "resample_resolution": (3.0, 3.0, 3.0),
        "augment": "none", "mirror_axes": (), "foreground_fraction": 0.0, "schedule": "constant", "overlap": 0.25,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_followed_as_published_and_under_the_user(
    name: str, device: Callable[..., list[Plan]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "autoseg")
    device(seconds=0.01, gib=0.01)
    expected = dict(RECIPES[name])
    algo: AlgoName = expected.pop("algo")  # type: ignore[assignment]
    settings = Settings(modality="CT", datalist=Path("d"), dataroot=Path("r"), recipe=name)  # type: ignore[arg-type]
    assert settings.algos == (algo,)
    plan, found = planned(algo, modality="CT", recipe=name)
    assert {key: getattr(plan, key) for key in expected} == expected
    assert found["learning_rate"].origin == f"recipe {name}"
    assert found["learning_rate"].rule
    if name == "flare23":
        assert plan.warmup_fraction * plan.num_epochs == pytest.approx(3)
        assert plan.channels[0].bounds == (-250, 250)
        assert plan.network["blocks_down"] == [1, 2, 2, 4, 4]
    mine, found = planned(algo, modality="CT", recipe=name, learning_rate=0.5, roi_size=(64, 64, 64))
    assert (mine.learning_rate, mine.roi_size) == (0.5, (64, 64, 64))
    assert found["learning_rate"].origin == "input.yaml"
    assert mine.optimizer == expected["optimizer"]


@pytest.mark.parametrize("name", ["wholebody_highres", "wholebody_lowres"])
def test_a_whole_body_is_planned_with_its_outputs_and_steps(name: str) -> None:
    """104 structures of the set's 1,000 CTs: 105 outputs, and about nnU-Net's number of steps."""
    classes = {f"structure {value}": (value,) for value in range(1, 105)}
    plan, _ = plan_and_origins("segresnet", modality="CT", recipe=name, classes=classes, hardware=GPU, num_train=1000)
    assert plan.num_outputs == 105
    assert plan.num_epochs * plan.num_steps_per_epoch == 252_000
    assert plan.network | {"blocks_down": [1, 2, 2, 4], "init_filters": 32, "dsdepth": 1} == plan.network
    with torch.device("meta"):
        network = build_network(plan)
    first = heads("segresnet", network)[0]
    assert isinstance(first, torch.nn.Conv3d)
    assert first.out_channels == 105


@pytest.mark.parametrize(
    ("name", "algo", "num_train", "num_steps"),
    [
        ("spleen", "unet", 32, 10_080),  # of the bundle's training curve
        ("btcv", "swinunetr", 24, 30_000),  # 5,000 epochs of 24 images, four patches a step
        ("flare23", "segresnet", 1760, 66_000),  # 300 epochs of 2,200 images' four fifths, eight patches a step
    ],
)
def test_a_recipe_makes_the_steps_that_were_published(
    name: RecipeName, algo: AlgoName, num_train: int, num_steps: int
) -> None:
    plan, _ = plan_and_origins(algo, modality="CT", recipe=name, hardware=GPU, num_train=num_train)
    assert plan.num_epochs * plan.num_steps_per_epoch == num_steps


def test_a_recipe_for_a_network_that_is_not_trained_is_refused() -> None:
    with pytest.raises(ValueError, match="recipe flare23 is for segresnet, which is not among algos"):
        Settings(modality="CT", datalist=Path("d"), dataroot=Path("r"), recipe="flare23", algos=("dints",))


def test_a_job_that_goes_on_from_weights_keeps_their_patch_and_network(device: Callable[..., list[Plan]]) -> None:
    """Time alone would have it another rung: eight filters where little is left, 24 where much is."""
    device(seconds=10.0, gib=1.0)
    first, _ = planned(budget_s=600.0)
    for budget_s in (20.0, 60_000.0):
        assert planned(budget_s=budget_s)[0].network != first.network
        later, _ = planned(budget_s=budget_s, earlier=first)
        assert (later.network, later.roi_size, later.batch_size) == (first.network, first.roi_size, first.batch_size)


def test_one_process_takes_its_share_of_the_batch(device: Callable[..., list[Plan]]) -> None:
    seen = device(seconds=1.0, gib=10.0)
    plan, _ = planned(hardware=GPU, gpus_per_job=4, data=LARGE)
    assert plan.batch_size % 4 == 0
    assert plan.batch_size // 4 in {p.batch_size for p in seen}


def test_the_peak_of_memory_is_that_of_the_block_alone() -> None:
    """What the process took before, and gave back, does not count: jobs come one after the other."""
    size = 256 << 20

    with MemoryWatch(DEVICE, 0.005) as first, mmap.mmap(-1, size) as block:
        before = first.peak_gib
        block.write(b"1" * size)
        wait_for(lambda: first.peak_gib - before > 0.8 * size / 2**30)
    with MemoryWatch(DEVICE, 0.005) as second:
        pass
    assert first.peak_gib - second.peak_gib > 0.8 * size / 2**30
    with MemoryWatch(DEVICE, 60.0) as rarely:
        pass
    assert rarely.peak_gib == pytest.approx(second.peak_gib, rel=0.2)
