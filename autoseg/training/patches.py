"""Which patches a step trains on: a pure function of seed, step and place in the batch.

Nothing is remembered from one step to the next, so a resumed job draws exactly what it would have drawn, and
several processes share a batch without talking to each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autoseg.data.labels import LabelMap
from autoseg.plan import Plan
from autoseg.training.cache import CachedCase

Voxels = tuple[int, int, int]


def sample_rng(seed: int, step: int, index: int) -> np.random.Generator:
    """The random state of one sample: seed of the job, step of training, place in the global batch."""
    return np.random.default_rng([seed, step, index])


def case_of(seed: int, position: int, num_cases: int) -> int:
    """The case at a position of the endless stream of shuffled passes over all cases."""
    order = np.random.default_rng([seed, 7919, position // num_cases]).permutation(num_cases)
    return int(order[position % num_cases])


def unannotated_classes(cases: Sequence[CachedCase], label_map: LabelMap) -> np.ndarray:
    """Which classes each case was not annotated for, (cases, K) bool.

    A class that no case is annotated for counts as annotated and absent everywhere: it could else take any share of
    the background's probability.
    """
    lacking = _lacking([c.annotated for c in cases], label_map)
    lacking[:, lacking.all(axis=0)] = False
    return lacking


def filled_classes(cases: Sequence[CachedCase], label_map: LabelMap) -> np.ndarray:
    """Which classes models, not annotators, drew in each case, (cases, K) bool."""
    known = ~_lacking([c.annotated for c in cases], label_map)
    return known & _lacking([c.by_annotators for c in cases], label_map)


def _lacking(listed: Sequence[tuple[str, ...] | None], label_map: LabelMap) -> np.ndarray:
    """Which classes each list of names lacks, (lists, K) bool; None lists all."""
    return np.array([[names is not None and n not in names for n in label_map.names] for names in listed])


class Sampler:
    """Draws the case and the centre of each patch.

    Where all cases are annotated for the same classes, cases come in shuffled passes, and a class is drawn among those
    of the case. Where they are not, the class comes first and then a case that has it: drawn case by case, a class that
    few cases are annotated for would be met in few patches. A patch that may lie anywhere is then cut from a case that
    is annotated for a class drawn at random, so that background, too, is met where it is known to be background.

    Of a class that models filled in for some cases, a share of the patches comes from those whose annotators drew it:
    drawn alike from all, the few that show the truth would be lost among pseudo-labels, which pass on the mistakes of
    the models that made them.

    Source: nnU-Net oversamples foreground in a third of the batch, by class present in the case; the FLARE23 paper
    draws background and every class alike.
    """

    def __init__(
        self,
        cases: Sequence[CachedCase],
        unannotated: np.ndarray,
        *,
        foreground_fraction: float,
        class_weights: np.ndarray | None = None,
        filled: np.ndarray | None = None,
        annotators_share: float = 0.0,
    ) -> None:
        """Look at the cases once.

        Args:
            unannotated: (cases, K) bool, the classes that a case was not annotated for.
            foreground_fraction: share of patches that are centred on a voxel of a class.
            class_weights: (K,) how often a class is drawn in relation to the others; None: all alike.
            filled: (cases, K) bool, the classes that models filled in; None: none.
            annotators_share: share of a class' patches that are cut from cases whose annotators drew it, where models
                filled it in for others.
        """
        num_classes = unannotated.shape[1]
        self.cases, self.foreground_fraction = cases, foreground_fraction
        self.weights = np.ones(num_classes) if class_weights is None else np.asarray(class_weights, float)
        # Points are sorted by class: those of class k lie between bounds[k] and bounds[k + 1].
        self.bounds = np.stack([np.searchsorted(c.points[:, 0], np.arange(num_classes + 1)) for c in cases])
        has_points = (np.diff(self.bounds, axis=1) > 0) & ~unannotated
        own = ~unannotated if filled is None or annotators_share == 0 else ~(unannotated | filled)
        self.is_partial = bool((unannotated != unannotated[0]).any() or (own != own[0]).any())
        self.having = [np.flatnonzero(has_points[:, k]) for k in range(num_classes)]
        self.by_annotators = [np.flatnonzero(has_points[:, k] & own[:, k]) for k in range(num_classes)]
        self.annotators_share = annotators_share
        self.annotated = [np.flatnonzero(~unannotated[:, k]) for k in range(num_classes)]
        self.has_points = has_points
        self.is_weighted = any(case.weight is not None for case in cases)
        self.unannotated = unannotated
        self.filled = np.zeros_like(unannotated) if filled is None else filled

    def draw(self, rng: np.random.Generator, seed: int, position: int) -> tuple[int, Voxels | None]:
        """The case of a patch and the voxel it is centred on; None: anywhere.

        Args:
            rng: of the sample.
            seed, position: of the stream of all samples, for the passes over the cases.
        """
        centred = rng.random() < self.foreground_fraction
        if not self.is_partial:
            case = case_of(seed, position, len(self.cases))
            known = np.flatnonzero(self.has_points[case] & (self.weights > 0))
            return case, self._point(case, self._class(rng, known), rng) if centred and len(known) else None
        if centred:
            k = self._class(rng, [k for k, having in enumerate(self.having) if len(having) and self.weights[k] > 0])
            if k is not None:
                among = self.having[k]
                if 0 < len(self.by_annotators[k]) < len(among) and rng.random() < self.annotators_share:
                    among = self.by_annotators[k]
                case = int(rng.choice(among))
                return case, self._point(case, k, rng)
        classes = [cases for cases in self.annotated if len(cases)]
        if not classes:  # no case is annotated for anything
            return case_of(seed, position, len(self.cases)), None
        return int(rng.choice(classes[int(rng.integers(len(classes)))])), None

    def _class(self, rng: np.random.Generator, known: Sequence[int] | np.ndarray) -> int | None:
        """A class out of some, by weight; None where there is none."""
        if len(known) == 0:
            return None
        weights = self.weights[known]
        even = bool((weights == weights[0]).all())
        return int(rng.choice(known, p=None if even else weights / weights.sum()))

    def _point(self, case: int, k: int | None, rng: np.random.Generator) -> Voxels | None:
        if k is None:
            return None
        x, y, z = self.cases[case].points[rng.integers(*self.bounds[case, k : k + 2]), 1:]
        return int(x), int(y), int(z)


def make_sampler(cases: Sequence[CachedCase], plan: Plan) -> Sampler:
    """The plan's way to draw patches from some cases."""
    return Sampler(
        cases,
        unannotated_classes(cases, plan.label_map),
        foreground_fraction=plan.foreground_fraction,
        class_weights=np.array(plan.each_class("class_sampling")),
        filled=filled_classes(cases, plan.label_map),
        annotators_share=plan.annotators_share,
    )


