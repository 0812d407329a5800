"""Sweeps on phantoms: what pruning saves, what kills cost, what workers gain.

python benchmarks/sweep.py found     # 30 trials against the planner's own setting, epochs spent
python benchmarks/sweep.py killed    # 30 trials, killed five times
python benchmarks/sweep.py workers   # trials of one and of four workers, one thread each, no pruning
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import yaml

from autoseg.data.phantoms import make_phantoms

TRIALS, EPOCHS, KILLS = 30, 20, 5
RANGES = {
    "learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
    "weight_decay": {"low": 1e-6, "high": 1e-2, "log": True},
    "foreground_fraction": {"low": 0.2, "high": 1.0},
    "loss": {"choices": ["dice_ce", "dice_focal"]},
    "segresnet.init_filters": {"choices": [8, 12]},
}
SMALL = {
    "precision": "fp32",
    "device": "cpu",
    "num_workers": 1,
    "algos": ["segresnet"],
    "num_epochs": EPOCHS,
    "num_steps_per_epoch": 4,
    "num_epochs_per_validation": 1,
    "batch_size": 1,
    "overlap": 0.25,
    "segresnet": {"blocks_down": [1, 1], "roi_size": [16, 16, 16]},
}


def prepare(folder: Path, **sweep: object) -> Path:
    path = make_phantoms(folder, num_cases=8, num_testing=0, shape=(26, 24, 24), num_fold=4)
    settings = {**SMALL, "sweep": {"parameters": RANGES, "trials": TRIALS, **sweep}}
    path.write_text(path.read_text() + yaml.safe_dump(settings))
    return path


def command(path: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "autoseg", "sweep", "--input", str(path), *words]


def records(folder: Path) -> list[dict]:  # type: ignore[type-arg]
    found: list[dict] = json.loads((folder / "work_dir" / "sweep" / "trials.json").read_text())["trials"]  # type: ignore[type-arg]
    return found


def report(folder: Path, trials: int = TRIALS) -> None:
    found = records(folder)
    print(f"{len(found)} trials: {dict(Counter(t['state'] for t in found))}")
    distinct = len({json.dumps(t["settings"], sort_keys=True) for t in found})
    epochs = sum(t["epochs"] for t in found)
    print(
        f"{distinct} different settings; {epochs} epochs, {epochs / (trials * EPOCHS):.0%} of {trials} full trainings"
    )
    assert len(found) == trials == distinct
    assert {t["state"] for t in found} <= {"complete", "pruned"}


def found(folder: Path) -> None:
    begin = time.time()
    subprocess.run(command(prepare(folder)), check=True, env=one_thread())
    print(f"{time.time() - begin:.0f} s")
    report(folder)
    planner, *others = records(folder)
    best = max((t for t in [planner, *others] if t["state"] == "complete"), key=lambda t: t["values"][0])
    values = planner["values"] or [max(planner["curve"].values(), default=0.0)]
    print(f"planner's own ({planner['state']}) {values[0]:.4f}, best {best['values'][0]:.4f}: {best['settings']}")


def killed(folder: Path) -> None:
    path, rng = prepare(folder), random.Random(0)
    for kill in range(KILLS):
        process = subprocess.Popen(
            command(path), env=one_thread(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(rng.uniform(8, 16))
        assert process.poll() is None, "over before it was killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        print(f"kill {kill + 1}: {len(list((folder / 'work_dir' / 'sweep').glob('trial_*')))} trials begun", flush=True)
    subprocess.run(command(path), check=True, env=one_thread())
    report(folder)


def workers(folder: Path) -> None:
    seconds = {}
    for count, trials in ((1, 8), (4, 16)):
        own = folder / str(count)
        path = prepare(own, pruner="none")
        subprocess.run([sys.executable, "-m", "autoseg", "analyze", "--input", str(path)], check=True)
        begin = time.time()
        subprocess.run(
            command(path, "--trials", str(trials), "--sweep.workers", str(count)), check=True, env=one_thread()
        )
        seconds[count] = (time.time() - begin) / trials
        print(f"{count} workers: {trials} trials, {seconds[count]:.2f} s a trial, start included", flush=True)
        report(own, trials)
    print(f"four workers do {seconds[1] / seconds[4]:.2f} times the trials of one")


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("found", "killed", "workers"))
    with tempfile.TemporaryDirectory() as folder:
        {"found": found, "killed": killed, "workers": workers}[parser.parse_args().what](Path(folder))


if __name__ == "__main__":
    main()
