"""Histograms and components against plain NumPy and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from autoseg.data import components, histograms
from autoseg.data.components import find_components
from autoseg.data.histograms import Stats, histograms_by_label, pool

SHAPE = (17, 13, 11)


def oracle(values: np.ndarray) -> Stats:
    v = values.astype(np.float64)
    return Stats(v.max(), v.mean(), np.median(v), v.min(), v.std(), *np.percentile(v, [0.5, 10, 90, 99.5]))


def images(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        "int16": rng.integers(-1024, 3000, SHAPE).astype(np.int16),
        "uint8": rng.integers(0, 255, SHAPE).astype(np.uint8),
        "wide int32": rng.integers(-(2**23), 2**23, SHAPE).astype(np.int32),
        "integral float": np.asfortranarray(rng.integers(-50, 50, SHAPE).astype(np.float32)),
        "float": rng.normal(size=SHAPE).astype(np.float32),
        "float64": rng.normal(size=SHAPE).astype(np.float32).astype(np.float64),
        "few floats": rng.choice(np.float32([-1.5, 0.0, 0.25, 7e5]), SHAPE),
        "constant": np.full(SHAPE, 3, np.int16),
    }


@pytest.mark.parametrize("kind", list(images(np.random.default_rng(0))))
@pytest.mark.parametrize(("slope", "inter"), [(1.0, 0.0), (0.5, -10.0), (-2.0, 3.0)])
def test_statistics_by_label_equal_numpy(kind: str, slope: float, inter: float, rng: np.random.Generator) -> None:
    image = images(np.random.default_rng(1))[kind]
    label = rng.choice(np.array([0, 1, 2, 255, 1000], np.uint16), SHAPE)
    found = histograms_by_label(image, label, slope, inter)
    assert list(found) == [0, 1, 2, 255, 1000]
    scaled = image * slope + inter
    for value, histogram in found.items():
        inside = scaled[label == value]
        assert histogram.total == inside.size
        assert (np.diff(histogram.values) > 0).all()
        np.testing.assert_allclose(histogram.stats(), oracle(inside), rtol=1e-6, atol=1e-9)
    whole = pool(list(found.values()))
    np.testing.assert_allclose(whole.stats(), oracle(scaled), rtol=1e-6, atol=1e-9)


def test_chunks_do_not_change_the_counts(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    label = rng.integers(0, 3, SHAPE).astype(np.uint8)
    for image in images(rng).values():
        before = histograms_by_label(image, label)
        monkeypatch.setattr(histograms, "CHUNK_VOXELS", 300)
        after = histograms_by_label(image, label)
        monkeypatch.undo()
        for value in before:
            np.testing.assert_array_equal(before[value].values, after[value].values)
            np.testing.assert_array_equal(before[value].counts, after[value].counts)


def test_too_many_floats_are_rounded_to_twelve_bits(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    monkeypatch.setattr(histograms, "MOST_PAIRS", 200)
    monkeypatch.setattr(histograms, "CHUNK_VOXELS", 300)
    image = rng.normal(100, 30, SHAPE).astype(np.float32)
    label = rng.integers(0, 2, SHAPE).astype(np.uint8)
    found = histograms_by_label(image, label)
    for value, histogram in found.items():
        assert histogram.is_rounded
        assert histogram.total == (label == value).sum()
        np.testing.assert_allclose(histogram.stats(), oracle(image[label == value]), rtol=2.5e-4)


def test_a_part_can_be_taken_out(rng: np.random.Generator) -> None:
    image = rng.integers(0, 40, SHAPE).astype(np.int16)
    whole, part = histograms_by_label(image, None)[0], histograms_by_label(image[:5], None)[0]
    assert whole.includes(part)
    assert not part.includes(whole)
    np.testing.assert_allclose(whole.without(part).stats(), oracle(image[5:]), rtol=1e-12)


def test_pooling_nothing_gives_nothing() -> None:
    assert pool([]).total == 0


@pytest.mark.parametrize("slab", [1, 100, 400, 10**9])
def test_components_equal_scipy(slab: int, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    monkeypatch.setattr(components, "SLAB_VOXELS", slab)
    label = (ndimage.gaussian_filter(rng.normal(size=(14, 12, 16)), 1.2) * 8).round().clip(0, 3).astype(np.uint8)
    found = find_components(np.asfortranarray(label))
    assert (np.diff(found.voxels) <= 0).all()
    for value in np.unique(label):
        mask = label == value
        numbered, num = ndimage.label(mask, np.ones((3, 3, 3)))
        mine = found.label == value
        assert mine.sum() == num
        boxes = ndimage.find_objects(numbered)
        expected = sorted(
            ((numbered == i + 1).sum(), *(s.start for s in box), *(s.stop - s.start for s in box))
            for i, box in enumerate(boxes)
        )
        assert sorted(zip(found.voxels[mine], *found.low[mine].T, *found.shape[mine].T, strict=True)) == expected
        centre = found.mass[mine].sum(0) / found.voxels[mine].sum()
        np.testing.assert_allclose(centre, ndimage.center_of_mass(mask))


def test_components_of_a_full_range_of_labels() -> None:
    label = np.zeros((4, 4, 4), np.uint8)
    label[0, 0, 0], label[3, 3, 3] = 255, 255
    found = find_components(label)
    assert found.label.tolist() == [0, 255, 255]
    assert found.voxels.tolist() == [62, 1, 1]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)
