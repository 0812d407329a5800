"""Threads that compute beside other work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from autoseg.hardware.limits import CoreUse, threads_left

LOOK_S = 2.0
"""Seconds over which the use of the cores is counted. The system counts in hundredths. A choice."""
AGREEING_LOOKS, LOOKS_FOR_MORE = 2, 5
"""Looks in a row that must find the same before the threads become fewer, or more. A choice: a thread too many makes a
step up to twenty times as long, one too few less than twice (docs/results.md, "Other work on the same cores")."""


class ThreadsBesideOthers:
    """Keeps PyTorch's threads on the CPU to the cores that other processes leave.

    Sums are added up in another order by another number of threads, so that results differ in their last digits: for
    work whose length is a time, which differs with the load of the machine anyway.
    """

    def __init__(self, *, fixed: bool) -> None:
        """Start with the threads that PyTorch has now, which are the most.

        Args:
            fixed: leave them as they are, whatever else runs.
        """
        self.most = torch.get_num_threads()
        self.fixed = fixed or self.most == 1
        self._last, self._wanted, self._looks, self._all_looks = CoreUse.now(), self.most, 0, 0

    def adjust(self) -> None:
        """Change the threads where other work came or went; to be called between steps, looks every `LOOK_S`."""
        if self.fixed or time.monotonic() - self._last.wall_s < LOOK_S:
            return
        last, self._last = self._last, CoreUse.now()
        threads = threads_left(last, self._last, self.most)
        self._looks = self._looks + 1 if threads == self._wanted else 1
        self._wanted = threads
        self._all_looks += 1
        now = torch.get_num_threads()
        if threads != now and self._looks >= (AGREEING_LOOKS if threads < now else LOOKS_FOR_MORE):
            torch.set_num_threads(threads)

    @property
    def have_looked(self) -> bool:
        """Whether the threads fit what else runs, or stay as they are."""
        return self.fixed or self._all_looks >= AGREEING_LOOKS

    def restore(self) -> None:
        """Compute with the most again."""
        if not self.fixed:
            torch.set_num_threads(self.most)


_followed: ContextVar[ThreadsBesideOthers | None] = ContextVar("threads", default=None)


@contextmanager
def following(threads: ThreadsBesideOthers) -> Iterator[None]:
    """Keep networks that predict in this block and thread to the cores that others leave; then use the most again."""
    token = _followed.set(threads)
    try:
        yield
    finally:
        _followed.reset(token)
        threads.restore()


def follow() -> None:
    """Change the threads where other work came or went, in a `following` block; to be called between passes."""
    if (threads := _followed.get()) is not None:
        threads.adjust()
