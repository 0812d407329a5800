"""How well predicted Dice, flags and volumes' intervals hold on cases that no model has seen, whole and spoilt.

    python benchmarks/quality.py --shared ../shared --folder OUT
    python benchmarks/quality.py --shared ../shared --folder OUT --set acdc --budget 15m

Trains on most cases of a shared set (hippocampus: 140 of 200; acdc: 42 of 60, patients whole), then predicts the others
as they are, and spoilt copies of them: ten of each kind, five a little and five a lot. What is spoilt here is not the
code that spoils copies for the fit (`autoseg.ensemble.corruptions`), though some kinds are alike; "other organ" is
unlike any. A run that is done is not done again. The table is printed and lies in OUT/SET/quality.json.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import zoom
from scipy.stats import spearmanr

from autoseg.data.grid import Volume
from autoseg.data.volumes import read_image, read_label
from autoseg.ensemble.predict import load_from
from autoseg.evaluation.metrics import dice_per_class
from autoseg.evaluation.shapes import shapes_of
from autoseg.inference.predictor import Predictor
from autoseg.workspace.files import write_json
from autoseg.workspace.usage import environment

SETS = {"hippocampus": (140, "prostate_mr_small"), "acdc": (42, "hippocampus")}
"""Cases to train on, the first by name; and the set whose images are another organ."""
KINDS = ("noise", "bias", "crop", "spacing", "flipped", "other organ")
COPIES = 10
"""Of each kind."""
FAILED = 0.7
"""Mean Dice below which a case should have been looked at."""
POOLS, FAILING = 200, 0.08
"""Pools that are drawn, and the share of failures in each: of a pool with more than a tenth, no worst tenth has all."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/hippocampus and so on")
    parser.add_argument("--folder", type=Path, required=True, help="for runs and results")
    parser.add_argument("--set", choices=SETS, default="hippocampus")
    parser.add_argument("--budget", default="5m", help="of the run")
    parser.add_argument("--most", type=int, default=1000, help="test cases at most")
    words = parser.parse_args()
    data = words.shared.absolute() / "data"
    folder = words.folder.absolute() / words.set
    num_train, other = SETS[words.set]
    pairs = pairs_of(data / words.set)
    work_dir = trained(folder, pairs[:num_train], data / words.set, words.budget)
    foreign = sorted((data / other / "imagesTr").glob("*.nii.gz"))
    predictor = load_from(work_dir, device="cpu")
    rows = rows_of(predictor, pairs[num_train:][: words.most], foreign)
    table = {
        "set": words.set,
        "budget": words.budget,
        "environment": environment(),
        **summary(rows),
        "out_of_fold": out_of_fold(work_dir),
        "rows": rows,
    }
    write_json(folder / "quality.json", table)
    print(json.dumps({key: value for key, value in table.items() if key != "rows"}, indent=1))


def pairs_of(folder: Path) -> list[tuple[Path, Path]]:
    """Image and label of each case, by name."""
    images = sorted((folder / "imagesTr").glob("*.nii.gz"))
    return [(image, label) for image in images if (label := folder / "labelsTr" / image.name).exists()]


def trained(folder: Path, pairs: list[tuple[Path, Path]], data: Path, budget: str) -> Path:
    """The work_dir of a run on some cases."""
    folder.mkdir(parents=True, exist_ok=True)
    work_dir = folder / "work_dir"
    if (work_dir / "ensemble" / "quality.json").exists():
        return work_dir
    training = []
    for image, label in pairs:
        patient = re.match(r"(patient\d+)", image.name)
        case = {"image": str(image), "label": str(label)}
        training.append(case | ({"group": patient[1]} if patient else {}))
    labels = json.loads((data / "dataset.json").read_text())["labels"]
    write_json(folder / "datalist.json", {"training": training, "labels": labels})
    write_json(
        folder / "input.yaml",
        {
            "name": data.name,
            "modality": "MRI",
            "datalist": "datalist.json",
            "dataroot": "/",
            "budget": budget,
            "device": "cpu",
        },
    )
    subprocess.run([sys.executable, "-m", "autoseg", "run", "--input", "input.yaml"], cwd=folder, check=True)
    return work_dir


