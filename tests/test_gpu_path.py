"""What predictions do on a GPU, on devices that are faked: each way gives what the CPU's gives."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import GPU, plan_and_origins, tiny_plan
from test_inference import Counting, probs_of, rows_of, smooth_probs
from test_trainer import make_case, make_trainer
from tiny_jobs import TensorRows, make_job

from autoseg.algos.draft import Fit
from autoseg.data.grid import Grid, Volume
from autoseg.data.labels import LabelMap
from autoseg.hardware.device import layout_of, searching, to_device
from autoseg.inference import windows
from autoseg.inference.cost import Cost, Facts, Limits, choose_options
from autoseg.inference.options import Options
from autoseg.inference.predictor import Predictor
from autoseg.inference.probable import most_probable
from autoseg.inference.regions import KeptRows
from autoseg.inference.restore import SLAB_VALUES, Member, _chosen, _exclusive, _slabs, _thinner
from autoseg.inference.threads import Ahead, Behind, Pinned
from autoseg.networks import build_network
from autoseg.training import measure
from autoseg.training.measure import StepCost

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from host import host_work

META = torch.device("meta")


@settings(max_examples=60)
@given(
    num=st.integers(1, 9), size=st.integers(1, 50), ties=st.booleans(), dim=st.integers(0, 1), seed=st.integers(0, 99)
)
def test_the_most_probable_class_is_the_first_of_the_largest(
    num: int, size: int, ties: bool, dim: int, seed: int
) -> None:
    values = torch.rand(num, size, generator=torch.Generator().manual_seed(seed))
    values = (values * 3).round() if ties else values
    values = values if dim == 0 else values.T
    wanted = np.argmax(values.numpy(), dim)  # torch's own is any of several
    assert np.array_equal(most_probable(values, dim).numpy(), wanted)


def test_a_class_for_a_value_that_is_no_number() -> None:
    assert most_probable(torch.tensor([[0.1], [float("nan")], [0.5]]), 0).tolist() in ([0], [1])


@settings(max_examples=60)
@given(
    grid=st.tuples(*[st.integers(1, 12)] * 3),
    size=st.tuples(*[st.integers(1, 24)] * 3),
    shift=st.tuples(*[st.integers(0, 3)] * 3),
    axis=st.integers(0, 2),
    slab_values=st.sampled_from([60, 1 << 24]),
    seed=st.integers(0, 99),
)
def test_interpolating_every_voxel_gives_the_labels_of_interpolating_surfaces(
    grid: Any, size: Any, shift: Any, axis: int, slab_values: int, seed: int
) -> None:
    """The first is what a GPU does, slabs cut thinner where the image is finer; the second a CPU."""
    boxes = [tuple(slice(s * i, s * i + n) for s, n in zip(shift, size, strict=True)) for i in range(2)]
    tables = [smooth_probs(4, grid, seed + i, sigmoid=False) for i in range(2)]
    label_map = LabelMap(names=("a", "b", "c"), values=((1,), (2,), (3,)))
    subsets = [(0,), (0, 1)]
    found = []
    for is_dense in (False, True):
        members = [Member(rows=TensorRows(t, axis), box=b) for t, b in zip(tables, boxes, strict=True)]  # type: ignore[arg-type]
        labels = []
        for slabs in _slabs(members, slab_values):
            if not is_dense:
                labels.append(_exclusive(slabs, subsets, label_map))
                continue
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("autoseg.inference.restore.SLAB_VALUES", 200)
                parts = [_chosen(piece, subsets, label_map, None) for piece in _thinner(slabs)]
            each = (torch.cat(part, axis + 1) for part in zip(*parts, strict=True))
            labels.append([label_map.decode(part.numpy()) for part in each])
        found.append([np.concatenate([slab[k] for slab in labels], axis) for k in range(2)])
    differ = sum(int((a != b).sum()) for a, b in zip(*found, strict=True))
    # Where two classes are equal but for the last digit of a float32, either may come out.
    assert differ <= 1e-3 * found[0][0].size


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.625])
@pytest.mark.parametrize("axis", [0, 2])
def test_reading_ahead_and_copying_behind_change_nothing(
    overlap: float, axis: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = torch.randn(1, 45, 37, 29)
    image[:, :20] = -1.0
    how: dict[str, Any] = {"axis": axis, "overlap": overlap, "pieces": 7, "window_batch": 2, "background": (-1.0,)}
    wanted = probs_of(Counting(), image, **how)
    threads = set[str]()

    class Late(Pinned):
        """As where batches are on their way back from a GPU."""

        def swap(self, batch: torch.Tensor) -> Sequence[torch.Tensor]:
            before, self.is_behind = self.last(), True
            self.batch = batch.clone()
            return before

        def last(self) -> Sequence[torch.Tensor]:
            batch, self.batch = getattr(self, "batch", None), None
            return [] if batch is None else list(batch)

    def ahead(make: Any, number: int, *, threaded: bool) -> Ahead[Any]:
        assert not threaded, "a CPU"

        def named(index: int) -> Any:
            threads.add(threading.current_thread().name)
            return make(index)

        return Ahead(named, number, threaded=True)

    monkeypatch.setattr(windows, "Pinned", Late)
    monkeypatch.setattr(windows, "Ahead", ahead)
    assert torch.equal(probs_of(Counting(), image, **how), wanted)
    assert any(name.startswith("autoseg-read") for name in threads)


def test_errors_of_the_threads_are_raised() -> None:
    def fail(index: int) -> int:
        if index == 2:
            raise ValueError("no third")
        return index

    ahead = Ahead(fail, 4, threaded=True)
    assert [ahead.take(), ahead.take()] == [0, 1]
    with pytest.raises(ValueError, match="no third"):
        ahead.take()
    done: list[int] = []

    def put_three() -> None:
        with Behind(lambda i: done.append(fail(i)), threaded=True) as behind:
            for i in range(3):
                behind.put(i)

    with pytest.raises(ValueError, match="no third"):
        put_three()
    assert done == [0, 1]


def test_kernels_are_searched_for_the_plans_window_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image a little larger than a patch is one window of its own size: not worth a search, on whatever image."""
    predictor = Predictor([make_job(tmp_path, "segresnet", 0, roi_size=(16, 16, 16))], device="cpu")
    seen: list[tuple[tuple[int, ...], bool]] = []
    network = predictor.models[0].network
    forward = network.forward

    def watched(batch: torch.Tensor) -> Any:
        seen.append((tuple(batch.shape[2:]), torch.backends.cudnn.benchmark))
        return forward(batch)

    network.forward = watched  # type: ignore[method-assign]
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    for edge in (40, 18):
        array = np.random.default_rng(0).normal(size=(1, edge, 18, 18)).astype(np.float32)
        predictor.predict_labels(
            Volume(array=array, grid=Grid(shape=array.shape[1:], affine=np.diag([1.2, 1.2, 1.6, 1])))
        )  # type: ignore[arg-type]
    assert {searched for size, searched in seen if size == (16, 16, 16)} == {True}
    assert {searched for size, searched in seen if size != (16, 16, 16)} == {False}
    assert len({size for size, _ in seen}) > 1
    assert torch.backends.cudnn.benchmark
    with searching(False):
        assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize(("free", "device"), [(1 << 40, "meta"), (1 << 10, "cpu")])
