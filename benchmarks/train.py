"""The training engine on the hippocampus set: throughput, Dice at a budget, budgets kept; on a CPU or a GPU.

python benchmarks/train.py throughput --hippocampus DATA --output OUT          # whole loop over the bare step
python benchmarks/train.py accuracy --hippocampus DATA --output OUT            # every algorithm and budget, 3 seeds
python benchmarks/train.py accuracy --hippocampus DATA --output OUT --algos segresnet --budgets 5m --seeds 0 \
    --label lr4e-3 --set learning_rate=4e-3 --set ema_decay=0.998              # one experiment
python benchmarks/train.py run --hippocampus DATA --output OUT --budget 2h     # three algorithms, five folds
python benchmarks/train.py gpu --hippocampus DATA --output OUT                 # 5 minutes each, with the GPU watched
python benchmarks/train.py table --output OUT                                  # what is there, as tables

Fold 0 of `autoseg init`, seed 0: 160 cases to train on, 40 to score on. Each part writes OUT/<part>/<name>.json when it
is done and is not done again; one that was stopped goes on from its checkpoint, but its wall time is then not that of
one process and is marked so. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

ALGOS = ("segresnet", "swinunetr", "dints")
BUDGETS = ("3m", "5m", "10m", "30m")
ROUNDS, ROUND_STEPS = 7, 6
"""Rounds of the throughput measurement, bare and whole in turns, and steps of each."""
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_of(budget: str) -> float:
    return float(budget[:-1]) * SECONDS[budget[-1]]


def machine() -> dict[str, Any]:
    import torch

    import autoseg

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next(
            (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu
        )
    return {
        "autoseg": autoseg.__version__,
        "torch": torch.__version__,
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "load_before": round(os.getloadavg()[0], 2),
    }


def autoseg(*words: str | Path, log: Path) -> float:
    """Run a command of autoseg; its wall time with the start of the process. Its output is added to a file."""
    begin = time.monotonic()
    with open(log, "a") as file:
        done = subprocess.run(
            [sys.executable, "-m", "autoseg", *map(str, words)], stdout=file, stderr=file, check=False
        )
    if done.returncode != 0:
        raise SystemExit(f"autoseg {' '.join(map(str, words))} ended with {done.returncode}; see {log}")
    return time.monotonic() - begin


def prepare(folder: Path, data: Path) -> Path:
    """input.yaml and the analysis for a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    if not (folder / "input.yaml").exists():
        autoseg("init", data, "--output", folder, log=log)
    autoseg("analyze", "--input", folder / "input.yaml", log=log)
    return folder / "input.yaml"


def dice_of_files(predictions: Path, labels: Path) -> list[float]:
    """Mean Dice of each class over cases by plain NumPy, from the label files as written; independent of autoseg."""
    scores = []
    for path in sorted(predictions.glob("*.nii.gz")):
        pred, truth = (np.rint(np.asanyarray(nib.load(p).dataobj)) for p in (path, labels / path.name))
        row = []
        for value in (1, 2):
            a, b = pred == value, truth == value
            row.append(2 * (a & b).sum() / (a.sum() + b.sum()) if a.any() or b.any() else np.nan)
        scores.append(row)
    return [round(float(v), 4) for v in np.nanmean(np.array(scores), axis=0)]


def written(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)
    print(json.dumps(result), flush=True)


# -- throughput


def throughput(data: Path, output: Path, algos: tuple[str, ...]) -> None:
    """Samples per second of the whole loop (cut, augment, step, average) over those of the bare step."""
    from autoseg.data.datalists.datalist import read_datalist
    from autoseg.hardware.device import finish, pick_device
    from autoseg.plan import read_plan
    from autoseg.training.cache import load_cases
    from autoseg.training.step import bare_step
    from autoseg.training.trainer import Trainer
    from autoseg.workspace.jobs import JobDir
    from autoseg.workspace.workspace import Workspace

    for algo in algos:
        target = output / "throughput" / f"{algo}.json"
        if target.exists():
            continue
        folder = output / "work" / "throughput"
        path = prepare(folder, data)
        autoseg("generate", "--input", path, "--algos", algo, "--folds", "0", log=folder / "log.txt")
        workspace = Workspace(folder / "work_dir")
        device = pick_device()
        plan = read_plan(workspace.job_dir(algo, 0)).model_copy(update={"augment": "default"})
        cases = read_datalist(workspace.datalist, data).train_cases(0)
        cached = load_cases(workspace.cache, plan, cases, num_workers=2)
        whole = Trainer(plan, cached, cached[:1], JobDir(folder / "scratch"), device=device)
        steps = {"bare": bare_step(plan, device, plan.channels_last), "whole": whole.train_step}
        times: dict[str, list[float]] = {"bare": [], "whole": []}
        for round_ in range(ROUNDS + 1):
            for name, step in steps.items():
                finish(device)
                begin = time.perf_counter()
                for _ in range(ROUND_STEPS):
                    step()
                finish(device)
                if round_:  # the first warms both up
                    times[name].append((time.perf_counter() - begin) / ROUND_STEPS)
        bare_s, whole_s = (statistics.median(times[n]) for n in ("bare", "whole"))
        written(
            target,
            {
                "algo": algo,
                "roi": plan.roi_size,
                "batch": plan.batch_size,
                "augment": plan.augment,
                "bare_samples_per_s": round(plan.batch_size / bare_s, 3),
                "whole_samples_per_s": round(plan.batch_size / whole_s, 3),
                "share": round(bare_s / whole_s, 4),
                "shares_of_rounds": [round(b / w, 4) for b, w in zip(times["bare"], times["whole"], strict=True)],
                "machine": machine(),
            },
        )


