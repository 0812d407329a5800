"""What a stage says where one that it needs is not up to date."""

from __future__ import annotations

from autoseg.errors import WorkspaceError
from autoseg.pipeline.context import RunContext
from autoseg.pipeline.stages import stage_named
from autoseg.workspace.workspace import Workspace


def require(run: RunContext, place: Workspace, name: str) -> None:
    """Make sure that what a stage in a folder is made from is up to date.

    Args:
        place: the folder of the stage that needs it.
        name: the stage that must have been done before.

    Raises:
        WorkspaceError: It has not been done, or one of its inputs has changed since.
    """
    needed = stage_named(name)
    if needed.where == "run":
        place = run.workspace
    elif needed.where == "between rounds" and place.round == 1:
        return
    if (place.root, name) in run.up_to_date:  # its inputs were read once by this command, and nothing else writes them
        return
    assert needed.inputs is not None, f"{name} has no inputs by which to tell"
    reasons = place.stale(name, needed.inputs(run, place))
    command = f"Run `autoseg {name}` or `autoseg run`"
    if reasons == ["not done yet"] and needed.where == "run":
        raise WorkspaceError(f"{place.root}: {name} has not been done. {command} first.")
    if reasons:
        raise WorkspaceError(f"{place.root}: {needed.out_of_date} ({', '.join(reasons)}). {command}.")
    run.up_to_date.add((place.root, name))
