"""Signals that end a job after the step at hand."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

from autoseg.hardware.system import stop_signals


class StopSignals:
    """Catches SIGTERM and Ctrl-C while a block runs, so that everything can be saved first."""

    def __init__(self) -> None:
        """Nothing is caught before the block begins."""
        self.received = ""
        """Name of the signal that came; empty while none has."""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        """Begin to catch them."""

        def note(number: int, frame: FrameType | None) -> None:
            self.received = signal.Signals(number).name

        try:
            self._previous = {n: signal.signal(n, note) for n in stop_signals()}
        except ValueError:  # not the main thread: signals are somebody else's
            self._previous = {}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave them to whoever caught them before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
