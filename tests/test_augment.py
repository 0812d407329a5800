from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from autoseg.training import augment
from autoseg.training.augment import (
    KINDS,
    Draw,
    augment_batch,
    blur,
    change_samples,
    draw,
    rotation,
    shift_histogram,
    swap_sides,
)


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
    expected = ndimage.gaussian_filter(image[0].numpy(), (0.8, 0.5, 1.0), mode="nearest", radius=3)
    blurred = blur(image, torch.tensor([0.8, 0.5, 1.0]).view(1, 3, 1, 1, 1))
    np.testing.assert_allclose(blurred[0].numpy(), expected, atol=1e-5)


NOTHING: dict[str, Any] = {f.name: None for f in fields(Draw)} | {"flips": ()}


def _changed(images: torch.Tensor, *changes: dict[str, Any]) -> torch.Tensor:
    """Images after one draw of given changes a sample."""
    images = images.clone()
    targets = torch.zeros(len(images), 1, *images.shape[2:], dtype=torch.uint8)
    change_samples(
        images, targets, [Draw(**NOTHING | change) for change in changes], lateral_pairs=(), sigmoid=False
    )
    return images


def _low_resolution(volume: np.ndarray, zoom: float) -> np.ndarray:
    """The voxel nearest to each coarse one's centre, then linear interpolation between the coarse ones' centres."""
    small = [round(s * zoom) for s in volume.shape]
    nearest = np.ix_(*[((np.arange(n) + 0.5) * s / n).astype(int) for n, s in zip(small, volume.shape, strict=True)])
    at = [(np.arange(s) + 0.5) * n / s - 0.5 for n, s in zip(small, volume.shape, strict=True)]
    return ndimage.map_coordinates(volume[nearest], np.meshgrid(*at, indexing="ij"), order=1, mode="nearest")


def _contrast(volume: np.ndarray, factor: float) -> np.ndarray:
    mean = volume.mean()
    return np.clip((volume - mean) * factor + mean, volume.min(), volume.max())


def _gamma(volume: np.ndarray, gamma: float) -> np.ndarray:
    low, span = volume.min(), np.ptp(volume)
    bent = ((volume - low) / span) ** gamma
    return (bent - bent.mean()) / bent.std() * volume.std() + volume.mean()


ORACLES = {
    "blur": lambda volume, sigma: ndimage.gaussian_filter(volume, sigma, mode="nearest", radius=3),
    "brightness": lambda volume, factor: volume * factor,
    "contrast": _contrast,
    "low_resolution": _low_resolution,
    "gamma": _gamma,
    "gamma_inverted": lambda volume, gamma: -_gamma(-volume, gamma),
}


@pytest.mark.parametrize("kind", ORACLES)
def test_a_change_of_some_channels_equals_numpy_and_leaves_the_others(kind: str) -> None:
    images = torch.randn(3, 2, 12, 11, 7, generator=torch.Generator().manual_seed(2))
    rows = np.array([[0.8, np.nan], [1.3, 0.7]]) if kind != "low_resolution" else np.array([[0.8, np.nan], [0.5, 0.6]])
    if kind == "blur":
        rows = rows[..., None] * [0.9, 0.7, 0.5]
    changed = _changed(images, {kind: rows[0]}, {}, {kind: rows[1]})
    assert torch.equal(changed[0, 1], images[0, 1])
    assert torch.equal(changed[1], images[1])
    for sample, channel, row in ((0, 0, rows[0, 0]), (2, 0, rows[1, 0]), (2, 1, rows[1, 1])):
        expected = ORACLES[kind](images[sample, channel].double().numpy(), row)
        np.testing.assert_allclose(changed[sample, channel].numpy(), expected, atol=2e-5)


