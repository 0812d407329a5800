"""The loss: soft Dice with cross-entropy or focal loss, at every resolution the network puts out.

Legend: B batch, C outputs, K classes, N voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F

from autoseg.data.labels import IGNORE

SMOOTH = 1e-5
"""Source: nnU-Net's and MONAI's smoothing of the Dice term."""
FOCAL_GAMMA = 2.0
"""Source: Lin et al. 2017; MONAI's DiceFocalLoss."""


def dice_loss(probs_bkn: torch.Tensor, target_bkn: torch.Tensor) -> torch.Tensor:
    """One minus soft Dice, mean over samples and classes.

    Args:
        probs_bkn: (B, K, N) in 0..1, zero where ignored.
        target_bkn: (B, K, N) of 0 and 1, zero where ignored.
    """
    overlap = (probs_bkn * target_bkn).sum(-1)
    size = probs_bkn.sum(-1) + target_bkn.sum(-1)
    return (1 - (2 * overlap + SMOOTH) / (size + SMOOTH)).mean()


def segmentation_loss(
    logits: torch.Tensor, target: torch.Tensor, *, sigmoid: bool, loss: Literal["dice_ce", "dice_focal"]
) -> torch.Tensor:
    """Dice plus cross-entropy or focal loss of one output.

    Args:
        logits: (B, C, X, Y, Z).
        target: (B, 1, X, Y, Z) class indices for softmax, (B, K, X, Y, Z) of 0 and 1 for sigmoid; uint8,
            255 where ignored.

    Returns:
        A scalar, float32. The Dice term leaves the background out (nnU-Net).
    """
    logits = logits.float().flatten(2)
    target = target.flatten(2)
    valid = target != IGNORE  # (B, 1 or K, N)
    if sigmoid:
        truth = (target == 1).float()
        probs = logits.sigmoid()
        ce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        chosen = probs * truth + (1 - probs) * (1 - truth)
        weight = valid.float()
    else:
        index = torch.where(valid, target, torch.zeros_like(target)).long()
        log_probs = logits.log_softmax(1)
        probs = log_probs.exp()[:, 1:]
        truth = F.one_hot(index[:, 0], logits.shape[1]).movedim(-1, 1)[:, 1:].float()
        ce = -log_probs.gather(1, index)
        chosen = (-ce).exp()
        weight = valid.float()
    if loss == "dice_focal":
        ce = (1 - chosen).clamp(0, 1) ** FOCAL_GAMMA * ce
    voxelwise = (ce * weight).sum() / weight.sum().clamp(min=1)
    return dice_loss(probs * weight, truth * weight) + voxelwise


def supervised_loss(
    outputs: torch.Tensor | Sequence[torch.Tensor],
    target: torch.Tensor,
    *,
    sigmoid: bool,
    loss: Literal["dice_ce", "dice_focal"],
) -> torch.Tensor:
    """The loss over all output resolutions, weights 1, 1/2, 1/4, ... summing to 1.

    Args:
        outputs: one output, or several from fine to coarse; targets are brought to each by nearest neighbour.

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
        total = total + weight / sum(weights) * segmentation_loss(output, sized, sigmoid=sigmoid, loss=loss)
    return total
