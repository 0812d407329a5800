"""Changed images of held-out cases: what each change does, which cases are tried, and what is stored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from autoseg.cli.main import run_command
from autoseg.data.grid import Grid, Volume
from autoseg.ensemble import copies, robustness
from autoseg.ensemble.combine import CaseScore
from autoseg.ensemble.copies import StoredCopies
from autoseg.ensemble.corruptions import MOST_TRIED, USUAL, corrupt
from autoseg.ensemble.robustness import chosen_cases
from autoseg.evaluation.score_files import Robustness
from autoseg.workspace.stored import read_stored

RNG = np.random.default_rng


def ball(shape: tuple[int, int, int] = (32, 30, 28)) -> tuple[np.ndarray, np.ndarray]:
    """An image (1, X, Y, Z) of an off-centre ball at intensity 200 in 100, and its label."""
    away = np.indices(shape).T - np.array([22, 12, 14])
    label = ((away**2).sum(axis=-1).T <= 36).astype(np.uint8)
    return (100 + 100 * label[None]).astype(np.float32), label


def usual(kind: str, image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Image and label corrupted at the usual strength."""
    x, y, z = label.shape
    volume = Volume(array=image, grid=Grid(shape=(x, y, z), affine=np.eye(4)))
    copy, kept = corrupt(kind, volume, label, RNG(0), USUAL[kind])
    return copy.array, kept


def test_noise_is_five_percent_of_the_range() -> None:
    image, label = ball()
    noisy, same = usual("noise", image, label)
    assert same is label
    assert noisy.dtype == np.float32
    assert (noisy - image).std() == pytest.approx(0.05 * 100, rel=0.02)


def test_a_bias_field_is_smooth_and_keeps_the_lowest_value() -> None:
    image, label = ball()
    changed, _ = usual("bias field", image, label)
    ratio = (changed - 100)[0][label > 0] / 100
    assert ratio.min() >= 1 / 1.3 - 1e-5
    assert ratio.max() <= 1.3 + 1e-5
    assert np.ptp(ratio) > 0.05
    np.testing.assert_allclose(changed[0][label == 0], 100, rtol=1e-5)
    inside = np.diff((changed[0] - 100) * label / 100, axis=0)[label[1:] * label[:-1] > 0]
    assert np.abs(inside).max() < 0.1


def test_fewer_voxels_blur_and_keep_the_shape() -> None:
    image, label = ball((31, 30, 27))
    changed, same = usual("resampling", image, label)
    assert changed.shape == image.shape
    assert same is label
    assert changed.mean() == pytest.approx(image.mean(), rel=0.02)
    edge = np.abs(np.diff(image[0], axis=0)) > 0
    assert np.abs(np.diff(changed[0], axis=0))[edge].max() < 100


def test_image_and_label_turn_alike() -> None:
    image, label = ball()
    changed, turned = usual("rotation", image, label)
    assert not np.array_equal(turned, label)
    assert turned.sum() == pytest.approx(label.sum(), rel=0.05)
    bright = changed[0] > 150
    assert 2 * (bright & (turned > 0)).sum() / (bright.sum() + (turned > 0).sum()) > 0.97


def test_cases_are_spread_from_worst_to_best_as_time_allows() -> None:
    cases = [CaseScore(name=f"c{i:02d}", fold=0, dice={"a": [i / 40]}) for i in range(40)]
    all_ten = chosen_cases(cases, 1e9, 1.0)
    assert len(all_ten) == MOST_TRIED
    assert (all_ten[0], all_ten[-1]) == ("c00", "c39")
    assert len(chosen_cases(cases, 16.5, 1.0)) == 4  # of 4 predictions each
    assert chosen_cases(cases, 11.5, 1.0) == []
    assert chosen_cases([], 1e9, 1.0) == []


def test_the_stage_measures_it_once_and_the_report_shows_it(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(finished_run, tmp_path / "run"))
    path = folder / "work_dir" / "ensemble" / "robustness.json"
    assert not path.exists()  # four steps of training pay for nothing
    monkeypatch.setattr(copies, "SHARE", 1e6)
    monkeypatch.setattr(copies, "TRYING_SHARE", 1e6)  # nothing is left to spoilt copies
    monkeypatch.setattr(robustness, "MOST_TRIED", 3)
    words = ["ensemble", "--input", str(folder / "input.yaml")]
    assert run_command(words) == 0
    stored = read_stored(path, Robustness)
    scores = json.loads((folder / "work_dir" / "ensemble" / "scores.json").read_text())
    assert len(stored.cases) == 3
    assert [change.name for change in stored.changes] == [*USUAL]
    # As they are, the images are not predicted again.
    expected = np.mean([np.nanmean(np.array(scores["ensemble"][name]["dice"], float)) for name in stored.cases])
    assert stored.dice == pytest.approx(expected, abs=1e-6)
    predicted = read_stored(path.with_name("spoilt.json"), StoredCopies).copies.values()
    assert {(case, kind) for case in stored.cases for kind in USUAL} <= {(copy.case, copy.kind) for copy in predicted}
    assert any(change.difference != 0 for change in stored.changes)
    page = (folder / "work_dir" / "report.html").read_text()
    assert 'id="robustness"' in page
    assert "noise of 5 % of the range of intensities" in page
    before = path.stat().st_mtime_ns
    assert run_command(words) == 0
    assert path.stat().st_mtime_ns == before
    path.unlink()
    monkeypatch.setattr(copies, "corrupt", None)  # what was predicted is not predicted again
    assert run_command(words) == 0
    assert read_stored(path, Robustness) == stored
    assert run_command([*words, "--ensemble.robustness", "off"]) == 0
    assert not path.exists()
