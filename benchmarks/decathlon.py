"""autoseg and nnU-Net 2.8 on many data sets, with the same splits and minutes: one table, one command, resumable.

python benchmarks/decathlon.py --data DATA --output OUT --minutes 10 --venv_nn VENV --tools TOOLS/nnunet
python benchmarks/decathlon.py --data DATA --output OUT --minutes 4 --no_rival --busy 2     # budgets beside other work
python benchmarks/decathlon.py ... --no_rival, and at the same time on another core: ... --rival_alone
python benchmarks/decathlon.py --data DATA --output OUT --table                             # what is there

DATA holds data sets of Medical Segmentation Decathlon layout (imagesTr, labelsTr, dataset.json). A quarter of the
groups of cases of each (patients, atlas sources, rows of tiles) is held out and never seen in training; the split is
the same for all and lies in OUT/<set>/split.json. The cases that are left are one training fold and one validation fold
of autoseg, made by patients where the data has several scans of one. The set "cohort" is made by DATA's neighbour
tools/make_abdomen_cohort.py: abdomens of 14 classes, of which annotators skipped some in three of four cases; what is
held out has all.

autoseg's minutes count for the whole `autoseg run`: analysis, planning, training, ensemble, predictions of the held-out
cases. nnU-Net's count for training alone, on all cases that are left; its planning, preprocessing and prediction are
free, it is predicted without mirroring and, where that takes at most ten minutes more, with it, and its better score
counts. Dice is computed here, by plain NumPy, from the label files as both wrote them: the mean over cases, then
classes; absent in both: not counted; no file: 0.

Each part writes OUT/<set>/<tool>_<minutes>m.json and is not done again. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import nibabel as nib
import numpy as np
import yaml
from nnunet import EPOCHS, Case, NnUNet, file_values
from train import autoseg, machine, written

from autoseg.workspace.workspace import Workspace

HELD_OUT_SHARE = 0.25
SPLIT_SEED = 0
MIRRORED_MOST_S = 600.0
"""nnU-Net's prediction with mirroring, eight times as long, is left out where it would take longer."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """What the table needs to know of a data set besides its dataset.json."""

    name: str
    modality: str = "MRI"
    group: str = ".*"
    """Regular expression whose match in a case's name is its group: cases of one group are never split."""
    most_cases: int = 200
    settings: tuple[tuple[str, Any], ...] = ()
    """Settings of input.yaml that the data needs."""


SETS = (
    DataSet(name="hippocampus"),
    DataSet(name="acdc", group=r"patient\d+"),
    DataSet(name="fetal_brain", group=r"^[a-z]+"),
    DataSet(name="mouse_brain"),
    DataSet(name="em_vnc", group=r"r\d+", modality="EM"),
    DataSet(name="prostate_trus", modality="US"),
    DataSet(name="prostate_mr_small"),
    DataSet(name="brats2015_mini"),
    DataSet(name="cohort", modality="CT", settings=(("partial_labels", "infer"),)),
)
COHORT = {"full": 8, "organs5": 14, "tumor-only": 10, "test": 8}
"""Cases of the cohort, by what their annotators drew."""


# -- the cohort


def make_cohort(tool: Path, folder: Path) -> Path:
    """The cohort in the layout of the others, its split beside it; what is there is not made again."""
    data = folder / "data"
    if not (data / "dataset.json").exists():
        counts = [word for kind, number in COHORT.items() for word in (f"--{kind}", str(number))]
        subprocess.run([sys.executable, tool, "--out", folder / "made", "--unlabeled", "0", *counts], check=True)
        shutil.rmtree(data, ignore_errors=True)  # of a start that was stopped
        made = json.loads((folder / "made" / "dataset.json").read_text())
        split: dict[str, list[str]] = {}
        for part, key, labels in (("training", "training", "labels"), ("test", "testing", "labels_complete")):
            files = [Path(item["image"]).name for item in made[key]]
            for sub, source in (("imagesTr", "images"), ("labelsTr", labels)):
                (data / sub).mkdir(parents=True, exist_ok=True)
                for file in files:
                    (data / sub / file).symlink_to(folder / "made" / source / file)
            split[part] = [file.removesuffix(".nii.gz") for file in files]
        written(folder / "split.json", split)
        written(data / "dataset.json", {"labels": made["labels"], "modality": {"0": "CT"}})
    return data


# -- the split


