"""The peak of memory while something runs: of this process, or of a GPU."""

from __future__ import annotations

import gc
import math
import threading

import psutil
import torch

SAMPLE_S = 0.002
"""Seconds between two looks at this process' memory."""
NO_MEMORY = (
    "out of memory", "can't allocate memory", "not enough memory", "bad allocation", "std::bad_alloc",
    "alloc_failed", "unable to find an engine", "unable to find a valid cudnn algorithm",
)  # fmt: skip
"""What torch says in a RuntimeError when memory ran out on a CPU or in a library. The last two are what is left of it
where cuDNN had no memory for the workspace of any kernel (pytorch/pytorch#108645)."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in NO_MEMORY)


def free_bytes(device: torch.device) -> float:
    """Memory of a GPU that this process may still take, what its allocator keeps unused included; endless elsewhere."""
    if device.type != "cuda":
        return math.inf
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + unused)


def give_back() -> None:
    """Give other processes the memory of GPUs that this one holds for tensors that are gone; its context stays."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


class MemoryWatch:
    """The peak of memory while a block runs: of the GPU's tensors, or of this process on a CPU."""

    def __init__(self, device: torch.device, sample_s: float = SAMPLE_S) -> None:
        """Say where, and how often to look at a process."""
        self.device, self._process = device, PeakMemory(sample_s)

    def __enter__(self) -> MemoryWatch:
        """Begin to look."""
        if self.device.type == "cuda":
            torch.cuda.init()  # which no question about statistics does by itself: as a first call it is an error
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._process.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """Look a last time."""
        if self.device.type != "cuda":
            self._process.__exit__(*error)

    def forget_warm_up(self) -> None:
        """Begin anew on a GPU, where the search for kernels takes memory once; a process keeps what it took."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    @property
    def peak_gib(self) -> float:
        """The most so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return self._process.most / 2**30


class PeakMemory:
    """The most resident memory of this process while a block runs; a context manager.

    The process' own high-water mark cannot be set back without others who watch it noticing, so a thread looks at it.
    """

    def __init__(self, sample_s: float = SAMPLE_S) -> None:
        """Say how many seconds lie between two looks: shorter peaks may be missed."""
        self._process, self._sample_s = psutil.Process(), sample_s
        self.before = self.most = 0
        """Bytes at the beginning, and the most so far."""

    def __enter__(self) -> PeakMemory:
        """Begin to look."""
        self.before = self.most = self._process.memory_info().rss
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="autoseg-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Look a last time."""
        self._ended.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._ended.wait(self._sample_s):
            self._look()

    def _look(self) -> None:
        self.most = max(self.most, self._process.memory_info().rss)
