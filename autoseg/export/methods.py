"""`autoseg methods`: a run's methods section in Markdown, its checklists, and the source of each figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autoseg.errors import ConfigError, WorkspaceError
from autoseg.export.checklists import CLAIM, TRIPOD_AI, YOU, checklist
from autoseg.export.references import cited, used_in
from autoseg.export.statements import Statements
from autoseg.export.traced import Figure
from autoseg.version import __version__
from autoseg.workspace.files import json_text, write_output
from autoseg.workspace.layout import check_readable
from autoseg.workspace.workspace import Workspace

NAME = "methods.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Methods:
    """The section of one run."""

    sections: tuple[tuple[str, str], ...]
    """Heading and Markdown of each."""
    figures: tuple[Figure, ...]
    """By the number of their footnote."""
    num_answered: dict[str, tuple[int, int]]
    """Checklist -> items that the run answers, wholly or in part, and all."""

    @property
    def text(self) -> str:
        """The page."""
        parts = [f"## {heading}\n\n{body}" for heading, body in self.sections]
        notes = [f"[^{n}]: {figure.source}" for n, figure in enumerate(self.figures, 1)]
        return "\n\n".join(["# Methods and results", INTRODUCTION, *parts, "\n".join(notes)]) + "\n"

    @property
    def sources(self) -> dict[str, Any]:
        """The figures and where they stand, as plain data."""
        return {"version": __version__, "figures": [{"note": n, **asdict(f)} for n, f in enumerate(self.figures, 1)]}


INTRODUCTION = (
    "Written by autoseg from the files of a run. A number's footnote names its file and key; the JSON file "
    "beside this "
    f"page has all of them. {YOU} what no file can know; the text is a draft for people to check."
)


LEFT_DATA = f"{YOU}: where the images come from and under which approval, and how the labels were drawn, by whom."


def read_methods(work_dir: Path) -> Methods:
    """What a run says of itself.

    Raises:
        WorkspaceError: The folder is no run's, no ensemble was made, or a file is damaged.
    """
    workspace = Workspace(work_dir)
    check_readable(workspace.run)
    if not workspace.settings.exists():
        raise WorkspaceError(
            f"{work_dir}: no settings.yaml, so not a run's folder. Give a run's folder with --work_dir."
        )
    if not workspace.finished().scores.exists():
        raise WorkspaceError(f"{work_dir}: no scores yet. Run `autoseg run` or `autoseg ensemble` first.")
    run = Statements.of(workspace)
    sections = [(heading, "\n\n".join(parts)) for heading, parts in _sections(run) if parts]
    sections.append((f"CLAIM 2024 {cited('claim')}", checklist(CLAIM, run)))
    sections.append((f"TRIPOD+AI {cited('tripod')}", checklist(TRIPOD_AI, run)))
    text = "\n".join(f"{heading}\n{body}" for heading, body in sections)
    sections.append(("References", "\n".join(used_in(text))))
    lists = {"CLAIM 2024": CLAIM, "TRIPOD+AI": TRIPOD_AI}
    answered = {name: (sum(bool(i.answer(run)) for i in items), len(items)) for name, items in lists.items()}
    return Methods(sections=tuple(sections), figures=tuple(run.traced.figures), num_answered=answered)


def _sections(run: Statements) -> list[tuple[str, list[str]]]:
    def kept(*texts: str) -> list[str]:
        return [text for text in texts if text]

    limits = "\n".join(f"- {text}" for text in run.limits())
    return [
        (
            "Data",
            kept(run.data(), run.class_table(), run.annotation(), run.exclusions(), run.partition(), LEFT_DATA),
        ),
        ("Preprocessing", kept(run.preprocessing())),
        ("Models and training", kept(run.networks(), run.training(), run.initial_weights(), run.imbalance())),
        ("Selection and ensembling", kept(run.selection(), run.ensembling())),
        ("Evaluation", kept(run.metrics(), run.statistics())),
        (
            "Results",
            kept(
                run.results(), run.score_table(), run.external(), run.score_table("external", "metrics"),
                run.subgroup_words(), run.subgroup_table(),
                run.calibration(), run.predicted_quality(), run.robustness(), run.failures(),
            ),
        ),
        ("Limits", kept(limits)),
        ("Software and machine", kept(run.software())),
    ]  # fmt: skip


def write_methods(work_dir: Path, output: Path | None = None) -> tuple[Methods, Sequence[Path]]:
    """Write the section, and beside it the sources of its figures.

    Args:
        work_dir: folder of a run with an ensemble.
        output: the Markdown file; None: methods.md in the run's folder. The sources get the same name with .json.

    Returns:
        The section, and the two files.

    Raises:
        WorkspaceError: As `read_methods`.
        ConfigError: The output cannot be written, or is where the sources go.
    """
    methods = read_methods(work_dir)
    target = output or Workspace(work_dir).run / NAME
    sources = target.with_suffix(".json")
    if sources == target:
        raise ConfigError(f"--output: {target}: the sources get this name. Expected one such as {NAME}.")
    write_output(target, methods.text)
    write_output(sources, json_text(methods.sources))
    return methods, (target, sources)


def words(methods: Methods, files: Sequence[Path]) -> str:
    """What was written, in lines."""
    answered = [
        f"{name}: {num} of {all_} items answered, wholly or in part"
        for name, (num, all_) in methods.num_answered.items()
    ]
    return "\n".join(
        [*(str(path) for path in files), *answered, f"{len(methods.figures)} figures, each with its source"]
    )
