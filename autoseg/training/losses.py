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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from autoseg.data.labels import IGNORE, UNSURE

SMOOTH = 1e-5
"""Source: nnU-Net's and MONAI's smoothing of the Dice term."""
FOCAL_GAMMA = 2.0
"""Source: Lin et al. 2017; MONAI's DiceFocalLoss."""


def dice_terms(probs_bkn: torch.Tensor, target_bkn: torch.Tensor) -> torch.Tensor:
    """One minus soft Dice of each class in each sample, (B, K).

    Args:
        probs_bkn: (B, K, N) in 0..1, zero where ignored.
        target_bkn: (B, K, N) of 0 and 1, zero where ignored.
    """
    overlap = (probs_bkn * target_bkn).sum(-1)
    size = probs_bkn.sum(-1) + target_bkn.sum(-1)
    return 1 - (2 * overlap + SMOOTH) / (size + SMOOTH)


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
    logits = logits.float().flatten(2)
    target = target.flatten(2)
    num_classes = logits.shape[1] if sigmoid else logits.shape[1] - 1
    if class_weights is None:
        class_weights = torch.ones(num_classes, device=logits.device)
    weight_bk = class_weights.expand(len(logits), -1)
    if unannotated is not None:
        weight_bk = weight_bk * ~unannotated
    num_labels = num_classes if sigmoid else 1
    target, percent = target[:, :num_labels], target[:, num_labels:]
    valid = (target != IGNORE).float()
    if percent.shape[1]:
        valid = valid * (percent / 100)
    if sigmoid:
        terms = _region_terms(logits, target, valid, filled, class_weights, weight_bk)
    else:
        terms = _class_terms(logits, target, valid, unannotated, filled, class_weights)
    ce = terms.ce
    if loss == "dice_focal":
        ce = (1 - terms.chosen).clamp(0, 1) ** FOCAL_GAMMA * ce
    voxelwise = (ce * terms.weight).sum() / terms.counted.sum().clamp(min=1)
    dice_bk = dice_terms(terms.probs * terms.valid, terms.truth * terms.valid)
    dice = (dice_bk * weight_bk).sum() / (len(logits) * class_weights.sum())
    return dice + voxelwise


@dataclass(frozen=True, slots=True, kw_only=True)
class _Terms:
    """What both terms of the loss are made of; L is 1 for classes that exclude each other and K for regions."""

    probs: torch.Tensor
    """(B, K, N)."""
    truth: torch.Tensor
    """(B, K, N) of 0 and 1."""
    ce: torch.Tensor
    """(B, L, N) cross-entropy."""
    chosen: torch.Tensor
    """(B, L, N) probability of what is true."""
    valid: torch.Tensor
    """(B, L, N): what a voxel counts; 0 where it is ignored."""
    weight: torch.Tensor
    """(B, L, N): that times its class' weight, 0 where that was not annotated."""
    counted: torch.Tensor
    """(B, L, N): the same were all classes annotated."""


def _region_terms(
    logits: torch.Tensor,
    target: torch.Tensor,
    valid: torch.Tensor,
    filled: torch.Tensor | None,
    class_weights: torch.Tensor,
    weight_bk: torch.Tensor,
) -> _Terms:
    """Regions that may overlap: each output is a question of its own."""
    if filled is not None:
        valid = valid.masked_fill((target == UNSURE) & filled[..., None], 0)
    truth = (target == 1).float()
    probs = logits.sigmoid()
    return _Terms(
        probs=probs,
        truth=truth,
        ce=F.binary_cross_entropy_with_logits(logits, truth, reduction="none"),
        chosen=probs * truth + (1 - probs) * (1 - truth),
        valid=valid,
        weight=valid * weight_bk[..., None],
        counted=valid * class_weights[:, None],
    )


def _class_terms(
    logits: torch.Tensor,
    target: torch.Tensor,
    valid: torch.Tensor,
    unannotated: torch.Tensor | None,
    filled: torch.Tensor | None,
    class_weights: torch.Tensor,
) -> _Terms:
    """Classes that exclude each other: those that nobody looked for are part of the background."""
    every = logits.log_softmax(1)
    log_probs = every if unannotated is None else _merge(every, unannotated)
    unsure = target == UNSURE
    if filled is not None:
        hidden_bk = filled if unannotated is None else unannotated | filled
        log_probs = torch.where(unsure, _merge(every, hidden_bk), log_probs)
    index = target.masked_fill((target == IGNORE) | unsure, 0).long()
    if unannotated is not None:  # what a label holds beyond its annotation is background, too
        index = index.masked_fill(F.pad(unannotated, (1, 0)).gather(1, index[:, 0])[:, None], 0)
    ce = -log_probs.gather(1, index)
    weight = valid * F.pad(class_weights, (1, 0), value=1.0)[index]
    return _Terms(
        probs=log_probs.exp()[:, 1:],
        truth=F.one_hot(index[:, 0], logits.shape[1]).movedim(-1, 1)[:, 1:].float(),
        ce=ce,
        chosen=(-ce).exp(),
        valid=valid,
        weight=weight,
        counted=weight,
    )


def _merge(log_probs: torch.Tensor, unannotated: torch.Tensor) -> torch.Tensor:
    """Add the probabilities of unannotated classes to the background's; of none, they stay as they are.

    Args:
        log_probs: (B, C, N), background first.
        unannotated: (B, C - 1) bool.

    Returns:
        (B, C, N): their own log probabilities are then very low, and without gradient.
    """
    merged = F.pad(unannotated, (1, 0))[..., None]  # (B, C, 1)
    lowest = torch.finfo(log_probs.dtype).min
    inside = merged.clone()
    inside[:, 0] = True
    background = log_probs.masked_fill(~inside, lowest).logsumexp(1, keepdim=True)
    return torch.cat([background, log_probs[:, 1:].masked_fill(merged[:, 1:], lowest)], 1)


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
