"""Dice, surface Dice and summaries, against MONAI and closed forms."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics.meandice import DiceMetric
from monai.metrics.surface_dice import compute_surface_dice

from autoseg.data.labels import LabelMap
from autoseg.data.phantoms import ellipsoid
from autoseg.errors import DataError
from autoseg.evaluation.metrics import dice_of_targets, dice_per_class, mean_score, summarise, to_plain
from autoseg.evaluation.surfaces import nsd

THREE = LabelMap(names=("a", "b", "c"), values=((1,), (2, 5), (9,)))
NESTED = LabelMap(names=("whole", "core", "rest"), values=((1, 2, 4), (2, 4), (7,)), sigmoid=True)
IGNORING = LabelMap(names=("a", "b"), values=((1,), (2,)), ignore_label=255)
WIDE = LabelMap(names=("a", "b"), values=((60000,), (1234, 65000)), ignore_label=65534)


def volumes(label_map: LabelMap, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    values = sorted(label_map.known_values)
    pred, label = rng.choice(values, (2, 6, 7, 5)).astype(label_map.dtype)
    pred[pred == label_map.ignore_label] = 0
    return pred, label


def same(found: list[float], wanted: list[float]) -> None:
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("label_map", [THREE, NESTED], ids=["classes", "regions"])
@pytest.mark.parametrize("seed", range(3))
def test_dice_equals_monai(label_map: LabelMap, seed: int) -> None:
    pred, label = volumes(label_map, seed)
    metric = DiceMetric(include_background=True, reduction="none")
    hot = [torch.from_numpy(np.stack(label_map.masks(v)))[None].float() for v in (pred, label)]
    wanted = metric(hot[0], hot[1])[0].tolist()
    same(dice_per_class(pred, label, label_map), wanted)
    same(dice_of_targets(label_map.encode(pred), label_map.encode(label), label_map), wanted)


@settings(max_examples=30)
@given(seed=st.integers(0, 999), which=st.sampled_from([THREE, NESTED, IGNORING, WIDE]))
def test_counting_equals_masks(seed: int, which: LabelMap) -> None:
    pred, label = volumes(which, seed)
    counted = label != which.ignore_label
    wanted = []
    for values in which.values:
        p, t = np.isin(pred, values) & counted, np.isin(label, values) & counted
        wanted.append(2 * (p & t).sum() / (p.sum() + t.sum()) if p.any() or t.any() else math.nan)
    same(dice_per_class(pred, label, which), wanted)
    same(dice_of_targets(which.encode(pred), which.encode(label), which), wanted)


def test_a_class_in_neither_is_not_counted_and_in_one_scores_zero() -> None:
    pred, label = np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)
    pred[0], label[1] = 1, 9
    assert str(dice_per_class(pred, label, THREE)) == "[0.0, nan, 0.0]"
    assert str(dice_of_targets(THREE.encode(pred), THREE.encode(label), THREE)) == "[0.0, nan, 0.0]"


def test_classes_that_were_not_annotated_do_not_count() -> None:
    pred, label = volumes(THREE, 0)
    every = dice_per_class(pred, label, THREE)
    assert str(dice_per_class(pred, label, THREE, annotated=["b"])) == str([math.nan, every[1], math.nan])
    assert str(dice_of_targets(THREE.encode(pred), THREE.encode(label), THREE, annotated=["b"])[::2]) == "[nan, nan]"


def test_ignored_voxels_do_not_count() -> None:
    label = np.array([1, 1, 255, 255, 0, 2], np.uint8).reshape(6, 1, 1)
    pred = np.array([1, 0, 1, 2, 1, 2], np.uint8).reshape(6, 1, 1)
    same(dice_per_class(pred, label, IGNORING), [0.5, 1.0])


def test_shapes_that_differ_are_an_error() -> None:
    with pytest.raises(DataError, match=r"the prediction is \(1, 2, 3\), the label \(1, 2, 4\)"):
        dice_per_class(np.zeros((1, 2, 3), np.uint8), np.zeros((1, 2, 4), np.uint8), THREE)


# -- surfaces


def box(shape: tuple[int, int, int], *slices: slice) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[slices] = True
    return mask


def test_nsd_rules_for_empty_masks() -> None:
    full, none = box((8, 8, 8), slice(2, 5)), np.zeros((8, 8, 8), bool)
    assert math.isnan(nsd(none, none, (1, 1, 1), 1))
    assert nsd(full, none, (1, 1, 1), 100) == 0
    assert nsd(none, full, (1, 1, 1), 100) == 0
    assert nsd(full, full, (1, 1, 1), 0) == 1


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 2.0, 3.0)])
def test_nsd_of_a_shifted_plate_steps_at_the_shift(spacing) -> None:
    """A plate across the volume, moved by 2 voxels along X: its faces are 2 voxels apart."""
    pred = box((30, 60, 60), slice(10, 14), slice(1, 59), slice(1, 59))
    label = np.roll(pred, 2, axis=0)
    assert nsd(pred, label, spacing, 2 * spacing[0] + 0.01) == 1
    assert nsd(pred, label, spacing, 2 * spacing[0] - 0.01) < 0.2  # the rim alone


def test_nsd_of_spheres_one_inside_the_other() -> None:
    small, large = (ellipsoid((60, 60, 60), (30, 30, 30), (r, r, r)) for r in (15, 20))
    assert nsd(small, large, (1, 1, 1), 3.0) < 0.02
    assert nsd(small, large, (1, 1, 1), 6.0) == 1


def test_nsd_equals_monai_on_the_whole_volume() -> None:
    rng = np.random.default_rng(0)
    pred, label = (ellipsoid((24, 30, 20), rng.uniform(9, 12, 3), rng.uniform(4, 7, 3)) for _ in range(2))
    masks = [torch.from_numpy(m)[None, None] for m in (pred, label)]
    wanted = compute_surface_dice(
        masks[0], masks[1], [1.5], include_background=True, spacing=[0.8, 1.0, 2.0], use_subvoxels=True
    )
    assert nsd(pred, label, (0.8, 1.0, 2.0), 1.5) == pytest.approx(float(wanted[0, 0]), abs=1e-6)


def test_nsd_at_the_volumes_border_counts_the_whole_surface() -> None:
    pred, label = box((10, 10, 10), slice(0, 4)), box((10, 10, 10), slice(0, 6))
    inner = [np.pad(m, 5) for m in (pred, label)]
    assert nsd(pred, label, (1, 1, 1), 1) == pytest.approx(nsd(*inner, (1, 1, 1), 1))


# -- summaries


def test_summary_of_known_figures() -> None:
    nan = math.nan
    scores = [[0.5, 1.0, nan], [0.7, nan, nan], [0.9, 0.0, nan], [nan, 0.5, nan]]
    found = summarise(scores, ["a", "b", "c"])
    a, b, c = found.classes
    assert (a.num, b.num, c.num, found.num_cases) == (3, 3, 0, 4)
    same([a.mean, a.std, a.median, a.q25, a.q75], [0.7, np.std([0.5, 0.7, 0.9]), 0.7, 0.6, 0.8])
    same([b.mean, b.median], [0.5, 0.5])
    assert math.isnan(c.mean)
    assert found.mean == pytest.approx(0.6)
    assert mean_score(scores) == pytest.approx(found.mean)
    assert a.low < a.mean < a.high
    assert found == summarise(scores, ["a", "b", "c"]) or math.isnan(c.mean)
    plain = found.to_json()
    assert json.loads(json.dumps(plain, allow_nan=False))["classes"][2]["mean"] is None


def test_a_summary_counts_cases_and_patients_of_which_any_class_counts() -> None:
    nan = math.nan
    scores = [[0.5, nan], [0.7, nan], [nan, nan], [nan, 0.5], [nan, nan]]
    found = summarise(scores, ["a", "b"], patients=["p", "p", "q", None, None])
    assert (found.num_cases, found.num_patients) == (3, 2)
    nothing = summarise([[nan, nan]] * 3, ["a", "b"])
    assert (nothing.num_cases, nothing.num_patients) == (0, 0)


def test_summary_without_cases() -> None:
    found = summarise([], ["a"])
    assert found.num_cases == 0
    assert math.isnan(found.mean)
    assert math.isnan(mean_score([]))
    assert math.isnan(mean_score([[math.nan]]))


def test_interval_has_the_width_of_theory() -> None:
    values = np.random.default_rng(0).normal(0.8, 0.1, (400, 1)).tolist()
    found = summarise(values, ["a"])
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.1 / 20, rel=0.15)


def test_plain_data() -> None:
    assert to_plain({"a": (1, math.nan, 0.12345678)}) == {"a": [1, None, 0.123457]}
