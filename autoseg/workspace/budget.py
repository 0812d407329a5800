"""What stands in state/budget.json of a run or a round."""

from __future__ import annotations

from typing import ClassVar

from pydantic import ConfigDict, Field

from autoseg.workspace.stored import Seconds, Stored, read_stored
from autoseg.workspace.workspace import Workspace


class Afterwards(Stored):
    """Predictions after a job for which it leaves time itself, since no job has shown yet what one takes."""

    cases: float = 0.0
    copies: float = 0.0
    """Of corrupted images."""
    most_s: Seconds = 0.0
    """Seconds that it leaves for cases at most."""
    most_copies_s: Seconds = 0.0
    """The same for copies."""

    def seconds(self, case_s: float) -> float:
        """Seconds to leave, by those that a prediction takes."""
        return min(case_s * self.cases, self.most_s) + min(case_s * self.copies, self.most_copies_s)


class BudgetState(Stored):
    """What stands in state/budget.json."""

    model_config = ConfigDict(frozen=False)
    advice: ClassVar[str] = "Undo the edit, or delete the file: the budget then starts anew."

    budget_s: Seconds
    """Of the whole run."""
    spent_s: Seconds = 0.0
    """Seconds of work so far, over all starts."""
    jobs: dict[str, Seconds] = Field(default_factory=dict)
    """Job -> seconds it was given."""
    afterwards: dict[str, Afterwards] = Field(default_factory=dict)
    """Job -> what it leaves some of them for."""
    dropped: dict[str, str] = Field(default_factory=dict)
    """Algorithm -> why."""


def read_afterwards(workspace: Workspace, name: str) -> Afterwards:
    """What a job leaves time for; nothing where it has no share of a budget."""
    if not workspace.budget.exists():
        return Afterwards()
    return read_stored(workspace.budget, BudgetState).afterwards.get(name, Afterwards())
