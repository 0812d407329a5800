"""The training steps that were measured for the plans of a run, and what that took.

They stand in state/steps.json of the run, so that jobs planned later, or after a stop, are planned by the same figures.
"""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import ConfigDict, Field

from autoseg.hardware.facts import find_hardware
from autoseg.plan import Plan
from autoseg.training.measure import StepCost, measure_step
from autoseg.workspace.files import digest
from autoseg.workspace.stored import Seconds, Stored, read_stored, write_stored

log = logging.getLogger(__name__)

STEP_KEYS = ("algo", "network", "roi_size", "batch_size", "precision", "loss", "optimizer", "sigmoid")
"""Of a plan, beside the numbers of channels and outputs: plans alike in these have the same step."""


class StepsFile(Stored):
    """What stands in state/steps.json."""

    model_config = ConfigDict(frozen=False)
    advice: ClassVar[str] = "Delete the file: steps are then measured anew."

    steps: dict[str, StepCost | None] = Field(default_factory=dict)
    """By a digest of the step, the device and the version of torch; null: memory does not suffice."""
    spent_s: dict[str, Seconds] = Field(default_factory=dict)
    """Algorithm -> seconds that measuring took, without the start of processes for it."""


class Measurements:
    """Steps, each measured once."""

    def __init__(self, path: Path | None = None) -> None:
        """Read those of a file, which is written after each measurement; None: they are kept in memory alone."""
        self.path = path
        self.state = read_stored(path, StepsFile) if path is not None and path.exists() else StepsFile()

    def spent_s(self, algo: str) -> float:
        """Seconds in which steps of an algorithm were measured, without those in which processes started for it."""
        return self.state.spent_s.get(algo, 0.0)

    def has(self, plan: Plan, device: torch.device) -> bool:
        """Whether a plan's step was measured."""
        return _step_key(plan, device) in self.state.steps

    def of(self, plan: Plan, device: torch.device, most_s: float = math.inf) -> StepCost | None:
        """As `measure_step`; plans that a step cannot tell apart are measured once.

        What was measured is kept however far it is from the formula of `rules.schedule.step_seconds`. That knows no
        GPU, no width of a network and one kind of processor, so a factor of 3 between both says more of the machine
        and the plan than of other work. On a CPU other work shows in the processor time of the step itself: it is said
        and taken out (`StepCost.slowed`). On a GPU the first step never counts, and of those timed the fastest does.
        """
        key = _step_key(plan, device)
        if key not in self.state.steps:
            begin = time.perf_counter()
            cost = self.state.steps[key] = measure_step(plan, device, most_s)
            if cost is not None and cost.slowed > 1:
                text = "%s: other work slowed this machine %.1f times while a step was measured; planned as without it"
                log.warning(text, plan.algo, cost.slowed)
            took_s = time.perf_counter() - begin - (0.0 if cost is None else cost.start_s)
            self.state.spent_s[plan.algo] = self.spent_s(plan.algo) + took_s
            if self.path is not None:
                write_stored(self.path, self.state)
        return self.state.steps[key]


def _step_key(plan: Plan, device: torch.device) -> str:
    values = plan.model_dump(mode="json")
    step = [len(plan.channels), plan.num_outputs, *(values[key] for key in STEP_KEYS)]
    machine = [str(device), find_hardware(device).name, torch.get_num_threads(), torch.__version__]
    return digest([step, machine])
