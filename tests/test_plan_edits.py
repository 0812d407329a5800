"""Edits of a plan that its types alone would let pass: told all at once, before anything is built or trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from plans import tiny_plan
from tiny_jobs import make_job

from autoseg.config.networks import NETWORKS
from autoseg.config.settings import Settings
from autoseg.data.datalists.cases import Datalist
from autoseg.errors import ConfigError
from autoseg.inference.predictor import Predictor
from autoseg.networks import build_network, checked_plan, plan_faults
from autoseg.pipeline.training_jobs import train_jobs
from autoseg.plan import Plan
from autoseg.training.job import run_job
from autoseg.training.measure import measure_step
from autoseg.workspace.files import write_yaml
from autoseg.workspace.jobs import JobDir
from autoseg.workspace.workspace import Workspace

Edit = Callable[[dict[str, Any]], object]


def network(**changes: Any) -> Edit:
    return lambda plan: plan["network"].update(changes)


def value(key: str, new: Any) -> Edit:
    return lambda plan: plan.update({key: new})


EDITS: dict[str, tuple[Edit, str]] = {
    "patch": (
        value("roi_size", [16, 15, 16]),
        r"roi_size: found \[16, 15, 16\], .* multiples of \[2, 2, 2\], such as ",
    ),
    "missing": (lambda plan: plan["network"].pop("init_filters"), r"init_filters: missing\. Expected a whole number"),
    "misspelt": (network(blocks_dwn=[1, 1]), r"blocks_dwn: unknown key\. Did you mean blocks_down\?"),
    "text": (network(init_filters="many"), r"init_filters: expected a whole number .*, found many\."),
    "twenty stages": (network(blocks_down=[1] * 20), r"blocks_down: expected a list of at most 10 whole numbers"),
    "ten stages": (network(blocks_down=[1] * 10), r"roi_size: found .* multiples of \[512, 512, 512\]"),
    "endless stage": (network(blocks_down=[1, 10**9]), r"blocks_down: expected .* >= 1 and <= 32, found \[1, 1000"),
    "giant": (network(init_filters=10**9), r"init_filters: expected a whole number >= 4 and <= 2048, found"),
    "norm": (network(norm="INSTANEC"), r"norm: expected one of INSTANCE, BATCH, found INSTANEC\."),
    "resolution": (network(resolution=[1.0, 0.0, 2.0]), r"resolution: expected 3 numbers > 0"),
    "another network": (value("algo", "unet"), r"init_filters: unknown key.*features: missing"),
    "the locator": (value("algo", "locator"), r"found those of locator_0 in the folder of segresnet_0"),
    "another fold": (value("fold", 1), r"found those of segresnet_1 in the folder of segresnet_0"),
    "value of two classes": (
        value("classes", [{"name": "a", "values": [1]}, {"name": "b", "values": [1]}]),
        "label value 1 belongs to more than one class",
    ),
}


def edited(job: JobDir, edit: Edit) -> JobDir:
    plan = yaml.safe_load(job.plan.read_text())
    edit(plan)
    write_yaml(job.plan, plan)
    return job


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_without_meaning_is_refused(tmp_path: Path, name: str) -> None:
    edit, message = EDITS[name]
    job = make_job(tmp_path, "segresnet", 0)
    checked_plan(job)
    edited(job, edit)
    with pytest.raises(ConfigError, match=message) as caught:
        checked_plan(job)
    assert all(line.startswith(str(job.plan)) for line in caught.value.messages)
    if name not in ("the locator", "another fold"):  # no weights of a network that nobody asks for are built
        with pytest.raises(ConfigError, match=message):
            Predictor([job], device="cpu")


def test_all_faults_of_all_jobs_at_once_before_the_first_starts(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    both: Edit = lambda plan: plan["network"].update(init_filters=1, depth=3)  # noqa: E731
    edited(make_job(tmp_path, "segresnet", 0, state="pending"), both)
    edited(make_job(tmp_path, "segresnet", 1, state="pending"), value("roi_size", [15, 16, 16]))
    settings = Settings(modality="MRI", datalist=tmp_path, dataroot=tmp_path, retries=3)
    with pytest.raises(ConfigError) as caught:
        train_jobs(workspace, Datalist(training=()), settings, [("segresnet", 0), ("segresnet", 1)])
    first, second = caught.value.messages
    assert "init_filters: expected a whole number >= 4" in first
    assert "depth: unknown key" in first
    assert "roi_size: found [15, 16, 16]" in second
    assert [workspace.read_job("segresnet", f).state for f in (0, 1)] == ["pending", "pending"]


def test_a_worker_does_not_try_such_a_job_again(tmp_path: Path) -> None:
    edited(make_job(tmp_path, "segresnet", 0, state="pending"), value("roi_size", [15, 16, 16]))
    job = run_job(Workspace(tmp_path), tmp_path, "segresnet", 0, device="cpu", num_workers=1)
    assert (job.state, job.can_retry) == ("failed", False)
    assert job.error.startswith(f"{tmp_path / 'segresnet_0'}")
    assert "Traceback" not in job.error


def test_a_lack_of_memory_is_no_fault_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner goes on with a smaller one where building a network says so."""

    def build(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("autoseg.networks.segresnet.build", build)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        build_network(tiny_plan())
    assert measure_step(tiny_plan(), torch.device("cpu")) is None


def test_values_that_do_not_fit_together_are_said_without_a_traceback() -> None:
    plan = tiny_plan("swinunetr")
    plan = plan.model_copy(update={"network": {**plan.network, "num_heads": (5, 6, 12, 24)}})
    with pytest.raises(ConfigError, match=r"network: its values do not fit together \(num_heads: 12 features"):
        build_network(plan)


@pytest.mark.parametrize("algo", NETWORKS)
def test_the_planners_own_plans_are_whole(algo: str) -> None:
    """Every key that a network is planned with is known, so that an edit of it is."""
    plan = tiny_plan(algo)
    assert plan_faults(plan) == []
    row = NETWORKS[algo]
    assert set(plan.network) == {*row.own.model_fields, *row.planned.model_fields}
    assert Plan.model_validate(json.loads(plan.model_dump_json())) == plan
