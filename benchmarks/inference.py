"""Time and memory of a whole prediction, file in and label file out, against the network alone and MONAI's own path.

    python benchmarks/inference.py --shared ../shared                  all that needs no GPU, parts one after the other
    python benchmarks/inference.py --shared ../shared --part 105       one part; several may be named
    python benchmarks/inference.py --shared ../shared --small          minutes, to see that it works; no figures to keep

Parts: 14, 105 (outputs, torso at 1.5 mm, MONAI beside it), fine (the same at 1.0 mm, 14 outputs, without MONAI),
highres (105 outputs at 1.5 and 3 mm side by side), hippocampus (60 cases in one call), long1500 and long3000 (512x512
slices), fast (a five-model ensemble trained on a cohort, with --fast and without), fast_fine (the same with the models
working at 1.5 mm, time alone), host (what is left for the processor beside a GPU, which is faked), gpu (the
ensemble on CTs of 55 to 554 slices, each from a cold start; wants a GPU).

The network is a SegResNet with 16 filters and random weights, its windows 96x96x96 with half overlap. The torso CT is
resampled to 1.5 mm and cut to whole windows, so that all lay the same ones. Each contender is a process of its own;
"the network" passes as many windows of noise through it. MONAI's path is LoadImaged, Orientationd, Spacingd,
ScaleIntensityRanged, sliding_window_inference, Invertd, AsDiscreted, SaveImaged; it is given our windows' weights,
since it lifts its own where they are small. It runs twice: with the network as MONAI and PyTorch make it, and with the
kernels that autoseg chooses. Labels are compared voxel by voxel.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import yaml
from equal_budget import NnUNet
from host import host_work
from host import make_job as make_random_job
from measure import Contender
from scipy import ndimage

from autoseg.workspace.jobs import Job
from autoseg.workspace.workspace import Workspace

ROI = 96
MOST = 10**6
"""Voxels of the torso along an axis at most."""
PLANE = 512
LONG = {"long1500": 1500, "long3000": 3000}
SMALL_BUDGET = "60s"
"""Of the ensemble with --small."""
FINE_MM = 1.5
"""Voxels of the models in the part fast_fine."""
GPU_SLICES = (55, 110, 215, 330, 440, 554)
PARTS = ("14", "105", "fine", "highres", "hippocampus", *LONG, "fast", "fast_fine", "host", "gpu")
NNUNET_S = 41.0
"""Seconds of nnU-Net for 60 hippocampus cases with one model, without mirroring, on another machine
(research/measured_baselines.md)."""

BARE = """
import json, sys, time
from pathlib import Path
import torch
from autoseg.data.windowing import window_starts
from autoseg.hardware.device import autocast
from autoseg.inference.predictor import Predictor
from autoseg.data.streams import open_image
from autoseg.data.preprocess import PreparedRows
from autoseg.workspace.workspace import Workspace
predictor = Predictor([Workspace(Path(sys.argv[1])).job_dir("segresnet", 0)])
model = predictor.models[0]
image = PreparedRows(open_image([Path(sys.argv[2])]), model.plan.preprocessing)
count = 1
for size, roi in zip(image.shape, model.plan.roi_size):
    count *= len(window_starts(max(size, roi), roi, model.plan.overlap))
window = torch.randn(1, 1, *model.plan.roi_size).to(memory_format=torch.channels_last_3d)
with torch.inference_mode(), autocast(predictor.device, model.plan.precision):
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
from monai.inferers import sliding_window_inference
from monai.transforms import (AsDiscreted, Compose, EnsureChannelFirstd, Invertd, LoadImaged, Orientationd,
    SaveImaged, ScaleIntensityRanged, Spacingd)
