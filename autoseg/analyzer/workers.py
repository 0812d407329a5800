"""Cases measured by several processes, as many as cores and free memory allow; a dead one costs its case alone."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

from autoseg.analyzer.case import CaseStats, analyze_case
from autoseg.data.formats.content import BYTES_READ
from autoseg.data.formats.label_files import SegmentValues
from autoseg.data.formats.stored import FileFaultError, Finding
from autoseg.data.formats.table import image_digest, read_header
from autoseg.hardware import system
from autoseg.hardware.limits import available_cores, available_memory_bytes, workers_for
from autoseg.workspace.claims import HEARTBEAT

logger = logging.getLogger(__name__)

BYTES_PER_TASK = 8 << 20
"""Small cases are handed out together, up to this size, since handing out costs as much as reading one."""
NEED_PER_VOXEL_BYTES = 2.5
"""Memory a case takes at most, in sizes of its image's voxels."""
IN_PROCESS_BYTES = 4 << 20
"""Less is measured here and now: starting processes takes longer."""
LARGEST_LOOKED_AT = 8
"""Files, the largest ones, whose headers are read to plan memory."""
LOOK_S = 1.0
"""Between two looks at how much the processes have read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A case to measure."""

    number: int
    images: tuple[Path, ...]
    label: Path | None
    ignore_label: int | None
    num_bytes: int
    segment_values: SegmentValues = ()
    """As `Case` has them."""
    known_digests: frozenset[tuple[str, ...]] = frozenset()
    """Where the files have these digests, nothing needs to be measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a worker found out."""

    number: int
    digests: tuple[str, ...]
    stats: CaseStats | None
    """None: known already by the digests."""


def voxel_bytes(path: Path) -> int:
    """Size of a file's voxels by its header; 0 where it cannot be read, which its turn will say."""
    try:
        return read_header(path).num_bytes
    except FileFaultError:
        return 0


def measure(
    tasks: Sequence[Task], num_workers: int | None, watch: Callable[[int], None] = lambda num_bytes: None
) -> Iterator[Result]:
    """Measure cases in any order.

    Args:
        tasks: the cases.
        num_workers: processes; None: one per core. Fewer where memory is short.
        watch: called again and again with the bytes of files that were read since the call before.
    """
    if not tasks:
        return
    free = available_memory_bytes()
    largest = sorted(tasks, key=lambda t: -t.num_bytes)[:LARGEST_LOOKED_AT]
    need = max(sum(voxel_bytes(p) for p in t.images) for t in largest) * NEED_PER_VOXEL_BYTES
    wanted = min(num_workers or available_cores(), len(tasks))
    workers = workers_for(need, most=wanted)
    if workers < wanted:
        logger.info("%d of %d processes, since memory is short", workers, wanted)
    if workers == 1 or sum(t.num_bytes for t in tasks) < IN_PROCESS_BYTES:
        before, BYTES_READ.add = BYTES_READ.add, watch
        try:
            for task in tasks:
                yield _measure_one(task, free)
        finally:
            BYTES_READ.add = before
        return
    parts = _parts(tasks, workers)
    done: set[int] = set()
    try:
        for result in _in_processes(parts, workers, free // workers, watch):
            done.add(result.number)
            yield result
    except BrokenProcessPool:
        logger.warning("A process died while reading; the remaining cases are read one by one.")
        yield from _one_by_one([t for t in tasks if t.number not in done], free)


def _parts(tasks: Sequence[Task], workers: int) -> list[list[Task]]:
    """Groups of about equal size, the largest cases first so that none is left to the end."""
    total = sum(t.num_bytes for t in tasks)
    most = min(BYTES_PER_TASK, total // (4 * workers) + 1)
    parts: list[list[Task]] = []
    room = 0
    for task in sorted(tasks, key=lambda t: -t.num_bytes):
        if task.num_bytes > room or not parts:
            parts.append([])
            room = most
        parts[-1].append(task)
        room -= task.num_bytes
    return parts


def _in_processes(
    parts: Sequence[Sequence[Task]],
    workers: int,
    free_bytes: int,
    watch: Callable[[int], None] = lambda num_bytes: None,
) -> Iterator[Result]:
    # A fork starts in milliseconds, but is sound only while no other thread can hold a lock; heartbeats hold none.
    others = [t for t in threading.enumerate() if t is not threading.current_thread()]
    forks = system.can_fork() and all(t.name.startswith(HEARTBEAT) for t in others)
    context = multiprocessing.get_context("fork" if forks else "spawn")
    read = context.Value(ctypes.c_ulonglong)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(os.getpid(), read))
    try:
        waiting: set[Future[list[Result]]] = {pool.submit(_measure_part, part, free_bytes) for part in parts}
        told = 0
        while waiting:
            ended, waiting = wait(waiting, LOOK_S, FIRST_COMPLETED)
            num_bytes = read.value
            watch(num_bytes - told)
            told = num_bytes
            for future in ended:
                yield from future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _one_by_one(tasks: Sequence[Task], free_bytes: int) -> Iterator[Result]:
    """Each case in a process of its own: the one that kills it is named."""
    for task in tasks:
        try:
            yield from _in_processes([[task]], 1, free_bytes)
        except BrokenProcessPool:
            crash = Finding(
                "unreadable",
                "the process that read it was killed, as happens when memory runs out",
                "Analyse it on a machine with more memory, or leave it out.",
            )
            yield Result(number=task.number, digests=(), stats=CaseStats(findings=(crash,)))


def _start_worker(parent: int, read: Synchronized[int]) -> None:
    """Leave Ctrl-C to the parent, and end with it; tell it what is read."""

    def add(num_bytes: int) -> None:
        with read.get_lock():
            read.value += num_bytes

    BYTES_READ.add = add
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    system.end_with_parent(parent)


def _measure_part(tasks: Sequence[Task], free_bytes: int) -> list[Result]:
    return [_measure_one(task, free_bytes) for task in tasks]


def _measure_one(task: Task, free_bytes: int) -> Result:
    if task.known_digests:
        files = [*task.images, *([task.label] if task.label is not None else [])]
        digests = tuple(image_digest(p) for p in files)
        if digests in task.known_digests:
            return Result(number=task.number, digests=digests, stats=None)
    try:
        stats = analyze_case(task.images, task.label, task.ignore_label, free_bytes, task.segment_values)
    except MemoryError:
        remedy = "Analyse it on a machine with more memory, or leave it out."
        finding = Finding("too_large", "memory ran out while it was read", remedy)
        stats = CaseStats(findings=(finding,))
    return Result(number=task.number, digests=stats.digests, stats=stats)
