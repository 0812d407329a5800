"""Does pretraining pay? Few labelled cases, many images, equal total time: none, contrastive and mae.

    python benchmarks/pretrain.py --output OUT --hippocampus DATA --acdc DATA
    python benchmarks/pretrain.py --output OUT --hippocampus DATA --rows 1     # the next row alone
    python benchmarks/pretrain.py --output OUT --table                         # what is there

A row is a data set, a number of labelled patients, a method and a seed. The seed shuffles the patients: some are held
back and scored, some are labelled, all others are images without labels. Each row is one `autoseg run` of one network
on one of five folds of the labelled cases, in the same total time: pretraining takes its quarter of the budget. The
held-back cases are predicted by that model and scored here from the label files as written. A row writes
OUT/pretrain/<row>.json when it is done and is not done again; one that was stopped goes on where it was.

Run it on a quiet machine, one row at a time: a row's steps depend on what else runs.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from train import autoseg, machine, written

from autoseg.evaluation.intervals import mean_interval
from autoseg.workspace.jobs import EpochLine
from autoseg.workspace.pretraining import LessonLine, lessons, pretraining_place
from autoseg.workspace.stored import read_stored_lines
from autoseg.workspace.workspace import Workspace

METHODS = ("none", "contrastive", "mae")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """A data set in the layout of the Medical Segmentation Decathlon."""

    name: str
    modality: str
    num_held_back: int
    """Patients that are scored."""
    sizes: tuple[int, ...]
    """Labelled patients."""
    patient: str
    """Of a file's name: a regular expression whose first group is the patient."""


