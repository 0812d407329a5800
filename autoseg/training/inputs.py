"""What a job is made from, as digests, and which cases it learns from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from autoseg.config.networks import LOCATOR
from autoseg.data.datalists.cases import Case, case_digest
from autoseg.plan import PREDICTION, Plan
from autoseg.weights.start import read_start
from autoseg.workspace.digests import content_digest
from autoseg.workspace.files import digest
from autoseg.workspace.jobs import Job, JobDir
from autoseg.workspace.stamps import changed
from autoseg.workspace.workspace import Workspace


def job_inputs(
    plan: Plan, train_cases: tuple[Case, ...], val_cases: tuple[Case, ...], weights: Mapping[str, str]
) -> dict[str, str]:
    """What a job is made from: name -> digest. A difference makes it stale.

    Args:
        weights: that it starts from, as `weights_inputs` gives them.
    """
    inputs = {f"plan: {key}": digest(value) for key, value in (plan.identity() | plan.prediction()).items()}
    for role, cases in (("training case", train_cases), ("validation case", val_cases)):
        inputs.update({f"{role} {c.name}": training_digest(c) for c in cases})
    return {**inputs, **weights}


def weights_inputs(workspace: Workspace, algo: str, fold: int) -> dict[str, str]:
    """The weights that a job starts from, those of the round before over those from elsewhere: name -> digest."""
    if (earlier := workspace.first_weights(algo, fold)) is not None:
        return {"weights of the previous round": content_digest(earlier)}
    start = read_start(workspace, algo, fold)
    return {} if start is None else {"init_weights": start.start.digest}


def reasons_to_train(job: Job, inputs: dict[str, str], paths: JobDir) -> list[str]:
    """Why a job that was begun is to be trained again, or gone on with: its inputs changed, or its weights are gone."""
    reasons = changed(job.inputs, inputs) if job.inputs else []
    if job.state == "done" and not paths.model.exists():
        reasons.append("its weights are missing")
    return reasons


def only_prediction_changed(job: Job, inputs: dict[str, str], paths: JobDir) -> bool:
    """Whether a job was trained to its end, and what changed since is how its model predicts, not its weights."""
    if job.dice is None or not paths.model.exists():
        return False
    differing = {key for key in {*job.inputs, *inputs} if job.inputs.get(key) != inputs.get(key)}
    return bool(differing) and differing <= {f"plan: {key}" for key in PREDICTION}


def cases_for(plan: Plan, cases: tuple[Case, ...]) -> tuple[Case, ...]:
    """The cases that a plan can learn from, annotated for its classes where it merges those of the user.

    A merged class counts as annotated where all that it is made of is. The locator has one alone, so it takes the cases
    that are annotated for all of it; all cases where none is.
    """
    label_map = plan.label_map
    if label_map.origin is None:
        return cases
    of_fold = tuple(
        replace(c, annotated=label_map.wholly(c.annotated), by_annotators=label_map.wholly(c.by_annotators))
        for c in cases
    )
    if plan.algo != LOCATOR:
        return of_fold
    whole = tuple(c for c in of_fold if c.annotated is None or c.annotated)
    return tuple(replace(c, annotated=None) for c in whole or of_fold)


def training_digest(case: Case) -> str:
    """Of a case, and of what is known of its label: which classes annotators looked for, and which models drew."""
    if case.by_annotators is not None:
        return digest([case_digest(case), case.annotated, case.by_annotators])
    return case_digest(case) if case.annotated is None else digest([case_digest(case), case.annotated])
