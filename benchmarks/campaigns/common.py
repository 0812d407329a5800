"""What campaigns share: commands with a limit of time, a small run, what counts as a fault, the table at the end."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from processes import Started

LIMIT_S = 60.0
"""A command of a second that takes longer hangs."""
PACKAGES = ("torch", "monai", "numpy", "nibabel", "pydantic", "PyYAML")
ROOT = Path(__file__).resolve().parents[2]


@dataclass(kw_only=True)
class Ended:
    """A command that ended, or was ended after its time."""

    words: list[str]
    code: int | None
    """None: it took too long."""
    stdout: str
    stderr: str
    seconds: float

    @property
    def faults(self) -> list[str]:
        """What no command may do, whatever it was given."""
        faults = []
        shown = self.stderr + self.stdout
        if self.code is None:
            faults.append(f"took over {self.seconds:.0f} s")
        elif self.code not in (0, 1, 2):
            faults.append(f"exit code {self.code}")
        if "Traceback (most recent call last)" in shown:
            faults.append("traceback: " + last_of_traceback(shown))
        if self.code == 2 and not any(word in shown for word in ("error:", "skipped:", "Faults (")):
            faults.append("exit code 2 and no word")
        return faults

    @property
    def tail(self) -> str:
        """The end of what it said."""
        return (self.stdout[-300:] + self.stderr[-1200:]).strip()


def last_of_traceback(text: str) -> str:
    """Where a traceback ends, and its last line."""
    after = text.rpartition("Traceback (most recent call last)")[2].splitlines()
    places = [line.strip() for line in after if line.startswith("  File ")]
    ends = [line for line in after[1:] if line and not line.startswith(" ")]
    return f"{places[-1] if places else ''}: {ends[0][:200] if ends else ''}"


def autoseg(*words: str | Path, cwd: Path | None = None, limit_s: float = LIMIT_S) -> Ended:
    """A command in a fork that has everything loaded."""
    begin = time.monotonic()
    started = Started(*words, cwd=cwd)
    if not started.ends_within(limit_s):
        started.send_signal(signal.SIGKILL)
        started.wait()
        code = None
    else:
        code = started.returncode
    seconds = time.monotonic() - begin
    return Ended(words=started.words, code=code, stdout=started.stdout, stderr=started.stderr, seconds=seconds)


def shell(script: str, *, cwd: Path, env: Mapping[str, str] | None = None, limit_s: float = 600.0) -> Ended:
    """A script of bash, in which $AUTOSEG is the command as a process of its own, its start included."""
    begin = time.monotonic()
    given = {**os.environ, "AUTOSEG": f"{sys.executable} -m autoseg", "OMP_NUM_THREADS": "1", **(env or {})}
    given = {key: value for key, value in given.items() if value != "UNSET"}
    process = subprocess.Popen(
        ["bash", "-c", script],
        cwd=cwd,
        env=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=limit_s)
        code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        code = None
    return Ended(words=[script], code=code, stdout=stdout, stderr=stderr, seconds=time.monotonic() - begin)


# -- a small run

SMALL: dict[str, Any] = {
    "algos": ["segresnet"],
    "num_epochs": 2,
    "batch_size": 1,
    "num_steps_per_epoch": 2,
    "num_epochs_per_validation": 1,
    "precision": "fp32",
    "num_workers": 1,
    "overlap": 0,
    "learning_rate": 0.003,
    "roi_size": [16, 16, 16],
    "segresnet": {"init_filters": 8, "blocks_down": [1, 1]},
}
"""A network of no use that is trained in a second."""


def make_data(folder: Path, *, num_cases: int = 4, num_testing: int = 1, **settings: Any) -> Path:
    """Phantoms with an input.yaml; its path. `annotated` and `num_unlabeled` are those of `make_phantoms`."""
    import yaml

    from autoseg.data.phantoms import make_phantoms

    drawn = {key: settings.pop(key) for key in ("annotated", "num_unlabeled") if key in settings}
    path = make_phantoms(folder, num_cases=num_cases, num_testing=num_testing, shape=(24, 24, 24), num_fold=2, **drawn)
    path.write_text(path.read_text() + yaml.safe_dump({**SMALL, **settings}))
    return path


def must(ended: Ended) -> Ended:
    """A command that everything else builds on."""
    if ended.code != 0:
        raise SystemExit(f"{' '.join(ended.words)} ended with {ended.code}:\n{ended.tail}")
    return ended


def copy_run(source: Path, target: Path) -> Path:
    """A copy of a run's folder, times kept."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=shutil.copy2, symlinks=True)
    return target


# -- what is compared


def label_digests(work_dir: Path) -> dict[str, str]:
    """Every label file that a run made -> a digest of its voxels and its place; the cache left out."""
    import hashlib

    import nibabel
    import numpy as np

    digests = {}
    for path in sorted(work_dir.rglob("*.nii.gz")):
        try:
            image = nibabel.load(path)
            content = np.asarray(image.dataobj).tobytes() + np.round(image.affine, 4).tobytes()
        except Exception as error:  # noqa: BLE001 - damaged on purpose, perhaps
            content = str(error).encode()
        digests[str(path.relative_to(work_dir))] = hashlib.sha256(content).hexdigest()[:16]
    return digests


