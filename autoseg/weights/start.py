"""The weights that the jobs of a run start from: copied into its folder once, where every machine of it finds them.

`keep_start` brings the copy up to date with the setting; jobs read it by `read_start`, and need the setting no more.
What a run's own pretraining made is copied in the same way, by `keep_pretrained`; it may differ from fold to fold.
"""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from autoseg.config.networks import AlgoName
from autoseg.errors import ConfigError, WorkspaceError
from autoseg.networks import build_network
from autoseg.plan import Plan
from autoseg.weights.checkpoint import read_checkpoint
from autoseg.weights.matching import Match, check_match, match_network
from autoseg.weights.source import Facts, find_source
from autoseg.weights.tables import Table
from autoseg.workspace.archive import MANIFEST, opened_model
from autoseg.workspace.files import is_beneath, write_atomic
from autoseg.workspace.stored import read_stored, write_stored
from autoseg.workspace.workspace import Workspace

log = logging.getLogger(__name__)

MOST_SHOWN = 6
"""Tensors of each state that the log names; init_weights.json has all."""


class Start(Facts):
    """What stands in init_weights/<algo>.json, or <algo>_<fold>.json, beside the weights themselves."""

    advice: ClassVar[str] = "Delete the folder init_weights and run `autoseg generate` again."

    source: str
    """What the file is called."""
    digest: str
    """Of the files that the weights were read from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartWeights:
    """A network's first weights, ready to be fitted to a plan."""

    start: Start
    path: Path
    """The copy in the run's folder."""

    def match(self, network: nn.Module, plan: Plan) -> Match:
        """What of them goes where in a plan's network.

        Raises:
            ConfigError: They are of another network.
            WorkspaceError: The copy is damaged.
        """
        try:
            tensors = read_checkpoint(self.path).tensors
        except ConfigError:
            raise WorkspaceError(f"{self.path}: missing, cut off or damaged. {Start.advice}") from None
        found = match_network(
            network,
            plan,
            tensors,
            source=self.start.source,
            kind=self.start.kind,
            classes=self.start.classes,
            prefixes=self.start.prefixes,
        )
        check_match(found.table, plan)
        return found

    def load(self, network: nn.Module, plan: Plan) -> Table:
        """Put them into a plan's network, in place, and account for them. Raises: as `match`."""
        found = self.match(network, plan)
        found.load(network)
        return found.table

    def check(self, plan: Plan) -> Table:
        """The account for a plan, before it is trained. Raises: as `match`."""
        with torch.random.fork_rng(devices=[]):
            return self.match(build_network(plan), plan).table

    def learned_from(self, digests: Sequence[str]) -> bool:
        """Whether they learned from a case, by its own digest or by that of its images, whose label was another."""
        return not {*self.start.trained_on}.isdisjoint(digests)


def read_start(workspace: Workspace, algo: AlgoName, fold: int) -> StartWeights | None:
    """The weights that a job starts from, those of its fold over those of all; None: random ones.

    Raises:
        WorkspaceError: What tells of them is damaged.
    """
    for name in (f"{algo}_{fold}", algo):
        path = workspace.init_weights / f"{name}.json"
        if path.exists():
            return StartWeights(start=read_stored(path, Start), path=path.with_suffix(".pt"))
    return None


def forget_starts(workspace: Workspace, algo: AlgoName, *, but: str = "") -> None:
    """Remove the run's copies of a network's first weights, those of single folds included, but for one by its name."""
    for path in workspace.init_weights.glob(f"{algo}*.json"):
        name, _, fold = path.stem.rpartition("_")
        if path.stem != but and (path.stem == algo or (name == algo and fold.isdecimal())):
            path.unlink(missing_ok=True)  # first: without it the other is not used
            path.with_suffix(".pt").unlink(missing_ok=True)


def write_start(path: Path, start: Start, tensors: Mapping[str, torch.Tensor]) -> StartWeights:
    """Write a copy of first weights, and what is known of them to a path beside it."""
    contiguous = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    path.unlink(missing_ok=True)  # first: without it the other is not used
    write_atomic(path.with_suffix(".pt"), lambda file: torch.save(contiguous, file))
    write_stored(path, start)
    return StartWeights(start=start, path=path.with_suffix(".pt"))


def keep_start(workspace: Workspace, algo: AlgoName, source: Path | None) -> StartWeights | None:
    """Bring the run's copy of a network's first weights up to date.

    Args:
        source: as `find_source` takes it; None: random weights, and the copy is removed.

    Raises:
        ConfigError: There are no weights there, none that can be read, or they are the run's own.
    """
    path = workspace.init_weights / f"{algo}.json"
    forget_starts(workspace, algo, but="" if source is None else algo)
    if source is None:
        return None
    if is_beneath(source, workspace.run):
        raise ConfigError(
            f"init_weights: {source}: lies in the run's own work_dir, whose models change as they are trained. "
            "Copy it to another folder, or give another work_dir."
        )
    if not _is_packed(source):
        return _keep(path, algo, source, source)
    try:
        with opened_model(source) as folder:
            return _keep(path, algo, folder, source)
    except WorkspaceError as error:
        raise ConfigError(error.messages) from None


def _is_packed(source: Path) -> bool:
    """Whether a path is a packed model; torch's files are zips, too."""
    if source.is_dir():
        return (source / MANIFEST).is_file()
    try:
        with zipfile.ZipFile(source) as archive:
            return MANIFEST in archive.namelist()
    except (OSError, zipfile.BadZipFile, ValueError):
        return False


def _keep(path: Path, algo: AlgoName, home: Path, given: Path) -> StartWeights:
    """Copy weights into a run where they are not there yet.

    Args:
        path: what tells of the copy.
        home: the file or folder that they are in: `given`, or what it was unpacked to.
    """
    found = find_source(home, algo)
    digest = found.digest
    if path.exists() and path.with_suffix(".pt").exists():
        kept = read_stored(path, Start)
        if kept.digest == digest:
            return StartWeights(start=kept, path=path.with_suffix(".pt"))
        log.info("init_weights: %s of %s changed; taking it anew", found.weights.name, algo)
    tensors, facts = found.read(algo)
    name = given.name
    if home.is_dir():  # no path of this machine stands in a run's folder
        name = (Path(name) / found.weights.relative_to(home)).as_posix()
    start = Start(source=name, digest=digest, **facts.model_dump())
    return write_start(path, start, tensors)


def log_table(name: str, table: Table) -> None:
    """Say what a job starts from."""
    log.info("%s: starts with %s", name, table.summary)
    for line in table.lines(MOST_SHOWN):
        log.info("%s:   %s", name, line)
