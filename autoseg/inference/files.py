"""Label files for image files: one, a folder or a list of them."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from autoseg.data.datalists.names import loose_key, slashes, unique_names
from autoseg.data.formats.table import (
    LABEL_SUFFIX,
    LABEL_SUFFIXES,
    PATTERNS_TEXT,
    SUFFIXES,
    image_files,
    pictures_instead,
    read_grid,
    stem_of,
    suffix_of,
    tell_left_out,
)
from autoseg.data.grid import ras_orientation
from autoseg.data.streams import is_streamed
from autoseg.errors import AutosegError, ConfigError, DataError, ResourceError
from autoseg.evaluation.tables import format_rows
from autoseg.hardware.memory import PeakMemory
from autoseg.inference.clock import PHASES, Clock
from autoseg.inference.cost import Choice, Cost, Estimate, Facts, Limits, choose_options, facts_for
from autoseg.inference.predictor import Predictor
from autoseg.plan import Plan
from autoseg.version import __version__
from autoseg.workspace.claims import Busy, Claim
from autoseg.workspace.files import open_regular

log = logging.getLogger(__name__)


LIST_SUFFIX = ".txt"
"""Of a file that names images."""

CHANNEL = re.compile(r"_(\d{4})$")
"""nnU-Net's number of a channel at the end of a file's stem."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One image to segment."""

    name: str
    images: tuple[Path, ...]
    target: Path
    """Label file to write."""


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
    channels = sum(read_grid(path)[1] for path in images)
    if channels != predictor.num_channels:
        names = " and ".join(path.name for path in images) if len(images) < 3 else f"the {len(images)} files"
        raise DataError(
            f"{images[0]}: {names} with {channels} channel{'s' * (channels != 1)}. "
            f"Expected {predictor.num_channels}, as the "
            "models were trained; several files of one case end in _0000, _0001, ... in the order of training."
        )
    with writing(target):
        predictor.predict_file(images, target)


def find_items(image: Path, output: Path, num_channels: int) -> list[Item]:
    """Say which images to segment and where their labels go.

    Args:
        image: an image, a folder whose images are taken, or a .txt file that names an image a line, relative to
            its own folder; with several channels, files that end in _0000, _0001, ... are one image, and others hold
            all channels. A named image that is not there is noticed when its turn comes.
        output: a folder, or a label file where `image` is one image.
        num_channels: of an image, as the models were trained.

    Raises:
        ConfigError: The output does not fit the image.
    """
    if suffix_of(output) in SUFFIXES and not names_a_file(output) and not output.is_dir():
        expected = " or ".join(LABEL_SUFFIXES)
        raise ConfigError(f"--output: {output}: labels are not written as {suffix_of(output)}. Expected {expected}.")
    groups = _images_of(image, output, num_channels)
    names = unique_names([Path(group[0].name) for group in groups])
    if not names_a_file(output):
        _tell_changed(groups, names)
    targets = [output] if names_a_file(output) else [output / f"{name}{LABEL_SUFFIX}" for name in names]
    items = [Item(name=n, images=g, target=t) for n, g, t in zip(names, groups, targets, strict=True)]
    inputs = {path.resolve() for group in groups for path in group}
    if own := [item.target for item in items if item.target.resolve() in inputs]:
        raise ConfigError(f"--output: {own[0]} is an image to segment and would be overwritten. Give another folder.")
    return items


def _tell_changed(groups: Sequence[tuple[Path, ...]], names: Sequence[str]) -> None:
    """Warn of label files that are not called as their images, since another image has the name already."""
    for group, name in zip(groups, names, strict=True):
        if loose_key(name) != loose_key(stem_of(group[0])):
            log.warning(
                "%s: another image has this name but for its folder, suffix or case, so its label is called %s%s; "
                "`autoseg evaluate` will not find it by the image's name. Give images names of their own.",
                *(group[0], name, LABEL_SUFFIX),
            )


def _images_of(image: Path, output: Path, num_channels: int) -> list[tuple[Path, ...]]:
    """The files of each image that a path stands for: a folder, a list, or one image."""
    if image.is_dir() and image_files(image) == [image]:  # a DICOM series
        return [(image,)]
    if not image.is_dir() and image.suffix != LIST_SUFFIX:
        return [_files_of_image(image, num_channels)]
    if names_a_file(output):
        what = "a folder" if image.is_dir() else "a list"
        raise ConfigError(f"--output: {output} is a file, but --image {image} is {what}. Give a folder.")
    paths = _in_folder(image) if image.is_dir() else _in_list(image)
    return group_channels(paths) if num_channels > 1 else [(path,) for path in paths]


