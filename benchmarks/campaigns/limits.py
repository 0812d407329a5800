"""Machines that are short of something: each does a whole run, which must come to the labels of an unhindered one, or
stop with a sentence that says what is missing."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from campaigns.common import (
    Ended,
    Report,
    Row,
    autoseg,
    copy_run,
    differences,
    label_digests,
    leftovers,
    make_data,
    must,
    shell,
    weight_digests,
)

RUN = "$AUTOSEG run --input input.yaml"


@dataclass(kw_only=True)
class Trial:
    """A way in which a machine is short of something."""

    name: str
    script: str
    env: dict[str, str] = field(default_factory=dict)
    may_stop: str = ""
    """Words of the error with which it may stop instead; empty: it must come through."""
    needs_root: bool = False
    after: Callable[[Path, Ended, Row], None] | None = None
    before: Callable[[Path], None] | None = None


MEMORY = r"memory|MiB|GiB|allocate"
PATCHED = """
import sys, time
real, begin = time.time, time.time()
time.time = lambda: real() - (3600.0 if real() - begin > {after} else 0.0)
time.time_ns = lambda: int(time.time() * 1e9)
from autoseg.cli.main import main
sys.argv = ["autoseg", "run", "--input", "input.yaml"]
main()
"""
FAKE_GROUP = """
import sys
from pathlib import Path
from autoseg.hardware import limits
group = Path("group")
group.mkdir(exist_ok=True)
(group / "memory.max").write_text("{limit}\\n")
(group / "memory.current").write_text("{used}\\n")
(group / "memory.stat").write_text("inactive_file 0\\n")
(group / "cpu.max").write_text("50000 100000\\n")
(group / "self").write_text("0::/\\n")
limits.CONTROL_GROUPS, limits.MEMBERSHIP = group.absolute(), (group / "self").absolute()
from autoseg.cli.main import main
sys.argv = ["autoseg", "run", "--input", "input.yaml"]
main()
"""


def python(code: str, **values: object) -> str:
    """A script that runs some Python instead of the command."""
    text = code.format(**values).replace("'", '"')
    return f"{sys.executable} -c '{text}'"


def two_at_once(run: Path, ended: Ended, row: Row) -> None:
    """One of two went through, and the other said who is at work."""
    codes = sorted(re.findall(r"code (\d+)", ended.stdout))
    if codes not in (["0", "0"], ["0", "2"]):
        row.fault(f"two at once ended with {codes}", said=ended.tail)
    if codes == ["0", "2"] and "is working on it" not in ended.stderr:
        row.fault("the second does not say who is at work", said=ended.tail)


def make_future(run: Path) -> None:
    """All files are of tomorrow, as after a clock that was set back."""
    later = 86400 + int((run / "input.yaml").stat().st_mtime)
    for path in run.rglob("*"):
        os.utime(path, (later, later))


def give_to(run: Path) -> None:
    """The folder becomes that of a user without an entry in passwd."""
    for path in (run, *run.rglob("*")):
        os.chown(path, 54321, 54321)
    for parent in run.parents[:2]:
        if str(parent).startswith("/tmp/") and parent != Path("/tmp"):
            parent.chmod(parent.stat().st_mode | 0o055)


def no_full_stop(run: Path, ended: Ended, row: Row) -> None:
    """What was printed went nowhere, but the log has it."""
    if "report:" not in (run / "work_dir" / "run.log").read_text():
        row.fault("run.log is not whole", said=ended.tail)


STRANGER = "setpriv --reuid 54321 --regid 54321 --clear-groups"
NO_THREADS = r"[Rr]esource temporarily unavailable|thread"
PLAIN_LOCALE = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def with_shm(options: str) -> str:
    """A run that sees another /dev/shm."""
    inner = f"mount -t tmpfs -o {options} none /dev/shm && {RUN} --num_workers 2"
    return f"unshare --mount bash -c '{inner}'"


def stranger(name: str, script: str, **more: Any) -> Trial:
    """A trial of a user whom the machine does not know."""
    return Trial(name=name, script=f"{STRANGER} {script}", needs_root=True, before=give_to, **more)


def virtual(gib: int, may_stop: str = MEMORY) -> Trial:
    """A trial with so much address space."""
    return Trial(name=f"ulimit -v {gib} GiB", script=f"ulimit -v {gib << 20}; {RUN}", may_stop=may_stop)


def grouped(name: str, limit: int, used: int, **more: Any) -> Trial:
    """A trial in a control group of so many GiB, with half a core."""
    return Trial(name=f"control group: {name}", script=python(FAKE_GROUP, limit=limit << 30, used=used << 30), **more)


NO_NAMES = {"HOME": "UNSET", "USER": "UNSET", "LOGNAME": "UNSET"}
TWO_RUNS = f"{RUN} & a=$!; {RUN} & b=$!; wait $a; echo code $?; wait $b; echo code $?"
TRIALS = [
    Trial(name="64 open files", script=f"ulimit -n 64; {RUN}"),
    Trial(name="64 open files, two jobs at once", script=f"ulimit -n 64; {RUN} --jobs_per_device 2"),
    Trial(name="24 open files", script=f"ulimit -n 24; {RUN}", may_stop="[Tt]oo many open files"),
    Trial(name="/dev/shm read-only", script=with_shm("ro,size=4k"), needs_root=True),
    Trial(name="/dev/shm of 64 KiB", script=with_shm("size=64k"), needs_root=True),
    Trial(name="HOME unset", script=RUN, env={"HOME": "UNSET"}),
    Trial(name="HOME is not there", script=RUN, env={"HOME": "/nonexistent"}),
    stranger("no entry in passwd, HOME unset", RUN, env=NO_NAMES),
    stranger("no TMPDIR to write to", RUN, env={"TMPDIR": "/proc", "HOME": "/proc"}),
    Trial(name="clock set back at once", script=python(PATCHED, after=0)),
    Trial(name="clock set back in the middle", script=python(PATCHED, after=5)),
    Trial(name="files of tomorrow", script=RUN, before=make_future),
    Trial(name="clock set back, then a second run", script=f"{RUN} && {python(PATCHED, after=0)}"),
    Trial(name="two runs in one work_dir", script=TWO_RUNS, after=two_at_once),
    Trial(name="stdout closed", script=f"{RUN} >&-", after=no_full_stop),
    Trial(name="stderr closed", script=f"{RUN} 2>&-", after=no_full_stop),
    Trial(name="stdin, stdout, stderr closed", script=f"{RUN} <&- >&- 2>&-", after=no_full_stop),
    Trial(
        name="stdout on a full disk",
        script=f"{RUN} > /dev/full",
        after=no_full_stop,
        may_stop="stdout cannot be written",
    ),
    Trial(name="stderr on a full disk", script=f"{RUN} 2> /dev/full", after=no_full_stop),
    Trial(name="a reader that goes away", script=f"set -o pipefail; {RUN} 2>&1 | head -c 10", after=no_full_stop),
    Trial(name="LC_ALL=C", script=RUN, env=PLAIN_LOCALE),
    Trial(name="umask 077", script=f"umask 077; {RUN}"),
    Trial(
        name="16 processes and threads",
        script=f"ulimit -u 16; {STRANGER} {RUN}",
        needs_root=True,
        before=give_to,
        may_stop=NO_THREADS,
    ),
    virtual(12, may_stop=""),
    virtual(4),
    virtual(2),
    virtual(1),
    grouped("2 GiB, 1 of them used", 2, 1),
    grouped("1 GiB, all used", 1, 1, may_stop=MEMORY),
]
TINY = ("HOME unset", "stdout closed", "64 open files")


def go(report: Report, folder: Path, args: argparse.Namespace) -> None:
    path = make_data(folder / "run")
    fresh = copy_run(folder / "run", folder / "fresh")
    must(autoseg("run", "--input", path, limit_s=600))
    expected = label_digests(folder / "run" / "work_dir") | weight_digests(folder / "run" / "work_dir")
    for trial in TRIALS:
        if not report.wants(trial.name) or (args.tiny and trial.name not in TINY):
            continue
        with report.row(trial.name) as row:
            if trial.needs_root and os.geteuid() != 0:
                row.skipped = "skipped: needs root"
                continue
            if "unshare" in trial.script and shell("unshare --mount true", cwd=folder).code != 0:
                row.skipped = "skipped: no mounts permitted here"
                continue
            place = copy_run(fresh, folder / "trial")
            attempt(row, trial, place, expected)
            shutil.rmtree(place)


def attempt(row: Row, trial: Trial, place: Path, expected: dict[str, str]) -> None:
    row.tried += 1
    if trial.before is not None:
        trial.before(place)
    ended = shell(trial.script, cwd=place, env=trial.env, limit_s=300)
    row.details.append({"seconds": round(ended.seconds, 1), "said": ended.tail})
    faults = [fault for fault in ended.faults if "no word" not in fault]
    for fault in faults:
        row.fault(fault, said=ended.tail)
    if trial.after is not None:
        trial.after(place, ended, row)
    log = place / "work_dir" / "run.log"
    said = ended.stderr + (log.read_text(errors="replace") if log.exists() else "")
    if ended.code not in (0, None) and not faults:
        if not trial.may_stop or not re.search(trial.may_stop, said):
            row.fault(f"stopped with {ended.code} for another reason than may be", said=ended.tail)
        row.count(f"stopped with {ended.code}, and said why")
    if ended.code != 0:  # without the shortage it goes on
        again = autoseg("run", "--input", place / "input.yaml", limit_s=300)
        for fault in again.faults or ([f"exit code {again.code}"] if again.code else []):
            row.fault(f"afterwards: {fault}", said=again.tail)
    else:
        row.count("came through")
    actual = label_digests(place / "work_dir") | weight_digests(place / "work_dir")
    if other := differences(expected, actual):
        row.fault("not as on a machine that lacks nothing", files=other[:8], said=ended.tail)
    if left := leftovers(place / "work_dir"):
        row.fault("leftovers", files=left)
