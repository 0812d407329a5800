"""Patches that are turned and scaled, against SciPy on the whole case."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from autoseg.training.augment import Draw
from autoseg.training.cache import CachedCase
from autoseg.training.patches import Sampler, cut_batch, cut_turned, place_patch
from autoseg.training.turning import MAX_ANGLE, Voxels, draw_matrix, largest_part, rotation, thick_axis, turn

ISOTROPIC = (1.0, 1.0, 1.0)


def _case(shape: Voxels, num_labels: int = 3, *, weighted: bool = False) -> CachedCase:
    """A smooth image, labels in blobs, weights at random."""
    rng = np.random.default_rng(0)
    blobs = ndimage.gaussian_filter(rng.normal(size=(num_labels, *shape)), (0, 2, 2, 2))
    image = ndimage.gaussian_filter(rng.normal(size=shape), 1) * 5 + 3
    return CachedCase(
        name="case",
        image=image[None].astype(np.float32),
        target=blobs.argmax(0)[None].astype(np.uint8),
        points=np.zeros((0, 4), np.int32),
        weight=rng.integers(0, 100, (1, *shape)).astype(np.uint8) if weighted else None,
    )


def _places(matrix: np.ndarray, start: Voxels, roi: Voxels) -> np.ndarray:
    """Where in the case each voxel of the patch comes from, (3, *roi)."""
    half = (np.array(roi) - 1) / 2
    offsets = np.stack(np.meshgrid(*[np.arange(r) - h for r, h in zip(roi, half, strict=True)], indexing="ij"))
    return np.einsum("ij,j...->i...", matrix, offsets) + (np.array(start) + half)[:, None, None, None]


def _oracle(volume: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Linear interpolation of a volume with zeros around it."""
    return ndimage.map_coordinates(np.pad(volume.astype(float), 2), np.clip(places + 2, 0, None), order=1, cval=0.0)


