"""The GPUs of this machine, as torch sees them; asked by another process.

Torch rather than `nvidia-smi`: this does not tell the memory of a part of a GPU (MIG), of one that shares the memory of
the processor (Grace), or of a Jetson, and numbers GPUs in another order. Another process, since what asks torch for a
GPU's free memory keeps a context of some hundred MiB on it for as long as it lives, while jobs train there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

VISIBLE, ORDER = "CUDA_VISIBLE_DEVICES", {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
"""CUDA's variables: which GPUs a process may use, by number or UUID; and what the numbers go by, else by speed."""
ASKING_S = 120.0
"""Seconds in which the other process must have answered: the first look at a GPU takes several."""
FRESH_S = 10.0
"""Seconds for which an answer is taken as it is: who waits for free memory asks again and again."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU, or a part of one that is used as one."""

    number: str
    """As CUDA_VISIBLE_DEVICES counts, by the bus; for people."""
    uuid: str
    """Such as `GPU-...`, or `MIG-...` of a part; empty where the driver gives none."""
    free_gib: float
    total_gib: float = 0.0
    name: str = ""
    capability: tuple[int, int] = (0, 0)

    @property
    def visible(self) -> str:
        """What CUDA_VISIBLE_DEVICES is to say for a process that uses it alone."""
        return self.uuid or self.number


def list_gpus() -> list[Gpu]:
    """The GPUs that CUDA can use here, those of CUDA_VISIBLE_DEVICES alone where it is set."""
    if not _may_have_gpu():
        return []
    wanted = os.environ.get(VISIBLE)
    parts = _mig_parts()
    if wanted is None and not parts:
        return _ask({})
    words = parts if wanted is None else [word.strip() for word in wanted.split(",") if word.strip()]
    if not parts and not any(word.startswith("MIG") for word in words):
        # The place among those that were asked for, whichever of them could not be talked to.
        return [_named(gpu, words[int(gpu.number)], gpu.number, gpu.uuid) for gpu in _ask({VISIBLE: ",".join(words)})]
    # CUDA shows a process one part alone, however many are named, so each is asked for by itself. One that was named by
    # a number keeps it: torch tells no part's UUID as CUDA_VISIBLE_DEVICES wants it.
    asked = [(word, gpu) for word in words for gpu in _ask({VISIBLE: word})[:1]]
    return [_named(gpu, word, str(i), "") for i, (word, gpu) in enumerate(asked)]


def _named(gpu: Gpu, word: str, number: str, uuid: str) -> Gpu:
    """A GPU with the word that it was asked for by: its number, or its UUID; and the other of both as given."""
    if word.isdigit():
        return replace(gpu, number=word, uuid=uuid)
    return replace(gpu, number=number, uuid=word)


def _may_have_gpu() -> bool:
    """Whether torch can have a GPU here; no context comes of asking."""
    import torch

    return torch.cuda.is_available()


def _mig_parts() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name on a machine with divided GPUs: their parts, and GPUs that are whole."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse_parts(listed)


def parse_parts(listed: str) -> list[str]:
    """The UUIDs in what `nvidia-smi -L` prints, a divided GPU's parts in its place; none where no GPU is divided."""
    found: list[tuple[str, list[str]]] = []
    for line in listed.splitlines():
        _, _, uuid = line.rpartition("UUID: ")
        uuid = uuid.strip().removesuffix(")")
        if uuid.startswith("GPU-"):
            found.append((uuid, []))
        elif uuid.startswith("MIG-") and found:
            found[-1][1].append(uuid)
    if not any(parts for _, parts in found):
        return []
    return [word for whole, parts in found for word in (parts or [whole])]


_ANSWERS: dict[str, tuple[float, list[Gpu]]] = {}


def _ask(environment: Mapping[str, str]) -> list[Gpu]:
    """What another process says of the GPUs it sees, or said up to `FRESH_S` ago; none where it fails."""
    key = repr((os.environ.get(VISIBLE), sorted(environment.items())))
    if key not in _ANSWERS or time.monotonic() - _ANSWERS[key][0] > FRESH_S:
        gpus = _ask_anew(environment)  # which takes seconds
        _ANSWERS[key] = time.monotonic(), gpus
    return _ANSWERS[key][1]


def _ask_anew(environment: Mapping[str, str]) -> list[Gpu]:
    words = [sys.executable, "-m", "autoseg.hardware.gpus"]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=ASKING_S, check=False,
            env={**ORDER, **os.environ, **environment},
        )  # fmt: skip
        rows = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else []
    except (OSError, subprocess.TimeoutExpired, IndexError, json.JSONDecodeError):
        return []
    return [Gpu(**{**row, "capability": tuple(row["capability"])}) for row in rows]


def seen_here() -> list[Gpu]:
    """The GPUs that this process sees. It has a context on each from then on."""
    import torch

    cuda, gpus = torch.cuda, []
    for i in range(cuda.device_count()):
        try:
            properties, (free, total) = cuda.get_device_properties(i), cuda.mem_get_info(i)
        except RuntimeError:  # a GPU that has fallen off the bus, or is used by somebody alone
            continue
        uuid = str(getattr(properties, "uuid", "")).removeprefix("GPU-").removeprefix("MIG-")
        known = uuid.strip("0-") != ""  # a Jetson's is all zeros
        gpus.append(
            Gpu(
                str(i),
                f"GPU-{uuid}" if known else "",
                free / 2**30,
                total / 2**30,
                properties.name,
                (properties.major, properties.minor),
            )
        )
    return gpus


if __name__ == "__main__":
    print(json.dumps([asdict(gpu) for gpu in seen_here()]))  # noqa: T201 - the answer
