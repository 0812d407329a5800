"""A training step asks the device for nothing that it would have to be waited for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from plans import tiny_plan
from test_trainer import CASES
from torch.utils._python_dispatch import TorchDispatchMode

from autoseg.training import trainer as training
from autoseg.training import turning
from autoseg.training.trainer import Trainer
from autoseg.workspace.jobs import JobDir

WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select", "aten::equal"}
"""Operations whose result, or its size, is values on the device: what item, float, bool and masks come down to."""


class Waits(TorchDispatchMode):
    """Lists what would have to be waited for, were all tensors on a GPU; counters that the optimizer keeps are not."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self.found: list[str] = []
        self._optimizer = optimizer

    def _is_counter(self, tensor: torch.Tensor) -> bool:
        return any(tensor is state.get("step") for state in self._optimizer.state.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if func.name() in WAITING and not any(map(self._is_counter, given)):
            self.found.append(func.name())
        if "aten::index" in func.name() and any(t is not None and t.dtype == torch.bool for t in _indices(args)):
            self.found.append(f"{func.name()} by a mask")
        return func(*args, **(kwargs or {}))


def _indices(args: Any) -> list[torch.Tensor | None]:
    return next(
        (arg for arg in args if isinstance(arg, (list, tuple)) and any(isinstance(a, torch.Tensor) for a in arg)), []
    )


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, trainer: Trainer) -> Iterator[list[str]]:
    """What is waited for in a block."""
    waits = Waits(trainer.step.optimizer)
    for name in ("cpu", "tolist", "numpy"):
        kept = getattr(torch.Tensor, name)

        def told(tensor: torch.Tensor, *given: Any, kept: Any = kept, name: str = name, **more: Any) -> Any:
            waits.found.append(name)
            return kept(tensor, *given, **more)

        monkeypatch.setattr(torch.Tensor, name, told)
    with waits:
        yield waits.found


def make(folder: Path, device: torch.device, **settings: Any) -> Trainer:
    """Two samples a step, half of them turned, all kinds of changes; one case is annotated for one class alone."""
    plan = tiny_plan(**{"augment": "default", "batch_size": 4, **settings})
    return Trainer(plan, CASES[:4], CASES[4:], JobDir(folder / "segresnet_0"), device=device)


@pytest.mark.parametrize(("optimizer", "loss"), [("adamw", "dice_focal"), ("muon", "dice_ce")])
def test_nothing_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, loss: str) -> None:
    """On a CPU, told to do as on a GPU."""
    cpu = torch.device("cpu")
    trainer = make(tmp_path, cpu, optimizer=optimizer, loss=loss)
    everywhere = partial(turning.largest_part, everywhere=True)
    monkeypatch.setattr(turning, "largest_part", everywhere)
    trainer.device = torch.device("cuda")  # the loss is looked at now and then alone
    seen = set[str]()
    for step in range(40):
        patches = trainer.batches.cut(step)  # by another thread, from arrays
        drawn = {name for draw in patches.draws for name, value in vars_of(draw).items() if value is not None}
        if drawn <= seen:
            continue
        seen |= drawn
        monkeypatch.setattr(trainer.batches, "cut", lambda number, patches=patches: patches)
        with monkeypatch.context() as here, counted(here, trainer) as found:
            trainer.train_step(0.3)
        assert found == []
        monkeypatch.undo()
        monkeypatch.setattr(turning, "largest_part", everywhere)
    assert {"matrix", "noise", "blur", "brightness", "contrast", "gamma", "low_resolution"} <= seen


def vars_of(draw: Any) -> dict[str, Any]:
    """The values of a draw, by name."""
    return {name: getattr(draw, name) for name in type(draw).__dataclass_fields__}


def test_what_is_waited_for_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail."""
    trainer = make(tmp_path, torch.device("cpu"))
    image = torch.arange(4.0)
    with monkeypatch.context() as here, counted(here, trainer) as found:
        float(image[0]), bool(image[1] > 0), image[image > 1], image.nonzero(), image.cpu(), image.tolist()
    assert {"aten::_local_scalar_dense", "aten::nonzero", "cpu", "tolist"} <= {*found}
    assert any("mask" in name for name in found)


def test_on_a_cpu_each_loss_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(tmp_path, torch.device("cpu"))
    looked: list[int] = []
    monkeypatch.setattr(trainer, "_check_loss", lambda: looked.append(trainer.progress.step))
    for _ in range(3):
        trainer.train_step(0.3)
    assert looked == [1, 2, 3]
    trainer.device, trainer.progress.step = torch.device("cuda"), training.LOSS_CHECK_STEPS - 2
    for _ in range(3):
        trainer.train_step(0.3)
    assert looked[3:] == [training.LOSS_CHECK_STEPS]


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_nothing_is_waited_for_on_a_gpu(tmp_path: Path, optimizer: str) -> None:
    trainer = make(tmp_path, torch.device("cuda", 0), optimizer=optimizer)
    for _ in range(3):  # allocates, chooses kernels
        trainer.train_step(0.3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):
            trainer.train_step(0.3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        trainer.batches.close()
