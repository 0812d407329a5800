"""Calibration and surface Dice as the ensemble stage stores them, against counts made another way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_jobs import TensorRows

from autoseg.data.labels import LabelMap
from autoseg.data.volumes import read_label
from autoseg.evaluation.calibration import (
    LOWEST,
    NUM_BINS,
    Calibration,
    expected_error,
    out_of_fold_temperature,
)
from autoseg.evaluation.scores import Comparison, metric_named, score_case
from autoseg.evaluation.surfaces import nsd
from autoseg.evaluation.tolerances import TOLERANCE_MM
from autoseg.inference.restore import Member, labels_of_means

MAP = LabelMap(names=("a", "b"), values=((1,), (4,)), ignore_label=255)
EVERYWHERE = (slice(0, 6), slice(0, 7), slice(0, 8))


def random_case(seed: int) -> tuple[np.ndarray, torch.Tensor]:
    rng = np.random.default_rng(seed)
    label = rng.choice([0, 1, 4, 255], size=(6, 7, 8), p=[0.5, 0.2, 0.2, 0.1]).astype(np.uint8)
    return label, torch.from_numpy(rng.dirichlet([1, 1, 1], size=(6, 7, 8)).astype(np.float32)).movedim(-1, 0)


@pytest.mark.parametrize("seed", range(3))
def test_counts_are_those_of_a_plain_loop(seed: int) -> None:
    label, probs = random_case(seed)
    found = Calibration(MAP.encode(label), MAP, None)
    for x in range(0, 6, 2):  # in slabs
        found.add((slice(x, x + 2), slice(0, 7), slice(0, 8)), probs[:, x : x + 2])
    expected = np.zeros((2, NUM_BINS, 3))
    for index in np.ndindex(6, 7, 8):
        for i, value in enumerate((1, 4)):
            p = float(probs[(i + 1, *index)])
            if label[index] != 255 and p >= LOWEST / NUM_BINS:
                expected[i, min(int(p * NUM_BINS), NUM_BINS - 1)] += [1, p, label[index] == value]
    np.testing.assert_allclose(found.counts, expected, rtol=1e-6)


def test_what_a_case_was_not_annotated_for_is_not_counted() -> None:
    label, probs = random_case(0)
    found = Calibration(MAP.encode(label), MAP, ["b"])
    found.add(EVERYWHERE, probs)
    assert found.counts[0].sum() == 0
    assert found.counts[1].sum() > 0


def test_regions_have_a_channel_each() -> None:
    regions = LabelMap(names=("whole", "core"), values=((1, 2), (2,)), sigmoid=True)
    label = np.array([[[0, 1, 2, 2]]], np.uint8)
    probs = torch.tensor([[[[0.92, 0.92, 0.92, 0.92]]], [[[0.32, 0.32, 0.32, 0.01]]]])
    found = Calibration(regions.encode(label), regions, None)
    found.add((slice(0, 1), slice(0, 1), slice(0, 4)), probs)
    assert found.counts[0, 18].tolist() == [4, pytest.approx(3.68), 3]
    assert found.counts[1, 6].tolist() == [3, pytest.approx(0.96), 1]
    assert found.counts[1].sum(axis=0)[0] == 3  # 0.01 is under the lowest bin


def test_the_error_is_zero_where_frequencies_are_as_said() -> None:
    counts = np.zeros((NUM_BINS, 3))
    counts[10] = [100, 52.0, 52]
    counts[15] = [300, 230.0, 230]
    assert expected_error(counts.tolist()) == 0
    counts[15, 2] = 200  # 30 of 400 voxels too many were said
    assert expected_error(counts.tolist()) == pytest.approx(30 / 400)
    assert expected_error(np.zeros((NUM_BINS, 3)).tolist()) is None


def test_the_watched_probabilities_are_the_means() -> None:
    rng = np.random.default_rng(0)
    values = [
        torch.from_numpy(rng.dirichlet([1, 1, 1], size=(6, 7, 8)).astype(np.float32)).movedim(-1, 0) for _ in "ab"
    ]
    members = [Member(rows=TensorRows(v, 2), box=EVERYWHERE) for v in values]
    seen: dict[int, torch.Tensor] = {}
    labels_of_means(members, [(0,), (0, 1)], (6, 7, 8), MAP, watch=lambda k, place, p: seen.update({k: p}))
    torch.testing.assert_close(seen[0], values[0])
    torch.testing.assert_close(seen[1], (values[0] + values[1]) / 2)


def test_surface_dice_leaves_out_ignored_voxels_and_unannotated_classes() -> None:
    label = np.zeros((12, 12, 12), np.uint8)
    label[3:6, 3:9, 3:9] = 1
    pred = label.copy()
    pred[6:9, 3:9, 3:9] = 1  # half of it too much, but there the truth is unknown
    label[6:9, 3:9, 3:9] = 255
    case = Comparison(
        pred=pred, label=label, label_map=MAP, spacing_mm=(1.0, 1.0, 1.0), annotated=["a"], tolerance_mm=1.0
    )
    scores = score_case(case, [metric_named("nsd")])["nsd"]
    assert scores[0] == 1.0
    assert np.isnan(scores[1])


def test_a_run_s_surface_dice_is_that_of_its_label_files(finished_run: Path) -> None:
    work = finished_run / "work_dir"
    scores = json.loads((work / "ensemble" / "scores.json").read_text())
    assert scores["tolerance_mm"] == TOLERANCE_MM
    for name, case in scores["ensemble"].items():
        truth = read_label(finished_run / "labels" / f"{name}.nii.gz")
        pred = read_label(work / "ensemble" / "out_of_fold" / "ensemble" / f"{name}.nii.gz")
        for value, stored in zip((1, 2), case["nsd"], strict=True):
            direct = nsd(pred.array[0] == value, truth.array[0] == value, truth.spacing_mm, TOLERANCE_MM)
            assert (stored is None and np.isnan(direct)) or stored == pytest.approx(direct, abs=1e-6)


def test_a_run_s_calibration_counts_every_voxel_once(finished_run: Path) -> None:
    scores = json.loads((finished_run / "work_dir" / "ensemble" / "scores.json").read_text())
    if scores["calibration"] is None:
        assert scores["chosen"].endswith("_vote")
        return
    voxels = sum(read_label(finished_run / "labels" / f"{name}.nii.gz").array[0].size for name in scores["ensemble"])
    for bins in scores["calibration"]:
        count, said, hits = np.sum(bins, axis=0)
        assert 0 < count <= voxels
        assert 0 <= hits <= count
        assert LOWEST / NUM_BINS <= said / count <= 1
        assert sum(bins[0]) == 0


# -- temperature


def counts_of(rng: np.random.Generator, sharpness: float, num: int = 200_000) -> np.ndarray:
    """Counts of one class whose probabilities have logits `sharpness` times the right ones."""
    logit = rng.normal(0, 2, num)
    hit = rng.random(num) < 1 / (1 + np.exp(-logit))
    p = 1 / (1 + np.exp(-sharpness * logit))
    chosen = p >= LOWEST / NUM_BINS
    bins = np.minimum((p[chosen] * NUM_BINS).astype(int), NUM_BINS - 1)
    weights = (None, p[chosen], hit[chosen].astype(float))
    return np.stack([np.bincount(bins, w, NUM_BINS) for w in weights], axis=1)[None]


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 2.0])
def test_a_temperature_undoes_how_much_too_sure_models_are(sharpness: float) -> None:
    rng = np.random.default_rng(0)
    found = out_of_fold_temperature({fold: counts_of(rng, sharpness) for fold in range(3)})
    assert found is not None
    assert found.value == pytest.approx(sharpness, rel=0.06)
    assert [*found.by_fold] == [0, 1, 2]
    assert found.error_after < 0.012
    if sharpness != 1:
        assert found.error_before > 4 * found.error_after
    assert found.classes_after[0] == pytest.approx(found.error_after)


def test_a_fold_does_not_fit_its_own_temperature() -> None:
    """A fold that is far too sure among fair ones keeps its error: its temperature is that of the others."""
    rng = np.random.default_rng(1)
    odd = counts_of(rng, 3.0)
    found = out_of_fold_temperature({0: counts_of(rng, 1.0), 1: counts_of(rng, 1.0), 2: odd})
    assert found is not None
    assert found.by_fold[2] == pytest.approx(1.0, abs=0.05)
    assert found.by_fold[0] > 1.2
    assert out_of_fold_temperature({0: odd}) is None
    assert out_of_fold_temperature({0: odd, 1: np.zeros_like(odd)}) is None
