"""What a prediction takes of the processor beside its networks: file in, label file out, an instant network between.

    python benchmarks/host.py                       # the device is faked: it computes nothing, and takes no time
    python benchmarks/host.py --device cuda         # a GPU adds windows up and interpolates; its network is instant
    python benchmarks/host.py --device cpu          # the processor does all of that, too

A CT of 512x512x300 voxels of 0.8x0.8x2.5 mm, made up; a model that works at 1.5 mm with windows of 96x96x96 and half
overlap, 14 outputs. Seconds of the processor, all threads together, by voxel of the image. The faked device is torch's
`meta`: tensors without voxels, so that what is counted is what is left for the host of a GPU: reading, normalising and
resampling the image, cutting windows, starting operations, decoding and writing labels. Labels come back as zeros.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage
from torch import nn

from autoseg.inference.clock import Clock
from autoseg.inference.options import Options
from autoseg.inference.predictor import Predictor
from autoseg.networks import build_network
from autoseg.plan import Plan
from autoseg.workspace.files import write_yaml
from autoseg.workspace.jobs import JobDir

SPACING_MM = (0.8, 0.8, 2.5)


class Instant(nn.Module):
    """A network whose answer lies ready: noise that changes from block to block, as structures do."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.num_outputs = num_outputs
        self._answers: dict[tuple[int, ...], torch.Tensor] = {}

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        shape = (len(batch), self.num_outputs, *batch.shape[2:])
        if batch.device.type == "meta":
            return torch.empty(shape, device="meta")
        if shape not in self._answers:
            coarse = torch.rand(*shape[:2], *(max(1, edge // 12) for edge in shape[2:])) * 8
            self._answers[shape] = nn.functional.interpolate(coarse, size=shape[2:], mode="trilinear").to(batch.device)
        return self._answers[shape]


def make_ct(target: Path, shape: tuple[int, int, int], seed: int = 0) -> Path:
    """A CT of smooth noise in a cylinder with air around it."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(40, 80, [max(2, size // 16) for size in shape]).astype(np.float32)
    body = ndimage.zoom(coarse, [size / edge for size, edge in zip(shape, coarse.shape, strict=True)], order=1)
    x, y = np.ogrid[: shape[0], : shape[1]]
    outside = ((x / shape[0] - 0.5) / 0.45) ** 2 + ((y / shape[1] - 0.5) / 0.35) ** 2 > 1
    body[outside] = -1000
    nib.save(nib.Nifti1Image(np.rint(body).astype(np.int16), np.diag([*SPACING_MM, 1.0])), target)
    return target


def make_job(root: Path, num_outputs: int, roi: tuple[int, int, int], *, fold: int = 0, **changes: Any) -> JobDir:
    """A job with random weights, those of its fold."""
    values: dict[str, Any] = {
        "algo": "segresnet",
        "fold": fold,
        "classes": [{"name": f"class_{i}", "values": [i]} for i in range(1, num_outputs)],
        "sigmoid": False,
        "ignore_label": None,
        "channels": [{"mode": "ct", "bounds": (-160, 240), "mean": 40.0, "std": 100.0}],
        "resample_resolution": (1.5, 1.5, 1.5),
        "crop_foreground": False,
        "network": {
            "init_filters": 8, "blocks_down": [1, 2, 2, 4], "dsdepth": 1, "norm": "INSTANCE", "resolution": None,
        },
        "roi_size": roi,
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
        "precision": "fp32",
        "seed": 0,
    }  # fmt: skip
    job = JobDir(root / f"segresnet_{fold}")
    plan = Plan.model_validate({**values, **changes})
    write_yaml(job.plan, plan.model_dump(mode="json"))
    torch.manual_seed(fold)
    job.model.parent.mkdir(parents=True, exist_ok=True)
    torch.save(build_network(plan).state_dict(), job.model)
    return job


def _brought_back(tensor: torch.Tensor, cpu: Any = torch.Tensor.cpu) -> torch.Tensor:
    """What comes from the device that computes nothing: zeros."""
    return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.device.type == "meta" else cpu(tensor)


def host_work(
    device: torch.device,
    shape: tuple[int, int, int],
    *,
    num_outputs: int = 14,
    roi: tuple[int, int, int] = (96, 96, 96),
    num_rounds: int = 3,
) -> dict[str, Any]:
    """Nanoseconds of the processor by voxel of the image, the least of some rounds, and of which phases they are."""
    best: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="autoseg-host-") as folder, ExitStack() as stack:
        image = make_ct(Path(folder) / "ct.nii.gz", shape)
        predictor = Predictor(
            [make_job(Path(folder), num_outputs, roi)],
            device=device,
            options=Options(skip_empty=device.type != "meta"),  # which the device would have to find
        )
        predictor.models = tuple(replace(m, network=Instant(num_outputs).eval(), heads=()) for m in predictor.models)
        stack.enter_context(mock.patch.object(torch.Tensor, "cpu", _brought_back))
        for _ in range(num_rounds):
            predictor.clock = Clock()
            begin, wall = time.process_time(), time.perf_counter()
            predictor.predict_file([image], Path(folder) / "label.nii.gz")
            cpu_s, wall_s = time.process_time() - begin, time.perf_counter() - wall
            num = shape[0] * shape[1] * shape[2]
            row = {
                "device": str(device),
                "shape": list(shape),
                "outputs": num_outputs,
                "windows": predictor.clock.expected_voxels // (roi[0] * roi[1] * roi[2]),
                "cpu_ns_a_voxel": round(cpu_s / num * 1e9, 2),
                "wall_ns_a_voxel": round(wall_s / num * 1e9, 2),
                "phases_ns_a_voxel": {k: round(v / num * 1e9, 2) for k, v in predictor.clock.seconds.items()},
            }
            if not best or row["cpu_ns_a_voxel"] < best["cpu_ns_a_voxel"]:
                best = row
    return best


def main() -> None:
    """Measure and print a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="meta", choices=("meta", "cpu", "cuda"))
    parser.add_argument("--shape", type=int, nargs=3, default=(512, 512, 300))
    parser.add_argument("--outputs", type=int, default=14)
    parser.add_argument("--roi", type=int, nargs=3, default=(96, 96, 96))
    options = parser.parse_args()
    found = host_work(
        torch.device(options.device), tuple(options.shape), num_outputs=options.outputs, roi=tuple(options.roi)
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
