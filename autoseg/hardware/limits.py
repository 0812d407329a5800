"""What this process may use of the machine, the limits of containers and batch systems included, and what it uses."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from autoseg.hardware.system import cores_allowed, num_cores_allowed

CONTROL_GROUPS = Path("/sys/fs/cgroup")

MEMBERSHIP = Path("/proc/self/cgroup")

MEMORY_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Limit and use of a control group, version 2 and version 1."""

RECLAIMABLE = ("total_inactive_file", "inactive_file")
"""Of memory.stat: file pages that are dropped when memory is wanted; version 1 counts those of groups within apart."""


DEVICE_NAME = "AUTOSEG_DEVICE_NAME"
"""Environment variable in which a launcher says what `autoseg status` is to call the device."""
JOBS_AT_ONCE = "AUTOSEG_JOBS_AT_ONCE"
"""Environment variable in which a launcher says how many jobs it runs on this machine at once."""

TAKEN_SHARE = 0.3
"""Share of a core that others may use before a thread less is better. A choice. Threads of one step wait for the
slowest: on two of them a step took 0.33 s, and 1.7 s beside one busy process (docs/results.md), where one thread, which
waits for none, needs about twice the 0.33 s."""


def available_cores() -> int:
    """Cores this process may use: affinity and a container's quota count, not what the machine has."""
    cores = num_cores_allowed()
    for group in _groups("cpu"):
        quota, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
        if both := _text(group / "cpu.max").split():
            quota, period = both
        if quota.isdigit() and period.isdigit() and int(period):
            cores = min(cores, max(1, -(-int(quota) // int(period))))
    return cores


def jobs_at_once() -> int:
    """Processes that share this machine with this one: jobs at once, as the launcher says, times those of each."""
    return int(os.environ.get(JOBS_AT_ONCE, "1")) * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def own_threads() -> int:
    """Threads that this process computes with: what OMP_NUM_THREADS says, else its share of the cores."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(wanted) if wanted.isdigit() and int(wanted) else max(1, available_cores() // jobs_at_once())


@dataclass(frozen=True, slots=True)
class CoreUse:
    """Seconds of the cores that this process may use, counted from some time in the past."""

    wall_s: float
    idle_s: float
    """Nothing ran, summed over the cores."""
    own_s: float
    """This process ran, summed over its threads."""

    @classmethod
    def now(cls) -> CoreUse:
        """As it is at this moment."""
        cores = psutil.cpu_times(percpu=True)
        allowed = cores_allowed()
        # Waiting for a disk is a part of Linux' idle time that it counts apart.
        idle_s = sum(cores[i].idle + getattr(cores[i], "iowait", 0.0) for i in allowed if i < len(cores))
        return cls(time.monotonic(), idle_s, time.process_time())


def threads_left(before: CoreUse, after: CoreUse, most: int) -> int:
    """Threads to compute with so that each has a core to itself, 1 to `most`.

    Args:
        before, after: the use of the cores at two times.
        most: threads where nothing else runs.
    """
    free = (after.idle_s - before.idle_s + after.own_s - before.own_s) / max(after.wall_s - before.wall_s, 1e-6)
    return max(1, min(most, math.floor(free + TAKEN_SHARE)))


def workers_for(bytes_each: float, *, most: int | None = None) -> int:
    """Workers that read or prepare cases at once: one a core, fewer where memory is short, at least one.

    Args:
        bytes_each: memory that one of them takes at most.
        most: workers that are wanted; None: this process' share of the cores.
    """
    share = max(1, available_cores() // jobs_at_once()) if most is None else most
    fitting = int(available_memory_bytes() / jobs_at_once() / max(bytes_each, 1.0))
    return max(1, min(share, fitting))


def memory_limit_bytes() -> int:
    """Memory of the machine or of the container, whichever is smaller."""
    limits = (int(limit) for limit, _, _ in _memory_groups())
    return min(int(psutil.virtual_memory().total), *limits, 1 << 62)


def available_memory_bytes() -> int:
    """Memory a process may still take: what the machine has free, or what its container leaves, whichever is less.

    Files that were read lie in a container's memory, too, but make room when it is wanted, so they count as free.
    """
    left = (limit - max(0, used - reclaimable) for limit, used, reclaimable in _memory_groups())
    return max(0, min(int(psutil.virtual_memory().available), *left, 1 << 62))


def _memory_groups() -> Iterator[tuple[int, int, int]]:
    """Limit, use, and how much of that use can be had back, of each control group that has a limit."""
    for group in _groups("memory"):
        for limit_name, used_name in MEMORY_FILES:
            limit, used = _text(group / limit_name), _text(group / used_name)
            if limit.isdigit() and used.isdigit():
                lines = (line.split() for line in _text(group / "memory.stat").splitlines())
                stat = {line[0]: int(line[1]) for line in lines if len(line) == 2 and line[1].isdigit()}
                yield int(limit), int(used), next((stat[name] for name in RECLAIMABLE if name in stat), 0)


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the control groups this process is in and of those around them; its own first.

    Args:
        controller: cpu or memory; version 1 has a tree for each, version 2 one for all.
    """
    for line in _text(MEMBERSHIP).splitlines() or ["0::/"]:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CONTROL_GROUPS / controllers if controllers else CONTROL_GROUPS
        # In a container the path may be one that only its host knows; then the root is the container's own group.
        inner = root / path.lstrip("/")
        for folder in (inner, *inner.parents):
            if folder.is_relative_to(root):
                yield folder


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
