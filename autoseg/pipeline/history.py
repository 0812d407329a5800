"""What a work_dir keeps of its commands: settings, command lines, input.yaml."""

from __future__ import annotations

import json
import logging
import os
import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from autoseg.config.load import AUTO3DSEG_TRACKING, load_settings
from autoseg.config.networks import AlgoName
from autoseg.config.nodes import json_for_yaml
from autoseg.config.passwords import without_passwords
from autoseg.config.settings import PATHS, Settings, map_weights
from autoseg.pipeline.context import Request
from autoseg.version import __version__
from autoseg.workspace.files import PUBLIC, SECRET, write_json, write_text
from autoseg.workspace.settings import write_settings
from autoseg.workspace.stored import check_stored, read_stored
from autoseg.workspace.usage import CommandLine, add_line
from autoseg.workspace.workspace import Workspace

log = logging.getLogger(__name__)

SELECTS_WORK = frozenset(
    (*PATHS, "algos", "folds", "device", "num_workers", "launcher", "address", "retries")
    + ("jobs_per_device", "gpus_per_job", "cpus_per_job")
)
"""Settings that say what to run now; the others on a command line belong to the run and stay with it."""
ADDRESSES = frozenset(("sweep.storage", "sweep", "track", "track.uri", *AUTO3DSEG_TRACKING))
"""Settings of a command line that may hold an address with a password."""
WEIGHTS = "init_weights"
"""A setting with paths, which later commands must find from wherever they are given."""
ROUND_KEYS = frozenset(("partial_labels", "strategy", "pseudolabel"))
"""Settings, and a block of them, that decide which rounds of training there are and what they learn from."""


def _mode_of(has_address: bool) -> int:
    """Permissions of a file: the user's alone where an address stands in it that a password might be hidden in."""
    return SECRET if has_address else PUBLIC


def _mode_of_settings(settings: Settings) -> int:
    tracking = settings.tracking
    return _mode_of(settings.sweep.storage is not None or (tracking is not None and tracking.uri is not None))


# -- settings of command lines


def _kept_path(workspace: Workspace) -> Path:
    return workspace.root / "state" / "command_line.json"


def kept_settings(workspace: Workspace) -> dict[str, str]:
    """Settings of earlier command lines that later commands go on with: key -> text."""
    path = _kept_path(workspace)
    remedy = "Undo the edit, or delete the file and give those settings on the command line again."
    kept = read_stored(path, dict[str, str], remedy=remedy) if path.exists() else {}
    if WEIGHTS in kept:
        value = check_stored(_json(kept[WEIGHTS]), dict[str, str] | str | None, f"{path}: {WEIGHTS}", remedy)  # type: ignore[arg-type]
        kept[WEIGHTS] = json_for_yaml(map_weights(value, lambda p: Path(os.path.normpath(workspace.root / p))))
    return kept


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _with_paths_from(workspace: Workspace, settings: Settings) -> Settings:
    """The settings with paths from the run's folder, which may be moved together with what they lead to."""
    return settings.with_paths(lambda path: Path(os.path.relpath(path, workspace.root)))


def load_with_kept(input_path: Path, request: Request) -> tuple[Settings, dict[str, str], dict[str, str]]:
    """Read input.yaml with the settings of this command line, and of earlier ones.

    Those of earlier ones are kept, unless the file or this command line has them, so that the plain `autoseg run` goes
    on with what `autoseg run --budget 2h` began.

    Returns:
        The settings; the origin of each; what is to be kept for later commands: key -> text.

    Raises:
        ConfigError: All that is wrong with them.
    """
    settings, origins = load_settings(input_path, request.words)
    earlier = {
        key: text
        for key, text in kept_settings(Workspace(settings.work_dir)).items()
        if key not in request.words and origins.get(key, "default") == "default"
    }
    used = earlier
    if not request.keeps_settings:  # a plan stays as it was made, and rounds as they were begun
        used = {key: text for key, text in earlier.items() if key.partition(".")[0] in ROUND_KEYS}
    if used:
        log.info("as on an earlier command line: %s", " ".join(f"--{key} {text}" for key, text in used.items()))
        settings, origins = load_settings(input_path, {**used, **request.words})
    return settings, origins, {**earlier, **request.words}


def keep_settings(workspace: Workspace, words: Mapping[str, str], settings: Settings) -> None:
    """Keep settings of a command line for later commands, but for those that say what to run now.

    Args:
        settings: made with them, paths resolved.
    """
    kept = {key: without_passwords(text) for key, text in words.items() if key not in SELECTS_WORK}
    if WEIGHTS in kept:
        kept[WEIGHTS] = json_for_yaml(_with_paths_from(workspace, settings).init_weights)
    write_json(_kept_path(workspace), kept, mode=_mode_of(not ADDRESSES.isdisjoint(words)))


def note_settings(workspace: Workspace) -> Callable[[], None]:
    """Note a run's settings and its number of rounds, and return what puts them back as they are now.

    What a mistaken command line has stored would make the plain `autoseg run` fail, or hide finished rounds. A run
    that was stopped, by a signal or by faults of the data, goes on with its own.
    """
    kept, number = _kept_path(workspace), workspace.num_rounds
    files = [kept, *(place.settings for place in (workspace, *workspace.rounds()))]
    before = {
        path: (path.read_text(encoding="utf-8", errors="replace"), path.stat().st_mode & 0o777)
        for path in files
        if path.exists()
    }

    def put_back() -> None:
        for path, (content, mode) in before.items():
            write_text(path, content, mode=mode)
        if kept not in before:
            kept.unlink(missing_ok=True)
        if workspace.num_rounds != number:
            workspace.plan_rounds(number)

    return put_back


# -- what was asked for


def remember_command(workspace: Workspace, request: Request, input_path: Path) -> None:
    """Add a line to the commands of the run, with paths from the folder that holds the work_dir."""
    home = workspace.root.absolute().parent
    command = ["autoseg", "run" if request.is_whole else "+".join(stage.name for stage in request.stages)]
    options = {"input": str(input_path.absolute()), **request.words, **_job_words(request.algo, request.fold)}
    for key, value in options.items():
        command += [f"--{key}", os.path.relpath(value, home) if os.path.isabs(value) else value]
    text = shlex.join(map(without_passwords, command))
    line = CommandLine(time=round(time.time(), 1), command=text, version=__version__)
    add_line(workspace.commands, line, mode=_mode_of(not ADDRESSES.isdisjoint(request.words)))


def _job_words(algo: AlgoName | None, fold: int | None) -> dict[str, str]:
    return {key: str(value) for key, value in (("algo", algo), ("fold", fold)) if value is not None}


def remember_input(workspace: Workspace, settings: Settings, origins: Mapping[str, str], input_path: Path) -> None:
    """Copy input.yaml into the run, and store its settings."""
    text = without_passwords(input_path.read_text(encoding="utf-8-sig"))
    write_text(workspace.input, text, mode=_mode_of_settings(settings))
    remember_settings(workspace, settings, origins)


def remember_settings(workspace: Workspace, settings: Settings, origins: Mapping[str, str]) -> None:
    """Store the settings of a run or a round, each with its origin, paths relative to the folder."""
    relative = _with_paths_from(workspace, settings).model_dump(mode="json")
    write_settings(workspace, relative, origins, mode=_mode_of_settings(settings))