# -- spoilt copies


def spoilt(kind: str, strong: bool, image: Volume, label: np.ndarray, foreign: Path) -> tuple[Volume, np.ndarray]:
    """A copy of an image, and its label."""
    array, random = image.array, np.random.default_rng(len(image.array[0].ravel()) + strong)
    low, high = (float(np.quantile(array, q)) for q in (0.01, 0.99))
    if kind == "noise":
        deviation = (0.4 if strong else 0.1) * (high - low)
        return replace(image, array=array + random.normal(0, deviation, array.shape).astype(np.float32)), label
    if kind == "bias":
        ramp = np.linspace(-1, 1, array.shape[2], dtype=np.float32)[None, None, :, None]
        return replace(image, array=low + (array - low) * np.exp((2.0 if strong else 0.7) * ramp)), label
    if kind == "crop":
        keep = int(array.shape[2] * (0.5 if strong else 0.8))
        grid = replace(image.grid.to_ras(), shape=(array.shape[1], keep, array.shape[3]))
        cut = np.ascontiguousarray(array[:, :, :keep])
        return Volume(array=cut, grid=grid), np.ascontiguousarray(label[:, :keep])
    if kind == "spacing":
        affine = image.grid.affine.copy()
        affine[:3, :3] *= 2.0 if strong else 1.25
        return Volume(array=array, grid=replace(image.grid, affine=affine)), label
    if kind == "flipped":
        axis = 2 if strong else 1
        return replace(image, array=np.ascontiguousarray(np.flip(array, axis + 1))), np.flip(label, axis)
    stranger = read_image((foreign,)).array[0]
    scale = [wanted / size for wanted, size in zip(array.shape[1:], stranger.shape, strict=True)]
    channel = zoom(stranger, scale, order=1).astype(np.float32)
    return replace(image, array=np.stack([channel] * len(array))), np.zeros_like(label)


