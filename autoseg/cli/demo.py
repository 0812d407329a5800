"""`autoseg demo`: the main job, start to end, on phantoms made on the spot."""

from __future__ import annotations

import logging
from pathlib import Path

from autoseg.config.load import load_settings
from autoseg.data.phantoms import make_phantoms
from autoseg.pipeline.context import Request
from autoseg.pipeline.run import run_stages
from autoseg.pipeline.stages import PLAIN_RUN, stages_named
from autoseg.workspace.files import write_text

log = logging.getLogger(__name__)

BUDGET = "270s"
"""Enough for three algorithms to learn the phantoms on two cores."""
ALGOS = "algos: [segresnet, swinunetr, dints]   # auto would take one for so short a budget; these show an ensemble\n"
"""A line for input.yaml."""


def run_demo(folder: Path, *, seed: int = 0) -> int:
    """Make phantoms in a folder and run everything on them; run again, it goes on.

    Returns:
        0, or 1 where a job failed.
    """
    input_path = folder / "input.yaml"
    if not input_path.exists():
        input_path = make_phantoms(folder, shape=(32, 30, 28), num_fold=2, seed=seed)
        write_text(input_path, input_path.read_text(encoding="utf-8") + ALGOS)
    settings, origins = load_settings(input_path, {"budget": BUDGET})
    log.info("demo: %s, budget %s", input_path, BUDGET)
    stages, is_whole = stages_named(PLAIN_RUN)
    request = Request(stages=stages, is_whole=is_whole, words={"budget": BUDGET})
    return run_stages(request, settings, origins, input_path)
