"""Runs that are killed in every stage of every round, and gone on with: equal to one that was not, and nothing left.

A chain is one run that is killed once in each of its steps and then ends; chain after chain the moments move through
the steps. Each kill is KILL, TERM, or INT twice.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from processes import Started

from campaigns.common import (
    Report,
    Row,
    autoseg,
    copy_run,
    differences,
    files_of,
    label_digests,
    leftovers,
    make_data,
    weight_digests,
)

SIGNALS = ("KILL", "TERM", "INT twice")
STEP = re.compile(r"round (\d+) of \d+: (\w+)")
LONGEST_S = 600.0
ROUNDS: dict[str, Any] = {
    "annotated": (("sphere", "box"), ("box",)),
    "num_unlabeled": 1,
    "strategy": "both",
    "pseudolabel": {"unlabeled": True, "filter": False},
}
"""Two rounds of training with pseudo-labels between them."""
PRETRAINED = {"pretrain": {"method": "mae", "epochs": 4, "all_images": True}}
RUNS: tuple[tuple[str, dict[str, Any], float], ...] = (
    ("one job at a time", {}, 0.5),
    ("two jobs at once", {"jobs_per_device": 2}, 0.25),
    ("pretrained", PRETRAINED, 0.25),
)
"""Settings, and the share of the kills."""
SWEEP = {"parameters": {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}, "trials": 4}


@dataclass(frozen=True)
class Step:
    """A stage in a round, as the log names it."""

    name: str
    moments: tuple[float, ...]
    """Seconds after its begin at which it said a further line; the last one: its end."""


def go(report: Report, folder: Path, args: argparse.Namespace) -> None:
    kills = args.kills if args.kills is not None else (3 if args.tiny else 100)
    sweep_kills = args.sweep_kills if args.sweep_kills is not None else (0 if args.tiny else 10)
    for name, settings, share in RUNS:
        if report.wants(name) and not (args.tiny and settings):
            num = kills if args.tiny else round(share * kills)
            kill_runs(report, folder / name.replace(" ", "_"), name, settings, num, args)
    if report.wants("sweep") and sweep_kills:
        kill_sweeps(report, folder / "sweep", sweep_kills, args.seed)


# -- runs


def data_of(folder: Path, **settings: Any) -> Path:
    return make_data(folder, num_cases=6, **{**ROUNDS, **settings})


def kill_runs(
    report: Report, folder: Path, name: str, settings: dict[str, Any], kills: int, args: argparse.Namespace
) -> None:
    data_of(folder / "fresh", **settings)
    whole = copy_run(folder / "fresh", folder / "whole")
    steps = reference(whole)
    expected = label_digests(whole / "work_dir") | weight_digests(whole / "work_dir")
    names = files_of(whole / "work_dir")
    chains = max(1, round(kills / len(steps)))
    rng = random.Random(args.seed)
    orders = {step.name: rng.sample(range(chains), chains) for step in steps}
    rows = {}
    with report.row(f"{name}: whole chains") as row:
        for step in steps:
            rows[step.name] = Row(name=f"{name}: {step.name}")
            report.rows.append(rows[step.name])
        left = kills
        for chain in range(chains):
            place = copy_run(folder / "fresh", folder / "killed")
            done = []
            for number, step in enumerate(steps):
                if not left:
                    break
                left -= 1
                share = (orders[step.name][chain] + 0.5) / chains
                how = SIGNALS[(chain + number) % len(SIGNALS)]
                done.append(kill_once(rows[step.name], place, step, share, how))
            row.tried += 1
            finish(row, place, expected, names, done)


def reference(place: Path) -> list[Step]:
    """The steps of a run that nobody kills, with their lengths."""
    started = Started("run", "--input", place / "input.yaml")
    begin = time.monotonic()
    times: list[float] = []
    while True:
        ended = started.ends_within(0.005)
        lines = started.stderr.splitlines()
        times += [time.monotonic() - begin] * (len(lines) - len(times))
        if ended:
            break
    if started.returncode != 0:
        raise SystemExit(f"the run itself fails:\n{started.stderr[-2000:]}")
    places = [(number, STEP.fullmatch(line)) for number, line in enumerate(lines)]
    begins = [(-1, "analyze", 0.0)]
    begins += [(number, f"round {m[1]}: {m[2]}", times[number]) for number, m in places if m]
    ends = [*(number for number, _, _ in begins[1:]), len(lines)]
    steps = []
    for (first, name, start), end in zip(begins, ends, strict=True):
        until = times[end] if end < len(times) else time.monotonic() - begin
        steps.append(Step(name, tuple(t - start for t in (*times[first + 1 : end], until))))
    return steps


def kill_once(row: Row, place: Path, step: Step, share: float, how: str) -> str:
    """Start a run, let it come to a step, and kill it there; returns what was done."""
    row.tried += 1
    started = Started("run", "--input", place / "input.yaml")
    # Its lines, not its seconds, say how far a step is: one run is faster than another.
    moment = share * step.moments[-1]
    lines = sum(t <= moment for t in step.moments[:-1])
    words = step.name.replace(": ", " of 2: ")
    begin = time.monotonic()
    while not is_there(started.stderr.splitlines(), words, lines):
        if started.ends_within(0.005) or time.monotonic() - begin > LONGEST_S:
            break
    rest = moment - ([0.0, *step.moments])[lines]
    if started.ends_within(rest / 2):
        row.count("ended before the kill")
        if started.returncode != 0:
            row.fault(f"ended with {started.returncode} by itself", said=started.stderr[-1500:], step=step.name)
        return f"{step.name}: ended"
    children = psutil.Process(started.pid).children(recursive=True)
    if how == "KILL":
        started.send_signal(signal.SIGKILL)
    elif how == "TERM":
        started.send_signal(signal.SIGTERM)
    else:
        started.send_signal(signal.SIGINT)
        if not started.ends_within(0.1):
            started.send_signal(signal.SIGINT)
    what = f"{step.name} at {share:.0%}: {how}"
    if not started.ends_within(60):
        row.fault("lives on a minute after the signal", what_was_done=what, said=started.stderr[-1500:])
        started.send_signal(signal.SIGKILL)
        started.wait()
    row.count(how)
    if started.returncode == 0:
        row.fault("went on as if there had been no signal", what_was_done=what, said=started.stderr[:20_000])
    if "Traceback (most recent call last)" in started.stderr:
        row.fault("traceback", what_was_done=what, said=started.stderr[:20_000])
    _, alive = psutil.wait_procs(children, timeout=60)
    if alive := [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        row.fault("processes live on", what_was_done=what, processes=[" ".join(p.cmdline())[:200] for p in alive])
        for process in alive:
            process.kill()
    return what


def is_there(said: list[str], words: str, lines: int) -> bool:
    """Whether a run has come to a step, and said so many lines in it."""
    if words == "analyze":
        return len(said) >= lines
    return words in said and len(said) - said.index(words) - 1 >= lines


def finish(row: Row, place: Path, expected: dict[str, str], names: set[str], done: list[str]) -> None:
    """Let a killed run end, and compare it with one that nobody killed."""
    ended = autoseg("run", "--input", place / "input.yaml", limit_s=LONGEST_S)
    for fault in ended.faults or ([f"exit code {ended.code}"] if ended.code else []):
        row.fault(fault, kills=done, said=ended.tail)
    actual = label_digests(place / "work_dir") | weight_digests(place / "work_dir")
    if other := differences(expected, actual):
        row.fault("not as the run that nobody killed", files=other[:8], kills=done)
    else:
        row.count("equal")
    if left := leftovers(place / "work_dir"):
        row.fault("leftovers", files=left[:20], kills=done)
    varying = (".claims/", "state/launch/")  # what the last process was; what workers print, who share work otherwise
    if odd := [n for n in files_of(place / "work_dir") ^ names if not any(c in n for c in varying) and n not in left]:
        row.fault("other files than the run that nobody killed", files=sorted(odd)[:20], kills=done)


# -- sweeps


def kill_sweeps(report: Report, folder: Path, kills: int, seed: int) -> None:
    make_data(folder / "fresh", num_cases=4, sweep=SWEEP)
    whole = copy_run(folder / "fresh", folder / "whole")
    begin = time.monotonic()
    ended = autoseg("sweep", "--input", whole / "input.yaml", limit_s=LONGEST_S)
    seconds = time.monotonic() - begin
    expected = trials_of(whole)
    with report.row("sweep") as row:
        for fault in ended.faults or ([f"exit code {ended.code}"] if ended.code else []):
            row.fault(f"unkilled: {fault}", said=ended.tail)
        for number in range(kills):
            place = copy_run(folder / "fresh", folder / "killed")
            row.tried += 1
            how = SIGNALS[number % len(SIGNALS)]
            started = Started("sweep", "--input", place / "input.yaml")
            what = f"sweep at {(number + 0.5) / kills:.0%}: {how}"
            if not started.ends_within((number + 0.5) / kills * seconds):
                started.send_signal({"KILL": signal.SIGKILL, "TERM": signal.SIGTERM}.get(how, signal.SIGINT))
                if how == "INT twice" and not started.ends_within(0.1):
                    started.send_signal(signal.SIGINT)
                started.wait()
                row.count(how)
            if "Traceback (most recent call last)" in started.stderr:
                row.fault("traceback", what_was_done=what, said=started.stderr[-3000:])
            ended = autoseg("sweep", "--input", place / "input.yaml", limit_s=LONGEST_S)
            for fault in ended.faults or ([f"exit code {ended.code}"] if ended.code else []):
                row.fault(fault, what_was_done=what, said=ended.tail)
            if trials_of(place) != expected:
                row.fault("other trials", what_was_done=what, expected=expected, trials=trials_of(place))
            else:
                row.count("equal")
            if left := leftovers(place / "work_dir"):
                row.fault("leftovers", what_was_done=what, files=left[:20])


def trials_of(place: Path) -> list[Any]:
    """Settings and result of each trial."""
    path = place / "work_dir" / "sweep" / "trials.json"
    if not path.exists():
        return []
    trials = json.loads(path.read_text())["trials"]
    return [[trial["settings"], trial["state"], trial["values"]] for trial in trials]
