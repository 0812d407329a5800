"""Fixtures: small phantoms, made once per test run or in the test's own folder."""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest

from autoseg.data.datalists.cases import Case
from autoseg.data.grid import Grid
from autoseg.data.phantoms import make_phantom, make_phantoms
from autoseg.data.volumes import write_volume

if threading.current_thread() is threading.main_thread():
    # A shell starts what it runs in the background with Ctrl-C ignored, and the commands under test would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


LONGEST = ("test_pipeline.py", "test_rounds.py", "test_jobs.py", "test_sweep.py", "test_clusters.py", "test_trainer.py")
"""Files that begin first where several processes share them out by file: a long one at the end would run alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, each as it is."""
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine lacks, and say so; `make test-extras` fails instead, so that CI leaves nothing out."""
    names = [name for marker in item.iter_markers("extra") for name in marker.args]
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        tell = pytest.fail if "AUTOSEG_TEST_EXTRAS" in os.environ else pytest.skip
        tell(f"{', '.join(missing)} is not installed; `make test-extras` installs it and runs this")
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("torch finds no GPU")


# How long an example takes, or is drawn for, tells of the machine, not of the code.
hypothesis.settings.register_profile("autoseg", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("autoseg")


@pytest.fixture(scope="session")
def phantom_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 6 training cases in 3 folds and 2 testing cases of about 28x26x24 voxels; not to be changed.

    Holds images/, labels/, datalist.json, input.yaml; classes sphere (1) and box (2).
    """
    folder = tmp_path_factory.mktemp("phantoms")
    make_phantoms(folder, num_cases=6, num_testing=2, shape=(28, 26, 24), num_fold=3)
    return folder


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with phantoms, input.yaml and a finished run: two networks, 8 cases, 2 folds; not to be changed."""
    from autoseg.cli.main import run_command

    folder = tmp_path_factory.mktemp("finished")
    path = make_phantoms(folder, num_cases=8, num_testing=2, shape=(24, 24, 24), num_fold=2)
    settings = """
name: phantoms
algos: [segresnet, dints]
num_epochs: 2
batch_size: 1
num_steps_per_epoch: 2
num_epochs_per_validation: 2
precision: fp32
num_workers: 1
roi_size: [16, 16, 16]
overlap: 0
learning_rate: 0.003
segresnet: {init_filters: 8, blocks_down: [1, 1]}
dints: {channel_mul: 0.125, use_downsample: true}
"""
    path.write_text(path.read_text() + settings)
    assert run_command(["run", "--input", str(path)]) == 0
    return folder


@pytest.fixture
def without_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process make no report after their stages: it took a third of a small run."""
    monkeypatch.setattr("autoseg.report.page.make_report", lambda *_: None)


@pytest.fixture
def phantom_case(tmp_path: Path) -> Callable[..., Case]:
    """A function that writes one phantom into the test's folder and returns its Case.

    Its arguments: name, shape (stored axes), affine (4x4), seed, num_channels (files), classes, fold.
    """

    def make(
        name: str = "case",
        *,
        shape: tuple[int, int, int] = (28, 26, 24),
        affine: np.ndarray | None = None,
        seed: int = 0,
        num_channels: int = 1,
        classes: tuple[str, ...] = ("sphere", "box"),
        fold: int | None = None,
    ) -> Case:
        grid = Grid(shape=shape, affine=np.diag([1.0, 1.1, 1.4, 1.0]) if affine is None else affine)
        channels, label = make_phantom(grid, np.random.default_rng(seed), classes=classes, num_channels=num_channels)
        images = tuple(tmp_path / "images" / f"{name}_{c:04d}.nii.gz" for c in range(num_channels))
        for path, channel in zip(images, channels, strict=True):
            write_volume(path, channel, grid)
        answer = tmp_path / "labels" / f"{name}.nii.gz"
        write_volume(answer, label, grid)
        return Case(name=name, images=images, label=answer, fold=fold)

    return make
