"""The locator and merged sides, from input.yaml to a prediction."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_jobs import tiny_plan

from autoseg.cli.main import run_command
from autoseg.config.reader import read_model
from autoseg.data.datalists.cases import Case
from autoseg.data.labels import LabelMap, region_map
from autoseg.data.phantoms import make_phantoms
from autoseg.data.volumes import read_label, write_volume
from autoseg.plan import Plan
from autoseg.training.inputs import cases_for
from autoseg.workspace.workspace import Workspace

SETTINGS = """
algos: [segresnet]
num_epochs: 1
batch_size: 1
num_steps_per_epoch: 1
precision: fp32
num_workers: 1
roi_size: [16, 16, 16]
overlap: 0.5
segresnet: {init_filters: 8, blocks_down: [1, 1]}
locator: {init_filters: 4, blocks_down: [1, 1]}
merge_left_right: true
inference: {anywhere: [tumor], min_voxels: {tumor: 3}}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms with classes kidney_left, kidney_right and tumor, one network and a locator."""
    folder = tmp_path_factory.mktemp("locator")
    path = make_phantoms(
        folder, num_cases=4, num_testing=1, shape=(28, 26, 24), num_fold=2, classes=("sphere", "box", "cylinder")
    )
    lines = [line for line in path.read_text().splitlines() if not line.startswith("class_names")]
    path.write_text("\n".join(lines) + "\nclass_names: [kidney_left, kidney_right, tumor]\n" + SETTINGS)
    datalist = json.loads((folder / "datalist.json").read_text())
    datalist["labels"] = {"1": "kidney_left", "2": "kidney_right", "3": "tumor"}
    (folder / "datalist.json").write_text(json.dumps(datalist))
    assert run_command(["run", "--input", str(path)]) == 0
    assert run_command(["train", "--input", str(path), "--algo", "locator"]) == 0
    return folder


def test_sides_are_trained_as_one_and_predicted_as_two(run: Path) -> None:
    workspace = Workspace(run / "work_dir")
    plan = read_model(workspace.job_dir("segresnet", 0).plan, Plan)
    assert [c.name for c in plan.classes] == ["kidney", "tumor"]
    assert [c.name for c in plan.user_classes] == ["kidney_left", "kidney_right", "tumor"]
    scores = json.loads(workspace.scores.read_text())
    assert scores["classes"] == ["kidney_left", "kidney_right", "tumor"]
    assert scores["calibrated"] == ["kidney", "tumor"]
    assert "Calibration" in workspace.report.read_text()
    spec = json.loads(workspace.ensemble_spec.read_text())
    assert spec["classes"] == scores["classes"]
    assert [rule["min_voxels"] for rule in spec["postprocessing"] if rule["name"] == "tumor"] == [3]
    (held,) = workspace.predictions.iterdir()
    values = set(np.unique(read_label(held).array).tolist())
    assert values <= {0, 1, 2, 3}
    assert {1, 2} & values


def test_the_locator_is_one_coarse_job_that_no_ensemble_takes(run: Path) -> None:
    workspace = Workspace(run / "work_dir")
    assert [job.name for job in workspace.jobs() if job.algo == "locator"] == ["locator_0"]
    plan = read_model(workspace.job_dir("locator", 0).plan, Plan)
    assert plan.resample_resolution == (4.0, 4.0, 4.0)
    assert [(c.name, c.values) for c in plan.classes] == [("region", (1, 2))]
    assert [c.name for c in plan.user_classes] == ["kidney_left", "kidney_right"]
    assert plan.overlap == 0.0
    assert plan.num_epochs == 1
    assert plan.network["init_filters"] == 4
    assert (workspace.job_dir("locator", 0).root / "configs" / "inference.json").exists()
    assert run_command(["ensemble", "--input", str(run / "input.yaml")]) == 0
    spec = json.loads(workspace.ensemble_spec.read_text())
    assert {algo for algo, _ in spec["members"]} == {"segresnet"}


def test_fast_runs_with_it(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--work_dir", str(run / "work_dir"), "--image", str(run / "images"), "--output", str(tmp_path)]
    assert run_command(["predict", *words, "--fast", "--timing", "--device", "cpu"]) == 0
    assert len([*tmp_path.glob("*.nii.gz")]) == 5
    assert "load" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "expected"), [([], None), (["--budget", "5m"], 300.0)])
def test_a_budget_of_the_file_is_the_runs_and_not_the_locators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], expected: float | None
) -> None:
    """Nothing is left of it when a locator is trained later; what `train` is given is the job's own."""
    trained = []
    monkeypatch.setattr("autoseg.pipeline.job_plans.train_jobs", lambda *given, **_: trained.append(given[3]) or True)
    path = make_phantoms(tmp_path, num_cases=4, num_testing=0, shape=(26, 24, 24), num_fold=2)
    settings = [line for line in SETTINGS.splitlines() if not line.startswith(("merge_left_right", "inference"))]
    path.write_text(path.read_text() + "\n".join([*settings, "budget: 30m"]) + "\n")
    assert run_command(["analyze", "--input", str(path)]) == 0
    assert run_command(["train", "--input", str(path), "--algo", "locator", *words]) == 0
    assert [list(jobs) for jobs in trained] == [[("locator", 0)]]
    workspace = Workspace(tmp_path / "work_dir")
    assert read_model(workspace.job_dir("locator", 0).plan, Plan).budget_s == expected
    assert not workspace.budget.exists(), "it takes nothing from the run's"


