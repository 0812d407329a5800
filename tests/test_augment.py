from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import pytest
import torch
from scipy import ndimage

from autoseg.training.augment import KINDS, Draw, augment_batch, blur, draw, shift_histogram, swap_sides
from autoseg.training.cache import CachedCase
from autoseg.training.patches import cut_turned

PLAIN = Draw()


def _augment(images: torch.Tensor, targets: torch.Tensor, seed: int = 0) -> None:
    """Draw and make changes in patches that lie in cases of their own size, in place."""
    rngs = [np.random.default_rng([seed, i]) for i in range(len(images))]
    draws = [draw(rng, 1, (1.0, 1.0, 1.0), (20, 16, 12), (0, 1, 2), "default") for rng in rngs]
    turned = {}
    for i, (image, target, one) in enumerate(zip(images, targets, draws, strict=True)):
        if one.matrix is not None:
            case = CachedCase(name="", image=image.numpy(), target=target.numpy(), points=np.zeros((0, 4), np.int32))
            turned[i] = cut_turned(case, (0, 0, 0), tuple(image.shape[1:]), one.matrix, weighted=False)  # type: ignore[arg-type]
    augment_batch(images, targets, draws, turned, lateral_pairs=(), sigmoid=False)


def _batch(num: int) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(num, 1, 20, 16, 12, generator=torch.Generator().manual_seed(0))
    targets = torch.zeros(num, 1, 20, 16, 12, dtype=torch.uint8)
    targets[:, :, 4:10, 3:9, 2:8] = 1
    targets[:, :, 12:16, 3:9, 2:8] = 2
    return images, targets


def test_same_seed_same_result_and_batch_equals_samples() -> None:
    for seed in range(12):
        images, targets = _batch(3)
        again, alone = _batch(3), _batch(3)
        _augment(images, targets, seed)
        _augment(*again, seed)
        assert torch.equal(again[0], images)
        assert torch.equal(again[1], targets)
        rngs = [np.random.default_rng([seed, i]) for i in range(3)]
        draws = [draw(rng, 1, (1.0, 1.0, 1.0), (20, 16, 12), (0, 1, 2), "default") for rng in rngs]
        for i in range(3):
            if draws[i].matrix is None:
                image, target = alone[0][i : i + 1], alone[1][i : i + 1]
                augment_batch(image, target, draws[i : i + 1], {}, lateral_pairs=(), sigmoid=False)
                assert torch.equal(image[0], images[i])
                assert torch.equal(target[0], targets[i])


def test_many_draws_stay_finite_and_keep_label_values() -> None:
    for seed in range(60):
        images, targets = _batch(2)
        _augment(images, targets, seed)
        assert torch.isfinite(images).all()
        assert set(targets.unique().tolist()) <= {0, 1, 2}


def test_mirroring_x_swaps_left_and_right() -> None:
    target = torch.tensor([0, 1, 2, 3, 255], dtype=torch.uint8).view(1, 5, 1, 1)
    assert swap_sides(target, [(0, 2)], sigmoid=False).flatten().tolist() == [0, 3, 2, 1, 255]
    weighted = swap_sides(torch.cat([target, target]), [(0, 2)], sigmoid=False)
    assert weighted[1].flatten().tolist() == target.flatten().tolist()
    regions = torch.stack([torch.zeros(1, 1, 1), torch.ones(1, 1, 1)]).to(torch.uint8)
    assert swap_sides(regions, [(0, 1)], sigmoid=True).flatten().tolist() == [1, 0]


def test_blur_equals_scipy() -> None:
    image = torch.rand(1, 12, 11, 10, generator=torch.Generator().manual_seed(1))
    expected = ndimage.gaussian_filter(image[0].numpy(), (0.8, 0.5, 1.0), mode="nearest", radius=3)
    blurred = blur(image, torch.tensor([0.8, 0.5, 1.0]).view(1, 3, 1, 1, 1))
    np.testing.assert_allclose(blurred[0].numpy(), expected, atol=1e-5)


