"""Which layout a work_dir has: the version of what stands where in it, kept in state/layout.json.

| layout | autoseg | what changed |
| --- | --- | --- |
| 1 | 0.1 | has no layout.json |
| 2 | 0.2 | cases are known by their content, so that the digests of jobs and stages differ |

Commands that only read take older layouts; those that write refuse them, since they would redo all of the run beside
what is there. A newer layout is refused by all.
"""

from __future__ import annotations

from pathlib import Path

from autoseg.errors import WorkspaceError
from autoseg.version import __version__
from autoseg.workspace.files import check_inside
from autoseg.workspace.stored import Stored, check_stored, newer, read_stored, write_stored

LAYOUT = 2
"""Of the work_dirs that this version writes. Raise it where a file's meaning changes so that older ones would be read
wrongly, and add a line to the table above."""


WRITTEN_OVER = ("input.yaml", "datalist.json", "report.html", "cache", "ensemble", "pseudolabels", "init_weights")
"""Files that a run writes, and folders in which it removes what it needs no longer: those of others would be lost."""


class Layout(Stored):
    """What stands in state/layout.json."""

    layout: int
    version: str
    """Of autoseg, when the work_dir was made."""


def layout_path(root: Path) -> Path:
    """The file that tells the layout of a run in a folder."""
    return root / "state" / "layout.json"


def layout_of(root: Path) -> int:
    """The layout of a run in a folder; 0: it holds no run yet.

    Raises:
        WorkspaceError: It is newer than this autoseg, or its layout.json is damaged.
    """
    path = layout_path(root)
    if not path.exists():
        return 1 if _holds_run(root) else 0
    return _read(path).layout


def _holds_run(root: Path) -> bool:
    marks = (root / "settings.yaml", root / "datastats.yaml", root / "state" / "analyze.json")
    return any(path.exists() for path in marks) or any(root.glob("*_*/job.json"))


def _holds(path: Path) -> bool:
    """Whether a path is a file, or a folder with something in it."""
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _read(path: Path) -> Layout:
    remedy = f'Write {{"layout": {LAYOUT}, "version": "{__version__}"}} if this version made the run.'
    raw = read_stored(path, dict[str, object], remedy=remedy)  # a newer one may have keys that are not known here
    number = raw.get("layout")
    if isinstance(number, int) and number > LAYOUT:
        raise WorkspaceError(newer(path, str(raw.get("version", "of a later version"))))
    return check_stored(raw, Layout, str(path), remedy)


def check_readable(root: Path) -> None:
    """Refuse a run's folder that a newer autoseg has made.

    Raises:
        WorkspaceError: It is newer, or its layout.json is damaged.
    """
    layout_of(root)


def check_writable(root: Path) -> list[Path]:
    """Refuse a work_dir that this version would not go on with, or through which it would write elsewhere.

    Returns:
        Halves of files, as `check_inside` has them.

    Raises:
        WorkspaceError: An older or a newer version made it, its layout.json is damaged, links lead out of it, or it
            holds no run, but others' files where a run's would lie.
    """
    halves = check_inside(root)
    layout = layout_of(root)
    if 0 < layout < LAYOUT:
        raise WorkspaceError(
            f"{root}: made by autoseg 0.1, which knew cases by their files' times, so {__version__} can show "
            "it and predict with it (predict, status, report, evaluate) but not go on with it. Give another work_dir, "
            "or delete this one."
        )
    if layout == 0 and (taken := [name for name in WRITTEN_OVER if _holds(root / name)]):
        raise WorkspaceError(
            f"{root}: holds no run, but {' and '.join(taken)}, which a run would write over or tidy up. Give a "
            "work_dir of its own, such as an empty folder."
        )
    return halves


def begin_layout(root: Path) -> None:
    """Note the layout of a work_dir that holds no run yet; call it before anything else is written.

    Raises:
        WorkspaceError: As `check_writable`.
    """
    check_writable(root)
    if layout_of(root) == 0:
        write_stored(layout_path(root), Layout(layout=LAYOUT, version=__version__))
