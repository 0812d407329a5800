"""The report's page: its sections laid out by report.html.j2, written as one file.

Nothing on the page is fetched: style, script and pictures are part of it, and its policy forbids all requests.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from autoseg.errors import AutosegError, ConfigError, WorkspaceError
from autoseg.report.filters import FILTERS
from autoseg.report.gather import Run, clock, inputs_digest, last_finished, stages_shown
from autoseg.report.pictures import KEPT
from autoseg.report.sections import glance, sections_of
from autoseg.terminal import printable
from autoseg.version import __version__
from autoseg.workspace.files import open_regular, write_text
from autoseg.workspace.layout import check_readable
from autoseg.workspace.stages import Stage
from autoseg.workspace.workspace import Workspace


def check_run(workspace: Workspace) -> None:
    """Refuse a folder that is no run's.

    Raises:
        WorkspaceError: It is none.
    """
    check_readable(workspace.run)
    if not workspace.settings.exists() and not workspace.datastats.exists():
        raise WorkspaceError(f"{workspace.root}: not a run's folder. Give a run's folder with --work_dir.")


def is_current(workspace: Workspace, stages: Sequence[Stage[Any]]) -> bool:
    """Whether the report shows the run as it is; it carries a digest of what it was made from."""
    workspace = last_finished(workspace)
    if not workspace.report.exists():
        return False
    with open_regular(workspace.report) as file:
        return _mark(inputs_digest(workspace, stages)).encode() in file.read(4096)


def _mark(inputs: str) -> Markup:
    return Markup('<meta name="autoseg-inputs" content="{}">').format(inputs)


def make_report(
    work_dir: Path, stages: Sequence[Stage[Any]], *, output: Path | None = None, live: bool = False
) -> Path:
    """Write the report of a run, as far as it is.

    Args:
        work_dir: the run's folder.
        stages: the table of stages, whose progress stands on top.
        output: the file; None: `report.html` in the run's folder.
        live: for `autoseg report --serve`: the page asks its server for news.

    Returns:
        The file.

    Raises:
        WorkspaceError: The folder is no run's, or a file of it is damaged.
        ConfigError: The output cannot be written.
    """
    workspace = last_finished(Workspace(work_dir))
    target = output or workspace.report
    text = render(workspace, stages, live=live)
    try:
        write_text(target, text)
    except OSError as error:
        advice = "Give a file in a folder that you may write to with --output."
        raise ConfigError(f"{target}: cannot be written ({error.strerror}). {advice}") from None
    return target


def render(workspace: Workspace, stages: Sequence[Stage[Any]], *, live: bool = False) -> str:
    """The page's HTML.

    Raises:
        WorkspaceError: The folder is no run's.
    """
    check_run(workspace)
    run = Run(workspace)
    sections = []
    with KEPT.page():
        for name, title, make, command in sections_of(workspace):
            try:
                content = make(run)
            except AutosegError as error:
                content = {"fault": " ".join(error.messages)}
            sections.append({"id": name, "title": title, "command": command, **(content or {"empty": True})})
    environment = Environment(
        loader=PackageLoader("autoseg.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(FILTERS)
    folder = Path(__file__).parent
    page = environment.get_template("report.html.j2").render(
        name=run.name,
        version=__version__,
        made=clock(time.time()),
        stages=stages_shown(workspace, stages),
        glance=glance(run),
        sections=sections,
        notes=run.notes,
        style=Markup((folder / "report.css").read_text(encoding="utf-8")),
        script=Markup((folder / "report.js").read_text(encoding="utf-8")),
        mark=_mark(inputs_digest(workspace, stages)),
        live=live,
    )
    return printable(page)  # marks of direction and control characters of names, too, are only shown