def split_of(data: Path, dataset: DataSet, folder: Path) -> tuple[list[Case], list[Case]]:
    """Cases to train on and cases held out; made once and stored."""
    names = [p.name.removesuffix(".nii.gz") for p in sorted((data / "labelsTr").glob("[!.]*.nii.gz"))]
    names = names[: dataset.most_cases]
    cases = {
        n: Case(name=n, image=data / "imagesTr" / f"{n}.nii.gz", label=data / "labelsTr" / f"{n}.nii.gz") for n in names
    }
    path = folder / "split.json"
    if not path.exists():
        groups = sorted({group_of(dataset, n) for n in names})
        random.Random(SPLIT_SEED).shuffle(groups)
        held_out = set(groups[: max(1, round(HELD_OUT_SHARE * len(groups)))])
        test = [n for n in names if group_of(dataset, n) in held_out]
        written(path, {"training": [n for n in names if n not in test], "test": test})
    split = json.loads(path.read_text())
    return [cases[n] for n in split["training"]], [cases[n] for n in split["test"]]


def group_of(dataset: DataSet, name: str) -> str:
    match = re.search(dataset.group, name)
    return match[0] if match else name


# -- scores


def dice_by_class(
    predictions: Path, test: Sequence[Case], values: Sequence[int], written_as: Mapping[int, int]
) -> dict[str, float]:
    """Mean Dice of each class over the held-out cases; a class that none of them has is left out.

    Args:
        written_as: label value -> the value that stands for it in the predictions.
    """
    scores: dict[int, list[float]] = {value: [] for value in values}
    for case in test:
        truth = np.rint(np.asanyarray(nib.load(case.label).dataobj))
        path = predictions / f"{case.name}.nii.gz"
        pred = np.rint(np.asanyarray(nib.load(path).dataobj)) if path.exists() else np.zeros_like(truth)
        for value in values:
            a, b = pred == written_as.get(value, value), truth == value
            if a.any() or b.any():
                scores[value].append(float(2 * (a & b).sum() / (a.sum() + b.sum())))
    return {str(value): round(float(np.mean(found)), 4) for value, found in scores.items() if found}


def scored(
    predictions: Path, test: Sequence[Case], values: Sequence[int], written_as: Mapping[int, int] = MappingProxyType({})
) -> dict[str, Any]:
    classes = dice_by_class(predictions, test, values, written_as)
    return {"dice": round(float(np.mean([*classes.values()])), 4), "classes": classes}


# -- the contenders


