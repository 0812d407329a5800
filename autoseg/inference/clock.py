"""Where the time of a prediction goes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

Phase = Literal["load", "pre", "infer", "invert", "post", "write"]
PHASES: tuple[Phase, ...] = get_args(Phase)


class Clock:
    """Seconds by phase, and how far the windows are.

    Phases nest, since everything streams: the inner one stops the outer one's time. Each thread has its own: those that
    read ahead and write behind a GPU count, too, so that the sum may be more than the time that passes.
    """

    def __init__(self) -> None:
        self.seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self.num_windows, self.num_passed = 0, 0
        """Windows of the image, each counted for every network that it passes through, and those that have passed."""
        self.watch: Callable[[float], None] = lambda share: None
        """Called with the share of the windows that have passed."""
        self._own = threading.local()
        self._adding = threading.Lock()

    @contextmanager
    def at(self, phase: Phase) -> Iterator[None]:
        """Count the time of a block as one phase's."""
        self._turn()
        self._open().append(phase)
        try:
            yield
        finally:
            self._turn()
            self._open().pop()

    def expect(self, num_windows: int) -> None:
        """So many more windows are to pass."""
        self.num_windows += num_windows

    def passed(self, num_windows: int) -> None:
        """So many windows have passed."""
        self.num_passed += num_windows
        self.watch(self.num_passed / self.num_windows)

    def _open(self) -> list[Phase]:
        """The phases that this thread is in, the innermost last."""
        if not hasattr(self._own, "phases"):
            self._own.phases = []
        phases: list[Phase] = self._own.phases
        return phases

    def _turn(self) -> None:
        now = time.perf_counter()
        if phases := self._open():
            with self._adding:
                self.seconds[phases[-1]] += now - self._own.since
        self._own.since = now

    @property
    def total_s(self) -> float:
        """Of all phases."""
        return sum(self.seconds.values())
