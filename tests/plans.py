"""Small plans for tests: the planner's own, for tiny phantoms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autoseg.algos.draft import Fit
from autoseg.algos.inputs import PlanInputs
from autoseg.algos.planner import make_plan
from autoseg.config.networks import AlgoName
from autoseg.config.settings import Settings
from autoseg.data.fingerprint import BackgroundIntensity, Fingerprint, ForegroundIntensity
from autoseg.data.labels import LabelMap
from autoseg.hardware.facts import Hardware
from autoseg.plan import Origin, Plan
from autoseg.weights.start import StartWeights

TINY = """
algos: [segresnet]
folds: [0]
num_epochs: 1
batch_size: 1
num_steps_per_epoch: 1
num_workers: 1
precision: fp32
roi_size: [16, 16, 16]
segresnet: {init_filters: 8, blocks_down: [1, 1]}
"""
"""Lines of input.yaml: one network, one fold, one step."""
CPU = Hardware(on_gpu=False, num_gpus=0, memory_gib=24.0, num_cores=2, name="CPU, 2 cores")
GPU = Hardware(on_gpu=True, num_gpus=1, memory_gib=80.0, num_cores=16, name="GPU")


def make_fingerprint(**changes: Any) -> Fingerprint:
    """A fingerprint of 10 isotropic MRI cases of 32x32x32 voxels, or as changed."""
    one = ForegroundIntensity(mean=50.0, std=20.0, min=0.0, p00_5=5.0, median=50.0, p99_5=95.0, max=100.0)
    rest = BackgroundIntensity(min=0.0, p00_5_least=0.0, p00_5=0.0, p99_5=90.0, p99_5_largest=95.0, max=110.0)
    triple, shape = (1.0, 1.0, 1.0), (32, 32, 32)
    values: dict[str, Any] = {
        "num_cases": 10,
        "num_channels": 1,
        "foreground": (one,) * changes.get("num_channels", 1),
        "background": (rest,) * changes.get("num_channels", 1),
        "nonzero_crop_ratio": 1.0,
        "class_names": ("sphere", "box"),
        "class_values": ((1,), (2,)),
        "class_num_cases": (10, 10),
        "class_voxel_fraction": (0.1, 0.1),
        "label_groups": (),
    }
    values |= {f"spacing_mm_{k}": triple for k in ("min", "p10", "median", "max")}
    values |= {f"shape_{k}": shape for k in ("min", "median", "p90", "max")}
    values |= {f"size_mm_{k}": tuple(float(s) for s in shape) for k in ("median", "p90")}
    return Fingerprint(**{**values, **changes})


def plan_and_origins(
    algo: AlgoName,
    *,
    hardware: Hardware = CPU,
    fingerprint: Fingerprint | None = None,
    classes: dict[str, tuple[int, ...]] | None = None,
    sigmoid: bool = False,
    num_train: int = 8,
    budget_s: float | None = None,
    fit: Fit | None = None,
    earlier: Plan | None = None,
    start: StartWeights | None = None,
    origins: dict[str, str] | None = None,
    **settings: Any,
) -> tuple[Plan, dict[str, Origin]]:
    """The planner's plan; `settings` are those of input.yaml."""
    named = classes or {"sphere": (1,), "box": (2,)}
    inputs = PlanInputs(
        algo=algo,
        fold=0,
        num_train=num_train,
        fingerprint=fingerprint or make_fingerprint(),
        label_map=LabelMap(names=tuple(named), values=tuple(named.values()), sigmoid=sigmoid),
        settings=Settings(**{"modality": "MRI", "datalist": Path("d"), "dataroot": Path("r"), **settings}),
        origins=origins or {},
        hardware=hardware,
        budget_s=budget_s,
        earlier=earlier,
        start=start,
    )
    return make_plan(inputs, fit or Fit())


def tiny_plan(algo: AlgoName = "segresnet", **settings: Any) -> Plan:
    """A plan that trains in seconds on phantoms."""
    small = {
        "batch_size": 2,
        "num_epochs": 3,
        "num_steps_per_epoch": 2,
        "num_epochs_per_validation": 1,
        "precision": "fp32",
    }
    if algo == "segresnet":
        small |= {"roi_size": (16, 16, 16), "segresnet": {"init_filters": 8, "blocks_down": (1, 1)}}
    elif algo == "unetr":
        small |= {"roi_size": (32, 16, 16), "unetr": {"hidden_size": 64, "feature_size": 4}}
    elif algo == "resenc":
        small |= {"roi_size": (16, 16, 16), "resenc": {"init_features": 8}}
    elif algo == "dints":
        small |= {"roi_size": (16, 16, 16), "dints": {"channel_mul": 0.125}}
    elif algo == "swinunetr":  # two layers of one stage, so that its windows are shifted
        small |= {"swinunetr": {"depths": (2, 1, 1, 1)}}
    return plan_and_origins(algo, **{**small, **settings})[0]
