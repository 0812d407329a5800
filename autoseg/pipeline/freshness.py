"""What a stage says where one that it needs is not up to date."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from autoseg.errors import WorkspaceError, counted
from autoseg.pipeline.context import RunContext
from autoseg.pipeline.stages import stage_named
from autoseg.workspace.digests import DIGESTS
from autoseg.workspace.stages import Stage
from autoseg.workspace.stamps import NOT_DONE
from autoseg.workspace.workspace import Workspace

log = logging.getLogger(__name__)


def reasons_to_run(
    run: RunContext, place: Workspace, stage: Stage[RunContext]
) -> tuple[Mapping[str, str] | None, list[str]]:
    """Why a stage is to be run in a folder; nothing where it is up to date.

    Returns:
        Its inputs, and the reasons. No inputs where they are the content of files that the stage is about to read for
        the first time: what it reads is then known, and need not be read twice.
    """
    assert stage.inputs is not None, f"{stage.name} has no inputs by which to tell"
    if stage.digests_what_it_reads and not place.is_stamped(stage.name):
        return None, [NOT_DONE]
    inputs = stage.inputs(run, place)
    if count := DIGESTS.take_recognised():
        log.info(
            "%s copied, moved or touched; nothing in them changed, so nothing is redone for them",
            counted(count, "file was", "files were"),
        )
    return inputs, place.stale(stage.name, inputs) or list(stage.gaps(place))


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
    if reasons == [NOT_DONE] and needed.where == "run":
        raise WorkspaceError(f"{place.root}: {name} has not been done. {command} first.")
    if reasons:
        raise WorkspaceError(f"{place.root}: {needed.out_of_date} ({', '.join(reasons)}). {command}.")
    run.up_to_date.add((place.root, name))