from autoseg.networks import build_network
from autoseg.inference.predictor import Predictor
from autoseg.data.windowing import SIGMA_SCALE
from autoseg.hardware.device import autocast
from autoseg.workspace.workspace import Workspace
job = Workspace(Path(sys.argv[1])).job_dir("segresnet", 0)
predictor = Predictor([job])
model = predictor.models[0]
plan, network = model.plan, model.network
if sys.argv[4] == "as it comes":
    network = build_network(plan).eval()
    network.load_state_dict(torch.load(job.model, weights_only=True))
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
weights = torch.ones(1)
for size in plan.roi_size:
    at = torch.arange(size) - (size - 1) / 2
    weights = weights[..., None] * torch.exp(-0.5 * (at / (size * SIGMA_SCALE)) ** 2)
data = Dataset([{"image": sys.argv[2]}], pre)[0]
with torch.inference_mode(), autocast(predictor.device, model.plan.precision):
    data["pred"] = sliding_window_inference(
        data["image"][None], plan.roi_size, 1, lambda x: network(x.as_subclass(torch.Tensor)), plan.overlap,
        mode="gaussian", roi_weight_map=weights[0],
    )[0]
    post(data)
"""


def make_job(
    root: Path,
    num_classes: int,
    spacing_mm: float,
    *,
    fold: int = 0,
    roi: tuple[int, int, int] | None = None,
    **changes: object,
) -> Path:
    """A trained job with random weights that are spread enough for many classes to occur."""
    blocks = [1, 2, 2, 4]
    values: dict[str, object] = {
        "resample_resolution": (spacing_mm,) * 3,
        "network": {
            "init_filters": 16, "blocks_down": blocks, "dsdepth": 1, "norm": "INSTANCE", "resolution": None,
        },
        "precision": "auto",
    }  # fmt: skip
    make_random_job(root, num_classes + 1, roi or (ROI, ROI, ROI), fold=fold, **{**values, **changes})
    workspace = Workspace(root)
    workspace.write_job(Job(algo="segresnet", fold=fold, state="done"))
    return root


def make_torso(source: Path, target: Path, finer: int) -> Path:
    """The torso CT with voxels of 3 mm over `finer`, cut to whole windows with half overlap."""
    image = nib.load(source / "ct.nii.gz")
    voxels = ndimage.zoom(np.asarray(image.dataobj, np.float32), finer, order=1, grid_mode=True, mode="nearest")
    sizes = [min(size, MOST) for size in voxels.shape]
    keep = tuple(slice(0, ROI + (size - ROI) // (ROI // 2) * (ROI // 2)) for size in sizes)
    affine = image.affine.copy()
    affine[:3, :3] /= finer
    nib.save(nib.Nifti1Image(np.rint(voxels[keep]).astype(np.int16), affine), target)
    return target


def make_long(source: Path, target: Path, slices: int) -> Path:
    """A CT stretched to a plane of 512x512 of 0.75 mm and repeated along the body, 1.25 mm a slice: 3,000 are 3.75 m,
    and autoseg refuses what is longer than 4."""
    image = np.asarray(nib.load(source).dataobj)
    index = [np.arange(PLANE) * image.shape[a] // PLANE for a in range(2)]
    index.append(np.arange(slices) // 2 % image.shape[2])
    nib.save(nib.Nifti1Image(image[np.ix_(*index)].astype(np.int16), np.diag([0.75, 0.75, 1.25, 1.0])), target)
    return target


def autoseg(*words: str) -> list[str]:
    """The installed command."""
    return [sys.executable, "-m", "autoseg", *words]


def predict(work_dir: Path, image: Path, output: Path, *flags: str, ensemble: bool = False) -> Contender:
    """One call of `autoseg predict`, with one model or the ensemble."""
    words = ["--work_dir", str(work_dir), "--image", str(image), "--output", str(output), *flags]
    words += [] if ensemble else ["--algo", "segresnet"]

    def clean() -> None:
        for path in [output] if output.is_file() else output.glob("*.nii.gz"):
            path.unlink()

    return Contender(name="autoseg predict " + " ".join(flags), command=autoseg("predict", *words), clean=clean)


def shape_of(path: Path) -> str:
    """Of an image, for a heading."""
    return "x".join(str(s) for s in nib.load(path).shape)


def equal_share(first: Path, second: Path) -> tuple[float, int]:
    """Share of voxels that either label file gives to a class on which both agree, and how many these are."""
    mine, other = np.asarray(nib.load(first).dataobj), np.asarray(nib.load(second).dataobj)
    either = (mine > 0) | (other > 0)
    return float((mine == other)[either].mean()), int(either.sum())


def compare(torso: Path, scratch: Path, num_outputs: int, spacing_mm: float, *, rivals: bool) -> None:
    """The network alone, autoseg, MONAI: a table."""
    work_dir = make_job(scratch / f"work_{num_outputs}_{spacing_mm}", num_outputs - 1, spacing_mm)
    ours = predict(work_dir, torso, scratch / "ours.nii.gz")
    found = scratch / "bare.json"
    bare = Contender(name="network alone", command=[sys.executable, "-c", BARE, str(work_dir), str(torso), str(found)])
    bare.run()
    alone = json.loads(found.read_text())
    ours.run()
    ours.run(memory=True)
    rows = [("network alone", alone["seconds"], float("nan")), (ours.name, ours.seconds[0], ours.mib)]
    agree = ""
    for how in ("as it comes", "our kernels") if rivals else ():
        folder = scratch / "monai"
        command = [sys.executable, "-c", MONAI, str(work_dir), str(torso), str(folder), how]
        theirs = Contender(name=f"MONAI's path, network: {how}", command=command)
        theirs.run()
        theirs.run(memory=True)
        rows.append((theirs.name, theirs.seconds[0], theirs.mib))
        share, num = equal_share(scratch / "ours.nii.gz", folder / torso.name)
        agree += f"; labels equal in {share:.4%} of {num} foreground voxels ({how})"
    print(f"\n### {shape_of(torso)}, {num_outputs} outputs, {alone['windows']} windows{agree}\n")
    print("| | s | of the network alone | autoseg takes | peak MiB (PSS) | autoseg takes |\n|---|---|---|---|---|---|")
    for name, seconds, mib in rows:
        print(
            f"| {name} | {seconds:.1f} | {seconds / alone['seconds']:.2f} | {ours.seconds[0] / seconds:.2f} | "
            f"{mib:.0f} | {ours.mib / mib:.2f} |",
            flush=True,
        )


def highres(torso: Path, scratch: Path) -> None:
    """105 outputs at 1.5 and at 3 mm: the same image, two models."""
    print(f"\n### {shape_of(torso)}, 105 outputs, fine and coarse\n\n| model at | s | peak MiB (PSS) |\n|---|---|---|")
    for spacing in (1.5, 3.0):
        work_dir = make_job(scratch / f"work_highres_{spacing}", 104, spacing)
        ours = predict(work_dir, torso, scratch / "highres.nii.gz")
        ours.run()
        ours.run(memory=True)
        print(f"| {spacing} mm | {ours.seconds[0]:.1f} | {ours.mib:.0f} |", flush=True)


def hippocampus(source: Path, scratch: Path, num: int, venv_nn: Path | None, tools: Path) -> None:
    """Many small images in one call, the start included; nnU-Net beside it, with a model that is hardly trained."""
    folder = scratch / "hippocampus"
    folder.mkdir()
    paths = sorted(p for p in (source / "imagesTr").glob("*.nii.gz") if not p.name.startswith("."))[:num]
    for path in paths:
        (folder / path.name).symlink_to(path.resolve())
    network = {"init_filters": 16, "blocks_down": [1, 2, 2], "dsdepth": 1, "norm": "INSTANCE", "resolution": None}
    work_dir = make_job(
        scratch / "work_hippocampus", 2, 1.0, roi=(40, 56, 40), network=network, channels=[{"mode": "mri"}]
    )
    output = scratch / "hippocampus_out"
    ours = predict(work_dir, folder, output, "--timing")
    for _ in range(3):
        ours.run()
    table = json.loads((output / "timing.json").read_text())
    print(f"\n### {len(table['cases'])} hippocampus cases, one model, the start included\n")
    print(f"autoseg: {ours.median_s:.1f} s; phases (s): {table['sum']}", flush=True)
    if venv_nn is None:
        print(f"{ours.median_s / NNUNET_S:.2f} of the {NNUNET_S:.0f} s that nnU-Net took elsewhere for 60", flush=True)
        return
    rival = NnUNet(venv_nn.absolute(), tools, scratch / "nnunet")
    rival.root.mkdir()
    rival.set_up()
    rival.prepare(source, [path.name for path in paths])
    rival.train("planned", 1, 1)
    for way in ("planned", "malloc"):
        seconds = rival.predict(way, scratch / "nnunet_out", mirror=False)
        print(
            f"nnU-Net without mirroring, {way}: {seconds:.1f} s; autoseg takes {ours.median_s / seconds:.2f}",
            flush=True,
        )


def long_volume(source: Path, scratch: Path, slices: int) -> None:
    """Peak memory of a long volume with 105 outputs."""
    work_dir = make_job(scratch / "work_long", 104, 3.0)
    image = make_long(source / "ct.nii.gz", scratch / "long.nii.gz", slices)
    ours = predict(work_dir, image, scratch / "long_out.nii.gz")
    ours.run(memory=True)
    print(f"\n{PLANE}x{PLANE}x{slices}, 105 outputs at 3 mm: {ours.mib:.0f} MiB at most", flush=True)
    image.unlink()


def trained_ensemble(shared: Path, folder: Path, budget: str, num_test: int) -> tuple[Path, Path]:
    """Five models and a locator, trained on a cohort of abdomens; what is there is not made again.

    Returns:
        The folder of the run, and the cohort's.
    """
    cohort = folder / "cohort"
    if not (cohort / "input.yaml").exists():
        tool = [sys.executable, str(shared / "tools" / "make_abdomen_cohort.py"), "--out", str(cohort)]
        numbers = ["--full", "15", "--organs5", "0", "--tumor-only", "0", "--unlabeled", "0", "--test", str(num_test)]
        subprocess.run([*tool, *numbers, "--seed", "5"], check=True)
        given = yaml.safe_load((cohort / "input.yaml").read_text())
        given["inference"] = {"anywhere": ["tumor"]}
        given["algos"] = ["segresnet"]
        (cohort / "input.yaml").write_text(yaml.safe_dump(given))
    words = ["--input", str(cohort / "input.yaml"), "--work_dir", str(folder / "work")]
    locator_budget = "20s" if budget == SMALL_BUDGET else "5m"
    subprocess.run(autoseg("run", *words, "--budget", budget), check=True)
    subprocess.run(autoseg("train", *words, "--algo", "locator", "--budget", locator_budget), check=True)
    return folder / "work", cohort


def dice(shared: Path, predictions: Path, labels: Path) -> float:
    """Mean Dice by the independent tool."""
    tool = [sys.executable, str(shared / "tools" / "score_dice.py"), str(predictions), str(labels)]
    mean: float = json.loads(subprocess.run(tool, check=True, capture_output=True, text=True).stdout)["mean"]
    return mean


def fast(shared: Path, scratch: Path, keep: Path | None, budget: str, slices: int, num_test: int) -> None:
    """The five-model ensemble with --fast and without: Dice on held cases, time and memory on a large one."""
    work_dir, cohort = trained_ensemble(shared, keep or scratch, budget, num_test)
    tests = json.loads((cohort / "dataset.json").read_text())["testing"]
    images, labels = scratch / "fast_images", scratch / "fast_labels"
    for folder in (images, labels):
        folder.mkdir()
    for entry in tests:
        name = Path(entry["image"] if isinstance(entry, dict) else entry).name
        (images / name).symlink_to((cohort / "images" / name).resolve())
        (labels / name).symlink_to((cohort / "labels_complete" / name).resolve())
    image = make_long(next(images.iterdir()), scratch / "large.nii.gz", slices)
    rows = []
    for title, flags in (
        ("plain", []),
        ("no overlap", ["--overlap", "0"]),
        ("locator", ["--locate"]),
        ("first model's crop", ["--crop_to_first"]),
        ("--fast", ["--fast"]),
    ):
        output = scratch / "fast_out"
        predict(work_dir, images, output, *flags, ensemble=True).run()
        mean = dice(shared, output, labels)
        large = predict(work_dir, image, scratch / "large_out.nii.gz", *flags, ensemble=True)
        large.run()
        large.run(memory=True)
        rows.append((title, large.seconds[0], large.mib, mean))
        shutil.rmtree(output)
    print(f"\n### Five models, {shape_of(image)}; Dice on {len(tests)} held cases of the cohort\n")
    print("| | s | times as fast | peak MiB (PSS) | Dice | Dice points |\n|---|---|---|---|---|---|")
    for title, seconds, mib, mean in rows:
        gain = 100 * (mean - rows[0][3])
        print(
            f"| {title} | {seconds:.1f} | {rows[0][1] / seconds:.2f} | {mib:.0f} | {mean:.4f} | {gain:+.2f} |",
            flush=True,
        )


def fast_fine(shared: Path, scratch: Path, keep: Path | None, budget: str, slices: int, num_test: int) -> None:
    """The time of the same ensemble with --fast and without, its models told to work at 1.5 mm.

    The cohort's voxels are of 3 mm, so that a plane has few windows whatever they overlap; users' CTs are finer. What
    the models then find is of no worth, and is not scored.
    """
    trained, cohort = trained_ensemble(shared, keep or scratch, budget, num_test)
    work_dir = scratch / "fine_work"
    shutil.copytree(trained, work_dir, ignore=shutil.ignore_patterns("cache", "predictions", "out_of_fold", "records"))
    for plan in work_dir.glob("segresnet_*/configs/hyper_parameters.yaml"):
        spacing = f"resample_resolution: [{FINE_MM}, {FINE_MM}, {FINE_MM}]"
        plan.write_text(re.sub(r"^resample_resolution: \[[^]]*\]", spacing, plan.read_text(), flags=re.M))
    image = make_long(sorted((cohort / "images").iterdir())[0], scratch / "large.nii.gz", slices)
    print(f"\n### Five models at {FINE_MM} mm, {shape_of(image)}\n")
    seconds = []
    for flags in ([], ["--fast"]):
        large = predict(work_dir, image, scratch / "large_out.nii.gz", *flags, ensemble=True)
        large.run()
        seconds.append(large.seconds[0])
    print("| | s | times as fast |\n|---|---|---|")
    for title, s in zip(("plain", "--fast"), seconds, strict=True):
        print(f"| {title} | {s:.1f} | {seconds[0] / s:.2f} |", flush=True)


def host(small: bool) -> None:
    """What is left for the processor beside a GPU: the device is faked, and takes no time (host.py)."""
    shape = (64, 64, 40) if small else (PLANE, PLANE, 300)
    print("\n### The host's share, 14 outputs\n\n| device | image | windows | CPU ns a voxel |\n|---|---|---|---|")
    for device in ("meta", "cpu"):
        row = host_work(torch.device(device), shape, roi=(ROI, ROI, ROI))
        size = "x".join(map(str, shape))
        print(f"| {device} | {size} | {row['windows']} | {row['cpu_ns_a_voxel']:.1f} |", flush=True)


def on_gpu(shared: Path, scratch: Path, keep: Path | None, budget: str) -> None:
    """The challenge's limits, 15 s and 4 GB, on CTs as in Table 5 of the FLARE23 paper; each from a cold start."""
    work_dir, cohort = trained_ensemble(shared, keep or scratch, budget, 4)
    source = next((cohort / "images").iterdir())
    print("\n### Five models with --fast, cold start, each image a process\n")
    print("| image | s | expected s | GPU GB | expected GB | given up |\n|---|---|---|---|---|---|")
    for slices in GPU_SLICES:
        image = make_long(source, scratch / f"ct_{slices}.nii.gz", slices)
        target = scratch / f"gpu_{slices}.nii.gz"
        flags = ["--fast", "--timing", "--max_memory", "4GB", "--max_time", "15s", "--device", "cuda"]
        ours = predict(work_dir, image, target, *flags, ensemble=True)
        ours.run()
        (row,) = json.loads(target.with_name(f"gpu_{slices}.timing.json").read_text())["cases"]
        told = row["expected"]
        print(
            f"| {shape_of(image)} | {ours.seconds[0]:.1f} | {told['seconds']:.1f} | {row.get('device_gb', 0):.2f} | "
            f"{told['device_gb']:.2f} | {', '.join(told['given_up'])} |",
            flush=True,
        )


