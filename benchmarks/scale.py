"""What a very large data set would take: a simulation from the planner's own plans. Figures for docs/scale.md.

    python benchmarks/scale.py            # the tables
    python benchmarks/scale.py --measure  # first measure what reading and preprocessing take on this machine

Nothing is trained. Jobs run on simulated GPUs in nodes of eight; all nodes read one file server. A job's speed is
that of its GPUs or of its share of the server, whichever is less, at every moment.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from plans import make_fingerprint

from autoseg.algos.inputs import PlanInputs
from autoseg.algos.planner import make_plan
from autoseg.config.settings import Settings
from autoseg.data.labels import LabelMap
from autoseg.hardware.facts import Hardware
from autoseg.plan import Plan

VOXELS_PER_S = 224**3 / (24 * 3600 / (300 * 1760 / 8))
"""Voxels that one A40 trains SegResNet on in a second, validation included. Source: NVAUTO's FLARE23 paper, table 3:
24 h a model, 300 epochs of 1,760 cases, batch 8 of 224^3 patches on 8 A40."""
RELATIVE = {"segresnet": 1.0, "swinunetr": 15.6 / 13.8, "dints": 19.0 / 13.8}
"""Hours of a fold against SegResNet's, for the networks of a run. Source: MONAI's Auto3DSeg tutorial, TotalSegmentator,
one A100."""
SPEEDUP = {1: 1.0, 8: 13.8 / 2.8, 32: 13.8 / 0.8}
"""Of one SegResNet job on more GPUs. Source: the same table."""
READ_S_PER_MVOXEL, PREPARE_S_PER_MVOXEL = 0.053, 0.131
"""Core seconds to read and take statistics of a million voxels, and to preprocess them; `--measure` measures them."""
GZIP_RATIO = 2.2
"""Of int16 CT as .nii.gz; an assumption."""
GPUS_PER_NODE, CORES_PER_NODE, RAM_GB = 8, 64, 950
"""A node: that of the FLARE23 paper (two Xeon 8362, 950 GB)."""
SERVER_GB_S = 2.0
"""The file server gives this much to all nodes together: 25 GbE, less overheads."""
POINT_BYTES = 16 * 10_000


@dataclass(frozen=True)
class DataSet:
    name: str
    num_cases: int
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    num_classes: int

    @property
    def mvoxels(self) -> float:
        return math.prod(self.shape) / 1e6


DATA_SETS = (
    # 13 organs and tumor; shape and spacing are assumptions near the published medians of FLARE22.
    DataSet("FLARE23", 4000, (512, 512, 200), (0.8, 0.8, 2.5), 14),
    # 9,262 CTs, 25 structures (AbdomenAtlas 1.1); 379 slices is AbdomenAtlas-8K's mean (3.2 million in 8,448).
    DataSet("AbdomenAtlas", 9262, (512, 512, 379), (0.8, 0.8, 1.25), 25),
)


def plan_of(data: DataSet, algo: str) -> Plan:
    """What autoseg's planner would do with such a data set on 48 GiB GPUs."""
    size = tuple(n * s for n, s in zip(data.shape, data.spacing_mm, strict=True))
    shapes = {f"shape_{k}": data.shape for k in ("min", "median", "p90", "max")}
    spacings = {f"spacing_mm_{k}": data.spacing_mm for k in ("min", "p10", "median", "max")}
    fingerprint = make_fingerprint(
        num_cases=data.num_cases, size_mm_median=size, size_mm_p90=size, **shapes, **spacings
    )
    classes = tuple(f"class_{i}" for i in range(1, data.num_classes + 1))
    inputs = PlanInputs(
        algo=algo,
        fold=0,
        num_train=data.num_cases * 4 // 5,
        fingerprint=fingerprint,
        label_map=LabelMap(names=classes, values=tuple((i + 1,) for i in range(data.num_classes)), sigmoid=False),
        settings=Settings(modality="CT", datalist=Path("d"), dataroot=Path("r")),
        hardware=Hardware(on_gpu=True, num_gpus=8, memory_gib=48.0, num_cores=64, name="A40"),
    )
    return make_plan(inputs)[0]


def speedup(gpus: int) -> float:
    """Interpolated in the logarithm of the efficiency between the published points."""
    known = sorted(SPEEDUP)
    low = max(k for k in known if k <= gpus)
    high = min(k for k in known if k >= gpus)
    if low == high:
        return SPEEDUP[low]
    share = math.log(gpus / low) / math.log(high / low)
    efficiency = (SPEEDUP[low] / low) ** (1 - share) * (SPEEDUP[high] / high) ** share
    return gpus * efficiency


@dataclass
class Running:
    left_s: float
    """Seconds alone on its GPUs."""
    gpus: int
    bytes_per_s: float
    """What it asks of the server at full speed."""


def simulate(jobs: list[Running], num_gpus: int, server: float) -> tuple[float, float, float]:
    """Run jobs in order on GPUs that share a server.

    Returns:
        Seconds, GPU seconds in use, seconds in which the server was the brake.
    """
    waiting, running = list(jobs), list[Running]()
    now = used = braked = 0.0
    while waiting or running:
        while waiting and sum(r.gpus for r in running) + waiting[0].gpus <= num_gpus:
            running.append(waiting.pop(0))
        wanted = sum(r.bytes_per_s for r in running)
        rate = min(1.0, server / wanted) if wanted else 1.0
        step = min(r.left_s for r in running) / rate
        now += step
        used += step * sum(r.gpus for r in running)
        braked += step * (rate < 1.0)
        for r in running:
            r.left_s -= step * rate
        running = [r for r in running if r.left_s > 1e-6]
    return now, used, braked


