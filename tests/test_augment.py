from dataclasses import fields

import numpy as np
import pytest
import torch
from scipy import ndimage

from autoseg.training import augment
from autoseg.training.augment import KINDS, augment_batch, blur, draw, rotation, shift_histogram, swap_sides


def _batch(shape=(20, 16, 12), num=2):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(num, 1, *shape, generator=generator)
    targets = torch.zeros(num, 1, *shape, dtype=torch.uint8)
    targets[:, :, 4:10, 3:9, 2:8] = 1
    targets[:, :, 12:16, 3:9, 2:8] = 2
    return images, targets


def _augment(images, targets, seed=0, **changes):  # type: ignore[no-untyped-def]
    rngs = [np.random.default_rng([seed, i]) for i in range(len(images))]
    how = {"spacing_mm": (1.0, 1.0, 1.0), "mirror_axes": (0, 1, 2), "lateral_pairs": (), "sigmoid": False}
    return augment_batch(images, targets, rngs, **{**how, **changes})


def test_same_seed_same_result_and_batch_equals_samples() -> None:
    images, targets = _batch(num=3)
    first, second = _augment(images, targets), _augment(images, targets)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    for i in range(3):
        alone = augment_batch(
            images[i : i + 1], targets[i : i + 1], [np.random.default_rng([0, i])],
            spacing_mm=(1.0, 1.0, 1.0), mirror_axes=(0, 1, 2), lateral_pairs=(), sigmoid=False,
        )  # fmt: skip
        assert torch.equal(alone[0][0], first[0][i])


def test_many_draws_stay_finite_and_keep_label_values() -> None:
    images, targets = _batch()
    for seed in range(60):
        image, target = _augment(images, targets, seed)
        assert torch.isfinite(image).all()
        assert image.shape == images.shape
        assert set(target.unique().tolist()) <= {0, 1, 2}


def test_rotation_turns_image_and_label_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("P_NOISE", "P_BLUR", "P_BRIGHTNESS", "P_CONTRAST", "P_LOW_RESOLUTION", "P_GAMMA", "P_GAMMA_INVERTED",
                 "P_HISTOGRAM"):  # fmt: skip
        monkeypatch.setattr(augment, name, 0.0)
    monkeypatch.setattr(augment, "P_ROTATE", 1.0)
    images, targets = _batch(shape=(24, 24, 24))
    marked = (targets == 1).float()
    image, target = _augment(marked, targets, seed=4)
    assert not torch.equal(target, targets)
    agree = ((image > 0.5) == (target == 1)).float().mean()
    assert agree > 0.99


def test_rotation_keeps_lengths_in_mm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sphere in mm stays a sphere: rotated on a 3 mm axis it keeps volume and extent."""
    spacing = np.array([1.0, 1.0, 2.5])
    shape = (40, 40, 16)
    mm = np.stack(
        np.meshgrid(*[(np.arange(s) - (s - 1) / 2) * d for s, d in zip(shape, spacing, strict=True)], indexing="ij")
    )
    ball = torch.from_numpy((np.sqrt((mm**2).sum(0)) < 14).astype(np.uint8))[None, None]
    for name in (
        "P_NOISE",
        "P_BLUR",
        "P_BRIGHTNESS",
        "P_CONTRAST",
        "P_LOW_RESOLUTION",
        "P_GAMMA",
        "P_GAMMA_INVERTED",
        "P_HISTOGRAM",
        "P_SCALE",
    ):
        monkeypatch.setattr(augment, name, 0.0)
    monkeypatch.setattr(augment, "P_ROTATE", 1.0)
    _, turned = _augment(ball.float(), ball, seed=2, spacing_mm=spacing, mirror_axes=())
    overlap = 2 * (turned & ball).sum() / (turned.sum() + ball.sum())
    assert overlap > 0.95


def test_mirroring_x_swaps_left_and_right() -> None:
    target = torch.tensor([0, 1, 2, 3, 255], dtype=torch.uint8).view(1, 5, 1, 1)
    assert swap_sides(target, [(0, 2)], sigmoid=False).flatten().tolist() == [0, 3, 2, 1, 255]
    weighted = swap_sides(torch.cat([target, target]), [(0, 2)], sigmoid=False)
    assert weighted[1].flatten().tolist() == target.flatten().tolist()
    regions = torch.stack([torch.zeros(1, 1, 1), torch.ones(1, 1, 1)]).to(torch.uint8)
    assert swap_sides(regions, [(0, 1)], sigmoid=True).flatten().tolist() == [1, 0]


def test_rotation_matrix_is_a_rotation() -> None:
    matrix = rotation(np.array([0.3, -0.2, 0.5]))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(matrix) == pytest.approx(1.0)


def test_blur_equals_scipy() -> None:
    image = torch.rand(1, 12, 11, 10, generator=torch.Generator().manual_seed(1))
    expected = ndimage.gaussian_filter(image[0].numpy(), 0.8, mode="nearest", radius=3)
    found = blur(image[None], torch.tensor([0.8]).view(-1, 1, 1, 1, 1))
    np.testing.assert_allclose(found[0, 0].numpy(), expected, atol=1e-5)


def test_every_kind_of_change_is_drawn_and_only_the_named_ones() -> None:
    for strength, kinds in KINDS.items():
        seen: set[str] = set()
        for seed in range(300):
            one = draw(np.random.default_rng(seed), (1.0, 1.0, 1.0), (0, 1, 2), strength)
            seen |= {f.name for f in fields(one) if getattr(one, f.name) is not None and f.name != "flips"}
            seen |= {"flips"} if one.flips else set()
        expected = {"matrix" if kind in ("rotate", "scale") else kind for kind in kinds}
        assert seen == {*expected, "flips"}, strength


def test_axial_changes_leave_the_third_axis_alone() -> None:
    drawn = [draw(np.random.default_rng(seed), (1.0, 1.0, 1.0), (), "axial").matrix for seed in range(50)]
    matrices = [m for m in drawn if m is not None]
    assert len(matrices) > 5
    for matrix in matrices:
        np.testing.assert_allclose(matrix[2], [0, 0, 1], atol=1e-12)
        np.testing.assert_allclose(matrix[:, 2], [0, 0, 1], atol=1e-12)


def test_histogram_shift_equals_monai() -> None:
    from monai.transforms import RandHistogramShift

    theirs = RandHistogramShift(num_control_points=10, prob=1.0)
    theirs.set_random_state(3)
    image = torch.rand(1, 9, 8, 7, generator=torch.Generator().manual_seed(5)) * 3 - 1
    expected = theirs(image)
    found = shift_histogram(image, np.asarray(theirs.floating_control_points))
    torch.testing.assert_close(found, torch.as_tensor(np.asarray(expected)), atol=1e-5, rtol=1e-5)