def _in_folder(folder: Path) -> list[Path]:
    paths = image_files(folder)
    if not paths:
        raise ConfigError(f"--image: {folder} holds no image files ({PATTERNS_TEXT}).{pictures_instead(folder)}")
    tell_left_out(folder, paths)
    return paths


def _in_list(path: Path) -> list[Path]:
    try:
        with open_regular(path) as file:
            text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--image: {path}: byte {error.start} is not UTF-8. Expected the path of an image on each line; save it as "
            "plain text in UTF-8."
        ) from None
    except OSError as error:
        raise ConfigError(f"--image: {path}: cannot be read ({error.strerror}). Give a file.") from None
    if "\0" in text:
        raise ConfigError(f"--image: {path}: holds a NUL character, so it is no text. Expected a path on each line.")
    lines = [line.strip() for line in text.splitlines()]
    named = [line for line in lines if line and not line.startswith("#")]
    if lost := next((line for line in named if slashes(line) and not (path.parent / line).exists()), ""):
        raise ConfigError(f"--image: {path} names {lost}, which is not there.{slashes(lost)}")
    paths = [path.parent / line for line in named]
    if not paths:
        raise ConfigError(f"--image: {path} names no image. Expected the path of one on each line.")
    return paths


def _files_of_image(path: Path, num_channels: int) -> tuple[Path, ...]:
    """An image's file, with those of its other channels where it is one of several."""
    if num_channels == 1 or not CHANNEL.search(stem_of(path)):
        return (path,)
    beside = [p for p in image_files(path.parent) if _base(p) == _base(path)]
    return tuple(p for p in beside if CHANNEL.search(stem_of(p)))


def names_a_file(output: Path) -> bool:
    """Whether an output is meant to be a file, whether or not it is there."""
    return suffix_of(output) in LABEL_SUFFIXES and not output.is_dir()


def _base(path: Path) -> str:
    return CHANNEL.sub("", stem_of(path))


def group_channels(paths: Sequence[Path]) -> list[tuple[Path, ...]]:
    """Put files that differ by nnU-Net's number of the channel alone together, in the channels' order."""
    groups: dict[str, list[Path]] = {}
    for path in sorted(paths):
        groups.setdefault(_base(path) if CHANNEL.search(stem_of(path)) else path.name, []).append(path)
    return [tuple(group) for group in groups.values()]


def check_output(output: Path) -> None:
    """Make sure before any work that the output can be written.

    Raises:
        ConfigError: It cannot.
    """
    folder = output.parent if names_a_file(output) else output
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"--output: {folder} cannot be made ({reason}). Give a folder you may write to.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"--output: {folder} is not writable. Give a folder you may write to.")


@dataclass(kw_only=True)
class _Case:
    """One image that was segmented, with what it took."""

    item: Item
    clock: Clock
    choice: Choice | None = None
    seconds: float = 0.0
    ram_bytes: int = 0
    device_bytes: int = 0


