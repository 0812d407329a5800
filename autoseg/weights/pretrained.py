"""The weights that a run's own pretraining made, taken as those of a file are: copied once, read by `read_start`."""

from __future__ import annotations

from autoseg.config.networks import AlgoName
from autoseg.errors import WorkspaceError
from autoseg.plan import read_plan
from autoseg.weights.checkpoint import read_checkpoint
from autoseg.weights.source import DEEP_SUPERVISION, lesson_digests
from autoseg.weights.start import Start, StartWeights, forget_starts, write_start
from autoseg.workspace.digests import content_digest
from autoseg.workspace.pretraining import lesson_for, pretraining_place
from autoseg.workspace.stored import read_stored
from autoseg.workspace.workspace import Workspace


def keep_pretrained(workspace: Workspace, algo: AlgoName, fold: int) -> StartWeights:
    """Bring the run's copy of what a job starts from up to date with its pretraining.

    Raises:
        WorkspaceError: The network was not pretrained for this fold, or not to the end.
    """
    place = pretraining_place(workspace)
    found = lesson_for(workspace, algo, fold)
    number, lesson = found if found is not None else (fold, None)
    paths = place.job_dir(algo, number)
    job = place.read_job(algo, number)
    if lesson is None or job.state != "done" or not paths.model.exists():
        why = "is not done. Run `autoseg pretrain` or `autoseg run` first."
        if lesson is not None and job.state in ("failed", "diverged"):
            why = f"{job.state}: {job.error.partition(chr(10))[0]}"
        raise WorkspaceError(f"{workspace.run}: {algo}_{fold} is to start from its pretraining, which {why}")
    plan = read_plan(paths)
    start = Start(
        source=f"{place.root.name}/{algo}_{number}",
        digest=content_digest(paths.model, paths.plan),
        kind=lesson.words,
        network={key: value for key, value in plan.network.items() if key != DEEP_SUPERVISION},
        spacing_mm=plan.resample_resolution,
        channels=plan.channels,
        images_seen=lesson_digests(job),
    )
    name = algo if lesson.for_all_folds else f"{algo}_{fold}"
    path = workspace.init_weights / f"{name}.json"
    if lesson.for_all_folds:
        forget_starts(workspace, algo, but=algo)
    else:
        (workspace.init_weights / f"{algo}.json").unlink(missing_ok=True)
    if path.exists() and path.with_suffix(".pt").exists() and read_stored(path, Start) == start:
        return StartWeights(start=start, path=path.with_suffix(".pt"))
    return write_start(path, start, read_checkpoint(paths.model).tensors)
