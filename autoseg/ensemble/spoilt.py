"""Copies of images spoilt in ways that training never saw, which show how predictions look when they fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy.ndimage import gaussian_filter

from autoseg.data.grid import Volume

Spoil = Callable[[np.ndarray, np.random.Generator], np.ndarray]
BLOCK = 8
"""Voxels of an edge of the blocks that change places."""


def _range(channel: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(channel, (0.01, 0.99))
    return float(low), max(float(high - low), 1e-6)


def _noise(channel: np.ndarray, random: np.random.Generator) -> np.ndarray:
    _, span = _range(channel)
    return channel + random.uniform(0.05, 0.5) * span * random.standard_normal(channel.shape)


def _shading(channel: np.ndarray, random: np.random.Generator) -> np.ndarray:
    low, _ = _range(channel)
    field = np.zeros(channel.shape)
    for axis, size in enumerate(channel.shape):
        place = np.linspace(-1, 1, size)
        shape = [size if a == axis else 1 for a in range(3)]
        field = field + (random.normal() * place + random.normal() * place**2).reshape(shape)
    field = field / max(float(np.abs(field).max()), 1e-6)
    return low + (channel - low) * np.exp(random.uniform(0.5, 2.0) * field)


def _blur(channel: np.ndarray, random: np.random.Generator) -> np.ndarray:
    blurred: np.ndarray = gaussian_filter(channel, random.uniform(1, 4))
    return blurred


def _contrast(channel: np.ndarray, random: np.random.Generator) -> np.ndarray:
    low, span = _range(channel)
    share = np.clip((channel - low) / span, 0, 1)
    bent = share ** float(np.exp(random.uniform(-1.5, 1.5)))
    return low + span * (1 - bent if random.random() < 0.5 else bent)


def _cut(channel: np.ndarray, random: np.random.Generator) -> np.ndarray:
    axis = int(random.integers(3))
    size = channel.shape[axis]
    gone = max(1, int(size * random.uniform(0.25, 0.7)))
    start = 0 if random.random() < 0.5 else size - gone
    cut = channel.copy()
    cut[tuple(slice(start, start + gone) if a == axis else slice(None) for a in range(3))] = channel.min()
    return cut


def _shuffle(channel: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Blocks change places: what is there is right, where it lies is not."""
    counts = [max(1, size // BLOCK) for size in channel.shape]
    places = np.stack(np.meshgrid(*map(np.arange, counts), indexing="ij"), -1).reshape(-1, 3) * BLOCK
    shuffled = channel.copy()
    for target, source in zip(places, places[random.permutation(len(places))], strict=True):
        here, there = (tuple(slice(p, p + BLOCK) for p in place) for place in (target, source))
        if channel[there].shape == shuffled[here].shape:
            shuffled[here] = channel[there]
    return shuffled


IMAGE_KINDS: dict[str, Spoil] = {
    "noise": _noise,
    "shading": _shading,
    "blur": _blur,
    "contrast": _contrast,
    "cut": _cut,
    "shuffle": _shuffle,
}
KINDS = (*IMAGE_KINDS, "spacing", "flip")
"""Of copies."""


def spoil(kind: str, image: Volume, label: np.ndarray, random: np.random.Generator) -> tuple[Volume, np.ndarray]:
    """A spoilt copy of an image, and the label that belongs to it.

    Args:
        kind: of `KINDS`; the voxels change, or what the file says of their size and direction.
        image: as `read_image` gives it.
        label: (X, Y, Z).
        random: how much, and where.
    """
    if kind == "spacing":
        affine = image.grid.affine.copy()
        scale = np.exp(random.uniform(np.log(1.3), np.log(2.5)) * random.choice((-1, 1)))
        affine[:3, :3] *= scale
        return Volume(array=image.array, grid=replace(image.grid, affine=affine)), label
    if kind == "flip":
        axis = int(random.integers(1, 3))  # X is that of left and right, where bodies are alike
        return replace(image, array=np.ascontiguousarray(np.flip(image.array, axis + 1))), np.flip(label, axis)
    seeds = random.spawn(1)[0].integers(1 << 32)
    channels = [IMAGE_KINDS[kind](c, np.random.default_rng(seeds)) for c in image.array]
    return replace(image, array=np.stack(channels).astype(np.float32)), label
