"""`autoseg suggest`: what is suggested is doubtful and unlike each other, and nothing is predicted twice."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import autoseg
from autoseg.cli.main import run_command
from autoseg.inference.chosen import read_ensemble
from autoseg.inference.ensemble_spec import seal_ensemble
from autoseg.pipeline.suggest import Candidate, Doubt, chosen_order, one_of_each_patient
from autoseg.workspace.workspace import Workspace


def doubt(dice: float, *features: float, low: float = 0.0, reasons: tuple[str, ...] = ()) -> Doubt:
    return Doubt(made_from="", predicted_dice={"a": dice}, low={"a": low}, reasons=reasons, features=features)


def test_the_most_doubtful_comes_first_and_its_twin_last() -> None:
    doubts = {
        "worst": doubt(0.2, 0.0, 0.0),
        "twin": doubt(0.2, 0.0, 0.0),
        "other": doubt(0.5, 1.0, 1.0),
        "sure": doubt(0.99, -1.0, 1.0),
        "third": doubt(0.5, 1.0, -1.0),
    }
    order = chosen_order(doubts, 5)
    names = [name for name, _ in order]
    assert names[0] in ("worst", "twin")
    assert {*names[1:3]} == {"other", "third"}
    assert names[4] in ("worst", "twin")  # nothing new is in it
    assert np.isnan(order[0][1])
    assert order[4][1] == 0
    assert len(chosen_order(doubts, 99)) == 5
    assert chosen_order(doubts, 2) == order[:2] or np.isnan(order[0][1])


def test_no_patient_has_a_second_image_before_all_have_one() -> None:
    rng = np.random.default_rng(1)
    doubts = {f"c{i}": doubt(0.1 + 0.05 * (i % 3), *rng.normal(size=3)) for i in range(9)}
    patients = {f"c{i}": f"p{i // 3}" for i in range(9)}
    names = [name for name, _ in chosen_order(doubts, 9, patients)]
    assert sorted(names) == sorted(doubts)
    for first in (0, 3, 6):
        assert {patients[name] for name in names[first : first + 3]} == {"p0", "p1", "p2"}
    assert names[0] == chosen_order(doubts, 1)[0][0]
    drawn = [Candidate(name=name, images=(), group=patients[name]) for name in sorted(doubts)]
    assert [c.name for c in one_of_each_patient(drawn)] == ["c0", "c3", "c6", "c1", "c4", "c7", "c2", "c5", "c8"]
    alone = [Candidate(name=name, images=()) for name in "abc"]
    assert one_of_each_patient(alone) == alone


def test_of_images_alike_the_most_doubtful_are_taken() -> None:
    rng = np.random.default_rng(0)
    doubts = {f"c{i:02d}": doubt(i / 60, *rng.normal(size=4)) for i in range(60)}
    first = [doubts[name].mean_dice for name, _ in chosen_order(doubts, 10)]
    assert np.mean(first) < 0.4
    assert doubt(0.5).mean_dice == 0.5
    assert Doubt(made_from="", predicted_dice={}, low={}, reasons=(), features=()).mean_dice == 0


def test_what_is_not_like_the_training_data_counts_by_the_low_end() -> None:
    usual, odd = doubt(0.8, 0.0, low=0.3), doubt(0.9, 1.0, low=0.2, reasons=("voxels of another size",))
    assert (usual.loss, odd.loss) == (pytest.approx(0.2), pytest.approx(0.8))
    assert chosen_order({"usual": usual, "odd": odd}, 1)[0][0] == "odd"


def test_the_command_lists_images_of_a_folder_and_keeps_what_it_predicted(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = shutil.ignore_patterns("cache", "held_out", "out_of_fold")
    work_dir = Path(shutil.copytree(finished_run / "work_dir", tmp_path / "work_dir", ignore=kept))
    images = tmp_path / "new"
    images.mkdir()
    for n in (1, 4, 9):
        shutil.copy(finished_run / "images" / f"phantom_{n:03d}.nii.gz", images)
    words = ["suggest", "--work_dir", str(work_dir), "--n", "2"]
    assert run_command([*words, "--images", str(images)]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"2 of 3 images to annotate next; {work_dir / 'suggest' / 'suggestions.csv'}\n")
    assert "Evidence: " in told
    with open(work_dir / "suggest" / "suggestions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["rank"] for row in rows] == ["1", "2"]
    stored = {p: p.stat().st_mtime_ns for p in (work_dir / "suggest" / "doubts").iterdir()}
    assert len(stored) == 3
    for path in stored:
        told_of = json.loads(path.read_text())
        assert all(0 <= value <= 1 for value in told_of["predicted_dice"].values())
        # The same as predict says of the same image in its quality.csv.
        verdict = autoseg.Segmenter(work_dir, device="cpu").predict(images / f"{path.stem}.nii.gz").verdict
        assert verdict is not None
        dice = {c.name: c.dice for c in verdict.classes if c.dice is not None}
        assert told_of["predicted_dice"] == pytest.approx(dice, abs=1e-6)
        assert tuple(told_of["reasons"]) == verdict.reasons
    losses = {path.stem: Doubt.model_validate_json(path.read_text()).loss for path in stored}
    assert rows[0]["case"] == max(losses, key=lambda name: losses[name])
    assert "Dice is predicted as in quality.csv" in told
    assert {row["like_training"] for row in rows} <= {"yes", "no"}
    assert all(bool(row["reason"]) == (row["like_training"] == "no") for row in rows)
    assert run_command([*words, "--images", str(images)]) == 0
    assert {p: p.stat().st_mtime_ns for p in stored} == stored
    assert capsys.readouterr().out == told
    # By chance: no image is predicted.
    assert run_command([*words, "--images", str(images), "--order", "random", "--seed", "3"]) == 0
    drawn = capsys.readouterr().out
    assert run_command([*words, "--images", str(images), "--order", "random", "--seed", "3"]) == 0
    assert capsys.readouterr().out == drawn
    # An ensemble of too few cases has no quality.json: then probabilities tell.
    fewer = Path(shutil.copytree(work_dir, tmp_path / "fewer"))
    Workspace(fewer).quality.unlink()
    seal_ensemble(Workspace(fewer), read_ensemble(Workspace(fewer)))
    assert run_command(["suggest", "--work_dir", str(fewer), "--images", str(images)]) == 0
    assert "Dice is what the probabilities expect: the ensemble has no quality.json" in capsys.readouterr().out
    for path in (fewer / "suggest" / "doubts").iterdir():
        told_of = json.loads(path.read_text())
        assert all(0 <= value <= 1 for value in told_of["predicted_dice"].values())
        assert told_of["reasons"] == []
    # The run's own list has no image without a label.
    shutil.copytree(finished_run / "images", tmp_path / "images")
    shutil.copytree(finished_run / "labels", tmp_path / "labels")
    assert run_command(words) == 2
    assert (
        "no unlabeled image, and no testing case without a label. List some under `unlabeled`, or give a folder "
        in (capsys.readouterr().err)
    )
    assert run_command([*words[:3], "--n", "0"]) == 2
    assert "--n: expected a whole number >= 1, found 0." in capsys.readouterr().err
