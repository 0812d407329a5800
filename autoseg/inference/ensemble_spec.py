"""What stands in ensemble/ensemble.json: which models predict together, and what is done to their labels."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from autoseg.errors import WorkspaceError
from autoseg.inference.postprocess import ClassRule
from autoseg.inference.predictor import Combine
from autoseg.workspace.files import digest
from autoseg.workspace.seals import ON_PURPOSE, accept, broken_parts, write_seal
from autoseg.workspace.stored import Stored
from autoseg.workspace.workspace import Workspace


class ParetoRow(Stored):
    """A candidate's score and cost."""

    name: str
    dice: float | None
    """Out-of-fold mean Dice, without postprocessing."""
    seconds: float
    """To segment an image, predicted from the time of the out-of-fold cases; the mean over these."""
    gb: float
    """Memory (10^9 bytes), predicted: of the GPU, or of the process on a CPU; the most over the cases."""
    models: int
    """Models over all folds."""
    on_front: bool
    """No other has as much Dice for as little time and memory."""


class EnsembleSpec(Stored):
    """The chosen ensemble, as it stands in `ensemble.json`."""

    advice: ClassVar[str] = "Undo the edit, or delete the file and run `autoseg ensemble` again."

    name: str
    """The candidate's name, such as segresnet+swinunetr."""
    method: Literal["auto", "best_by_fold", "best_n"]
    """How it was chosen."""
    combine: Combine
    """Mean of the probabilities, or vote."""
    members: tuple[tuple[str, int], ...] = Field(min_length=1)
    """Algorithm and fold of each model; the job's folder is <algorithm>_<fold>."""
    classes: tuple[str, ...]
    """Foreground classes."""
    dice: float | None
    """Out-of-fold mean Dice, postprocessing included; null where nothing could be scored."""
    dice_raw: float | None = None
    """The same without postprocessing."""
    postprocessing: tuple[ClassRule, ...] = ()
    """What is done to classes of a prediction: as it was set, and where it raised the class's out-of-fold Dice."""
    pareto: tuple[ParetoRow, ...] = ()
    """Every candidate with what it costs, the best Dice first."""
    given_up: str = ""
    """What a budget of time or memory cost, in words."""
    version: str
    """Version of autoseg that chose it."""

    @model_validator(mode="after")
    def _check(self) -> EnsembleSpec:
        """Each member counts once, and each rule is about a class that there is."""
        if twice := [member for member, count in Counter(self.members).items() if count > 1]:
            raise ValueError(f"members: {twice[0][0]}_{twice[0][1]} is there more than once")
        if others := [rule.name for rule in self.postprocessing if rule.name not in self.classes]:
            raise ValueError(f"postprocessing: a rule for {others[0]}, which is none of the classes")
        return self

    @property
    def key(self) -> str:
        """A digest of what decides the labels, the classes included."""
        keys = {"combine", "members", "classes", "postprocessing"}
        return digest(self.model_dump(mode="json", include=keys))


def seal_ensemble(workspace: Workspace, spec: EnsembleSpec) -> None:
    """Note which ensemble was chosen, and what tells how good its predictions are."""
    write_seal(workspace.ensemble_seal, _digests(workspace, spec))


def accept_ensemble(workspace: Workspace, spec: EnsembleSpec) -> None:
    """Seal an ensemble as it is now. Raises: WorkspaceError: its folder cannot be written to."""
    accept(workspace.ensemble_seal, _digests(workspace, spec))


def check_ensemble(workspace: Workspace, spec: EnsembleSpec) -> None:
    """Refuse an ensemble that was edited since it was chosen.

    Raises:
        WorkspaceError: It was.
    """
    broken = broken_parts(workspace.ensemble_seal, _digests(workspace, spec))
    if "ensemble" in broken:
        raise WorkspaceError(
            f"{workspace.ensemble_spec}: edited since the ensemble was chosen. {EnsembleSpec.advice} {ON_PURPOSE}"
        )
    if "quality" in broken:
        done = "edited" if workspace.quality.exists() else "removed"
        raise WorkspaceError(
            f"{workspace.quality}: {done} since the ensemble was chosen. {EnsembleSpec.advice} {ON_PURPOSE}"
        )


def _digests(workspace: Workspace, spec: EnsembleSpec) -> dict[str, str]:
    """Of what decides the labels, the classes included; and of what is said of them."""
    quality = workspace.quality.read_text(encoding="utf-8", errors="replace") if workspace.quality.exists() else ""
    return {"ensemble": spec.key, "quality": digest(quality)}
