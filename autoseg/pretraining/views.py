"""How patches are damaged, so that a network learns to repair them: blocks that are masked, and two views of one patch.

All of it is drawn from a sample's own random state, on arrays (C, X, Y, Z).

Source of the views: MONAI's tutorial `vit_unetr_ssl`, which NVIDIA's Clara trains by: 6 holes of 5 to 32 voxels that
are filled (inner cutout) or 6 windows of 20 to 64 that are all that is left (outer cutout), one or the other; then, in
8 of 10 views, 10 blocks of 8 voxels whose voxels change places; in patches of 96^3. Here all lengths are shares of the
patch's edge, so that smaller patches are damaged alike. Flips and intensities follow; see `tasks`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

EDGE = 96
"""Of the patches that the numbers below are for, in voxels."""
HOLES, INNER, OUTER = 6, (5, 32), (20, 64)
"""Holes of a cutout, and the shortest and longest edges of inner and of outer ones."""
P_SHUFFLE, SHUFFLED, SHUFFLED_EDGE = 0.8, 10, 8
"""How often voxels change places, in how many blocks, of which edge."""
LEAST = 2
"""Voxels of the shortest edge: one voxel has none to change places with."""
MOST_BLOCK = 1 / 4
"""Of a patch's edge: the longest edge of a masked block. A choice: at least 64 blocks, of which some are seen."""

Box = tuple[slice, slice, slice]


def block_mask(rng: np.random.Generator, shape: Sequence[int], block: int, share: float) -> np.ndarray:
    """Mask whole blocks of a patch, drawn at random.

    Args:
        shape: of the patch.
        block: edge of a block in voxels; at most `MOST_BLOCK` of the patch's edge.
        share: of the blocks, which is that of the voxels where blocks divide the patch.

    Returns:
        (X, Y, Z) bool: True where masked; some blocks are, and some are not.

    Source: nnssl's `BaseMAETrainer`: three quarters of the blocks of 16^3, zeros in their place.
    """
    edges = [max(1, min(block, int(size * MOST_BLOCK))) for size in shape]
    counts = [math.ceil(size / edge) for size, edge in zip(shape, edges, strict=True)]
    total = math.prod(counts)
    masked = np.zeros(total, bool)
    masked[rng.permutation(total)[: min(max(1, round(share * total)), max(1, total - 1))]] = True
    mask = masked.reshape(counts)
    for axis, (edge, size) in enumerate(zip(edges, shape, strict=True)):
        mask = mask.repeat(edge, axis).take(range(size), axis)
    return mask


def make_view(rng: np.random.Generator, patch: np.ndarray) -> np.ndarray:
    """A damaged copy of a patch: inner or outer cutout, then voxels that change places."""
    cut = inner_cutout if rng.random() < 0.5 else outer_cutout
    view = cut(rng, patch)
    return shuffle_blocks(rng, view) if rng.random() < P_SHUFFLE else view


def inner_cutout(rng: np.random.Generator, patch: np.ndarray) -> np.ndarray:
    """Fill holes with noise between the patch's lowest and highest intensity."""
    view = patch.copy()
    for box in _boxes(rng, patch.shape[1:], *INNER):
        view[:, *box] = _noise(rng, view[:, *box].shape, patch)
    return view


def outer_cutout(rng: np.random.Generator, patch: np.ndarray) -> np.ndarray:
    """Fill all but some windows with such noise."""
    view = _noise(rng, patch.shape, patch)
    for box in _boxes(rng, patch.shape[1:], *OUTER):
        view[:, *box] = patch[:, *box]
    return view


def shuffle_blocks(rng: np.random.Generator, patch: np.ndarray) -> np.ndarray:
    """Let the voxels of some small blocks change places within their block, those of all channels together."""
    view = patch.copy()
    for box in _boxes(rng, patch.shape[1:], SHUFFLED_EDGE, SHUFFLED_EDGE, count=SHUFFLED):
        block = view[:, *box]
        flat = block.reshape(len(block), -1)
        view[:, *box] = flat[:, rng.permutation(flat.shape[1])].reshape(block.shape)
    return view


def _noise(rng: np.random.Generator, shape: Sequence[int], patch: np.ndarray) -> np.ndarray:
    return rng.uniform(patch.min(), patch.max(), shape).astype(patch.dtype)


def _boxes(
    rng: np.random.Generator, shape: Sequence[int], shortest: int, longest: int, *, count: int = HOLES
) -> Iterator[Box]:
    """Boxes at random places inside a patch; their edges are between two lengths in patches of `EDGE`."""
    for _ in range(count):
        box = []
        for size in shape:
            low, high = (min(size, max(LEAST, round(length * size / EDGE))) for length in (shortest, longest))
            edge = int(rng.integers(low, high + 1))
            start = int(rng.integers(0, size - edge + 1))
            box.append(slice(start, start + edge))
        yield box[0], box[1], box[2]
