"""explain tells value, origin and rule, and sees an edit by hand; status tells stages and jobs from the files."""

import socket
from pathlib import Path

import pytest

from autoseg.config.load import load_settings
from autoseg.config.units import format_duration
from autoseg.errors import ConfigError, WorkspaceError
from autoseg.pipeline.stages import STAGES
from autoseg.report.explain import explain
from autoseg.report.status import job_status, status
from autoseg.workspace.claims import Claim
from autoseg.workspace.files import write_text, write_yaml
from autoseg.workspace.jobs import Job
from autoseg.workspace.workspace import Workspace


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An input.yaml and its work_dir with two planned jobs."""
    (tmp_path / "d.json").write_text("{}")
    path = tmp_path / "input.yaml"
    path.write_text("modality: CT\ndatalist: d.json\ndataroot: .\nnum_epochs: 7\nsegresnet: {batch_size: 2}\n")
    settings, origins = load_settings(path, {"seed": "3"})
    workspace = Workspace(tmp_path / "work_dir")
    values = settings.model_dump(mode="json")
    write_yaml(workspace.settings, {k: {"value": v, "origin": origins.get(k, "default")} for k, v in values.items()})
    for fold in (0, 1):
        job = workspace.job_dir("segresnet", fold)
        write_yaml(job.plan, {"num_epochs": 7, "roi_size": [40, 56, 40], "network": {"init_filters": 16}})
        write_yaml(
            job.origins,
            {
                "num_epochs": {"value": 7, "origin": "input.yaml:4", "rule": ""},
                "roi_size": {"value": [40, 56, 40], "origin": "planner", "rule": "median shape (nnU-Net)"},
                "network.init_filters": {"value": 8, "origin": "planner", "rule": "5 cases"},
            },
        )
    return path


def test_explain_one_value(run: Path) -> None:
    assert explain(run, STAGES, "roi_size") == (
        "roi_size: 3 whole numbers >= 1. Default: planned.\n"
        "  Patch in voxels along X, Y, Z after resampling; rounded up, with a warning, to what the network can halve.\n"
        "\n"
        "segresnet_0, segresnet_1\n"
        "  value:  [40, 56, 40]\n"
        "  origin: planner\n"
        "  rule:   median shape (nnU-Net)"
    )


def test_explain_sees_an_edit(run: Path) -> None:
    text = explain(run, STAGES, "segresnet_0.network.init_filters")
    assert "  value:  16\n  origin: edited by hand\n  derived: 8, before the edit\n" in text


def test_explain_all_of_an_input_and_of_a_work_dir(run: Path) -> None:
    rows = {" ".join(line.split()) for line in explain(run, STAGES).splitlines()}
    assert {"num_epochs 7 input.yaml:4", "segresnet.batch_size 2 input.yaml:5", "num_fold 5 default"} <= rows
    assert {"roi_size [40, 56, 40] planner: median shape (nnU-Net)", "network.init_filters 16 edited by hand"} <= rows
    rows = {" ".join(line.split()) for line in explain(run.parent / "work_dir", STAGES).splitlines()}
    assert {"seed 3 command line", "num_fold 5 default", "segresnet.batch_size 2 input.yaml:5"} <= rows


def test_explain_refuses(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"^roi_sise: no such setting or planned value\. Did you mean roi_size\?$"):
        explain(run, STAGES, "roi_sise")
    with pytest.raises(WorkspaceError, match=r"no settings\.yaml, so not a run's folder"):
        explain(run.parent, STAGES)


def test_status(run: Path) -> None:
    workspace = Workspace(run.parent / "work_dir")
    workspace.stamp("analyze", {})
    workspace.write_job(Job(algo="segresnet", fold=0, state="done", dice=0.91234, seconds=725))
    workspace.write_job(Job(algo="segresnet", fold=1, state="running", seconds=5))
    workspace.write_job(Job(algo="swinunetr", fold=0, state="failed", error="out of memory\nmore"))
    workspace.write_job(Job(algo="swinunetr", fold=1))
    epoch = '{"epoch": 4, "num_epochs": 7, "train_loss": 0.3, "time_left_s": 4000, "best_dice": 0.5, "seconds": 30}\n'
    write_text(workspace.job_dir("segresnet", 1).metrics, epoch + '{"epoch": 5, "num_')
    with Claim(workspace.job_dir("segresnet", 1).claims, "segresnet_1", device="cpu:1"):
        lines = status(workspace.root, STAGES).splitlines()
    where = f"{socket.gethostname()}:cpu:1"
    gap = " " * (len(where) - len("Device"))
    assert lines[1].startswith("analyze   20")
    assert [line.split() for line in lines[2:5]] == [[name, "-"] for name in ("generate", "train", "ensemble")]
    assert lines[lines.index("") + 1 :] == [
        f"Job          State    Device{gap}  Epoch    Dice    Time   Left  Last error",
        f"segresnet_0  done     -     {gap}      -  0.9123  12m05s      -",
        f"segresnet_1  running  {where}    4/7  0.5000     30s  1h06m",
        f"swinunetr_0  failed   -     {gap}      -       -       -      -  out of memory",
        f"swinunetr_1  pending  -     {gap}      -       -       -      -",
        "",
        "4 jobs: 1 done, 1 running, 1 failed, 1 pending. `autoseg status JOB` shows a job's log.",
        "`autoseg retry` tries the failed ones again.",
    ]
    assert "segresnet_1  pending" in status(workspace.root, STAGES), "running, but nobody works on it"
    write_text(workspace.job_dir("swinunetr", 0).log, "first line\nlast line\n")
    shown = job_status(workspace.root, "swinunetr_0")
    assert "out of memory\nmore" in shown
    assert shown.endswith("train.log:\nfirst line\nlast line")
    with pytest.raises(ConfigError, match=r"^swinunetr_2: no such job in .*\. Did you mean swinunetr_"):
        job_status(workspace.root, "swinunetr_2")


def test_status_refuses(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match=r"not a run's folder\. Give a run's folder with --work_dir\.$"):
        status(tmp_path, STAGES)
    with pytest.raises(WorkspaceError, match=r"no such folder\. Give a run's folder with --work_dir\.$"):
        status(tmp_path / "nowhere", STAGES)


def test_seconds_in_words() -> None:
    assert [format_duration(s) for s in (0, 59.6, 61, 3599, 3600, 90061)] == [
        "0s",
        "1m00s",
        "1m01s",
        "59m59s",
        "1h00m",
        "25h01m",
    ]
