"""nnU-Net 2.8 as a rival on this machine: a data set prepared, trained for a time, predicted; in its own environment.

VENV holds nnunetv2 2.8. TOOLS holds nnUNetTrainerBudget.py, nnU-Net's own trainer with the length of its schedule from
the environment, and may hold fix_torchvision.sh for a torch without CUDA. Planning, preprocessing and prediction are
free: a budget counts for training alone. Its schedule is set so that it ends within the budget, by the seconds that an
iteration took in a probe.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from autoseg.hardware.system import num_cores_allowed

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
"""Name -> plans, environment: as planned; with the allocator settings that autoseg gives itself; and with a batch of
2, which on two cores makes more of the same time than a larger one."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A case of a data set, as it lies on the disk."""

    name: str
    image: Path
    """One file; channels along a fourth axis are written as files of their own, as nnU-Net wants them."""
    label: Path


class NnUNet:
    """nnU-Net in its own environment, on one data set."""

    def __init__(self, venv: Path, tools: Path, root: Path, *, number: int = 4, name: str = "Hippocampus") -> None:
        # The virtual environment's own path, not where its links lead.
        self.venv, self.tools, self.root = Path(os.path.abspath(venv)), tools.absolute(), root
        self.number, self.dataset = str(number), f"Dataset{number:03d}_{name}"
        self.env = {
            **os.environ,
            **{f"nnUNet_{name}": str(root / name) for name in ("raw", "preprocessed", "results")},
            "nnUNet_compile": "f",
            "nnUNet_n_proc_DA": "2",
            "OMP_NUM_THREADS": str(num_cores_allowed()),
            "BLOSC_NTHREADS": "1",  # with blosc2 4.14's own threads its processes that augment died in two of four runs
            "PATH": f"{self.venv / 'bin'}:{os.environ['PATH']}",
        }
        self.env.pop("PYTHONPATH", None)
        root.mkdir(parents=True, exist_ok=True)

    def call(self, *words: str, **env: str) -> float:
        """Run one of its commands; its wall time."""
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
        """Put the budget trainer where nnU-Net looks, and repair torchvision where TOOLS has a script for it."""
        packages = next((self.venv / "lib").glob("python3.*")) / "site-packages"
        target = packages / "nnunetv2" / "training" / "nnUNetTrainer" / "variants" / "training_length"
        shutil.copy(self.tools / "nnUNetTrainerBudget.py", target)
        works = [str(self.venv / "bin" / "python"), "-c", "import torchvision"]
        repair = self.tools / "fix_torchvision.sh"
        if subprocess.run(works, env=self.env, capture_output=True, check=False).returncode != 0 and repair.exists():
            subprocess.run(["bash", str(repair)], env={**self.env, "VENV_NN": str(self.venv)}, check=True)

    def prepare(
        self, training: Sequence[Case], test: Sequence[Case], labels: Mapping[str, int], channels: Sequence[str]
    ) -> None:
        """Data set, fingerprint, plans and preprocessing; and a second plan with a batch of 2.

        Args:
            labels: class -> label value, without the background. nnU-Net wants them without gaps, so files are
                written with 1, 2, ... in the order of these values: see `file_values`.
            channels: what nnU-Net is to know of each, such as CT or MRI: it normalises by that.
        """
        if (self.root / "prepared").exists():
            return
        raw = self.root / "raw" / self.dataset
        shutil.rmtree(raw, ignore_errors=True)
        for name in ("imagesTr", "labelsTr", "imagesTs"):
            (raw / name).mkdir(parents=True)
        for case in training:
            _write_channels(case, raw / "imagesTr", len(channels))
            _write_label(case.label, raw / "labelsTr" / f"{case.name}.nii.gz", file_values(labels.values()))
        for case in test:
            _write_channels(case, raw / "imagesTs", len(channels))
        what = {
            "channel_names": {str(i): channel for i, channel in enumerate(channels)},
            "labels": {"background": 0, **{name: file_values(labels.values())[v] for name, v in labels.items()}},
            "numTraining": len(training),
            "file_ending": ".nii.gz",
        }
        (raw / "dataset.json").write_text(json.dumps(what))
        self.call("nnUNetv2_plan_and_preprocess", "-d", self.number, "-c", "3d_fullres", "-np", "2", "-npfp", "2")
        folder = self.root / "preprocessed" / self.dataset
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
        model = self.root / "results" / self.dataset / f"nnUNetTrainerBudget__{plans}__3d_fullres"
        shutil.rmtree(model, ignore_errors=True)
        words = ["nnUNetv2_train", self.number, "3d_fullres", "all"]
        words += ["-p", plans, "-tr", "nnUNetTrainerBudget", "-device", "cpu"]
        wall_s = self.call(*words, **length, **env)
        return wall_s, json.loads(out.read_text())

    def iterations_for(self, way: str, minutes: float) -> tuple[int, float]:
        """Iterations of each of `EPOCHS` epochs that fit into a time, and the seconds one took in a probe."""
        probe = self.root / f"probe_{way}.json"
        if not probe.exists():
            _, times = self.train(way, 1, PROBE_ITERATIONS)
            probe.write_text(json.dumps({"iteration_s": statistics.median(times["iter_s"])}))
        iteration_s = json.loads(probe.read_text())["iteration_s"]
        fits = math.floor((60 * minutes - START_S) / (EPOCHS * iteration_s) - VALIDATION_SHARE)
        return max(1, fits), iteration_s

    def predict(self, way: str, target: Path, *, mirror: bool) -> float:
        """Predict the test images; its wall time."""
        plans, env = WAYS[way]
        words = ["nnUNetv2_predict", "-d", self.number, "-c", "3d_fullres", "-f", "all"]
        words += ["-p", plans, "-tr", "nnUNetTrainerBudget", "-device", "cpu"]
        words += ["-i", str(self.root / "raw" / self.dataset / "imagesTs"), "-o", str(target)]
        shutil.rmtree(target, ignore_errors=True)
        return self.call(*words, *([] if mirror else ["--disable_tta"]), **env)


def file_values(values: Iterable[int]) -> dict[int, int]:
    """Label value -> the value in nnU-Net's files: 1, 2, ... in order."""
    return {value: i for i, value in enumerate(sorted(values), 1)}


def _write_label(source: Path, target: Path, values: Mapping[int, int]) -> None:
    if all(value == i for value, i in values.items()):
        shutil.copy(source, target)
        return
    image = nib.load(source)
    label = np.rint(np.asanyarray(image.dataobj))
    numbered = np.zeros(label.shape, np.uint8)
    for value, i in values.items():
        numbered[label == value] = i
    nib.save(nib.Nifti1Image(numbered, image.affine), target)


def _write_channels(case: Case, folder: Path, num_channels: int) -> None:
    if num_channels == 1:
        shutil.copy(case.image, folder / f"{case.name}_0000.nii.gz")
        return
    for i, channel in enumerate(nib.four_to_three(nib.load(case.image))):
        nib.save(channel, folder / f"{case.name}_{i:04d}.nii.gz")