def weight_digests(work_dir: Path) -> dict[str, str]:
    """Every trained model -> a digest of its weights."""
    import hashlib

    import torch

    digests = {}
    for path in sorted(work_dir.rglob("model.pt")):
        weights = torch.load(path, weights_only=True)
        content = b"".join(name.encode() + tensor.numpy().tobytes() for name, tensor in sorted(weights.items()))
        digests[str(path.relative_to(work_dir))] = hashlib.sha256(content).hexdigest()[:16]
    return digests


def files_of(work_dir: Path) -> set[str]:
    """Names of all files and links."""
    return {str(path.relative_to(work_dir)) for path in work_dir.rglob("*") if path.is_file() or path.is_symlink()}


def leftovers(work_dir: Path) -> list[str]:
    """Files that no finished command may leave: halves of files, claims that are held, checkpoints of done jobs.

    The claim of a process that was killed after its job was done stays, and holds nothing: it names a dead process.
    """
    from autoseg.workspace.claims import read_claim

    odd = (".part", ".tmp", "checkpoint")
    names = files_of(work_dir)
    halves = [name for name in names if any(word in Path(name).name for word in odd)]
    claims = [name for name in names if ".claims/" in name and name.endswith(".json")]
    held = [name for name in claims if read_claim((work_dir / name).parent).is_live]
    folders = [Path(name).parent for name in claims]
    doubled = [name for name in claims if folders.count(Path(name).parent) > 1]
    return sorted({*halves, *held, *doubled})


def differences(expected: Mapping[str, str], actual: Mapping[str, str]) -> list[str]:
    """Keys whose values differ, or that are in one of two alone."""
    return sorted(key for key in {*expected, *actual} if expected.get(key) != actual.get(key))


# -- the table


@dataclass(kw_only=True)
class Row:
    """One kind of trial."""

    name: str
    tried: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    """How it ended -> how often."""
    faults: list[dict[str, Any]] = field(default_factory=list)
    """Trials in which a promise was broken, with all that tells why."""
    skipped: str = ""
    details: list[dict[str, Any]] = field(default_factory=list)

    def count(self, note: str, number: int = 1) -> None:
        self.notes[note] = self.notes.get(note, 0) + number

    def fault(self, what: str, **more: Any) -> None:
        print(f"  FAULT {self.name}: {what} {more.get('what_was_done', '')}", flush=True)
        self.faults.append({"what": what, **more})


class Report:
    """Rows of a campaign."""

    def __init__(self, campaign: str, arguments: Mapping[str, str]) -> None:
        self.campaign, self.arguments = campaign, arguments
        self.rows: list[Row] = []
        self.only = tuple(word for word in arguments.get("only", "").split(",") if word)

    def wants(self, name: str) -> bool:
        return not self.only or name.startswith(self.only)

    @contextmanager
    def row(self, name: str) -> Iterator[Row]:
        row = Row(name=name)
        self.rows.append(row)
        begin = time.monotonic()
        yield row
        words = row.skipped or f"{row.tried} tried, {len(row.faults)} faults, {time.monotonic() - begin:.0f} s"
        print(f"{self.campaign}: {name}: {words} {row.notes or ''}", file=sys.stderr, flush=True)

    @property
    def broken(self) -> int:
        return sum(len(row.faults) for row in self.rows)

    def write(self, path: Path, seconds: float) -> None:
        import psutil

        commit = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        )
        data = {
            "campaign": self.campaign,
            "arguments": dict(self.arguments),
            "seconds": round(seconds, 1),
            "commit": commit.stdout.strip(),
            "versions": {
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in PACKAGES},
            },
            "machine": {
                "system": platform.platform(),
                "cores": os.cpu_count(),
                "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
                "user": "root" if os.geteuid() == 0 else "ordinary",
            },
            "rows": [vars(row) for row in self.rows],
        }
        path.write_text(json.dumps(data, indent=1, default=str) + "\n")

    def text(self) -> str:
        lines = [f"{'':44} {'tried':>6} {'faults':>6}  how they ended"]
        for row in self.rows:
            ends = row.skipped or ", ".join(f"{note} {count}" for note, count in sorted(row.notes.items()))
            lines.append(f"{row.name[:44]:44} {row.tried:6d} {len(row.faults):6d}  {ends}")
        return "\n".join(lines)


def words_about(said: str, usual: str) -> Sequence[str]:
    """Lines of one text whose like, numbers apart, is not in another."""
    known = {without_numbers(line) for line in usual.splitlines()}
    return [line for line in said.splitlines() if without_numbers(line) not in known]


def without_numbers(line: str) -> str:
    """A line without times, counts and the numbers in paths."""
    return re.sub(r"\d+(\.\d+)?", "#", line)
