"""Muon: steps whose every direction has the same length, for the weights that are matrices; AdamW for the others.

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon, with its coefficients; the factor that gives a
step the size of one of AdamW: Liu et al. 2025, Muon is Scalable for LLM Training. `torch.optim.Muon` takes weights of
two axes alone and computes in bfloat16, which most CPUs only emulate.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.optim.adamw import adamw

COEFFICIENTS, ROUNDS = (3.4445, -4.7750, 2.0315), 5
"""Of the Newton-Schulz iteration, and how often it is done (Jordan et al.)."""
SIZE = 0.2
"""Root mean square of a step over the learning rate. Source: Liu et al., as AdamW's."""


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Bring all singular values of a matrix near 1, between about 0.7 and 1.2; its singular vectors stay.

    Args:
        matrix: (rows, columns) float32.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    wide = (matrix.T if tall else matrix) / matrix.norm().clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    if matrix.device.type == "cpu":
        # On the small square of products, which takes a quarter of the time; in float32 alone: it wants the digits.
        gram = wide @ wide.T
        unit = torch.eye(len(gram))
        turn = unit
        for _ in range(ROUNDS):
            step = a * unit + b * gram + c * gram @ gram
            turn, gram = step @ turn, step @ gram @ step
        wide = turn @ wide
    else:
        wide = wide.bfloat16()
        for _ in range(ROUNDS):
            gram = wide @ wide.T
            wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return (wide.T if tall else wide).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """The weights of convolutions and linear layers by Muon, seen as (first axis, all else); the others by AdamW."""

    def __init__(
        self,
        network: nn.Module,
        parts: Iterable[dict[str, Any]] | None = None,
        *,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
    ) -> None:
        """Sort a network's parameters.

        Args:
            parts: groups of them, as any optimizer of torch takes them, each of which is sorted by itself; None: all
                are one.
            momentum: of the matrices, Nesterov's. Source: Jordan et al.
        """
        layers = (m for m in network.modules() if isinstance(m, (nn.Linear, _ConvNd)))
        matrices = dict.fromkeys(m.weight for m in layers)
        groups: list[dict[str, Any]] = []
        for part in parts or [{"params": network.parameters()}]:
            own = {id(p): p for p in part["params"]}
            turned = [weight for weight in matrices if id(weight) in own]
            known = {id(weight) for weight in turned}
            others = [parameter for key, parameter in own.items() if key not in known]
            groups += [{**part, "params": turned, "by": "muon"}, {**part, "params": others, "by": "adamw"}]
        super().__init__(
            [group for group in groups if group["params"]],
            {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": (0.9, 0.999), "eps": 1e-8},
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Change the parameters that have gradients."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["by"] == "muon":
                self._turn(params, group)
            else:
                self._adapt(params, group)

    def _turn(self, weights: Iterable[nn.Parameter], group: dict[str, Any]) -> None:
        for weight in weights:
            assert weight.grad is not None
            state = self.state[weight]
            if not state:
                state["mean"] = torch.zeros_like(weight)
            mean = state["mean"]
            mean.lerp_(weight.grad, 1 - group["momentum"])
            matrix = weight.grad.lerp(mean, group["momentum"]).flatten(1).float()
            size = SIZE * max(matrix.shape) ** 0.5
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(orthogonal(matrix).view(weight.shape), alpha=-group["lr"] * size)

    def _adapt(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros(()),
                    "mean": torch.zeros_like(parameter),
                    "square": torch.zeros_like(parameter),
                }
        states = [self.state[p] for p in parameters]
        adamw(
            list[torch.Tensor](parameters),
            [p.grad for p in parameters if p.grad is not None],
            [s["mean"] for s in states],
            [s["square"] for s in states],
            [],
            [s["step"] for s in states],
            foreach=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
