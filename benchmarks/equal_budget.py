"""autoseg and nnU-Net on the same split with the same time on the same machine, side by side.

python benchmarks/equal_budget.py --hippocampus DATA --output OUT --venv_nn VENV --tools TOOLS/nnunet --minutes 10,60

Fold 0 of `autoseg init`: 160 cases to train on, 40 to predict and score. autoseg's budget covers the whole process of
`autoseg train`: start, cache, training, predicting and scoring the 40 cases. nnU-Net's covers training alone: planning,
preprocessing and prediction are free. Its schedule is set so that it ends within the budget, by the seconds an
iteration took in a probe. Three ways of it are run: as planned; with the allocator settings that autoseg gives itself;
and those with a batch of 2. Each is predicted with and without mirroring; its best counts.

VENV holds nnunetv2 2.8 (TOOLS/README.md says how to make it). TOOLS holds nnUNetTrainerBudget.py, nnU-Net's own trainer
with the length of its schedule from the environment. Every part writes OUT/equal/<name>.json and is not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
from train import dice_of_files, machine, prepare, train_once, written

DATASET = "Dataset004_Hippocampus"
EPOCHS = 12
"""Epochs that nnU-Net's iterations are divided into: its rate falls once an epoch."""
PROBE_ITERATIONS = 6
VALIDATION_SHARE = 0.2
"""Of an iteration: the validation iteration that each epoch has; 0.12 were measured."""
START_S = 25.0
"""Seconds of the budget left for nnU-Net's start; what it really takes is in the wall time."""
MALLOC = {
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}
WAYS: dict[str, tuple[str, dict[str, str]]] = {
    "planned": ("nnUNetPlans", {}),
    "malloc": ("nnUNetPlans", MALLOC),
    "batch2": ("nnUNetPlansB2", MALLOC),
}
"""Name -> plans, environment."""


