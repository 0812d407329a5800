"""What the models of a round say about a case: a label, the probability behind each voxel, and where they disagree."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from autoseg.data.grid import Grid
from autoseg.data.labels import LabelMap
from autoseg.data.streams import FileImage, open_image
from autoseg.evaluation.metrics import pair_counts
from autoseg.inference.predictor import Predictor
from autoseg.inference.restore import labels_of_means
from autoseg.inference.sides import BodyWatch, split_sides
from autoseg.workspace.stored import Stored


class ClassEvidence(Stored):
    """One class in one case, over the voxels that its annotators left as background."""

    voxels: int
    """Predicted by all models together."""
    volume_ml: float
    confidence: float | None
    """Mean probability there; None where there is none."""
    disagreement: float | None
    """Differing over foreground voxels, mean over pairs of folds, 0 to 2; None with one fold alone.
    Source: the FLARE22 winner's rule, there over rounds of training; here over folds, which one round has."""

    def rounded(self) -> ClassEvidence:
        """As it is stored: floats of 6 digits."""
        return self.model_copy(update={k: round(v, 6) if isinstance(v, float) else v for k, v in self})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prediction:
    """A case as the models see it, on the image's own grid in RAS."""

    predicted: np.ndarray
    """(X, Y, Z) values of the classes to fill in, 0 elsewhere."""
    percent: np.ndarray
    """(X, Y, Z) uint8: the probability of what `predicted` says, in percent."""
    classes: dict[str, ClassEvidence]
    grid: Grid


def choose(
    probs: torch.Tensor, label_map: LabelMap, wanted: Sequence[int], hidden: Sequence[int], *, conditioned: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The class of each voxel among those wanted, and its probability.

    Args:
        probs: (C outputs, X, Y, Z).
        wanted: indices of the classes to fill in.
        hidden: indices of all classes that the case was not annotated for.
        conditioned: given that the voxel is of none of the annotated classes, which the annotators say where they left
            background; else a class must win against those too.

    Returns:
        Values in a label file, 0 where none of the wanted classes is most probable; probabilities, float32.
    """
    table = np.zeros(len(label_map.names) + 1, label_map.dtype)
    for k in wanted:
        table[k + 1] = label_map.painted_values[k]
    if label_map.sigmoid:
        most, which = probs[list(wanted)].max(0)
        chosen = np.where(most.numpy() > 0.5, np.asarray(wanted)[which.numpy()] + 1, 0)
        return table[chosen], torch.maximum(most, 1 - most).numpy()
    if conditioned:
        others = [k + 1 for k in hidden if k not in wanted]
        background = probs[[0, *others]].sum(0, keepdim=True)
        allowed = torch.cat([background, probs[[k + 1 for k in wanted]]])
        most, which = allowed.max(0)
        chosen = np.array([0, *(k + 1 for k in wanted)])[which.numpy()]
        return table[chosen], (most / allowed.sum(0).clamp(min=1e-6)).numpy()
    most, which = probs.max(0)
    return table[which.numpy()], most.numpy()


def predict_case(
    predictor: Predictor,
    folds: Sequence[int],
    images: Sequence[Path],
    label: np.ndarray | None,
    *,
    wanted: Sequence[str],
    annotated: Sequence[str],
    conditioned: bool,
) -> Prediction:
    """Let the models predict a case.

    Args:
        predictor: all models; their probabilities are averaged, whatever way the ensemble merges labels.
        folds: fold of each of them.
        label: (X, Y, Z) in RAS, as the annotators made it; None: there is none.
        wanted: classes to fill in, as the user names them.
        annotated: classes that the case was annotated for.
        conditioned: as `choose` takes it.

    Where the models know both sides of a class as one, what they find is split as in any prediction.

    Raises:
        DataError: The image cannot be read, or does not have the models' channels.
    """
    label_map = predictor.label_map
    of = {part: k for k, n in enumerate(label_map.names) for part in label_map.parts(n)}
    indices = sorted({of[n] for n in wanted})
    hidden = [k for k, n in enumerate(label_map.names) if not set(label_map.parts(n)) <= set(annotated)]
    by_fold = [tuple(i for i, f in enumerate(folds) if f == fold) for fold in sorted(set(folds))]
    with ExitStack() as stack:
        image = open_image(list(images))
        if isinstance(image, FileImage):
            stack.enter_context(image)
        predicted, percent = np.zeros(image.shape, label_map.dtype), np.zeros(image.shape, np.uint8)
        percent[:] = 100  # outside every model's box is background

        def watch(subset: int, place: tuple[slice, slice, slice], probs: torch.Tensor) -> None:
            if subset == 0:
                values, probability = choose(probs.cpu(), label_map, indices, hidden, conditioned=conditioned)
                predicted[place], percent[place] = values, np.rint(100 * probability)

        # One fold's models alone have nobody to differ from.
        subsets = [tuple(range(len(folds))), *(by_fold if len(by_fold) > 1 else [])]
        watched = BodyWatch(image) if label_map.merged_sides else None
        members = predictor.each(watched or image)
        labels_by_subset = labels_of_means(members, subsets, image.shape, label_map, watch=watch)
        grid, voxel_ml = image.grid, float(np.prod(image.spacing_mm)) / 1000
    painted = dict(zip(label_map.named.names, label_map.named.painted_values, strict=True))
    if watched is not None:
        split_sides(predicted, label_map, watched.midline())
        predicted[~np.isin(predicted, [painted[n] for n in wanted])] = 0  # the other side, which is annotated
    free = np.ones(predicted.shape, bool) if label is None else label == 0
    disagreement = disagreements([labels[free] for labels in labels_by_subset[1:]], label_map, indices)
    classes = {
        name: _class_evidence(free & (predicted == painted[name]), percent, voxel_ml, disagreement[of[name]])
        for name in wanted
    }
    return Prediction(predicted=predicted, percent=percent, classes=classes, grid=grid)


def _class_evidence(
    mask: np.ndarray, percent: np.ndarray, voxel_ml: float, disagreement: float | None
) -> ClassEvidence:
    """What the models say of one class, where it would be filled in."""
    voxels = int(mask.sum())
    return ClassEvidence(
        voxels=voxels,
        volume_ml=voxels * voxel_ml,
        confidence=float(percent[mask].mean()) / 100 if voxels else None,
        disagreement=disagreement,
    )


def disagreements(labels: Sequence[np.ndarray], label_map: LabelMap, classes: Sequence[int]) -> dict[int, float | None]:
    """How much label maps differ in each class: differing over foreground voxels, mean over all pairs.

    Two maps of equal size that share nothing differ by 2, one that is empty differs by 2 from any other; two empty ones
    agree.
    """
    if len(labels) < 2:
        return dict.fromkeys(classes, None)
    by_class: dict[int, list[float]] = {k: [] for k in classes}
    for first, second in combinations(labels, 2):
        counts = pair_counts(first, second)
        for k in classes:
            rows = [v for v in label_map.values[k] if v < counts.shape[0]]
            columns = [v for v in label_map.values[k] if v < counts.shape[1]]
            a, b = int(counts[:, columns].sum()), int(counts[rows].sum())
            shared = int(counts[np.ix_(rows, columns)].sum())
            by_class[k].append((a + b - 2 * shared) / ((a + b) / 2) if a + b else 0.0)
    return {k: sum(values) / len(values) for k, values in by_class.items()}
