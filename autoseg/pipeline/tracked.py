"""The run as a whole in a tracker: what it was asked for, its jobs beneath it, the ensemble's scores, the report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from autoseg.config.settings import PATHS
from autoseg.errors import AutosegError
from autoseg.pipeline.context import RunContext
from autoseg.tracking.follow import WHOLE, Follower
from autoseg.tracking.tracker import Ending, by_class

LEFT_OUT = frozenset((*PATHS, "init_weights", "track", "sweep", "address", "launcher"))
"""Settings that are no parameters: places and addresses."""


@contextmanager
def tracked(run: RunContext) -> Iterator[None]:
    """Tell the run's tracker, if it has one, of a command that does more than analyze."""
    settings = run.settings.tracking
    if settings is None or not run.request.draws_report:
        yield
        return
    chosen = {key.partition(".")[0] for key, origin in run.origins.items() if origin != "default"}
    params = run.settings.model_dump(mode="json", include=chosen - LEFT_OUT)
    follower = Follower(settings, run.workspace, WHOLE, run.workspace.tracked, params)
    follower.begin([], anew=False)
    ending: Ending = "stopped"
    try:
        yield
        ending = "finished" if run.complete else "failed"
    except AutosegError:
        ending = "failed"
        raise
    finally:
        follower.summarise(_scores(run))
        if settings.report:
            follower.attach([run.workspace.report])
        follower.end(ending)


def _scores(run: RunContext) -> dict[str, float]:
    """Out-of-fold Dice of the ensemble, as far as there is one."""
    from autoseg.evaluation.score_files import read_scores

    try:
        scores = read_scores(run.workspace.finished())
    except AutosegError:  # the stage that reads it says so
        return {}
    if scores is None:
        return {}
    chosen = scores.dice
    mean = {} if chosen.mean is None else {"final/dice": chosen.mean}
    return {**mean, **by_class("final_class", {c.name: c.mean for c in chosen.classes})}
