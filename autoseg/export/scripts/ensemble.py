"""Several networks as one: each sees the image as it was trained, and their probabilities are averaged by MONAI."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.data.meta_tensor import MetaTensor
from monai.data.utils import decollate_batch
from monai.transforms.compose import Compose
from monai.transforms.post.array import MeanEnsemble
from monai.transforms.utils import allow_missing_keys_mode
from monai.utils.type_conversion import convert_to_dst_type
from torch import nn


class Member(nn.Module):
    """Networks with the same preprocessing and windows; their logits are averaged."""

    def __init__(
        self,
        networks: Sequence[nn.Module],
        transforms: Sequence[Callable[..., Any]],
        inferer: Callable[..., torch.Tensor],
        regions: bool,
    ) -> None:
        """Set up.

        Args:
            transforms: from `image` in RAS to what the networks see; those that move voxels can be inverted.
            inferer: from such an image to logits.
            regions: outputs are independent.
        """
        super().__init__()
        self.networks, self.regions, self.inferer = nn.ModuleList(networks), regions, inferer
        self.compose = Compose(transforms)

    def logits(self, batch: torch.Tensor) -> torch.Tensor:
        """Of windows: the mean over the networks."""
        outputs = [network(batch) for network in self.networks]
        finest = [o[0] if isinstance(o, list | tuple) else o for o in outputs]
        return torch.stack(finest).mean(0) if len(finest) > 1 else finest[0]

    def forward(self, image: MetaTensor) -> torch.Tensor:
        """(C, X, Y, Z) to probabilities (K, X, Y, Z) on the same grid."""
        prepared = self.compose({"image": image})["image"]
        logits = self.inferer(prepared[None], self.logits)[0]
        probs = torch.sigmoid(logits) if self.regions else torch.softmax(logits, 0)
        back = MetaTensor(probs, meta=prepared.meta, applied_operations=prepared.applied_operations)
        with allow_missing_keys_mode(self.compose):
            restored: torch.Tensor = self.compose.inverse({"image": back})["image"].as_tensor()
        if not self.regions:
            restored[0] += 1 - restored.sum(0)  # what was cropped away is background
        return restored


class Ensemble(nn.Module):
    """The mean of members' probabilities, or their vote."""

    def __init__(self, members: Sequence[Member], weights: Sequence[float], vote: bool = False) -> None:
        """Set up.

        Args:
            weights: of the members.
            vote: each member names one class a voxel (or, of regions, all that it sees), and the share of the votes
                is the result.
        """
        super().__init__()
        self.members, self.vote = nn.ModuleList(members), vote
        self.regions = members[0].regions
        self.mean = MeanEnsemble(weights=list(weights))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, C, X, Y, Z) in RAS, with affines, to probabilities (B, K, X, Y, Z) on the same grid."""
        scans = decollate_batch(image) if isinstance(image, MetaTensor) else [MetaTensor(scan) for scan in image]
        probs = torch.stack([self._one(scan) for scan in scans])
        return convert_to_dst_type(probs, image, dtype=torch.float32)[0]  # which file it is of stays known

    def _one(self, scan: MetaTensor) -> torch.Tensor:
        each = [member(scan) for member in self.members]
        if self.vote:
            each = [self._votes(probs, self.regions) for probs in each]
        if len(each) == 1:
            return each[0]
        mean: Any = self.mean(torch.stack(each))
        result: torch.Tensor = mean
        return result

    @staticmethod
    def _votes(probs: torch.Tensor, regions: bool) -> torch.Tensor:
        if regions:
            return (probs > 0.5).float()
        return nn.functional.one_hot(probs.argmax(0), len(probs)).movedim(-1, 0).float()
