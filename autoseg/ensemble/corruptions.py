"""Ways to make an image worse, by name and strength: the only ones, but for the changes that training draws.

What images of a bad day cost (`autoseg.ensemble.robustness`) is tried at the usual strength; how predictions look when
they fail (`autoseg.ensemble.quality_study`) is learned at strengths drawn from a wider range. What training draws
(`autoseg.training.augment`) is nnU-Net's, on patches and their prepared intensities, and must not be what is tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.ndimage import gaussian_filter, rotate, zoom

from autoseg.data.grid import Volume

OfChannel = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
OfImage = Callable[[Volume, np.ndarray, float, np.random.Generator], tuple[Volume, np.ndarray]]
BLOCK = 8
"""Voxels of an edge of the blocks that change places."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corruption:
    """A way to make an image worse."""

    apply: OfImage
    """(image, label (X, Y, Z), strength, random) -> both as they then are."""
    words: str = ""
    """What it is at the usual strength."""
    usual: float | None = None
    """Strength of what scanners and positioning do on a bad day; None: they do not. A choice."""
    drawn: tuple[float, float] | None = None
    """Least and most strength of what training never saw; None: copies are not made worse in this way."""


def of_channels(change: OfChannel) -> OfImage:
    """A corruption that does the same to each channel."""

    def apply(
        image: Volume, label: np.ndarray, strength: float, random: np.random.Generator
    ) -> tuple[Volume, np.ndarray]:
        seed = random.integers(1 << 32)
        channels = [change(c, strength, np.random.default_rng(seed)) for c in image.array]
        return replace(image, array=np.stack(channels).astype(np.float32)), label

    return apply