def rows_of(predictor: Predictor, pairs: list[tuple[Path, Path]], foreign: list[Path]) -> list[dict[str, Any]]:
    """Every case as it is, then copies, spread over the cases."""
    jobs: list[tuple[int, str, bool]] = [(i, "", False) for i in range(len(pairs))]
    for k, kind in enumerate(KINDS):
        jobs += [((n * len(pairs) // COPIES + k) % len(pairs), kind, n % 2 == 1) for n in range(COPIES)]
    rows = []
    for number, (i, kind, strong) in enumerate(jobs):
        image, label = read_image((pairs[i][0],)), read_label(pairs[i][1]).array[0]
        if kind:
            image, label = spoilt(kind, strong, image, label, foreign[number % len(foreign)])
        row = row_of(predictor, image, label, timed=not kind)
        rows.append({"case": pairs[i][0].name, "kind": kind, "strong": strong, **row})
        print(f"{number + 1}/{len(jobs)} {pairs[i][0].name} {kind}", file=sys.stderr, flush=True)
    return rows


def row_of(predictor: Predictor, image: Volume, label: np.ndarray, *, timed: bool) -> dict[str, Any]:
    """What was predicted and said of an image, and what is true; with the processor's time with and without saying."""
    seconds = []
    for watching in (False, True) if timed else (True,):
        predictor.watches_traits = watching
        begin = time.process_time()
        labels = predictor.predict_labels(image)
        verdict = predictor.verdict(labels, image.spacing_mm) if watching else None
        seconds.append(time.process_time() - begin)
    assert verdict is not None
    named = predictor.label_map.named
    dice = dice_per_class(labels, label, named)
    truth = shapes_of(label, named, image.spacing_mm)
    return {
        "dice": [None if math.isnan(d) else d for d in dice],
        "predicted": [c.dice for c in verdict.classes],
        "low": [c.low for c in verdict.classes],
        "high": [c.high for c in verdict.classes],
        "volume_ml": [c.volume_ml for c in verdict.classes],
        "true_ml": [shape.volume_ml for shape in truth],
        "volumes": [[c.volume_low_ml, c.volume_high_ml] for c in verdict.classes],
        "reasons": list(verdict.reasons),
        "seconds": seconds if timed else None,
    }


# -- what it comes to


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures."""
    true = np.array([mean_of(row["dice"], nothing=1.0) for row in rows])
    said = np.array([mean_of(row["predicted"], nothing=0.0) for row in rows])
    clean = np.array([not row["kind"] for row in rows])
    flagged = np.array([bool(row["reasons"]) for row in rows])
    failed = true < FAILED
    with_quality, without = (sum(row["seconds"][i] for row in rows if row["seconds"]) for i in (1, 0))
    return {
        "num": len(rows),
        "num_clean": int(clean.sum()),
        "num_failed": int(failed.sum()),
        "spearman": correlation(said, true),
        "spearman_clean": correlation(said[clean], true[clean]),
        "caught_in_worst_tenth": caught(said, failed),
        "caught_in_as_many": share(failed[np.argsort(said, kind="stable")[: failed.sum()]]),
        "error_clean": round(float(np.abs(said - true)[clean].mean()), 4),
        "bias_clean": round(float((said - true)[clean].mean()), 4),
        "dice_clean": round(float(true[clean].mean()), 4),
        "dice_covered_clean": covered(rows, clean, "dice", ("low", "high")),
        "dice_covered_flagged": covered(rows, flagged, "dice", ("low", "high")),
        "volumes_covered_clean": covered(rows, clean & ~flagged, "true_ml", None),
        "volumes_covered": covered(rows, ~flagged, "true_ml", None),
        "more_time": round(with_quality / without - 1, 4) if without else None,
        "flagged": {
            kind or "clean": f"{sum(flagged[i] for i in at)}/{len(at)}"
            for kind in ("", *KINDS)
            if (at := [i for i, row in enumerate(rows) if row["kind"] == kind])
        },
        "failed_not_flagged": int((failed & ~flagged).sum()),
        "mean_by_kind": {
            kind or "clean": [round(float(values[at].mean()), 3) for values in (said, true)]
            for kind in ("", *KINDS)
            if len(at := np.array([i for i, row in enumerate(rows) if row["kind"] == kind], int))
        },
    }


def mean_of(values: list[float | None], *, nothing: float) -> float:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else nothing


def correlation(said: np.ndarray, true: np.ndarray) -> float:
    return round(float(spearmanr(said, true).statistic), 4)


def share(values: np.ndarray) -> float | None:
    return round(float(values.mean()), 4) if len(values) else None


def caught(said: np.ndarray, failed: np.ndarray) -> float | None:
    """Share of the failures in the worst tenth, mean over pools of all that is good and a few that failed."""
    good, bad = np.flatnonzero(~failed), np.flatnonzero(failed)
    num = min(len(bad), max(1, int(FAILING * len(good) / (1 - FAILING))))
    if not len(bad):
        return None
    random, shares = np.random.default_rng(0), []
    for _ in range(POOLS):
        pool = np.concatenate([good, random.choice(bad, num, replace=False)])
        worst = pool[np.argsort(said[pool], kind="stable")[: math.ceil(len(pool) / 10)]]
        shares.append(float(failed[worst].sum() / num))
    return round(float(np.mean(shares)), 4)


def covered(rows: list[dict[str, Any]], chosen: np.ndarray, key: str, ends: tuple[str, str] | None) -> list[Any]:
    """Share of true values, case by class, within their interval, and how many have one."""
    inside = []
    for row, is_chosen in zip(rows, chosen, strict=True):
        for i, value in enumerate(row[key] if is_chosen else []):
            low, high = (row[ends[0]][i], row[ends[1]][i]) if ends else row["volumes"][i]
            if value is not None and low is not None:
                inside.append(low <= value <= high)
    return [round(float(np.mean(inside)), 4) if inside else None, len(inside)]


def out_of_fold(work_dir: Path) -> dict[str, Any]:
    """What the run itself says of its predictions of Dice."""
    check = json.loads((work_dir / "ensemble" / "quality.json").read_text())["check"]
    return {key: value for key, value in check.items() if key != "points"}


if __name__ == "__main__":
    main()