def cut_patch(
    case: CachedCase, roi: Voxels, rng: np.random.Generator, centre: Voxels | None, *, weighted: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Cut one patch around a centre, inside the image where that is larger, at a random place in it where smaller.

    Args:
        weighted: give the voxels' weights, too.

    Returns:
        image (C, *roi) float32 and target (1 or K, *roi) uint8, padded with 0; after the target's last channel one of
        the voxels' weights in percent, where asked for.
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
    target = np.zeros((len(case.target) + weighted, *roi), np.uint8)
    image[:, place[0], place[1], place[2]] = case.image[:, source[0], source[1], source[2]]
    inner = (place[0], place[1], place[2])
    target[: len(case.target), *inner] = case.target[:, source[0], source[1], source[2]]
    if weighted:
        target[-1] = 100
        if case.weight is not None:
            target[-1, *inner] = case.weight[0, source[0], source[1], source[2]]
    return image, target


def cut_batch(
    sampler: Sampler, *, seed: int, step: int, batch_size: int, indices: Sequence[int], roi: Voxels
) -> tuple[np.ndarray, np.ndarray, list[np.random.Generator], list[int]]:
    """Cut the patches of one step that this process is to train on.

    Args:
        indices: places in the global batch, 0..batch_size-1.

    Returns:
        images (len(indices), C, *roi) float32, targets (len(indices), 1 or K, *roi) uint8, with the voxels' weights
        in percent as one channel more where a case has weights, each sample's random state, which goes on into its
        augmentation, and its case.
    """
    images, targets, rngs, chosen = [], [], [], []
    for index in indices:
        rng = sample_rng(seed, step, index)
        case, centre = sampler.draw(rng, seed, step * batch_size + index)
        image, target = cut_patch(sampler.cases[case], roi, rng, centre, weighted=sampler.is_weighted)
        images.append(image)
        targets.append(target)
        rngs.append(rng)
        chosen.append(case)
    return np.stack(images), np.stack(targets), rngs, chosen
