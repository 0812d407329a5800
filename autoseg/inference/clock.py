"""Where the time of a prediction goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

Phase = Literal["load", "pre", "infer", "invert", "post", "write"]
PHASES: tuple[Phase, ...] = get_args(Phase)


class Clock:
    """Seconds by phase, and how far the windows are.

    Phases nest, since everything streams: the inner one stops the outer one's time.
    """

    def __init__(self) -> None:
        self.seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self.num_windows, self.num_passed = 0, 0
        """Windows of the image, each counted for every network that it passes through, and those that have passed."""
        self.watch: Callable[[float], None] = lambda share: None
        """Called with the share of the windows that have passed."""
        self._open: list[Phase] = []
        self._since = 0.0

    @contextmanager
    def at(self, phase: Phase) -> Iterator[None]:
        """Count the time of a block as one phase's."""
        self._turn()
        self._open.append(phase)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def expect(self, num_windows: int) -> None:
        """So many more windows are to pass."""
        self.num_windows += num_windows

    def passed(self, num_windows: int) -> None:
        """So many windows have passed."""
        self.num_passed += num_windows
        self.watch(self.num_passed / self.num_windows)

    def _turn(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    @property
    def total_s(self) -> float:
        """Of all phases."""
        return sum(self.seconds.values())