class NnUNet:
    """nnU-Net in its own environment."""

    def __init__(self, venv: Path, tools: Path, root: Path) -> None:
        self.venv, self.tools, self.root = venv, tools, root
        cores = str(os.cpu_count())
        self.env = {
            **os.environ,
            **{f"nnUNet_{name}": str(root / name) for name in ("raw", "preprocessed", "results")},
            "nnUNet_compile": "f",
            "nnUNet_n_proc_DA": "2",
            "OMP_NUM_THREADS": cores,
            "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
        }
        self.env.pop("PYTHONPATH", None)

    def call(self, *words: str, **env: str) -> float:
        begin = time.monotonic()
        log = self.root / "log.txt"
        with open(log, "a") as file:
            file.write(f"$ {' '.join(words)}\n")
            file.flush()
            command = [str(self.venv / "bin" / words[0]), *words[1:]]
            done = subprocess.run(command, env={**self.env, **env}, stdout=file, stderr=file, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(words)} ended with {done.returncode}; see {log}")
        return time.monotonic() - begin

    def set_up(self) -> None:
        """Put the budget trainer where nnU-Net looks, and mend torchvision where TOOLS has a script for it."""
        packages = next((self.venv / "lib").glob("python3.*")) / "site-packages"
        target = packages / "nnunetv2" / "training" / "nnUNetTrainer" / "variants" / "training_length"
        shutil.copy(self.tools / "nnUNetTrainerBudget.py", target)
        works = [str(self.venv / "bin" / "python"), "-c", "import torchvision"]
        mend = self.tools / "fix_torchvision.sh"
        if subprocess.run(works, env=self.env, capture_output=True, check=False).returncode != 0 and mend.exists():
            subprocess.run(["bash", str(mend)], env={**self.env, "VENV_NN": str(self.venv)}, check=True)

    def prepare(self, data: Path, validation: list[str]) -> None:
        """Data set, fingerprint, plans and preprocessing; a second plan with a batch of 2."""
        if (self.root / "prepared").exists():
            return
        raw = self.root / "raw" / DATASET
        shutil.rmtree(raw, ignore_errors=True)
        for name in ("imagesTr", "labelsTr", "imagesTs"):
            (raw / name).mkdir(parents=True)
        train = [p for p in sorted((data / "labelsTr").glob("*.nii.gz")) if not p.name.startswith(".")]
        count = 0
        for label in train:
            image, stem = data / "imagesTr" / label.name, label.name.removesuffix(".nii.gz")
            if label.name in validation:
                shutil.copy(image, raw / "imagesTs" / f"{stem}_0000.nii.gz")
                continue
            count += 1
            shutil.copy(image, raw / "imagesTr" / f"{stem}_0000.nii.gz")
            shutil.copy(label, raw / "labelsTr" / label.name)
        what = {
            "channel_names": {"0": "MRI"},
            "labels": {"background": 0, "Anterior": 1, "Posterior": 2},
            "numTraining": count,
            "file_ending": ".nii.gz",
        }
        (raw / "dataset.json").write_text(json.dumps(what))
        self.call("nnUNetv2_plan_and_preprocess", "-d", "4", "-c", "3d_fullres", "-np", "2", "-npfp", "2")
        folder = self.root / "preprocessed" / DATASET
        plans = json.loads((folder / "nnUNetPlans.json").read_text())
        plans["plans_name"] = "nnUNetPlansB2"
        plans["configurations"]["3d_fullres"]["batch_size"] = 2
        (folder / "nnUNetPlansB2.json").write_text(json.dumps(plans, indent=1))
        (self.root / "prepared").write_text("done\n")

    def train(self, way: str, epochs: int, iterations: int) -> tuple[float, dict[str, Any]]:
        """Train from the start; wall time and the trainer's own times."""
        plans, env = WAYS[way]
        out = self.root / f"times_{way}.json"
        out.unlink(missing_ok=True)
        length = {"NNB_EPOCHS": str(epochs), "NNB_ITERS": str(iterations), "NNB_VAL": "1", "NNB_OUT": str(out)}
        shutil.rmtree(self._model(plans), ignore_errors=True)
        words = (
            "nnUNetv2_train",
            "4",
            "3d_fullres",
            "all",
            "-p",
            plans,
            "-tr",
            "nnUNetTrainerBudget",
            "-device",
            "cpu",
        )
        wall_s = self.call(*words, **length, **env)
        return wall_s, json.loads(out.read_text())

    def predict(self, way: str, target: Path, *, mirror: bool) -> float:
        plans, env = WAYS[way]
        words = [
            "nnUNetv2_predict",
            "-d",
            "4",
            "-c",
            "3d_fullres",
            "-f",
            "all",
            "-p",
            plans,
            "-tr",
            "nnUNetTrainerBudget",
        ]
        words += ["-i", str(self.root / "raw" / DATASET / "imagesTs"), "-o", str(target), "-device", "cpu"]
        shutil.rmtree(target, ignore_errors=True)
        return self.call(*words, *([] if mirror else ["--disable_tta"]), **env)

    def _model(self, plans: str) -> Path:
        return self.root / "results" / DATASET / f"nnUNetTrainerBudget__{plans}__3d_fullres"


def nnunet(nn: NnUNet, data: Path, output: Path, minutes: float, way: str) -> None:
    target = output / "equal" / f"nnunet_{minutes:g}m_{way}.json"
    if target.exists():
        return
    probe = output / "equal" / f"nnunet_probe_{way}.json"
    if not probe.exists():
        _, times = nn.train(way, 1, PROBE_ITERATIONS)
        found = {"iteration_s": round(statistics.median(times["iter_s"]), 3), "iterations_s": times["iter_s"]}
        written(probe, {**found, "machine": machine()})
    step_s = json.loads(probe.read_text())["iteration_s"]
    iterations = max(1, math.floor((60 * minutes - START_S) / (EPOCHS * step_s) - VALIDATION_SHARE))
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
    cases = json.loads((path.parent / "datalist.json").read_text())["training"]
    validation = [Path(c["image"]).name for c in cases if c["fold"] == 0]
    # The virtual environment's own path, not where its links lead.
    nn = NnUNet(Path(os.path.abspath(a.venv_nn)), a.tools.absolute(), output / "work" / "nnunet")
    nn.root.mkdir(parents=True, exist_ok=True)
    nn.set_up()
    nn.prepare(data, validation)
    for m in minutes:
        for seed in a.seeds.split(","):
            train_once("equal", data, output, "segresnet", f"{m:g}m", int(seed), "", {})
        for way in a.ways.split(","):
            nnunet(nn, data, output, m, way)
    table(output, minutes)


if __name__ == "__main__":
    main()
