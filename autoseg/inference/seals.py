"""Whether trained jobs are as training left them.

Weights that were damaged on disk, or a plan that was edited after training, still predict, and what they predict is
wrong without a word. What only decides how a model predicts, such as the overlap, may be edited and is not sealed.
"""

from __future__ import annotations

from collections.abc import Sequence

from autoseg.config.reader import read_plain
from autoseg.errors import WorkspaceError
from autoseg.plan import MODEL
from autoseg.workspace.digests import content_digest
from autoseg.workspace.files import digest
from autoseg.workspace.jobs import JobDir
from autoseg.workspace.seals import ON_PURPOSE, accept, broken_parts, write_seal


def _job_digests(job: JobDir) -> dict[str, str]:
    """The plan as its file has it: a later version that knows more hyperparameters must find the same."""
    plan = read_plain(job.plan)
    return {
        "weights": content_digest(job.model),
        "plan": digest({key: value for key, value in plan.items() if key in MODEL}),
    }


def seal_job(job: JobDir) -> None:
    """Note what the trained weights are, and which plan they belong to."""
    write_seal(job.seal, _job_digests(job))


def accept_jobs(jobs: Sequence[JobDir]) -> None:
    """Seal jobs as they are now, where they have a seal.

    Raises:
        WorkspaceError: Their folder cannot be written to.
    """
    for job in jobs:
        if job.model.exists() and job.seal.exists():
            accept(job.seal, _job_digests(job))


class ChangedJobsError(WorkspaceError):
    """Trained jobs are not as their training left them. They stay so: whether to undo it or not is the user's."""


def check_jobs(jobs: Sequence[JobDir]) -> None:
    """Refuse jobs that are not as their training left them; those without weights are for others to report.

    Raises:
        ChangedJobsError: All that was changed.
    """
    faults = []
    for job in jobs:
        if not (job.model.exists() and job.seal.exists()):
            continue
        name = job.root.name
        algo, _, fold = name.rpartition("_")
        broken = broken_parts(job.seal, _job_digests(job))
        if "weights" in broken:
            faults.append(
                f"{job.model}: not the weights that training left: damaged, or replaced. Copy it anew, or train {name} "
                f"again: `autoseg train --algo {algo} --fold {fold} --again`. {ON_PURPOSE}"
            )
        if "plan" in broken:
            faults.append(
                f"{job.plan}: edited since {name} was trained, in what its weights belong to. Undo the edit, or run "
                f"`autoseg train` to train by it. {ON_PURPOSE}"
            )
    if faults:
        raise ChangedJobsError(faults)
