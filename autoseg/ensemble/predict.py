"""Labels for new images, with the ensemble or with chosen jobs."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from autoseg.claims import Busy, Claim
from autoseg.data.foreign import image_files
from autoseg.data.listfile import unique_names
from autoseg.data.volumes import SUFFIXES, read_grid, stem_of, suffix_of
from autoseg.ensemble.combine import EnsembleSpec
from autoseg.errors import AutosegError, ConfigError, DataError, ResourceError, WorkspaceError
from autoseg.inference.predictor import Predictor
from autoseg.workspace import Workspace, read_json

log = logging.getLogger(__name__)

CHANNEL = re.compile(r"_(\d{4})$")
"""nnU-Net's number of a channel at the end of a file's stem."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One image to segment."""

    name: str
    images: tuple[Path, ...]
    target: Path
    """Label file to write."""


def read_ensemble(workspace: Workspace) -> EnsembleSpec:
    """Read the chosen ensemble.

    Raises:
        WorkspaceError: There is none yet, or the file was damaged.
    """
    path = workspace.ensemble_spec
    if not path.exists():
        raise WorkspaceError(
            f"{path}: no ensemble yet. Run `autoseg ensemble` (or `autoseg run`) first, "
            "or name a trained job with --algo and --fold."
        )
    try:
        return EnsembleSpec.model_validate(read_json(path))
    except ValidationError as error:
        found = error.errors()[0]
        where = ".".join(str(part) for part in found["loc"])
        raise WorkspaceError(
            f"{path}: {where}: {found['msg']}. Delete the file and run `autoseg ensemble` again."
        ) from error


def load_predictor(
    workspace: Workspace, *, algo: str | None = None, fold: int | None = None, device: str = "auto"
) -> Predictor:
    """Load the ensemble, or the mean of the trained jobs of one algorithm, one fold, or both.

    Raises:
        WorkspaceError: There is no ensemble, or no such trained job.
    """
    if not workspace.root.is_dir():
        raise WorkspaceError(f"{workspace.root}: no such work_dir. Give the folder of a finished run with --work_dir.")
    workspace = workspace.finished()
    if algo is None and fold is None:
        spec = read_ensemble(workspace)
        return Predictor([workspace.job_dir(a, f) for a, f in spec.members], device=device, combine=spec.combine)
    trained = [job for job in workspace.jobs() if job.state == "done"]
    chosen = [job for job in trained if algo in (None, job.algo) and fold in (None, job.fold)]
    if not chosen:
        words = [f"algorithm {algo}" if algo else "", f"fold {fold}" if fold is not None else ""]
        known = ", ".join(job.name for job in trained) or "none"
        raise WorkspaceError(
            f"{workspace.root}: no trained job of {' and '.join(w for w in words if w)}. Trained: {known}. "
            "Run `autoseg train`, or name one of these."
        )
    return Predictor([workspace.job_dir(job.algo, job.fold) for job in chosen], device=device)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Say what to do where a label file cannot be written.

    Raises:
        ResourceError: It cannot.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise ResourceError(f"{target}: cannot be written ({reason}). Free space, or choose another folder.") from error


def segment(predictor: Predictor, images: Sequence[Path], target: Path) -> None:
    """Segment one image and write its label file on the image's own grid.

    Raises:
        DataError: The image cannot be read, or does not have the model's channels.
        ResourceError: The label file cannot be written.
    """
    found = sum(read_grid(path)[1] for path in images)
    if found != predictor.num_channels:
        names = " and ".join(path.name for path in images) if len(images) < 3 else f"the {len(images)} files"
        raise DataError(
            f"{images[0]}: {names} with {found} channel{'s' * (found != 1)}. Expected {predictor.num_channels}, as the "
            "models were trained; several files of one case end in _0000, _0001, ... in the order of training."
        )
    with writing(target):
        predictor.predict_file(images, target)


