"""Cleaning of predicted labels against SciPy on whole volumes, and the choice by evidence."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
from scipy import ndimage

from autoseg.data import components
from autoseg.data.labels import LabelMap
from autoseg.evaluation.metrics import dice_per_class, mean_score
from autoseg.inference.postprocess import (
    SIZES_MM3,
    ClassRule,
    clean,
    longest_run,
    measure_parts,
    option_dice,
    options,
    propose,
)

TWO = LabelMap(names=("a", "b"), values=((3,), (7,)))
MM = (1.0, 2.0, 1.5)
FULL = np.ones((3, 3, 3))


def blobs(seed: int, shape=(24, 20, 22)) -> np.ndarray:
    """Label values of two classes in pieces of many sizes, with holes."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=shape), 1.3)
    labels = np.zeros(shape, np.uint8)
    labels[smooth > 0.07] = 3
    labels[smooth < -0.1] = 7
    return labels


def one_rule(labels: np.ndarray, **what: object) -> np.ndarray:
    found = labels.copy()
    clean(found, TWO, [ClassRule(name="b", **what)], MM)
    return found


@pytest.fixture(params=[1 << 22, 24 * 20 * 5], ids=["one slab", "slabs"])
def _slabs(request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(components, "SLAB_VOXELS", request.param)


@pytest.mark.usefixtures("_slabs")
@pytest.mark.parametrize("seed", range(3))
def test_components_against_scipy(seed: int) -> None:
    labels = blobs(seed)
    number, num = ndimage.label(labels == 7, FULL)
    sizes = np.bincount(number.ravel())[1:]
    assert num > 3
    wanted = labels.copy()
    wanted[(labels == 7) & (number != sizes.argmax() + 1)] = 0
    np.testing.assert_array_equal(one_rule(labels, largest=True), wanted)
    wanted = labels.copy()
    wanted[np.isin(number, np.flatnonzero(sizes * 3.0 < 30) + 1)] = 0
    np.testing.assert_array_equal(one_rule(labels, min_mm3=30.0), wanted)


@pytest.mark.usefixtures("_slabs")
@pytest.mark.parametrize("seed", range(3))
def test_holes_are_background_that_one_class_encloses(seed: int) -> None:
    labels = blobs(seed)
    labels[5:15, 5:15, 2:18] = 7
    labels[8:11, 8:10, 6:12] = 0  # a hole over several slabs
    labels[7, 7, 14:16] = 0  # a hole beside which the other class lies
    labels[7, 7, 16] = 3
    found = one_rule(labels, fill_holes=True)
    number, num = ndimage.label(labels == 0)
    wanted = labels.copy()
    for i in range(1, num + 1):
        hole = number == i
        around = ndimage.binary_dilation(hole) & ~hole
        padded = np.pad(hole, 1)[1:-1, 1:-1, 1:-1]
        at_border = any(padded.take(k, axis).any() for axis in range(3) for k in (0, -1))
        if not at_border and set(np.unique(labels[around])) == {7}:
            wanted[hole] = 7
    assert (wanted != labels).sum() >= 3 * 2 * 6
    np.testing.assert_array_equal(found, wanted)
    assert (found[7, 7, 14:16] == 0).all()


@pytest.mark.usefixtures("_slabs")
def test_the_box_of_a_label() -> None:
    labels = np.zeros((24, 20, 22), np.uint8)
    assert labels[components.box_of_label(labels)].size == 0
    clean(labels, TWO, [ClassRule(name="a", largest=True, slice_run=True, fill_holes=True)], MM)
    labels[3, 4, 5], labels[20, 7, 19] = 3, 7
    assert components.box_of_label(labels) == (slice(3, 21), slice(4, 8), slice(5, 20))


def test_the_longest_run_of_slices_and_too_few_voxels() -> None:
    labels = np.zeros((6, 6, 20), np.uint8)
    labels[2, 2, 1:4], labels[4, 4, 3:9], labels[1, 1, 12:15], labels[0, 0, 12] = 7, 7, 7, 3
    kept = one_rule(labels, slice_run=True)
    assert np.flatnonzero((kept == 7).any((0, 1))).tolist() == list(range(1, 9))
    assert (kept == 3).sum() == 1
    assert (one_rule(labels, min_voxels=12) == labels).all()
    assert not (one_rule(labels, min_voxels=13) == 7).any()
    # The run is taken first: 9 voxels are left of 12.
    assert not (one_rule(labels, slice_run=True, min_voxels=10) == 7).any()
    assert longest_run(np.zeros(4, bool)) == slice(0, 0)


def test_regions_keep_what_the_others_say() -> None:
    regions = LabelMap(names=("whole", "core"), values=((1, 2), (2,)), sigmoid=True)
    labels = np.zeros((12, 8, 8), np.uint8)
    labels[1:6, 1:6, 1:6], labels[2:4, 2:4, 2:4], labels[9:11, 1:3, 1:3], labels[5, 5, 5] = 1, 2, 1, 2
    found = labels.copy()
    clean(found, regions, [ClassRule(name="core", largest=True)], MM)
    assert found[5, 5, 5] == 1  # no longer core, still in the whole
    assert (found == labels).sum() == labels.size - 1
    clean(found, regions, [ClassRule(name="whole", largest=True)], MM)
    assert not found[9:].any()
    assert (found[2:4, 2:4, 2:4] == 2).all()


def test_a_mapped_view_is_changed_in_place(tmp_path) -> None:
    labels = np.asfortranarray(blobs(4))
    stored = np.memmap(tmp_path / "labels", np.uint8, "w+", shape=labels.shape, order="F")
    stored[:] = labels
    view = stored[::-1].transpose(1, 0, 2)
    clean(view, TWO, [ClassRule(name="a", largest=True, fill_holes=True)], MM)
    other = np.ascontiguousarray(labels[::-1].transpose(1, 0, 2))
    clean(other, TWO, [ClassRule(name="a", largest=True, fill_holes=True)], MM)
    np.testing.assert_array_equal(stored[::-1].transpose(1, 0, 2), other)
    assert (np.asarray(stored) != labels).any()


# -- the choice


def scored(preds, truths, rules=()) -> list[list[float]]:
    found = []
    for pred, truth in zip(preds, truths, strict=True):
        done = pred.copy()
        clean(done, TWO, rules, MM)
        found.append(dice_per_class(done, truth, TWO))
    return found


def cohort() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Class a has specks that are wrong; class b has two right parts, so its largest alone would lose."""
    preds, truths = [], []
    for case in range(3):
        truth = np.zeros((30, 24, 24), np.uint8)
        truth[3:12, 3:12, 3:12] = 3
        truth[16:22, 4:10, 4:10] = 7
        truth[16:22, 15:20, 15:20] = 7
        pred = truth.copy()
        pred[25, 5 + case, 5:9], pred[27:29, 20:22, 20:23] = 3, 3
        pred[5:7, 5:7, 5 + case] = 0
        preds.append(pred)
        truths.append(truth)
    return preds, truths


def test_only_what_raises_a_class_is_chosen() -> None:
    preds, truths = cohort()
    parts = [measure_parts(p, t, TWO, MM) for p, t in zip(preds, truths, strict=True)]
    tried = [[option_dice(of_class) for of_class in case] for case in parts]
    found = propose(TWO.names, tried)
    assert set(found) == {"a"}
    rule = found["a"]
    assert rule.fill_holes
    # Every size that removes both specks (12 and 36 mm3) does the same; the mildest is taken.
    assert (rule.largest, rule.min_mm3) == (False, 100.0)
    before, after = scored(preds, truths), scored(preds, truths, [rule])
    assert mean_score(before) < mean_score(after) == 1.0
    gains = [a[0] - b[0] for b, a in zip(before, after, strict=True)]
    assert rule.gain == pytest.approx(np.mean(gains))
    assert rule.gain_low is not None
    assert 0 < rule.gain_low <= rule.gain
    # The same gain in one case of three is no evidence; nor is it that of three scans of one patient.
    assert propose(TWO.names, [tried[0], *[[[1.0] * 18, [1.0] * 18]] * 2]) == {}
    assert propose(TWO.names, tried, patients=["p"] * 3) == {}


def test_a_score_of_which_less_is_better_decides_too() -> None:
    places = [option.largest for option in options("a")]
    rng = np.random.default_rng(0)
    tried = [[[1.0 - 0.5 * largest + 0.1 * rng.random() for largest in places]] for _ in range(8)]
    assert propose(("a",), [[[1 - v for v in case[0]]] for case in tried])["a"].largest
    rule = propose(("a",), tried, higher_is_better=False)["a"]
    assert rule.largest
    assert rule.gain == pytest.approx(0.5, abs=0.1)


def test_a_class_that_is_rightly_taken_away_counts_as_right() -> None:
    # In six healthy scans the specks are all there is: without them the Dice is not counted.
    tried = [[[0.0] * 16 + [math.nan] * 2] for _ in range(6)] + [[[0.9] * 18]] * 3
    rule = propose(("a",), tried)["a"]
    assert rule.largest
    assert rule.gain == pytest.approx(6 / 9)


@pytest.mark.parametrize("seed", range(4))
def test_the_predicted_dice_is_the_dice_of_the_cleaned_labels(seed: int) -> None:
    pred, truth = blobs(seed), blobs(seed + 1)
    truth[blobs(seed) == 7] = 7
    parts = measure_parts(pred, truth, TWO, MM)
    from autoseg.inference.postprocess import _dice

    for i, name in enumerate(TWO.names):
        for what in [{}, {"largest": True}, *({"min_mm3": s} for s in SIZES_MM3)]:
            rule = ClassRule(name=name, **what)
            wanted = scored([pred], [truth], [rule])[0][i]
            assert _dice(parts[i], rule) == pytest.approx(wanted, nan_ok=True)
        wanted = scored([pred], [truth], [ClassRule(name=name, fill_holes=True)])[0][i]
        assert _dice(parts[i], ClassRule(name=name, fill_holes=True)) == pytest.approx(wanted)


def test_ignored_voxels_and_classes_that_are_not_annotated_do_not_count() -> None:
    ignoring = LabelMap(names=("a", "b"), values=((3,), (7,)), ignore_label=255)
    preds, truths = cohort()
    for truth in truths:
        truth[24:] = 255  # every speck lies where nothing counts
    parts = [measure_parts(p, t, ignoring, MM) for p, t in zip(preds, truths, strict=True)]
    tried = [[option_dice(of_class) for of_class in case] for case in parts]
    assert not propose(("a", "b"), tried)["a"].min_mm3
    assert propose(("a", "b"), [[None, case[1]] for case in tried]) == {}


@pytest.mark.parametrize(("connectivity", "count"), [(6, 2), (26, 1)])
def test_slabs_are_joined_as_voxels_are(
    monkeypatch: pytest.MonkeyPatch, connectivity: Literal[6, 26], count: int
) -> None:
    """Two voxels that meet at an edge, in two slabs."""
    monkeypatch.setattr(components, "SLAB_VOXELS", 1)
    label = np.zeros((3, 3, 2), np.uint8)
    label[0, 1, 0] = label[1, 1, 1] = 1
    found = components.number_components(label, [1], connectivity=connectivity)
    assert list(found.components.voxels[found.components.label == 1]) == [2 // count] * count
