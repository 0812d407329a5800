"""Networks compute the same on a device's fastest kernels as on torch's plain ones."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Literal

import pytest
import torch
from plans import tiny_plan
from tiny_jobs import make_job
from torch import nn

from autoseg.config.networks import ALGOS, AlgoName
from autoseg.data.datalists.datalist import read_datalist
from autoseg.hardware import device
from autoseg.hardware.device import to_device
from autoseg.hardware.kernels import InstanceNormalise
from autoseg.inference.predictor import load_model
from autoseg.networks import build_network
from autoseg.plan import read_plan
from autoseg.training import scoring

CPU = torch.device("cpu")


@pytest.mark.parametrize("algo", ALGOS)
def test_outputs_and_gradients_stay_the_same(algo: AlgoName) -> None:
    """In float64, so that nothing but the order of sums differs."""
    plan = tiny_plan(algo)
    torch.manual_seed(0)
    plain = build_network(plan).double().train()
    fast = to_device(copy.deepcopy(plain), CPU, "fp32", trained=True)
    image = torch.randn(2, len(plan.channels), *plan.roi_size, dtype=torch.float64)
    found = []
    for network in (plain, fast):
        torch.manual_seed(1)
        outputs = network(image)
        outputs = outputs if isinstance(outputs, list) else [outputs]
        sum((output**2).mean() for output in outputs).backward()
        found.append([*outputs, *(p.grad for p in network.parameters() if p.grad is not None)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("algo", ALGOS)
def test_inference_stays_the_same(algo: AlgoName) -> None:
    plan = tiny_plan(algo)
    torch.manual_seed(0)
    plain = build_network(plan).eval().requires_grad_(False)
    image = torch.randn(1, len(plan.channels), *plan.roi_size)
    fast = to_device(copy.deepcopy(plain), CPU, "fp32", trained=False)
    torch.testing.assert_close(fast(image), plain(image), rtol=1e-3, atol=1e-4)


THIN = [(2, 5, 6), (2, 2, 2), (3, 4, 4), (1, 2, 2), (4, 1, 3)]
"""Images that oneDNN's bf16 kernels compute wrongly, or that lie next to such ones."""


