"""autoseg and nnU-Net on the same split with the same time on the same machine, side by side.

python benchmarks/equal_budget.py --hippocampus DATA --output OUT --venv_nn VENV --tools TOOLS/nnunet --minutes 10,60

Fold 0 of `autoseg init`: 160 cases to train on, 40 to predict and score. autoseg's budget covers the whole process of
`autoseg train`: start, cache, training, predicting and scoring the 40 cases. nnU-Net's covers training alone: planning,
preprocessing and prediction are free. Its schedule is set so that it ends within the budget, by the seconds an
iteration took in a probe. Three ways of it are run: as planned; with the allocator settings that autoseg gives itself;
and those with a batch of 2. Each is predicted with and without mirroring; its best counts.

VENV and TOOLS are as nnunet.py says. Every part writes OUT/equal/<name>.json and is not done again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from nnunet import EPOCHS, WAYS, Case, NnUNet
from train import dice_of_files, machine, prepare, train_once, written


def nnunet(nn: NnUNet, data: Path, output: Path, minutes: float, way: str) -> None:
    target = output / "equal" / f"nnunet_{minutes:g}m_{way}.json"
    if target.exists():
        return
    iterations, _ = nn.iterations_for(way, minutes)
    found = machine()
    wall_s, times = nn.train(way, EPOCHS, iterations)
    result: dict[str, Any] = {
        "tool": "nnU-Net",
        "way": way,
        "minutes": minutes,
        "iterations": EPOCHS * iterations,
        "training_wall_s": round(wall_s, 1),
        "iteration_s": round(statistics.median(times["iter_s"]), 3),
    }
    for mirror in (True, False):
        folder = nn.root / "predictions" / f"{minutes:g}m_{way}_{'tta' if mirror else 'plain'}"
        predict_s = nn.predict(way, folder, mirror=mirror)
        classes = dice_of_files(folder, data / "labelsTr")
        name = "tta" if mirror else "plain"
        result[name] = {"dice": round(float(np.mean(classes)), 4), "classes": classes, "predict_s": round(predict_s, 1)}
    result["dice"] = max(result["tta"]["dice"], result["plain"]["dice"])
    written(target, {**result, "machine": found})


def table(output: Path, minutes: list[float]) -> None:
    print("| | minutes | Dice | steps | wall s |\n|---|---|---|---|---|")
    for m in minutes:
        for path in sorted(output.glob(f"equal/segresnet_{m:g}m_seed*.json")):
            r = json.loads(path.read_text())
            print(f"| autoseg SegResNet, seed {r['seed']} | {m:g} | {r['dice']:.4f} | {r['steps']} | {r['wall_s']} |")
        for path in sorted(output.glob(f"equal/nnunet_{m:g}m_*.json")):
            r = json.loads(path.read_text())
            print(f"| nnU-Net, {r['way']} | {m:g} | {r['dice']:.4f} | {r['iterations']} | {r['training_wall_s']} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hippocampus", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--venv_nn", type=Path, required=True)
    parser.add_argument("--tools", type=Path, required=True)
    parser.add_argument("--minutes", default="10,60")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--seeds", default="0")
    a = parser.parse_args()
    data, output = a.hippocampus.absolute(), a.output.absolute()
    minutes = [float(m) for m in a.minutes.split(",")]
    path = prepare(output / "work" / "equal_split", data)
    listed = json.loads((path.parent / "datalist.json").read_text())["training"]
    validation = {Path(c["image"]).name for c in listed if c["fold"] == 0}
    nn = NnUNet(a.venv_nn, a.tools, output / "work" / "nnunet")
    nn.set_up()
    names = [p.name for p in sorted((data / "labelsTr").glob("*.nii.gz")) if not p.name.startswith(".")]
    cases = [
        Case(name=n.removesuffix(".nii.gz"), image=data / "imagesTr" / n, label=data / "labelsTr" / n) for n in names
    ]
    nn.prepare(
        [c for c in cases if c.label.name not in validation],
        [c for c in cases if c.label.name in validation],
        {"Anterior": 1, "Posterior": 2},
        ["MRI"],
    )
    for m in minutes:
        for seed in a.seeds.split(","):
            train_once("equal", data, output, "segresnet", f"{m:g}m", int(seed), "", {})
        for way in a.ways.split(","):
            nnunet(nn, data, output, m, way)
    table(output, minutes)


if __name__ == "__main__":
    main()
