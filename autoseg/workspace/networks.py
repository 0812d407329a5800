"""state/networks.json: the networks that `algos: auto` came to, so that a run that goes on has the same."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from autoseg.config.networks import EnsembleAlgo
from autoseg.workspace.stored import Stored, read_stored, write_stored
from autoseg.workspace.workspace import Workspace


class ChosenNetworks(Stored):
    """What stands in state/networks.json."""

    advice: ClassVar[str] = "Undo the edit, or delete the file: the networks are then chosen anew."

    networks: Annotated[tuple[EnsembleAlgo, ...], Field(min_length=1)]
    rule: str
    """Why these, and why not the others."""
    inputs: dict[str, str]
    """What they were chosen by: name -> digest."""


def read_chosen(workspace: Workspace) -> ChosenNetworks | None:
    """The run's choice; None where there is none yet."""
    path = workspace.chosen_networks
    return read_stored(path, ChosenNetworks) if path.exists() else None


def write_chosen(workspace: Workspace, chosen: ChosenNetworks) -> None:
    """Store the run's choice."""
    write_stored(workspace.chosen_networks, chosen)
