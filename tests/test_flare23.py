"""`--scoring flare23`: each of the challenge's rules by a case made for it, and all of them against its algorithm."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from plans import GPU, make_fingerprint

from autoseg.algos.inputs import PlanInputs
from autoseg.algos.planner import make_plan
from autoseg.cli.arguments import parse
from autoseg.cli.commands import TAKES_SETTINGS, Commands
from autoseg.cli.main import run_command
from autoseg.config.load import load_settings
from autoseg.config.templates import recipe_values
from autoseg.data.datalists.datalist import read_datalist
from autoseg.data.grid import Grid
from autoseg.data.labels import LabelMap, check_classes, merge_left_right
from autoseg.data.volumes import write_volume
from autoseg.evaluation.flare23 import TOLERANCES_MM, flare23_scores
from autoseg.evaluation.surfaces import nsd

SHAPE = (24, 20, 16)
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""As the challenge's files are stored: slices go up."""
DOWN = np.diag([-1.0, -1.0, -2.0, 1.0])


def box(value: int, x: slice, y: slice, z: slice) -> np.ndarray:
    """A stored label with one box."""
    label = np.zeros(SHAPE, np.uint8)
    label[x, y, z] = value
    return label


def scores(pred: np.ndarray, truth: np.ndarray, affine: np.ndarray = LPS) -> tuple[list[float], list[float]]:
    """Of arrays as they are stored."""
    grid = Grid(shape=SHAPE, affine=affine)
    flips = tuple(slice(None, None, int(np.sign(affine[a, a]))) for a in range(3))
    return flare23_scores(pred[flips], truth[flips], grid)


BOX = (slice(4, 16), slice(4, 14), slice(3, 12))


def test_the_classes_and_their_tolerances() -> None:
    assert list(TOLERANCES_MM.values()) == [5, 3, 3, 5, 2, 2, 2, 2, 2, 3, 5, 7, 3, 2]


def test_in_neither_scores_one() -> None:
    assert scores(box(0, *BOX), box(0, *BOX)) == ([1.0] * 14, [1.0] * 14)


def test_predicted_and_not_there_scores_nothing() -> None:
    dice, surface = scores(box(9, *BOX), box(0, *BOX))
    assert (dice[8], surface[8], sum(dice), sum(surface)) == (0.0, 0.0, 13.0, 13.0)


def test_there_and_not_predicted_scores_nothing() -> None:
    dice, surface = scores(box(0, *BOX), box(9, *BOX))
    assert (dice[8], surface[8]) == (0.0, 0.0)


@pytest.mark.parametrize(("value", "is_tube"), [(5, True), (6, True), (10, True), (1, False), (13, False)])
def test_tubes_count_between_the_truths_first_and_last_slice(value: int, is_tube: bool) -> None:
    truth = box(value, *BOX)
    longer = box(value, *BOX[:2], slice(0, 16))
    dice, surface = scores(longer, truth)
    assert dice[value - 1] == (1.0 if is_tube else pytest.approx(2 * 9 / 25))
    assert surface[value - 1] == 1.0 or not is_tube


@pytest.mark.parametrize("affine", [LPS, DOWN])
def test_the_last_slice_of_a_tube_is_left_out(affine: np.ndarray) -> None:
    """The last as the file is stored, whichever way that goes."""
    truth = box(5, *BOX)
    without_last, without_first = truth.copy(), truth.copy()
    without_last[:, :, 11], without_first[:, :, 3] = 0, 0
    assert scores(without_last, truth, affine)[0][4] == 1.0
    assert scores(without_first, truth, affine)[0][4] == pytest.approx(2 * 7 / 15, abs=1e-4)


def test_a_tube_in_one_slice_leaves_nothing_to_score() -> None:
    truth = box(10, *BOX[:2], slice(3, 4))
    dice, surface = scores(truth, truth)
    assert math.isnan(dice[9])
    assert math.isnan(surface[9])


def test_surfaces_do_not_count_where_volumes_hardly_meet() -> None:
    # Two plates one voxel apart: the surfaces lie within the tolerance, the volumes do not meet.
    truth, pred = box(1, slice(4, 5), *BOX[1:]), box(1, slice(5, 6), *BOX[1:])
    assert nsd(pred == 1, truth == 1, (1.0, 1.0, 1.0), 5.0) == 1.0
    dice, surface = scores(pred, truth)
    assert (dice[0], surface[0]) == (0.0, 0.0)
    pred[4, 4:6, 3:12] = 1  # a little of it
    dice, surface = scores(pred, truth)
    assert 0.15 < dice[0] < 0.2
    assert surface[0] == 0.0
    pred[4, 4:8, 3:12] = 1
    assert scores(pred, truth)[1][0] == 1.0


