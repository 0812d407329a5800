"""The networks: one file each, with all that the planner and the trainer need to know of it.

The row of a network in `autoseg/config/networks.py` names its file; `NetworkFile` says what the file has.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, cast

from torch import nn

from autoseg.config.networks import AlgoName
from autoseg.errors import ConfigError
from autoseg.hardware.memory import is_out_of_memory
from autoseg.networks.sizing import LearningRates, NetworkChoice, Shapes, Sizing
from autoseg.plan import Plan, read_plan

if TYPE_CHECKING:
    from autoseg.workspace.jobs import JobDir


class NetworkFile(Protocol):
    """What each file `autoseg/networks/NAME.py` has."""

    ENCODER: str
    """Names of the weights that make features of an image: a regular expression that they begin with. Those are what
    weights from elsewhere are good for, whatever they were trained to tell."""
    LATENT: str
    """Name of the module that makes the encoder's coarsest features, (B, F, X, Y, Z) or (B, places, F), alone or last
    of a list; empty: the network is not pretrained on images alone."""
    LEARNING_RATES: LearningRates
    SECONDS_PER_MEGAVOXEL: float
    """Seconds of a training step for a million voxels of the CPU-sized network, on two cores, where none was
    measured."""
    RUNGS: range
    """The sizes that `choose` knows on a CPU, smallest first; 0 is the usual one."""
    GPU_RUNGS: range
    """Those on a GPU."""

    def build(self, in_channels: int, out_channels: int, network: dict[str, Any]) -> nn.Module:
        """A fresh module for images of (B, C, X, Y, Z); in training it may return a list, finest output first.

        Args:
            network: its own settings, as `choose` gave them or a user changed them.
        """

    def heads(self, module: nn.Module) -> tuple[nn.Module, ...]:
        """The layers that make outputs of features, the one that makes the result first; empty: not known."""

    def divisor(self, network: dict[str, Any]) -> tuple[int, int, int]:
        """What the edges of a window must be multiples of."""

    def read_shapes(self, shapes: Shapes) -> dict[str, Any]:
        """Its own settings, as far as the shapes of its weights tell them, by the weights' names; empty: none."""

    def choose(self, sizing: Sizing) -> NetworkChoice:
        """Its own settings, patch and batch for a data set and a device, each with its rule."""


def network_file(algo: AlgoName) -> NetworkFile:
    """The file of one algorithm's network."""
    return cast(NetworkFile, importlib.import_module(f"autoseg.networks.{algo}"))


def build_network(plan: Plan) -> nn.Module:
    """A fresh network as the plan describes it; in training mode it may return a list, finest output first.

    Raises:
        ConfigError: Its values do not fit together.
    """
    try:
        return network_file(plan.algo).build(len(plan.channels), plan.num_outputs, plan.network)
    except (AssertionError, LookupError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        if is_out_of_memory(error):
            raise  # no fault of the plan's: whoever builds it goes on with less
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(
            f"{plan.algo}_{plan.fold}: network: its values do not fit together ({reason}). Undo the edit of the plan."
        ) from error


def divisor(plan: Plan) -> tuple[int, int, int]:
    """What the edges of a window must be multiples of."""
    return network_file(plan.algo).divisor(plan.network)


def plan_faults(plan: Plan) -> list[str]:
    """What is wrong with a plan that its types do not say, without building anything: an edit may ask for a giant."""
    steps = divisor(plan)
    if all(size % step == 0 for size, step in zip(plan.roi_size, steps, strict=True)):
        return []
    fit = [-(-size // step) * step for size, step in zip(plan.roi_size, steps, strict=True)]
    return [
        f"roi_size: found {list(plan.roi_size)}, but the stages in `network` need multiples of {list(steps)}, such as "
        f"{fit}. Change roi_size, or have fewer stages."
    ]


def checked_plan(paths: JobDir) -> Plan:
    """A job's plan, made sure to be one that its network can be built and trained by.

    Raises:
        ConfigError: An edit is not valid; all faults of it.
    """
    plan = read_plan(paths)
    faults = plan_faults(plan)
    if (name := f"{plan.algo}_{plan.fold}") != paths.root.name:
        faults.append(f"algo and fold: found those of {name} in the folder of {paths.root.name}. Undo the edit.")
    if faults:
        raise ConfigError([f"{paths.plan}: {fault}" for fault in faults])
    return plan


def is_encoder(algo: AlgoName) -> Callable[[str], bool]:
    """Whether a weight of that name is the encoder's."""
    pattern = re.compile(network_file(algo).ENCODER)
    return lambda name: pattern.match(name) is not None


def heads(algo: AlgoName, network: nn.Module) -> tuple[nn.Module, ...]:
    """The layers of a network that make outputs of features, the one that makes its result first."""
    return network_file(algo).heads(network)
