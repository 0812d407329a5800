"""Time and memory of a whole prediction, file in and label file out, against the network alone and MONAI's own path.

    python benchmarks/inference.py --torso ../shared/data/torso

The network is a SegResNet with 16 filters and random weights, its windows 96x96x96 with half overlap. The torso CT is
resampled to 1.5 mm and cut to whole windows, so that all lay the same ones. Each contender is a process of its own;
"the network" passes as many windows of noise through it. MONAI's path is LoadImaged, Orientationd, Spacingd,
ScaleIntensityRanged, SlidingWindowInferer, Invertd, AsDiscreted, SaveImaged. Labels are compared voxel by voxel.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from measure import Contender
from scipy import ndimage

from autoseg.algos.networks import build_network
from autoseg.algos.plan import Plan
from autoseg.workspace import Job, Workspace, write_yaml

ROI = 96
LONG = {"512x512x1500": (512, 512, 1500), "512x512x3000": (512, 512, 3000)}

BARE = """
import json, sys, time
from pathlib import Path
import torch
from autoseg.algos.device import pick_device
from autoseg.inference.predictor import Predictor
from autoseg.inference.windows import window_starts
from autoseg.data.streams import open_image
from autoseg.data.preprocess import PreparedRows
from autoseg.workspace import Workspace
predictor = Predictor([Workspace(Path(sys.argv[1])).job_dir("segresnet", 0)])
model = predictor.models[0]
image = PreparedRows(open_image([Path(sys.argv[2])]), model.plan.preprocessing)
count = 1
for size, roi in zip(image.shape, model.plan.roi_size):
    count *= len(window_starts(max(size, roi), roi, model.plan.overlap))
window = torch.randn(1, 1, *model.plan.roi_size).to(memory_format=torch.channels_last_3d)
with torch.inference_mode():
    model.network(window)
    start = time.perf_counter()
    for _ in range(min(count, 20)):
        model.network(window)
    seconds = (time.perf_counter() - start) * count / min(count, 20)
json.dump({"windows": count, "seconds": seconds}, open(sys.argv[3], "w"))
"""
MONAI = """
import sys
from pathlib import Path
import torch
from monai.data import Dataset
from monai.inferers import SlidingWindowInferer
from monai.transforms import (AsDiscreted, Compose, EnsureChannelFirstd, Invertd, LoadImaged, Orientationd,
    SaveImaged, ScaleIntensityRanged, Spacingd)
from autoseg.inference.predictor import Predictor
from autoseg.workspace import Workspace
model = Predictor([Workspace(Path(sys.argv[1])).job_dir("segresnet", 0)]).models[0]
plan = model.plan
norm = plan.channels[0]
low, high = norm.bounds
pre = Compose([
    LoadImaged("image"), EnsureChannelFirstd("image"), Orientationd("image", "RAS"),
    Spacingd("image", plan.resample_resolution, mode="bilinear"),
    ScaleIntensityRanged("image", low, high, (low - norm.mean) / norm.std, (high - norm.mean) / norm.std, clip=True),
])
post = Compose([
    Invertd("pred", pre, "image", nearest_interp=False, to_tensor=True), AsDiscreted("pred", argmax=True),
    SaveImaged("pred", output_dir=sys.argv[3], output_postfix="", separate_folder=False, output_dtype="uint8",
               resample=False, print_log=False),
])
inferer = SlidingWindowInferer(plan.roi_size, 1, plan.overlap, mode="gaussian")
data = Dataset([{"image": sys.argv[2]}], pre)[0]
with torch.inference_mode():
    data["pred"] = inferer(data["image"][None], lambda x: model.network(x.as_tensor()).softmax(1))[0]
    post(data)
