"""The metrics against oracles by brute force, their empty sets, and lesions."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from scipy import ndimage

from autoseg.config.settings import EnsembleSettings, SelectBy
from autoseg.data.datalists.cases import Case
from autoseg.data.grid import Grid
from autoseg.data.labels import LabelMap
from autoseg.data.volumes import write_volume
from autoseg.ensemble.cleaning import choose_rules
from autoseg.ensemble.combine import CaseScore, Choosing
from autoseg.ensemble.labels import OutOfFoldLabels
from autoseg.ensemble.optimism import speaking_for
from autoseg.errors import ConfigError, DataError
from autoseg.evaluation.lesions import lesions_of
from autoseg.evaluation.metrics import dice_per_class, mean_score
from autoseg.evaluation.scores import METRICS, Comparison, metric_named, score_case
from autoseg.evaluation.tolerances import parse_tolerance, words_of
from autoseg.inference.postprocess import ClassRule
from autoseg.workspace.files import write_json
from autoseg.workspace.workspace import Workspace

ONE = LabelMap(names=("a",), values=((1,),))
TWO = LabelMap(names=("a", "b"), values=((1,), (2, 3)), ignore_label=255)
NUM_MASKS = 200


def blobs(rng: np.random.Generator, shape: tuple[int, ...], level: float) -> np.ndarray:
    """A random mask of round parts."""
    return ndimage.gaussian_filter(rng.standard_normal(shape), 1.2) > level


def pair(seed: int) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """A label with some parts, a prediction that shares some of them, and a spacing."""
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(8, 16, 3))
    label = blobs(rng, shape, rng.uniform(0.1, 0.3))
    pred = np.roll(label, 1, axis=int(rng.integers(3))) ^ (blobs(rng, shape, 0.3) & (rng.random(shape) < 0.7))
    x, y, z = rng.choice([0.7, 1.0, 1.5, 3.0], 3)
    return pred, label, (float(x), float(y), float(z))


def scores(
    pred: np.ndarray, label: np.ndarray, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0), tolerance: float = 2.0
) -> dict[str, float]:
    case = Comparison(
        pred=pred.astype(np.uint8), label=label.astype(np.uint8), label_map=ONE, spacing_mm=spacing,
        tolerance_mm=tolerance,
    )  # fmt: skip
    return {name: values[0] for name, values in score_case(case).items()}


# -- oracles


def surface_pieces(mask: np.ndarray, spacing: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Corners (N, 3) in mm of the cubes that a surface goes through, and the area in each, piece by piece."""
    from monai.metrics.utils import create_table_neighbour_code_to_surface_area

    table, kernel = create_table_neighbour_code_to_surface_area(spacing)
    bits = kernel.numpy().reshape(2, 2, 2).astype(int)
    padded = np.pad(mask, 1)
    places, areas = [], []
    for corner in np.ndindex(*(n + 1 for n in mask.shape)):
        x, y, z = corner
        cube = padded[x : x + 2, y : y + 2, z : z + 2]
        if cube.any() and not cube.all():
            places.append(np.array(corner) * spacing)
            areas.append(float(table[int((cube * bits).sum())]))
    return np.array(places), np.array(areas)


def brute_force_surfaces(
    pred: np.ndarray, label: np.ndarray, spacing: tuple[float, ...], tolerance: float
) -> tuple[float, float, float]:
    """Surface Dice, 95 % Hausdorff and average distance, from every pair of pieces."""
    (p, area_p), (t, area_t) = surface_pieces(pred, spacing), surface_pieces(label, spacing)
    away = np.sqrt(((p[:, None] - t[None]) ** 2).sum(axis=2))
    to_label, to_pred = away.min(axis=1), away.min(axis=0)
    near = area_p[to_label <= tolerance].sum() + area_t[to_pred <= tolerance].sum()
    total = area_p.sum() + area_t.sum()
    ends = []
    for distance, area in ((to_label, area_p), (to_pred, area_t)):
        order = np.argsort(distance, kind="stable")
        share, reached = 0.0, distance.max()
        for i in order:
            share += area[i] / area.sum()
            if share >= 0.95 - 1e-12:
                reached = distance[i]
                break
        ends.append(reached)
    return near / total, max(ends), ((to_label * area_p).sum() + (to_pred * area_t).sum()) / total


