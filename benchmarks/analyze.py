"""Time and memory of the analysis: autoseg, MONAI's DataAnalyzer, nnU-Net's fingerprint and a bare read, side by side.

    python benchmarks/analyze.py --hippocampus ../shared/data/hippocampus --torso ../shared/data/torso --venv_nn VENV

All run on the same copy of the data: the hippocampus cases as they are, and the torso CT resampled to 1.5 mm 20
times (one voxel differs, so that no copy is a duplicate). They take turns, each in a process of its own, its start
included; the median of the rounds counts. Memory is taken in a further round, since looking at it costs time: the
largest sum over all processes of their proportional share (PSS), every 20 ms. Without --venv_nn nnU-Net is left out;
--python_monai names another environment's Python for MONAI.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from measure import Contender
from scipy import ndimage

from autoseg.data.datalists.datalist import read_datalist, write_datalist
from autoseg.data.formats.table import stem_of

BARE = """
import json, sys
import nibabel as nib, numpy as np
for case in json.load(open(sys.argv[1]))["training"]:
    np.asarray(nib.load(f"{sys.argv[2]}/{case['image']}").dataobj)
    np.asarray(nib.load(f"{sys.argv[2]}/{case['label']}").dataobj)
"""
MONAI = """
import sys
from monai.apps.auto3dseg import DataAnalyzer
if __name__ == "__main__":
    analyzer = DataAnalyzer(sys.argv[1], sys.argv[2], output_path=sys.argv[3], device="cpu")
    analyzer.get_all_case_stats()
"""
NUM_COPIES = 20
LARGE = (512, 512, 1000)


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set on disk."""

    name: str
    root: Path
    datalist: Path
    modality: str
    number: int
    """Of the nnU-Net data set."""


def make_hippocampus(source: Path, scratch: Path) -> Data:
    """The hippocampus cases where they are, with folds."""
    datalist = scratch / "hippocampus.json"
    write_datalist(read_datalist(source / "dataset.json", source), datalist, source)
    return Data(name="hippocampus", root=source.resolve(), datalist=datalist, modality="MRI", number=4)


def make_torso(source: Path, scratch: Path, num: int) -> Data:
    """Copies of the torso CT at 1.5 mm with its label."""
    root = scratch / "torso"
    image, label = nib.load(source / "ct.nii.gz"), nib.load(source / "labels.nii.gz")
    affine = image.affine.copy()
    affine[:3, :3] /= 2
    voxels = ndimage.zoom(np.asarray(image.dataobj, np.float32), 2, order=1, grid_mode=True, mode="nearest")
    voxels = np.rint(voxels).astype(image.get_data_dtype())
    classes = ndimage.zoom(np.asarray(label.dataobj), 2, order=0, grid_mode=True, mode="nearest")
    names = json.loads((source / "labels.json").read_text())
    found = {str(v) for v in np.unique(classes)}
    cases = []
    (root / "images").mkdir(parents=True, exist_ok=True)
    (root / "labels").mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(classes, affine), root / "labels" / "torso_00.nii.gz")
    for number in range(num):
        name = f"torso_{number:02}"
        voxels[number, 0, 0] += 1
        nib.save(nib.Nifti1Image(voxels, affine), root / "images" / f"{name}.nii.gz")
        if number:
            shutil.copy(root / "labels" / "torso_00.nii.gz", root / "labels" / f"{name}.nii.gz")
        cases.append({"image": f"images/{name}.nii.gz", "label": f"labels/{name}.nii.gz", "fold": number % 5})
    labels = {v: n for v, n in names.items() if v in found}
    datalist = scratch / "torso.json"
    datalist.write_text(json.dumps({"labels": labels, "training": cases[:NUM_COPIES]}))
    (scratch / "torso_more.json").write_text(json.dumps({"labels": labels, "training": cases}))
    return Data(name="torso", root=root, datalist=datalist, modality="CT", number=61)


def autoseg(data: Data, scratch: Path, datalist: Path | None = None) -> Contender:
    """The installed command on an input.yaml."""
    folder = scratch / f"autoseg_{data.name}"
    folder.mkdir(exist_ok=True)
    settings = folder / "input.yaml"
    shutil.copy(datalist or data.datalist, folder / "datalist.json")
    settings.write_text(f"modality: {data.modality}\ndatalist: datalist.json\ndataroot: {data.root}\nwork_dir: work\n")
    return Contender(
        name="autoseg analyze",
        command=[sys.executable, "-m", "autoseg", "analyze", "--input", str(settings)],
        clean=lambda: shutil.rmtree(folder / "work", ignore_errors=True),
    )


def monai(data: Data, scratch: Path, python: str) -> Contender:
    """MONAI's DataAnalyzer with its defaults."""
    output = scratch / f"monai_{data.name}.yaml"
    command = [python, "-c", MONAI, str(data.datalist), str(data.root), str(output)]
    return Contender(name="MONAI DataAnalyzer", command=command)


def bare(data: Data) -> Contender:
    """Every voxel read with nibabel, one process."""
    return Contender(name="nibabel read", command=[sys.executable, "-c", BARE, str(data.datalist), str(data.root)])