"""


def make_job(root: Path, num_classes: int, spacing_mm: float) -> Path:
    """A trained job with random weights that are spread enough for many classes to occur."""
    plan = Plan.model_validate(
        {
            "algo": "segresnet",
            "fold": 0,
            "classes": [{"name": f"class_{i}", "values": [i]} for i in range(1, num_classes + 1)],
            "sigmoid": False,
            "ignore_label": None,
            "channels": [{"mode": "ct", "bounds": (-160, 240), "mean": 40.0, "std": 100.0}],
            "resample_resolution": (spacing_mm,) * 3,
            "crop_foreground": False,
            "network": {
                "init_filters": 16, "blocks_down": [1, 2, 2, 4], "dsdepth": 1, "norm": "INSTANCE", "resolution": None,
            },
            "roi_size": (ROI, ROI, ROI),
            "batch_size": 2,
            "foreground_fraction": 0.5,
            "mirror_axes": (),
            "augment": "none",
            "num_epochs": 1,
            "num_steps_per_epoch": 1,
            "budget_s": None,
            "num_epochs_per_validation": 1,
            "learning_rate": 1e-3,
            "weight_decay": 0.0,
            "warmup_fraction": 0.0,
            "grad_clip": 1.0,
            "ema_decay": 0.0,
            "loss": "dice_ce",
            "overlap": 0.5,
            "tta": False,
            "precision": "auto",
            "seed": 0,
        }
    )  # fmt: skip
    workspace = Workspace(root)
    job = workspace.job_dir("segresnet", 0)
    write_yaml(job.plan, plan.model_dump(mode="json"))
    torch.manual_seed(0)
    network = build_network(plan)
    job.model.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), job.model)
    workspace.write_job(Job(algo="segresnet", fold=0, state="done"))
    return root


def make_torso(source: Path, target: Path) -> Path:
    """The torso CT at 1.5 mm, cut to whole windows with half overlap."""
    image = nib.load(source / "ct.nii.gz")
    voxels = ndimage.zoom(np.asarray(image.dataobj, np.float32), 2, order=1, grid_mode=True, mode="nearest")
    keep = tuple(slice(0, ROI + (size - ROI) // (ROI // 2) * (ROI // 2)) for size in voxels.shape)
    affine = image.affine.copy()
    affine[:3, :3] /= 2
    nib.save(nib.Nifti1Image(np.rint(voxels[keep]).astype(np.int16), affine), target)
    return target


def make_long(source: Path, target: Path, shape: tuple[int, int, int]) -> Path:
    """The torso CT stretched to a whole body's size and repeated along it, 0.75 mm in plane and 1.5 mm along."""
    image = np.asarray(nib.load(source / "ct.nii.gz").dataobj)
    index = [np.arange(n) * image.shape[a] // n for a, n in enumerate(shape[:2])]
    index.append(np.arange(shape[2]) // 2 % image.shape[2])
    nib.save(nib.Nifti1Image(image[np.ix_(*index)].astype(np.int16), np.diag([0.75, 0.75, 1.5, 1.0])), target)
    return target


def predict(work_dir: Path, image: Path, output: Path) -> Contender:
    """The installed command."""
    more = ["--work_dir", str(work_dir), "--image", str(image), "--output", str(output)]
    command = [sys.executable, "-m", "autoseg", "predict", *more, "--algo", "segresnet", "--fold", "0"]
    return Contender(name="autoseg predict", command=command, clean=lambda: output.unlink(missing_ok=True))


def compare(torso: Path, scratch: Path, num_classes: int, *, rivals: bool) -> None:
    """The network alone, autoseg, MONAI: a table."""
    import json

    work_dir = make_job(scratch / f"work_{num_classes}", num_classes - 1, 1.5)
    ours = predict(work_dir, torso, scratch / "ours.nii.gz")
    found = scratch / "bare.json"
    bare = Contender(name="network alone", command=[sys.executable, "-c", BARE, str(work_dir), str(torso), str(found)])
    bare.run()
    alone = json.loads(found.read_text())
    ours.run()
    ours.run(memory=True)
    rows = [("network alone", alone["seconds"], float("nan")), (ours.name, ours.seconds[0], ours.mib)]
    agree = ""
    if rivals:
        folder = scratch / "monai"
        theirs = Contender(
            name="MONAI's path", command=[sys.executable, "-c", MONAI, str(work_dir), str(torso), str(folder)]
        )
        theirs.run()
        theirs.run(memory=True)
        rows.append((theirs.name, theirs.seconds[0], theirs.mib))
        mine = np.asarray(nib.load(scratch / "ours.nii.gz").dataobj)
        other = np.asarray(nib.load(folder / torso.name).dataobj)
        either = (mine > 0) | (other > 0)
        agree = f"; labels equal in {(mine == other)[either].mean():.4%} of {either.sum()} foreground voxels"
    shape = "x".join(str(s) for s in nib.load(torso).shape)
    print(f"\n### {shape}, {num_classes} outputs, {alone['windows']} windows{agree}\n")
    print("| | s | of the network alone | autoseg takes | peak MiB (PSS) | autoseg takes |\n|---|---|---|---|---|---|")
    for name, seconds, mib in rows:
        print(
            f"| {name} | {seconds:.1f} | {seconds / alone['seconds']:.2f} | {ours.seconds[0] / seconds:.2f} | "
            f"{mib:.0f} | {ours.mib / mib:.2f} |"
        )


def long_volumes(source: Path, scratch: Path, names: list[str]) -> None:
    """Peak memory of long volumes with 105 outputs."""
    work_dir = make_job(scratch / "work_long", 104, 3.0)
    for name in names:
        image = make_long(source, scratch / f"{name}.nii.gz", LONG[name])
        ours = predict(work_dir, image, scratch / "long_out.nii.gz")
        ours.run(memory=True)
        print(f"\n{name}, 105 outputs at 3 mm: {ours.mib:.0f} MiB at most", flush=True)
        image.unlink()


def main() -> None:
    """Make the data, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torso", type=Path, required=True, help="folder with ct.nii.gz")
    parser.add_argument("--only", choices=["14", "105", *LONG], help="one part of it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="autoseg-benchmark-") as folder:
        scratch = Path(folder)
        print(f"{os.cpu_count()} CPUs, torch {torch.__version__}, load {os.getloadavg()[0]:.2f} at the start")
        torso = make_torso(options.torso, scratch / "torso.nii.gz")
        for num in (14, 105):
            if options.only in (None, str(num)):
                compare(torso, scratch, num, rivals=True)
        names = [name for name in LONG if options.only in (None, name)]
        if names:
            long_volumes(options.torso, scratch, names)
        print(f"\nload {os.getloadavg()[0]:.2f} at the end")


if __name__ == "__main__":
    main()
