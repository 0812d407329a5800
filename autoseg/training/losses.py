"""The loss: soft Dice with cross-entropy or focal loss, at every resolution the network puts out.

A sample may be annotated for some classes only. Exclusive classes: the probabilities of the others are added to the
background's, since an unannotated organ lies in what the label calls background (the marginal loss). Regions: the
outputs of the others are left out. A sample that is annotated for all classes is scored as ever.

Where models filled in classes that annotators had not drawn, and were not sure of a voxel, it says only that it is of
none of the drawn ones: there the filled in classes count as unannotated, too.

Legend: B batch, C outputs, K classes, N voxels.

Source: Shi et al. 2021, Marginal loss and exclusion loss for partially supervised multi-organ segmentation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from autoseg.data.labels import IGNORE, UNSURE

SMOOTH = 1e-5
"""Source: nnU-Net's and MONAI's smoothing of the Dice term."""
FOCAL_GAMMA = 2.0
"""Source: Lin et al. 2017; MONAI's DiceFocalLoss."""
PIECES, LEAST_PIECE, LEAST_VALUES = 32, 1 << 14, 1 << 23
"""Pieces that a batch is gone through in, so that what is computed of one takes a thirty-second of the memory; none of
fewer voxels, and on a GPU none of fewer values, those of all outputs. A piece is about 80 operations, each of which a
processor starts in some microseconds: in a step of 2 x 128^3 voxels and 14 outputs 8 pieces of 29 MB an operation, each
work for some ten microseconds, in place of 32."""


