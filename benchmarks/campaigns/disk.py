"""A disk that fills in the middle of a stage: a clear stop, nothing half-written, and it goes on once there is room.

As root on a tmpfs that is filled up to what the stage may still write. As an ordinary user no file may grow beyond a
size (`ulimit -f`), which every write meets as it meets a full disk; it says "File too large" then.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from campaigns.common import (
    Ended,
    Report,
    Row,
    autoseg,
    copy_run,
    differences,
    files_of,
    label_digests,
    leftovers,
    make_data,
    must,
    shell,
    weight_digests,
)

SHARES = (0.0, 0.02, 0.1, 0.25, 0.45, 0.65, 0.85)
"""Of what a stage writes, how much there is room for."""
DISK_MIB = 64
STAGES = ("analyze", "generate", "cache", "checkpoint", "ensemble", "predict", "report")
FULL = ("No space left on device", "File too large")


def go(report: Report, folder: Path, args: argparse.Namespace) -> None:
    path = make_data(folder / "run")
    snapshots = make_snapshots(folder, path)
    expected = label_digests(folder / "run") | weight_digests(folder / "run" / "work_dir")
    names = files_of(folder / "run" / "work_dir")
    shares = (0.1, 0.65) if args.tiny else SHARES
    with small_disk(folder / "disk") as disk:
        how = "tmpfs" if disk is not None else "ulimit -f"
        for stage in STAGES:
            if not report.wants(stage):
                continue
            with report.row(f"{stage} ({how})") as row:
                for share in shares:
                    place = disk if disk is not None else folder / "limited"
                    trial(row, stage, share, place / "run", snapshots[stage], disk, expected, names)


def words_of(stage: str, run: Path) -> list[str]:
    name = {"cache": "train", "checkpoint": "train"}.get(stage, stage)
    if name == "predict":
        image = run / "images" / "phantom_001.nii.gz"
        return ["predict", "--work_dir", f"{run}/work_dir", "--image", str(image), "--output", f"{run}/out/a.nii.gz"]
    return ["report", "--work_dir", f"{run}/work_dir"] if name == "report" else [name, "--input", f"{run}/input.yaml"]


def make_snapshots(folder: Path, path: Path) -> dict[str, tuple[Path, int]]:
    """The run's folder before each stage, and how many bytes the stage writes; ends with the finished run."""
    snapshots = {}
    for stage in STAGES:
        before = copy_run(folder / "run", folder / f"before_{stage}")
        if stage == "checkpoint":  # the cache is there, but no job is begun
            copy_run(folder / "before_cache", before)
            shutil.copytree(folder / "probe" / "work_dir" / "cache", before / "work_dir" / "cache")
        if stage == "report":
            (before / "work_dir" / "report.html").unlink(missing_ok=True)
        size = used_bytes(before)
        probe = copy_run(before, folder / "probe")
        must(autoseg(*words_of(stage, probe), limit_s=600))
        grown = sum(
            p.stat().st_size for p in probe.rglob("*") if p.is_file() and not (before / p.relative_to(probe)).exists()
        )
        snapshots[stage] = (before, max(grown, used_bytes(probe) - size))
        if stage == "checkpoint":
            snapshots[stage] = (before, 3 * grown)  # a checkpoint has average and optimizer, and goes at the end
        if stage not in ("cache", "predict"):
            must(autoseg(*words_of(stage, folder / "run"), limit_s=600))
    must(autoseg(*words_of("predict", folder / "run"), limit_s=600))
    return snapshots


def used_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def trial(
    row: Row,
    stage: str,
    share: float,
    run: Path,
    snapshot: tuple[Path, int],
    disk: Path | None,
    expected: dict[str, str],
    names: set[str],
) -> None:
    """Run a stage with room for a share of what it writes, then with all the room it wants."""
    before, need = snapshot
    row.tried += 1
    copy_run(before, run)
    ended = on_full_disk(words_of(stage, run), run, disk, int(share * need))
    what = f"{stage} with {share:.0%} of {need / 1024:.0f} KiB"
    for fault in ended.faults:
        row.fault(fault, what_was_done=what, said=ended.tail)
    row.count("stopped" if ended.code else "got through")
    if ended.code and not any(word in ended.stderr for word in FULL):
        row.fault("does not say that the disk is full", what_was_done=what, said=ended.tail)
    if halves := [name for name in leftovers(run) if ".part" in name]:
        row.fault("a half is left", files=halves, what_was_done=what)
    again = autoseg(*words_of(stage, run), limit_s=300)
    whole = autoseg("run", "--input", run / "input.yaml", limit_s=300)
    if "predict" not in again.words:
        must_have_out = autoseg(*words_of("predict", run), limit_s=300)
        whole = must_have_out if whole.code == 0 else whole
    for later in (again, whole):
        for fault in later.faults or ([f"exit code {later.code}"] if later.code else []):
            row.fault(f"with room again: {fault}", what_was_done=what, said=later.tail, first=ended.tail)
            return
    actual = label_digests(run) | weight_digests(run / "work_dir")
    if other := differences(expected, actual):
        row.fault("not as without the full disk", files=other[:8], what_was_done=what)
    if left := [name for name in leftovers(run / "work_dir") if name not in names]:
        row.fault("leftovers", files=left, what_was_done=what)
    shutil.rmtree(run)


def on_full_disk(words: list[str], run: Path, disk: Path | None, room_bytes: int) -> Ended:
    """A command on a disk with so much room, or where no file may grow beyond that."""
    if disk is None:
        blocks = max(1, room_bytes // 1024)
        quoted = " ".join(f"'{word}'" for word in words)
        return shell(f"ulimit -f {blocks}; $AUTOSEG {quoted}", cwd=run, limit_s=300)
    filler = disk / "filler"
    left = os.statvfs(disk)
    size = max(0, left.f_bavail * left.f_frsize - room_bytes)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, size // 4096 * 4096))
    try:
        return autoseg(*words, limit_s=300)
    finally:
        filler.unlink()


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A disk of a few MiB; None where none can be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)