def _changed(images: torch.Tensor, *draws: Draw) -> torch.Tensor:
    """Images after one draw a sample."""
    images = images.clone()
    targets = torch.zeros(len(images), 1, *images.shape[2:], dtype=torch.uint8)
    augment_batch(images, targets, draws, {}, lateral_pairs=(), sigmoid=False)
    return images


def _low_resolution(volume: np.ndarray, zooms: np.ndarray) -> np.ndarray:
    """The voxel nearest to each coarse one's centre, then linear interpolation between the coarse ones' centres."""
    small = [round(s * zoom) for s, zoom in zip(volume.shape, zooms, strict=True)]
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
    if kind in ("blur", "low_resolution"):
        rows = rows[..., None] * [0.9, 0.7, 1.0]
    changed = _changed(images, Draw(**{kind: rows[0]}), PLAIN, Draw(**{kind: rows[1]}))  # type: ignore[arg-type]
    assert torch.equal(changed[0, 1], images[0, 1])
    assert torch.equal(changed[1], images[1])
    for sample, channel, row in ((0, 0, rows[0, 0]), (2, 0, rows[1, 0]), (2, 1, rows[1, 1])):
        expected = ORACLES[kind](images[sample, channel].double().numpy(), row)
        np.testing.assert_allclose(changed[sample, channel].numpy(), expected, atol=2e-5)


def test_noise_has_the_drawn_deviation_in_every_channel() -> None:
    images = torch.zeros(2, 2, 24, 24, 24)
    noise = _changed(images, Draw(noise=(1, 0.1)), Draw(noise=(2, 0.02)))
    np.testing.assert_allclose(noise.std((2, 3, 4)).numpy(), [[0.1, 0.1], [0.02, 0.02]], rtol=0.02)
    assert noise.mean((2, 3, 4)).abs().max() < 0.003
    correlation = np.corrcoef(noise[0].flatten(1).numpy())[0, 1]
    assert abs(correlation) < 0.03, "channels share their noise"


def test_nothing_drawn_changes_nothing() -> None:
    images = torch.randn(2, 3, 5, 4, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(_changed(images, PLAIN, PLAIN), images)


def _draws(num: int, num_channels: int, spacing_mm: Sequence[float] = (1.0, 1.0, 1.0)) -> list[Draw]:
    rngs = [np.random.default_rng([7, i]) for i in range(num)]
    return [draw(rng, num_channels, spacing_mm, (16, 16, 16), (0, 1, 2), "default") for rng in rngs]


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
            one = draw(np.random.default_rng(seed), 1, (1.0, 1.0, 1.0), (16, 16, 16), (0, 1, 2), strength)
            seen |= {f.name for f in fields(one) if getattr(one, f.name) is not None and f.name != "flips"}
            seen |= {"flips"} if one.flips else set()
        expected = {"matrix" if kind in ("rotate", "scale") else kind for kind in kinds}
        assert seen == {*expected, "flips"}, strength


def test_thick_slices_are_turned_and_coarsened_in_their_plane() -> None:
    draws = _draws(400, 1, (1.0, 1.0, 5.0))
    zooms = [d.low_resolution for d in draws if d.low_resolution is not None]
    assert len(zooms) > 20
    assert all((row[:, 2] == 1).all() and (row[:, 0] < 1).all() and (row[:, 0] == row[:, 1]).all() for row in zooms)
    matrices = [d.matrix for d in draws if d.matrix is not None]
    assert len(matrices) > 100
    assert all((m[2] == [0, 0, 1]).all() and (m[:, 2] == [0, 0, 1]).all() for m in matrices)
    assert any(m[0, 0] < 0 for m in matrices), "turned by over 90 degrees"


def test_histogram_shift_equals_monai() -> None:
    from monai.transforms import RandHistogramShift

    theirs = RandHistogramShift(num_control_points=10, prob=1.0)
    theirs.set_random_state(3)
    image = torch.rand(1, 9, 8, 7, generator=torch.Generator().manual_seed(5)) * 3 - 1
    expected = theirs(image)
    found = shift_histogram(image, np.asarray(theirs.floating_control_points))
    torch.testing.assert_close(found, torch.as_tensor(np.asarray(expected)), atol=1e-5, rtol=1e-5)