def test_rows_lie_where_there_is_room(free: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "free_bytes", lambda device: free)
    network = Counting().to(META)
    model = windows.WindowModel([network], num_outputs=3, sigmoid=False, device=META, precision="fp32")
    rows = windows.ProbRows(
        model, lambda start, stop: torch.zeros(1, stop - start, 40, 40), (40, 40, 40), 0, roi_size=(16, 16, 16),
        overlap=0.5,
    )  # fmt: skip
    assert rows.device.type == device


def test_many_classes_stay_on_a_middling_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probabilities are there a slab at a time: 0.3 GB in place of 14 for 105 classes of a plane of 340x340 voxels."""
    model = windows.WindowModel([Counting().to(META)], num_outputs=105, sigmoid=False, device=META, precision="fp32")

    def rows() -> windows.ProbRows:
        return windows.ProbRows(
            model, lambda start, stop: torch.zeros(1, 1, 1, 1), (340, 340, 300), 2, roi_size=(96, 96, 96), overlap=0.5
        )

    free = {"bytes": 22e9}
    monkeypatch.setattr(windows, "free_bytes", lambda device: free["bytes"])
    first, second = rows(), rows()
    assert first.device.type == "meta"
    free["bytes"] = 12e9  # what the first took is seen, though both were made before
    assert second.device.type == "cpu"
    assert first.at_once * 105 * 340 * 340 <= SLAB_VALUES
    assert second.at_once == 1


def test_a_whole_volume_is_gone_through_in_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "SLAB_VALUES", 5 * 3 * 20 * 20)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype))
    model = windows.WindowModel([Counting().to(META)], num_outputs=3, sigmoid=False, device=META, precision="fp32")
    for go in (windows.predict_targets, KeptRows):
        rows = windows.ProbRows(
            model, lambda start, stop: torch.zeros((1, stop - start, 20, 20), device=META), (18, 20, 20), 0,
            roi_size=(16, 16, 16), overlap=0.5, on_device=True,
        )  # fmt: skip
        asked: list[int] = []
        make = rows.rows

        def told(start: int, stop: int, make: Any = make, asked: list[int] = asked) -> torch.Tensor:
            asked.append(stop - start)
            return make(start, stop)

        rows.rows = told  # type: ignore[method-assign]
        go(rows) if go is windows.predict_targets else go(rows, keep=False)  # type: ignore[call-arg]
        assert asked == [5, 5, 5, 3]


def test_a_validation_searches_kernels_for_its_window_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases a little larger than a patch are one window of their own size each."""
    trainer = make_trainer(tmp_path)
    seen: list[tuple[tuple[int, ...], bool]] = []
    forward = trainer.average.forward

    def watched(batch: torch.Tensor) -> Any:
        seen.append((tuple(batch.shape[2:]), torch.backends.cudnn.benchmark))
        return forward(batch)

    trainer.average.forward = watched  # type: ignore[method-assign]
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    for shape in ((20, 18, 16), (40, 18, 16)):
        trainer.validator.predict(make_case(0, shape))
    assert len({size for size, _ in seen}) == 2
    assert all(searched == (size == trainer.roi) for size, searched in seen)