def find_items(image: Path, output: Path, num_channels: int) -> list[Item]:
    """Say which images to segment and where their labels go.

    Args:
        image: a file, or a folder whose image files are taken; with several channels, files that end in _0000,
            _0001, ... are one image, and others hold all channels.
        output: a folder, or a label file where `image` is one image.

    Raises:
        ConfigError: The image is not there, or the output does not fit it.
    """
    as_file = suffix_of(output) in SUFFIXES and not output.is_dir()
    if image.is_dir():
        if as_file:
            raise ConfigError(f"--output: {output} is a file, but --image {image} is a folder. Give a folder.")
        paths = image_files(image)
        if not paths:
            raise ConfigError(f"--image: {image} holds no image files ({', '.join('*' + s for s in SUFFIXES)}).")
        groups = group_channels(paths) if num_channels > 1 else [(path,) for path in paths]
    elif image.exists():
        siblings = [image]
        if num_channels > 1 and CHANNEL.search(stem_of(image)):
            siblings = [p for p in image_files(image.parent) if _base(p) == _base(image) and CHANNEL.search(stem_of(p))]
        groups = [tuple(siblings)]
    else:
        raise ConfigError(f"--image: {image}: no such file or folder.")
    names = unique_names([Path(group[0].name) for group in groups])
    targets = [output] if as_file else [output / f"{name}.nii.gz" for name in names]
    items = [Item(name=n, images=g, target=t) for n, g, t in zip(names, groups, targets, strict=True)]
    inputs = {path.resolve() for group in groups for path in group}
    if own := [item.target for item in items if item.target.resolve() in inputs]:
        raise ConfigError(f"--output: {own[0]} is an image to segment and would be overwritten. Give another folder.")
    return items


def _base(path: Path) -> str:
    return CHANNEL.sub("", stem_of(path))


def group_channels(paths: Sequence[Path]) -> list[tuple[Path, ...]]:
    """Put files that differ by nnU-Net's number of the channel alone together, in the channels' order."""
    groups: dict[str, list[Path]] = {}
    for path in sorted(paths):
        groups.setdefault(_base(path) if CHANNEL.search(stem_of(path)) else path.name, []).append(path)
    return [tuple(group) for group in groups.values()]


def _check_output(output: Path) -> None:
    """Make sure before any work that the output can be written.

    Raises:
        ConfigError: It cannot.
    """
    folder = output.parent if suffix_of(output) in SUFFIXES and not output.is_dir() else output
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"--output: {folder} cannot be made ({reason}). Give a folder you may write to.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"--output: {folder} is not writable. Give a folder you may write to.")


def _segment_shared(predictor: Predictor, item: Item, *, wait: bool) -> bool:
    """Segment one image unless that was done; False where another process is about it."""
    try:
        with Claim(item.target.parent / ".claims" / item.name, item.name, wait=wait):
            if not item.target.exists():
                segment(predictor, item.images, item.target)
    except Busy:
        return False
    return True


def predict_files(
    work_dir: Path,
    image: Path,
    output: Path,
    *,
    algo: str | None = None,
    fold: int | None = None,
    device: str = "auto",
    share: bool = False,
) -> int:
    """Segment an image or a folder of images; a bad one is reported and skipped.

    Args:
        work_dir: folder of a finished run.
        image: a file or a folder.
        output: folder for the label files, `<case>.nii.gz`; or one label file for one image.
        algo, fold: use the trained jobs of this algorithm and fold instead of the ensemble.
        device: auto, cpu or cuda.
        share: leave label files that are there, and images that another process with `share` has begun; so several
            processes do a folder together, and one that was killed goes on.

    Returns:
        Exit code: 0, or 2 where images were skipped.

    Raises:
        ConfigError: The image is missing, or the output cannot be written.
        WorkspaceError: There is no ensemble or no such job.
    """
    image, output = Path(image), Path(output)
    if not image.exists():
        raise ConfigError(f"--image: {image}: no such file or folder.")
    predictor = load_predictor(Workspace(Path(work_dir)), algo=algo, fold=fold, device=device)
    items = find_items(image, output, predictor.num_channels)
    _check_output(output)
    log.info("%d images, %d models on %s", len(items), len(predictor.models), predictor.device)
    failed, later = 0, list[Item]()
    for number, item in enumerate(items, 1):
        try:
            if not share:
                segment(predictor, item.images, item.target)
            elif not _segment_shared(predictor, item, wait=False):
                later.append(item)
                continue
        except AutosegError as error:
            failed += 1
            log.error("skipped: %s", " ".join(error.messages))
        else:
            log.info("%d/%d  %s -> %s", number, len(items), item.images[0].name, item.target)
    for item in later:  # others are about these; should one of them die, its image is ours
        try:
            _segment_shared(predictor, item, wait=True)
        except AutosegError as error:
            failed += 1
            log.error("skipped: %s", " ".join(error.messages))
    if failed:
        log.error("%d of %d images were skipped; the messages above say why", failed, len(items))
    return 2 if failed else 0
