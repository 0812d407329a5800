"""What a run's folder says of how images are segmented: its chosen ensemble, these jobs' folders, its settings."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field

from autoseg.config.fields import RGB, Concept, Strict
from autoseg.config.settings import ClassCodes, InferenceSettings
from autoseg.errors import WorkspaceError
from autoseg.inference.ensemble_spec import EnsembleSpec
from autoseg.inference.quality import QualityModel
from autoseg.workspace.files import check_inside
from autoseg.workspace.jobs import JobDir
from autoseg.workspace.layout import check_readable
from autoseg.workspace.settings import read_any_settings
from autoseg.workspace.stored import check_stored, read_stored
from autoseg.workspace.workspace import Workspace


def read_ensemble(workspace: Workspace) -> EnsembleSpec:
    """Read the chosen ensemble.

    Raises:
        WorkspaceError: There is none yet, or the file was damaged.
    """
    path = workspace.ensemble_spec
    if not path.exists():
        raise WorkspaceError(
            f"{path}: no ensemble yet. Run `autoseg ensemble` (or `autoseg run`) first; `predict` and `export` take a "
            "trained job by --algo and --fold, too."
        )
    return read_stored(path, EnsembleSpec)


def read_quality(workspace: Workspace, spec: EnsembleSpec) -> QualityModel | None:
    """Read what tells how good the chosen ensemble's predictions are; None where nothing does.

    Raises:
        WorkspaceError: The file was damaged, or belongs to another ensemble.
    """
    if not workspace.quality.exists():
        return None
    model = read_stored(workspace.quality, QualityModel)
    if model.made_from != spec.key or tuple(c.name for c in model.classes) != spec.classes:
        raise WorkspaceError(
            f"{workspace.quality}: belongs to another ensemble than {workspace.ensemble_spec.name}. "
            f"{QualityModel.advice}"
        )
    if faults := model.faults:
        raise WorkspaceError(f"{workspace.quality}: {faults[0]}. {QualityModel.advice}")
    return model


def read_inference(workspace: Workspace) -> InferenceSettings:
    """How the run's settings want images to be segmented; as by default where they do not say."""
    stored = read_any_settings(workspace).get("inference")
    values = stored.value if stored is not None else None
    remedy = "Undo the edit, or run `autoseg ensemble` again."
    return check_stored(values or {}, InferenceSettings, f"{workspace.settings}: inference", remedy)


class ClassFacts(Strict):
    """The settings of these names by themselves: what label files say of classes beside their names."""

    codes: dict[str, Concept | ClassCodes] = Field(default_factory=dict)
    colours: dict[str, RGB] = Field(default_factory=dict)


def read_class_facts(workspace: Workspace) -> ClassFacts:
    """What the run's settings say of classes; empty where they do not."""
    settings = read_any_settings(workspace)
    values = {
        name: stored.value or {} for name in ClassFacts.model_fields if (stored := settings.get(name)) is not None
    }
    remedy = "Undo the edit, or run `autoseg ensemble` again."
    return check_stored(values, ClassFacts, f"{workspace.settings}", remedy)


def run_at(workspace: Workspace) -> Workspace:
    """The same, sure to be there and of a layout that can be read."""
    if not workspace.root.is_dir():
        raise WorkspaceError(f"{workspace.root}: no such work_dir. Give the folder of a finished run with --work_dir.")
    check_readable(workspace.run)
    return workspace


def own_jobs(workspace: Workspace, names: Iterable[tuple[str, int]]) -> list[JobDir]:
    """The folders of jobs, of which nothing lies elsewhere.

    Raises:
        WorkspaceError: A name or a link in a folder leads out of the work_dir.
    """
    jobs = [workspace.job_dir(algo, fold) for algo, fold in names]
    for job in jobs:
        check_inside(workspace.run, job.root)
    return jobs