# -- accuracy


class GpuWatch:
    """Utilisation and memory of the GPU while a block runs, by nvidia-smi twice a second; nothing without one."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float]] = []
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> GpuWatch:
        if shutil.which("nvidia-smi"):
            query = [
                "--query-gpu=utilization.gpu,memory.used",
                "--format=csv,noheader,nounits",
                "-lms",
                "500",
                "-i",
                "0",
            ]
            self.process = subprocess.Popen(["nvidia-smi", *query], stdout=subprocess.PIPE, text=True)
            threading.Thread(target=self._read, daemon=True).start()
        return self

    def _read(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                use, memory = (float(v) for v in next(csv.reader(io.StringIO(line))))
            except (ValueError, StopIteration):
                continue
            self.rows.append((use, memory / 1024))

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()

    def result(self) -> dict[str, float]:
        if not self.rows:
            return {}
        busy = [use for use, _ in self.rows]
        return {
            "gpu_use_median_percent": statistics.median(busy),
            "gpu_use_mean_percent": round(statistics.mean(busy), 1),
            "gpu_memory_peak_gib": round(max(m for _, m in self.rows), 2),
        }


def train_once(
    part: str, data: Path, output: Path, algo: str, budget: str, seed: int, label: str, settings: dict[str, str]
) -> None:
    name = "_".join(str(w) for w in (algo, budget, f"seed{seed}", label) if w != "")
    target = output / part / f"{name}.json"
    if target.exists():
        return
    folder = output / "work" / f"{part}_{name}"
    resumed = (folder / "work_dir" / f"{algo}_0" / "metrics.jsonl").exists()
    path = prepare(folder, data)
    found = machine()
    flags = [word for key, value in {"seed": str(seed), **settings}.items() for word in (f"--{key}", value)]
    words: list[str | Path] = ["train", "--input", path, "--algo", algo, "--fold", "0", "--budget", budget, *flags]
    with GpuWatch() as watch:
        wall_s = autoseg(*words, log=folder / "log.txt")
    job_folder = folder / "work_dir" / f"{algo}_0"
    job = json.loads((job_folder / "job.json").read_text())
    curve = [json.loads(line) for line in (job_folder / "metrics.jsonl").read_text().splitlines()]
    import yaml

    plan = yaml.safe_load((job_folder / "configs" / "hyper_parameters.yaml").read_text())
    classes = dice_of_files(job_folder / "validation", data / "labelsTr")
    keys = ("network", "roi_size", "batch_size", "learning_rate", "augment", "step_s", "ema_decay", "schedule")
    network = {k: v for k, v in plan["network"].items() if k not in ("paths", "operations", "nodes")}
    written(
        target,
        {
            "algo": algo,
            "budget": budget,
            "seed": seed,
            "label": label,
            "settings": settings,
            "dice": round(float(np.mean(classes)), 4),
            "dice_of_classes": classes,
            "own_dice": round(job["dice"], 4),
            "steps": curve[-1]["step"],
            "wall_s": round(wall_s, 1),
            "wall_over_budget": None if resumed else round(wall_s / seconds_of(budget) - 1, 4),
            "job_s": round(job["seconds"], 1),
            "memory_gib": job["memory_gib"] and round(job["memory_gib"], 2),
            "memory_planned_gib": plan["memory_gib"],
            **watch.result(),
            "plan": {**{k: plan[k] for k in keys}, "network": network},
            "curve": [[c["step"], c["seconds"], c["val_dice"]] for c in curve if c["val_dice"] is not None],
            "command": "autoseg " + " ".join(str(w) for w in words if w != path and w != "--input"),
            "machine": found,
        },
    )


def whole_run(data: Path, output: Path, budget: str, label: str, settings: dict[str, str]) -> None:
    """Three algorithms, five folds, one budget: out-of-fold Dice of each and of the ensemble."""
    from autoseg.workspace.workspace import Workspace

    target = output / "run" / f"{budget}{'_' + label if label else ''}.json"
    if target.exists():
        return
    folder = output / "work" / f"run_{budget}{label}"
    folder.mkdir(parents=True, exist_ok=True)
    resumed = (folder / "work_dir").exists()
    if not (folder / "input.yaml").exists():
        autoseg("init", data, "--output", folder, log=folder / "log.txt")
    found = machine()
    flags = [word for key, value in settings.items() for word in (f"--{key}", value)]
    wall_s = autoseg("run", "--input", folder / "input.yaml", "--budget", budget, *flags, log=folder / "log.txt")
    work = folder / "work_dir"
    jobs = {p.parent.name: json.loads(p.read_text()) for p in sorted(work.glob("*_[0-9]/job.json"))}
    scores = json.loads((work / "ensemble" / "scores.json").read_text())
    classes = dice_of_files(work / "ensemble" / "out_of_fold" / "ensemble", data / "labelsTr")
    written(
        target,
        {
            "budget": budget,
            "settings": settings,
            "dice_of_ensemble": round(float(np.mean(classes)), 4),
            "dice_of_classes": classes,
            "chosen": scores["chosen"],
            "jobs": {n: {k: j[k] for k in ("state", "dice", "seconds")} for n, j in jobs.items()},
            "budget_state": json.loads(Workspace(work).budget.read_text()),
            "wall_s": round(wall_s, 1),
            "wall_over_budget": None if resumed else round(wall_s / seconds_of(budget) - 1, 4),
            "machine": found,
        },
    )
    print((work / "ensemble" / "scores.txt").read_text())


def table(output: Path) -> None:
    """All that is there, as Markdown."""
    for path in sorted(output.glob("throughput/*.json")):
        r = json.loads(path.read_text())
        print(f"{r['algo']}: {r['whole_samples_per_s']} of {r['bare_samples_per_s']} samples/s = {r['share']:.3f}")
    rows: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for part in ("accuracy", "gpu"):
        for path in sorted(output.glob(f"{part}/*.json")):
            r = json.loads(path.read_text())
            rows.setdefault((r["algo"], r["budget"], r["label"]), []).append(r)
    if rows:
        print("\n| | budget | setting | Dice of each run | mean | steps | wall over budget |")
        print("|---|---|---|---|---|---|---|")
    for (algo, budget, label), found in sorted(rows.items(), key=lambda i: (i[0][0], seconds_of(i[0][1]), i[0][2])):
        dice = [r["dice"] for r in found]
        over = ", ".join("resumed" if r["wall_over_budget"] is None else f"{r['wall_over_budget']:+.1%}" for r in found)
        steps = ", ".join(str(r["steps"]) for r in found)
        each = ", ".join(f"{d:.4f}" for d in dice)
        print(f"| {algo} | {budget} | {label} | {each} | {statistics.mean(dice):.4f} | {steps} | {over} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("throughput", "accuracy", "run", "gpu", "table"))
    parser.add_argument("--hippocampus", type=Path, help="folder of Task04 with imagesTr and labelsTr")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--algos", default=",".join(ALGOS))
    parser.add_argument("--budgets", default=",".join(BUDGETS))
    parser.add_argument("--budget", default="2h", help="of the part run")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--label", default="", help="name of an experiment")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of autoseg; repeatable"
    )
    a = parser.parse_args()
    if a.part != "table" and a.hippocampus is None:
        parser.error("--hippocampus is needed")
    settings = dict(item.split("=", 1) for item in a.set)
    if settings and not a.label:
        parser.error("--set needs a --label, which names the result")
    algos = tuple(a.algos.split(","))
    output: Path = a.output.absolute()
    if a.part == "table":
        table(output)
        return
    data: Path = a.hippocampus.absolute()
    if a.part == "throughput":
        throughput(data, output, algos)
    elif a.part == "run":
        whole_run(data, output, a.budget, a.label, settings)
    else:
        budgets = a.budgets.split(",") if a.part == "accuracy" or a.budgets != ",".join(BUDGETS) else ["5m"]
        for seed in map(int, a.seeds.split(",")):
            for budget in budgets:
                for algo in algos:
                    train_once(a.part, data, output, algo, budget, seed, a.label, settings)
        table(output)


if __name__ == "__main__":
    main()