def run_autoseg(
    dataset: DataSet,
    training: Sequence[Case],
    test: Sequence[Case],
    labels: Mapping[int, str],
    folder: Path,
    minutes: float,
    *,
    label: str,
    settings: Mapping[str, str],
    busy: int,
) -> None:
    target = folder / f"autoseg{label}_{minutes:g}m.json"
    if target.exists():
        return
    work = folder / f"autoseg{label}_{minutes:g}m"
    work.mkdir(parents=True, exist_ok=True)
    resumed = (work / "work_dir").exists()
    datalist = {
        "labels": {str(value): name for value, name in labels.items()},
        "training": [
            {"image": str(c.image), "label": str(c.label), "group": group_of(dataset, c.name)} for c in training
        ],
        "testing": [{"image": str(c.image)} for c in test],
    }
    (work / "datalist.json").write_text(json.dumps(datalist, indent=1))
    given = {
        "modality": dataset.modality,
        "datalist": "datalist.json",
        "dataroot": str(training[0].image.parents[1]),
        "folds": [0],
        **dict(dataset.settings),
    }
    (work / "input.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    flags = [word for key, value in settings.items() for word in (f"--{key}", value)]
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    before = machine()
    words: list[str | Path] = ["run", "--input", work / "input.yaml", "--budget", f"{minutes:g}m", *flags]
    try:
        wall_s = autoseg(*words, log=work / "log.txt")
    finally:
        for other in others:
            other.kill()
    place = Workspace(work / "work_dir").finished()  # of partial labels the last round
    jobs = {p.parent.name: json.loads(p.read_text()) for p in sorted(place.root.glob("*_[0-9]/job.json"))}
    written(
        target,
        {
            "tool": "autoseg",
            "set": dataset.name,
            "minutes": minutes,
            "settings": dict(settings),
            "busy": busy,
            **scored(place.predictions, test, [*labels]),
            "wall_s": round(wall_s, 1),
            "wall_over_budget": None if resumed else round(wall_s / (60 * minutes) - 1, 4),
            "jobs": {name: {k: job.get(k) for k in ("state", "dice", "seconds")} for name, job in jobs.items()},
            "steps": {name: _last_step(place.root / name / "metrics.jsonl") for name in jobs},
            "machine": before,
        },
    )


def _last_step(metrics: Path) -> int:
    return json.loads(metrics.read_text().splitlines()[-1])["step"] if metrics.exists() else 0


def run_nnunet(
    nn: NnUNet,
    dataset: DataSet,
    training: Sequence[Case],
    test: Sequence[Case],
    labels: Mapping[int, str],
    channels: Sequence[str],
    folder: Path,
    minutes: float,
    way: str,
) -> None:
    target = folder / f"nnunet_{way}_{minutes:g}m.json"
    if target.exists():
        return
    nn.prepare(training, test, {name: value for value, name in labels.items()}, channels)
    iterations, iteration_s = nn.iterations_for(way, minutes)
    before = machine()
    wall_s, _ = nn.train(way, EPOCHS, iterations)
    found: dict[str, Any] = {}
    for mirror in (False, True):
        if mirror and 8 * found["plain"]["predict_s"] > MIRRORED_MOST_S:
            break
        predictions = folder / "nnunet_predictions" / f"{minutes:g}m_{way}_{'tta' if mirror else 'plain'}"
        predict_s = nn.predict(way, predictions, mirror=mirror)
        found["tta" if mirror else "plain"] = {
            **scored(predictions, test, [*labels], file_values(labels)),
            "predict_s": round(predict_s, 1),
        }
    best = max(found.values(), key=lambda r: r["dice"])
    written(
        target,
        {
            "tool": "nnunet",
            "set": dataset.name,
            "way": way,
            "minutes": minutes,
            "dice": best["dice"],
            "classes": best["classes"],
            **found,
            "steps": EPOCHS * iterations,
            "iteration_s": round(iteration_s, 3),
            "training_wall_s": round(wall_s, 1),
            "machine": before,
        },
    )


# -- the table


def table(output: Path) -> None:
    print(
        "| set | minutes | tool | mean Dice | worst class | steps | wall over budget |\n|---|---|---|---|---|---|---|"
    )
    for path in sorted(output.glob("*/*m.json")):
        r = json.loads(path.read_text())
        steps = r["steps"] if isinstance(r["steps"], int) else ", ".join(f"{n} {s}" for n, s in r["steps"].items())
        over = r.get("wall_over_budget")
        name = path.stem.rpartition("_")[0]
        print(
            f"| {r['set']} | {r['minutes']:g} | {name} | {r['dice']:.4f} | {min(r['classes'].values()):.4f} "
            f"| {steps} | {'' if over is None else f'{over:+.1%}'} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--sets", default=",".join(s.name for s in SETS))
    parser.add_argument("--label", default="", help="of autoseg's results, such as _auto")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting for autoseg")
    parser.add_argument("--busy", type=int, default=0, help="other processes that keep a core busy beside autoseg")
    parser.add_argument("--no_rival", action="store_true")
    parser.add_argument("--rival_alone", action="store_true", help="nnU-Net without autoseg")
    parser.add_argument("--venv_nn", type=Path)
    parser.add_argument("--tools", type=Path)
    parser.add_argument("--way", default="batch2", help="of nnU-Net, as nnunet.py has them")
    parser.add_argument("--table", action="store_true")
    a = parser.parse_args()
    settings = dict(pair.split("=", 1) for pair in a.set)
    for number, dataset in enumerate(SETS, 900):
        if a.table or dataset.name not in a.sets.split(","):
            continue
        data, folder = a.data.absolute() / dataset.name, a.output.absolute() / dataset.name
        folder.mkdir(parents=True, exist_ok=True)
        if dataset.name == "cohort":
            data = make_cohort(a.data.absolute().parent / "tools" / "make_abdomen_cohort.py", folder)
        told = json.loads((data / "dataset.json").read_text())
        labels = {int(value): name for value, name in told["labels"].items() if int(value) != 0}
        training, test = split_of(data, dataset, folder)
        if not a.rival_alone:
            given = {"label": a.label, "settings": settings, "busy": a.busy}
            run_autoseg(dataset, training, test, labels, folder, a.minutes, **given)
        if not a.no_rival:
            nn = NnUNet(a.venv_nn, a.tools, folder / "nnunet", number=number, name=dataset.name)
            nn.set_up()
            channels = ["MRI"] * len(told["modality"])  # all of them are normalised by their own mean, as autoseg does
            run_nnunet(nn, dataset, training, test, labels, channels, folder, a.minutes, a.way)
    table(a.output.absolute())


if __name__ == "__main__":
    main()
