"""Weights, plans and ensembles that changed since they were made are refused, not used in silence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_predict import write_image
from tiny_jobs import make_job

import autoseg
from autoseg.cli.main import run_command
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
    with pytest.raises(WorkspaceError, match=r"weights? (are|is) NaN or infinite .*--fold 0 --again"):
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


# -- a whole run


@pytest.fixture
def copied(finished_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished_run, tmp_path / "run", copy_function=shutil.copy2)
    return tmp_path / "run"


def state_of(run: Path) -> tuple[bytes, bytes]:
    job = Workspace(run / "work_dir").job_dir("segresnet", 1)
    return job.root.joinpath("job.json").read_bytes(), job.model.read_bytes()


def spoil(run: Path) -> Path:
    """One byte of a tensor turns, as on a failing disk; returns the file."""
    path = Workspace(run / "work_dir").job_dir("segresnet", 1).model
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("words", [["train"], ["run"], ["ensemble"]])
def test_no_stage_calls_a_job_with_damaged_weights_done(
    copied: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    path = spoil(copied)
    before = state_of(copied)
    command = [*words, "--input", str(copied / "input.yaml")]
    assert run_command(command) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {path}: not the weights that training left: damaged, or replaced. Copy it anew, or train segresnet_1 "
        "again: `autoseg train --algo segresnet --fold 1 --again`. Where it was changed on purpose, give the command "
        "--accept once."
    )
    assert state_of(copied) == before
    assert run_command([*command, "--accept"]) == 0
    assert "segresnet_1 is done" in capsys.readouterr().err or words == ["ensemble"]
    assert run_command(command) == 0
    assert state_of(copied) == before


def test_a_worker_leaves_damaged_weights_and_again_trains_them(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, sound = state_of(copied)
    spoil(copied)
    before = state_of(copied)
    one = ["--algo", "segresnet", "--fold", "1"]
    assert run_command(["train", "--work_dir", str(copied / "work_dir"), *one]) == 2
    assert "not the weights that training left" in capsys.readouterr().err
    assert state_of(copied) == before
    assert run_command(["train", "--input", str(copied / "input.yaml"), *one, "--again"]) == 0
    assert state_of(copied)[1] == sound


def test_a_done_job_without_weights_is_trained(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, sound = state_of(copied)
    Workspace(copied / "work_dir").job_dir("segresnet", 1).model.unlink()
    assert run_command(["train", "--input", str(copied / "input.yaml")]) == 0
    assert "segresnet_1, because its weights are missing" in capsys.readouterr().err
    assert state_of(copied)[1] == sound


def test_the_api_accepts_changes_made_on_purpose(copied: Path, tmp_path: Path) -> None:
    spoil(copied)
    image = write_image(tmp_path / "a.nii.gz")
    for call in (lambda: autoseg.Segmenter(copied / "work_dir"), lambda: autoseg.run(copied / "input.yaml")):
        with pytest.raises(WorkspaceError, match="give the command --accept once"):
            call()
    autoseg.predict(image, work_dir=copied / "work_dir", device="cpu", accept=True)
    autoseg.Segmenter(copied / "work_dir")
    spoil(copied)
    assert autoseg.run(copied / "input.yaml", accept=True).succeeded
    autoseg.Segmenter(copied / "work_dir")


@pytest.mark.parametrize("part", ["ensemble/ensemble.json", "ensemble/seal.json", "input.yaml", "state/usage.jsonl"])
def test_a_folder_in_the_place_of_a_file_is_said(copied: Path, capsys: pytest.CaptureFixture[str], part: str) -> None:
    path = copied / "work_dir" / part
    path.unlink()
    path.mkdir()
    for scores in (copied / "work_dir" / "ensemble").glob("scores.*"):  # so that the ensemble is chosen again
        scores.unlink()
    assert run_command(["run", "--input", str(copied / "input.yaml")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: {path}: ")
    assert "irectory" in said


def test_scores_of_another_number_of_classes_are_said(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied / "work_dir" / "ensemble" / "records"
    testing, out_of_fold = sorted(folder.glob("*.json"))[-1], sorted(folder.glob("*.json"))[0]
    for path in (testing, out_of_fold):
        text = path.read_text()
        record = json.loads(text)
        dice = record["dice"]
        longer = [*dice, 0.5] if isinstance(dice, list) else {k: [*v, 0.5] for k, v in dice.items()}
        write_json(path, {**record, "dice": longer})
        assert run_command(["run", "--input", str(copied / "input.yaml")]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"error: {path}: scores for 2 and 3 classes. Expected one number of them. Undo the edit, or delete the "
            "file and run `autoseg ensemble` again."
        )
        path.write_text(text)