def _range(channel: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(channel, (0.01, 0.99))
    return float(low), max(float(high - low), 1e-6)


def _noise(channel: np.ndarray, strength: float, random: np.random.Generator) -> np.ndarray:
    """Normal, with a deviation of a share of the range from the 1st to the 99th percentile."""
    return channel + strength * _range(channel)[1] * random.standard_normal(channel.shape)


def _bias_field(channel: np.ndarray, strength: float, random: np.random.Generator) -> np.ndarray:
    """Times e^strength at most, or divided by it: along each axis a parabola; from the lowest intensities on."""
    low, _ = _range(channel)
    field = np.zeros(channel.shape)
    for axis, size in enumerate(channel.shape):
        place = np.linspace(-1, 1, size)
        shape = [size if a == axis else 1 for a in range(3)]
        field = field + (random.normal() * place + random.normal() * place**2).reshape(shape)
    field = field / max(float(np.abs(field).max()), 1e-6)
    return low + (channel - low) * np.exp(strength * field)


def _fewer_voxels(channel: np.ndarray, strength: float, random: np.random.Generator) -> np.ndarray:
    """A share of the voxels along each axis, and linearly back to as many as there were."""
    few = _zoomed(channel, [max(2, int(n * strength)) for n in channel.shape])
    return _zoomed(few, channel.shape)


def _zoomed(channel: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    factors = [n / m for n, m in zip(shape, channel.shape, strict=True)]
    zoomed: np.ndarray = zoom(channel, factors, order=1, grid_mode=True, mode="nearest")
    return zoomed


def _blur(channel: np.ndarray, strength: float, random: np.random.Generator) -> np.ndarray:
    """By a Gaussian of so many voxels."""
    blurred: np.ndarray = gaussian_filter(channel, strength)
    return blurred


def _contrast(channel: np.ndarray, strength: float, random: np.random.Generator) -> np.ndarray:
    """Intensities within the range to the power of e^strength; every second time inverted."""
    low, span = _range(channel)
    bent = np.clip((channel - low) / span, 0, 1) ** math.exp(strength)
    return low + span * (1 - bent if random.random() < 0.5 else bent)


def _cut(channel: np.ndarray, strength: float, random: np.random.Generator) -> np.ndarray:
    """A share of the image, at one end of an axis, is empty."""
    axis = int(random.integers(3))
    size = channel.shape[axis]
    gone = max(1, int(size * strength))
    start = 0 if random.random() < 0.5 else size - gone
    cut = channel.copy()
    cut[tuple(slice(start, start + gone) if a == axis else slice(None) for a in range(3))] = channel.min()
    return cut


def _shuffle(channel: np.ndarray, strength: float, random: np.random.Generator) -> np.ndarray:
    """A share of all blocks change places: what is there is right, where it lies is not."""
    counts = [max(1, size // BLOCK) for size in channel.shape]
    places = np.stack(np.meshgrid(*map(np.arange, counts), indexing="ij"), -1).reshape(-1, 3) * BLOCK
    moved = random.permutation(len(places))[: round(strength * len(places))]
    shuffled = channel.copy()
    for target, source in zip(places[np.sort(moved)], places[moved], strict=True):
        here, there = (tuple(slice(p, p + BLOCK) for p in place) for place in (target, source))
        if channel[there].shape == shuffled[here].shape:
            shuffled[here] = channel[there]
    return shuffled


def _turned(
    image: Volume, label: np.ndarray, strength: float, random: np.random.Generator
) -> tuple[Volume, np.ndarray]:
    """So many degrees about the third axis, image and label alike."""
    turned = [
        rotate(c, strength, axes=(0, 1), reshape=False, order=1, mode="constant", cval=float(c.min()))
        for c in image.array
    ]
    array = np.stack(turned).astype(np.float32)
    return replace(image, array=array), rotate(label, strength, axes=(0, 1), reshape=False, order=0)


def _wrong_spacing(
    image: Volume, label: np.ndarray, strength: float, random: np.random.Generator
) -> tuple[Volume, np.ndarray]:
    """The file says that voxels are e^strength times as long, or as short."""
    affine = image.grid.affine.copy()
    affine[:3, :3] *= math.exp(strength * float(random.choice((-1, 1))))
    return Volume(array=image.array, grid=replace(image.grid, affine=affine)), label


def _wrong_direction(
    image: Volume, label: np.ndarray, strength: float, random: np.random.Generator
) -> tuple[Volume, np.ndarray]:
    """The file says that an axis runs the other way; its strength says nothing."""
    axis = int(random.integers(1, 3))  # X is that of left and right, where bodies are alike
    return replace(image, array=np.ascontiguousarray(np.flip(image.array, axis + 1))), np.flip(label, axis)


CORRUPTIONS: dict[str, Corruption] = {
    "noise": Corruption(
        apply=of_channels(_noise), words="noise of 5 % of the range of intensities", usual=0.05, drawn=(0.05, 0.5)
    ),
    "bias field": Corruption(
        apply=of_channels(_bias_field), words="a bias field of up to 30 %", usual=math.log(1.3), drawn=(0.5, 2.0)
    ),
    "resampling": Corruption(apply=of_channels(_fewer_voxels), words="half the voxels along each axis", usual=0.5),
    "rotation": Corruption(apply=_turned, words="turned by 10 degrees", usual=10.0),
    "blur": Corruption(apply=of_channels(_blur), drawn=(1.0, 4.0)),
    "contrast": Corruption(apply=of_channels(_contrast), drawn=(-1.5, 1.5)),
    "cut": Corruption(apply=of_channels(_cut), drawn=(0.25, 0.7)),
    "shuffle": Corruption(apply=of_channels(_shuffle), drawn=(1.0, 1.0)),
    "spacing": Corruption(apply=_wrong_spacing, drawn=(math.log(1.3), math.log(2.5))),
    "flip": Corruption(apply=_wrong_direction, drawn=(1.0, 1.0)),
}
USUAL = {name: c.usual for name, c in CORRUPTIONS.items() if c.usual is not None}
"""Name -> usual strength, of those that have one."""
DRAWN = {name: c.drawn for name, c in CORRUPTIONS.items() if c.drawn is not None}
"""Name -> range of strengths, of those that are drawn."""
MOST_DRAWN, MOST_TRIED = 64, 10
"""Copies that are made worse by what is drawn: eight of each kind; cases that are tried at the usual strengths."""
LEARNING_SHARE, TRYING_SHARE = 0.05, 0.02
"""Of the time that the jobs trained, which predicting both may take; what the first leaves is the second's. A choice.
A budget keeps as much (`autoseg.pipeline.budget`)."""
SHARE = LEARNING_SHARE + TRYING_SHARE


def corrupt(
    kind: str, image: Volume, label: np.ndarray, random: np.random.Generator, strength: float | None = None
) -> tuple[Volume, np.ndarray]:
    """An image made worse, and the label that belongs to it.

    Args:
        kind: of `CORRUPTIONS`; the voxels change, or what the file says of their size and direction.
        image: as `read_image` gives it.
        label: (X, Y, Z).
        random: where, and how much.
        strength: None: drawn.
    """
    return CORRUPTIONS[kind].apply(
        image, label, float(random.uniform(*DRAWN[kind])) if strength is None else strength, random
    )
