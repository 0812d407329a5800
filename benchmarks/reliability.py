"""Campaigns against autoseg: kills, full disks, odd machines, damaged files, hostile names; for docs/reliability.md.

    python benchmarks/reliability.py fuzz                  # damaged images, settings, lists and work_dirs
    python benchmarks/reliability.py kills --kills 100
    python benchmarks/reliability.py disk                  # as root on a small tmpfs, else by a limit on files' sizes
    python benchmarks/reliability.py limits
    python benchmarks/reliability.py escapes               # needs Chromium

Each prints a table, writes JSON (--output), and ends with 1 where a promise was not kept. --tiny: seconds, for tests.
Same --seed, same mutations and moments.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]
os.environ["PYTHONPATH"] = str(ROOT)  # of the commands that are processes of their own: this autoseg, no other
os.environ.setdefault("OMP_NUM_THREADS", "1")

CAMPAIGNS = {
    "kills": "kill runs at moments spread over all stages and rounds; compare with one that was not killed",
    "disk": "fill the disk in every stage; make room; go on",
    "limits": "few open files, no /dev/shm, no HOME, a clock set back, two runs at once, closed streams, little memory",
    "fuzz": "damage images, labels, settings, lists and finished work_dirs",
    "escapes": "hostile names in every section of the report, in a browser, from a file and by --serve",
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(dest="campaign", required=True)
    for name, words in CAMPAIGNS.items():
        command = commands.add_parser(name, help=words, description=words)
        command.add_argument("--output", type=Path, default=Path(f"reliability_{name}.json"), help="JSON file to write")
        command.add_argument("--folder", type=Path, help="where to work, kept afterwards; else a temporary folder")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--tiny", action="store_true", help="the least of everything")
        command.add_argument(
            "--only", default="", help="parts of the campaign, by the beginnings of names, with commas"
        )
        if name == "kills":
            command.add_argument("--kills", type=int, help="kills of runs; 100")
            command.add_argument("--sweep_kills", type=int, help="kills of a sweep; 10")
        if name == "fuzz":
            command.add_argument("--images", type=int, help="damaged NIfTI files; 1000")
            command.add_argument("--settings", type=int, help="damaged input.yaml, and as many datalists; 250")
            command.add_argument("--work_dirs", type=int, help="damaged work_dirs; 500")
    return made


def main(words: list[str] | None = None) -> int:
    from campaigns.common import Report

    args = parser().parse_args(words)
    # A shell starts what it runs in the background with Ctrl-C ignored, and the attacked commands would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="autoseg-reliability-") as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        report = Report(args.campaign, {key: str(value) for key, value in vars(args).items() if value is not None})
        campaign = importlib.import_module(f"campaigns.{args.campaign}")
        campaign.go(report, folder.resolve(), args)
    report.write(args.output, time.monotonic() - begin)
    print(report.text())
    return 1 if report.broken else 0


if __name__ == "__main__":
    sys.exit(main())
