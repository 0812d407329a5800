"""`autoseg demo`: the main job, start to end, on phantoms made on the spot."""

from __future__ import annotations

import os
import time
from pathlib import Path

from autoseg.config.load import load_settings
from autoseg.data.phantoms import make_phantoms
from autoseg.hardware.limits import CoreUse, own_threads, threads_left
from autoseg.pipeline.context import Request
from autoseg.pipeline.run import run_stages
from autoseg.pipeline.stages import PLAIN_RUN, stages_named
from autoseg.terminal import show
from autoseg.workspace.files import write_text
from autoseg.workspace.workspace import Workspace

SETTINGS = """\
algos: [segresnet, swinunetr, dints]   # auto would take one for so short a run; these show an ensemble
# Small networks and few steps, so that it takes minutes; planned where they are not given. Steps instead of a budget:
# models as good come out on a busy machine, only later.
roi_size: [32, 32, 32]
batch_size: 2
num_steps_per_epoch: 10
segresnet: {init_filters: 8, num_epochs: 12, num_epochs_per_validation: 4}
swinunetr: {feature_size: 12, num_epochs: 8, num_epochs_per_validation: 4}
dints: {channel_mul: 0.25, num_epochs: 15, num_epochs_per_validation: 5}
"""
"""Lines for input.yaml."""
LOOK_S = 1.0
"""Seconds over which it is seen at least what else runs."""


def run_demo(folder: Path, *, seed: int = 0) -> int:
    """Make phantoms in a folder and run everything on them; run again, it goes on.

    Returns:
        0, or 1 where a job failed.
    """
    input_path, before, most = folder / "input.yaml", CoreUse.now(), own_threads()
    if not input_path.exists():
        input_path = make_phantoms(folder, shape=(32, 30, 28), num_fold=2, seed=seed)
        write_text(input_path, input_path.read_text(encoding="utf-8") + SETTINGS)
    threads = _threads_left(before, most)
    settings, origins = load_settings(input_path)
    busy = f"Other work runs here, so this takes {threads} of {most} cores.\n" if threads < most else ""
    show(_what_happens(folder, busy))
    stages, is_whole = stages_named(PLAIN_RUN)
    request = Request(stages=stages, is_whole=is_whole)
    code = run_stages(request, settings, origins, input_path)
    show(_what_to_open(folder, Workspace(settings.work_dir)))
    return code


def _threads_left(before: CoreUse, most: int) -> int:
    """Threads for this process, in which jobs on a CPU run: their steps are fixed, and would only wait for each other.

    Args:
        before: use of the cores some time ago.
        most: where nothing else runs.
    """
    time.sleep(max(0.0, LOOK_S - (time.monotonic() - before.wall_s)))
    threads = threads_left(before, CoreUse.now(), most)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read when PyTorch is loaded
    return threads


def _what_happens(folder: Path, busy: str) -> str:
    return (
        f"The demo makes 14 small scans in {folder}, each with a sphere and a box,\n"
        "and does with them what `autoseg run` does with any data:\n"
        "  1. analyze     read every scan and label, look for faults\n"
        "  2. generate    plan three networks for these data and this machine\n"
        "  3. train       train each on one half of 12 scans, score it on the other half; then the other way round\n"
        "  4. ensemble    combine the networks that do best together, segment 2 scans that none of them has seen\n"
        "  5. report      put it all on one page\n"
        f"{busy}It takes two to four minutes on two cores. Ctrl-C stops it; `autoseg demo` goes on where it was.\n"
    )


def _what_to_open(folder: Path, workspace: Workspace) -> str:
    return (
        "\nWhat to look at now:\n"
        f"  {workspace.report}\n"
        "      the report: open it in a browser\n"
        f"  {workspace.predictions}\n"
        f"      labels of the 2 scans that were held back, for ITK-SNAP or 3D Slicer; scans: {folder / 'images'}\n"
        f"  autoseg explain roi_size --work_dir {workspace.root}\n"
        "      why a setting has the value that it has\n"
        "  autoseg init YOUR_DATA --output my_run\n"
        "      the same with your own scans and labels\n"
    )