def brute_force_lesions(pred: np.ndarray, label: np.ndarray) -> tuple[float, float, int, float]:
    """F1, sensitivity, false lesions and panoptic quality by comparing all parts with all."""
    near = np.ones((3, 3, 3))
    parts = []
    for mask in (pred, label):
        numbered, num = ndimage.label(mask, near)
        parts.append([numbered == i + 1 for i in range(num)])
    ious = {
        (i, j): (p & t).sum() / (p | t).sum() for i, p in enumerate(parts[0]) for j, t in enumerate(parts[1])
    }  # fmt: skip
    matched: dict[int, tuple[int, float]] = {}
    for (i, j), iou in sorted(ious.items(), key=lambda item: -item[1]):
        if iou >= 0.1 and j not in matched and i not in [k for k, _ in matched.values()]:
            matched[j] = (i, iou)
    mean_num = (len(parts[0]) + len(parts[1])) / 2
    quality = sum(iou for iou in ious.values() if iou > 0.5) / mean_num
    return len(matched) / mean_num, len(matched) / len(parts[1]), len(parts[0]) - len(matched), quality


@pytest.mark.parametrize("first", range(0, NUM_MASKS, 50))
def test_200_random_masks_have_the_scores_of_brute_force(first: int) -> None:
    for seed in range(first, first + 50):
        pred, label, spacing = pair(seed)
        found = scores(pred, label, spacing, tolerance=1.2)
        names = ("nsd", "hd95", "asd")
        assert [found[n] for n in names] == pytest.approx(brute_force_surfaces(pred, label, spacing, 1.2), abs=1e-6)
        names = ("lesion_f1", "lesion_sensitivity", "lesion_false", "panoptic_quality")
        assert [found[n] for n in names] == pytest.approx(brute_force_lesions(pred, label), abs=1e-9)
        assert found["dice"] == pytest.approx(2 * (pred & label).sum() / (pred.sum() + label.sum()))
        assert found["volume_error"] == pytest.approx(abs(pred.sum() / label.sum() - 1))


# -- closed forms


def test_a_shifted_box_has_its_shift_for_a_distance() -> None:
    label = np.zeros((20, 20, 20), bool)
    label[4:12, 4:12, 4:12] = True
    found = scores(np.roll(label, 3, axis=0), label, (2.0, 1.0, 1.0))
    assert found["hd95"] == 6.0
    assert 0 < found["asd"] < 6.0
    assert found["volume_error"] == 0
    assert scores(label, label) == {
        "dice": 1, "nsd": 1, "hd95": 0, "asd": 0, "volume_error": 0, "lesion_f1": 1, "lesion_sensitivity": 1,
        "lesion_sensitivity_small": pytest.approx(math.nan, nan_ok=True),
        "lesion_sensitivity_medium": 1, "lesion_sensitivity_large": pytest.approx(math.nan, nan_ok=True),
        "lesion_false": 0, "lesion_false_healthy": pytest.approx(math.nan, nan_ok=True), "panoptic_quality": 1,
    }  # fmt: skip


def test_empty_masks_follow_their_conventions() -> None:
    some, none = np.zeros((3, 4, 12), bool), np.zeros((3, 4, 12), bool)
    some[1, 1, 1] = some[1, 1, 8] = True
    diagonal = math.sqrt(9 + 16 + 144)
    missed, invented, both = scores(none, some), scores(some, none), scores(none, none)
    nan = math.nan
    expected = {
        "dice": (0, 0, nan), "nsd": (0, 0, nan), "hd95": (diagonal, diagonal, nan), "asd": (diagonal, diagonal, nan),
        "volume_error": (1, nan, nan), "lesion_f1": (0, 0, nan), "lesion_sensitivity": (0, nan, nan),
        "lesion_sensitivity_small": (0, nan, nan), "lesion_sensitivity_medium": (nan, nan, nan),
        "lesion_sensitivity_large": (nan, nan, nan), "lesion_false": (0, nan, nan),
        "lesion_false_healthy": (nan, 2, 0), "panoptic_quality": (0, 0, nan),
    }  # fmt: skip
    assert set(expected) == {metric.name for metric in METRICS}
    for name, values in expected.items():
        assert (missed[name], invented[name], both[name]) == pytest.approx(values, nan_ok=True), name


