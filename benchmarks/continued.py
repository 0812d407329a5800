"""Does a model that knows a coarser task help on few cases? Continued, from scratch, and the most there is to gain.

python benchmarks/continued.py --data DATA/hippocampus --output OUT --seeds 0 1 2
python benchmarks/continued.py --output OUT --table

For each seed the cases of a data set are shuffled: 100 to begin with, 10 new ones, 10 to validate on, and the others,
which are scored. Four runs of SegResNet:

  source     the first 100, all classes merged into one, `--source_minutes`
  scratch    the 10 new ones with all classes, `--minutes`
  continued  the same from the source's weights, `init_weights: WORK_DIR`
  all        the 110 with all classes, for the minutes of source and continued together: what no continuing can pass
             by much, since it has the same images, the same time, and more labels

The scored cases are in no list; they are predicted afterwards and scored by plain NumPy. Each run writes
OUT/continued/<run>_seed<n>.json and is not done again. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pretrain import dice_by_case, labels_of
from train import autoseg, machine, written

from autoseg.evaluation.intervals import mean_interval
from autoseg.workspace.jobs import EpochLine
from autoseg.workspace.stored import read_stored_lines
from autoseg.workspace.workspace import Workspace

NUM_SOURCE, NUM_NEW, NUM_VALIDATION = 100, 10, 10
RUNS = ("source", "scratch", "continued", "all")
ALGO = "segresnet"


def write_input(folder: Path, data: Path, run: str, seed: int, minutes: float) -> tuple[Path, list[str]]:
    """The run's datalist and settings; the names of the files that are scored."""
    files = [p.name for p in sorted((data / "labelsTr").glob("[!.]*.nii.gz"))]
    order = [files[i] for i in np.random.default_rng(seed).permutation(len(files))]
    source, rest = order[:NUM_SOURCE], order[NUM_SOURCE:]
    new, rest = rest[:NUM_NEW], rest[NUM_NEW:]
    validation, scored = rest[:NUM_VALIDATION], rest[NUM_VALIDATION:]
    training = {"source": source, "all": [*source, *new]}.get(run, new)
    items = [
        {"image": f"imagesTr/{name}", "label": f"labelsTr/{name}", "fold": fold}
        for fold, names in enumerate((validation, training))
        for name in names
    ]
    labels = labels_of(data)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "datalist.json").write_text(json.dumps({"labels": labels, "training": items}))
    settings: dict[str, Any] = {
        "modality": "MRI",
        "datalist": "datalist.json",
        "dataroot": str(data.absolute()),
        "algos": [ALGO],
        "folds": [0],
        "seed": seed,
        "budget": f"{round(60 * minutes)}s",
        "ensemble": False,
    }
    if run == "source":
        settings["class_names"] = [{"name": "merged", "index": [int(k) for k in labels]}]
    if run == "continued":
        settings["init_weights"] = str(folder.parent / f"source_seed{seed}" / "work_dir")
    (folder / "input.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return folder / "input.yaml", scored


def run_one(output: Path, data: Path, run: str, seed: int, minutes: float) -> None:
    """Train, predict the scored cases, score them."""
    target = output / "continued" / f"{run}_seed{seed}.json"
    if target.exists():
        return
    folder = output / "work" / f"{run}_seed{seed}"
    path, scored = write_input(folder, data, run, seed, minutes)
    log, found = folder / "log.txt", machine()
    wall_s = autoseg("run", "--input", path, log=log)
    work = Workspace(folder / "work_dir")
    result: dict[str, Any] = {"run": run, "seed": seed, "minutes": minutes, "wall_s": round(wall_s, 1)}
    result["steps"] = read_stored_lines(work.job_dir(ALGO, 0).metrics, EpochLine)[-1].step
    if run != "source":
        (folder / "scored.txt").write_text("".join(f"{(data / 'imagesTr' / name).absolute()}\n" for name in scored))
        words = ("--image", folder / "scored.txt", "--work_dir", work.root, "--algo", ALGO, "--fold", "0")
        autoseg("predict", *words, "--output", folder / "predictions", log=log)
        dice = dice_by_case(folder / "predictions", data, [int(value) for value in labels_of(data)])
        if len(dice) != len(scored):
            raise SystemExit(f"{run}, seed {seed}: {len(dice)} of {len(scored)} cases were scored; see {log}")
        result |= {"dice": float(np.nanmean([np.nanmean(v) for v in dice.values()])), "by_case": dice}
    written(target, {**result, "machine": found})


def table(output: Path) -> str:
    """A line a run: Dice of each seed, the mean, and case by case what it gains over scratch."""
    results = [json.loads(path.read_text()) for path in sorted((output / "continued").glob("*.json"))]
    scratch = {r["seed"]: r for r in results if r["run"] == "scratch"}
    lines = ["| run | minutes | Dice | mean | over scratch | 95 % interval | steps |", "|---|---|---|---|---|---|---|"]
    for run in RUNS:
        mine = [r for r in results if r["run"] == run]
        if mine:
            lines.append(f"| {' | '.join([run, format(mine[0]['minutes'], 'g'), *_cells(mine, scratch)])} |")
    return "\n".join(lines)


def _cells(mine: Sequence[dict[str, Any]], scratch: dict[int, dict[str, Any]]) -> list[str]:
    steps = ", ".join(str(r["steps"]) for r in mine)
    if "dice" not in mine[0]:
        return ["", "", "", "", steps]
    cells = [", ".join(f"{r['dice']:.4f}" for r in mine), f"{statistics.mean(r['dice'] for r in mine):.4f}"]
    pairs = [
        (name, float(np.nanmean(scores) - np.nanmean(scratch[r["seed"]]["by_case"][name])))
        for r in mine
        for name, scores in r["by_case"].items()
        if r["seed"] in scratch
    ]
    if mine[0]["run"] == "scratch" or not pairs:
        return [*cells, "", "", steps]
    low, high = mean_interval([[gain] for _, gain in pairs], [name for name, _ in pairs])
    gain = statistics.mean(gain for _, gain in pairs)
    return [*cells, f"{gain:+.4f}", f"{low:+.4f} to {high:+.4f}", steps]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--source_minutes", type=float, default=4.0)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="show what is there, run nothing")
    a = parser.parse_args()
    minutes = {"source": a.source_minutes, "all": a.source_minutes + a.minutes}
    for seed in () if a.table else a.seeds:
        for run in RUNS:
            run_one(a.output.absolute(), a.data.absolute(), run, seed, minutes.get(run, a.minutes))
    print(table(a.output.absolute()))


if __name__ == "__main__":
    main()