def test_no_value_of_a_windows_leaves_the_device_before_the_labels() -> None:
    """On `meta` there are no values: whatever asks for one fails. The labels alone are brought back, faked."""
    found = host_work(META, (64, 56, 40), roi=(32, 32, 32), num_rounds=1)
    assert found["windows"] == 8
    assert found["cpu_ns_a_voxel"] > 0


def test_a_budget_of_the_gpu_counts_what_lies_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = Predictor([make_job(tmp_path, "segresnet", 0)], device="cpu")
    cost = Cost(predictor=predictor)
    facts = Facts(shape=(256, 256, 256), spacing_mm=(1.2, 1.2, 1.6), num_channels=1, axis=2)
    cost.estimate(facts, Options(), 0)  # measures windows
    assert cost.rest_s > 0
    predictor.device = META
    there, here = (cost.estimate(facts, Options(on_device=on), 0) for on in (None, False))
    moved = there.device_bytes - here.device_bytes
    assert moved == here.ram_bytes - there.ram_bytes > 0
    least = int(here.device_bytes / 0.9) + 1
    chosen = choose_options(cost, facts, Options(window_batch=1), Limits(device_bytes=least), 0)
    assert chosen.options.on_device is False
    assert chosen.given_up == ()
    assert rows_of(Counting(), torch.zeros(1, 16, 16, 16), on_device=False).device.type == "cpu"


def test_the_faster_layout_of_a_gpu_is_planned_and_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool | None] = []
    seconds: dict[bool | None, float | None] = {True: 0.3, False: 0.2, None: 0.9}

    def measured(plan: Any, device: Any, most_s: float, channels_last: bool | None) -> StepCost | None:
        asked.append(channels_last)
        step_s = seconds[channels_last]
        return None if step_s is None else StepCost(step_s=step_s, memory_gib=1.0, channels_last=channels_last)

    monkeypatch.setattr(measure, "_measured", measured)
    plan, gpu = tiny_plan("segresnet"), torch.device("cuda", 0)
    found = measure.measured_here(plan, gpu)
    assert found is not None
    assert (found.channels_last, found.step_s, asked) == (False, 0.2, [True, False])
    seconds[False] = None  # memory does not suffice for it
    assert measure.measured_here(plan, gpu) == StepCost(step_s=0.3, memory_gib=1.0, channels_last=True)
    asked.clear()
    measure.measured_here(plan, gpu, most_s=-1.0)
    assert asked == [True], "no time for both"
    assert measure.measured_here(plan, torch.device("cpu")) == StepCost(step_s=0.9, memory_gib=1.0)
    planned = plan_and_origins("segresnet", hardware=GPU, fit=Fit(step_s=0.2, channels_last=False))[0]
    assert planned.channels_last is False
    assert planned.identity() == plan_and_origins("segresnet", hardware=GPU, fit=Fit(step_s=0.2))[0].identity()
    for device, wanted, layout in (
        (META, False, torch.contiguous_format),
        (META, True, torch.channels_last_3d),
        (torch.device("cpu"), False, torch.channels_last_3d),
    ):
        network = to_device(build_network(plan), device, "fp32", trained=True, channels_last=wanted)
        assert layout_of(network) == layout


def test_a_gpus_step_is_measured_by_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which ends before jobs train: neither its context nor its network stays on the GPU. Its search for kernels, in
    the first step, is not in the peak that it tells."""
    monkeypatch.setattr(measure, "measured_here", lambda *given: pytest.fail("measured here"))
    told: list[dict[str, Any]] = []

    def run(words: list[str], input: str, **how: Any) -> SimpleNamespace:
        assert words == [sys.executable, "-m", "autoseg.training.measure"]
        told.append(json.loads(input))
        return SimpleNamespace(
            returncode=0,
            stdout='a line\n{"cost": {"step_s": 0.2, "memory_gib": 3.0, "channels_last": false}, "took_s": 1e9}\n',
        )

    monkeypatch.setattr(measure.subprocess, "run", run)
    plan = tiny_plan("segresnet")
    found = measure.measure_step(plan, torch.device("cuda", 1), 5.0)
    assert found == StepCost(step_s=0.2, memory_gib=3.0, channels_last=False)
    assert told[0]["device"] == "cuda:1"
    assert told[0]["most_s"] == 5.0