def segmentation_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    sigmoid: bool,
    loss: Literal["dice_ce", "dice_focal"],
    unannotated: torch.Tensor | None = None,
    filled: torch.Tensor | None = None,
    class_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dice plus cross-entropy or focal loss of one output.

    Args:
        logits: (B, C, X, Y, Z).
        target: (B, 1, X, Y, Z) class indices for softmax, (B, K, X, Y, Z) of 0 and 1 for sigmoid; uint8,
            255 where ignored, 254 where unsure. One channel more is what each voxel counts, in percent, in both terms.
        unannotated: (B, K) bool, the classes that a sample was not annotated for; None: every sample for all.
        filled: (B, K) bool, the classes that models filled in; None: none. Both are best None where no sample has
            such a class: to look, a GPU would have to be waited for.
        class_weights: (K,) weight of each class; the background's is 1. None: all alike.

    Returns:
        A scalar, float32. The Dice term leaves the background out (nnU-Net).

    Both terms are divided by what they would count were all classes annotated, so that the one class of a sparsely
    annotated sample does not weigh as much as all classes of another.
    """
    logits, target = logits.flatten(2), target.flatten(2)
    num_classes = logits.shape[1] if sigmoid else logits.shape[1] - 1
    if class_weights is None:
        class_weights = torch.ones(num_classes, device=logits.device)
    given = _Given(
        target=target,
        sigmoid=sigmoid,
        focal=loss == "dice_focal",
        unannotated=unannotated,
        filled=filled,
        class_weights=class_weights,
    )
    value: torch.Tensor = _Loss.apply(logits, given)
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    """What logits are compared with, as `segmentation_loss` takes it, but for one axis of voxels."""

    target: torch.Tensor
    sigmoid: bool
    focal: bool
    unannotated: torch.Tensor | None
    filled: torch.Tensor | None
    class_weights: torch.Tensor

    def weight_k(self, sample: int) -> torch.Tensor:
        """(K,): of each class in a sample, 0 where nobody looked for it."""
        return self.class_weights if self.unannotated is None else self.class_weights * ~self.unannotated[sample]

    def pieces(self) -> Iterator[tuple[int, slice]]:
        """Some voxels of a sample at a time: what is computed of them lies in memory once, on a CPU in its cache."""
        batch, _, num = self.target.shape
        on_cpu = self.target.device.type == "cpu"
        least = LEAST_PIECE if on_cpu else max(LEAST_PIECE, LEAST_VALUES // (len(self.class_weights) + 1))
        size = max(least, -(-batch * num // PIECES))
        return ((b, slice(first, first + size)) for b in range(batch) for first in range(0, num, size))


class _Loss(torch.autograd.Function):
    """The loss and its gradient, written out: kept between the two are the logits, and a few numbers of each class.

    As torch would have it, each voxel keeps its probabilities, their logarithms and which is true, of all outputs: 403
    bytes a voxel for 14 (measured).
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, given: _Given) -> torch.Tensor:
        """Logits (B, C, N)."""
        batch, num_classes = len(logits), len(given.class_weights)
        overlap, size = torch.zeros((2, batch, num_classes), device=logits.device)
        voxelwise, counted = torch.zeros(2, device=logits.device)
        for b, cut in given.pieces():
            piece = _Piece.of(logits, given, b, cut)
            truth = piece.truth * piece.valid
            probs = piece.probs * piece.valid
            overlap[b] += (probs * truth).sum(-1)
            size[b] += probs.sum(-1) + truth.sum(-1)
            ce = -piece.log_true
            if given.focal:
                ce = (1 - piece.log_true.exp()).clamp_(0, 1) ** FOCAL_GAMMA * ce
            voxelwise += (ce * piece.weight).sum()
            counted += piece.counted.sum()
        weight_bk = torch.stack([given.weight_k(b) for b in range(batch)])
        shared = batch * given.class_weights.sum()
        counted = counted.clamp(min=1)
        ctx.given = given
        ctx.save_for_backward(logits, overlap, size, weight_bk / shared, counted)
        dice_bk = 1 - (2 * overlap + SMOOTH) / (size + SMOOTH)
        return (dice_bk * weight_bk).sum() / shared + voxelwise / counted

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Through soft Dice to the probabilities, and through these and the cross-entropy to the logits."""
        logits, overlap, size, share_bk, counted = ctx.saved_tensors
        given: _Given = ctx.given
        result = torch.empty_like(logits)
        for b, cut in given.pieces():
            piece = _Piece.of(logits, given, b, cut)
            # Of 1 - (2 overlap + s) / (size + s) by a probability.
            factor = gradients[0] * share_bk[b] / (size[b] + SMOOTH)
            ratio = (2 * overlap[b] + SMOOTH) / (size[b] + SMOOTH)
            along = (ratio[:, None] - 2 * piece.truth * piece.valid) * piece.valid * factor[:, None]
            slope = -gradients[0] / counted * piece.weight  # by the logarithm of what is true
            if given.focal:
                true, rest = piece.log_true.exp(), (1 - piece.log_true.exp()).clamp_(0, 1)
                slope *= rest**FOCAL_GAMMA - FOCAL_GAMMA * rest ** (FOCAL_GAMMA - 1) * true * piece.log_true
            result[b, :, cut] = piece.to_logits(along, slope)
        return result, None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Some voxels of a sample; L is 1 for classes that exclude each other and K for regions."""

    probs: torch.Tensor
    """(K, n)."""
    truth: torch.Tensor
    """(K, n) of 0 and 1."""
    log_true: torch.Tensor
    """(L, n): logarithm of the probability of what is true."""
    valid: torch.Tensor
    """(L, n): what a voxel counts; 0 where it is ignored."""
    weight: torch.Tensor
    """(L, n): that times its class' weight, 0 where that was not annotated."""
    counted: torch.Tensor
    """(L, n): the same were all classes annotated."""
    softmax: torch.Tensor | None = None
    """(C, n): of the logits, no class merged; None for regions."""
    share: torch.Tensor | None = None
    """(C, n): of each output in what is true: how much more of that its logit makes; None for regions."""

    @classmethod
    def of(cls, logits: torch.Tensor, given: _Given, sample: int, cut: slice) -> _Piece:
        """Some voxels of logits (B, C, N)."""
        values = logits[sample, :, cut].float().contiguous()
        target = given.target[sample, :, cut]
        num_labels = len(given.class_weights) if given.sigmoid else 1
        target, percent = target[:num_labels], target[num_labels:]
        valid = (target != IGNORE).float()
        if len(percent):
            valid = valid * (percent / 100)
        make = cls._of_regions if given.sigmoid else cls._of_classes
        return make(values, target, valid, given, sample)

    @classmethod
    def _of_regions(
        cls, logits: torch.Tensor, target: torch.Tensor, valid: torch.Tensor, given: _Given, sample: int
    ) -> _Piece:
        """Regions that may overlap: each output is a question of its own."""
        if given.filled is not None:
            valid = valid.masked_fill((target == UNSURE) & given.filled[sample, :, None], 0)
        truth = (target == 1).float()
        return cls(
            probs=logits.sigmoid(),
            truth=truth,
            log_true=F.logsigmoid(logits * (2 * truth - 1)),
            valid=valid,
            weight=valid * given.weight_k(sample)[:, None],
            counted=valid * given.class_weights[:, None],
        )

    @classmethod
    def _of_classes(
        cls, logits: torch.Tensor, target: torch.Tensor, valid: torch.Tensor, given: _Given, sample: int
    ) -> _Piece:
        """Classes that exclude each other: those that nobody looked for are part of the background."""
        log_probs = logits.log_softmax(0)
        probs = log_probs.exp()
        unsure = target == UNSURE
        index = target.masked_fill((target == IGNORE) | unsure, 0)
        merged: torch.Tensor | None = None  # (K, n) or (K, 1) bool: classes that are background there
        if given.unannotated is not None:
            merged = given.unannotated[sample, :, None]
            # What a label holds beyond its annotation is background, too.
            index = index.masked_fill(F.pad(given.unannotated[sample], (1, 0))[index.long()], 0)
        if given.filled is not None:
            guessed = unsure & given.filled[sample, :, None]
            merged = guessed if merged is None else merged | guessed
        outputs = torch.arange(len(logits), dtype=index.dtype, device=index.device)[:, None]
        share = (index == outputs).float()
        if merged is None:
            log_true = log_probs.gather(0, index.long())
            classes = probs[1:]
        else:
            inside = F.pad(merged, (0, 0, 1, 0), value=True)
            log_background = log_probs.masked_fill(~inside, -math.inf).logsumexp(0, keepdim=True)
            is_background = index == 0
            log_true = torch.where(is_background, log_background, log_probs.gather(0, index.long()))
            of_background = (log_probs - log_background).exp() * inside
            share = torch.where(is_background, of_background, share)
            classes = probs[1:] * ~merged
        weight = valid * F.pad(given.class_weights, (1, 0), value=1.0)[index.long()]
        return cls(
            probs=classes,
            truth=(index == outputs[1:]).float(),
            log_true=log_true,
            valid=valid,
            weight=weight,
            counted=weight,
            softmax=probs,
            share=share,
        )

    def to_logits(self, along: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        """The gradient by the logits, from those by the probabilities (K, n) and by the true one's logarithm (L, n)."""
        if self.softmax is None or self.share is None:
            return along * self.probs * (1 - self.probs) + slope * (self.truth - self.probs)
        # A merged class' own probability is 0 whatever its logit is.
        own = along * self.probs
        mean = own.sum(0, keepdim=True)
        result = (self.share - self.softmax) * slope - self.softmax * mean
        result[1:] += own
        return result


def supervised_loss(
    outputs: torch.Tensor | Sequence[torch.Tensor],
    target: torch.Tensor,
    *,
    sigmoid: bool,
    loss: Literal["dice_ce", "dice_focal"],
    unannotated: torch.Tensor | None = None,
    filled: torch.Tensor | None = None,
    class_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss over all output resolutions, weights 1, 1/2, 1/4, ... summing to 1.

    Args:
        outputs: one output, or several from fine to coarse; targets are brought to each by nearest neighbour.
        unannotated, filled, class_weights: as `segmentation_loss` takes them.

    Source: nnU-Net (normalised weights); the FLARE23 paper's equation 1.
    """
    if isinstance(outputs, torch.Tensor):
        outputs = [outputs]
    weights = [0.5**i for i in range(len(outputs))]
    total = torch.zeros((), device=target.device)
    for weight, output in zip(weights, outputs, strict=True):
        sized = target
        if output.shape[2:] != target.shape[2:]:
            sized = F.interpolate(target.float(), size=output.shape[2:], mode="nearest-exact").to(target.dtype)
        part = segmentation_loss(
            output,
            sized,
            sigmoid=sigmoid,
            loss=loss,
            unannotated=unannotated,
            filled=filled,
            class_weights=class_weights,
        )
        total = total + weight / sum(weights) * part
    return total
