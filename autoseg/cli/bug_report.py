"""`autoseg doctor --report`: what a bug report needs, as Markdown that can be pasted into a public issue.

Nothing in it names a patient, a person or a place: of a run it holds figures and words that autoseg itself knows.
Names of classes, of cases and of the run, paths, addresses and messages of errors stay out.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from autoseg.cli.doctor import Check, examine
from autoseg.config.settings import Settings
from autoseg.errors import WorkspaceError
from autoseg.hardware.packages import extras, is_checkout
from autoseg.workspace.layout import check_readable
from autoseg.workspace.settings import read_settings
from autoseg.workspace.stored import Unreadable
from autoseg.workspace.usage import environment, read_usage
from autoseg.workspace.workspace import Workspace

HIDDEN = "(not shown)"
_DURATION = re.compile(r"[0-9.]+ ?(?:s|min|m|h|d)?")
_PATH = re.compile(r"(?<![\w.])(?:[A-Za-z]:\\|~?/)[^\s,;)'\"]+")


def bug_report(folder: Path, work_dir: Path | None) -> str:
    """The report.

    Args:
        folder: where a run would write; only its room is looked at.
        work_dir: a run's folder, whose settings, stages and states of jobs are added.

    Raises:
        WorkspaceError: work_dir is no run's folder.
    """
    checks = examine(folder)
    parts = ["### autoseg doctor --report", "", *_rows(_facts()), "", "**Checks**", "", *_checks(checks, folder)]
    if work_dir is not None:
        parts += _run(work_dir)
    return "\n".join(parts)


def _facts() -> dict[str, str]:
    facts = {**environment(), "installed as": "checkout" if is_checkout() else "package"}
    for name, needs in extras().items():
        have = [f"{need.name} {need.installed or 'missing'}" for need in needs]
        facts[f"extra {name}"] = ", ".join(have)
    return facts


def _rows(facts: dict[str, str]) -> list[str]:
    return ["| What | Here |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in facts.items())]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _checks(checks: Sequence[Check], folder: Path) -> list[str]:
    places = [str(p) for p in (folder, folder.absolute(), *folder.absolute().parents) if len(str(p)) > 1]
    home = os.path.expanduser("~")  # Path.home() would end in an error for a user without one, as in a container
    known = [sys.executable, sys.prefix, *places, home]
    return [f"- {c.state}: {c.name}: {without_places(c.found, known)}" for c in checks]


def without_places(text: str, known: Iterable[str] = ()) -> str:
    """A text in which paths are replaced by `(path)`: those known, which may have blanks, and what looks like one."""
    for place in sorted({*known}, key=len, reverse=True):
        if len(place) > 1:
            text = text.replace(place, "(path)")
    return _PATH.sub("(path)", text)


def _run(work_dir: Path) -> list[str]:
    workspace = Workspace(work_dir)
    if not work_dir.is_dir() or not workspace.settings.exists():
        raise WorkspaceError(f"--work_dir {work_dir}: not a run's folder. Expected one with settings.yaml in it.")
    check_readable(workspace.run)
    lines = ["", "**Settings that differ from the defaults**", ""]
    words = known_words()
    for key, stored in read_settings(workspace).items():
        if stored.origin != "default":
            lines.append(f"- {key if key in Settings.model_fields else HIDDEN}: {shown(stored.value, words)}")
    unreadable = Unreadable()
    states = Counter(f"{job.algo} {job.state}" for job, _ in workspace.readable_jobs(unreadable))
    usage = unreadable.or_else((), lambda: read_usage(workspace))
    lines += ["", "**Jobs**", "", *(f"- {text}: {number}" for text, number in sorted(states.items()))]
    lines += ["", "**Stages**", ""]
    for line in usage:
        memory = f"{line.peak_bytes / 2**30:.1f} GiB"
        lines.append(f"- {line.stage}: {_cell(line.ended)} after {line.seconds:.0f} s, {memory} at most")
    if unreadable.messages:
        lines += ["", f"Files that cannot be read: {len(unreadable.messages)}"]
    return lines


def known_words() -> set[str]:
    """Every word that a setting takes as a choice, and every name of a setting."""
    words: set[str] = set()
    seen: set[int] = set()

    def collect(annotation: Any) -> None:
        if id(annotation) in seen:
            return
        seen.add(id(annotation))
        if isinstance(annotation, str):
            words.add(annotation)
        fields = getattr(annotation, "model_fields", {})
        words.update(fields)
        for field in fields.values():
            collect(field.annotation)
        for inner in get_args(annotation):
            collect(inner)

    collect(Settings)
    return words


def shown(value: Any, words: set[str]) -> str:
    """A value as text: figures, durations and words that autoseg knows; all else is `(not shown)`."""
    if value is None or isinstance(value, bool | int | float):
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    if isinstance(value, str):
        return value if value in words or _DURATION.fullmatch(value) else HIDDEN
    if isinstance(value, dict):
        pairs = (f"{key if key in words else HIDDEN}: {shown(inner, words)}" for key, inner in value.items())
        return "{" + ", ".join(pairs) + "}"
    return "[" + ", ".join(shown(inner, words) for inner in value) + "]"
