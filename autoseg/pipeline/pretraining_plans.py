"""The pretrainings that a run needs: which networks learn from which images, each one's lesson, plan and time.

They come before the jobs are planned, since these take over the width of what was pretrained. A network is therefore
planned twice: here for the time that its jobs are likely to get, and then with the weights that were made.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Self

from autoseg.config.networks import AlgoName
from autoseg.config.settings import PRETRAINED, PretrainSettings, Settings
from autoseg.config.units import parse_duration
from autoseg.data.datalists.cases import Datalist
from autoseg.data.datalists.datalist import read_datalist
from autoseg.errors import ConfigError, counted
from autoseg.pipeline.budget import RESERVED_SHARE, pretraining_s
from autoseg.pipeline.context import num_places
from autoseg.pipeline.job_plans import select_folds
from autoseg.workspace.files import digest, write_yaml
from autoseg.workspace.pretraining import Lesson, lessons, pretraining_place
from autoseg.workspace.stored import write_stored
from autoseg.workspace.workspace import Workspace

if TYPE_CHECKING:
    from autoseg.algos.inputs import PlanInputs
    from autoseg.plan import Plan
    from autoseg.pretraining.images import ImageSet

log = logging.getLogger(__name__)

Name = tuple[AlgoName, int]
OF_METHOD = {"mask_share": "mae", "mask_block": "mae", "temperature": "contrastive"}
"""Setting of `pretrain` -> the one method that it is of."""
TIME = "time"
"""Among what a pretraining is planned from: seconds that follow from the run's budget, which no user named for it."""


def left_out(settings: Settings) -> str:
    """Why no network is pretrained; empty where one is."""
    if settings.pretrain.method == "none":
        return "pretrain.method: none"
    if not isinstance(settings.algos, str) and not any(map(settings.is_pretrained, settings.algos)):
        return "init_weights names other weights"
    return ""


def unused_settings(settings: Settings) -> str:
    """Which settings of pretraining were changed and have no effect, in a sentence; empty where none has."""
    pretrain, default, named = settings.pretrain, PretrainSettings(), settings.init_weights
    method, sources = pretrain.method, named.values() if isinstance(named, dict) else (named or PRETRAINED,)
    if method != "none" and PRETRAINED not in sources:
        return "pretrain.method: without effect, since init_weights names other weights. Leave out one of them."
    changed = [key for key in PretrainSettings.model_fields if getattr(pretrain, key) != getattr(default, key)]
    unused = [f"pretrain.{key}" for key in changed if method == "none" or OF_METHOD.get(key, method) != method]
    if not unused:
        return ""
    advice = "Set pretrain.method: mae or contrastive." if method == "none" else "Leave out what belongs to another."
    return f"{', '.join(unused)}: without effect, since pretrain.method is {method}. {advice}"


def check_time(settings: Settings) -> None:
    """Check that pretraining leaves time to what comes after it.

    Raises:
        ConfigError: It does not.
    """
    own, run = settings.pretrain.budget, settings.budget
    if own is not None and run is not None and parse_duration(own) >= parse_duration(run):
        raise ConfigError(
            f"pretrain.budget: {own} of the run's budget of {run} leaves nothing to training. Give a longer budget, or "
            "less to pretraining."
        )