def test_it_learns_from_cases_with_all_it_is_made_of(run: Path) -> None:
    plan = read_model(Workspace(run / "work_dir").job_dir("locator", 0).plan, Plan)
    whole = Case(name="whole", images=(), annotated=("kidney_left", "kidney_right", "tumor"))
    part, plain = Case(name="part", images=(), annotated=("kidney_left",)), Case(name="plain", images=())
    assert [c.name for c in cases_for(plan, (whole, part, plain))] == ["whole", "plain"]
    assert [c.name for c in cases_for(plan, (part,))] == ["part"]
    other = read_model(Workspace(run / "work_dir").job_dir("segresnet", 0).plan, Plan)
    assert [c.annotated for c in cases_for(other, (whole, part, plain))] == [("kidney", "tumor"), (), None]
    assert cases_for(tiny_plan(), (whole, part)) == (whole, part)
    filled = Case(name="filled", images=(), by_annotators=("kidney_left", "tumor"))
    assert [c.by_annotators for c in cases_for(other, (whole, filled))] == [None, ("tumor",)]


def test_sides_that_are_one_class_to_the_models_are_filled_in_by_side(run: Path) -> None:
    datalist = json.loads((run / "datalist.json").read_text())
    own = read_label(run / datalist["training"][0]["label"])
    own.array[own.array == 2] = 0
    datalist["training"][0] |= {"label": "partial.nii.gz", "annotated": ["kidney_left", "tumor"]}
    write_volume(run / "partial.nii.gz", own.array[0], own.grid)
    (run / "partial.json").write_text(json.dumps(datalist))
    work_dir = run / "two_rounds"
    words = ["--input", str(run / "input.yaml"), "--datalist", str(run / "partial.json")]
    words += ["--work_dir", str(work_dir)]
    soft = ["--pseudolabel.filter", "false", "--pseudolabel.soft", "true"]
    assert run_command(["run", *words, "--partial_labels", "declared", *soft]) == 0
    second = Workspace(work_dir).rounds()[-1]
    assert second.round == 2
    assert [c.name for c in read_model(second.job_dir("segresnet", 0).plan, Plan).classes] == ["kidney", "tumor"]
    audit = json.loads(second.audit.read_text())
    assert [row["name"] for row in audit["rows"]] == ["kidney_right"]
    (filled,) = json.loads(second.completed.read_text()).values()
    new = read_label(second.pseudolabels / filled["file"]).array
    assert np.array_equal(new[own.array > 0], own.array[own.array > 0])
    assert {*np.unique(new[own.array == 0]).tolist()} <= {0, 2}


def test_the_region_of_regions() -> None:
    regions = LabelMap(names=("whole", "core"), values=((1, 2), (2,)), sigmoid=True, ignore_label=255)
    found = region_map(regions, ("core",))
    assert (found.names, found.values, found.sigmoid, found.ignore_label) == (("region",), ((1, 2),), False, 255)
    assert region_map(regions, ("whole", "core")).values == ((1, 2),)
