"""Job folders with small random networks, as training leaves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from autoseg.networks import build_network
from autoseg.plan import Plan
from autoseg.workspace.files import write_yaml
from autoseg.workspace.jobs import Job, JobDir
from autoseg.workspace.workspace import Workspace

# Small networks on shared cores: threads that wait for each other made these tests 4 times slower.
torch.set_num_threads(1)


class TensorRows:
    """Probabilities in memory, handed out as the engine does: in ascending order."""

    def __init__(self, probs: torch.Tensor, axis: int) -> None:
        self.shape, self.axis, self.num_outputs = tuple(probs.shape[1:]), axis, len(probs)
        self._rows, self.first = probs.movedim(axis + 1, 0), 0
        self.largest = 0

    def rows(self, start: int, stop: int) -> torch.Tensor:
        assert self.first <= start < stop <= len(self._rows)
        self.first = start
        self.largest = max(self.largest, self._rows[start:stop].numel())
        return self._rows[start:stop].contiguous()


def tiny_plan(**changes: Any) -> Plan:
    """A plan of a small SegResNet for two classes."""
    values: dict[str, Any] = {
        "algo": "segresnet",
        "fold": 0,
        "classes": [{"name": "sphere", "values": [1]}, {"name": "box", "values": [2]}],
        "sigmoid": False,
        "ignore_label": None,
        "channels": [{"mode": "meanstd"}],
        "resample_resolution": (1.2, 1.2, 1.6),
        "crop_foreground": False,
        "network": {"init_filters": 8, "blocks_down": [1, 1], "dsdepth": 1, "norm": "INSTANCE", "resolution": None},
        "roi_size": (16, 16, 16),
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
        "overlap": 0.25,
        "tta": False,
        "precision": "fp32",
        "seed": 0,
    }
    return Plan.model_validate({**values, **changes})


def make_job(work_dir: Path, algo: str, fold: int, *, seed: int = 0, state: str = "done", **changes: Any) -> JobDir:
    """Write the folder of a trained job; `algo` names the folder, the network is a SegResNet with random weights."""
    return write_trained(work_dir, algo, tiny_plan(fold=fold, seed=seed, **changes), state=state)


def write_trained(work_dir: Path, algo: str, plan: Plan, *, state: str = "done") -> JobDir:
    """Write the folder of a trained job: its plan, with random weights."""
    workspace, fold, seed = Workspace(work_dir), plan.fold, plan.seed
    job = workspace.job_dir(algo, fold)
    write_yaml(job.plan, plan.model_dump(mode="json"))
    torch.manual_seed(seed)
    job.model.parent.mkdir(parents=True, exist_ok=True)
    torch.save(build_network(plan).state_dict(), job.model)
    workspace.write_job(Job(algo=algo, fold=fold, state=state))  # type: ignore[arg-type]
    return job
