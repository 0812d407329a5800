"""A training step: its optimizer, a bare one on noise, and what it takes."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from monai.optimizers.novograd import Novograd
from torch import nn

from autoseg.hardware.device import autocast, resolve_precision, to_device
from autoseg.hardware.memory import MemoryWatch
from autoseg.networks import build_network
from autoseg.plan import Plan
from autoseg.training.losses import supervised_loss
from autoseg.training.muon import Muon

TIMED_STEPS = 2
"""Steps that are timed after one that allocates and chooses kernels; the faster counts."""

MOST_TIMED_S = 5.0
"""A step that takes longer than this is timed once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """What one training step takes."""

    step_s: float
    """Seconds: forward, loss, backward, optimizer; patches at hand."""
    memory_gib: float
    """Peak: of the GPU as torch reserved it, or of this process on a CPU."""


def bare_step(plan: Plan, device: torch.device) -> Callable[[], None]:
    """A training step of a plan on one fixed batch of noise: no data work, no averaging, no waiting.

    Returns:
        A function that does one step; a GPU may still be about it afterwards, see `finish`.
    """
    torch.manual_seed(plan.seed)
    network = to_device(build_network(plan).train(), device, plan.precision, trained=True)
    optimizer = make_optimizer(network, plan)
    scaler = torch.amp.GradScaler(device.type, enabled=resolve_precision(device, plan.precision) == "fp16")
    image = torch.randn(plan.batch_size, len(plan.channels), *plan.roi_size, device=device)
    image = image.to(memory_format=torch.channels_last_3d)
    outputs = len(plan.classes) if plan.sigmoid else 1
    highest = 2 if plan.sigmoid else plan.num_outputs
    target = torch.randint(0, highest, (plan.batch_size, outputs, *plan.roi_size), device=device, dtype=torch.uint8)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, plan.precision):
            found = network(image)
        loss = supervised_loss(found, target, sigmoid=plan.sigmoid, loss=plan.loss)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(network.parameters(), plan.grad_clip)
        scaler.step(optimizer)
        scaler.update()

    return step


def finish(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_step(plan: Plan, device: torch.device) -> StepCost | None:
    """Time a step and take the peak of memory; None where memory does not suffice."""
    times: list[float] = []
    try:
        with MemoryWatch(device) as memory:
            step = bare_step(plan, device)
            step()
            finish(device)
            while len(times) < TIMED_STEPS and sum(times) < MOST_TIMED_S:
                begin = time.perf_counter()
                step()
                finish(device)
                times.append(time.perf_counter() - begin)
        return StepCost(step_s=min(times), memory_gib=memory.peak_gib)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "bad allocation", "std::bad_alloc")
"""What torch says in a RuntimeError when memory ran out on a CPU or in a library."""


def make_optimizer(network: nn.Module, plan: Plan) -> torch.optim.Optimizer:
    """The plan's optimizer. Source: sgd as nnU-Net's, with Nesterov momentum 0.99; Novograd is MONAI's."""
    weights, rate, decay = network.parameters(), plan.learning_rate, plan.weight_decay
    if plan.optimizer == "muon":
        return Muon(network, lr=rate, weight_decay=decay)
    if plan.optimizer == "sgd":
        return torch.optim.SGD(weights, lr=rate, momentum=0.99, nesterov=True, weight_decay=decay, foreach=True)
    if plan.optimizer == "novograd":
        optimizer: torch.optim.Optimizer = Novograd(weights, lr=rate, weight_decay=decay)
        return optimizer
    kind = torch.optim.AdamW if plan.optimizer == "adamw" else torch.optim.Adam
    return kind(weights, lr=rate, weight_decay=decay, foreach=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in NO_MEMORY)
