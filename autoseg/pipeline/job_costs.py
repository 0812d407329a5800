"""What a job takes on this machine, from some training steps that are measured."""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from autoseg.config.networks import AlgoName
from autoseg.config.settings import Settings
from autoseg.data.datalists.cases import Case
from autoseg.data.datalists.datalist import read_cases
from autoseg.data.fingerprint import Fingerprint
from autoseg.hardware.limits import available_cores
from autoseg.workspace.jobs import JobDir
from autoseg.workspace.pretraining import pretraining_place, read_lesson
from autoseg.workspace.workspace import Workspace

if TYPE_CHECKING:
    import torch

    from autoseg.plan import Plan
    from autoseg.training.cache import CachedCase
    from autoseg.training.task import Task

log = logging.getLogger(__name__)

MEASURE_S = 10.0
"""Seconds of training steps that are measured for each kind of job, three steps at least."""
SCORING = 1.3
"""The final scores take this much of a validation: reading and writing files come on top of the same predictions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one job takes."""

    step_s: float
    """Seconds of a training step."""
    validation_s: float
    """Seconds of a validation of the fold."""
    memory_gib: float
    """Most memory: of the GPU, or of a process on a CPU."""
    seconds: float
    """Of the whole job."""


class Measuring:
    """What jobs of a run take on this machine. Those that differ by their fold alone are measured once."""

    def __init__(self, workspace: Workspace, settings: Settings) -> None:
        """Set up; arguments as `autoseg.pipeline.forecast.make_forecast` takes them."""
        from autoseg.hardware.device import pick_device

        self.workspace, self.settings = workspace, settings
        self.device = pick_device(settings.device)
        self.datalist = read_cases(workspace, settings.dataroot)
        self.fingerprint = Fingerprint.read(workspace.datastats)
        self.measured: dict[str, tuple[float, float, float, float, float]] = {}
        """Kind of job -> what `_measure` found."""
        self.caches: dict[str, tuple[int, float]] = {}
        """Cases and their preprocessing -> how many there are, and the GiB that they take."""

    def note_cache(self, plan: Plan, num_cases: int, which: str = "") -> None:
        """Note what a job prepares; others of the same cases and preprocessing find it there."""
        from autoseg.algos.fit import cache_gib

        self.caches[f"{which} {plan.preprocessing!r}"] = num_cases, cache_gib(plan, self.fingerprint, num_cases)

    def training(self, plan: Plan, fold: int) -> Cost:
        """Of a job that learns to segment."""
        from autoseg.training.task import SEGMENTATION

        cases = self.datalist.val_cases(fold)
        step_s, predict_s, memory_gib, *_ = self._of(plan.algo, plan, cases[:1], SEGMENTATION)
        return job_cost(plan, step_s, predict_s * len(cases), memory_gib)

    def pretraining(self, algo: AlgoName, fold: int) -> Cost:
        """Of a planned job that learns from images alone."""
        from autoseg.plan import read_plan
        from autoseg.pretraining.images import images_named
        from autoseg.pretraining.tasks import ImageTask

        paths = pretraining_place(Workspace(self.workspace.run)).job_dir(algo, fold)
        plan, lesson = read_plan(paths), read_lesson(paths)
        names = [*lesson.validation, *lesson.training]
        self.note_cache(plan, len(names), f"images of {fold}")
        cases = images_named(self.datalist, names[:1])
        step_s, predict_s, memory_gib, *_ = self._of(f"the pretraining of {algo}", plan, cases, ImageTask(lesson))
        return job_cost(plan, step_s, predict_s * len(lesson.validation), memory_gib, scoring=0.0)

    def _of(self, what: str, plan: Plan, cases: Sequence[Case], task: Task) -> tuple[float, float, float, float, float]:
        kind = what + plan.model_copy(update={"fold": 0, "seed": 0}).model_dump_json()
        if kind not in self.measured:
            log.info("plan: measuring %s", what)
            self.measured[kind] = _measure(self.workspace, plan, cases, self.device, task)
        return self.measured[kind]

    @property
    def preparing_s(self) -> float:
        """Seconds to fill the caches on this machine's cores."""
        case_s = max((prepare_s for *_, prepare_s in self.measured.values()), default=0.0)
        cores = self.settings.num_workers or available_cores()
        return case_s * sum(number for number, _ in self.caches.values()) / cores

    @property
    def model_gib(self) -> float:
        """Of a model, the mean over the kinds."""
        sizes = [size for *_, size, _ in self.measured.values()]
        return sum(sizes) / max(1, len(sizes))


def job_cost(plan: Plan, step_s: float, validation_s: float, memory_gib: float, *, scoring: float = SCORING) -> Cost:
    """Of a job.

    Args:
        step_s, validation_s: seconds of a step, and of a validation of all its cases.
        scoring: the final scores, in validations; 0: there are none.
    """
    steps = plan.num_epochs * plan.num_steps_per_epoch
    validations = math.ceil(plan.num_epochs / plan.num_epochs_per_validation)
    seconds = steps * step_s + (validations + scoring) * validation_s
    if plan.budget_s is not None:
        seconds = min(seconds, plan.budget_s)
    return Cost(step_s=step_s, validation_s=validation_s, memory_gib=memory_gib, seconds=seconds)


def _measure(
    workspace: Workspace, plan: Plan, cases: Sequence[Case], device: torch.device, task: Task
) -> tuple[float, float, float, float, float]:
    """Train for some seconds on one case, as a job would.

    Returns:
        Seconds of a step; seconds to validate a case; memory in GiB; the model's size in GiB; seconds to preprocess a
        case on one core, 0 where it was in the cache already.
    """
    from autoseg.hardware.device import finish
    from autoseg.hardware.memory import MemoryWatch
    from autoseg.training.cache import load_cases
    from autoseg.training.trainer import Trainer

    def timed(work: Callable[[], object]) -> float:
        begin = time.monotonic()
        work()
        finish(device)  # a GPU is only told what to do
        return time.monotonic() - begin

    with tempfile.TemporaryDirectory() as folder, MemoryWatch(device) as memory:
        begin = time.monotonic()
        case: list[CachedCase] = load_cases(workspace.cache, plan, cases, num_workers=1)
        prepare_s = time.monotonic() - begin
        unbounded = plan.model_copy(update={"budget_s": None})
        trainer = Trainer(unbounded, case, case, JobDir(Path(folder)), device=device, task=task)
        timed(trainer.train_step)  # the first allocates and chooses kernels
        memory.forget_warm_up()
        times: list[float] = []
        while len(times) < 3 or sum(times) < MEASURE_S:
            times.append(timed(trainer.train_step))
            if len(times) >= 3 and sum(times) > 0.3 * MEASURE_S and max(times) < 1.2 * min(times):
                break
        predict_s = timed(partial(trainer.validator.score, case[0]))
        if device.type != "cpu":  # the first chose kernels for the windows
            predict_s = timed(partial(trainer.validator.score, case[0]))
        trainer.batches.close()
        size = sum(t.numel() * t.element_size() for t in trainer.step.network.state_dict().values()) / 2**30
    return sorted(times)[len(times) // 2], predict_s, memory.peak_gib, size, prepare_s