DATA_SETS = (
    DataSet(name="hippocampus", modality="MRI", num_held_back=60, sizes=(10, 20, 40), patient=r"(.+)\.nii\.gz"),
    DataSet(name="acdc", modality="MRI", num_held_back=10, sizes=(5, 10), patient=r"(patient\d+)"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One run."""

    data: DataSet
    size: int
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.data.name}_{self.size}_{self.method}_seed{self.seed}"


def patients_of(data: DataSet, folder: Path) -> dict[str, list[str]]:
    """Patient -> names of its files."""
    patients: dict[str, list[str]] = {}
    for path in sorted((folder / "labelsTr").glob("*.nii.gz")):
        if not path.name.startswith(".") and (found := re.match(data.patient, path.name)):
            patients.setdefault(found[1], []).append(path.name)
    return patients


def image_of(folder: Path, name: str) -> str:
    """The image of a label file, relative to the data set."""
    first = folder / "imagesTr" / name
    return f"imagesTr/{name if first.exists() else name.replace('.nii.gz', '_0000.nii.gz')}"


def labels_of(folder: Path) -> dict[str, str]:
    """Label value -> class of a data set, background left out."""
    found: dict[str, str] = json.loads((folder / "dataset.json").read_text())["labels"]
    return {value: name for value, name in found.items() if int(value)}


def write_input(row: Row, folder: Path, data: Path, minutes: float, algo: str) -> Path:
    """The row's datalist and settings, in a folder of its own."""
    patients = patients_of(row.data, data)
    order = [sorted(patients)[i] for i in np.random.default_rng(row.seed).permutation(len(patients))]
    held_back, rest = order[: row.data.num_held_back], order[row.data.num_held_back :]
    labelled, others = rest[: row.size], rest[row.size :]

    training = [
        {"image": image_of(data, file), "label": f"labelsTr/{file}", "group": p, "fold": number % 5}
        for number, p in enumerate(labelled)
        for file in patients[p]
    ]
    unlabeled = [{"image": image_of(data, file), "group": p} for p in others for file in patients[p]]
    # Held-back cases are in no list, so that no image of them is learned from; they are predicted afterwards.
    listed = {"labels": labels_of(data), "training": training, "unlabeled": unlabeled}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "datalist.json").write_text(json.dumps(listed))
    (folder / "held_back.txt").write_text(
        "".join(f"{(data / image_of(data, file)).absolute()}\n" for p in held_back for file in patients[p])
    )
    settings = {
        "modality": row.data.modality,
        "datalist": "datalist.json",
        "dataroot": str(data.absolute()),
        "algos": [algo],
        "folds": [0],
        "seed": row.seed,
        "budget": f"{round(60 * minutes)}s",
        "pretrain": {"method": row.method},
        "ensemble": False,
        "name": row.name,
    }
    (folder / "input.yaml").write_text(json.dumps(settings, indent=1))  # JSON is YAML
    return folder / "input.yaml"


def dice_by_case(predictions: Path, data: Path, values: Sequence[int]) -> dict[str, list[float]]:
    """Dice of each class, NaN where neither has it, by plain NumPy, from the label files as written."""
    found = {}
    for label in sorted((data / "labelsTr").glob("*.nii.gz")):
        written_as = predictions / Path(image_of(data, label.name)).name
        if label.name.startswith(".") or not written_as.exists():
            continue
        said, truth = (np.rint(np.asanyarray(nib.load(p).dataobj)) for p in (written_as, label))
        row = []
        for value in values:
            a, b = said == value, truth == value
            row.append(2 * (a & b).sum() / (a.sum() + b.sum()) if a.any() or b.any() else math.nan)
        found[label.name] = [float(v) for v in row]
    return found


def run_row(row: Row, output: Path, data: Path, minutes: float, algo: str) -> None:
    """Run and score a row."""
    folder = output / "work" / row.name
    log = folder / "log.txt"
    path = write_input(row, folder, data, minutes, algo)
    found = machine()
    wall_s = autoseg("run", "--input", path, log=log)
    work = Workspace(folder / "work_dir")
    predictions = folder / "predictions"
    images, out = ("--image", folder / "held_back.txt"), ("--output", predictions)
    autoseg("predict", *images, "--work_dir", work.root, *out, "--algo", algo, "--fold", "0", log=log)
    listed = json.loads((folder / "datalist.json").read_text())
    dice = dice_by_case(predictions, data, [int(k) for k in listed["labels"]])
    expected = len((folder / "held_back.txt").read_text().splitlines())
    if len(dice) != expected:
        raise SystemExit(f"{row.name}: {len(dice)} of {expected} held-back cases were scored; see {log}")
    trained = read_stored_lines(work.job_dir(algo, 0).metrics, EpochLine)
    result: dict[str, Any] = {
        "data": row.data.name,
        "size": row.size,
        "method": row.method,
        "seed": row.seed,
        "algo": algo,
        "minutes": minutes,
        "dice": float(np.nanmean([np.nanmean(v) for v in dice.values()])),
        "by_case": dice,
        "steps": trained[-1].step,
        "wall_s": round(wall_s, 1),
        "images": len(listed["unlabeled"]),
        "machine": found,
    }
    for name, fold in lessons(work):
        lines = read_stored_lines(pretraining_place(work).job_dir(name, fold).metrics, LessonLine)
        errors = [line.val_l1 for line in lines if line.val_l1 is not None]
        result["pretraining"] = {
            "epochs": lines[-1].epoch,
            "steps": lines[-1].step,
            "seconds": lines[-1].seconds,
            "l1_first": errors[0] if errors else None,
            "l1_best": min(errors, default=None),
        }
    written(output / "pretrain" / f"{row.name}.json", result)


# -- the table


def read_results(output: Path) -> list[dict[str, Any]]:
    """What rows have written."""
    return [json.loads(path.read_text()) for path in sorted((output / "pretrain").glob("*.json"))]


def table(output: Path) -> str:
    """A line for each data set, size and method: mean Dice, the seeds, the difference to none patient by patient."""
    results = read_results(output)
    head = ("Data", "labelled", "method", "Dice", "95 % interval", "seeds", "to none", "95 % interval", "steps")
    head += ("pretrained", "L1", "500 epochs take")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for data in DATA_SETS:
        for size in data.sizes:
            for method in METHODS:
                mine = [r for r in results if (r["data"], r["size"], r["method"]) == (data.name, size, method)]
                if mine:
                    group = [r for r in results if (r["data"], r["size"], r["method"]) == (data.name, size, "none")]
                    none = {r["seed"]: r for r in group}
                    lines.append(_line(data, size, method, mine, none))
    return "\n".join(lines)


def _line(data: DataSet, size: int, method: str, mine: list[dict[str, Any]], none: dict[int, dict[str, Any]]) -> str:
    pairs = [(r, name, scores) for r in mine for name, scores in r["by_case"].items()]
    patients = [found[1] if (found := re.match(data.patient, name)) else name for _, name, _ in pairs]
    low, high = mean_interval([scores for _, _, scores in pairs], patients)
    cells = [
        data.name,
        str(size),
        method,
        f"{statistics.mean(r['dice'] for r in mine):.4f}",
        f"{low:.4f} to {high:.4f}",
    ]
    cells.append(", ".join(f"{r['dice']:.4f}" for r in mine))
    paired = [
        (patient, float(np.nanmean(scores) - np.nanmean(none[r["seed"]]["by_case"][name])))
        for (r, name, scores), patient in zip(pairs, patients, strict=True)
        if r["seed"] in none
    ]
    if method == "none" or not paired:
        cells += ["", ""]
    else:
        low, high = mean_interval([[d] for _, d in paired], [p for p, _ in paired])
        cells += [f"{statistics.mean(d for _, d in paired):+.4f}", f"{low:+.4f} to {high:+.4f}"]
    cells.append(", ".join(str(r["steps"]) for r in mine))
    taught = [r["pretraining"] for r in mine if "pretraining" in r]
    if not taught:
        return f"| {' | '.join([*cells, '', '', ''])} |"
    hours = statistics.mean(t["seconds"] / max(1, t["epochs"]) for t in taught) * 500 / 3600
    cells.append(", ".join(f"{t['epochs']} epochs" for t in taught))
    cells.append(", ".join(f"{t['l1_first'] or math.nan:.3f} to {t['l1_best'] or math.nan:.3f}" for t in taught))
    return f"| {' | '.join([*cells, f'{hours:.1f} h'])} |"


def rows_of(a: argparse.Namespace) -> Iterator[tuple[Row, Path]]:
    """All rows that are asked for, seed by seed, so that each comparison is complete early."""
    for seed in a.seeds:
        for data in DATA_SETS:
            folder: Path | None = getattr(a, data.name)
            for size in data.sizes if folder is not None else ():
                for method in a.methods:
                    assert folder is not None
                    if not a.sizes or size in a.sizes:
                        yield Row(data=data, size=size, method=method, seed=seed), folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--hippocampus", type=Path)
    parser.add_argument("--acdc", type=Path)
    parser.add_argument("--minutes", type=float, default=6.0, help="of each run, pretraining included")
    parser.add_argument("--algo", default="segresnet")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--sizes", nargs="+", type=int, default=[], help="labelled patients; all where not given")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=None, help="so many that are not done yet; all where not given")
    parser.add_argument("--table", action="store_true", help="show what is there, run nothing")
    a = parser.parse_args()
    todo = [] if a.table else [(r, d) for r, d in rows_of(a) if not (a.output / "pretrain" / f"{r.name}.json").exists()]
    for result in read_results(a.output) if todo else ():
        if (result["minutes"], result["algo"]) != (a.minutes, a.algo):
            there = f"{result['minutes']:g} minutes of {result['algo']}"
            raise SystemExit(f"{a.output}: holds rows of {there}, which no others compare with. Give another --output.")
    for row, data in todo[: a.rows]:
        run_row(row, a.output, data.absolute(), a.minutes, a.algo)
    print(table(a.output))


if __name__ == "__main__":
    main()
