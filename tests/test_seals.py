"""Weights, plans and ensembles that changed since they were made are refused, not used in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_predict import write_image
from tiny_jobs import make_job

from autoseg.ensemble.predict import accept_changes, load_predictor, predict_files
from autoseg.errors import WorkspaceError
from autoseg.inference.ensemble_spec import EnsembleSpec, seal_ensemble
from autoseg.inference.seals import seal_job
from autoseg.workspace.files import write_json, write_yaml
from autoseg.workspace.jobs import JobDir
from autoseg.workspace.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Two trained jobs and their ensemble, sealed as training and the ensemble stage leave them."""
    workspace = Workspace(tmp_path / "work")
    for fold in (0, 1):
        seal_job(make_job(workspace.root, "segresnet", fold, seed=fold))
    spec = EnsembleSpec(
        name="segresnet",
        method="auto",
        combine="mean",
        members=(("segresnet", 0), ("segresnet", 1)),
        classes=("sphere", "box"),
        dice=0.5,
        version="0",
    )
    write_json(workspace.ensemble_spec, spec.model_dump(mode="json"))
    seal_ensemble(workspace, spec)
    return workspace


def job_of(workspace: Workspace, fold: int = 0) -> JobDir:
    return workspace.job_dir("segresnet", fold)


def edit_plan(**changes: Any) -> Callable[[Workspace], None]:
    def edit(workspace: Workspace) -> None:
        path = job_of(workspace).plan
        write_yaml(path, yaml.safe_load(path.read_text()) | changes)

    return edit


def edit_ensemble(**changes: Any) -> Callable[[Workspace], None]:
    def edit(workspace: Workspace) -> None:
        path = workspace.ensemble_spec
        write_json(path, json.loads(path.read_text()) | changes)

    return edit


def replace_weights(workspace: Workspace) -> None:
    path = job_of(workspace).model
    torch.save({name: tensor * 1.01 for name, tensor in torch.load(path, weights_only=True).items()}, path)


def spoil_weights(workspace: Workspace) -> None:
    path = job_of(workspace).model
    torch.save({name: tensor * float("nan") for name, tensor in torch.load(path, weights_only=True).items()}, path)


CHANGES: dict[str, tuple[Callable[[Workspace], None], str]] = {
    "weights": (replace_weights, r"segresnet_0/models/model\.pt: not the weights that training left"),
    "roi_size": (edit_plan(roi_size=[32, 16, 16]), r"hyper_parameters\.yaml: edited since segresnet_0 was trained"),
    "spacing": (edit_plan(resample_resolution=[1.0, 1.0, 1.0]), "edited since segresnet_0 was trained"),
    "members": (edit_ensemble(members=[["segresnet", 1]]), "edited since the ensemble was chosen"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_is_refused_and_once_accepted_goes_on(workspace: Workspace, change: str) -> None:
    make_change, message = CHANGES[change]
    load_predictor(workspace, device="cpu")
    make_change(workspace)
    with pytest.raises(WorkspaceError, match=message) as caught:
        load_predictor(workspace, device="cpu")
    assert "--accept once" in str(caught.value)
    accept_changes(workspace.root)
    load_predictor(workspace, device="cpu")


def test_all_that_was_changed_is_told_at_once(workspace: Workspace) -> None:
    replace_weights(workspace)
    edit_plan(mirror_axes=[0])(workspace)
    with pytest.raises(WorkspaceError) as caught:
        load_predictor(workspace, device="cpu", algo="segresnet")
    assert len(caught.value.messages) == 2


def test_what_only_predicts_otherwise_may_be_edited(workspace: Workspace) -> None:
    edit_plan(overlap=0.0, tta=True, num_epochs=77, learning_rate=1.0, cache="off")(workspace)
    assert load_predictor(workspace, device="cpu").models[0].plan.overlap == 0.0


def test_classes_of_another_training_cannot_be_accepted(workspace: Workspace) -> None:
    edit_ensemble(classes=["box", "sphere"])(workspace)
    with pytest.raises(WorkspaceError, match="edited since"):
        load_predictor(workspace, device="cpu")
    accept_changes(workspace.root)
    with pytest.raises(WorkspaceError, match="found box, sphere, but segresnet_0 was trained for sphere, box"):
        load_predictor(workspace, device="cpu")


@pytest.mark.parametrize("sealed", [True, False])
def test_weights_that_are_no_numbers_are_refused_with_and_without_a_seal(
    workspace: Workspace, tmp_path: Path, sealed: bool
) -> None:
    spoil_weights(workspace)
    if not sealed:  # a folder of version 0.1
        for path in (job_of(workspace, 0).seal, job_of(workspace, 1).seal, workspace.ensemble_seal):
            path.unlink()
    image = write_image(tmp_path / "a.nii.gz")
    accept_changes(workspace.root)
    with pytest.raises(WorkspaceError, match=r"weights are NaN or infinite .*--fold 0 --again"):
        predict_files(workspace.root, image, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_seals_is_used(workspace: Workspace) -> None:
    for fold in (0, 1):
        job_of(workspace, fold).seal.unlink()
    workspace.ensemble_seal.unlink()
    replace_weights(workspace)
    load_predictor(workspace, device="cpu")
    accept_changes(workspace.root)
    assert not workspace.ensemble_seal.exists()


def test_a_damaged_seal_is_named(workspace: Workspace) -> None:
    job_of(workspace).seal.write_text("{")
    with pytest.raises(WorkspaceError, match=r"seal\.json: cut off or damaged.* Delete it to use the files beside it"):
        load_predictor(workspace, device="cpu")
    accept_changes(workspace.root)
    load_predictor(workspace, device="cpu")