@dataclass(kw_only=True)
class Server:
    """Models that are loaded once, and the images that they have segmented."""

    predictor: Predictor
    limits: Limits
    share: bool
    watched: bool
    """Whether time and memory are asked for."""
    cost: Cost
    done: list[_Case] = field(default_factory=list)

    def segment_all(self, items: Sequence[Item]) -> int:
        """Segment images; a bad one is reported and skipped. Returns how many were skipped."""
        num_failed, later = 0, list[Item]()
        for number, item in enumerate(items, 1):
            try:
                if not self.segment(item):
                    later.append(item)
                    continue
            except AutosegError as error:
                num_failed += 1
                log.error("skipped: %s", " ".join(error.messages))
            else:
                log.info("%d/%d  %s -> %s", number, len(items), item.images[0].name, item.target)
        for item in later:  # other processes are working on these; should one die, its image is ours
            try:
                self.segment(item, wait=True)
            except AutosegError as error:
                num_failed += 1
                log.error("skipped: %s", " ".join(error.messages))
        return num_failed

    def segment(self, item: Item, *, wait: bool = False) -> bool:
        """Segment one image; where `share` is set, leave what is done.

        Returns:
            False where another process is working on it, and `wait` is not set.
        """
        if not self.share:
            self._segment(item)
            return True
        try:
            with Claim(item.target.parent / ".claims" / item.name, item.name, wait=wait):
                if not item.target.exists():
                    self._segment(item)
        except Busy:
            return False
        return True

    def _segment(self, item: Item) -> None:
        predictor = self.predictor
        case = _Case(item=item, clock=Clock())
        predictor.clock = case.clock
        options = predictor.options
        begin = time.perf_counter()
        on_gpu = predictor.device.type == "cuda"
        try:
            if self.limits.are_set:
                facts = facts_of(item.images, predictor.models[0].plan)
                base = psutil.Process().memory_info().rss
                case.choice = choose_options(self.cost, facts, options, self.limits, base)
                predictor.options = case.choice.options
                cost_words = f"; given up: {', '.join(case.choice.given_up)}" if case.choice.given_up else ""
                log.info("%s: expected %s%s", item.name, case.choice.estimate.words(predictor.device), cost_words)
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(predictor.device)
            if self.watched:
                with PeakMemory() as peak:
                    segment(predictor, item.images, item.target)
                case.ram_bytes = peak.most
            else:
                segment(predictor, item.images, item.target)
            if case.choice is not None:
                self.cost.learn(facts, case.clock.total_s - case.clock.seconds["infer"])
        finally:
            predictor.options = options
        case.seconds = time.perf_counter() - begin
        if on_gpu:
            case.device_bytes = torch.cuda.max_memory_allocated(predictor.device)
        if case.choice is not None:
            used = Estimate(seconds=case.seconds, device_bytes=case.device_bytes, ram_bytes=case.ram_bytes)
            log.info("%s: it took %s", item.name, used.words(predictor.device))
        self.done.append(case)

    def timing(self, load_models_s: float, total_s: float, failed: int) -> dict[str, Any]:
        """What was measured, as plain data."""
        cases = []
        for case in self.done:
            phases = {str(phase): round(case.clock.seconds[phase], 4) for phase in PHASES}
            row: dict[str, Any] = {"case": case.item.name, "total": round(case.seconds, 4)}
            row.update(phases)
            row["ram_gb"] = round(case.ram_bytes / 1e9, 3)
            if case.device_bytes:
                row["device_gb"] = round(case.device_bytes / 1e9, 3)
            if case.choice is not None:
                expected = case.choice.estimate
                row["expected"] = {
                    "seconds": round(expected.seconds, 3),
                    "ram_gb": round(expected.ram_bytes / 1e9, 3),
                    "device_gb": round(expected.device_bytes / 1e9, 3),
                    "given_up": list(case.choice.given_up),
                }
            cases.append(row)
        sums = {phase: round(sum(row[phase] for row in cases), 4) for phase in (*PHASES, "total")}
        return {
            "version": __version__,
            "device": str(self.predictor.device),
            "models": [model.name for model in self.predictor.models],
            "load_models": round(load_models_s, 4),
            "cases": cases,
            "sum": sums,
            "total": round(total_s, 4),
            "failed": failed,
        }


def facts_of(images: Sequence[Path], plan: Plan) -> Facts:
    """What the headers of an image's files say, for models of a plan.

    Raises:
        DataError: A file cannot be read.
    """
    grids = [read_grid(path) for path in images]
    grid = grids[0][0]
    ras, channels = grid.to_ras(), sum(count for _, count in grids)
    longest = ras.shape.index(max(ras.shape))
    axis = int(ras_orientation(grid.affine)[2, 0]) if is_streamed(images) else longest
    return facts_for(plan, grid, channels, axis)


def format_timing(timing: Mapping[str, Any]) -> str:
    """A table of the seconds of each phase, a row per image and one in total."""
    columns = (*PHASES, "total")
    rows = [[row["case"], *(f"{row[c]:.3f}" for c in columns), f"{row['ram_gb']:.2f}"] for row in timing["cases"]]
    rows.append(["all", *(f"{timing['sum'][c]:.3f}" for c in columns), ""])
    table = format_rows(["seconds", *columns, "GB"], rows)
    return f"{table}\nmodels loaded in {timing['load_models']:.3f} s; {timing['total']:.3f} s in all"
