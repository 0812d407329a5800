"""A training step: forward, loss, backward, update; its optimizer; a bare one on noise."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from monai.optimizers.novograd import Novograd
from torch import nn

from autoseg.hardware.device import Precision, autocast, layout_of, resolve_precision, to_device
from autoseg.hardware.memory import is_out_of_memory
from autoseg.networks import build_network
from autoseg.plan import Plan
from autoseg.training.batches import Samples
from autoseg.training.losses import supervised_loss
from autoseg.training.muon import Muon

LOADED, NEW = "loaded", "new"
"""Groups of the optimizer's parameters: those that start with weights from elsewhere, and those that start random."""


def batch_loss(
    model: nn.Module,
    samples: Samples,
    plan: Plan,
    device: torch.device,
    *,
    precision: Precision | None = None,
    class_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of a network on some samples, with the graph to its weights.

    Args:
        precision: None: the plan's.
        class_weights: (K,) of each class in the loss; None: all alike.
    """
    with autocast(device, precision or plan.precision):
        outputs = model(samples.image)
    return supervised_loss(
        outputs,
        samples.target,
        sigmoid=plan.sigmoid,
        loss=plan.loss,
        unannotated=samples.unannotated,
        filled=samples.filled,
        class_weights=class_weights,
    )


Loss = Callable[[nn.Module, Samples], torch.Tensor]
"""Of a network on some samples, with the graph to its weights."""


def segmentation_loss(plan: Plan, device: torch.device) -> Loss:
    """The loss of segmenting, as the plan has it."""
    class_weights = torch.tensor(plan.each_class("class_weights"), device=device)
    return lambda model, samples: batch_loss(model, samples, plan, device, class_weights=class_weights)


class TrainingStep:
    """Forward, loss, backward and update: the trainer's on patches, and on noise where a step is measured."""

    def __init__(
        self, plan: Plan, network: nn.Module, device: torch.device, *, loss: Loss, loaded: Collection[str] = ()
    ) -> None:
        """Make the optimizer.

        Args:
            network: on the device; its weights are what is trained.
            loss: what its gradients are of.
            loaded: names of its weights that all come from elsewhere.
        """
        self.loss = loss
        self.plan, self.network, self.device = plan, network, device
        self.layout = layout_of(network)
        self.optimizer = make_optimizer(network, plan, loaded)
        half = resolve_precision(device, plan.precision) == "fp16"
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)

    def gradients(self, samples: Samples, micro_batch: int) -> torch.Tensor:
        """Compute the gradients of the samples' mean loss.

        Args:
            micro_batch: samples that are passed through at a time.

        Returns:
            The mean loss: a float64 scalar on the device, not waited for.
        """
        image = samples.image.to(memory_format=self.layout)
        samples = replace(samples, image=image)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for first in range(0, len(samples), micro_batch):
            part = samples.part(first, micro_batch)
            loss = self.loss(self.network, part)
            loss = loss * (len(part) / len(samples))
            self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    @property
    def has_new(self) -> bool:
        """Whether some weights start random."""
        return any(group.get("part") != LOADED for group in self.optimizer.param_groups)

    def update(self, rate: float, loaded_share: float = 1.0) -> None:
        """Change the weights by the gradients, whose norm is limited first.

        Args:
            rate: the learning rate.
            loaded_share: what that of loaded weights is of it.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate * (loaded_share if group.get("part") == LOADED else 1.0)
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.network.parameters(), self.plan.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def forget_gradients(self) -> None:
        """Give back the memory of gradients that were not finished."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def bare_step(plan: Plan, device: torch.device, channels_last: bool | None = None) -> Callable[[], None]:
    """A training step of a plan on one fixed batch of noise: no data work, no averaging, no waiting.

    Args:
        channels_last: as `to_device` takes it.

    Returns:
        A function that does one step; a GPU may still compute it afterwards, see `hardware.device.finish`.
    """
    torch.manual_seed(plan.seed)
    network = to_device(build_network(plan).train(), device, plan.precision, trained=True, channels_last=channels_last)
    step = TrainingStep(plan, network, device, loss=segmentation_loss(plan, device))
    num_classes = len(plan.classes)
    image = torch.randn(plan.batch_size, len(plan.channels), *plan.roi_size, device=device)
    outputs, highest = (num_classes, 2) if plan.sigmoid else (1, plan.num_outputs)
    target = torch.randint(0, highest, (plan.batch_size, outputs, *plan.roi_size), device=device, dtype=torch.uint8)
    samples = Samples(image=image, target=target)

    def do() -> None:
        step.gradients(samples, plan.batch_size)
        step.update(plan.learning_rate)

    return do


def make_optimizer(network: nn.Module, plan: Plan, loaded: Collection[str] = ()) -> torch.optim.Optimizer:
    """The plan's optimizer. Source: sgd as nnU-Net's, with Nesterov momentum 0.99; Novograd is MONAI's."""
    weights, rate, decay = _parts(network, loaded), plan.learning_rate, plan.weight_decay
    if plan.optimizer == "muon":
        return Muon(network, weights, lr=rate, weight_decay=decay)
    if plan.optimizer == "sgd":
        return torch.optim.SGD(weights, lr=rate, momentum=0.99, nesterov=True, weight_decay=decay, foreach=True)
    if plan.optimizer == "novograd":
        optimizer: torch.optim.Optimizer = Novograd(weights, lr=rate, weight_decay=decay)
        return optimizer
    kind = torch.optim.AdamW if plan.optimizer == "adamw" else torch.optim.Adam
    return kind(weights, lr=rate, weight_decay=decay, foreach=True)


def _parts(network: nn.Module, loaded: Collection[str]) -> list[dict[str, Any]]:
    """The parameters in groups, of which none is empty: those that were loaded, and new ones."""
    parts: dict[str, list[nn.Parameter]] = {LOADED: [], NEW: []}
    for name, parameter in network.named_parameters():
        parts[LOADED if name in loaded else NEW].append(parameter)
    return [{"params": parameters, "part": part} for part, parameters in parts.items() if parameters]


def lacks_memory(work: Callable[[], None]) -> bool:
    """Do some work; True where memory did not suffice for it.

    The error is let go before this returns, since its traceback holds the tensors of the step that failed: whoever goes
    on with less has their memory back.

    Raises:
        MemoryError, RuntimeError: Any other than a lack of memory.
    """
    try:
        work()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return True
    return False
