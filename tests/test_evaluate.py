"""What `autoseg evaluate` tells of a folder; and surface Dice against a computation of its own."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from monai.metrics.utils import create_table_neighbour_code_to_surface_area
from scipy import ndimage

from autoseg.cli.main import run_command
from autoseg.data.grid import Grid
from autoseg.data.phantoms import ellipsoid
from autoseg.data.volumes import write_volume
from autoseg.evaluation.flare23 import LEAST_DICE, TOLERANCES_MM, TUBES, flare23_scores
from autoseg.evaluation.surfaces import nsd

SHAPE = (24, 20, 16)
SPACINGS = ((1.0, 1.0, 1.0), (0.71, 1.13, 2.37))


# -- surfaces


def surface_dice(pred: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...], tolerance_mm: float) -> float:
    """As DeepMind's surface-distance has it, which the challenge uses; here in NumPy and SciPy.

    The surface runs between the centres of voxels: each cube of 8 of them is a code of 8 bits, and has the area of the
    triangles that part those inside from those outside. Distances are between cubes. The table of areas, 256 of them
    for unit cubes, is the one thing that is not computed here: MONAI carries DeepMind's.
    """
    areas = create_table_neighbour_code_to_surface_area(spacing)[0].numpy()
    bits = np.array([[[128, 64], [32, 16]], [[8, 4], [2, 1]]])
    codes = [ndimage.correlate(np.pad(m, 1).astype(np.uint8), bits, mode="constant") for m in (pred, truth)]
    surfaces = [(c > 0) & (c < 255) for c in codes]
    away = [ndimage.distance_transform_edt(~s, sampling=spacing) for s in surfaces]
    near = [s & (a <= tolerance_mm) for s, a in zip(surfaces, reversed(away), strict=True)]
    total, close = (sum(areas[c[m]].sum() for c, m in zip(codes, masks, strict=True)) for masks in (surfaces, near))
    return float(close / total)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("seed", range(3))
def test_surface_dice_is_deepminds(spacing: tuple[float, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    pred, truth = (ellipsoid(SHAPE, rng.uniform(8, 11, 3), rng.uniform(4, 7, 3)) for _ in range(2))
    pred &= rng.random(SHAPE) < 0.95  # with holes
    found = [nsd(pred, truth, spacing, tolerance) for tolerance in (0.5, 1.0, 2.0)]
    assert 0 < found[0] < found[1] < found[2]
    expected = [surface_dice(pred, truth, spacing, tolerance) for tolerance in (0.5, 1.0, 2.0)]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_challenges_surface_scores(spacing: tuple[float, ...]) -> None:
    """Each class with its tolerance, tubes in the truth's slices less the last, nothing where volumes hardly meet."""
    rng = np.random.default_rng(0)
    truth, pred = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    for value in rng.permutation(np.arange(1, 15)):
        corner = [int(rng.integers(2, s - 9)) for s in SHAPE]
        size, shift = rng.integers(4, 8, 3), rng.integers(-2, 3, 3)
        truth[tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))] = value
        pred[tuple(slice(c + d, c + d + s) for c, d, s in zip(corner, shift, size, strict=True))] = value
    expected = []
    for value, tolerance_mm in enumerate(TOLERANCES_MM.values(), start=1):
        t, p = truth == value, pred == value
        if value in TUBES and t.any():
            slices = np.flatnonzero(t.any(axis=(0, 1)))
            t, p = t[..., slices[0] : slices[-1]], p[..., slices[0] : slices[-1]]
        if not t.any():
            expected.append(float(not p.any()))
            continue
        dice = 2 * (t & p).sum() / (t.sum() + p.sum())
        expected.append(surface_dice(p, t, spacing, tolerance_mm) if dice >= LEAST_DICE else 0.0)
    grid = Grid(shape=SHAPE, affine=np.diag([*spacing, 1.0]))
    found = flare23_scores(pred, truth, grid)[1]
    assert sum(0 < v < 1 for v in expected) >= 3, "too easy a case"
    np.testing.assert_allclose(found, expected, atol=1e-4)


