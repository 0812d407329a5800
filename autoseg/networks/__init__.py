"""The networks: one small file each, one row each in the table.

A network file has `build(in_channels, out_channels, network)` for the module, `divisor(network)` for what window
edges must be multiples of, `choose(sizing)` for the planner's choice of its own settings, `RUNGS` for the sizes that it
chooses among on a CPU by time, and `heads(module)` for the layers that make outputs of features, the one that makes the
result first.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from torch import nn

from autoseg.config.settings import AlgoName

if TYPE_CHECKING:
    from autoseg.plan import Plan

_MODULES: dict[AlgoName, str] = {
    "segresnet": "autoseg.networks.segresnet",
    "swinunetr": "autoseg.networks.swinunetr",
    "dints": "autoseg.networks.dints",
    "unet": "autoseg.networks.unet",
    "locator": "autoseg.networks.locator",
}


def network_module(algo: AlgoName) -> ModuleType:
    """The file of one algorithm's network."""
    return importlib.import_module(_MODULES[algo])


def build_network(plan: Plan) -> nn.Module:
    """A fresh network as the plan describes it; in training mode it may return a list, finest output first."""
    module: nn.Module = network_module(plan.algo).build(len(plan.channels), plan.num_outputs, plan.network)
    return module


def divisor(plan: Plan) -> tuple[int, int, int]:
    """What the edges of a window must be multiples of."""
    found: tuple[int, int, int] = network_module(plan.algo).divisor(plan.network)
    return found


def heads(algo: AlgoName, network: nn.Module) -> tuple[nn.Module, ...]:
    """The layers of a network that make outputs of features, the one that makes its result first."""
    found: tuple[nn.Module, ...] = network_module(algo).heads(network)
    return found