def test_cropping_changes_nothing_and_ignored_voxels_and_other_classes_do_not_count() -> None:
    rng = np.random.default_rng(4)
    label = rng.choice([0, 1, 2, 3, 255], (9, 10, 11)).astype(np.uint8)
    pred = rng.choice([0, 1, 2, 3], label.shape).astype(np.uint8)
    case = Comparison(pred=pred, label=label, label_map=TWO, spacing_mm=(1.0, 1.0, 2.0), annotated=["b"])
    found = score_case(case)
    counted = label != 255
    direct = scores(np.isin(pred, (2, 3)) & counted, np.isin(label, (2, 3)), (1.0, 1.0, 2.0))
    for name, values in found.items():
        assert math.isnan(values[0])
        assert values[1] == pytest.approx(direct[name], nan_ok=True)
    with pytest.raises(DataError, match="Expected one grid"):
        score_case(Comparison(pred=pred, label=label[1:], label_map=TWO, spacing_mm=(1.0, 1.0, 1.0)))


def test_each_class_has_its_own_tolerance() -> None:
    label, pred = np.zeros((20, 8, 8), np.uint8), np.zeros((20, 8, 8), np.uint8)
    label[2:6, 2:6, 2:6], pred[4:8, 2:6, 2:6] = 1, 1
    label[10:14, 2:6, 2:6], pred[12:16, 2:6, 2:6] = 2, 2
    both = LabelMap(names=("a", "b"), values=((1,), (2,)))
    found = [
        score_case(Comparison(pred=pred, label=label, label_map=both, spacing_mm=(1, 1, 1), tolerance_mm=t))["nsd"]
        for t in (1.0, 2.0, {"a": 1.0})
    ]
    assert found[0][0] == found[0][1] < 1
    assert found[1] == [1, 1]
    assert found[2] == [found[0][0], 1]  # b has the usual 2 mm


# -- lesions


def test_one_prediction_finds_one_lesion_and_the_best_match_wins() -> None:
    label = np.zeros((30, 6, 6), bool)
    label[2:6, 1:4, 1:4] = label[8:12, 1:4, 1:4] = True
    blob = np.zeros_like(label)
    blob[2:12, 1:4, 1:4] = True  # covers both
    matched = lesions_of(blob, label, (1.0, 1.0, 1.0))
    assert (matched.f1(), matched.sensitivity(), matched.num_false) == (pytest.approx(2 / 3), 0.5, 0)
    assert matched.panoptic_quality() == 0  # 4 / 10 of the union is not a half
    crumbs = label.copy()
    crumbs[20, 1, 1] = True
    assert lesions_of(crumbs, label, (1.0, 1.0, 1.0)).num_false == 1


def test_sensitivity_by_size_goes_by_the_volume_in_mm() -> None:
    label, pred = np.zeros((30, 12, 12), bool), np.zeros((30, 12, 12), bool)
    label[1, 1, 1] = True  # 1.2 mm
    label[4:12, 1:9, 1:9] = pred[4:12, 1:9, 1:9] = True  # 512 voxels: 9.9 mm
    found = scores(pred, label)
    assert (found["lesion_sensitivity_small"], found["lesion_sensitivity_medium"]) == (0, 1)
    assert math.isnan(found["lesion_sensitivity_large"])
    assert scores(pred, label, (2.0, 1.0, 1.0))["lesion_sensitivity_large"] == 1
    assert found["lesion_sensitivity"] == 0.5


# -- reading


def test_tolerances_are_read() -> None:
    assert parse_tolerance(None) == 2.0
    assert parse_tolerance("3.5") == 3.5
    assert parse_tolerance("left kidney=5, tumor=1") == {"left kidney": 5.0, "tumor": 1.0}
    for wrong in ("wide", "-1", "=2", "1,2", "a=1,2", "inf", "a="):
        with pytest.raises(ConfigError, match="Expected millimetres such as 2"):
            parse_tolerance(wrong)
    with pytest.raises(ConfigError, match="a stands twice"):
        parse_tolerance("a=1,b=2,a=3")
    assert words_of({"a": 1.0, "b": 2.5}) == "a 1 mm, b 2.5 mm"
    assert metric_named("nsd").heading(2.0) == "nsd 2 mm"
    assert metric_named("nsd").heading({"a": 1.0}) == "nsd"


# -- deciding


