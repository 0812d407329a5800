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
    """Seconds by phase, and how far the networks are: voxels of windows, each counted for every pass through one.

    Phases nest, since everything streams: the inner one stops the outer one's time. Each thread has its own: those that
    read ahead and write behind a GPU count, too, so that the sum may be more than the time that passes.
    """

    def __init__(self) -> None:
        self.seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self.expected_voxels, self.passed_voxels = 0, 0
        """Of the windows that are laid out, and of those that have passed."""
        self.foreseen_voxels = 0
        """Of windows that are not laid out yet, since the region where they lie is still looked for; at most."""
        self.watch: Callable[[float], None] = lambda share: None
        """Called with the share that has passed."""
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

    def expect(self, num_voxels: int) -> None:
        """Windows of so many more voxels are to pass."""
        self.expected_voxels += num_voxels

    def forget_windows(self) -> None:
        """The image is begun anew: none is laid out, none has passed."""
        self.expected_voxels = self.passed_voxels = self.foreseen_voxels = 0

    def passed(self, num_voxels: int) -> None:
        """Windows of so many voxels have passed."""
        self.passed_voxels += num_voxels
        self.watch(self.passed_voxels / (self.expected_voxels + self.foreseen_voxels))

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