def report(data: DataSet) -> None:
    plans = {algo: plan_of(data, algo) for algo in RELATIVE}
    cache = data.num_cases * (data.mvoxels * 1e6 * (2 + 1) + POINT_BYTES * data.num_classes)
    raw = data.num_cases * data.mvoxels * 1e6 * 2 / GZIP_RATIO
    print(f"\n{data.name}: {data.num_cases:,} CTs of {' x '.join(map(str, data.shape))}, 5 folds, 3 networks: 15 jobs")
    print(f"  images as .nii.gz {raw / 1e12:.2f} TB, cache {cache / 1e12:.2f} TB (float16 image, uint8 label)")
    hours = {}
    for algo, plan in plans.items():
        voxels = plan.num_epochs * plan.num_steps_per_epoch * plan.batch_size * math.prod(plan.roi_size)
        hours[algo] = voxels / VOXELS_PER_S * RELATIVE[algo] / 3600
        print(
            f"  {algo:<10} patch {'x'.join(map(str, plan.roi_size))}, batch {plan.batch_size}, "
            f"{plan.num_epochs} epochs of {plan.num_steps_per_epoch} steps: {hours[algo]:.0f} h on one A40"
        )
    print(f"  together {5 * sum(hours.values()):,.0f} GPU hours")
    header = (
        "GPUs",
        "per job",
        "analysis h",
        "cache h",
        "training h",
        "GPUs busy",
        "from server TB",
        "server GB/s",
        "brake",
    )
    print("  " + "  ".join(f"{h:>14}" for h in header))
    for num_gpus, per_job in ((8, 1), (64, 1), (64, 4)):
        nodes = max(1, num_gpus // GPUS_PER_NODE)
        cores = nodes * CORES_PER_NODE
        mvoxels = data.num_cases * data.mvoxels
        analysis_s = max(mvoxels * READ_S_PER_MVOXEL / cores, raw / (SERVER_GB_S * 1e9))
        prepare_s = max(mvoxels * PREPARE_S_PER_MVOXEL / cores, (raw + cache) / (SERVER_GB_S * 1e9))
        miss = max(0.0, 1 - 0.8 * RAM_GB * 1e9 / cache)  # what a node's page cache does not hold comes from the server
        jobs = []
        for _fold in range(5):
            for algo in sorted(hours, key=lambda a: -hours[a]):
                plan = plans[algo]
                seconds = hours[algo] * 3600 / speedup(per_job)
                patches = plan.num_epochs * plan.num_steps_per_epoch * plan.batch_size
                # Rows along Z are read whole: the arrays are (C, X, Y, Z).
                per_patch = plan.roi_size[0] * plan.roi_size[1] * data.shape[2] * 3
                jobs.append(Running(seconds, per_job, miss * patches * per_patch / seconds))
        total = sum(j.left_s * j.bytes_per_s for j in jobs)
        first = raw + cache + min(cache, 0.8 * RAM_GB * 1e9) * nodes  # written once; then each node fills its memory
        seconds, used, braked = simulate(jobs, num_gpus, SERVER_GB_S * 1e9)
        row = (
            str(num_gpus),
            str(per_job),
            f"{analysis_s / 3600:.1f}",
            f"{prepare_s / 3600:.1f}",
            f"{seconds / 3600:,.0f}",
            f"{used / (seconds * num_gpus):.0%}",
            f"{(total + first) / 1e12:,.1f}",
            f"{total / seconds / 1e9:.2f}",
            f"server {braked / seconds:.0%}"
            if braked
            else "too few jobs"
            if used < 0.5 * seconds * num_gpus
            else "GPUs",
        )
        print("  " + "  ".join(f"{cell:>14}" for cell in row))


def measure() -> tuple[float, float]:
    """Core seconds a million voxels: reading with statistics, preprocessing; on one thread."""
    import numpy as np
    import torch

    from autoseg.data.grid import Grid
    from autoseg.data.preprocess import ChannelNorm, Preprocessing, prepare_image
    from autoseg.data.volumes import read_image, write_volume

    torch.set_num_threads(1)
    shape = (256, 256, 100)
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.normal(0, 300, (32, 32, 25)), np.ones((8, 8, 4)))
    image = (smooth + rng.normal(0, 15, shape)).astype(np.int16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ct.nii.gz"
        write_volume(path, image, Grid(shape=shape, affine=np.diag([0.75, 0.75, 2.5, 1.0])))
        begin = time.perf_counter()
        volume = read_image((path,))
        np.histogram(volume.array, bins=4096)
        read_s = time.perf_counter() - begin
        norm = ChannelNorm(mode="ct", bounds=(-200.0, 300.0), mean=50.0, std=100.0)
        begin = time.perf_counter()
        prepare_image(volume, Preprocessing(norms=(norm,), spacing_mm=(0.8, 0.8, 2.5), crop_foreground=False))
        prepare_s = time.perf_counter() - begin
    mvoxels = math.prod(shape) / 1e6
    return read_s / mvoxels, (read_s + prepare_s) / mvoxels


def main() -> None:
    global READ_S_PER_MVOXEL, PREPARE_S_PER_MVOXEL
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true")
    if parser.parse_args().measure:
        READ_S_PER_MVOXEL, PREPARE_S_PER_MVOXEL = measure()
    print(f"one A40: {VOXELS_PER_S / 1e6:.1f} million voxels a second (SegResNet)")
    print(f"a core: reads {READ_S_PER_MVOXEL:.3f}, preprocesses {PREPARE_S_PER_MVOXEL:.3f} s a million voxels")
    for data in DATA_SETS:
        report(data)


if __name__ == "__main__":
    main()
