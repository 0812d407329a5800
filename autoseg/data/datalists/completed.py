"""What stands in pseudolabels/completed.json: the labels that were completed for a round of training."""

from __future__ import annotations

from autoseg.workspace.stored import Stored, read_stored
from autoseg.workspace.workspace import Workspace


class CompletedLabel(Stored):
    """One completed label; its files are relative to the folder of the pseudo-labels."""

    file: str
    annotated: tuple[str, ...] | None
    """Classes that it is complete for; None: all."""
    weight: str | None = None
    """What each voxel counts, in percent."""

    @property
    def files(self) -> tuple[str, ...]:
        """Label and weights."""
        return (self.file,) if self.weight is None else (self.file, self.weight)


def read_completed(workspace: Workspace) -> dict[str, CompletedLabel]:
    """The completed labels of a round by case.

    Raises:
        WorkspaceError: There are none, or the file is damaged.
    """
    remedy = "Undo the edit, or delete the file and run `autoseg run` again: the stage pseudolabel makes it."
    return read_stored(workspace.completed, dict[str, CompletedLabel], remedy=remedy)
