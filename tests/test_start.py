"""Jobs that start from weights: planned, refused, trained again when the file changed, accounted for everywhere."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from plans import tiny_plan
from test_trainer import CASES, CPU
from torch import nn

from autoseg.cli.main import run_command
from autoseg.data.phantoms import make_phantoms
from autoseg.networks import build_network
from autoseg.plan import read_plan
from autoseg.training.schedule import learning_rate, loaded_share
from autoseg.training.trainer import Trainer
from autoseg.weights.tables import Row, Table
from autoseg.workspace.jobs import JobDir

SETTINGS = """
algos: [segresnet]
folds: [0]
num_epochs: 1
batch_size: 1
num_steps_per_epoch: 2
num_workers: 1
roi_size: [16, 16, 16]
overlap: 0
precision: fp32
ensemble: false
segresnet: {init_filters: 8, blocks_down: [1, 1]}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of one trained job; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    path = make_phantoms(folder, num_cases=4, num_testing=0, shape=(24, 24, 24), num_fold=2)
    path.write_text(path.read_text() + SETTINGS)
    assert run_command(["run", "--input", str(path)]) == 0
    return folder


def copied(trained: Path, folder: Path, more: str) -> Path:
    """The same data and settings with others besides, without the run; its input.yaml."""
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("work_dir"))
    path = folder / "input.yaml"
    path.write_text(path.read_text() + more)
    return path


