"""Which patches a step trains on: a pure function of seed, step and place in the batch.

Nothing is remembered from one step to the next, so a resumed job draws exactly what it would have drawn, and
several processes share a batch without talking to each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autoseg.algos.cache import CachedCase

Voxels = tuple[int, int, int]


def sample_rng(seed: int, step: int, index: int) -> np.random.Generator:
    """The random state of one sample: seed of the job, step of training, place in the global batch."""
    return np.random.default_rng([seed, step, index])


def case_of(seed: int, position: int, num_cases: int) -> int:
    """The case at a position of the endless stream of shuffled passes over all cases."""
    order = np.random.default_rng([seed, 7919, position // num_cases]).permutation(num_cases)
    return int(order[position % num_cases])


def draw_centre(case: CachedCase, rng: np.random.Generator, foreground_fraction: float) -> Voxels | None:
    """A voxel of a class drawn at random among the case's classes; None: anywhere.

    Source: nnU-Net oversamples foreground in a third of the batch, by class present in the case.
    """
    if rng.random() >= foreground_fraction or len(case.points) == 0:
        return None
    chosen = rng.choice(np.unique(case.points[:, 0]))
    low, high = np.searchsorted(case.points[:, 0], [chosen, chosen + 1])
    x, y, z = case.points[rng.integers(low, high), 1:]
    return int(x), int(y), int(z)


def cut_patch(
    case: CachedCase, roi: Voxels, rng: np.random.Generator, centre: Voxels | None
) -> tuple[np.ndarray, np.ndarray]:
    """Cut one patch around a centre, inside the image where that is larger, at a random place in it where smaller.

    Returns:
        image (C, *roi) float32 and target (1 or K, *roi) uint8, padded with 0.
    """
    shape = case.image.shape[1:]
    source, place = [], []
    for axis in range(3):
        spare = shape[axis] - roi[axis]
        if spare <= 0:
            start, offset = 0, int(rng.integers(0, -spare + 1))
        else:
            wanted = int(rng.integers(0, spare + 1)) if centre is None else centre[axis] - roi[axis] // 2
            start, offset = min(max(wanted, 0), spare), 0
        length = min(roi[axis], shape[axis])
        source.append(slice(start, start + length))
        place.append(slice(offset, offset + length))
    image = np.zeros((len(case.image), *roi), np.float32)
    target = np.zeros((len(case.target), *roi), np.uint8)
    image[:, place[0], place[1], place[2]] = case.image[:, source[0], source[1], source[2]]
    target[:, place[0], place[1], place[2]] = case.target[:, source[0], source[1], source[2]]
    return image, target


def cut_batch(
    cases: Sequence[CachedCase],
    *,
    seed: int,
    step: int,
    batch_size: int,
    indices: Sequence[int],
    roi: Voxels,
    foreground_fraction: float,
) -> tuple[np.ndarray, np.ndarray, list[np.random.Generator]]:
    """Cut the patches of one step that this process is to train on.

    Args:
        indices: places in the global batch, 0..batch_size-1.

    Returns:
        images (len(indices), C, *roi) float32, targets (len(indices), 1 or K, *roi) uint8, and each sample's random
        state, which goes on into its augmentation.
    """
    images, targets, rngs = [], [], []
    for index in indices:
        rng = sample_rng(seed, step, index)
        case = cases[case_of(seed, step * batch_size + index, len(cases))]
        image, target = cut_patch(case, roi, rng, draw_centre(case, rng, foreground_fraction))
        images.append(image)
        targets.append(target)
        rngs.append(rng)
    return np.stack(images), np.stack(targets), rngs
