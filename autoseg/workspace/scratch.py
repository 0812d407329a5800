"""Where a run's jobs have their twins that start from random weights (`compare_scratch`): scratch/ beside them.

They are jobs as any other, but no ensemble knows of them, since they lie in a folder of their own.
"""

from __future__ import annotations

from autoseg.workspace.stored import Stored, write_stored
from autoseg.workspace.workspace import SCRATCH, Workspace


class ScratchMarker(Stored):
    """What stands in scratch/scratch.json, by which the folder is known."""

    of: str
    """The folder whose jobs' twins these are, relative to this one."""


def scratch_place(place: Workspace) -> Workspace:
    """The folder of the twins of a run's or a round's jobs; it need not exist."""
    return Workspace(place.root / "scratch", data_of=place)


def begin_scratch(place: Workspace) -> Workspace:
    """Make that folder, so that a worker that is given it alone knows it."""
    folder = place.root / "scratch"
    if not (folder / SCRATCH).exists():
        write_stored(folder / SCRATCH, ScratchMarker(of=".."))
    return Workspace(folder)
