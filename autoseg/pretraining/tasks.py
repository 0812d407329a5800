"""What encoders learn from images alone, as tasks of the trainer.

mae: blocks of a patch are masked by zeros, and the network draws what was there; the squared error counts in the masked
voxels alone. The masking is dense: convolutions pass over the zeros as over any voxel. Sparse ones (SparK, S3D) keep
them out, but need layers of their own in every network. Dense masking works for all networks here, and nnssl's
`BaseMAETrainer` is dense, too; its study has masked autoencoding first for convolutional networks (OpenMind, arXiv
2412.17041).

contrastive: two damaged views of each patch (`views`) are repaired, by the mean absolute error; and the coarsest
features of the two are to be like each other and unlike those of the batch's other views. Both together as Clara's
tutorial has it: L1 + L1 * contrastive. Of several processes each compares the views of its own patches.

Legend: B batch, V views of a patch, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from monai.losses.contrastive import ContrastiveLoss
from torch import nn

from autoseg.hardware.device import autocast, layout_of
from autoseg.plan import Plan
from autoseg.pretraining.network import Reconstructor, encoder_weights
from autoseg.pretraining.plan import LEAST_PAIRS
from autoseg.pretraining.views import block_mask, make_view
from autoseg.training.augment import Draw, augment_batch, draw
from autoseg.training.batches import Batches, Samples
from autoseg.training.cache import CachedCase
from autoseg.training.checkpoint import on_cpu
from autoseg.training.patches import case_of, place_patch, sample_rng
from autoseg.training.processes import Processes
from autoseg.training.progress import Progress
from autoseg.training.step import Loss
from autoseg.training.turning import Voxels
from autoseg.training.validation import Validator
from autoseg.workspace.files import digest
from autoseg.workspace.pretraining import Lesson, LessonLine
from autoseg.workspace.stored import Stored

ALL_AXES = (0, 1, 2)
"""Patches are mirrored along each: without labels no side is the right one."""
PATCHES = 2
"""Of each case by which the best weights are found. A choice."""


def cut_image(case: CachedCase, roi: Voxels, rng: np.random.Generator) -> np.ndarray:
    """A patch at a random place of an image, (C, *roi) float32; zeros outside of it."""
    start = place_patch(case.image.shape[1:], roi, rng, None)
    patch = np.zeros((len(case.image), *roi), np.float32)
    begin = [max(first, 0) for first in start]
    end = [min(first + edge, size) for first, edge, size in zip(start, roi, case.image.shape[1:], strict=True)]
    source = tuple(slice(a, b) for a, b in zip(begin, end, strict=True))
    inside = tuple(slice(a - first, b - first) for a, b, first in zip(begin, end, start, strict=True))
    patch[:, *inside] = case.image[:, *source]
    return patch


def damaged(lesson: Lesson, patch: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A patch as the network is shown it, and what it is to draw.

    Returns:
        (C, X, Y, Z), and the same with one channel more where blocks are masked: 1 where it counts.
    """
    if lesson.method == "contrastive":
        return make_view(rng, patch), patch
    mask = block_mask(rng, patch.shape[1:], lesson.mask_block, lesson.mask_share)
    return patch * ~mask, np.concatenate([patch, mask[None].astype(patch.dtype)])


@dataclass(frozen=True, slots=True, kw_only=True)
class CutViews:
    """The views of one step on the host."""

    image: torch.Tensor
    """(B V, C, X, Y, Z) float32."""
    target: torch.Tensor
    """(B V, C or C + 1, X, Y, Z) float32, as `damaged` has it."""
    draws: list[Draw]
    """How each is to be changed."""

    def pinned(self) -> CutViews:
        """The same in memory that a GPU copies from without a wait."""
        return replace(self, image=self.image.pin_memory(), target=self.target.pin_memory())


class ImageBatches(Batches[CutViews]):
    """Cuts patches of images and damages them."""

    def __init__(
        self, lesson: Lesson, plan: Plan, cases: Sequence[CachedCase], device: torch.device, indices: range
    ) -> None:
        """Set up; arguments as `Task.batches` takes them."""
        super().__init__(plan.roi_size, ahead=device.type == "cuda")
        self.lesson, self.plan, self.cases, self.device, self.indices = lesson, plan, cases, device, indices

    def cut(self, step: int) -> CutViews:
        """As `Batches.cut`."""
        plan, images, targets, draws = self.plan, [], [], []
        for index in self.indices:
            rng = sample_rng(plan.seed, step, index)
            case = self.cases[case_of(plan.seed, step * plan.batch_size + index, len(self.cases))]
            patch = cut_image(case, self.roi, rng)
            for _ in range(self.lesson.num_views):
                image, target = damaged(self.lesson, patch, rng)
                drawn = draw(rng, len(patch), plan.resample_resolution, self.roi, ALL_AXES, "light")
                # What is masked is drawn from what is seen, whose intensities must then be the same.
                draws.append(drawn if self.lesson.method == "contrastive" else Draw(flips=drawn.flips))
                images.append(torch.from_numpy(image))
                targets.append(torch.from_numpy(target))
        return CutViews(image=torch.stack(images), target=torch.stack(targets), draws=draws)

    def finish(self, cut: CutViews) -> Samples:
        """The views of each patch, one after the other along the channels: (B, V C, X, Y, Z)."""
        image = cut.image.to(self.device, non_blocking=True)
        target = cut.target.to(self.device, non_blocking=True)
        augment_batch(image, target, cut.draws, {}, lateral_pairs=(), sigmoid=False)
        num = len(self.indices)
        return Samples(image=_joined(image, num), target=_joined(target, num))


