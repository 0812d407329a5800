"""Each network on a GPU does what it does on a CPU: forward, backward and a prediction, in each arithmetic.

`make test-gpu` runs these where a GPU is. Two networks go the same way on the CPU, so that the checks themselves are
tested everywhere.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plans import tiny_plan

from autoseg.config.networks import ALGOS, AlgoName
from autoseg.data.grid import Grid, Volume
from autoseg.data.phantoms import ellipsoid
from autoseg.hardware.device import Precision, autocast, to_device
from autoseg.inference.options import Options
from autoseg.inference.predictor import Predictor
from autoseg.networks import build_network
from autoseg.training.checkpoint import save_weights
from autoseg.workspace.files import write_yaml
from autoseg.workspace.jobs import JobDir

CPU = torch.device("cpu")
CASES = [(algo, "cpu") for algo in ("segresnet", "unet")]
CASES += [pytest.param(algo, "cuda", marks=pytest.mark.gpu) for algo in ALGOS]  # type: ignore[misc]
TOLERANCE: dict[Precision, float] = {"fp32": 0.01, "fp16": 0.03, "bf16": 0.1}
"""Of the norm of outputs and gradients; fp32 on a GPU multiplies in TF32, of 10 bits."""


def outputs_and_gradients(network: torch.nn.Module, image: torch.Tensor, precision: Precision) -> list[torch.Tensor]:
    """What a step has of a network: its outputs, and the gradients of their mean square, all in one vector each."""
    torch.manual_seed(1)  # of dropout
    with autocast(image.device, precision):
        outputs = network(image)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    loss: Any = sum((output.float() ** 2).mean() for output in outputs)
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    return [outputs[0].detach().float().flatten().cpu(), gradients.float().cpu()]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("algo", "device"), CASES)
def test_a_step_equals_the_plain_one(algo: AlgoName, device: str, precision: Precision) -> None:
    plan = tiny_plan(algo)
    torch.manual_seed(0)
    plain = build_network(plan).train()
    where = torch.device(device)
    fast = to_device(copy.deepcopy(plain), where, precision, trained=True)
    image = torch.randn(2, len(plan.channels), *plan.roi_size)
    truth = outputs_and_gradients(plain, image, "fp32")
    found = outputs_and_gradients(fast, image.to(where), precision)
    for mine, theirs in zip(found, truth, strict=True):
        assert torch.isfinite(mine).all()
        assert float((mine - theirs).norm() / theirs.norm()) < TOLERANCE[precision]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("algo", "device"), CASES)
def test_a_prediction_equals_the_cpus(algo: AlgoName, device: str, precision: Precision, tmp_path: Path) -> None:
    plan = tiny_plan(algo, overlap=0.25)
    paths = JobDir(tmp_path / f"{algo}_0")
    write_yaml(paths.plan, plan.model_dump(mode="json"))
    torch.manual_seed(0)
    save_weights(build_network(plan), paths)
    shape = (40, 36, 34)
    array = np.random.default_rng(0).normal(size=shape) + 2.0 * ellipsoid(shape, [20, 18, 17], [9, 8, 7])
    image = Volume(array=array[None].astype(np.float32), grid=Grid(shape=shape, affine=np.eye(4)))
    labels = [
        Predictor([paths], device=name, options=Options(precision=chosen)).predict_labels(image)
        for name, chosen in (("cpu", "fp32"), (device, precision))
    ]
    assert len(np.unique(labels[0])) > 1
    assert (labels[0] == labels[1]).mean() > 1 - TOLERANCE[precision]