def test_a_run_starts_from_another_and_again_when_that_changes(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = tmp_path / "weights" / "model.pt"
    model.parent.mkdir()
    shutil.copy(trained / "work_dir" / "segresnet_0" / "models" / "model.pt", model)
    path = copied(trained, tmp_path / "run", "")
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    command = ["run", "--input", str(path)]
    assert run_command([*command, "--init_weights", "weights/model.pt"]) == 0
    said = caplog.messages
    assert any(text.startswith("segresnet_0: starts with 99.9% of the weights from model.pt (2") for text in said)
    assert (
        "segresnet_0:   random   up_layers.0.head.bias: the file does not say which class each of its outputs is"
        in said
    )
    job = JobDir(tmp_path / "run" / "work_dir" / "segresnet_0")
    account = json.loads(job.init_weights.read_text())
    assert {row["state"] for row in account["rows"]} == {"loaded", "random", "unused"}
    # From elsewhere, without the flag: the run goes on with it, and has nothing to do.
    monkeypatch.chdir("/")
    caplog.clear()
    assert run_command(command) == 0
    assert "train: segresnet_0 is done" in " ".join(caplog.messages)
    assert str(tmp_path) not in (tmp_path / "run/work_dir/state/command_line.json").read_text()
    # Shown by explain and in the report.
    capsys.readouterr()
    assert run_command(["explain", "init_weights", "--work_dir", str(job.root.parent)]) == 0
    assert (
        "  value:  99.9% of the weights from model.pt\n  origin: the file\n  rule:   21 loaded, 2 random"
        in capsys.readouterr().out
    )
    assert "started with 99.9% of the weights from model.pt" in (job.root.parent / "report.html").read_text()
    # Copied: the same. Changed: trained again, and said.
    os.utime(model)
    state = torch.load(model, weights_only=True)
    torch.save({**state, "encoder.conv_init.weight": state["encoder.conv_init.weight"] + 1}, model)
    caplog.clear()
    assert run_command(command) == 0
    assert "train: job 1 of 1, segresnet_0, because init_weights changed" in caplog.messages
    # Taken away: the copy goes, and the job starts with random numbers.
    caplog.clear()
    assert run_command([*command, "--init_weights", "none"]) == 0
    reasons = next(text for text in caplog.messages if text.startswith("train: job 1 of 1, segresnet_0, because "))
    assert "init_weights is gone" in reasons
    assert not job.init_weights.exists()
    assert [*(job.root.parent / "init_weights").iterdir()] == []


def test_weights_that_have_seen_held_out_cases_are_warned_of(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The other fold of the same cases: all it is judged by was learned from."""
    path = copied(
        trained, tmp_path / "run", f"init_weights: {os.path.relpath(trained / 'work_dir', tmp_path / 'run')}\n"
    )
    caplog.set_level(logging.INFO)
    assert run_command(["run", "--input", str(path), "--folds", "1"]) == 0
    job = json.loads((tmp_path / "run/work_dir/segresnet_1/job.json").read_text())
    assert job["warnings"] == [
        "work_dir/segresnet_0/models/model.pt has learned from 2 of the 2 cases of this fold, so its Dice here says "
        "too much. Start from weights of other cases, or judge by cases that neither has seen."
    ]
    assert job["warnings"][0] in " ".join(caplog.messages)


def test_the_same_images_with_other_labels_are_known_again(trained: Path, tmp_path: Path) -> None:
    """A class more, or two merged: the case is another, and the model has learned from its image all the same."""
    source = os.path.relpath(trained / "work_dir", tmp_path / "run")
    path = copied(trained, tmp_path / "run", f"init_weights: {source}\n")
    labels = sorted((tmp_path / "run" / "labels").iterdir())
    assert labels
    for label in labels:
        image = nib.load(label)
        array = np.asarray(image.dataobj).copy()
        array[0, 0, 0] = array.max()
        nib.save(nib.Nifti1Image(array, image.affine), label)
    assert run_command(["run", "--input", str(path), "--folds", "1"]) == 0
    job = json.loads((tmp_path / "run/work_dir/segresnet_1/job.json").read_text())
    assert [text.partition(",")[0] for text in job["warnings"]] == [
        "work_dir/segresnet_0/models/model.pt has learned from 2 of the 2 cases of this fold"
    ]
    earlier = json.loads((trained / "work_dir/segresnet_0/job.json").read_text())
    assert len(earlier["learned_from"]) == 2
    assert {*job["learned_from"]} > {*earlier["learned_from"]}, "passed on to who starts from this one"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("none.pt", "no such file or folder: {folder}/none.pt. none.pt is relative to the folder of input.yaml."),
        ("{segresnt: none.pt}", "no network segresnt. Did you mean segresnet?"),
        ("[a, b]", "expected text or a mapping of names to texts, found [a, b]."),
    ],
)  # fmt: skip
def test_settings_that_lead_nowhere_are_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    path = copied(trained, tmp_path / "run", f"init_weights: {text}\n")
    assert run_command(["generate", "--input", str(path)]) == 2
    line = len(path.read_text().splitlines())
    expected = f"input.yaml:{line}: init_weights: {message.format(folder=path.parent)}"
    assert expected in capsys.readouterr().err


def test_a_run_does_not_start_from_itself(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = trained / "input.yaml"
    assert run_command(["generate", "--input", str(path), "--init_weights", str(trained / "work_dir")]) == 2
    assert "lies in the run's own work_dir, whose models change as they are trained." in capsys.readouterr().err


def test_weights_of_another_network_are_refused_before_training(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = trained / "work_dir" / "segresnet_0" / "models" / "model.pt"
    path = copied(trained, tmp_path / "run", "")
    words = ["--algos", "resenc", "--init_weights", str(model)]
    assert run_command(["run", "--input", str(path), *words]) == 2
    error = capsys.readouterr().err
    assert "init_weights: model.pt has 0% of the weights of the encoder of resenc_0, expected at least 50%" in error
    assert not (tmp_path / "run" / "work_dir" / "resenc_0").exists()
    assert run_command(["run", "--input", str(path)]) == 0  # a refused flag is not kept


def test_weights_of_other_voxels_are_warned_of(trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for factor, is_told in ((1.0, False), (1.6, True)):
        path = copied(trained, tmp_path / f"by_{factor}", f"init_weights: {trained / 'work_dir'}\n")
        spacing_mm = read_plan(JobDir(trained / "work_dir" / "segresnet_0")).resample_resolution
        flag = ["--resample_resolution", str([factor * edge for edge in spacing_mm])]
        assert run_command(["analyze", "--input", str(path)]) == 0
        caplog.clear()
        assert run_command(["generate", "--input", str(path), *flag]) == 0
        expected = (
            "segresnet_0: starts from weights of voxels over 1.5 times longer or shorter: trained as random ones "
            "(measured). Another organ's may be worse than none: compare_scratch shows it"
        )
        assert (expected in caplog.messages) == is_told


def test_loaded_weights_are_frozen_first_and_slower_then(tmp_path: Path) -> None:
    assert [loaded_share(p, 0.5, 0.2) for p in (0.0, 0.19, 0.2, 0.3, 0.4, 0.9)] == pytest.approx(
        [0, 0, 0, 0.25, 0.5, 0.5]
    )
    assert [loaded_share(p, 0.5, 0.0) for p in (0.0, 0.5)] == [0.5, 0.5]
    loaded = {name for name, _ in build_network(tiny_plan()).named_parameters() if ".head." not in name}
    for optimizer in ("muon", "adamw", "sgd", "novograd"):
        plan = tiny_plan(frozen_fraction=0.5, loaded_rate=0.1, optimizer=optimizer, num_epochs=2)
        paths = JobDir(tmp_path / optimizer / "segresnet_0")
        trainer = Trainer(plan, CASES[:4], CASES[4:], paths, device=CPU, start=lambda network: loaded)
        before = {n: p.detach().clone() for n, p in trainer.step.network.named_parameters()}
        trainer.train_step(0.25)
        changed = {n: not torch.equal(p, before[n]) for n, p in trainer.step.network.named_parameters()}
        assert {name for name, is_changed in changed.items() if is_changed} == before.keys() - loaded
        trainer.train_step(0.75)
        changed = {n: not torch.equal(p, before[n]) for n, p in trainer.step.network.named_parameters()}
        assert any(is_changed for name, is_changed in changed.items() if name in loaded)
        rates = {group["part"]: group["lr"] for group in trainer.step.optimizer.param_groups}
        assert rates["loaded"] == pytest.approx(0.5 * 0.1 * rates["new"])


def test_nothing_is_frozen_where_all_was_loaded(tmp_path: Path) -> None:
    """As where a model is trained on for the same classes: it would stand still."""
    plan = tiny_plan(frozen_fraction=0.5, loaded_rate=0.1, num_epochs=2)
    names = [name for name, _ in build_network(plan).named_parameters()]
    trainer = Trainer(plan, CASES[:4], CASES[4:], JobDir(tmp_path / "a_0"), device=CPU, start=lambda network: names)
    before = {n: p.detach().clone() for n, p in trainer.step.network.named_parameters()}
    trainer.train_step(0.25)
    assert any(not torch.equal(p, before[n]) for n, p in trainer.step.network.named_parameters())
    whole = learning_rate(plan.learning_rate, 0.25, plan.warmup_fraction, plan.schedule)
    assert {group["lr"] for group in trainer.step.optimizer.param_groups} == {0.1 * whole}


def test_weights_are_told_by_their_share() -> None:
    rows = (
        Row(name="a", theirs="a", state="loaded", share=1.0),
        Row(name="stem", theirs="b", state="adapted", share=1.0),
        Row(name="head", theirs="c", state="adapted", share=0.9),
        Row(name="d", state="random"),
        Row(theirs="e", state="unused"),
    )
    assert Table(source="s", share=0.9, encoder_share=1.0, rows=rows).loaded == {"a", "stem"}


def test_a_fine_tuned_job_that_is_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    """The weights to start from are put in first and then replaced by the checkpoint's."""
    plan = tiny_plan(frozen_fraction=0.3, loaded_rate=0.1, num_epochs=4, optimizer="muon")
    torch.manual_seed(99)
    first = build_network(plan).state_dict()

    def start(network: nn.Module) -> list[str]:
        network.load_state_dict(first)
        return [name for name in first if ".head." not in name]

    def trainer(name: str) -> Trainer:
        paths = JobDir(tmp_path / name / "segresnet_0")
        return Trainer(plan, CASES[:4], CASES[4:], paths, device=CPU, start=start)

    whole = trainer("whole")
    whole.run()
    stopped = trainer("stopped")
    for _ in range(3):
        stopped.train_step()
    stopped.save()
    again = trainer("stopped")
    again.run()
    ours, theirs = again.step.network.state_dict(), whole.step.network.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