def _joined(views: torch.Tensor, num: int) -> torch.Tensor:
    return views.reshape(num, -1, *views.shape[2:])


def _apart(joined: torch.Tensor, num_views: int) -> torch.Tensor:
    return joined.reshape(len(joined) * num_views, -1, *joined.shape[2:])


def drawing_error(lesson: Lesson, drawn: torch.Tensor, target: torch.Tensor, *, squared: bool = False) -> torch.Tensor:
    """The mean error of drawn images: of masked voxels alone where some are.

    Args:
        drawn: (B, C, X, Y, Z).
        target: as `damaged` has it.
        squared: the mean squared error; else the absolute one.
    """
    channels = drawn.shape[1]
    error = drawn.float() - target[:, :channels]
    error = error.square() if squared else error.abs()
    if lesson.method == "contrastive":
        return error.mean()
    mask = target[:, channels:]
    return (error * mask).sum() / (mask.sum() * channels)


def image_loss(model: nn.Module, samples: Samples, plan: Plan, device: torch.device, lesson: Lesson) -> torch.Tensor:
    """The loss of a reconstructor on some samples, with the graph to its weights."""
    image, target = (_apart(joined, lesson.num_views) for joined in (samples.image, samples.target))
    with autocast(device, plan.precision):
        drawn, features = model(image.to(memory_format=layout_of(model)))
    if lesson.method == "mae":
        return drawing_error(lesson, drawn, target, squared=True)
    error = drawing_error(lesson, drawn, target)
    first, second = features.float().reshape(len(samples), 2, -1).unbind(1)
    contrast: torch.Tensor = ContrastiveLoss(temperature=lesson.temperature)(first, second)
    return error + error * contrast


class DrawingValidator(Validator):
    """Scores by minus the mean absolute error of drawn patches, the same of each case in every validation."""

    def __init__(self, lesson: Lesson, *given: Any) -> None:
        """Set up; all but the lesson as `Validator` takes it."""
        super().__init__(*given)
        self.lesson = lesson

    def voxels(self, case: CachedCase) -> int:
        """Voxels of its patches."""
        return PATCHES * math.prod(self.roi)

    @property
    def num_scores(self) -> int:
        """One."""
        return 1

    @torch.no_grad()
    def score(self, case: CachedCase) -> torch.Tensor:
        """Minus the error, (1,) float64."""
        rng = np.random.default_rng([self.plan.seed, int(digest(case.name)[:8], 16)])
        pairs = [damaged(self.lesson, cut_image(case, self.roi, rng), rng) for _ in range(PATCHES)]
        device = self.processes.device
        image, target = (torch.from_numpy(np.stack(arrays)).to(device) for arrays in zip(*pairs, strict=True))
        with autocast(device, self.plan.precision):
            drawn, _ = self.network(image.to(memory_format=layout_of(self.network)))
        return -drawing_error(self.lesson, drawn, target).double().cpu()[None]

    def shows_nothing(self, score: float) -> str:
        """Never: how small an error is depends on the images."""
        return ""

    def line(self, score: float, best: float) -> dict[str, float | None]:
        """As `Validator.line`."""
        return {
            "val_l1": None if math.isnan(score) else round(-score, 6),
            "best_l1": None if best == -math.inf else round(-best, 6),
        }

    def words(self, score: float, best: float) -> str:
        """As `Validator.words`."""
        return f"L1 {-score:.4f} (best {-best:.4f})"


@dataclass(frozen=True, slots=True)
class ImageTask:
    """What a lesson says, as a task of the trainer."""

    lesson: Lesson
    epoch_line: type[Stored] = LessonLine

    @property
    def least_patches(self) -> int:
        """As many as are compared: of one alone there is nothing to be unlike."""
        return LEAST_PAIRS if self.lesson.method == "contrastive" else 1

    def network(self, plan: Plan) -> Reconstructor:
        """The plan's, with an output for each channel of the image."""
        return Reconstructor(plan, compares=self.lesson.method == "contrastive")

    def batches(self, plan: Plan, cases: Sequence[CachedCase], device: torch.device, indices: range) -> ImageBatches:
        """Damaged patches, and what they were."""
        return ImageBatches(self.lesson, plan, cases, device, indices)

    def loss(self, plan: Plan, device: torch.device) -> Loss:
        """The lesson's."""
        return lambda model, samples: image_loss(model, samples, plan, device, self.lesson)

    def validator(
        self,
        plan: Plan,
        cases: Sequence[CachedCase],
        network: nn.Module,
        progress: Progress,
        processes: Processes,
        roi: Voxels,
        name: str,
    ) -> DrawingValidator:
        """The error on images that are not learned from."""
        return DrawingValidator(self.lesson, plan, cases, network, progress, processes, roi, name)

    def weights(self, network: nn.Module) -> dict[str, torch.Tensor]:
        """The encoder's."""
        assert isinstance(network, Reconstructor)
        return encoder_weights(network.algo, on_cpu(network.state_dict()))
