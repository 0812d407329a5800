"""What is done beside a GPU's work: reading ahead of it, writing behind it, copies on their way.

On a CPU the same is done at once: another thread would take the processor from the networks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, ParamSpec, Self, TypeVar

import torch

Item = TypeVar("Item")
Given = ParamSpec("Given")


class Ahead(Generic[Item]):
    """Items that are made in order, each while the one before is worked on."""

    def __init__(self, make: Callable[[int], Item], number: int, *, threaded: bool) -> None:
        """Say what makes them.

        Args:
            make: one, by its index from 0.
            number: of all.
            threaded: make the next one in another thread as soon as one is taken.
        """
        self._make, self._number, self._index = make, number, 0
        self._pool = ThreadPoolExecutor(1, "autoseg-read") if threaded else None
        self._next: Future[Item] | None = None

    def take(self) -> Item:
        """The next item; an error of `make` is raised here."""
        index, self._index = self._index, self._index + 1
        if self._pool is None:
            return self._make(index)
        item = self._next.result() if self._next is not None else self._make(index)
        self._next = self._pool.submit(self._make, index + 1) if index + 1 < self._number else None
        if self._next is None:
            self._pool.shutdown(wait=False)
        return item


class Behind(Generic[Given]):
    """Work that is done in order while the next is prepared; a context manager that ends when all is done."""

    def __init__(self, work: Callable[Given, None], *, threaded: bool) -> None:
        """Say what is to be done with what `put` is given.

        Args:
            threaded: do it in another thread; one piece of work waits at most.
        """
        self._work = work
        self._pool = ThreadPoolExecutor(1, "autoseg-write") if threaded else None
        self._last: Future[None] | None = None

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def put(self, *args: Given.args, **kwargs: Given.kwargs) -> None:
        """Do the work on something; an error of the one before is raised here."""
        if self._pool is None:
            self._work(*args, **kwargs)
            return
        if self._last is not None:
            self._last.result()
        self._last = self._pool.submit(self._work, *args, **kwargs)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the last; its error is raised unless there is another."""
        if self._pool is None:
            return
        self._pool.shutdown(wait=True)
        if self._last is not None and kind is None:
            self._last.result()


class Pinned:
    """Batches of a GPU on their way to the CPU: each is handed out when the next one has been asked for."""

    def __init__(self, device: torch.device) -> None:
        """Say where batches go; those that are there already are handed out at once."""
        self._device = device
        self._copied: tuple[torch.Tensor, torch.cuda.Event] | None = None
        self.is_behind = False
        """Whether the batch handed out is the one before."""

    def swap(self, batch: torch.Tensor) -> Sequence[torch.Tensor]:
        """Begin to copy a batch; those of the one before, or of this one where it need not be copied."""
        if batch.device.type != "cuda" or self._device.type == "cuda":
            return list(batch.to(self._device))
        before = self.last()
        self.is_behind = True
        host = torch.empty_strided(batch.shape, batch.stride(), dtype=batch.dtype, pin_memory=True)
        host.copy_(batch, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(batch.device))
        self._copied = host, event
        return before

    def last(self) -> Sequence[torch.Tensor]:
        """The windows that are still on their way."""
        if self._copied is None:
            return []
        (host, event), self._copied = self._copied, None
        event.synchronize()
        return list(host)
