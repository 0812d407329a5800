"""Twins of the jobs that start from weights, which start from random ones: the proof beside the head start.

Each has the plan of its job, its length and budget included, but for what is for fine-tuning: the encoder learns from
the first step on, and as fast as the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from autoseg.config.networks import LOCATOR, AlgoName
from autoseg.config.settings import Settings
from autoseg.data.datalists.cases import Datalist
from autoseg.errors import counted
from autoseg.evaluation.from_scratch import compare_with_scratch, tests_text
from autoseg.pipeline.training_jobs import train_jobs
from autoseg.workspace.files import write_yaml
from autoseg.workspace.scratch import begin_scratch
from autoseg.workspace.workspace import Workspace

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
    from autoseg.plan import read_plan

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
        plan = read_plan(place.job_dir(algo, fold)).model_copy(update={"encoder_rate": 1.0, "frozen_fraction": 0.0})
        write_yaml(twins.job_dir(algo, fold).plan, plan.model_dump(mode="json"))
    log.info("compare_scratch: %s from random weights", counted(len(started), "job"))
    complete = train_jobs(twins, datalist, settings, started, again=again)
    patient_of = {case.name: case.group for case in datalist.training if case.group is not None}
    tests = compare_with_scratch(place, patient_of)
    return complete, tests_text(tests) if tests else ""