@pytest.mark.parametrize("size", [*THIN, (4, 4, 4), (6, 5, 7)])
def test_gradients_of_thin_images_are_right_in_bf16(size: tuple[int, int, int]) -> None:
    """Memory that was used before lies about, so that a kernel that leaves some of it in its result is found out."""
    torch.manual_seed(0)
    plain = nn.Conv3d(8, 12, 3, padding=1)
    fast = to_device(copy.deepcopy(plain), CPU, "bf16", trained=True)
    image = torch.randn(2, 8, *size)
    for _ in range(4):
        plain.zero_grad()
        fast.zero_grad()
        used = [torch.full((2**n,), 1e30) for n in range(8, 20, 2)]
        del used
        plain(image).square().sum().backward()
        with torch.autocast("cpu", torch.bfloat16):
            found = fast(image)
        assert found.dtype == (torch.float32 if size in THIN else torch.bfloat16)
        found.float().square().sum().backward()
        for mine, truth in zip(fast.parameters(), plain.parameters(), strict=True):
            assert mine.grad is not None
            assert truth.grad is not None
            assert float((mine.grad - truth.grad).norm() / truth.grad.norm()) < 0.05


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("algo", ALGOS)
def test_a_step_in_bf16_goes_where_one_in_fp32_goes(algo: AlgoName, batch: int) -> None:
    plan = tiny_plan(algo)
    torch.manual_seed(0)
    plain = build_network(plan).train()
    image = torch.randn(batch, len(plan.channels), *plan.roi_size)
    found = []
    for precision in ("fp32", "bf16"):
        network = to_device(copy.deepcopy(plain), CPU, precision, trained=True)
        torch.manual_seed(1)
        with device.autocast(CPU, precision):
            outputs = network(image)
        outputs = outputs if isinstance(outputs, list) else [outputs]
        sum((output.float() ** 2).mean() for output in outputs).backward()
        found.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    assert torch.cosine_similarity(found[0], found[1], dim=0) > 0.99


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("channels", [4, 16, 24])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("groups", [False, True])
def test_no_layout_is_changed_on_the_way(
    groups: bool, batch: int, channels: int, precision: Literal["fp32", "bf16"]
) -> None:
    """A layer that hands on another layout makes the next one copy all it gets."""
    plain = nn.GroupNorm(channels, channels) if groups else nn.InstanceNorm3d(channels)
    layer = to_device(plain, CPU, precision, trained=True)
    image = torch.randn(batch, channels, 6, 5, 7).to(getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[precision]))
    image = image.to(memory_format=torch.channels_last_3d).requires_grad_()
    normal = layer(image)
    assert normal.dtype == image.dtype
    assert normal.is_contiguous(memory_format=torch.channels_last_3d)
    (normal**3).sum().backward()
    assert image.grad is not None
    assert image.grad.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_instance_normalisation_in_float64(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    image = torch.randn(2, 3, 4, 3, 2, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    weight, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for more in ((None, None), (weight, bias)):
        theirs = nn.functional.instance_norm(image, weight=more[0], bias=more[1])
        torch.testing.assert_close(InstanceNormalise.apply(image, *more, 1e-5), theirs)
        assert torch.autograd.gradcheck(lambda *x: InstanceNormalise.apply(*x, 1e-5), (image, *more))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("channels", [3, 16, 24])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("affine", [True, False])
def test_instance_normalisation_in_bf16(affine: bool, batch: int, channels: int, layout: torch.memory_format) -> None:
    """As exact as bf16 is, forward and backward, wherever the mean lies and however the gradient does."""
    torch.manual_seed(0)
    image = (4 + torch.randn(batch, channels, 6, 7, 9)).bfloat16()
    change = torch.randn(image.shape).bfloat16()
    weights = [torch.randn(channels) for _ in range(2)] if affine else []
    found = []
    for kind, weight_kind in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        given = [image.to(kind), *(w.to(weight_kind) for w in weights)]
        for one in given:
            one.requires_grad_()
        weight, bias = given[1:] or (None, None)
        if kind == torch.float64:  # a gradient that lies channels-last is what PyTorch's own gets wrong
            normal, lies = nn.functional.instance_norm(given[0], weight=weight, bias=bias), torch.contiguous_format
        else:
            normal, lies = InstanceNormalise.apply(given[0], weight, bias, 1e-5), layout
        assert normal.dtype == kind
        gradients = torch.autograd.grad(normal, given, change.to(kind).contiguous(memory_format=lies))
        found.append((normal.detach(), *gradients))
    for mine, truth in zip(found[1], found[0], strict=True):
        assert float((mine.double() - truth).norm() / truth.norm()) < 0.004


def test_half_precision_is_used_where_it_costs_no_dice(
    tmp_path: Path, phantom_dataset: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: True)  # emulated where it has not
    cases = read_datalist(phantom_dataset / "datalist.json", phantom_dataset).training[:1]
    paths = make_job(tmp_path, "segresnet", 0, precision="auto")
    plan = read_plan(paths)
    found = {}
    for most in (1.1, 0.0):
        monkeypatch.setattr(scoring, "MOST_LOST_DICE", most)
        compared = scoring.compare_precision(plan, paths, cases[0], CPU)
        scoring.score_validation(plan, paths, cases, CPU, compared)
        told = json.loads(paths.validation.read_text())["half_precision"]
        assert 0.5 < told["equal_labels"] <= 1.0
        assert abs(told["dice_change"]) < 0.5
        assert told["is_equal"] == (most == 1.1)
        found[most] = load_model(paths, CPU).plan.precision
    assert found == {1.1: "auto", 0.0: "fp32"}
    assert "predicting in fp32" in caplog.text
