"""How far a job is, what that means for the learning rate, and when it is time to validate.

A job ends after its epochs or, with a budget, when its time is used up; progress is the larger of both shares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

START_SHARE = 0.1
"""Learning rate at the first step as a share of the highest. Source: Auto3DSeg's warm-up."""
VALIDATION_SHARE = 0.1
"""Share of a budget that validations in training may take."""
MAX_VALIDATIONS = 10
LEAST_TRAINING_SHARE = 0.5
"""Share of a budget that training gets at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The planned length of a job."""

    num_steps: int
    """The most steps."""
    budget_s: float | None
    """Seconds for the whole job, final evaluation included; None: steps alone decide."""

    def progress(self, step: int, elapsed_s: float, reserve_s: float) -> float:
        """Share of the training that is done, 0..1.

        Args:
            step: steps done.
            elapsed_s: seconds since the job began, over all its starts.
            reserve_s: seconds to keep for what follows training.
        """
        by_steps = step / self.num_steps
        if self.budget_s is None:
            return min(1.0, by_steps)
        # On a busy machine validation may seem to take all of the time; half of it goes to training even so.
        by_time = elapsed_s / max(self.budget_s - reserve_s, LEAST_TRAINING_SHARE * self.budget_s)
        return min(1.0, max(by_steps, by_time))


def learning_rate(highest: float, progress: float, warmup_fraction: float) -> float:
    """Linear warm-up from a tenth, then a cosine to zero. Source: Auto3DSeg; the FLARE23 paper."""
    if progress < warmup_fraction:
        return highest * (START_SHARE + (1 - START_SHARE) * progress / warmup_fraction)
    share = (progress - warmup_fraction) / max(1 - warmup_fraction, 1e-9)
    return highest * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def ema_decay(highest: float, step: int) -> float:
    """Decay that lets the average forget the first steps quickly. Source: TensorFlow's ExponentialMovingAverage."""
    return min(highest, (1 + step) / (10 + step))


def validation_marks(budget_s: float, validation_s: float) -> list[float]:
    """Progress values at which to validate under a budget: in the second half, the last at the end.

    As many as fit into a tenth of the time, 1 to 10.
    """
    count = int(min(MAX_VALIDATIONS, max(1, VALIDATION_SHARE * budget_s / max(validation_s, 1e-3))))
    return [1 - 0.5 * (count - 1 - i) / count for i in range(count)]