# -- the table of the challenge


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Labels of three cases; of the last one the prediction is missing, in one the tumor is."""
    grid = Grid(shape=SHAPE, affine=np.eye(4))
    for name in ("a", "b", "c"):
        label = np.zeros(SHAPE, np.uint8)
        label[2:10, 2:10, 2:10] = 1
        label[12:18, 2:8, 2:8] = 14
        write_volume(tmp_path / "labels" / f"{name}.nii.gz", label, grid)
        if name == "b":
            label[label == 14] = 0
        if name != "c":
            write_volume(tmp_path / "preds" / f"{name}.nii.gz", label, grid)
    return tmp_path


def test_the_challenges_table_tells_organs_and_tumor_apart(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "--predictions", str(folders / "preds"), "--labels", str(folders / "labels")]
    assert run_command([*words, "--scoring", "flare23", "--output", str(folders / "scores.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [line.rsplit(maxsplit=7) for line in lines[2:-1]]
    organs = [name for name in TOLERANCES_MM if name != "tumor"]
    assert [row[0] for row in table] == [*organs, "organs", "tumor", "mean"]
    # Of 12 organs that nobody has each scores 1; the liver 1, 1 and 0; the tumor 1, 0 and 0.
    dice = {row[0]: float(row[1]) for row in table}
    assert dice["organs"] == pytest.approx((12 + 2 / 3) / 13, abs=1e-4)
    assert dice["tumor"] == pytest.approx(1 / 3, abs=1e-4)
    assert dice["mean"] == pytest.approx((12 + 1) / 14, abs=1e-4)
    # The case that was not predicted scores 1 in the organs that it does not have.
    assert lines[-1] == "No prediction, scored as an empty one: c.nii.gz"
    found = json.loads((folders / "scores.json").read_text())
    assert found["scoring"] == "flare23"
    assert found["cases"]["c"]["dice"] == [0.0, *[1.0] * 12, 0.0]
    means = {name: group["dice"]["mean"] for name, group in found["groups"].items()}
    assert means == {name: pytest.approx(dice[name], abs=1e-4) for name in ("organs", "tumor")}


def test_other_scores_have_no_groups(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "--predictions", str(folders / "preds"), "--labels", str(folders / "labels")]
    assert run_command([*words, "--output", str(folders / "scores.json")]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:-1]] == ["1", "14", "mean"]
    found = json.loads((folders / "scores.json").read_text())
    assert (found["scoring"], found["groups"]) == ("autoseg", {})
    assert not math.isnan(found["dice"]["mean"])


def test_the_table_with_a_tolerance_per_class_equals_an_oracle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shifted case, one that lacks a class, one without a prediction, one with a class that its label lacks."""
    spacing = SPACINGS[1]
    grid = Grid(shape=SHAPE, affine=np.diag([-spacing[0], *spacing[1:], 1.0]))
    cases = {}
    for name in ("a", "b", "c", "d"):
        label = np.zeros(SHAPE, np.uint8)
        label[2:10, 2:10, 2:10] = 1
        label[12:18, 2:8, 2:8] = 2
        pred = np.roll(label, 2, axis=0)
        if name == "b":
            pred[pred == 2] = 0
        if name == "d":
            label[label == 2] = 0
        cases[name] = label, np.zeros_like(label) if name == "c" else pred
        write_volume(tmp_path / "labels" / f"{name}.nii.gz", label, grid)
        if name != "c":
            write_volume(tmp_path / "preds" / f"{name}.nii.gz", pred, grid)
    words = ["evaluate", "--predictions", str(tmp_path / "preds"), "--labels", str(tmp_path / "labels")]
    words += ["--classes", "liver,tumor", "--surface_tolerance_mm", "liver=1,tumor=4", "--lesions"]
    assert run_command([*words, "--output", str(tmp_path / "scores.json")]) == 0
    diagonal = math.dist((0, 0, 0), np.multiply(SHAPE, spacing))
    found = json.loads((tmp_path / "scores.json").read_text())["cases"]
    for name, (label, pred) in cases.items():
        for i, tolerance_mm in enumerate((1, 4)):
            p, t = pred == i + 1, label == i + 1
            is_lost = not p.any() or not t.any()
            expected = {
                "dice": 2 * (p & t).sum() / (p.sum() + t.sum()),
                "nsd": 0 if is_lost else surface_dice(p, t, spacing, tolerance_mm),
                "hd95": diagonal if is_lost else 2 * spacing[0],
                "volume_error": abs(int(p.sum()) - int(t.sum())) / t.sum() if t.any() else None,
                "lesion_f1": 0 if is_lost else 1,
                "lesion_false_healthy": None if t.any() else 1,
            }
            assert {m: found[name][m][i] for m in expected} == pytest.approx(expected, abs=1e-5), (name, i)
    table = capsys.readouterr().out.splitlines()
    assert table[3].split()[0] == "tumor"
    assert table[3].split()[-1] == "4"
    assert "n is that of dice; of volume_error: tumor 3" in table
    assert "n is that of lesion_f1; of lesion_false_healthy: liver 0, tumor 1, mean 1" in table
