"""Augmentation: what it costs a patch, and what it is worth in Dice after a fixed number of steps.

python benchmarks/augment.py cost --output OUT
python benchmarks/augment.py dice --output OUT --data DATA/hippocampus --roi 28,40,28 --batch 4 --steps 400 \
    --held_out like='hippocampus_.*[05].nii' --label all_axes --mirror 0,1,2
python benchmarks/augment.py table --output OUT

The part dice trains one SegResNet of 8 filters for as many steps whatever they take, so that a busy machine changes
nothing, on the cases of a folder with imagesTr and labelsTr that no `--held_out NAME=REGEX` names, and gives the Dice
of each group that is held out: of cases like the training cases, of shifted ones, and with `--copies` of ten of the
first group as a bad day spoils them (`autoseg.ensemble.corruptions`). `--mirror`, `--augment`, `--without`,
`--optimizer` and `--seed` are what is compared; PYTHONPATH of an older checkout compares versions. One thread
(OMP_NUM_THREADS=1) makes two runs of one version equal. The part table prints what is there.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from train import machine, written

from autoseg.data.datalists.cases import Case
from autoseg.data.volumes import read_image, read_label
from autoseg.ensemble.corruptions import MOST_TRIED, USUAL, corrupt
from autoseg.networks import segresnet
from autoseg.plan import Plan
from autoseg.training import augment
from autoseg.training.batches import LabelledBatches
from autoseg.training.cache import CachedCase, load_cases
from autoseg.training.patches import make_sampler
from autoseg.training.trainer import Trainer
from autoseg.workspace.jobs import JobDir

SHAPES = (
    # patch, patches a step, voxels of a case, spacing in mm
    ((28, 40, 28), 4, (36, 50, 35), (1.0, 1.0, 1.0)),
    ((80, 80, 8), 2, (216, 256, 9), (1.56, 1.56, 10.0)),
    ((96, 96, 96), 1, (160, 160, 160), (1.0, 1.0, 1.0)),
)
COST_STEPS = 60
RATES = {"muon": segresnet.LEARNING_RATES.muon, "adamw": segresnet.LEARNING_RATES.cpu}
"""What SegResNet is planned with on a CPU."""


def make_plan(num_classes: int, spacing_mm: tuple[float, ...], **changes: Any) -> Plan:
    """A small SegResNet with Muon, as CPUs get it."""
    x, y, z = spacing_mm
    is_anisotropic = not 0.75 <= (x + y) / 2 / z <= 1.25  # Auto3DSeg's rule, as autoseg/networks/segresnet.py has it
    values: dict[str, Any] = {
        "algo": "segresnet",
        "fold": 0,
        "classes": [{"name": f"structure {i}", "values": [i]} for i in range(1, num_classes + 1)],
        "sigmoid": False,
        "ignore_label": None,
        "channels": [{"mode": "meanstd"}],
        "resample_resolution": spacing_mm,
        "crop_foreground": False,
        "network": {
            "init_filters": 8,
            "blocks_down": [1, 2, 2],
            "dsdepth": 2,
            "norm": "INSTANCE",
            "resolution": list(spacing_mm) if is_anisotropic else None,
        },
        "foreground_fraction": 0.33,
        "mirror_axes": (0,),
        "augment": "default",
        "num_epochs": 1,
        "budget_s": None,
        "num_epochs_per_validation": 1,
        "optimizer": "muon",
        "learning_rate": 4e-3,
        "weight_decay": 1e-5,
        "warmup_fraction": 0.03,
        "grad_clip": 12.0,
        "ema_decay": 0.999,
        "loss": "dice_ce",
        "overlap": 0.5,
        "tta": False,
        "precision": "fp32",
        "seed": 0,
    }
    return Plan.model_validate({**values, **changes})


def synthetic_case(shape: tuple[int, ...]) -> CachedCase:
    """Noise with a box of each of two classes."""
    rng = np.random.default_rng(0)
    target = np.zeros((1, *shape), np.uint8)
    for k in (1, 2):
        target[(0, *(slice(k * s // 5, k * s // 5 + max(1, s // 4)) for s in shape))] = k
    points = np.argwhere(target[0] > 0)
    classes = target[0][tuple(points.T)] - 1
    order = np.argsort(classes, kind="stable")
    return CachedCase(
        name="noise",
        image=rng.normal(size=(1, *shape)).astype(np.float16),
        target=target,
        points=np.column_stack([classes, points])[order].astype(np.int32),
    )


def cost(output: Path, label: str) -> None:
    """CPU seconds of cutting and changing a patch, in milliseconds, by shape and strength."""
    for roi, batch, shape, spacing_mm in SHAPES:
        case = synthetic_case(shape)
        for strength in ("none", "light", "default"):
            plan = make_plan(
                2, spacing_mm, roi_size=roi, batch_size=batch, augment=strength, num_steps_per_epoch=COST_STEPS
            )
            batches = LabelledBatches(
                plan,
                make_sampler([case], plan),
                torch.device("cpu"),
                indices=range(batch),
                batch_size=batch,
                roi=roi,
                ahead=False,
            )
            batches.samples(0)
            begin = time.process_time()
            for step in range(COST_STEPS):
                batches.samples(step)
            cpu_s = (time.process_time() - begin) / COST_STEPS / batch
            name = f"{'x'.join(map(str, roi))}_{strength}{'_' + label if label else ''}"
            written(
                output / "augment_cost" / f"{name}.json",
                {"roi": roi, "augment": strength, "cpu_ms_a_patch": round(cpu_s * 1e3, 3), "label": label},
            )


def spoilt(case: Case, kind: str, output: Path) -> Case:
    """A copy of a case as a bad day spoils it, in files of its own; the same each time."""
    files = [output / kind / f"{case.name}_{part}.nii.gz" for part in ("image", "label")]
    if not all(f.exists() for f in files):
        files[0].parent.mkdir(parents=True, exist_ok=True)
        seed = int.from_bytes(f"{case.name} {kind}".encode()[-16:])
        random = np.random.default_rng(seed)
        image, label = corrupt(kind, read_image(case.images), read_label(case.label).array[0], random, USUAL[kind])
        affine = image.grid.to_ras().affine
        for file, array in zip(files, (np.moveaxis(image.array, 0, 3), label.astype(np.uint8)), strict=True):
            nib.save(nib.Nifti1Image(array, affine), file)
    return Case(name=f"{case.name}, {kind}", images=(files[0],), label=files[1])


def dice(a: argparse.Namespace) -> None:
    """Train for a fixed number of steps and score each held-out group."""
    label = a.label or "_".join([a.augment, *(f"no_{kind}" for kind in a.without), "x" * bool(a.mirror)]).strip("_")
    target = a.output / "augment_dice" / f"{a.data.name}_{label}_{a.steps}_seed{a.seed}.json"
    if target.exists():
        return
    found = machine()
    labels = json.loads((a.data / "dataset.json").read_text())["labels"]
    cases = [
        Case(name=path.name.removesuffix(".nii.gz"), images=(a.data / "imagesTr" / path.name,), label=path)
        for path in sorted((a.data / "labelsTr").glob("[!.]*.nii.gz"))
    ]
    groups = {name: [c for c in cases if re.search(regex, c.name)] for name, regex in a.held_out.items()}
    held_out = [c for group in groups.values() for c in group]
    training = [c for c in cases if c not in held_out][: a.most]
    if a.copies:
        for kind in USUAL:
            some = next(iter(groups.values()))[:MOST_TRIED]
            groups[kind] = [spoilt(c, kind, a.output / "augment_copies" / a.data.name) for c in some]
            held_out += groups[kind]
    if a.without:
        augment.KINDS[a.augment] = tuple(kind for kind in augment.KINDS[a.augment] if kind not in a.without)
    plan = make_plan(
        len(labels) - 1,
        a.spacing,
        roi_size=a.roi,
        batch_size=a.batch,
        num_steps_per_epoch=a.steps,
        augment=a.augment,
        mirror_axes=a.mirror,
        optimizer=a.optimizer,
        learning_rate=RATES[a.optimizer],
        seed=a.seed,
    )
    cached = {c.name: c for c in load_cases(a.output / "cache", plan, training + held_out, num_workers=1)}
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            plan,
            [cached[c.name] for c in training],
            [cached[held_out[0].name]],
            JobDir(Path(scratch) / "segresnet_0"),
            device=torch.device("cpu"),
        )
        begin = time.process_time()
        trainer.run()
        cpu_s = time.process_time() - begin
        scores = {
            name: np.array([trainer.validator.score(cached[c.name]).numpy() for c in group])
            for name, group in groups.items()
        }
    written(
        target,
        {
            "data": a.data.name,
            "label": label,
            "augment": a.augment,
            "without": a.without,
            "mirror_axes": a.mirror,
            "optimizer": a.optimizer,
            "seed": a.seed,
            "steps": a.steps,
            "roi": a.roi,
            "batch": a.batch,
            "training_cases": len(training),
            "dice": {n: round(float(np.nanmean(s)), 4) for n, s in scores.items()},
            "dice_of_classes": {n: [round(float(v), 4) for v in np.nanmean(s, 0)] for n, s in scores.items()},
            "held_out_cases": {n: len(s) for n, s in scores.items()},
            "cpu_s": round(cpu_s, 1),
            "machine": found,
        },
    )


def table(output: Path) -> None:
    """A line a run: each group's Dice, and the mean of the spoilt copies'."""
    for file in sorted((output / "augment_dice").glob("*.json")):
        run = json.loads(file.read_text())
        dice = dict(run["dice"])
        if copies := [dice.pop(kind) for kind in USUAL if kind in dice]:
            dice["copies"] = round(sum(copies) / len(copies), 4)
        print(f"{file.stem:55s}", "  ".join(f"{name} {value:.4f}" for name, value in dice.items()))


def main() -> None:
    def triple(text: str) -> tuple[int, ...]:
        return tuple(int(v) for v in text.split(",") if v)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("cost", "dice", "table"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--label", default="", help="name of an experiment")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--held_out", action="append", default=[], metavar="NAME=REGEX")
    parser.add_argument("--most", type=int, default=None, help="most training cases")
    parser.add_argument("--spacing", type=lambda text: tuple(map(float, text.split(","))), default=(1.0, 1.0, 1.0))
    parser.add_argument("--roi", type=triple, default=(28, 40, 28))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--augment", default="default", choices=[*augment.KINDS, "none"])
    parser.add_argument("--without", nargs="*", default=[], help="changes that are not drawn; rotate: nor scaled")
    parser.add_argument("--copies", action="store_true", help="score spoilt copies of the first group, too")
    parser.add_argument("--mirror", type=triple, default=(0,))
    parser.add_argument("--optimizer", choices=[*RATES], default="muon")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    a.output = a.output.absolute()
    if a.part == "cost":
        cost(a.output, a.label)
        return
    if a.part == "table":
        table(a.output)
        return
    if a.data is None or not a.held_out:
        parser.error("the part dice needs --data and --held_out")
    a.held_out = dict(item.split("=", 1) for item in a.held_out)
    dice(a)


if __name__ == "__main__":
    main()
