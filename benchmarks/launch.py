"""Many jobs, many devices, none lost: phantoms, small networks, one CPU thread a job.

python benchmarks/launch.py busy   # 15 jobs on two CPU slots: how long each slot was busy
python benchmarks/launch.py ray    # 15 jobs on a two-node Ray cluster faked here, one node killed in the middle
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import yaml

from autoseg.data.phantoms import make_phantoms

ROOT = Path(__file__).resolve().parents[1]
FOLDS, ALGOS = 5, ("segresnet", "swinunetr", "dints")
SMALL = {
    "precision": "fp32",
    "device": "cpu",
    "cpus_per_job": 1,
    "num_workers": 1,
    "batch_size": 1,
    "num_epochs": 20,
    "num_steps_per_epoch": 4,
    "num_epochs_per_validation": 10,
    "segresnet": {"init_filters": 8, "blocks_down": [1, 1, 1], "roi_size": [24, 24, 24]},
    "swinunetr": {"feature_size": 12, "roi_size": [32, 32, 32], "num_epochs": 4},
    "dints": {"channel_mul": 0.25, "roi_size": [32, 32, 32], "num_epochs": 4},
}


def prepare(folder: Path, **settings: object) -> Path:
    """Phantoms in five folds, analyzed and planned."""
    path = make_phantoms(folder, num_cases=10, num_testing=0, shape=(26, 24, 24), num_fold=FOLDS)
    path.write_text(path.read_text() + yaml.safe_dump({**SMALL, **settings}))
    for stage in ("analyze", "generate"):
        subprocess.run([sys.executable, "-m", "autoseg", stage, "--input", str(path)], check=True)
    return path


def spans(work: Path) -> list[tuple[str, str, float, float]]:
    """(job, device, begin, end) of each job from the run's log and files."""
    begins, found = {}, []
    for line in (work / "run.log").read_text().splitlines():
        if match := re.match(r"(\S+ \S+) (\w+_\d): starting on (\S+)", line):
            begins[match[2]] = (match[3], time.mktime(time.strptime(match[1], "%Y-%m-%d %H:%M:%S")))
    for name, (device, begin) in begins.items():
        found.append((name, device, begin, (work / name / "job.json").stat().st_mtime))
    return found


def check(work: Path) -> None:
    """Every job done, none twice to its end, none gone back behind its checkpoint."""
    jobs = sorted(work.glob("*_[0-9]/job.json"))
    states = [json.loads(p.read_text())["state"] for p in jobs]
    ends = [len(re.findall(r"after \d+ steps", (p.parent / "train.log").read_text())) for p in jobs]
    resumed = [p.parent.name for p in jobs if "going on after" in (p.parent / "train.log").read_text()]
    whole = [p.parent.name for p in jobs if not _whole(p.parent)]
    print(f"{len(jobs)} jobs: {states.count('done')} done; runs to the end a job: {sorted(set(ends))}")
    print(
        f"gone on from a checkpoint: {', '.join(resumed) or 'none'}; with gaps or repeats in metrics: {whole or 'none'}"
    )
    assert states == ["done"] * FOLDS * len(ALGOS)
    assert set(ends) == {1}
    assert not whole


def _whole(job: Path) -> bool:
    epochs = [json.loads(line)["epoch"] for line in (job / "metrics.jsonl").read_text().splitlines()]
    return epochs == list(range(1, len(epochs) + 1))


def busy(folder: Path) -> None:
    path = prepare(folder, jobs_per_device=2)
    begin = time.time()
    subprocess.run([sys.executable, "-m", "autoseg", "train", "--input", str(path)], check=True)
    print(f"{time.time() - begin:.0f} s in all")
    work = folder / "work_dir"
    check(work)
    found = spans(work)
    first = min(s[2] for s in found)
    longer = max(s[3] for s in found) - first
    for device in sorted({s[1] for s in found}):
        own = [s for s in found if s[1] == device]
        worked, last = sum(e - b for *_, b, e in own), max(s[3] for s in own) - first
        print(f"{device}: {len(own)} jobs, busy {worked:.0f} s, its last ended after {last:.0f} s")
    total = sum(e - b for *_, b, e in found)
    print(f"both together busy {total / (2 * longer):.1%} of the longer one's {longer:.0f} s")


def ray(folder: Path) -> None:
    import ray as ray_package
    from ray.cluster_utils import Cluster

    from autoseg.pipeline.run import run_input

    path = prepare(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    victim, _ = cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)
    work = folder / "work_dir"

    def kill_in_the_middle() -> None:
        while sum(json.loads(p.read_text())["state"] == "done" for p in work.glob("*_[0-9]/job.json")) < 7:
            time.sleep(0.2)
        time.sleep(4)
        running = [
            p.parent.name for p in work.glob("*_[0-9]/job.json") if json.loads(p.read_text())["state"] == "running"
        ]
        print(f"killing a node; running: {', '.join(running)}", flush=True)
        cluster.remove_node(victim, allow_graceful=False)

    threading.Thread(target=kill_in_the_middle, daemon=True).start()
    begin = time.time()
    code = run_input(("train",), path, {"launcher": "ray", "address": cluster.address})
    print(f"{time.time() - begin:.0f} s, exit code {code}")
    ray_package.shutdown()
    cluster.shutdown()
    check(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("busy", "ray"))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("ray").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        {"busy": busy, "ray": ray}[parser.parse_args().what](Path(folder))


if __name__ == "__main__":
    main()