def _turn(case: CachedCase, start: Voxels, roi: Voxels, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    image, target = turn(cut_turned(case, start, roi, matrix, weighted=case.weight is not None), roi)
    return image.numpy(), target.numpy()


voxels = st.tuples(*[st.integers(1, 14)] * 3)


@given(shape=voxels, roi=voxels, seed=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_a_turned_patch_equals_scipy_on_the_case(shape: Voxels, roi: Voxels, seed: int) -> None:
    """Of any size, inside the case and beyond it, thin ones of a single slice included."""
    rng = np.random.default_rng(seed)
    case = _case(shape)
    matrix = rotation(rng.uniform(-0.5, 0.5, 3)) * rng.uniform(0.7, 1.4)
    start = place_patch(shape, roi, rng, None)
    image, target = _turn(case, start, roi, matrix)
    places = _places(matrix, start, roi)
    np.testing.assert_allclose(image[0], _oracle(case.image[0], places), atol=2e-3)
    shares = np.stack([_oracle(case.target[0] == label, places) for label in range(3)])
    shares[0] += 1 - shares.sum(0)  # outside is background
    first, second = np.sort(shares, axis=0)[[-1, -2]]
    is_clear = first - second > 1e-3
    np.testing.assert_array_equal(target[0][is_clear], shares.argmax(0)[is_clear])


def test_a_patch_from_inside_a_large_case_has_real_voxels_alone() -> None:
    """Nothing is made up at the border: all voxels of the case are 7 and of class 2, and so are those of the patch."""
    shape, roi = (60, 60, 60), (20, 16, 12)
    case = CachedCase(
        name="case",
        image=np.full((1, *shape), 7, np.float16),
        target=np.full((1, *shape), 2, np.uint8),
        points=np.zeros((0, 4), np.int32),
        weight=np.full((1, *shape), 30, np.uint8),
    )
    for seed in range(20):
        rng = np.random.default_rng(seed)
        matrix = rotation(rng.uniform(-math.radians(30), math.radians(30), 3)) * 1.4
        image, target = _turn(case, (20, 22, 24), roi, matrix)
        np.testing.assert_allclose(image, 7, rtol=1e-5)
        assert (target[0] == 2).all()
        assert (target[1] == 30).all()


def test_what_lies_outside_of_the_case_is_zero_and_background_and_counts_in_full() -> None:
    case = CachedCase(
        name="case",
        image=np.full((1, 20, 20, 20), 7, np.float16),
        target=np.full((1, 20, 20, 20), 2, np.uint8),
        points=np.zeros((0, 4), np.int32),
        weight=np.full((1, 20, 20, 20), 30, np.uint8),
    )
    matrix = rotation(np.array([0.0, 0.0, math.radians(30)]))
    image, target = _turn(case, (0, 0, 0), (20, 20, 20), matrix)
    places = _places(matrix, (0, 0, 0), (20, 20, 20))
    outside = ((places < -1) | (places > 20)).any(0)
    inside = ((places >= 0) & (places <= 19)).all(0)
    assert 0.05 < outside.mean() < 0.3
    for volume, within, beyond in ((image[0], 7, 0), (target[0], 2, 0), (target[1], 30, 100)):
        np.testing.assert_allclose(volume[inside], within, rtol=1e-5)
        np.testing.assert_allclose(volume[outside], beyond)


def test_no_more_is_cut_than_the_turn_needs() -> None:
    case = _case((64, 64, 64))
    plain = cut_turned(case, (20, 20, 20), (16, 16, 16), np.eye(3), weighted=False)
    assert plain.image.shape == (1, 16, 16, 16)
    in_plane = rotation(np.array([0.0, 0.0, math.radians(30)]))
    assert cut_turned(case, (20, 20, 20), (16, 16, 16), in_plane, weighted=False).image.shape == (1, 22, 22, 16)
    larger = cut_turned(case, (20, 20, 20), (16, 16, 16), np.eye(3) * 1.4, weighted=False)
    assert larger.image.shape == (1, 22, 22, 22)
    at_corner = cut_turned(case, (0, 0, 0), (16, 16, 16), np.eye(3) * 1.4, weighted=False)
    assert at_corner.image.shape == (1, 19, 19, 19)


def test_a_turn_by_nothing_is_the_patch() -> None:
    case = _case((12, 11, 5), weighted=True)
    image, target = _turn(case, (2, 3, -1), (8, 8, 7), np.eye(3))
    np.testing.assert_allclose(image[:, :, :, 1:6], case.image[:, 2:10, 3:11], atol=1e-4)
    np.testing.assert_array_equal(target[0, :, :, 1:6], case.target[0, 2:10, 3:11])
    assert case.weight is not None
    np.testing.assert_array_equal(target[1, :, :, 1:6], case.weight[0, 2:10, 3:11])
    assert not image[..., [0, 6]].any()


@pytest.mark.parametrize("shape", [(1, 9, 8, 7), (5, 9, 8)])
def test_a_vote_everywhere_gives_the_same_labels(shape: tuple[int, ...]) -> None:
    """As GPUs do it, of a volume and of slices."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, shape, generator=generator, dtype=torch.uint8)
    labels[:, :4] = 2
    places = [torch.rand(20, 15, generator=generator) * (size + 4) - 2 for size in shape[1:]]
    few, every = (largest_part(labels, places, 100, everywhere=everywhere) for everywhere in (False, True))
    assert few.shape == (shape[0], 20, 15)
    assert few.unique().tolist() == [0, 1, 2, 3, 100]
    assert torch.equal(few, every)


def test_regions_that_overlap_are_turned_each_by_itself() -> None:
    case = _case((16, 16, 16))
    regions = CachedCase(
        name="regions",
        image=case.image,
        target=np.concatenate([case.target == 1, case.target >= 1, np.full_like(case.target, 255)]).astype(np.uint8),
        points=case.points,
    )
    matrix = rotation(np.array([0.2, 0.1, 0.4]))
    _, target = _turn(regions, (2, 2, 2), (12, 12, 12), matrix)
    places = _places(matrix, (2, 2, 2), (12, 12, 12))
    for channel, region in zip(target[:2], regions.target, strict=False):
        share = _oracle(region, places)
        np.testing.assert_array_equal(channel[abs(share - 0.5) > 1e-3], (share > 0.5)[abs(share - 0.5) > 1e-3])
    assert set(np.unique(target[2])) <= {0, 255}
    assert (target[2] == 255).mean() > 0.9


def test_turning_keeps_lengths_in_mm() -> None:
    """A ball in mm stays a ball on voxels of 1x1x2.5 mm, where turning of voxels would shear it."""
    spacing, shape = (1.0, 1.0, 2.5), (40, 40, 16)
    mm = np.stack(
        np.meshgrid(*[(np.arange(s) - (s - 1) / 2) * d for s, d in zip(shape, spacing, strict=True)], indexing="ij")
    )
    ball = (np.sqrt((mm**2).sum(0)) < 14).astype(np.uint8)[None]
    case = CachedCase(name="ball", image=ball.astype(np.float16), target=ball, points=np.zeros((0, 4), np.int32))
    drawn = [draw_matrix(np.random.default_rng(seed), spacing, through=None, max_angle=MAX_ANGLE) for seed in range(60)]
    turns = [m for m in drawn if m is not None and math.isclose(np.linalg.det(m), 1)]
    assert len(turns) > 5
    for matrix in turns:
        _, turned = _turn(case, (0, 0, 0), shape, matrix)
        assert 2 * (turned & ball).sum() / (turned.sum() + ball.sum()) > 0.95


def test_patches_are_turned_and_scaled_as_often_and_as_much_as_by_nnunet() -> None:
    drawn = [
        draw_matrix(np.random.default_rng([1, i]), ISOTROPIC, through=None, max_angle=MAX_ANGLE) for i in range(6000)
    ]
    share = np.mean([m is not None for m in drawn])
    assert abs(share - (1 - 0.8 * 0.8)) < 4 * math.sqrt(0.36 * 0.64 / 6000)
    scales = np.array([np.cbrt(np.linalg.det(m)) for m in drawn if m is not None])
    scales = scales[abs(scales - 1) > 1e-6]
    assert abs(len(scales) / 6000 - 0.2) < 4 * math.sqrt(0.16 / 6000)
    assert 0.7 <= scales.min() < 0.71
    assert 1.39 < scales.max() <= 1.4
    assert abs(scales.mean() - 1.05) < 4 * 0.7 / math.sqrt(12 * len(scales))


@pytest.mark.parametrize("through", [0, 1, 2])
def test_slices_are_turned_and_scaled_in_their_plane_alone(through: int) -> None:
    """Each slice of the patch is made of that slice of the case: of any size, beyond the case, and with weights."""
    spacing = [5.0 if axis == through else 1.0 for axis in range(3)]
    plane = [axis for axis in range(3) if axis != through]
    drawn = [
        draw_matrix(np.random.default_rng(seed), spacing, through=through, max_angle=math.pi) for seed in range(60)
    ]
    matrices = [m for m in drawn if m is not None]
    angles = [math.atan2(m[plane[1], plane[0]], m[plane[0], plane[0]]) for m in matrices]
    assert max(np.abs(angles)) > 1.5, "thick slices are turned by up to 180 degrees"
    for matrix, number in zip(matrices, [1, 2, 3, 6, 9] * 5, strict=False):
        np.testing.assert_array_equal(matrix[through], np.eye(3)[through])
        np.testing.assert_array_equal(matrix[:, through], np.eye(3)[through])
        shape = np.array([18, 15, 16])
        shape[through] = number
        case = _case(tuple(int(s) for s in shape), weighted=True)  # type: ignore[arg-type]
        for edge in (4, 8):
            roi = tuple(edge if axis == through else 12 for axis in range(3))
            start = place_patch(shape, roi, np.random.default_rng(number), None)  # type: ignore[arg-type]
            image, target = _turn(case, start, roi, matrix)  # type: ignore[arg-type]
            places = _places(matrix, start, roi)  # type: ignore[arg-type]
            np.testing.assert_allclose(image[0], _oracle(case.image[0], places), atol=2e-3)
            for i in range(edge):
                one, labels = image[0].take(i, through), target[:, ...].take(i, through + 1)
                z = start[through] + i
                if not 0 <= z < number:
                    assert not one.any()
                    assert not labels[0].any()
                    assert (labels[1] == 100).all()
                    continue
                inside = places.take([i], through + 1)
                inside[through] = 0
                at_z = case.target[0].take([z], through)
                shares = np.stack([_oracle(at_z == k, inside) for k in range(3)]).squeeze(through + 1)
                shares[0] += 1 - shares.sum(0)
                first, second = np.sort(shares, axis=0)[[-1, -2]]
                is_clear = first - second > 1e-3
                np.testing.assert_array_equal(labels[0][is_clear], shares.argmax(0)[is_clear])


@pytest.mark.parametrize(
    ("spacing_mm", "roi", "axis"),
    [
        ((1.0, 1.0, 1.0), (64, 64, 64), None),
        ((1.0, 1.0, 3.0), (64, 64, 64), None),
        ((1.0, 1.0, 3.1), (64, 64, 64), 2),
        ((10.0, 1.5, 1.5), (32, 32, 32), 0),
        ((0.2, 1.0, 1.0), (64, 64, 64), None),  # one fine axis, two coarse ones
        ((1.0, 1.0, 1.0), (64, 64, 21), 2),  # few slices, thick or not
        ((1.0, 1.0, 1.0), (64, 64, 22), None),
        ((1.0, 1.0, 2.0), (3, 64, 64), 0),
    ],
)
def test_thick_slices_and_flat_patches_are_known(spacing_mm, roi, axis) -> None:  # type: ignore[no-untyped-def]
    assert thick_axis(spacing_mm, roi) == axis


def test_rotation_matrix_is_a_rotation() -> None:
    matrix = rotation(np.array([0.3, -0.2, 0.5]))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(matrix) == pytest.approx(1.0)


def test_a_batch_is_turned_alike_in_one_piece_and_in_pieces() -> None:
    """Each process cuts its own samples: what they come to must not depend on how many there are."""
    cases = [_case((18, 18, 18)), _case((12, 20, 9))]
    sampler = Sampler(cases, np.zeros((2, 1), bool), foreground_fraction=0.0)

    def draw(rng: np.random.Generator, case: int) -> Draw:
        return Draw(matrix=draw_matrix(rng, ISOTROPIC, through=None, max_angle=MAX_ANGLE))

    common = {"seed": 3, "step": 5, "batch_size": 8, "roi": (10, 10, 10), "draw": draw}
    whole = cut_batch(sampler, indices=range(8), **common)  # type: ignore[arg-type]
    assert 1 <= len(whole.turned) < 8
    for index in range(8):
        alone = cut_batch(sampler, indices=[index], **common)  # type: ignore[arg-type]
        assert torch.equal(alone.image[0], whole.image[index])
        assert (index in whole.turned) == (0 in alone.turned)
        if index in whole.turned:
            for one, other in zip(
                *(turn(t, (10, 10, 10)) for t in (whole.turned[index], alone.turned[0])), strict=True
            ):
                assert torch.equal(one, other)
