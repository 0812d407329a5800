"""A prediction for which memory does not suffice: once more with less on a GPU, else the image is named and left."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_inference import Counting
from tiny_jobs import make_job

from autoseg.data.grid import Grid, Volume
from autoseg.data.volumes import write_volume
from autoseg.ensemble.predict import predict_files
from autoseg.errors import ResourceError
from autoseg.hardware.memory import is_out_of_memory
from autoseg.inference import shortage
from autoseg.inference.clock import Clock
from autoseg.inference.options import Options
from autoseg.inference.predictor import Predictor
from autoseg.inference.shortage import within_memory
from autoseg.inference.windows import ProbRows, WindowModel

SHORT = "CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines"


class OnGpu:
    """What a predictor has, on a device that is faked."""

    def __init__(self, device: str = "meta") -> None:
        self.device, self.options, self.clock = torch.device(device), Options(overlap=0.25), Clock()


class Held:
    """What a pass that fails holds of the device."""


def test_on_a_gpu_once_more_with_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Options] = []
    held: list[weakref.ref[Held]] = []
    given_back: list[bool] = []
    gpu, cpu = OnGpu(), OnGpu("cpu")

    def work() -> str:
        seen.append(gpu.options)
        gpu.clock.expect(100)
        if len(seen) == 1:
            tensors = Held()
            held.append(weakref.ref(tensors))
            gpu.clock.passed(10)
            raise torch.OutOfMemoryError(SHORT)
        return "labels"

    # Before the second time, and nothing is held by the error any more.
    monkeypatch.setattr(shortage, "give_back", lambda: given_back.append(held[0]() is None and len(seen) == 1))
    assert within_memory((each for each in (gpu, cpu)), "case", work) == "labels"
    assert given_back == [True]
    assert (seen[1].on_device, seen[1].window_batch, seen[1].overlap) == (False, 1, 0.25)
    assert gpu.options == cpu.options == Options(overlap=0.25)
    assert (gpu.clock.expected_voxels, gpu.clock.passed_voxels) == (100, 0), "the bar begins anew"


@pytest.mark.parametrize(("device", "times", "words"), [("meta", 2, "--device cpu"), ("cpu", 1, "--max_ram")])
def test_where_that_does_not_help_it_is_said_of_which_image(device: str, times: int, words: str) -> None:
    tried: list[int] = []

    def work() -> None:
        tried.append(1)
        raise torch.OutOfMemoryError(SHORT)

    predictor = OnGpu(device)
    with pytest.raises(ResourceError) as found:
        within_memory([predictor], Path("scans/case.nii.gz"), work)
    assert len(tried) == times
    assert str(found.value).startswith(f"{Path('scans/case.nii.gz')}: ")
    assert words in str(found.value)
    assert "2.00 GiB)" in str(found.value)
    assert found.value.__context__ is None, "the error that holds the pass is let go"
    assert predictor.options == Options(overlap=0.25)


def test_other_errors_are_none_of_memory() -> None:
    def work() -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        within_memory([OnGpu()], "case", work)


@pytest.mark.parametrize(
    "words",
    [
        "GET was unable to find an engine to execute this computation",
        "FIND was unable to find an engine to execute this computation after trying 3 plans.",
        "Unable to find a valid cuDNN algorithm to run convolution",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_what_cudnn_says_where_memory_ran_out(words: str) -> None:
    assert is_out_of_memory(RuntimeError(words))


def noise(shape: tuple[int, int, int] = (20, 18, 16)) -> Volume:
    array = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    return Volume(array=array, grid=Grid(shape=shape, affine=np.diag([1.2, 1.2, 1.6, 1.0])))


def test_a_predictor_on_a_gpu_tries_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = Predictor([make_job(tmp_path, "segresnet", 0)], device="cpu")
    wanted = predictor.predict_labels(noise())
    whole = predictor._whole

    def limited(*given: Any) -> np.ndarray:
        if predictor.options.on_device is not False:
            raise torch.OutOfMemoryError(SHORT)
        predictor.device = torch.device("cpu")  # of which there is enough
        return whole(*given)

    monkeypatch.setattr(predictor, "_whole", limited)
    predictor.device = torch.device("meta")
    assert np.array_equal(predictor.predict_labels(noise()), wanted)
    assert predictor.options == Options()


def test_an_image_that_memory_does_not_suffice_for_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The others are segmented all the same."""
    make_job(tmp_path / "work", "segresnet", 0)
    for name, edge in (("a", 40), ("b", 20)):
        volume = noise((edge, 18, 16))
        write_volume(tmp_path / "scans" / f"{name}.nii.gz", volume.array[0], volume.grid)
    whole = Predictor._whole

    def limited(self: Predictor, image: Any, *more: Any) -> np.ndarray:
        if image.shape[0] == 40:
            raise MemoryError
        return whole(self, image, *more)

    monkeypatch.setattr(Predictor, "_whole", limited)
    out = tmp_path / "out"
    assert predict_files(tmp_path / "work", tmp_path / "scans", out, algo="segresnet", fold=0, device="cpu") == 2
    assert sorted(path.name for path in out.glob("*.nii.gz")) == ["b.nii.gz"]
    assert "a.nii.gz: memory did not suffice" in caplog.text


def test_rows_that_have_all_passed_hold_nothing_of_a_gpu() -> None:
    """Without Python's search for what holds on to itself, which comes late and knows nothing of a GPU's memory."""

    def passed() -> weakref.ref[ProbRows]:
        def fetch(start: int, stop: int) -> torch.Tensor:
            return torch.zeros((1, stop - start, 20, 20), device=rows.device)  # as a predictor's

        model = WindowModel([Counting()], num_outputs=3, sigmoid=False, device=torch.device("cpu"), precision="fp32")
        rows = ProbRows(model, fetch, (40, 20, 20), 0, roi_size=(16, 16, 16), overlap=0.5, background=(0.0,))
        for start in range(0, 40, 8):
            rows.rows(start, start + 8)
        return weakref.ref(rows)

    gc.disable()
    try:
        assert passed()() is None
    finally:
        gc.enable()
