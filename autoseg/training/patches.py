"""Which patches a step trains on: a pure function of seed, step and place in the batch.

Nothing is remembered from one step to the next, so a resumed job draws exactly what it would have drawn, and
several processes share a batch without talking to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from autoseg.data.labels import LabelMap
from autoseg.plan import Plan
from autoseg.training.augment import Draw
from autoseg.training.cache import CachedCase
from autoseg.training.turning import OUTSIDE_WEIGHT, Turned, Voxels, axis_left_alone, box_of_turned, places_in_box


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Patches:
    """The patches of one step as they were cut."""

    image: torch.Tensor
    """(B, C, X, Y, Z) float32; zeros where a patch is to be turned."""
    target: torch.Tensor
    """(B, 1 or K, X, Y, Z) uint8; the voxels' weights in percent follow where a case has them."""
    turned: dict[int, Turned]
    """What the patches that are to be turned are made of, by their place in the batch."""
    draws: list[Draw]
    """How each is to be changed."""
    cases: list[int]
    """Which case each is of."""

    def pinned(self) -> Patches:
        """The same in memory that a GPU copies from without a wait."""
        turned = {i: one.pinned() for i, one in self.turned.items()}
        return replace(self, image=self.image.pin_memory(), target=self.target.pin_memory(), turned=turned)


def place_patch(shape: Sequence[int], roi: Voxels, rng: np.random.Generator, centre: Voxels | None) -> Voxels:
    """The first voxel of a patch: around a centre and inside the image; at a random place around one that is smaller.

    Args:
        shape: of the image.
        centre: None: anywhere.

    Returns:
        In voxels of the image; negative where the patch begins outside of it.
    """
    start = []
    for axis in range(3):
        spare = shape[axis] - roi[axis]
        if spare <= 0:
            start.append(-int(rng.integers(0, -spare + 1)))
        else:
            wanted = int(rng.integers(0, spare + 1)) if centre is None else centre[axis] - roi[axis] // 2
            start.append(min(max(wanted, 0), spare))
    return start[0], start[1], start[2]


def cut_patch(case: CachedCase, start: Voxels, image: np.ndarray, target: np.ndarray, *, weighted: bool) -> None:
    """Cut one patch; what lies outside of the case stays as it is.

    Args:
        start: its first voxel in the case.
        image: (C, *roi), filled in.
        target: (1 or K, *roi), filled in; with one channel more for the voxels' weights in percent where asked for.
    """
    source, inside = [], []
    for first, size, edge in zip(start, case.image.shape[1:], image.shape[1:], strict=True):
        begin, end = max(first, 0), min(first + edge, size)
        source.append(slice(begin, end))
        inside.append(slice(begin - first, end - first))
    (x, y, z), (u, v, w) = source, inside
    image[:, u, v, w] = case.image[:, x, y, z]
    target[: len(case.target), u, v, w] = case.target[:, x, y, z]
    if weighted:
        target[-1] = OUTSIDE_WEIGHT
        target[-1, u, v, w] = 100 if case.weight is None else case.weight[0, x, y, z]


def cut_turned(case: CachedCase, start: Voxels, roi: Voxels, matrix: np.ndarray, *, weighted: bool) -> Turned:
    """Cut what a turned patch is made of.

    Args:
        start: first voxel of the patch before it is turned.
        matrix: as `draw_matrix` gives it.
        weighted: give the voxels' weights, too.
    """
    (x, y, z), centre = box_of_turned(matrix, start, roi, case.image.shape[1:])
    image, target = np.array(case.image[:, x, y, z]), np.array(case.target[:, x, y, z])
    if weighted:
        weight = np.full_like(target[:1], 100) if case.weight is None else case.weight[:, x, y, z]
        target = np.concatenate([target, weight])
    through = axis_left_alone(matrix)
    return Turned(
        image=torch.from_numpy(image),
        target=torch.from_numpy(target),
        weighted=weighted,
        places=torch.from_numpy(places_in_box(matrix, centre, roi)),
        through=through,
        first_slice=0 if through is None else max(-start[through], 0),
    )


def cut_batch(
    sampler: Sampler,
    *,
    seed: int,
    step: int,
    batch_size: int,
    indices: Sequence[int],
    roi: Voxels,
    draw: Callable[[np.random.Generator, int], Draw] = lambda rng, case: Draw(),
) -> Patches:
    """Cut the patches of one step that this process is to train on.

    Args:
        indices: places in the global batch, 0..batch_size-1.
        draw: gives the changes of a sample by its random state and case.
    """
    first, weighted = sampler.cases[0], sampler.is_weighted
    image = np.zeros((len(indices), len(first.image), *roi), np.float32)
    target = np.zeros((len(indices), len(first.target) + weighted, *roi), np.uint8)
    turned, draws, chosen = {}, [], []
    for i, index in enumerate(indices):
        rng = sample_rng(seed, step, index)
        number, centre = sampler.draw(rng, seed, step * batch_size + index)
        case = sampler.cases[number]
        start = place_patch(case.image.shape[1:], roi, rng, centre)
        drawn = draw(rng, number)
        if drawn.matrix is None:
            cut_patch(case, start, image[i], target[i], weighted=weighted)
        else:
            turned[i] = cut_turned(case, start, roi, drawn.matrix, weighted=weighted)
        draws.append(drawn)
        chosen.append(number)
    return Patches(
        image=torch.from_numpy(image), target=torch.from_numpy(target), turned=turned, draws=draws, cases=chosen
    )
