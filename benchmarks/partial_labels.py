"""What partial labels cost, and what each strategy gets back: one cohort, one network, one total time, every arm.

    python benchmarks/partial_labels.py --cohort ../shared/tools/make_abdomen_cohort.py --folder DIR

The cohort has FLARE23's label structure (make_abdomen_cohort.py). Every arm trains the same network for the same total
time, all folds and rounds together, and is scored on the testing cases' complete labels. The time is given as steps,
each of the same work, so that a busy machine takes nothing from an arm; the seconds that they took stand in the table.
Killed, the same command goes on: an arm that is done is not done again, and one that was begun goes on where it was.
The table is printed and lies in DIR/partial_labels.json and DIR/partial_labels.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from autoseg.data.formats.table import stem_of
from autoseg.data.labels import LabelMap
from autoseg.data.volumes import read_label
from autoseg.evaluation.folders import evaluate
from autoseg.evaluation.metrics import dice_per_class, mean_score
from autoseg.workspace.files import write_json, write_text
from autoseg.workspace.jobs import JobDir
from autoseg.workspace.usage import environment
from autoseg.workspace.workspace import Workspace

NAMES = (
    "liver", "kidney_right", "spleen", "pancreas", "aorta", "inferior_vena_cava", "adrenal_gland_right",
    "adrenal_gland_left", "gallbladder", "esophagus", "stomach", "duodenum", "kidney_left", "tumor",
)  # fmt: skip
SIX = ("liver", "kidney_right", "spleen", "pancreas", "kidney_left", "tumor")
"""Classes of the six-class cases, as in the FLARE23 paper's Table 1."""
OTHERS = tuple(n for n in NAMES if n not in SIX)

ARMS: dict[str, dict[str, Any]] = {
    "naive": {"partial_labels": "off"},
    "full_only": {"partial_labels": "off"},
    "two_stage": {"partial_labels": "declared", "strategy": "two_stage"},
    "marginal": {"partial_labels": "declared", "strategy": "marginal"},
    "both": {"partial_labels": "declared", "strategy": "both"},
    "both_unfiltered": {"partial_labels": "declared", "strategy": "both", "pseudolabel": {"filter": False}},
    "both_scratch": {"partial_labels": "declared", "strategy": "both", "pseudolabel": {"start": "scratch"}},
    "both_labelled": {"partial_labels": "declared", "strategy": "both", "pseudolabel": {"unlabeled": False}},
    "oracle": {"partial_labels": "off"},
}
"""What each arm is told. full_only sees the fully annotated cases alone, the oracle every case's complete label."""
ON_REQUEST = ("both_scratch", "both_labelled")
"""Arms that run only where --arms names them."""
STEPS_PER_EPOCH, BATCH_SIZE = 20, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohort", type=Path, required=True, help="make_abdomen_cohort.py")
    parser.add_argument("--folder", type=Path, required=True, help="for cohorts, runs and results")
    parser.add_argument("--arms", nargs="+", default=[a for a in ARMS if a not in ON_REQUEST], choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2], help="of cohort, folds and training")
    parser.add_argument("--steps", type=int, default=3040, help="of an arm, all folds and rounds together")
    parser.add_argument("--spacing", type=float, default=4.0, help="mm")
    parser.add_argument("--folds", nargs="+", type=int, default=[0, 1], help="of five; two let models disagree")
    for name, number in (("full", 4), ("organs5", 24), ("tumor-only", 20), ("unlabeled", 8), ("test", 12)):
        parser.add_argument(f"--{name}", type=int, default=number, help="cases of the cohort")
    words = parser.parse_args()
    for seed in words.seeds:
        cohort = make_cohort(words, seed)
        for arm in words.arms:
            run_arm(words, cohort, arm, seed)
            write_table(words)


def make_cohort(words: argparse.Namespace, seed: int) -> Path:
    """Make the cohort of a seed, once."""
    folder: Path = words.folder / f"cohort_{seed}"
    if (folder / "truth").exists():
        return folder
    kinds = ("full", "organs5", "tumor-only", "unlabeled", "test")
    numbers = {kind: getattr(words, kind.replace("-", "_")) for kind in kinds}
    command = [sys.executable, str(words.cohort), "--out", str(folder), "--seed", str(seed)]
    for kind, number in numbers.items():
        command += [f"--{kind}", str(number)]
    subprocess.run(command, check=True)
    listed = json.loads((folder / "dataset.json").read_text())
    kind_of = [kind for kind, number in numbers.items() for _ in range(number)]
    declared = {"full": list(NAMES), "organs5": list(SIX), "tumor-only": ["tumor"]}
    for item in listed["training"]:
        item["annotated"] = declared[kind_of[int(stem_of(Path(item["image"])).rpartition("_")[2])]]
    write_json(folder / "partial.json", listed)
    full = [{k: v for k, v in i.items() if k != "annotated"} for i in listed["training"] if len(i["annotated"]) == 14]
    write_json(folder / "full_only.json", {**listed, "training": full, "unlabeled": []})
    naive = [{k: v for k, v in i.items() if k != "annotated"} for i in listed["training"]]
    write_json(folder / "naive.json", {**listed, "training": naive, "unlabeled": []})
    every = [*naive, *({**i, "fold": n % 5} for n, i in enumerate(listed["unlabeled"]))]
    complete = [{**i, "label": i["image"].replace("images/", "labels_complete/")} for i in every]
    write_json(folder / "oracle.json", {**listed, "training": complete, "unlabeled": []})
    truth = folder / "truth.part"
    truth.mkdir(exist_ok=True)
    for item in listed["testing"]:
        name = Path(item["image"]).name
        if not (truth / name).exists():
            os.link(folder / "labels_complete" / name, truth / name)
    truth.rename(folder / "truth")
    return folder


