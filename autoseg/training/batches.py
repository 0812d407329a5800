"""The batches of a job: a function of the step's number alone, so that one cut ahead is the same.

Legend: B batch, C channels, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
import torch

from autoseg.hardware.device import without_wait
from autoseg.plan import Plan
from autoseg.training.augment import Draw, augment_batch, draw_sample
from autoseg.training.patches import Patches, Sampler, cut_batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """The patches of one step on the device, changed at random, with what the loss needs to know of each."""

    image: torch.Tensor
    """(B, C, X, Y, Z) float32."""
    target: torch.Tensor
    """(B, 1 or K, X, Y, Z) uint8; the voxels' weights follow where a case has them."""
    unannotated: torch.Tensor | None = None
    """(B, K) bool: classes that nobody looked for; None: every sample is annotated for all."""
    filled: torch.Tensor | None = None
    """(B, K) bool: classes that models filled in; None: none."""

    def __len__(self) -> int:
        return len(self.image)

    def part(self, first: int, number: int) -> Self:
        """Some of them, from one on."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        chosen: dict[str, Any] = {n: None if t is None else t[first : first + number] for n, t in tensors.items()}
        return replace(self, **chosen)


class OnHost(Protocol):
    """What is cut on the host."""

    def pinned(self) -> Self:
        """The same in memory that a GPU copies from without a wait."""


HostT = TypeVar("HostT", bound=OnHost)


class Batches(ABC, Generic[HostT]):
    """What the steps of a job learn from: cut on the host, for a GPU a step ahead, and finished on the device."""

    def __init__(self, roi: tuple[int, int, int], *, ahead: bool) -> None:
        """Set up.

        Args:
            roi: patch in voxels; it may be made smaller later.
            ahead: cut the next step's patches while this one computes. For a GPU: on a CPU a second thread would take
                the processor from the network.
        """
        self._roi = roi
        self._cutter = ThreadPoolExecutor(1, "autoseg-cut") if ahead else None
        self._next: tuple[int, Future[HostT]] | None = None

    @abstractmethod
    def cut(self, step: int) -> HostT:
        """What a step learns from, on the host: a function of the step's number alone."""

    @abstractmethod
    def finish(self, cut: HostT) -> Samples:
        """The samples on the device, changed at random as was drawn when they were cut."""

    @property
    def roi(self) -> tuple[int, int, int]:
        """The patch that is cut, in voxels."""
        return self._roi

    @roi.setter
    def roi(self, roi: tuple[int, int, int]) -> None:
        self._roi = roi
        self._next = None  # was cut with the old one

    def close(self) -> None:
        """Stop cutting ahead."""
        if self._cutter is not None:
            self._cutter.shutdown(cancel_futures=True)

    def samples(self, step: int) -> Samples:
        """The samples of a step: the same whenever they are asked for."""
        return self.finish(self._cut_or_ahead(step))

    def _cut_or_ahead(self, step: int) -> HostT:
        if self._cutter is None:
            return self.cut(step)
        ahead, self._next = self._next, None
        cut = ahead[1].result() if ahead is not None and ahead[0] == step else self._pinned(step)
        self._next = step + 1, self._cutter.submit(self._pinned, step + 1)
        return cut

    def _pinned(self, step: int) -> HostT:
        return self.cut(step).pinned()


class LabelledBatches(Batches[Patches]):
    """Cuts the patches of each step with their labels and changes them at random."""

    def __init__(
        self,
        plan: Plan,
        sampler: Sampler,
        device: torch.device,
        *,
        indices: range,
        batch_size: int,
        roi: tuple[int, int, int],
        ahead: bool,
    ) -> None:
        """Set up.

        Args:
            indices: of the batch, the samples that this process cuts.
            batch_size: of all processes together.
            roi: patch in voxels; it may be made smaller later.
            ahead: as `Batches` takes it.
        """
        super().__init__(roi, ahead=ahead)
        self.plan, self.sampler, self.device = plan, sampler, device
        self.indices, self.batch_size = indices, batch_size

    def finish(self, cut: Patches) -> Samples:
        """As `Batches.finish`."""
        unannotated = self.sampler.unannotated[cut.cases]
        filled = self.sampler.filled[cut.cases]
        image = cut.image.to(self.device, non_blocking=True)
        target = cut.target.to(self.device, non_blocking=True)
        # Looked at here, where they are NumPy's: on the device the loss would have to wait for the answer.
        hidden, guessed = (
            without_wait(classes, self.device) if classes.any() else None for classes in (unannotated, filled)
        )
        turned = {i: one.to(self.device) for i, one in cut.turned.items()}
        pairs = self.plan.mirrored_classes
        augment_batch(image, target, cut.draws, turned, lateral_pairs=pairs, sigmoid=self.plan.sigmoid)
        return Samples(image=image, target=target, unannotated=hidden, filled=guessed)

    def cut(self, step: int) -> Patches:
        """As `Batches.cut`."""
        return cut_batch(
            self.sampler,
            seed=self.plan.seed,
            step=step,
            batch_size=self.batch_size,
            indices=self.indices,
            roi=self.roi,
            draw=self._draw,
        )

    def _draw(self, rng: np.random.Generator, case: int) -> Draw:
        return draw_sample(self.plan, rng, self.sampler.unannotated[case], self.sampler.filled[case])
