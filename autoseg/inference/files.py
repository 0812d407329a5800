"""Label files for images: each image segmented, written, timed and reported."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from autoseg.data.formats.format import LabelFile, LabelWriter
from autoseg.data.formats.table import (
    read_grid,
    read_header,
    write_label,
)
from autoseg.data.grid import ras_orientation
from autoseg.data.labels import LabelMap
from autoseg.data.segments import Segment, segments_of
from autoseg.data.streams import ImageRows, is_streamed
from autoseg.errors import AutosegError, DataError, ResourceError, counted
from autoseg.evaluation.tables import format_rows
from autoseg.hardware.memory import PeakMemory
from autoseg.inference.clock import PHASES, Clock
from autoseg.inference.cost import Choice, Cost, Estimate, Facts, Limits, choose_options, facts_for
from autoseg.inference.items import Item
from autoseg.inference.maps import MapFiles
from autoseg.inference.predictor import Predictor
from autoseg.inference.shortage import within_memory
from autoseg.plan import Plan
from autoseg.terminal import Progress
from autoseg.version import __version__
from autoseg.workspace.claims import Busy, Claim

log = logging.getLogger(__name__)


Look = Callable[[Item, tuple[Segment, ...], ImageRows, np.ndarray], None]
"""(item, classes, image, label values (X, Y, Z) in RAS): what looks at an image that was segmented."""


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


def segment(
    predictor: Predictor,
    images: Sequence[Path],
    target: Path,
    *,
    write: Callable[[Path, LabelFile], None] = write_label,
    look: Callable[[ImageRows, np.ndarray], None] | None = None,
    maps: Callable[[ImageRows], MapFiles] | None = None,
) -> None:
    """Segment one image and write its label file on the image's own grid.

    Args:
        predictor: the models.
        images: the image's files.
        target: the label file.
        write, look, maps: as `Predictor.predict_file` takes them.

    Raises:
        DataError: The image cannot be read, or does not have the model's channels.
        ResourceError: The label file cannot be written, or memory does not suffice.
    """
    headers = [read_header(path) for path in images]
    for path, header in zip(images, headers, strict=True):
        for found in header.warnings:
            log.warning("%s: %s. %s", path, found.finding, found.remedy)
    channels = sum(header.num_channels for header in headers)
    if channels != predictor.num_channels:
        names = " and ".join(path.name for path in images) if len(images) < 3 else f"the {len(images)} files"
        words = " and ".join(f"_{name}" for name in predictor.channel_names)
        endings = words or "_0000, _0001, ... in the order of training"
        raise DataError(
            f"{images[0]}: {names} with {counted(channels, 'channel')}. "
            f"Expected {predictor.num_channels}, as the "
            f"models were trained; several files of one case end in {endings}."
        )
    with writing(target):
        predictor.predict_file(images, target, write=write, look=look, maps=maps)


@contextmanager
def labels_for(predictor: Predictor, writer: LabelWriter) -> Iterator[tuple[Segment, ...]]:
    """Have a predictor's labels say all that a format can hold: overlaps, too, where it can.

    Yields:
        The classes of these labels.
    """
    plain = predictor.label_map
    if writer.keeps_overlaps:
        predictor.label_map = plain.with_overlaps()
    try:
        yield segments_of(predictor.label_map.named, predictor.codes, predictor.colours)
    finally:
        predictor.label_map = plain


def segment_twice(
    predictor: Predictor,
    images: Sequence[Path],
    target: Path,
    other: Path,
    writer: LabelWriter,
    *,
    look: Callable[[ImageRows, np.ndarray], None] | None = None,
) -> None:
    """Segment one image and write its label as NIfTI, and in another format.

    Args:
        target: the NIfTI file.
        other: the other file.
        writer: of the other file. What it cannot write is a warning.
        look: as `Predictor.predict_file` takes it.

    Raises:
        DataError, ResourceError: As `segment`.
    """
    plain = predictor.label_map
    with labels_for(predictor, writer) as segments:
        full = predictor.label_map

        def write(path: Path, label: LabelFile) -> None:
            try:
                writer.write(other, replace(label, segments=segments, images=tuple(images)))
            except DataError as error:
                log.warning("%s The label is there as NIfTI alone.", error)
            write_label(path, _as_label_map(label, full, plain))

        segment(predictor, images, target, write=write, look=look)


def _as_label_map(label: LabelFile, full: LabelMap, plain: LabelMap) -> LabelFile:
    """A label with the values of `plain`, which has one for a voxel of several regions, in place of those of `full`."""
    if full is plain:
        return label
    values = np.arange(np.iinfo(label.array.dtype).max + 1).reshape(-1, 1, 1)
    table = plain.named.decode(full.named.encode(values % (1 << len(full.named.names)))).ravel()
    return replace(label, array=table[label.array])


@dataclass(kw_only=True)
class _Case:
    """One image that was segmented, with what it took."""

    item: Item
    clock: Clock
    choice: Choice | None = None
    seconds: float = 0.0
    ram_bytes: int = 0
    device_bytes: int = 0


def _unwatched(share: float) -> None:
    """Nobody looks."""


def _show(bar: Progress, number: int, total: int, share: float) -> None:
    """Show how far all images are, when a share of one is done."""
    bar.to((number - 1 + share) / total, f"image {number} of {total}")


@dataclass(kw_only=True)
class Server:
    """Models that are loaded once, and the images that they have segmented."""

    predictor: Predictor
    looks: Sequence[Look] = ()
    """Are shown each image and its labels before these are written."""
    probabilities: bool = False
    """Whether each class' probability is written as a map."""
    uncertainty: bool = False
    """Whether a map of entropy is written."""
    limits: Limits
    share: bool
    watched: bool
    """Whether time and memory are asked for."""
    cost: Cost
    done: list[_Case] = field(default_factory=list)
    watch: Callable[[float], None] = field(default=_unwatched)
    """Called with the share of the image at hand that is done."""

    def segment_all(self, items: Sequence[Item]) -> int:
        """Segment images; a bad one is reported and skipped. Returns how many were skipped."""
        num_failed, later = 0, list[Item]()
        bar = Progress("predict", 1.0, unit="")
        try:
            for number, item in enumerate(items, 1):
                self.watch = partial(_show, bar, number, len(items))
                try:
                    if not self.segment(item):
                        later.append(item)
                        continue
                except AutosegError as error:
                    num_failed += 1
                    log.error("skipped: %s", " ".join(error.messages))
                else:
                    last = self.done[-1].item if self.done else item
                    target = last.target if last.name == item.name else item.target
                    log.info("%d/%d  %s -> %s", number, len(items), item.images[0].name, target)
        finally:
            bar.close()
        self.watch = _unwatched
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
                if not any(path is not None and path.exists() for path in (item.target, item.fallback)):
                    self._segment(item)
        except Busy:
            return False
        return True

    def _segment(self, item: Item) -> None:
        predictor = self.predictor
        if item.writer.check is not None:
            item.writer.check(item.images)
        case = _Case(item=item, clock=Clock())
        predictor.clock, case.clock.watch = case.clock, self.watch
        plain = predictor.label_map
        with labels_for(predictor, item.writer) as segments:
            self._segment_as(case, segments, plain)
        self.done.append(case)

    def _segment_as(self, case: _Case, segments: tuple[Segment, ...], plain: LabelMap) -> None:
        """Segment an image, and measure what that takes.

        Args:
            segments: the classes of its labels.
            plain: the classes of a label map.
        """
        item, predictor = case.item, self.predictor
        options = predictor.options

        def write(path: Path, label: LabelFile) -> None:
            try:
                item.writer.write(path, replace(label, segments=segments, images=item.images))
            except DataError as error:
                if item.fallback is None:
                    raise
                log.warning("%s The label is written as NIfTI.", error)
                write_label(item.fallback, _as_label_map(label, predictor.label_map, plain))
                case.item = replace(item, target=item.fallback)

        def look(image: ImageRows, labels: np.ndarray) -> None:
            for each in self.looks:
                each(item, segments, image, labels)

        def map_files(image: ImageRows) -> MapFiles:
            return MapFiles(
                item.target,
                image.grid,
                predictor.label_map,
                item.writer,
                probabilities=self.probabilities,
                uncertainty=self.uncertainty,
            )

        maps = map_files if self.probabilities or self.uncertainty else None
        begin = time.perf_counter()
        on_gpu = predictor.device.type == "cuda"
        try:
            if self.limits.are_set:
                facts = within_memory([predictor], item.images[0], lambda: self._choose_options(case))
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(predictor.device)
            if self.watched:
                with PeakMemory() as peak:
                    segment(predictor, item.images, item.target, write=write, look=look, maps=maps)
                case.ram_bytes = peak.most
            else:
                segment(predictor, item.images, item.target, write=write, look=look, maps=maps)
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

    def _choose_options(self, case: _Case) -> Facts:
        """Give up what keeps an image within the limits; what its cost was reckoned from."""
        item, predictor = case.item, self.predictor
        facts = facts_of(item.images, predictor.models[0].plan)
        base = psutil.Process().memory_info().rss
        case.choice = choose_options(self.cost, facts, predictor.options, self.limits, base)
        predictor.options = case.choice.options
        cost_words = f"; given up: {', '.join(case.choice.given_up)}" if case.choice.given_up else ""
        log.info("%s: expected %s%s", item.name, case.choice.estimate.words(predictor.device), cost_words)
        return facts

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
