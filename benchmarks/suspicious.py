"""Spoilt labels: are they on top of the list of suspicious labels?

    python benchmarks/suspicious.py --data hippocampus --folder DIR --budget 20m

Of the cases of a data set with two classes, in the Decathlon's layout, one in twenty gets a label spoilt in one of five
ways: a class is missing, a class is where there is none, the two classes are swapped, the label is moved, the label is
mirrored from left to right. `autoseg run` trains on them; then a case's suspicion is the highest of its rows in
ensemble/suspicious_labels.csv, 0 without one. Printed: precision among the first ten cases, AUROC, rank of each spoilt
case and the kind it was listed with. Killed, the same command goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from autoseg.data.volumes import read_label, write_volume
from autoseg.workspace.files import write_json, write_text

WAYS = ("missing", "extra", "swapped", "shifted", "mirrored")
SHIFT_MM = 6.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="with imagesTr, labelsTr; label values 1 and 2")
    parser.add_argument("--folder", type=Path, required=True, help="for the spoilt copy and the run")
    parser.add_argument("--budget", default="20m", help="of the run")
    parser.add_argument("--share", type=float, default=0.05, help="of the cases that are spoilt")
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    spoil_labels(words)
    command = [sys.executable, "-m", "autoseg", "run", "--input", str(words.folder / "input.yaml")]
    subprocess.run([*command, "--budget", words.budget], check=True)
    judge(words.folder)


def spoil_labels(words: argparse.Namespace) -> None:
    """Write the labels, spoilt ones among them, and the files of a run; once."""
    folder: Path = words.folder
    if (folder / "spoilt.json").exists():
        return
    rng = np.random.default_rng(words.seed)
    labels = sorted((words.data / "labelsTr").glob("*.nii.gz"))
    chosen = rng.choice(len(labels), round(words.share * len(labels)), replace=False)
    ways = {labels[i].name: WAYS[n % len(WAYS)] for n, i in enumerate(chosen)}
    training = []
    for number, path in enumerate(labels):
        target = folder / "labels" / path.name
        volume = read_label(path)
        values = volume.array[0].astype(np.uint8)
        if path.name in ways:
            values = spoilt(values, ways[path.name], volume.spacing_mm, rng)
        write_volume(target, values, volume.grid)
        image = folder / "images" / path.name
        image.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(words.data / "imagesTr" / path.name, image)
        training.append({"image": f"images/{path.name}", "label": f"labels/{path.name}", "fold": number % 3})
    write_json(folder / "datalist.json", {"training": training})
    write_text(
        folder / "input.yaml",
        "modality: MRI\ndatalist: datalist.json\ndataroot: .\nwork_dir: work_dir\nname: spoilt labels\n"
        "class_names: [first, second]\nalgos: [segresnet]\nnum_workers: 1\n",
    )
    write_json(folder / "spoilt.json", ways)


def spoilt(label: np.ndarray, way: str, spacing_mm: tuple[float, ...], rng: np.random.Generator) -> np.ndarray:
    """A label (X, Y, Z) spoilt in one way."""
    wrong = label.copy()
    if way == "missing":
        wrong[label == rng.integers(1, 3)] = 0
    elif way == "extra":  # a ball of a class in a corner of the image, of a tenth of the class's volume or more
        value = int(rng.integers(1, 3))
        radius = 1 + round((0.75 / np.pi * (label == value).sum() / 3) ** (1 / 3))
        centre = [radius if rng.random() < 0.5 else n - 1 - radius for n in label.shape]
        away = np.indices(label.shape).T - np.array(centre)
        distance2 = (away**2).sum(axis=-1).T
        wrong[(distance2 <= radius**2) & (label == 0)] = value
    elif way == "swapped":
        wrong[label == 1], wrong[label == 2] = 2, 1
    elif way == "shifted":
        axis = int(rng.integers(0, 3))
        wrong = np.roll(label, round(SHIFT_MM / spacing_mm[axis]) * int(rng.choice([-1, 1])), axis=axis)
    elif way == "mirrored":
        wrong = label[::-1].copy()
    return wrong


def judge(folder: Path) -> None:
    """Print how well the list finds what was spoilt."""
    ways = {name.removesuffix(".nii.gz"): way for name, way in json.loads((folder / "spoilt.json").read_text()).items()}
    cases = [Path(c["label"]).name.removesuffix(".nii.gz") for c in _training(folder)]
    best: dict[str, tuple[float, str]] = {}
    with open(folder / "work_dir" / "ensemble" / "suspicious_labels.csv", newline="") as file:
        for row in csv.DictReader(file):
            best.setdefault(row["case"], (float(row["suspicion"]), row["kind"]))
    score = np.array([best.get(c, (0.0, ""))[0] for c in cases])
    wrong = np.array([c in ways for c in cases])
    order = np.argsort(-score, kind="stable")
    above = (score[wrong][:, None] > score[~wrong]).mean() + 0.5 * (score[wrong][:, None] == score[~wrong]).mean()
    print(f"{len(cases)} cases, {wrong.sum()} spoilt, {len(best)} listed")
    print(f"precision at 10: {wrong[order[:10]].mean():.2f}; AUROC: {above:.4f}")
    rank = {cases[i]: n + 1 for n, i in enumerate(order)}
    for case, way in sorted(ways.items(), key=lambda item: rank[item[0]]):
        suspicion, kind = best.get(case, (0.0, "not listed"))
        print(f"{rank[case]:4d}  {case}  {way:9s} listed as {kind or '-'}, suspicion {suspicion:.3f}")


def _training(folder: Path) -> list[dict[str, str]]:
    listed: list[dict[str, str]] = json.loads((folder / "datalist.json").read_text())["training"]
    return listed


if __name__ == "__main__":
    main()
