"""When a job validates, on which cases, what that takes, and what comes out.

Legend: K classes.
"""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from autoseg.config.units import format_duration
from autoseg.errors import counted
from autoseg.evaluation.metrics import dice_of_targets
from autoseg.hardware.device import resolve_precision
from autoseg.inference.windows import ProbRows, WindowModel, predict_targets
from autoseg.networks import divisor, heads
from autoseg.plan import Plan
from autoseg.training.cache import CachedCase
from autoseg.training.processes import Processes
from autoseg.training.progress import Progress
from autoseg.training.schedule import Schedule, validation_plan

log = logging.getLogger(__name__)

COMPARISON = 2.0
"""Predictions of a case that the comparison of half precision with fp32 takes: one in each, of which that in fp32, as
`scoring` times it, takes the longer."""
NEW_STEPS = 0.02
"""Share of all steps that must lie since the last validation for another one at the end. A choice: the cosine's last
fiftieth is done at a thousandth of the highest learning rate."""
TWICE_SHARE, SCORED_SHARE = 0.01, 0.05
"""Share of a budget up to which a case is predicted twice to time it, and up to which its final score is timed, too."""
DIVERGED_DICE = 0.01
"""A Dice below it late in the schedule is divergence. Source: Auto3DSeg's rule, which ends the whole run."""