def test_noise_has_the_drawn_deviation_in_every_channel() -> None:
    images = torch.zeros(2, 2, 24, 24, 24)
    noise = _changed(images, {"noise": (1, 0.1)}, {"noise": (2, 0.02)})
    np.testing.assert_allclose(noise.std((2, 3, 4)).numpy(), [[0.1, 0.1], [0.02, 0.02]], rtol=0.02)
    assert noise.mean((2, 3, 4)).abs().max() < 0.003
    correlation = np.corrcoef(noise[0].flatten(1).numpy())[0, 1]
    assert abs(correlation) < 0.03, "channels share their noise"


def test_nothing_drawn_changes_nothing() -> None:
    images = torch.randn(2, 3, 5, 4, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(_changed(images, {}, {}), images)


def _draws(num: int, num_channels: int, spacing_mm: Sequence[float] = (1.0, 1.0, 1.0)) -> list[Draw]:
    return [draw(np.random.default_rng([7, i]), num_channels, spacing_mm, (0, 1, 2), "default") for i in range(num)]


def test_samples_and_channels_are_changed_as_often_and_as_much_as_by_nnunet() -> None:
    """Within four standard errors of what nnunetv2 2.8.1 draws."""
    num, num_channels = 6000, 2
    draws = _draws(num, num_channels)
    per_sample = {"noise": 0.1, "brightness": 0.15, "contrast": 0.15, "gamma": 0.3, "gamma_inverted": 0.1}
    for kind, share in per_sample.items():
        drawn = np.mean([getattr(d, kind) is not None for d in draws])
        assert abs(drawn - share) < 4 * np.sqrt(share * (1 - share) / num), kind
    for kind, share in {"blur": 0.2 * 0.5, "low_resolution": 0.25 * 0.5}.items():  # of the channels
        rows = [getattr(d, kind) for d in draws if getattr(d, kind) is not None]
        drawn = sum(int((~np.isnan(row.reshape(num_channels, -1)[:, 0])).sum()) for row in rows) / num / num_channels
        assert abs(drawn - share) < 4 * np.sqrt(share * (1 - share) / num), kind  # channels of a sample go together
    sigmas = np.array([d.noise[1] for d in draws if d.noise is not None])
    assert 0 <= sigmas.min() < 0.005
    assert 0.095 < sigmas.max() <= 0.1
    assert abs(sigmas.mean() - 0.05) < 4 * 0.1 / np.sqrt(12 * len(sigmas))
    for kind, (low, high) in {"brightness": (0.75, 1.25), "contrast": (0.75, 1.25), "gamma": (0.7, 1.5)}.items():
        values = np.concatenate([getattr(d, kind) for d in draws if getattr(d, kind) is not None])
        assert low <= values.min() < low + 0.01
        assert high - 0.01 < values.max() <= high
        assert abs((values < 1).mean() - 0.5) < 4 * 0.5 / np.sqrt(len(values)), f"{kind}: as often below 1 as above"
    channels = np.array([d.brightness for d in draws if d.brightness is not None])
    assert (channels[:, 0] != channels[:, 1]).all(), "each channel has its own factor"
    blurs = np.concatenate([d.blur[~np.isnan(d.blur[:, 0])] for d in draws if d.blur is not None])
    assert 0.5 <= blurs.min() < 0.51
    assert 0.99 < blurs.max() <= 1.0
    assert (blurs[:, 0] != blurs[:, 1]).all(), "each axis has its own sigma"


def test_every_kind_of_change_is_drawn_and_only_the_named_ones() -> None:
    for strength, kinds in KINDS.items():
        seen: set[str] = set()
        for seed in range(300):
            one = draw(np.random.default_rng(seed), 1, (1.0, 1.0, 1.0), (0, 1, 2), strength)
            seen |= {f.name for f in fields(one) if getattr(one, f.name) is not None and f.name != "flips"}
            seen |= {"flips"} if one.flips else set()
        expected = {"matrix" if kind in ("rotate", "scale") else kind for kind in kinds}
        assert seen == {*expected, "flips"}, strength


def test_axial_changes_leave_the_third_axis_alone() -> None:
    drawn = [draw(np.random.default_rng(seed), 1, (1.0, 1.0, 1.0), (), "axial").matrix for seed in range(50)]
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
