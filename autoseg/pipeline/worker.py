"""One job alone, as a worker trains it: what launchers, torchrun and people at other machines start."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoseg.config.docs import setting_docs
from autoseg.config.networks import AlgoName
from autoseg.config.reader import read_value
from autoseg.config.settings import Settings
from autoseg.errors import WorkspaceError
from autoseg.launch import stop_with_launcher
from autoseg.pipeline.budget import work_began
from autoseg.workspace.layout import check_writable
from autoseg.workspace.settings import read_settings
from autoseg.workspace.stored import check_stored
from autoseg.workspace.workspace import Workspace

WORKER_KEYS = frozenset(("work_dir", "device", "num_workers"))
"""Settings that a worker's command line may have: where the run is, and what it trains on."""


def planned_settings(workspace: Workspace) -> Settings:
    """The settings that a run was planned with, their paths from where the run lies; `dataroot` exists.

    Raises:
        WorkspaceError: The folder is no run's, or the data has moved.
    """
    if not workspace.settings.exists():
        raise WorkspaceError(f"{workspace.root}: not a run's folder. Run `autoseg generate` first.")
    stored = {key: item.value for key, item in read_settings(workspace).items()}
    settings = check_stored(stored, Settings, str(workspace.settings))
    dataroot = Path(os.path.normpath(workspace.settings.parent / settings.dataroot))
    if not dataroot.is_dir():
        raise WorkspaceError(
            f"{workspace.settings}: the data folder {dataroot} is not there. Mount it, or give --input input.yaml."
        )
    return settings.with_paths(lambda path: Path(os.path.normpath(workspace.settings.parent / path)))


def latest_planned(work_dir: Path) -> Workspace:
    """The folder that a worker works in: launchers name a round's, people the run's, which means its last round's."""
    workspace = Workspace(work_dir)
    return workspace.latest() if workspace.root == workspace.run else workspace


def work_on_job(
    work_dir: Path, algo: AlgoName, fold: int, *, device: str | None, num_workers: int | None, wait: bool
) -> int:
    """Train one planned job of a run: what launchers, torchrun and people at other machines start.

    Args:
        device, num_workers: None: as the run's settings say.
        wait: Wait where another worker has the job.

    Returns:
        0 where it is done, else 1.

    Raises:
        WorkspaceError: There is no such plan.
        Busy: Another worker has it.
        Interrupted: A signal came; it is saved.
    """
    workspace = latest_planned(work_dir)
    check_writable(workspace.run)
    settings = planned_settings(workspace)
    if not workspace.job_dir(algo, fold).plan.exists():
        raise WorkspaceError(f"{workspace.root}: {algo}_{fold} is not planned. Run `autoseg generate` first.")
    stop_with_launcher()
    import torch.distributed as dist

    from autoseg.training.job import run_job
    from autoseg.training.processes import join_processes

    if os.environ.get("RANK", "0") != "0":
        logging.getLogger("autoseg").setLevel(logging.WARNING)
    device, num_workers = device or settings.device, num_workers or settings.num_workers
    join_processes(device)
    begun = work_began()
    try:
        job = run_job(
            workspace,
            settings.dataroot,
            algo,
            fold,
            device=device,
            num_workers=num_workers,
            wait=wait,
            started=begun,
            track=settings.tracking,
        )
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    # Only the first process of several has scored it.
    return 0 if job.state == "done" else 1


def is_planned(overrides: Mapping[str, str]) -> bool:
    """Whether a command line names a planned job by its work_dir alone, and no setting that would change its plan."""
    work_dir = overrides.get("work_dir")
    return work_dir is not None and set(overrides) <= WORKER_KEYS and Workspace(Path(work_dir)).settings.exists()


def value_of(overrides: Mapping[str, str], key: str) -> Any:
    """A setting of a worker's command line; None where it does not have it."""
    return read_value(key, overrides[key], setting_docs()[key].annotation) if key in overrides else None


def work_alone(overrides: Mapping[str, str], algo: AlgoName, fold: int, *, wait: bool) -> int:
    """Train one planned job; the work_dir's settings say all else. Returns, raises: as `work_on_job`."""
    device, workers = (value_of(overrides, key) for key in ("device", "num_workers"))
    root = Path(overrides["work_dir"])
    return work_on_job(root, algo, fold, device=device, num_workers=workers, wait=wait)
