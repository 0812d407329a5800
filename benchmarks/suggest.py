"""What to annotate next: does `autoseg suggest` beat drawing images at random?

    python benchmarks/suggest.py --data hippocampus --folder DIR

Of a data set in the Decathlon's layout, `--held` cases are scored on, `--first` are annotated, the others are not.
Models of two folds are trained on the first; `autoseg suggest` and, `--draws` times, chance say which `--next` to
annotate; models trained on first and next together are scored on the held cases, all by the same number of steps.
Killed, the same command goes on.
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

from autoseg.workspace.files import write_json, write_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="with imagesTr and labelsTr")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--first", type=int, default=16)
    parser.add_argument("--next", type=int, default=16)
    parser.add_argument("--held", type=int, default=40)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150, help="of each of the two folds")
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    names = sorted(path.name for path in (words.data / "labelsTr").glob("*.nii.gz"))
    order = [names[i] for i in np.random.default_rng(words.seed).permutation(len(names))]
    held, first, pool = order[: words.held], order[words.held :][: words.first], order[words.held + words.first :]
    print(f"first: {trained(words, 'first', first, held, pool):.4f}", flush=True)
    arms = {"suggested": suggested(words)}
    for draw in range(words.draws):
        chance = np.random.default_rng([words.seed, draw]).permutation(len(pool))[: words.next]
        arms[f"random {draw}"] = [pool[i] for i in chance]
    for name, chosen in arms.items():
        print(f"{name}: {trained(words, name.replace(' ', '_'), [*first, *chosen], held):.4f}", flush=True)


def trained(words: argparse.Namespace, name: str, cases: list[str], held: list[str], pool: list[str] = []) -> float:  # noqa: B006
    """Mean Dice on the held cases of a run on some."""
    folder: Path = words.folder / name
    for case in (*cases, *held, *pool):
        for kind in ("images", "labels"):
            target = folder / kind / case
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(words.data / f"{kind}Tr" / case, target)

    def items(listed: list[str], **more: int) -> list[dict[str, object]]:
        return [{"image": f"images/{case}", "label": f"labels/{case}", **more} for case in listed]

    training = [item for n, case in enumerate(cases) for item in items([case], fold=n % 2)]
    unlabeled = [{"image": f"images/{case}"} for case in pool]
    write_json(folder / "datalist.json", {"training": training, "testing": items(held), "unlabeled": unlabeled})
    write_text(
        folder / "input.yaml",
        "modality: MRI\ndatalist: datalist.json\ndataroot: .\nwork_dir: work_dir\nname: suggest\n"
        "class_names: [first, second]\nalgos: [segresnet]\nnum_workers: 1\nbatch_size: 2\naugment: default\n"
        f"num_epochs: {max(1, words.steps // 50)}\nnum_steps_per_epoch: 50\nnum_epochs_per_validation: "
        f"{max(1, words.steps // 50)}\nlearning_rate: 0.003\nroi_size: [32, 40, 32]\nresample_resolution: [1, 1, 1]\n"
        "tta: false\nsegresnet: {init_filters: 8, blocks_down: [1, 1, 2]}\n"
        "ensemble: {robustness: 'off', postprocess: 'off'}\n",
    )
    subprocess.run([sys.executable, "-m", "autoseg", "run", "--input", str(folder / "input.yaml")], check=True)
    scores = json.loads((folder / "work_dir" / "ensemble" / "scores.json").read_text())
    mean: float = scores["external"]["metrics"]["dice"]["mean"]
    return mean


def suggested(words: argparse.Namespace) -> list[str]:
    """Files that `autoseg suggest` names."""
    work_dir = words.folder / "first" / "work_dir"
    command = [sys.executable, "-m", "autoseg", "suggest", "--work_dir", str(work_dir), "--n", str(words.next)]
    subprocess.run(command, check=True)
    with open(work_dir / "suggest" / "suggestions.csv", newline="") as file:
        return [f"{row['case']}.nii.gz" for row in csv.DictReader(file)]


if __name__ == "__main__":
    main()
