"""What pretraining leaves in a run's folder: pretraining/<algo>_<fold>/, jobs as those of training are.

Where one pretraining serves all folds, it has the number 0.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from autoseg.errors import counted
from autoseg.workspace.jobs import JobDir
from autoseg.workspace.stages import DONE, NOT_YET
from autoseg.workspace.stored import Score, Seconds, Stored, read_stored
from autoseg.workspace.workspace import Workspace

ROLES = ("unlabeled", "testing", "training", "validation")
"""Of images, in the order in which they are counted."""


class Lesson(Stored):
    """What a job of pretraining learns, and from which images; its lesson.json."""

    advice: ClassVar[str] = "Undo the edit, or delete the folder pretraining and run `autoseg pretrain` again."

    method: Literal["contrastive", "mae"]
    mask_share: float = Field(gt=0, lt=1)
    mask_block: int = Field(ge=1)
    temperature: float = Field(gt=0)
    for_all_folds: bool
    """Whether jobs of all folds start from it; else those of its own fold."""
    all_images: bool
    """Whether images of cases that models are scored on were asked for."""
    training: tuple[str, ...]
    """Cases that are learned from."""
    validation: tuple[str, ...]
    """Cases by which the best weights are found."""
    roles: dict[str, int]
    """Role in the datalist -> how many of both."""
    scored: tuple[str, ...] = ()
    """Of both, those that models are scored on: by cross-validation, or as labelled cases held back."""

    @property
    def num_views(self) -> int:
        """Changed copies of a patch that are passed through the network."""
        return 2 if self.method == "contrastive" else 1

    @property
    def words(self) -> str:
        """What was learned from, in words."""
        by_role = ", ".join(f"{number} {role}" for role, number in self.roles.items() if number)
        return f"{self.method} on {counted(len(self.training) + len(self.validation), 'image')} ({by_role})"

    @property
    def fold_words(self) -> str:
        """What that means for the scores."""
        if self.scored:
            return (
                f"It has seen, without their labels, the images of {counted(len(self.scored), 'case')} that models are "
                "scored on (pretrain.all_images): scores on them may say a little too much."
            )
        which = "any fold's" if self.for_all_folds else "its fold's"
        return f"It has seen no image of {which} held-out cases, nor of labelled cases that were held back."


class LessonLine(Stored):
    """One line of metrics.jsonl: an epoch of a job of pretraining."""

    epoch: int = Field(ge=0, le=10**9)
    num_epochs: int | None = Field(default=None, ge=0, le=10**9)
    step: int | None = None
    train_loss: float
    val_l1: Score = None
    """Mean absolute error of the images that it draws, in normalised intensities; None: no validation in this epoch."""
    best_l1: Score = None
    lr: float | None = None
    progress: float | None = None
    """Share of the schedule that is done."""
    seconds: Seconds = 0.0
    samples_per_s: float | None = None
    time_left_s: Seconds | None = None


def pretraining_place(workspace: Workspace) -> Workspace:
    """The folder of a run's pretraining, whose cases and cache are the run's."""
    return Workspace(workspace.pretraining, data_of=Workspace(workspace.pretraining.parent))


def read_lesson(paths: JobDir) -> Lesson:
    """What a job of pretraining learns. Raises: WorkspaceError: The file is missing or damaged."""
    return read_stored(paths.lesson, Lesson)


def lessons(workspace: Workspace) -> dict[tuple[str, int], Lesson]:
    """All that is planned in a run, by network and fold. Raises: WorkspaceError: A file is damaged."""
    place = pretraining_place(workspace)
    found = {(algo, fold): place.job_dir(algo, fold) for algo, fold in place.job_names()}
    return {name: read_lesson(paths) for name, paths in found.items() if paths.lesson.exists()}


def lesson_for(workspace: Workspace, algo: str, fold: int) -> tuple[int, Lesson] | None:
    """The pretraining that a job of training starts from: the fold in its name, and what it learns; None: none."""
    for (name, number), lesson in lessons(workspace).items():
        if name == algo and (lesson.for_all_folds or number == fold):
            return number, lesson
    return None


def how_far(workspace: Workspace) -> str:
    """How many of the planned pretrainings are done, as a stage says it."""
    place = pretraining_place(workspace)
    states = [place.current_job(algo, fold)[0].state for algo, fold in lessons(workspace)]
    num_done = states.count("done")
    if num_done == len(states):
        return DONE if states else NOT_YET
    return f"{num_done} of {counted(len(states), 'job')}"