def likely_job_s(settings: Settings, num_jobs: int) -> Callable[[str], float | None]:
    """About the seconds that each of so many jobs of training will get once the run's pretraining is done.

    Returns:
        A function of the job's name; None: it has no budget.
    """
    if settings.budget is None:
        return lambda name: None
    left_s = parse_duration(settings.budget) - (pretraining_s(settings) or 0.0)
    num_waves = math.ceil(num_jobs / num_places(settings)) * (2 if settings.compare_scratch else 1)
    share_s = max(1.0, (1 - RESERVED_SHARE) * left_s / num_waves)
    return lambda name: round(share_s, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainingPlans:
    """The pretrainings of a run, and what they are planned from."""

    workspace: Workspace
    """The run's."""
    settings: Settings
    """With `algos` settled."""
    origins: Mapping[str, str]
    datalist: Datalist
    algos: Sequence[AlgoName]
    """Networks that are pretrained."""
    folds: Sequence[int]
    """Of the jobs that start from them."""
    sets: Sequence[ImageSet]
    """Each network learns from each of them."""

    @classmethod
    def of(cls, workspace: Workspace, settings: Settings, origins: Mapping[str, str]) -> Self:
        """Those of an analyzed run.

        Raises:
            ConfigError: A network cannot be pretrained, or there are too few images.
        """
        from autoseg.pretraining.images import image_sets

        datalist = read_datalist(workspace.datalist, settings.dataroot)
        algos = _pretrained(settings)
        folds = select_folds(settings, datalist, None, None)
        wanted = settings.pretrain.all_images
        sets = image_sets(datalist, folds, all_images=wanted, has_rounds=workspace.num_rounds > 1)
        return cls(
            workspace=workspace,
            settings=settings,
            origins=origins,
            datalist=datalist,
            algos=algos,
            folds=folds,
            sets=sets,
        )

    @property
    def each_s(self) -> float | None:
        """Seconds of each pretraining; None: their epochs alone decide."""
        total_s = pretraining_s(self.settings)
        count = len(self.algos) * len(self.sets)
        return None if total_s is None else max(1.0, round(total_s / math.ceil(count / num_places(self.settings)), 1))

    def write(self) -> list[Name]:
        """Write plan and lesson of each where they are missing or were made from other inputs.

        What is done stays where nothing but time of the run's budget is another now: whoever pretrained for a night
        does not do it again because a run gets two hours. Jobs that no other run needs lose their lessons.

        Returns:
            The jobs of pretraining.

        Raises:
            ConfigError: One is not done, and would leave no time to training.
        """
        _say(self.sets)
        place, names = pretraining_place(self.workspace), []
        for images, algo in product(self.sets, self.algos):
            names.append((algo, images.fold or 0))
            self._write(place, algo, images)
        for name in lessons(place):  # so that nothing starts from what belongs to other settings; the files stay
            if name[0] in self.algos and name not in names:
                place.job_dir(*name).lesson.unlink(missing_ok=True)
        return names

    def made_otherwise(self) -> list[str]:
        """Jobs of pretraining that are there, by another method or from other images than `write` would plan now."""
        wanted = {(algo, images.fold or 0): self._lesson(images) for images, algo in product(self.sets, self.algos)}
        there = lessons(self.workspace).items()
        return [
            f"{algo}_{fold}"
            for (algo, fold), lesson in there
            if algo in self.algos and wanted.get((algo, fold)) != lesson
        ]

    def _lesson(self, images: ImageSet) -> Lesson:
        from autoseg.pretraining.images import lesson_of

        return lesson_of(images, self.datalist, self.settings.pretrain, self.settings.seed)

    def _write(self, place: Workspace, algo: AlgoName, images: ImageSet) -> None:
        fold = images.fold or 0
        paths, stage = place.job_dir(algo, fold), f"pretrain/{algo}_{fold}"
        inputs = self._inputs(algo, fold)
        lesson = self._lesson(images)
        sources = self._sources(inputs, lesson)
        if paths.plan.exists() and paths.lesson.exists():
            if not place.stale(stage, sources):
                return
            stamp = place.read_stamp(stage)
            as_before = sources | {TIME: stamp.inputs.get(TIME, "") if stamp else ""}
            if place.read_job(algo, fold).state == "done" and not place.stale(stage, as_before):
                log.info("pretrain: %s_%d stays as it was made, for another budget of the run", algo, fold)
                return
        check_time(self.settings)
        plan = self._plan(inputs, len(lesson.training))
        write_yaml(paths.plan, plan.model_dump(mode="json"))
        write_stored(paths.lesson, lesson)
        place.stamp(stage, sources)

    def _inputs(self, algo: AlgoName, fold: int) -> PlanInputs:
        """Of a job of the network that is to start from the pretraining."""
        from autoseg.algos.inputs import planning

        likely_s = likely_job_s(self.settings, len(self.settings.networks) * len(self.folds))
        given = self.workspace, self.datalist, self.settings, self.origins
        [inputs] = planning(*given, [(algo, fold)], likely_s, keeps_starts=False)
        return inputs

    def _sources(self, inputs: PlanInputs, lesson: Lesson) -> dict[str, str]:
        """Digests of all that decides a plan and a lesson, by name."""
        from autoseg.algos.generate import plan_sources

        settings = self.settings
        sources = plan_sources(inputs)
        job_s = sources.pop("budget")
        own_s = settings.pretrain.budget
        return sources | {
            "pretrain": digest([settings.pretrain.epochs, own_s, settings.gpus_per_job]),
            "images and method": digest(lesson),
            TIME: digest([job_s, self.each_s]),
        }

    def _plan(self, inputs: PlanInputs, num_images: int) -> Plan:
        from autoseg.pretraining.plan import pretraining_plan

        plan = job_plan(inputs, self.workspace)
        on_gpu = inputs.hardware.on_gpu
        return pretraining_plan(
            plan,
            self.settings.pretrain,
            num_images=num_images,
            budget_s=self.each_s,
            on_gpu=on_gpu,
            processes=self.settings.gpus_per_job if on_gpu else 1,
            step_s=plan.step_s,
        )


def job_plan(inputs: PlanInputs, workspace: Workspace) -> Plan:
    """A job's plan, which is not stored: measured on this machine where jobs run here, else by formulas alone."""
    from autoseg.algos.fit import fitted_plan
    from autoseg.algos.measurements import Measurements
    from autoseg.algos.planner import make_plan
    from autoseg.hardware.device import pick_device

    if inputs.settings.launcher != "local":
        return make_plan(inputs)[0]
    return fitted_plan(pick_device(inputs.settings.device), inputs, Measurements(workspace.steps))[0]


def _pretrained(settings: Settings) -> list[AlgoName]:
    """The networks that are pretrained.

    Raises:
        ConfigError: One was named that cannot be, or none of them can.
    """
    from autoseg.networks import network_file

    wanted = [algo for algo in settings.networks if settings.is_pretrained(algo)]
    without = [algo for algo in wanted if not network_file(algo).LATENT]
    named = settings.init_weights if isinstance(settings.init_weights, dict) else {}
    faults = [algo for algo in without if named.get(algo) == PRETRAINED or len(without) == len(wanted)]
    if faults:
        raise ConfigError(
            f"pretrain: {', '.join(faults)} cannot be pretrained on images alone. Expected segresnet, resenc, "
            "swinunetr or unetr among algos."
        )
    if without:
        log.info("pretrain: %s cannot be pretrained and will start from random weights", ", ".join(without))
    return [algo for algo in wanted if algo not in without]


def _say(sets: Sequence[ImageSet]) -> None:
    """Say what is learned from, and for which folds."""
    first = sets[0]
    if first.fold is None:
        seen = f", {len(first.scored)} of them of cases that models are scored on" if first.scored else ""
        log.info("pretrain: %s for all folds%s", counted(len(first.cases), "image"), seen)
        return
    log.info(
        "pretrain: %d for each network, one a fold, since few images lie outside of the folds; with more "
        "images under `unlabeled`, or pretrain.all_images: true, one is enough", len(sets),
    )  # fmt: skip