class Validator(ABC):
    """Scores the average of a job's weights on cases it does not learn from, as often as the plan or the budget allows.

    What a score is says the class that derives from it: the higher the better.
    """

    tells_apart = 0.0
    """Difference in score on a part of the cases below which the end of the schedule is trusted over an earlier one."""

    def __init__(
        self,
        plan: Plan,
        cases: Sequence[CachedCase],
        network: nn.Module,
        progress: Progress,
        processes: Processes,
        roi: tuple[int, int, int],
        name: str,
    ) -> None:
        """Set up.

        Args:
            cases: preprocessed.
            network: whose weights are validated; on the device.
            progress: of the job; what validation takes is noted there, so that a checkpoint keeps it.
            roi: window in voxels; it may be made smaller later.
            name: of the job, for the log.
        """
        self.plan, self.cases, self.network, self.progress = plan, cases, network, progress
        self.processes, self.roi, self.name = processes, roi, name
        self.later_s: Callable[[float], float] = lambda case_s: 0.0
        """Seconds of predictions after the job that it leaves time for, by those that one takes."""
        self.parts: list[float] = []
        """Mean of each part of the score in the last validation; NaN: no case of it has one."""

    # -- when, and on what
    def is_due(self, share: float) -> bool:
        """Whether the epoch that ends at this share of the schedule is to be validated."""
        p = self.progress
        if share >= 1.0 and (self.plan.budget_s is None or p.num_validated or not p.voxel_s):
            # A few steps at a learning rate near zero change nothing that is worth another validation.
            return p.step - p.validated_step > NEW_STEPS * p.step
        if self.plan.budget_s is None:
            return (p.epoch + 1) % self.plan.num_epochs_per_validation == 0
        return self.marks_passed(share) > p.validations

    def marks_passed(self, share: float) -> int:
        """How many of the budget's marks lie behind."""
        return sum(share >= mark for mark in self._marks())

    def _marks(self) -> tuple[float, ...]:
        budget_s, p = self.plan.budget_s, self.progress
        if budget_s is None or not p.voxel_s or not p.num_validated:
            return ()
        return validation_plan(budget_s, self._seconds_of(self.cases), len(self.cases))[0]

    def chosen(self) -> list[int]:
        """Indices of the cases that a validation looks at, spread over the fold; none where no time is left for any."""
        num = len(self.cases)
        if self.plan.budget_s is None:
            return list(range(num))
        few = self.progress.num_validated
        return sorted({round(i * (num - 1) / max(1, few - 1)) for i in range(few)})

    def looks_at_part(self) -> bool:
        """Whether a validation leaves cases of the fold out."""
        return len(self.chosen()) < len(self.cases)

    # -- what it takes
    def expected_s(self) -> float:
        """Expected seconds of a validation; endless before the first was measured."""
        if not self.progress.voxel_s:
            return math.inf
        return self._seconds_of(self.cases[i] for i in self.chosen())

    def reserve_s(self) -> float:
        """Seconds of a budget to keep for what follows training, by what the last validation took."""
        if self.plan.budget_s is None or not self.progress.voxel_s:
            return 0.0
        return self.expected_s()

    def _seconds_of(self, cases: Iterable[CachedCase]) -> float:
        return self.progress.voxel_s * sum(map(self.voxels, cases)) / self.processes.world

    @abstractmethod
    def voxels(self, case: CachedCase) -> int:
        """Voxels that are passed through the network for a case."""

    def measure(self, schedule: Schedule, scoring: Callable[[int], float] | None) -> None:
        """Measure validation and final score of a case of middle size, so that a budget can keep their time free.

        Args:
            schedule: of the job, whose budget has to hold both.
            scoring: as `Trainer` takes it.
        """
        assert self.plan.budget_s is not None
        p, budget_s = self.progress, self.plan.budget_s
        order = sorted(range(len(self.cases)), key=lambda i: self.voxels(self.cases[i]))
        index = order[len(order) // 2]
        case = self.cases[index]

        def timed() -> float:
            begin = time.monotonic()
            self.score(case)
            return time.monotonic() - begin

        case_s = timed()
        if self.processes.device.type != "cpu" or case_s <= TWICE_SHARE * budget_s:
            case_s = timed()  # the first allocates, searches kernels, and on a GPU waits for the steps before it
        p.voxel_s = case_s / self.voxels(case)
        if scoring is not None and self.processes.is_first and case_s <= SCORED_SHARE * budget_s:
            p.scoring_voxel_s = scoring(index) / self.voxels(case)
        num = validation_plan(budget_s, self._seconds_of(self.cases), len(self.cases))[1]
        p.voxel_s, chosen = self.processes.from_first(p.voxel_s, num)  # all look at the same cases
        p.first_voxel_s, p.num_validated = p.voxel_s, int(chosen)
        self.say_costs(schedule)

    def say_costs(self, schedule: Schedule) -> None:
        """Say what was measured."""
        if self.processes.is_first:
            log.info("%s: validation on %d of %d cases", self.name, self.progress.num_validated, len(self.cases))

    # -- the scores
    def validate(self, before_case: Callable[[], None] = lambda: None) -> float:
        """Mean over the parts of a score, such as classes, of the mean over the cases; NaN: none has one.

        Args:
            before_case: called before each case; may raise, to break off.
        """
        begin = time.monotonic()
        p, world = self.progress, self.processes.world
        chosen = self.chosen() or list(range(len(self.cases)))
        scores = torch.full((len(self.cases), self.num_scores), math.nan, dtype=torch.float64)
        for i in chosen[self.processes.rank :: world]:
            before_case()
            scores[i] = self.score(self.cases[i])
        if self.processes.are_several:
            total, seen = self.processes.add_up(torch.stack([scores.nan_to_num(0.0), (~scores.isnan()).double()]))
            scores = torch.where(seen > 0, total, math.nan)
        voxels = sum(self.voxels(self.cases[i]) for i in chosen) / world
        (p.voxel_s,) = self.processes.from_first((time.monotonic() - begin) / voxels)
        # Not measured yet where the job was begun without a budget.
        p.first_voxel_s = p.first_voxel_s or p.voxel_s
        means = scores.nanmean(0)
        self.parts = means.tolist()
        return float(means.nanmean())

    @property
    @abstractmethod
    def num_scores(self) -> int:
        """Parts of a score."""

    @abstractmethod
    def score(self, case: CachedCase) -> torch.Tensor:
        """The parts of a case's score, (S,) float64."""

    @abstractmethod
    def shows_nothing(self, score: float) -> str:
        """What of a score late in the schedule says that nothing was learned, in words; empty where it does not."""

    @abstractmethod
    def line(self, score: float, best: float) -> dict[str, Any]:
        """A score and the best so far for a line of the curve.

        Args:
            score: NaN: there was no validation.
            best: -inf: there is none yet.
        """

    @abstractmethod
    def words(self, score: float, best: float) -> str:
        """The same in words."""


class DiceValidator(Validator):
    """Scores by the Dice of each class at the network's spacing."""

    tells_apart = 0.01  # a choice

    def covers_classes(self) -> bool:
        """Whether a validation looks at all classes that the fold is annotated for: one hard class tells little."""

        def annotated(cases: Iterable[CachedCase]) -> set[str]:
            names = self.plan.label_map.names
            return {n for case in cases for n in (names if case.annotated is None else case.annotated)}

        return annotated(self.cases[i] for i in self.chosen()) == annotated(self.cases)

    def reserve_s(self) -> float:
        """Seconds of a budget to keep for the last validation, the final scores and what is predicted after the job.

        By what the last validation took.
        """
        p = self.progress
        if self.plan.budget_s is None or not p.voxel_s:
            return 0.0
        voxels = [self.voxels(case) for case in self.cases]
        # A machine that has become busy is slower at the end, too.
        slower = max(1.0, p.voxel_s / (p.first_voxel_s or p.voxel_s))
        scored: float = sum(voxels)
        if self.plan.precision == "auto" and resolve_precision(self.processes.device, "auto") != "fp32":
            scored += COMPARISON * voxels[0]
        rate = (p.scoring_voxel_s or p.voxel_s) * slower
        return self.expected_s() + rate * scored + self.later_s(rate * sum(voxels) / len(voxels))

    def voxels(self, case: CachedCase) -> int:
        """Voxels that are predicted for a case: those of a window at least."""
        return max(math.prod(case.image.shape[1:]), math.prod(self.roi))

    def say_costs(self, schedule: Schedule) -> None:
        """As `Validator.say_costs`, and what the final scores will take."""
        p, num = self.progress, len(self.cases)
        final = format_duration((p.scoring_voxel_s or p.voxel_s) * sum(map(self.voxels, self.cases)))
        if self.processes.is_first:
            log.info(
                "%s: validation on %d of %d cases, final scores in about %s", self.name, p.num_validated, num, final
            )
        if not schedule.is_kept(self.reserve_s()):
            log.warning(
                "%s: scoring %s takes about %s of a budget of %s, which will not be kept. Give more time.",
                self.name, counted(num, "case"), final, format_duration(self.plan.budget_s or 0.0),
            )  # fmt: skip

    @property
    def num_scores(self) -> int:
        """Classes."""
        return len(self.plan.label_map.names)

    def shows_nothing(self, score: float) -> str:
        """A Dice of nearly nothing on cases that have all classes of the fold."""
        return f"Dice {score:.4f}" if score < DIVERGED_DICE and self.covers_classes() else ""

    def line(self, score: float, best: float) -> dict[str, Any]:
        """As `Validator.line`, with the Dice by class."""
        best_dice = None if best == -math.inf else round(best, 6)
        if math.isnan(score):
            return {"val_dice": None, "best_dice": best_dice}
        parts = zip(self.plan.label_map.names, self.parts, strict=True)
        by_class = {name: None if math.isnan(dice) else round(dice, 6) for name, dice in parts}
        return {"val_dice": round(score, 6), "best_dice": best_dice, "val_class": by_class}

    def words(self, score: float, best: float) -> str:
        """As `Validator.words`."""
        return f"dice {score:.4f} (best {best:.4f})"

    def score(self, case: CachedCase) -> torch.Tensor:
        """Dice of each class at the network's spacing, (K,) float64."""
        label_map = self.plan.label_map
        dice = dice_of_targets(self.predict(case), np.asarray(case.target), label_map, annotated=case.annotated)
        return torch.tensor(dice, dtype=torch.float64)

    def predict(self, case: CachedCase) -> np.ndarray:
        """A case's prediction at the network's spacing, as an encoded target."""
        image = torch.from_numpy(np.asarray(case.image, np.float32))
        model = WindowModel(
            [self.network],
            [heads(self.plan.algo, self.network)],
            num_outputs=self.plan.num_outputs,
            sigmoid=self.plan.sigmoid,
            device=self.processes.device,
            precision=self.plan.precision,
            usual_window=self.roi,
        )
        rows = ProbRows(
            model,
            lambda start, stop: image[:, start:stop],
            (image.shape[1], image.shape[2], image.shape[3]),
            0,
            roi_size=self.roi,
            overlap=self.plan.overlap,
            divisor=divisor(self.plan),
        )
        return predict_targets(rows).numpy()
