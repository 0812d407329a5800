"""This machine: one job per free device, several where asked for and memory allows, CPU threads shared out."""

from __future__ import annotations

import logging
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from autoseg.config.settings import Settings
from autoseg.errors import ResourceError, counted
from autoseg.hardware.gpus import FRESH_S, ORDER, VISIBLE, Gpu, list_gpus
from autoseg.hardware.limits import DEVICE_NAME, JOBS_AT_ONCE, available_cores, available_memory_bytes
from autoseg.launch import Ended, Task, start, stop

log = logging.getLogger(__name__)

POLL_S = 0.05
SPARE = 1.25
"""Free memory a further job on a device needs, as a multiple of the most that one took."""
SAY_EVERY_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Room for one job: a device, or a share of one."""

    name: str
    """For `autoseg status`."""
    device: str
    """What it is a share of: `cpu`, or GPU numbers such as `0` or `0,1`."""
    uuids: tuple[str, ...] = ()
    """Of its GPUs, to see whether they are still there; their numbers where they have none."""
    environment: Mapping[str, str] = field(default_factory=dict)


def find_places(settings: Settings, gpus: Sequence[Gpu] | None = None) -> list[Place]:
    """Where jobs may run on this machine.

    Args:
        gpus: Those to use; None: as `list_gpus` finds them.

    Raises:
        ResourceError: More GPUs are wanted for a job than there are, or than one process can see.
    """
    usable = list_gpus() if gpus is None and settings.device != "cpu" else gpus or []
    cores = available_cores()
    many = settings.jobs_per_device
    if not usable:
        if settings.gpus_per_job > 1:
            raise ResourceError(f"gpus_per_job: {settings.gpus_per_job} was set, but this machine has no GPU.")
        threads = settings.cpus_per_job or max(1, cores // many)
        return [
            Place(
                name=f"cpu:{i}" if many > 1 else "cpu",
                device="cpu",
                environment={"OMP_NUM_THREADS": str(threads)},
            )
            for i in range(many)
        ]
    size = settings.gpus_per_job
    if size > 1 and any(gpu.visible.startswith("MIG") or " MIG " in gpu.name for gpu in usable):
        raise ResourceError(
            f"gpus_per_job: {size} was set, but GPUs of this machine are divided (MIG), and CUDA shows a process one "
            "part alone. Set gpus_per_job: 1, or name whole GPUs in CUDA_VISIBLE_DEVICES."
        )
    groups = [usable[i : i + size] for i in range(0, len(usable) - size + 1, size)]
    if not groups:
        raise ResourceError(f"gpus_per_job: {size} was set, but this machine has {len(usable)}.")
    threads = settings.cpus_per_job or max(1, cores // (len(groups) * many))
    places = []
    for _ in range(many):  # a first job for every device before the second for any
        for group in groups:
            numbers = ",".join(gpu.number for gpu in group)
            visible = ",".join(gpu.visible for gpu in group)
            environment = {VISIBLE: visible, **ORDER, "OMP_NUM_THREADS": str(threads)}
            uuids = tuple(gpu.visible for gpu in group)
            places.append(Place(name=f"cuda:{numbers}", device=numbers, uuids=uuids, environment=environment))
    return places


@dataclass(slots=True)
class _Running:
    task: Task
    place: Place
    process: subprocess.Popen[bytes]


def run_local(
    tasks: Sequence[Task],
    places: Sequence[Place],
    ended: Ended,
    output: Path,
    *,
    memory_gib: Callable[[Task], float | None] = lambda task: None,
    gpus_now: Callable[[], list[Gpu]] = list_gpus,
) -> None:
    """Run tasks, as many at once as there are places; arguments and errors as `launch` has them."""
    waiting, running = deque(tasks), list[_Running]()
    free = list(places)
    said = time.monotonic()
    with _stoppable(), ThreadPoolExecutor(1, "autoseg-gpus") as pool:
        asked = _Asked(pool, gpus_now)
        try:
            while waiting or running:
                for place in list(free):
                    if not waiting or not _has_room(place, waiting[0], running, memory_gib, asked):
                        continue
                    free.remove(place)
                    task = waiting.popleft()
                    log.info("%s: starting on %s", task.name, place.name)
                    environment = {
                        **place.environment,
                        DEVICE_NAME: place.name,
                        JOBS_AT_ONCE: str(len(places)),  # they share memory and cores
                    }
                    process = start(task.command(), output / f"{task.name}.out", environment)
                    asked.forget()  # it takes memory from now on
                    running.append(_Running(task, place, process))
                time.sleep(POLL_S)
                for item in [r for r in running if r.process.poll() is not None]:
                    running.remove(item)
                    gone = item.process.returncode != 0 and _is_gone(item.place, gpus_now)
                    if gone:
                        # Not the job's fault: it goes on elsewhere, and this does not count as a try.
                        log.error("%s is gone; %s goes on elsewhere", item.place.name, item.task.name)
                        free = [p for p in free if p.device != item.place.device]
                        waiting.appendleft(item.task)
                    elif ended(item.task, item.process.returncode):
                        waiting.append(item.task)
                    if not gone:
                        free.append(item.place)
                if waiting and not running and not free:
                    raise ResourceError(
                        f"no device is left: {', '.join(dict.fromkeys(p.name for p in places))} went away, "
                        f"{counted(len(waiting), 'job is', 'jobs are')} still to do. Repair the driver "
                        "(`nvidia-smi` must list the GPU) and run again; nothing that was saved is lost."
                    )
                if time.monotonic() - said > SAY_EVERY_S:
                    said = time.monotonic()
                    names = ", ".join(f"{r.task.name} on {r.place.name}" for r in running)
                    log.info("running: %s; %d waiting", names, len(waiting))
        except BaseException:
            stop([item.process for item in running])
            raise


class _Asked:
    """The GPUs as another thread asks for them: an answer takes seconds, in which jobs end and others could begin."""

    def __init__(self, pool: ThreadPoolExecutor, gpus_now: Callable[[], list[Gpu]]) -> None:
        self._pool, self._gpus_now = pool, gpus_now
        self._answer: Future[list[Gpu]] | None = None
        self._asked_at = 0.0

    def forget(self) -> None:
        """What was asked for before now does not count."""
        self._answer = None

    def take(self) -> list[Gpu]:
        """The GPUs as they are; none while that is asked for."""
        if self._answer is None or (self._answer.done() and time.monotonic() - self._asked_at > FRESH_S):
            self._answer, self._asked_at = self._pool.submit(self._gpus_now), time.monotonic()
        return self._answer.result() if self._answer.done() else []


def _has_room(
    place: Place,
    task: Task,
    running: Sequence[_Running],
    memory_gib: Callable[[Task], float | None],
    asked: _Asked,
) -> bool:
    """Whether memory allows a task beside those that run on the device already; the first always has room.

    On a GPU not yet, while that is asked for.
    """
    beside = [memory_gib(r.task) for r in running if r.place.device == place.device]
    if not beside:
        return True
    known = [m for m in [*beside, memory_gib(task)] if m is not None]
    if place.device == "cpu":
        return not known or available_memory_bytes() / 2**30 > SPARE * max(known)
    if None in beside:  # wait until it is known what the others take
        return False
    frees = [gpu.free_gib for gpu in asked.take() if gpu.visible in place.uuids]
    return bool(frees) and min(frees) > SPARE * max(known)


def _is_gone(place: Place, gpus_now: Callable[[], list[Gpu]]) -> bool:
    """Whether a GPU of the place can no longer be talked to."""
    return bool(place.uuids) and not set(place.uuids) <= {gpu.visible for gpu in gpus_now()}


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGTERM end the launcher as Ctrl-C does, so that its jobs save."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
