"""A stage of a run as a row: what it is called, what it reads and writes, where it works, what it does.

The table is `autoseg.pipeline.stages.STAGES`. Rooms below the pipeline, such as the report, are handed its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

if TYPE_CHECKING:
    from autoseg.workspace.stored import Unreadable
    from autoseg.workspace.workspace import Workspace

NOT_YET, DONE = "not yet", "done"
"""What `how_far` says of a stage that has not been done, and of one that has."""

Where = Literal["run", "each round", "between rounds"]
"""The folder a stage works in. `run`: the run's, once, before any round. `each round`: that of every round of training,
which is the run's own where there is one round alone. `between rounds`: that of every round but the first, before the
stages of that round."""

RunT = TypeVar("RunT")
"""What the functions of a stage are told of the command at work; the pipeline has the type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a stage ended."""

    text: str = ""
    """Tables to print."""
    complete: bool = True
    """False: a part of it failed, which the next run tries again; the command then ends with exit code 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage(Generic[RunT]):
    """One row of the table of stages. Its functions take the command at work and the folder that they work in."""

    name: str
    """Its command, and its name in messages and files."""
    doc: str
    """What it does, in a sentence: the first line of its command's help."""
    reads: str
    """What it is made from, in words, for the README's table."""
    writes: str
    """What it leaves, in words, with the paths in the folder that it works in."""
    where: Where
    run: Callable[[RunT, Workspace], Outcome]
    """Does it. Called where it is not up to date, or always where it has no `inputs`."""
    in_run: bool = True
    """Whether a plain `autoseg run` does it; else its own command alone."""
    needs: tuple[str, ...] = ()
    """Names of stages with `inputs` that must be up to date before; of those between rounds where there is one before
    this round."""
    ready: Callable[[RunT, Workspace], None] = lambda run, place: None
    """Raises a WorkspaceError, with what to run first, where anything else that it needs is missing."""
    left_out: Callable[[RunT, Workspace], str] = lambda run, place: ""
    """Why the settings leave it out; empty where they do not."""
    inputs: Callable[[RunT, Workspace], Mapping[str, str]] | None = None
    """What it is made from: name -> digest. Where one differs from what is stored, it is done again. None: it finds out
    by itself what is to be done again, as the training does job by job."""
    gaps: Callable[[Workspace], Sequence[str]] = lambda place: ()
    """Why it has to be done again though no input changed, such as files that are gone."""
    product: str = ""
    """What it makes, in words, as `autoseg status` names it of a stage between rounds."""
    out_of_date: str = ""
    """The message where a stage that needs it finds it out of date, such as `the analysis is out of date`."""
    how_far: Callable[[Workspace], str] | None = None
    """How far it is, in a few words; None: done where it was stored that it is. A stage without `inputs` needs it."""
    is_shown: Callable[[Workspace], bool] = lambda place: True
    """Whether status and report name it, as far as a run's files tell: not where nobody asked for it."""
    as_json: Callable[[Workspace], Any] | None = None
    """What is printed in place of its tables where `--json` asks for it."""
    plans_jobs: bool = False
    """Whether it plans the training jobs. A command without such a stage leaves plans as they were made."""
    keeps_settings: bool = False
    """Whether settings of its command line are kept for later commands, since what it makes follows from them."""
    digests_what_it_reads: bool = False
    """Whether its inputs are digests of files that it reads anyway, so that they are cheap once it has been run."""
    forks: bool = False
    """Whether it forks processes, for which there must be no other thread."""
    help: str = ""
    """More for its command's help, after `doc`."""
    settings_doc: str = "The settings."
    """What its command's help says of --input."""
    example: str = ""
    """Command lines for the help; empty: the command with --input."""

    def __post_init__(self) -> None:
        assert self.inputs is not None or self.how_far is not None, f"{self.name}: nobody could say how far it is"

    def is_shown_of(self, place: Workspace, unreadable: Unreadable) -> bool:
        """Whether status and report have a line for it; also where the files that tell are damaged."""
        return self.where != "between rounds" and unreadable.or_else(True, partial(self.is_shown, place))

    def far(self, place: Workspace) -> str:
        """How far it is in a folder, in a few words."""
        if self.how_far is not None:
            return self.how_far(place)
        return DONE if place.is_stamped(self.name) else NOT_YET
