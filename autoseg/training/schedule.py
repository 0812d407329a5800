"""How far a job is, what that means for the learning rate, and when and on how much it is validated.

A job ends after its epochs or, with a budget, when its time is used up; progress is the larger of both shares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

START_SHARE = 0.1
"""Learning rate at the first step as a share of the highest. Source: Auto3DSeg's warm-up."""
POLY_POWER = 0.9
"""Source: nnU-Net's polynomial schedule."""
LEAST_TRAINING_SHARE = 0.2
"""Share of a budget that training gets at least: less would only score noise. A choice."""
VALIDATION_SHARE = 0.05
"""Share of a budget that validations in training may take; each looks at as many cases as that allows. A choice: as
much as a budget may be missed by."""
FEW_MARKS = (0.25, 0.5, 0.75, 0.9, 1.0)
"""Progress at which to validate under a budget: at a quarter to tell divergence, then where the curve still moves."""
MANY_MARKS = (0.25, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
"""The same where ten validations of all cases fit in."""
LEAST_MARKS = 2
"""Validations that are worth their time: one alone compares nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The planned length of a job."""

    num_steps: int
    """The most steps."""
    budget_s: float | None
    """Seconds for the whole job, final evaluation included; None: steps alone decide."""

    def progress(self, step: int, elapsed_s: float, reserve_s: float, begun_s: float = 0.0) -> float:
        """Share of the training that is done, 0..1.

        Args:
            step: steps done.
            elapsed_s: seconds since the job began, over all its starts.
            reserve_s: seconds to keep for what follows training.
            begun_s: seconds of those that had passed before the first step: preprocessing, a search.
        """
        by_steps = step / self.num_steps
        if self.budget_s is None:
            return min(1.0, by_steps)
        end_s = max(self.budget_s - reserve_s, LEAST_TRAINING_SHARE * self.budget_s)
        by_time = (elapsed_s - begun_s) / max(end_s - begun_s, 1e-6)
        return min(1.0, max(by_steps, by_time))

    def is_kept(self, reserve_s: float) -> bool:
        """Whether the budget holds what follows training and some training before it."""
        return self.budget_s is None or self.budget_s - reserve_s >= LEAST_TRAINING_SHARE * self.budget_s


def learning_rate(
    highest: float,
    progress: float,
    warmup_fraction: float,
    schedule: Literal["cosine", "poly", "constant"] = "cosine",
) -> float:
    """Linear warm-up from a tenth, then a way down to zero, or none.

    Source: cosine as Auto3DSeg and the FLARE23 paper, poly as nnU-Net.
    """
    if progress < warmup_fraction:
        return highest * (START_SHARE + (1 - START_SHARE) * progress / warmup_fraction)
    share = min(1.0, (progress - warmup_fraction) / max(1 - warmup_fraction, 1e-9))
    if schedule == "constant":
        return highest
    if schedule == "poly":
        return highest * (1 - share) ** POLY_POWER
    return highest * 0.5 * (1 + math.cos(math.pi * share))


def loaded_share(progress: float, rate: float, frozen_fraction: float) -> float:
    """Learning rate of loaded weights as a share of that of new ones.

    Nothing while they are frozen, then rising over as long again to their share.

    Source: the two warm-ups of nnssl's "sawtooth", first of what is new, then of all (arXiv 2412.17041).
    """
    if progress < frozen_fraction:
        return 0.0
    return rate * min(1.0, (progress - frozen_fraction) / frozen_fraction) if frozen_fraction else rate


def ema_decay(highest: float, step: int) -> float:
    """Decay that lets the average forget the first steps quickly. Source: TensorFlow's ExponentialMovingAverage."""
    return min(highest, (1 + step) / (10 + step))


def validation_plan(budget_s: float, all_s: float, num_cases: int) -> tuple[tuple[float, ...], int]:
    """When to validate under a budget, and on how many cases.

    Args:
        all_s: seconds to predict and score all cases once.

    Returns:
        Progress values, the last of them where each case takes long, none where two validations of one case take more
        than their share of the time; and the number of cases, the same each time.
    """
    one_s = max(all_s / num_cases, 1e-6)
    if len(MANY_MARKS) * all_s <= VALIDATION_SHARE * budget_s:
        return MANY_MARKS, num_cases
    fits = int(VALIDATION_SHARE * budget_s / one_s)
    if fits < LEAST_MARKS:
        return (), 0
    return FEW_MARKS[-fits:], min(num_cases, max(1, fits // len(FEW_MARKS)))
