"""`autoseg doctor`: what this machine has for a run, what is missing, and what to do about it."""

from __future__ import annotations

import math
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from autoseg.hardware.packages import extras, install_advice, needs, rivals
from autoseg.hardware.system import open_files_limit
from autoseg.version import __version__

State = Literal["ok", "warn", "bad"]

LEAST_PYTHON = (3, 11)
LEAST_MEMORY_GIB, GOOD_MEMORY_GIB = 4.0, 12.0
"""torch, MONAI and one small job take about 2 GiB (measured on the hippocampus); CT volumes take more."""
LEAST_DISK_GB, GOOD_DISK_GB = 1.0, 20.0
"""The hippocampus run of 200 cases takes 0.2 GB; the cache holds every case as float16 or float32."""
GOOD_SHM_GB = 1.0
"""Processes that share tensors use /dev/shm; Docker gives 64 MB unless told otherwise."""
GOOD_OPEN_FILES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing looked at."""

    name: str
    state: State
    found: str
    advice: str = ""
    """What to do; empty where all is well."""


def examine(folder: Path, *, installed: bool = False) -> list[Check]:
    """Look at the machine and at the folder a run would write to.

    Args:
        folder: where the work_dir is or will be; need not exist yet.
        installed: look alone at what no run changes by taking memory, disk or GPU.
    """
    place = _nearest(folder)
    checks: list[Callable[[], Iterator[Check]]] = [_python, _packages, _torch]
    if not installed:
        checks += [_gpu, _memory, lambda: _disk(place)]
    checks.append(lambda: _writing(place))
    if not installed:
        checks += [_shared_memory, _open_files]
    return [check for look in checks for check in look()]


def doctor(folder: Path, *, as_json: bool = False, installed: bool = False) -> tuple[str, int]:
    """The findings as text or JSON, and the exit code: 0, or 2 where a run cannot work. Args: as `examine`."""
    import json

    checks = examine(folder, installed=installed)
    code = 2 if any(c.state == "bad" for c in checks) else 0
    if as_json:
        return json.dumps([asdict(c) for c in checks], indent=1), code
    width = max(len(c.name) for c in checks)
    marks = {"ok": "ok  ", "warn": "WARN", "bad": "BAD "}
    lines = []
    for c in checks:
        lines.append(f"{marks[c.state]}  {c.name:<{width}}  {c.found}")
        if c.advice:
            lines.append(f"{'':{width + 8}}-> {c.advice}")
    num = {state: sum(c.state == state for c in checks) for state in ("warn", "bad")}
    ready = "Installed; memory, disk and GPU were not looked at." if installed else "Ready for a run."
    verdict = "A run cannot work here until what is BAD is repaired." if num["bad"] else ready
    return "\n".join([*lines, "", f"{verdict} {num['bad']} bad, {num['warn']} to look at."]), code


def _nearest(folder: Path) -> Path:
    """The folder itself or the nearest one above it that exists."""
    place = folder.absolute()
    while not place.is_dir() and place != place.parent:
        place = place.parent
    return place


def _python() -> Iterator[Check]:
    version = f"{platform.python_version()} at {sys.executable}, autoseg {__version__}"
    if sys.version_info < LEAST_PYTHON:
        least = ".".join(map(str, LEAST_PYTHON))
        yield Check(name="Python", state="bad", found=version, advice=f"Install Python {least} or newer.")
    else:
        yield Check(name="Python", state="ok", found=version)
    found = f"{platform.system()} {platform.release()}, {platform.machine()}"
    if sys.platform.startswith("linux"):
        yield Check(name="System", state="ok", found=found)
    else:
        advice = "Runs are tested on Linux. Here report what fails, or use Linux; on Windows WSL is one."
        yield Check(name="System", state="warn", found=found, advice=advice)


def _packages() -> Iterator[Check]:
    """Every package autoseg needs is there in a version it takes, and no other package has its name."""
    needed = needs()
    if needed is None:
        found = "autoseg is run from its source, not installed"
        yield Check(name="Packages", state="warn", found=found, advice=install_advice())
    elif wrong := [need for need in needed if not need.fits]:
        texts = [
            f"{n.name} is {n.installed}, wanted {n.wanted}" if n.installed else f"{n.name} is missing" for n in wrong
        ]
        advice = install_advice(missing=[need.text for need in wrong])
        yield Check(name="Packages", state="bad", found="; ".join(texts), advice=advice)
    else:
        yield Check(name="Packages", state="ok", found=f"all {len(needed)} that are needed are there")
    if also := rivals():
        advice = (
            "Files of one may have replaced the other's. In a new environment (python -m venv) install this one alone."
        )
        found = f"`import autoseg` may mean another package; installed, too: {', '.join(also)}"
        yield Check(name="Same name", state="warn", found=found, advice=advice)
    if have := {name: all(need.fits for need in added) for name, added in extras().items()}:
        there, missing = [n for n in have if have[n]], [n for n in have if not have[n]]
        found = f"{', '.join(there) or 'none'}{'; not installed: ' if missing else ''}{', '.join(missing)}"
        advice = f"Only where you need them. {install_advice(','.join(missing))}" if missing else ""
        yield Check(name="Extras", state="ok", found=found, advice=advice)


def _torch() -> Iterator[Check]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library of it cannot be loaded
        advice = "Install torch 2.8 or newer (not 2.9): see pytorch.org for the build that fits your GPU."
        yield Check(name="torch", state="bad", found=f"cannot be loaded ({error})", advice=advice)
        return
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs alone"
    if torch.__version__.startswith("2.9."):
        advice = "Install another version: 2.9 runs 3D convolutions about four times slower (pytorch issue 166122)."
        yield Check(name="torch", state="warn", found=f"{torch.__version__}, {build}", advice=advice)
    else:
        yield Check(name="torch", state="ok", found=f"{torch.__version__}, {build}")


def _gpu() -> Iterator[Check]:
    try:
        import torch
    except (ImportError, OSError):  # `_torch` says so
        return
    driver = shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            text = f"{torch.cuda.get_device_name(i)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
            low = free < 0.5 * total
            advice = "Another program uses it: nvidia-smi shows which. End it, or plan for less." if low else ""
            yield Check(name=f"GPU {i}", state="warn" if low else "ok", found=text, advice=advice)
        return
    from autoseg.hardware.limits import available_cores

    without = f"none usable; networks run on {available_cores()} CPU cores"
    if not driver:
        advice = "Fine for small volumes. For large ones use a machine with an NVIDIA GPU."
    elif not torch.version.cuda:
        advice = "There is an NVIDIA driver, but torch was built for CPUs: install torch's CUDA build (pytorch.org)."
    elif os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        advice = "CUDA_VISIBLE_DEVICES is empty, which hides every GPU: unset it."
    else:
        advice = (
            f"The driver is too old for CUDA {torch.version.cuda}, or broken: run nvidia-smi, and update the driver."
        )
    yield Check(name="GPU", state="warn", found=without, advice=advice)


def _memory() -> Iterator[Check]:
    from autoseg.hardware.limits import available_memory_bytes, memory_limit_bytes

    free, total = available_memory_bytes() / 2**30, memory_limit_bytes() / 2**30
    text = f"{free:.1f} GiB free of {total:.1f} GiB"
    if free < LEAST_MEMORY_GIB:
        advice = f"A run wants {LEAST_MEMORY_GIB:g} GiB at least: close other programs, or raise the container's limit."
        yield Check(name="Memory", state="bad" if free < LEAST_MEMORY_GIB / 2 else "warn", found=text, advice=advice)
    elif free < GOOD_MEMORY_GIB:
        advice = "Enough for small volumes. Large CTs may be slow: cases that do not fit are read from disk."
        yield Check(name="Memory", state="ok", found=text, advice=advice)
    else:
        yield Check(name="Memory", state="ok", found=text)


def _disk(place: Path) -> Iterator[Check]:
    free = shutil.disk_usage(place).free / 1e9
    text = f"{free:.1f} GB free at {place}"
    if free < LEAST_DISK_GB:
        advice = "Free some, or give a work_dir on another disk: the cache holds every case once more."
        yield Check(name="Disk", state="bad", found=text, advice=advice)
    elif free < GOOD_DISK_GB:
        advice = "Enough for small data sets: the cache holds every case once more, and models lie beside it."
        yield Check(name="Disk", state="ok", found=text, advice=advice)
    else:
        yield Check(name="Disk", state="ok", found=text)


def _writing(place: Path) -> Iterator[Check]:
    """Files can be made, renamed and locked."""
    from autoseg.workspace.claims import Claim

    try:
        with tempfile.TemporaryDirectory(prefix=".autoseg-doctor-", dir=place) as folder:
            path = Path(folder) / "file"
            path.write_bytes(b"x")
            os.replace(path, path.with_name("renamed"))
            with Claim(Path(folder) / ".claims", "doctor"):  # as a run locks its jobs
                pass
    except OSError as error:
        advice = f"Give a folder that you may write to with --folder and work_dir; or ask for the right on {place}."
        reason = error.strerror or str(error)
        yield Check(name="Writing", state="bad", found=f"not possible in {place} ({reason})", advice=advice)
    else:
        yield Check(name="Writing", state="ok", found=f"files can be made, renamed and locked in {place}")


def _shared_memory() -> Iterator[Check]:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return
    free = shutil.disk_usage(shm).free / 1e9
    low = free < GOOD_SHM_GB
    advice = (
        "In Docker start the container with --ipc=host or --shm-size=8g, if training on several GPUs fails."
        if low
        else ""
    )
    yield Check(
        name="Shared memory", state="warn" if low else "ok", found=f"{free:.2g} GB free in {shm}", advice=advice
    )


def _open_files() -> Iterator[Check]:
    limit = open_files_limit()
    if limit is None:
        return
    soft, hard = limit
    low = soft < GOOD_OPEN_FILES
    advice = f"Raise it: ulimit -n {min(hard, GOOD_OPEN_FILES):g}" if low else ""
    shown = "no limit" if math.isinf(soft) else f"{soft:g} at once"
    yield Check(name="Open files", state="warn" if low else "ok", found=shown, advice=advice)