def nnunet(data: Data, scratch: Path, venv: Path) -> Contender:
    """nnU-Net's fingerprint extraction on two processes."""
    raw = scratch / "nnunet_raw" / f"Dataset{data.number:03}_{data.name}"
    (raw / "imagesTr").mkdir(parents=True, exist_ok=True)
    (raw / "labelsTr").mkdir(exist_ok=True)
    listed = json.loads(data.datalist.read_text())
    for case in listed["training"]:
        name = stem_of(Path(case["image"]))
        for source, link in (
            (case["image"], f"imagesTr/{name}_0000.nii.gz"),
            (case["label"], f"labelsTr/{name}.nii.gz"),
        ):
            if not (raw / link).exists():
                (raw / link).symlink_to(data.root / source)
    described = {
        "channel_names": {"0": data.modality},
        "labels": {"background": 0, **{n: int(v) for v, n in listed["labels"].items() if int(v)}},
        "numTraining": len(listed["training"]),
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(described))
    folders = {name: str(scratch / name.lower()) for name in ("nnUNet_preprocessed", "nnUNet_results")}
    return Contender(
        name="nnU-Net fingerprint",
        command=[str(venv / "bin" / "nnUNetv2_extract_fingerprint"), "-d", str(data.number), "-np", "2", "--clean"],
        env={"nnUNet_raw": str(raw.parent), **folders},
    )


def compare(data: Data, contenders: Sequence[Contender], runs: int) -> None:
    """Run all in turns and print the table."""
    for _ in range(runs):
        for contender in contenders:
            contender.run()
    for contender in contenders:
        contender.run(memory=True)
    floor, ours = contenders[0], contenders[1]
    print(f"\n### {data.name}, {runs} rounds\n")
    print("| | median s | rounds | of the bare read | autoseg takes | peak MiB (PSS) | autoseg takes |")
    print("|---|---|---|---|---|---|---|")
    for c in contenders:
        rounds = " / ".join(f"{s:.2f}" for s in c.seconds)
        print(
            f"| {c.name} | {c.median_s:.2f} | {rounds} | {c.median_s / floor.median_s:.2f} | "
            f"1/{c.median_s / ours.median_s:.1f} | {c.mib:.0f} | 1/{c.mib / ours.mib:.1f} |"
        )


def compare_rerun(data: Data, scratch: Path, runs: int) -> None:
    """A second run with one case more."""
    time.sleep(3)  # files younger than that are not trusted by their times, and these would be
    first, second = [], []
    for _ in range(runs):
        contender = autoseg(data, scratch)
        contender.run()
        first += contender.seconds
        contender = autoseg(data, scratch, scratch / "torso_more.json")
        contender.clean = lambda: None
        contender.run()
        second += contender.seconds
    once, again = statistics.median(first), statistics.median(second)
    print(f"\nOne case added to {NUM_COPIES}: {again:.2f} s after {once:.2f} s, a share of {again / once:.2f}")


def compare_large(source: Path, scratch: Path) -> None:
    """Memory of one case of 512x512x1000, int16 as a CT is stored."""
    root = scratch / "large"
    for folder, name, dtype in (("images", "ct", np.int16), ("labels", "labels", np.uint8)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        image = nib.load(source / f"{name}.nii.gz")
        index = [np.arange(n) * s // n for n, s in zip(LARGE, image.shape, strict=True)]
        voxels = np.asarray(image.dataobj)[np.ix_(*index)].astype(dtype)
        for number in range(2):
            voxels[number, 0, 0] += 1 - (folder == "labels")
            nib.save(nib.Nifti1Image(voxels, np.diag([0.8, 0.8, 0.6, 1.0])), root / folder / f"case_{number}.nii")
    cases = [{"image": f"images/case_{n}.nii", "label": f"labels/case_{n}.nii", "fold": n} for n in range(2)]
    datalist = scratch / "large.json"
    labels = json.loads((source / "labels.json").read_text())
    datalist.write_text(json.dumps({"labels": labels, "training": cases}))
    data = Data(name="large", root=root, datalist=datalist, modality="CT", number=0)
    contender = autoseg(data, scratch)
    contender.command += ["--num_workers", "1"]
    contender.run()
    contender.run(memory=True)
    own = 2 * int(np.prod(LARGE)) / 2**20
    print(
        f"\nA case of {'x'.join(map(str, LARGE))}: {contender.seconds[0] / 2:.1f} s a case, one process; "
        f"{contender.mib:.0f} MiB, {contender.mib / own:.2f} times its own voxels ({own:.0f} MiB)"
    )


def main() -> None:
    """Make the data, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hippocampus", type=Path, required=True, help="folder with dataset.json")
    parser.add_argument("--torso", type=Path, required=True, help="folder with ct.nii.gz, labels.nii.gz, labels.json")
    parser.add_argument("--venv_nn", type=Path, help="environment with nnunetv2")
    parser.add_argument("--python_monai", default=sys.executable, help="Python with MONAI")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=["hippocampus", "torso", "rerun", "large"], help="one part of it")
    options = parser.parse_args()
    parts = [options.only] if options.only else ["hippocampus", "torso", "rerun", "large"]
    with tempfile.TemporaryDirectory(prefix="autoseg-benchmark-") as folder:
        scratch = Path(folder)
        print(f"{os.cpu_count()} CPUs, Python {sys.version.split()[0]}, load {os.getloadavg()[0]:.2f} at the start")
        torso = make_torso(options.torso, scratch, NUM_COPIES + 1) if {"torso", "rerun"} & set(parts) else None
        for data in (make_hippocampus(options.hippocampus, scratch) if "hippocampus" in parts else None, torso):
            if data is not None and data.name in parts:
                contenders = [bare(data), autoseg(data, scratch), monai(data, scratch, options.python_monai)]
                if options.venv_nn:
                    contenders.append(nnunet(data, scratch, options.venv_nn))
                compare(data, contenders, options.runs)
        if "rerun" in parts and torso is not None:
            compare_rerun(torso, scratch, options.runs)
        if "large" in parts:
            compare_large(options.torso, scratch)
        print(f"\nload {os.getloadavg()[0]:.2f} at the end")


if __name__ == "__main__":
    main()
