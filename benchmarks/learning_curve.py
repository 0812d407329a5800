"""A learning curve from some cases: does it predict the Dice with more?

    python benchmarks/learning_curve.py --data hippocampus --folder DIR --steps 400

Of a data set in the Decathlon's layout, `--held` cases are fold 0, on which all are scored. `autoseg learning_curve`
trains on shares of `--cases` others and predicts the Dice with `--more`; then the same plan is trained on those.
Killed, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from autoseg.workspace.files import write_json, write_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="with imagesTr and labelsTr")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--more", type=int, default=160)
    parser.add_argument("--held", type=int, default=40)
    parser.add_argument("--steps", type=int, default=400, help="of each training")
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    names = sorted(path.name for path in (words.data / "labelsTr").glob("*.nii.gz"))
    order = [names[i] for i in np.random.default_rng(words.seed).permutation(len(names))]
    held, others = order[: words.held], order[words.held :]
    begin(words, "few", held, others[: words.cases])
    begin(words, "many", held, others[: words.more])
    autoseg(words, "few", "learning_curve", "--points", "4", "--seeds", "1", "--at", str(words.more))
    for stage in ("analyze", "generate", "train"):
        autoseg(words, "many", stage, *(["--algo", "segresnet", "--fold", "0"] if stage == "train" else []))
    judge(words)


def autoseg(words: argparse.Namespace, name: str, command: str, *more: str) -> None:
    """Run a command of autoseg on one of the two data sets."""
    program = [sys.executable, "-m", "autoseg", command, "--input", str(words.folder / name / "input.yaml")]
    subprocess.run([*program, *more], check=True)


def begin(words: argparse.Namespace, name: str, held: list[str], others: list[str]) -> None:
    """Write a data set of some cases with the settings of a run; the held ones are fold 0."""
    folder: Path = words.folder / name
    training = []
    for case in (*held, *others):
        for kind in ("images", "labels"):
            target = folder / kind / case
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(words.data / f"{kind}Tr" / case, target)
        item = {"image": f"images/{case}", "label": f"labels/{case}", "fold": int(case not in held)}
        training.append(item)
    write_json(folder / "datalist.json", {"training": training})
    write_text(
        folder / "input.yaml",
        "modality: MRI\ndatalist: datalist.json\ndataroot: .\nwork_dir: work_dir\nname: learning curve\n"
        "class_names: [first, second]\nalgos: [segresnet]\nnum_workers: 1\nbatch_size: 2\naugment: default\n"
        f"num_epochs: {max(1, words.steps // 50)}\nnum_steps_per_epoch: 50\nnum_epochs_per_validation: "
        f"{max(1, words.steps // 100)}\nlearning_rate: 0.003\nroi_size: [32, 40, 32]\nresample_resolution: [1, 1, 1]\n"
        "tta: false\nsegresnet: {init_filters: 8, blocks_down: [1, 1, 2]}\n",
    )


def judge(words: argparse.Namespace) -> None:
    """Print what was predicted and what came."""
    few = json.loads((words.folder / "few" / "work_dir" / "learning_curve" / "curve.json").read_text())
    many = json.loads((words.folder / "many" / "work_dir" / "segresnet_0" / "validation.json").read_text())
    for point in few["points"]:
        print(f"{point['num_cases']} cases: {point['dice']:.4f}, {point['seconds']:.0f} s")
    (said,) = (p for p in few["predictions"] if p["num_cases"] == words.more)
    came = many["summary"]["mean"]
    print(
        f"{words.more} cases: predicted {said['dice']:.4f} ({said['low']:.4f} to {said['high']:.4f}), came {came:.4f}"
    )
    print(f"{100 * (said['dice'] - came):+.2f} points off")


if __name__ == "__main__":
    main()
