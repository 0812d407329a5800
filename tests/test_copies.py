"""Corrupted copies end in time: their share of the training, what a budget leaves, and the held-back cases first."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_jobs import make_job

from autoseg.ensemble import copies as module
from autoseg.ensemble.copies import Copies
from autoseg.inference.ensemble_spec import EnsembleSpec
from autoseg.workspace.jobs import Job
from autoseg.workspace.workspace import Workspace


def spec_of(*folds: int) -> EnsembleSpec:
    members = tuple(("segresnet", fold) for fold in folds)
    return EnsembleSpec(
        name="segresnet", method="auto", combine="mean", members=members, classes=("a",), dice=0.5, version="0"
    )


@pytest.fixture
def trained(tmp_path: Path) -> Workspace:
    """A run whose two jobs trained for 500 s each."""
    workspace = Workspace(tmp_path)
    for fold in (0, 1):
        make_job(tmp_path, "segresnet", fold, seed=fold)
        workspace.write_job(Job(algo="segresnet", fold=fold, state="done", seconds=500.0))
    return workspace


def test_they_get_their_share_of_the_training(trained: Workspace) -> None:
    copies = Copies(trained, spec_of(0, 1), device="cpu", image_s=1.0)
    assert (copies.learning_s, copies.left_s) == (pytest.approx(50), pytest.approx(70))
    copies.spent_s = 60
    assert (copies.learning_s, copies.left_s) == (pytest.approx(-10), pytest.approx(10))


def test_a_budget_that_is_spent_leaves_them_nothing(trained: Workspace) -> None:
    left_s = 30.0
    copies = Copies(trained, spec_of(0, 1), device="cpu", image_s=1.0, spare_s=lambda: left_s)
    assert (copies.learning_s, copies.left_s) == (pytest.approx(10), pytest.approx(30))
    copies.kept_s = 25.0  # for the held-back cases, which come first
    assert copies.left_s == pytest.approx(5)
    copies.kept_s = 0.0
    left_s = -5.0
    assert copies.left_s == -5
    left_s = 1e9
    assert copies.left_s == pytest.approx(70)


def test_between_rounds_none_are_predicted(trained: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.Workspace, "is_last_round", property(lambda self: False))
    assert Copies(trained, spec_of(0), device="cpu", image_s=1.0).left_s == 0
