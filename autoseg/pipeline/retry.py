"""`autoseg retry`: jobs that failed or diverged are trained again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from autoseg.config.load import load_settings
from autoseg.errors import ConfigError
from autoseg.pipeline.run import run_input
from autoseg.workspace.workspace import Workspace

log = logging.getLogger(__name__)

FAILED = ("failed", "diverged")
"""States of the jobs that are trained again."""


def retry(input_path: Path, overrides: Mapping[str, str], name: str | None) -> int:
    """Train failed and diverged jobs again, all or the one named; each goes on from its checkpoint where it has one.

    Only those of the round that was begun last: what later rounds learned hangs on the jobs of an earlier one.

    Returns:
        0 where all are done, else 1.

    Raises:
        ConfigError: The one named is no job, did not fail, or is of an earlier round alone.
    """
    settings, _ = load_settings(input_path, overrides)
    workspace = Workspace(settings.work_dir)
    states = {job.name: job.state for job in workspace.latest().jobs()}
    failed = [key for key, state in states.items() if state in FAILED]
    earlier = [
        f"{place.root.name}/{job.name}"
        for place in workspace.rounds()[:-1]
        for job in place.jobs()
        if job.state in FAILED
    ]
    how = "`autoseg run` trains jobs of earlier rounds again, and then what later rounds learned from them"
    if name is not None and name not in failed:
        why = f"is {states[name]}, not failed" if name in states else "no such job"
        hint = f" {how}: {', '.join(earlier)}." if earlier else ""
        raise ConfigError(f"{name}: {why}. Failed: {', '.join(failed) or 'none'}.{hint}")
    if earlier:
        log.warning("retry: %s: %s", how, ", ".join(earlier))
    if not failed:
        log.info("retry: no job%s has failed", " of the last round" if earlier else "")
        return 1 if earlier else 0
    code = run_input(("train",), input_path, overrides, only=failed if name is None else [name])
    return 1 if earlier else code