def main() -> None:
    """Make the data, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/torso, data/hippocampus and tools")
    parser.add_argument("--part", choices=PARTS, nargs="+", help="some parts alone; all but gpu where not given")
    parser.add_argument("--venv_nn", type=Path, help="environment with nnU-Net, to run it in the part hippocampus")
    parser.add_argument("--budget", default="60m", help="time to train the ensemble of the parts fast and gpu")
    parser.add_argument("--keep", type=Path, help="folder for that ensemble, to be used again")
    parser.add_argument("--small", action="store_true", help="small windows and images, to see that it works")
    options = parser.parse_args()
    torso = options.shared / "data" / "torso"
    parts = options.part or PARTS[:-1]
    slices, num_test, num_hippocampus, finer = 300, 6, 60, {"15": 2, "10": 3}
    if options.small:
        global ROI, MOST, PLANE
        ROI, MOST, PLANE = 32, 48, 64
        slices, num_test, num_hippocampus, finer = 40, 1, 3, {"15": 1, "10": 1}
        LONG.update(long1500=60, long3000=120)
        options.budget = SMALL_BUDGET
    with tempfile.TemporaryDirectory(prefix="autoseg-benchmark-") as folder:
        scratch = Path(folder)
        print(
            f"{os.cpu_count()} CPUs, torch {torch.__version__}, load {os.getloadavg()[0]:.2f} at the start", flush=True
        )
        coarse = make_torso(torso, scratch / "torso.nii.gz", finer["15"])
        for num in (14, 105):
            if str(num) in parts:
                compare(coarse, scratch, num, 3.0 / finer["15"], rivals=True)
        if "fine" in parts:
            fine = make_torso(torso, scratch / "fine.nii.gz", finer["10"])
            compare(fine, scratch, 14, 3.0 / finer["10"], rivals=False)
        if "highres" in parts:
            highres(coarse, scratch)
        if "hippocampus" in parts:
            data, tools = options.shared / "data" / "hippocampus", options.shared / "tools" / "nnunet"
            hippocampus(data, scratch, num_hippocampus, options.venv_nn, tools)
        for name, num in LONG.items():
            if name in parts:
                long_volume(torso, scratch, num)
        if "fast" in parts:
            fast(options.shared, scratch, options.keep, options.budget, slices, num_test)
        if "fast_fine" in parts:
            fast_fine(options.shared, scratch, options.keep, options.budget, slices, num_test)
        if "host" in parts:
            host(options.small)
        if "gpu" in parts:
            on_gpu(options.shared, scratch, options.keep, options.budget)
        print(f"\nload {os.getloadavg()[0]:.2f} at the end")


if __name__ == "__main__":
    main()