@pytest.mark.parametrize(("value", "tolerance"), list(enumerate(TOLERANCES_MM.values(), start=1)))
def test_each_class_has_its_tolerance(value: int, tolerance: float) -> None:
    """A flat end that is off by the tolerance is right, off by a voxel more it is wrong."""
    truth = box(value, slice(2, 12), *BOX[1:])
    exact = box(value, slice(2, 12 + int(tolerance)), *BOX[1:])
    more = box(value, slice(2, 13 + int(tolerance)), *BOX[1:])
    assert scores(exact, truth)[1][value - 1] == 1.0
    assert scores(more, truth)[1][value - 1] < 1.0


def test_scores_have_four_digits() -> None:
    truth = box(1, *BOX)
    pred = truth.copy()
    pred[4:7, 4:7, 4:7] = 0
    dice, _ = scores(pred, truth)
    assert dice[0] == round(2 * (1080 - 27) / (2 * 1080 - 27), 4)


def reference(pred: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...]) -> list[tuple[float, float]]:
    """The challenge's way through a case, in words of our own and with our surface distances."""
    found = []
    for value, tolerance in enumerate(TOLERANCES_MM.values(), start=1):
        in_truth, in_pred = (truth == value).sum() > 0, (pred == value).sum() > 0
        if not in_truth:
            found.append((float(not in_pred), float(not in_pred)))
            continue
        lower, upper = 0, truth.shape[2]
        if value in (5, 6, 10):
            places = np.where(truth == value)[2]
            lower, upper = places.min(), places.max()
        t, p = truth[:, :, lower:upper] == value, pred[:, :, lower:upper] == value
        dice = 2 * (t & p).sum() / (t.sum() + p.sum()) if t.any() or p.any() else math.nan
        found.append((round(dice, 4), 0.0 if dice < 0.2 else round(nsd(p, t, spacing, tolerance), 4)))
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("affine", [LPS, DOWN])
def test_random_cases_are_scored_as_the_challenge_does(seed: int, affine: np.ndarray) -> None:
    rng = np.random.default_rng(seed)
    truth, pred = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    for value in rng.permutation(np.arange(1, 15)):
        x, y, z = (int(rng.integers(0, s - 6)) for s in SHAPE)
        size = rng.integers(2, 7, 3)
        if rng.random() < 0.85:
            truth[x : x + size[0], y : y + size[1], z : z + size[2]] = value
        dx, dy, dz = rng.integers(-1, 2, 3).clip(-min(x, y, z))
        if rng.random() < 0.85:
            pred[x + dx : x + dx + size[0], y + dy : y + dy + size[1], z + dz : z + dz + size[2]] = value
    expected = reference(pred, truth, (1.0, 1.0, abs(affine[2, 2])))
    dice, surface = scores(pred, truth, affine)
    np.testing.assert_array_equal(dice, [d for d, _ in expected])
    np.testing.assert_allclose(surface, [s for _, s in expected], atol=2e-4)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = Grid(shape=SHAPE, affine=LPS)
    for folder, value in (("labels", 1), ("preds", 1)):
        write_volume(tmp_path / folder / "a.nii.gz", box(value, *BOX)[::-1, ::-1], grid)
    words = ["evaluate", "--predictions", str(tmp_path / "preds"), "--labels", str(tmp_path / "labels")]
    assert run_command([*words, "--scoring", "flare23", "--output", str(tmp_path / "s.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:2] == ["liver", "1.0000"]
    assert lines[-2].split()[:2] == ["tumor", "1.0000"]
    assert json.loads((tmp_path / "s.json").read_text())["cases"]["a"]["nsd"] == [1.0] * 14
    assert run_command([*words, "--scoring", "flare23", "--classes", "liver"]) == 2
    assert capsys.readouterr().err == (
        "error: --classes: no effect together with --scoring flare23, which has its own. Leave it out.\n"
    )


EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "flare23"


def test_the_example_lists_the_cases_and_its_settings_are_valid(tmp_path: Path) -> None:
    grid = Grid(shape=SHAPE, affine=LPS)
    kinds = {"a": (1, 5), "b": (1, 14), "c": (14,), "d": (3, 13), "e": ()}
    for name, values in kinds.items():
        label = np.zeros(SHAPE, np.uint8)
        for i, value in enumerate(values):
            label[i * 4 : i * 4 + 3] = value
        write_volume(tmp_path / "flare23" / "labelsTr2200" / f"{name}.nii.gz", label, grid)
        write_volume(tmp_path / "flare23" / "imagesTr2200" / f"{name}_0000.nii.gz", label.astype(np.int16), grid)
    write_volume(tmp_path / "flare23" / "unlabeledTr1800" / "u_0000.nii.gz", label.astype(np.int16), grid)
    command = [sys.executable, str(EXAMPLE / "make_datalist.py"), "flare23"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {
        "cases by annotated classes": {"14": 1, "6": 2, "1": 2},
        "unlabeled": 1,
        "testing": 0,
    }
    listed = read_datalist(tmp_path / "datalist.json", tmp_path / "flare23")
    assert [len(c.annotated or ()) for c in listed.training] == [14, 6, 1, 6, 1]
    assert list(listed.labels) == list(range(1, 15))
    for name, strategy in (("input.yaml", "both"), ("input_paper.yaml", "two_stage")):
        shutil.copy(EXAMPLE / name, tmp_path / name)
        settings, _ = load_settings(tmp_path / name)
        assert (settings.strategy, settings.pseudolabel.exclude) == (strategy, ("tumor",))
        assert set(settings.pseudolabel.exclude) <= set(listed.labels.values())
        check_classes(settings.inference, listed.labels.values())


def test_a_case_gets_its_own_image(tmp_path: Path) -> None:
    grid = Grid(shape=SHAPE, affine=LPS)
    files = [f"labelsTr2200/{name}.nii.gz" for name in ("case_1", "case_10", "case_2")]
    files += ["imagesTr2200/case_10_0000.nii.gz", "imagesTr2200/case_2.nii.gz", "imagesVal/v_0000.nii.gz"]
    for file in files:
        write_volume(tmp_path / "flare23" / file, box(1, *BOX), grid)
    command = [sys.executable, str(EXAMPLE / "make_datalist.py"), "flare23"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "labelsTr2200/case_1.nii.gz: no image of that name" in done.stderr
    write_volume(tmp_path / "flare23" / "imagesTr2200" / "case_1_0000.nii.gz", box(1, *BOX), grid)
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    found = json.loads((tmp_path / "datalist.json").read_text())
    assert [Path(case["image"]).name for case in found["training"]] == [
        "case_1_0000.nii.gz", "case_10_0000.nii.gz", "case_2.nii.gz",
    ]  # fmt: skip
    assert found["testing"] == [{"image": "imagesVal/v_0000.nii.gz"}]


def test_the_papers_example_follows_the_recipe(tmp_path: Path) -> None:
    """The plan has every value of the recipe; none is written once more where it could come to differ."""
    shutil.copy(EXAMPLE / "input_paper.yaml", tmp_path / "input.yaml")
    (tmp_path / "datalist.json").write_text("{}")
    (tmp_path / "flare23").mkdir()
    settings, origins = load_settings(tmp_path / "input.yaml")
    recipe = recipe_values("segresnet", "flare23")
    assert (settings.recipe, settings.algos) == ("flare23", ("segresnet",))
    assert set(settings.hyper("segresnet")) == {"overlap"}
    named = [name.replace(" ", "_") for name in TOLERANCES_MM]
    label_map = LabelMap(names=tuple(named), values=tuple((i + 1,) for i in range(len(named))))
    inputs = PlanInputs(
        algo="segresnet", fold=0, num_train=1760, fingerprint=make_fingerprint(), label_map=merge_left_right(label_map),
        settings=settings, origins=origins, hardware=GPU,
    )  # fmt: skip
    plan, _ = make_plan(inputs)
    found = plan.model_dump(mode="json")
    found |= {f"network.{key}": value for key, value in plan.network.items()}
    found["normalize_mode"], found["intensity_bounds"] = plan.channels[0].mode, list(plan.channels[0].bounds or ())
    assert {key: found[key] for key in recipe} == {key: value for key, (value, _) in recipe.items()}
    assert (plan.network["norm"], plan.augment, plan.overlap) == ("BATCH", "axial", 0.625)
    assert plan.batch_size % settings.gpus_per_job == 0
    assert plan.num_outputs == 13  # section 2.5 of the paper: background, 11 organs, tumor


def test_the_commands_of_the_example_are_commands() -> None:
    lines = re.findall(r"^autoseg (.*)$", (EXAMPLE / "README.md").read_text(), flags=re.MULTILINE)
    assert len(lines) >= 8
    for line in lines:
        parse(Commands, TAKES_SETTINGS, line.split())
    folders = re.findall(r"(imagesVal|imagesTs|labelsVal|labelsTs)", (EXAMPLE / "README.md").read_text())
    assert set(folders) == {"imagesVal", "labelsVal"}, "what is predicted is what is scored"
