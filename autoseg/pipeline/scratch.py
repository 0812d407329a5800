"""Twins of the jobs that start from weights, which start from random ones: the proof beside the head start.

Each has the plan of its job, its length and budget included, but for what is for fine-tuning: all of it learns
alike from the first step on, after the usual warm-up. What was chosen to suit the weights stays: width,
voxel size, a CT's window, and no haste of the rate in a short schedule.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from autoseg.config.networks import LOCATOR, AlgoName
from autoseg.config.settings import Settings
from autoseg.data.datalists.cases import Datalist
from autoseg.errors import counted
from autoseg.evaluation.from_scratch import compare_with_scratch, tests_text
from autoseg.pipeline.training_jobs import train_jobs
from autoseg.workspace.files import write_yaml
from autoseg.workspace.jobs import JobDir, read_origins
from autoseg.workspace.scratch import begin_scratch
from autoseg.workspace.workspace import Workspace

if TYPE_CHECKING:
    from autoseg.plan import Plan

log = logging.getLogger(__name__)

INIT_WEIGHTS = "init_weights"
"""Among what a job was made from: weights that it started from."""


def train_scratch(
    place: Workspace, datalist: Datalist, settings: Settings, jobs: Sequence[tuple[AlgoName, int]], *, again: bool
) -> tuple[bool, str]:
    """Train the twin of each finished job that started from weights, as far as that is not done, and compare.

    Args:
        place: the folder of a run or a round.
        jobs: those that were to be trained.
        again: train twins from the start that are done.

    Returns:
        Whether all are done at the end, and the comparison as a table.

    Raises:
        As `train_jobs`.
    """
    started = [
        (algo, fold)
        for algo, fold in jobs
        if algo != LOCATOR and (job := place.read_job(algo, fold)).state == "done" and INIT_WEIGHTS in job.inputs
    ]
    if not started:
        log.warning("compare_scratch: without effect, since no job that is done started from weights")
        return True, ""
    twins = begin_scratch(place)
    for algo, fold in started:
        write_yaml(twins.job_dir(algo, fold).plan, _from_scratch(place.job_dir(algo, fold)).model_dump(mode="json"))
    log.info("compare_scratch: %s from random weights", counted(len(started), "job"))
    complete = train_jobs(twins, datalist, settings, started, again=again)
    patient_of = {case.name: case.group for case in datalist.training if case.group is not None}
    tests = compare_with_scratch(place, patient_of)
    return complete, tests_text(tests) if tests else ""


def _from_scratch(paths: JobDir) -> Plan:
    """The plan of a job's twin. Raises: WorkspaceError: A file of the job is missing or damaged."""
    from autoseg.algos.rules.start import FINE_TUNED
    from autoseg.config.templates import template_values
    from autoseg.plan import read_plan

    plan, changes = read_plan(paths), {"loaded_rate": 1.0, "frozen_fraction": 0.0}
    warm_up = read_origins(paths).get("warmup_fraction")
    if warm_up and (warm_up.rule or "").startswith(FINE_TUNED) and warm_up.value == plan.warmup_fraction:  # no user's
        changes["warmup_fraction"] = template_values(plan.algo)["warmup_fraction"][0]
    return plan.model_copy(update=changes)
