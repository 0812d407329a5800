"""The networks: one file each, with all that the planner and the trainer need to know of it.

The row of a network in `autoseg/config/networks.py` names its file; `NetworkFile` says what the file has.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol, cast

from torch import nn

from autoseg.config.networks import AlgoName
from autoseg.networks.sizing import LearningRates, NetworkChoice, Sizing

if TYPE_CHECKING:
    from autoseg.plan import Plan


class NetworkFile(Protocol):
    """What each file `autoseg/networks/NAME.py` has."""

    LEARNING_RATES: LearningRates
    SECONDS_PER_MEGAVOXEL: float
    """Seconds of a training step for a million voxels of the CPU-sized network, on two cores, where none was
    measured."""
    RUNGS: range
    """The sizes that `choose` knows on a CPU, smallest first; 0 is the usual one."""

    def build(self, in_channels: int, out_channels: int, network: dict[str, Any]) -> nn.Module:
        """A fresh module for images of (B, C, X, Y, Z); in training it may return a list, finest output first.

        Args:
            network: its own settings, as `choose` gave them or a user changed them.
        """

    def heads(self, module: nn.Module) -> tuple[nn.Module, ...]:
        """The layers that make outputs of features, the one that makes the result first; empty: not known."""

    def divisor(self, network: dict[str, Any]) -> tuple[int, int, int]:
        """What the edges of a window must be multiples of."""

    def choose(self, sizing: Sizing) -> NetworkChoice:
        """Its own settings, patch and batch for a data set and a device, each with its rule."""


def network_file(algo: AlgoName) -> NetworkFile:
    """The file of one algorithm's network."""
    return cast(NetworkFile, importlib.import_module(f"autoseg.networks.{algo}"))


def build_network(plan: Plan) -> nn.Module:
    """A fresh network as the plan describes it; in training mode it may return a list, finest output first."""
    return network_file(plan.algo).build(len(plan.channels), plan.num_outputs, plan.network)


def divisor(plan: Plan) -> tuple[int, int, int]:
    """What the edges of a window must be multiples of."""
    return network_file(plan.algo).divisor(plan.network)


def heads(algo: AlgoName, network: nn.Module) -> tuple[nn.Module, ...]:
    """The layers of a network that make outputs of features, the one that makes its result first."""
    return network_file(algo).heads(network)
