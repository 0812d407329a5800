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
from test_inference import Counting
from test_trainer import CASES
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from autoseg.config.networks import ALGOS, AlgoName
from autoseg.data.windowing import mirrored_mean
from autoseg.inference import windows
from autoseg.inference.traits import TraitsWatch
from autoseg.training import trainer as training
from autoseg.training import turning
from autoseg.training.augment import swap_sides
from autoseg.training.processes import Processes
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


META = torch.device("meta")
"""Tensors without values: what asks for one fails, as what mixes it with the CPU's does."""
SIDES = {"kidney_left": (1,), "kidney_right": (2,)}


class Copies(TorchDispatchMode):
    """Lists copies to the faked device: those that a GPU ends its work for, and, by their number, all."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[str] = []
        self.num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.name()
        if name == "aten::_to_copy" and kwargs.get("device") == META and args[0].device != META:
            self._note(name, bool(kwargs.get("non_blocking")))
        elif name == "aten::copy_" and args[0].device == META and args[1].device != META:
            self._note(name, bool(args[2:] and args[2]))
        elif "aten::index" in name and any(i is not None and i.device != args[0].device for i in _indices(args)):
            self._note(f"{name} by indices of the CPU", False)
        return func(*args, **kwargs)

    def _note(self, name: str, goes_on: bool) -> None:
        self.num += 1
        if not goes_on:
            self.waited.append(name)


class Brackets(TorchFunctionMode):
    """Adds copies that no dispatcher tells from others: of numbers and lists into new tensors, and into brackets.

    Not by other methods of `torch.Tensor`: a class that ever had brackets of its own counts as a sequence afterwards,
    and `torch.as_tensor` then asks single numbers for their length.
    """

    def __init__(self, waited: list[str]) -> None:
        super().__init__()
        self.waited = waited

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu") == META:
            self.waited.append("torch.tensor on the device")
        elif func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and args[0].device == META:
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, list) for part in parts):
                self.waited.append("a list in the brackets")
            if len(args) == 3 and not isinstance(args[2], torch.Tensor) and args[0][args[1]].ndim == 0:
                self.waited.append("a number for one element")  # copied, where it would be filled in elsewhere
        return func(*args, **kwargs)


@contextmanager
def copies() -> Iterator[Copies]:
    """What a GPU is waited for in a block beside values that are asked for: copies, also those that brackets hide."""
    found = Copies()
    with found, Brackets(found.waited):
        yield found


@pytest.mark.parametrize("algo", ALGOS)
def test_no_network_is_waited_for(tmp_path: Path, algo: AlgoName) -> None:
    """A step of each, mirrored, with sides that change places, where nothing of the device can be read."""
    plan = tiny_plan(algo, augment="light", mirror_axes=(0,), batch_size=2, classes=SIDES)
    trainer = Trainer(plan, CASES[:4], CASES[4:], JobDir(tmp_path / f"{algo}_0"), device=META)
    assert plan.mirrored_classes
    trainer.progress.step = next(s for s in range(1, 100) if any(0 in d.flips for d in trainer.batches.cut(s).draws))
    with copies() as found:
        trainer.train_step(0.3)
    assert found.waited == []
    assert found.num > 0


@pytest.mark.parametrize("sigmoid", [False, True])
def test_sides_change_places_without_a_wait(sigmoid: bool) -> None:
    target = torch.zeros((2, 3 if sigmoid else 1, 4, 4, 4), dtype=torch.uint8, device=META)
    logits = torch.zeros((1, 3, 4, 4, 4), device=META)
    with copies() as found:
        swap_sides(target, [(0, 1)], sigmoid=sigmoid)
        mirrored_mean(lambda batch: batch.clone(), logits, [0, 1], [(0, 1)])
    assert found.waited == []


@pytest.mark.parametrize(("sigmoid", "overlap"), [(False, 0.5), (True, 0.5), (False, 0.0)])
def test_windows_are_counted_and_weighted_where_they_are(
    monkeypatch: pytest.MonkeyPatch, sigmoid: bool, overlap: float
) -> None:
    """Weights go there once, however many windows there are."""
    monkeypatch.setattr(windows, "free_bytes", lambda device: 1 << 40)
    numbers = set[tuple[int, int]]()
    for edge in (40, 80):
        watch = TraitsWatch(1, 3, independent=sigmoid, sees_image=False)
        model = windows.WindowModel(
            [Counting().to(META)], num_outputs=3, sigmoid=sigmoid, device=META, precision="fp32",
            mirror_axes=(0,), mirrored_pairs=((1, 2),),
        )  # fmt: skip
        rows = windows.ProbRows(
            model, lambda start, stop, edge=edge: torch.zeros((1, stop - start, edge, edge), device=META),
            (40, edge, edge), 0, roi_size=(16, 16, 16), overlap=overlap, watch=watch,
        )  # fmt: skip
        rows.rows(0, 8)
        with copies() as found:
            for start in range(8, 40, 8):
                rows.rows(start, start + 8)
        assert found.waited == []
        numbers.add((found.num, rows.num_windows))
    assert len({windows for _, windows in numbers}) == 2
    assert all(num <= 5 for num, _ in numbers), "none but the places of sides, for each row of windows"


def test_copies_that_a_gpu_waits_for_are_found() -> None:
    """The tests above can fail."""
    there = torch.zeros(4, 4, device=META)
    with copies() as found:
        torch.tensor(0.0, device=META)
        there[[0, 1]]
        there[0, 0] = 1.0
        there[torch.tensor([0, 1])]
        torch.zeros(4).to(META)
        there.copy_(torch.zeros(4, 4))
        assert len(found.waited) == found.num + 3 == 6
        torch.zeros(4).to(META, non_blocking=True)
        there[0] = 1.0
        assert len(found.waited) == 6


def test_what_processes_agree_on_stays_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And their loss is looked at as seldom as that of one."""
    asked: list[str] = []

    def agree(tensor: torch.Tensor, *how: Any) -> None:
        asked.append(tensor.device.type)

    monkeypatch.setattr(torch.distributed, "broadcast", agree)
    monkeypatch.setattr(torch.distributed, "all_reduce", agree)
    several = Processes(rank=0, world=2, device=META)
    assert several.from_first(0.5, 1.0) == (0.5, 1.0)
    assert several.any(True)
    assert asked == ["cpu", "cpu"]
    assert several.add_up(torch.zeros(2, device=META)).device == META
    asked.clear()
    trainer = make(tmp_path, torch.device("cpu"))
    trainer.processes, trainer.device = several, torch.device("cuda")
    looked: list[int] = []
    monkeypatch.setattr(trainer, "_check_loss", lambda: looked.append(trainer.progress.step))
    trainer.progress.step = training.LOSS_CHECK_STEPS - 2
    for _ in range(3):
        trainer.train_step(0.3)
    assert looked == [training.LOSS_CHECK_STEPS]
    trainer.save()  # its checkpoint holds no loss that was not looked at
    assert looked == [training.LOSS_CHECK_STEPS, training.LOSS_CHECK_STEPS + 1]


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