def occurring_classes(cohort: Path) -> list[str]:
    """The classes that the truth of the testing cases has; stored beside it.

    The others say nothing of an arm: 0 where one voxel of them is predicted, and not counted where none is, so that
    the means of two arms would be over different classes.
    """
    path = cohort / "occurring.json"
    if not path.exists():
        files = sorted((cohort / "truth").glob("*.nii.gz"))
        if not files:
            raise SystemExit(f"{cohort / 'truth'}: no label files. The results of this cohort cannot be read without.")
        values = {int(value) for file in files for value in np.unique(read_label(file).array)}
        write_json(path, [name for value, name in enumerate(NAMES, start=1) if value in values])
    return list(json.loads(path.read_text()))


def run_arm(words: argparse.Namespace, cohort: Path, arm: str, seed: int) -> None:
    """Train and score an arm, unless that is done."""
    result = words.folder / "results" / f"{arm}_{seed}.json"
    if result.exists():
        return
    folder: Path = words.folder / f"{arm}_{seed}"
    listed = cohort / f"{arm if arm in ('naive', 'full_only', 'oracle') else 'partial'}.json"
    rounds = 2 if ARMS[arm].get("strategy") in ("two_stage", "both") else 1
    num_epochs = round(words.steps / (rounds * len(words.folds) * STEPS_PER_EPOCH))
    settings = {
        "modality": "CT",
        "datalist": str(listed.resolve()),
        "dataroot": str(cohort.resolve()),
        "name": f"{arm}, seed {seed}",
        "seed": seed,
        "num_steps_per_epoch": STEPS_PER_EPOCH,
        "num_epochs": num_epochs,
        "num_epochs_per_validation": max(1, num_epochs // 4),
        "folds": words.folds,
        "algos": ["segresnet"],
        # The same for every arm, whatever its cases look like; intensities as in the FLARE23 paper.
        "resample_resolution": [words.spacing] * 3,
        "roi_size": [48, 48, 40],
        "batch_size": BATCH_SIZE,
        "normalize_mode": "range",
        "intensity_bounds": [-250, 250],
        "augment": "light",
        "segresnet": {"init_filters": 8, "blocks_down": [1, 2, 2], "dsdepth": 2},
        "ensemble": {"combine": "mean"},
        **ARMS[arm],
    }
    write_text(folder / "input.yaml", json.dumps(settings, indent=1) + "\n")  # JSON is YAML
    print(f"{arm}, seed {seed}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "autoseg", "run", "--input", str(folder / "input.yaml")], check=True)
    run = Workspace(folder / "work_dir")
    found = evaluate(run.finished().predictions, cohort / "truth", classes=NAMES)
    places = run.rounds() or [run]
    values = {n: mean_score([[row[i]] for row in found.scores["dice"].values()]) for i, n in enumerate(NAMES)}
    write_json(
        result,
        {
            "arm": arm,
            "seed": seed,
            "dice": {n: None if math.isnan(v) else round(v, 4) for n, v in values.items()},
            "training_s": round(sum(steps_seconds(p.job_dir(j.algo, j.fold)) for p in places for j in p.jobs()), 1),
            "steps": rounds * len(words.folds) * num_epochs * STEPS_PER_EPOCH,
            "jobs": sum(len(place.jobs()) for place in places),
            "pseudo_labels": truth_of_pseudo_labels(places[-1], cohort) if rounds > 1 else None,
            "settings": {k: v for k, v in settings.items() if k not in ("datalist", "dataroot")},
            "cohort": {k: getattr(words, k) for k in ("full", "organs5", "tumor_only", "unlabeled", "test")},
            "environment": environment(),
        },
    )


def steps_seconds(job: JobDir) -> float:
    """Seconds of a job's training steps, validation left out."""
    epochs = [json.loads(line) for line in job.metrics.read_text().splitlines()]
    begun = [0, *(e["step"] for e in epochs)]
    return sum(BATCH_SIZE * (e["step"] - before) / e["samples_per_s"] for before, e in zip(begun, epochs, strict=False))


def truth_of_pseudo_labels(place: Workspace, cohort: Path) -> dict[str, dict[str, Any]]:
    """Dice of what the models of the round before said, against the truth, by class: of the accepted and the rejected.

    A class that a case's truth does not have is left out, unless the models found it.
    """
    found: dict[str, dict[str, list[float]]] = {n: {"accepted": [], "rejected": []} for n in NAMES}
    label_map = LabelMap(names=NAMES, values=tuple((i + 1,) for i in range(len(NAMES))))
    rows = json.loads(place.audit.read_text())["rows"]
    for case in sorted({row["case"] for row in rows}):
        said, truth = (
            read_label(folder / f"{case}.nii.gz").array[0]
            for folder in (place.pseudolabels / "predicted", cohort / "labels_complete")
        )
        dice = dict(zip(NAMES, dice_per_class(said, truth, label_map), strict=True))
        for row in rows:
            if row["case"] == case and not math.isnan(value := dice[row["name"]]):
                found[row["name"]]["rejected" if row["rejected"] else "accepted"].append(value)
    return {
        n: {verdict: {"dice": round(mean(list(v)), 4) if v else None, "n": len(v)} for verdict, v in verdicts.items()}
        for n, verdicts in found.items()
        if any(verdicts.values())
    }


def mean(values: list[float | None]) -> float:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else math.nan


def _weighted(found: Iterable[dict[str, Any]]) -> str:
    parts = [part for part in found if part["n"]]
    num = sum(part["n"] for part in parts)
    return f"{sum(part['n'] * part['dice'] for part in parts) / num:.3f} ({num})" if num else "-"


def write_table(words: argparse.Namespace) -> None:
    """Print and store what is done so far: a row for each arm, means over the seeds; of classes that occur."""
    results = [json.loads(p.read_text()) for p in sorted((words.folder / "results").glob("*.json"))]
    occurring = {seed: occurring_classes(words.folder / f"cohort_{seed}") for seed in {r["seed"] for r in results}}
    groups = {
        "six-class organs": [n for n in SIX if n != "tumor"],
        "other organs": list(OTHERS),
        "organs": [n for n in NAMES if n != "tumor"],
        "tumor": ["tumor"],
    }
    rows: list[dict[str, Any]] = []
    for arm in ARMS:
        mine = [r for r in results if r["arm"] == arm]
        if mine:
            by_seed = {
                g: [mean([r["dice"][n] for n in names if n in occurring[r["seed"]]]) for r in mine]
                for g, names in groups.items()
            }
            rows.append(
                {
                    "arm": arm,
                    "seeds": [r["seed"] for r in mine],
                    **{g: round(mean(list(v)), 4) for g, v in by_seed.items()},
                    "by_seed": {g: [round(x, 4) for x in v] for g, v in by_seed.items()},
                    "training_s": round(mean([r["training_s"] for r in mine]), 1),
                }
            )
    lines = [f"| arm | {' | '.join(groups)} | training, s | seeds |", f"|{'---|' * (len(groups) + 3)}"]
    for row in rows:
        figures = " | ".join(f"{row[g]:.3f} ({', '.join(f'{x:.3f}' for x in row['by_seed'][g])})" for g in groups)
        seeds = ", ".join(map(str, row["seeds"]))
        lines.append(f"| {row['arm']} | {figures} | {row['training_s']:.0f} | {seeds} |")
    for seed, found in sorted(occurring.items()):
        if lacking := [n for n in NAMES if n not in found]:
            lines += ["", f"Not counted, since no testing case of seed {seed} has it: {', '.join(lacking)}"]
    told = [r["pseudo_labels"] for r in results if r["arm"] == "both" and r["pseudo_labels"]]
    if told:
        lines += [
            "",
            "Pseudo-labels of both against the truth, Dice (cases)",
            "",
            "| class | accepted | rejected |",
            "|---|---|---|",
        ]
        for name in NAMES:
            mine = [t[name] for t in told if name in t]
            cells = [_weighted(m[verdict] for m in mine) for verdict in ("accepted", "rejected")]
            lines += [f"| {name} | {' | '.join(cells)} |"] if mine else []
    oracle = next((r["organs"] for r in rows if r["arm"] == "oracle"), None)
    both = next((r["organs"] for r in rows if r["arm"] == "both"), None)
    if oracle and both:
        lines += ["", f"both reaches {both / oracle:.1%} of the oracle's organ Dice."]
    print("\n".join(lines), flush=True)
    write_json(words.folder / "partial_labels.json", {"rows": rows, "results": results})
    write_text(words.folder / "partial_labels.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
