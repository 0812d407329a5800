"""The account of what a network started with, kept in its job's folder as init_weights.json."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar, Literal

from pydantic import Field

from autoseg.workspace.jobs import JobDir
from autoseg.workspace.stored import Stored, read_stored, write_stored

State = Literal["loaded", "adapted", "random", "unused"]
STATES: tuple[State, ...] = ("loaded", "adapted", "random", "unused")


class Row(Stored):
    """What became of one tensor."""

    name: str = ""
    """In the network; empty: it is in the file alone."""
    theirs: str = ""
    """In the file; empty: it is in the network alone."""
    state: State
    """loaded: as it is in the file, bit by bit; adapted: made of it; random: not in the file; unused: not here."""
    share: float = Field(default=0.0, ge=0, le=1)
    """Of its numbers in the network that come from the file."""
    note: str = ""
    """How it was adapted, or why it was not taken."""

    @property
    def place(self) -> str:
        """Its name, and that in the file where it is another."""
        return f"{self.name or self.theirs}" + f" (there {self.theirs})" * bool(
            self.name and self.theirs not in ("", self.name)
        )


class Table(Stored):
    """What stands in a job's init_weights.json."""

    advice: ClassVar[str] = "Undo the edit, or delete the file: training writes it."

    source: str
    """The file that the weights come from."""
    kind: str = ""
    """What it is, in words."""
    share: float = Field(ge=0, le=1)
    """Of all the network's weights that come from it."""
    encoder_share: float = Field(ge=0, le=1)
    """Of the encoder's."""
    rows: tuple[Row, ...]

    @property
    def loaded(self) -> frozenset[str]:
        """The network's weights of which none is random."""
        return frozenset(row.name for row in self.rows if row.name and row.share == 1.0)

    @property
    def counts(self) -> str:
        """How many tensors of each state there are."""
        numbers = Counter(row.state for row in self.rows)
        return ", ".join(f"{numbers[state]} {state}" for state in STATES if numbers[state]) + " tensors"

    @property
    def summary(self) -> str:
        """The account in a sentence."""
        kind = f", {self.kind}" if self.kind else ""
        return f"{self.share:.1%} of the weights from {self.source}{kind} ({self.counts})"

    @property
    def notable(self) -> list[Row]:
        """Rows that are not as in the file, those of the network first."""
        order = {state: number for number, state in enumerate(STATES)}
        return sorted((row for row in self.rows if row.state != "loaded"), key=lambda row: order[row.state])

    def lines(self, most: int) -> list[str]:
        """The rows that are not as in the file, as lines; the first `most` of each state, and how many more."""
        rows, lines = self.notable, []
        for state in STATES[1:]:
            of_state = [row for row in rows if row.state == state]
            lines += [f"{state:<8} {row.place}" + f": {row.note}" * bool(row.note) for row in of_state[:most]]
            if len(of_state) > most:
                lines.append(f"{state:<8} and {len(of_state) - most} more")
        return lines


def keep_table(paths: JobDir, table: Table | None) -> None:
    """Store what a job's network starts with; None: random numbers alone."""
    if table is None:
        paths.init_weights.unlink(missing_ok=True)
    else:
        write_stored(paths.init_weights, table)


def read_table(paths: JobDir) -> Table | None:
    """What a job's network started with; None where it started with random numbers.

    Raises:
        WorkspaceError: The file is damaged.
    """
    return read_stored(paths.init_weights, Table) if paths.init_weights.exists() else None