def lesion_study(folder: Path, num: int, seed: int) -> tuple[Workspace, list[CaseScore], dict[str, Case]]:
    """Out-of-fold labels of two networks on a phantom with one large and many small lesions.

    `whole` draws the large one to the voxel and misses the small ones; `spots` finds all, draws them one voxel too
    small on a side, and adds a speck that is none.
    """
    rng = np.random.default_rng(seed)
    workspace, scored, cases = Workspace(folder), [], {}
    grid = Grid(shape=(40, 30, 30), affine=np.eye(4))
    for i in range(num):
        label = np.zeros((40, 30, 30), np.uint8)
        label[3:18, 4:19, 4:19] = 1
        whole = label.copy()
        spots = label.copy()
        spots[3:5] = 0
        for x in (22, 28, 34):
            y, z = rng.integers(2, 20, 2)
            label[x : x + 4, y : y + 4, z : z + 4] = 1
            spots[x : x + 3, y : y + 4, z : z + 4] = 1
        spots[21 + int(rng.integers(0, 2)), 27, 27] = 1
        name = f"case_{i}"
        case = Case(name=name, images=(folder / f"{name}.nii.gz",), label=folder / "labels" / f"{name}.nii.gz")
        dice = {}
        for algo, pred in (("whole", whole), ("spots", spots)):
            write_volume(workspace.out_of_fold / algo / f"{name}.nii.gz", pred, grid)
            dice[algo] = dice_per_class(pred, label, ONE)
        assert case.label is not None
        write_volume(case.label, label, grid)
        write_volume(case.images[0], label, grid)
        record = {"made_from": "", "fold": i % 2, "dice": dice, "cost": None}
        write_json(workspace.ensemble / "records" / f"{name}.json", record)
        cases[name] = case
        scored.append(CaseScore(name=name, fold=i % 2, dice=dice))
    return workspace, scored, cases


def decided(folder: Path, by: str, seed: int) -> tuple[str, tuple[ClassRule, ...], float]:
    """What is chosen by a metric on a study, and the lesion F1 of that on cases held out of it."""
    metric = metric_named(by)
    workspace, scored, cases = lesion_study(folder / by / "choose", 8, seed)
    labels = OutOfFoldLabels(workspace=workspace, label_map=ONE, tolerance_mm=2.0)
    how = EnsembleSettings.model_validate({"select_by": by})
    if by != "dice":
        selected = [
            {a: labels.scores((cases[c.name], a), (), [metric])[by] for a in c.dice} for c in scored
        ]  # fmt: skip
        scored = [replace(c, selected=s) for c, s in zip(scored, selected, strict=True)]
    choosing = Choosing(how=how, metric=metric, algos_by_fold={0: ("whole",), 1: ("whole",)}, costs=None)
    entrants = [
        candidate
        for algo in ("whole", "spots")
        for candidate in replace(choosing, algos_by_fold={0: (algo,), 1: (algo,)}).candidates(scored)
    ]
    chosen = choosing.choose(entrants).candidate
    rules = choose_rules(labels, speaking_for(chosen, scored, cases), (), metric)
    held_out, held_scored, held_cases = lesion_study(folder / by / "held out", 8, seed + 100)
    there = OutOfFoldLabels(workspace=held_out, label_map=ONE, tolerance_mm=2.0)
    f1 = metric_named("lesion_f1")
    values = there.mean_scores(speaking_for(chosen, held_scored, held_cases), rules, f1)
    return chosen.name, rules, mean_score([*values.values()])


def test_choosing_by_lesion_f1_changes_the_choice_and_gains_on_held_out_cases(tmp_path: Path) -> None:
    by_dice, by_lesions = decided(tmp_path, "dice", 0), decided(tmp_path, "lesion_f1", 0)
    assert (by_dice[0], by_lesions[0]) == ("whole", "spots")
    assert by_dice[1] == ()
    (rule,) = by_lesions[1]
    assert rule.min_mm3 == 10.0  # the speck goes, the small lesions stay
    assert rule.gain_low is not None
    assert rule.gain_low > 0
    assert by_dice[2] == pytest.approx(2 / 5)  # one of four lesions
    assert by_lesions[2] == 1.0


def test_settings_can_name_every_metric_that_decides() -> None:
    names = {metric.name for metric in METRICS if not metric.name.startswith("lesion_sensitivity_")}
    assert set(get_args(SelectBy)) == names
