"""The rounds of training on phantoms: one command for all, each step alone, killed and gone on with, bad input."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from test_pseudolabel import break_a_case

from autoseg.api import load_result
from autoseg.cli.main import run_command
from autoseg.config.load import load_settings
from autoseg.data.phantoms import make_phantoms
from autoseg.data.volumes import read_label, write_volume
from autoseg.ensemble.predict import load_predictor
from autoseg.pipeline.rounds import warn_of_unused
from autoseg.pipeline.stages import STAGES
from autoseg.report.status import job_status, status
from autoseg.workspace.workspace import Workspace

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("without_reports")  # but for the finished run that the module shares
SMALL: dict[str, Any] = {
    "algos": ["segresnet"],
    "num_epochs": 1,
    "batch_size": 2,
    "num_steps_per_epoch": 3,
    "num_epochs_per_validation": 1,
    "precision": "fp32",
    "num_workers": 1,
    "overlap": 0,
    "roi_size": [16, 16, 16],
    "segresnet": {"init_filters": 8, "blocks_down": [1, 1], "optimizer": "adamw", "learning_rate": 0.003},
}


def make_data(
    folder: Path, annotated: Any = (("sphere", "box"), ("box",)), num_cases: int = 6, **settings: Any
) -> Path:
    path = make_phantoms(
        folder,
        num_cases=num_cases,
        num_testing=1,
        num_unlabeled=1,
        shape=(26, 24, 24),
        num_fold=2,
        annotated=annotated,
    )
    path.write_text(path.read_text() + yaml.safe_dump({**SMALL, **settings}))
    return path


def errors(capsys: pytest.CaptureFixture[str], *words: str | Path) -> list[str]:
    """What a command that cannot work says."""
    assert run_command([str(w) for w in words]) == 2
    return [line.removeprefix("error: ") for line in capsys.readouterr().err.splitlines() if line.startswith("error")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of two rounds; not to be changed."""
    folder = tmp_path_factory.mktemp("rounds")
    path = make_data(folder, strategy="two_stage", pseudolabel={"unlabeled": True})
    assert run_command(["run", "--input", str(path)]) == 0
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run", copy_function=shutil.copy2)
    return tmp_path / "run"


def test_one_command_does_both_rounds(finished: Path) -> None:
    work = finished / "work_dir"
    first, second = (json.loads((work / f"round_{n}" / "datalist.json").read_text()) for n in (1, 2))
    assert [Path(c["image"]).stem[:11] for c in first["training"]] == ["phantom_000", "phantom_002", "phantom_004"]
    assert len(second["training"]) == 6
    completed = json.loads((work / "round_2" / "pseudolabels" / "completed.json").read_text())
    assert sorted(completed) == ["phantom_001", "phantom_003", "phantom_005", "phantom_007"]
    for n in (1, 2):
        states = [json.loads(p.read_text())["state"] for p in (work / f"round_{n}").glob("segresnet_*/job.json")]
        assert states == ["done", "done"]
    assert not list(work.glob("segresnet_*"))
    # The last round predicts the testing cases; what is scored are the annotators' labels alone.
    assert not (work / "round_1" / "ensemble" / "predictions").exists()
    assert len(list((work / "round_2" / "ensemble" / "predictions").glob("*.nii.gz"))) == 1
    scores = json.loads((work / "round_2" / "ensemble" / "scores.json").read_text())
    dice = {c["name"]: c["dice"]["segresnet"] for c in scores["cases"]}
    assert sorted(dice) == [f"phantom_{i:03d}" for i in range(6)]
    assert all((v[0] is None) == (name in completed) for name, v in dice.items())
    texts = [p for p in work.rglob("*") if p.suffix in (".yaml", ".json", ".jsonl")]
    assert not [p for p in texts if str(finished) in p.read_text()], "absolute paths in work_dir"


def test_everything_follows_the_last_finished_round(finished: Path, tmp_path: Path) -> None:
    work = finished / "work_dir"
    text = status(work, STAGES)
    assert "Round 1 of 2\n" in text
    assert "Round 2 of 2, pseudo-labels made 2" in text
    assert "4 jobs: 4 done." in text
    assert "round_2/segresnet_0/train.log" in job_status(work, "segresnet_0")
    assert "round_1/segresnet_0/train.log" in job_status(work, "round_1/segresnet_0")
    second = Workspace(work).finished()
    assert second.root == work / "round_2"
    expected = torch.load(second.job_dir("segresnet", 0).model, weights_only=True)
    loaded = load_predictor(Workspace(work), device="cpu")
    assert all(torch.equal(expected[k], v) for k, v in loaded.models[0].network.state_dict().items())
    assert {record["case"] for record in load_result(work).records} == {f"phantom_{i:03d}" for i in range(6)}
    assert load_result(work).predictions == second.predictions
    page = (work / "report.html").read_text()
    assert '<section id="pseudolabels"' in page
    rows = page.partition("The most suspicious first")[2].partition("</table>")[0]
    assert '<th scope="row">phantom_007</th><td class="text">sphere</td>' in rows
    assert rows.count("accepted") == 5
    assert page.count('<article class="case" id="pseudo-') == 3
    # Of a run whose second round has no models yet, the first round's speak.
    shutil.copytree(work, tmp_path / "work", copy_function=shutil.copy2)
    shutil.rmtree(tmp_path / "work" / "round_2" / "ensemble")
    assert Workspace(tmp_path / "work").finished().root == tmp_path / "work" / "round_1"
    assert Workspace(tmp_path / "work").latest().root == tmp_path / "work" / "round_2"


def test_a_second_run_does_nothing(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [p for p in (finished / "work_dir").rglob("*") if p.suffix == ".pt" or "pseudolabels" in p.parts]
    before = {p: p.stat().st_mtime_ns for p in files if p.is_file()}
    assert run_command(["run", "--input", str(finished / "input.yaml")]) == 0
    said = capsys.readouterr().err
    assert said.count("is done (Dice") == 4
    assert said.count("generate: up to date") == 2
    assert "pseudolabel: up to date" in said
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_each_step_alone_works_on_the_last_round(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(copied / "input.yaml")
    shutil.rmtree(copied / "work_dir" / "round_2")
    assert run_command(["pseudolabel", "--input", path, "--pseudolabel.exclude", "[sphere]"]) == 0
    shown = capsys.readouterr()
    assert "box   | " in shown.out
    assert "sphere" not in shown.out
    completed = json.loads((copied / "work_dir" / "round_2" / "pseudolabels" / "completed.json").read_text())
    assert completed == {"phantom_007": {"file": "labels/phantom_007.nii.gz", "annotated": ["box"]}}
    assert run_command(["generate", "--input", path]) == 0
    assert "as on an earlier command line: --pseudolabel.exclude [sphere]" in capsys.readouterr().err
    assert errors(capsys, "generate", "--input", path, "--pseudolabel.exclude", "[]") == [
        f"{copied}/work_dir/round_2: the pseudo-labels are out of date (settings of pseudo-labels changed, "
        "case phantom_001, case phantom_003, case phantom_005 are new). "
        "Run `autoseg pseudolabel` or `autoseg run`."
    ]
    assert run_command(["pseudolabel", "--input", path, "--pseudolabel.exclude", "[]"]) == 0
    assert run_command(["generate", "--input", path]) == 0
    alone = ["train", "--work_dir", str(copied / "work_dir"), "--algo", "segresnet", "--fold", "1"]
    assert run_command(alone) == 0
    assert run_command(["ensemble", "--input", path]) == 0
    assert (copied / "work_dir" / "round_2" / "ensemble" / "ensemble.json").exists()
    assert not (copied / "work_dir" / "round_2" / "segresnet_0" / "models" / "model.pt").exists()


def test_an_original_label_that_changed_between_the_rounds_is_noticed(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied / "input.yaml"
    file = copied / "labels" / "phantom_001.nii.gz"
    label = read_label(file)
    label.array[0, 0, 0, 0] = 2
    write_volume(file, label.array[0], label.grid)
    assert errors(capsys, "train", "--input", path) == [
        f"{copied}/work_dir: the analysis is out of date (case phantom_001 changed). "
        "Run `autoseg analyze` or `autoseg run`."
    ]
    assert run_command(["analyze", "--input", str(path)]) == 0
    capsys.readouterr()
    assert errors(capsys, "train", "--input", path) == [
        f"{copied}/work_dir/round_2: the pseudo-labels are out of date (case phantom_001 changed). "
        "Run `autoseg pseudolabel` or `autoseg run`."
    ]
    assert run_command(["run", "--input", str(path)]) == 0
    said = capsys.readouterr().err
    assert "pseudolabel: again, because case phantom_001 changed" in said
    completed = copied / "work_dir" / "round_2" / "pseudolabels" / "labels" / "phantom_001.nii.gz"
    assert read_label(completed).array[0, 0, 0, 0] == 2
    assert said.split("round 2 of 2: train")[0].count("is done (Dice") == 2, "round 1 has not seen the case"


def test_later_rounds_can_start_from_the_weights_of_the_one_before(tmp_path: Path) -> None:
    settings = {"strategy": "both", "pseudolabel": {"filter": False, "rounds": 3}, "folds": [0], "learning_rate": 1e-9}
    path = make_data(tmp_path, num_cases=4, **{**settings, "segresnet": {"init_filters": 8, "blocks_down": [1, 1]}})
    assert run_command(["run", "--input", str(path)]) == 0
    models = [
        torch.load(tmp_path / "work_dir" / f"round_{n}" / "segresnet_0" / "models" / "model.pt", weights_only=True)
        for n in (1, 2, 3)
    ]
    for later in models[1:]:  # the learning rate is next to nothing
        for key, value in models[0].items():
            torch.testing.assert_close(value, later[key], atol=1e-5, rtol=1e-5)
    other = Workspace(tmp_path / "work_dir" / "round_2")
    assert other.first_weights("segresnet", 0) == tmp_path / "work_dir/round_1/segresnet_0/models/model.pt"
    assert other.first_weights("segresnet", 1) is None


@pytest.mark.parametrize(
    "settings", [{"strategy": "two_stage"}, {"strategy": "both", "pseudolabel": {"start": "scratch", "filter": False}}]
)
def test_validation_cases_that_the_list_names_stay_so_in_both_rounds(tmp_path: Path, settings: dict[str, Any]) -> None:
    path = make_data(tmp_path, num_cases=4, **settings)
    listed = json.loads((tmp_path / "datalist.json").read_text())
    cases = [{k: v for k, v in case.items() if k != "fold"} for case in listed["training"]]
    (tmp_path / "datalist.json").write_text(json.dumps({**listed, "training": cases[:2], "validation": cases[2:]}))
    assert run_command(["run", "--input", str(path)]) == 0
    found = [json.loads((tmp_path / "work_dir" / f"round_{n}" / "datalist.json").read_text()) for n in (1, 2)]
    split = [
        [[Path(case["image"]).name[:11] for case in made[role]] for role in ("training", "validation")]
        for made in found
    ]
    whole = [["phantom_000", "phantom_001"], ["phantom_002", "phantom_003"]]
    assert split == [[["phantom_000"], ["phantom_002"]] if settings["strategy"] == "two_stage" else whole, whole]
    assert [p.name for p in (tmp_path / "work_dir" / "round_2").glob("segresnet_*")] == ["segresnet_0"]
    completed = json.loads((tmp_path / "work_dir" / "round_2" / "pseudolabels" / "completed.json").read_text())
    assert {"phantom_001", "phantom_003"} <= set(completed)


def test_a_case_that_could_not_be_predicted_is_tried_again(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(copied / "input.yaml")
    shutil.rmtree(copied / "work_dir" / "round_2")
    with monkeypatch.context() as patch:
        break_a_case(patch)
        for _ in range(2):
            assert run_command(["pseudolabel", "--input", path]) == 1
            assert "the next run tries again:\nphantom_001: the share is not mounted" in capsys.readouterr().out
        assert run_command(["generate", "--input", path]) == 0, "the round can do without it"
        capsys.readouterr()
    assert run_command(["pseudolabel", "--input", path]) == 0
    assert "pseudolabel: again, because phantom_001 could not be predicted" in capsys.readouterr().err
    assert run_command(["pseudolabel", "--input", path]) == 0
    assert "pseudolabel: up to date" in capsys.readouterr().err


def test_a_failed_job_of_an_earlier_round_is_told(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--input", str(copied / "input.yaml")]
    assert run_command(["retry", *words]) == 0
    assert "retry: no job has failed" in capsys.readouterr().err
    file = copied / "work_dir" / "round_1" / "segresnet_1" / "job.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"state": "failed"}))
    how = (
        "`autoseg run` trains jobs of earlier rounds again, and then what later rounds learned from them: "
        "round_1/segresnet_1"
    )
    assert run_command(["retry", *words]) == 1
    said = capsys.readouterr().err
    assert f"retry: {how}" in said
    assert "retry: no job of the last round has failed" in said
    assert errors(capsys, "retry", "segresnet_1", *words) == [f"segresnet_1: is done, not failed. Failed: none. {how}."]


def test_settings_of_rounds_that_do_nothing_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make_data(tmp_path, num_cases=4, strategy="two_stage")
    for overrides, told in (
        ({"partial_labels": "off", "pseudolabel.rounds": "3"}, ["pseudolabel, strategy"]),
        ({"partial_labels": "off"}, ["strategy"]),
        ({}, []),
    ):
        caplog.clear()
        warn_of_unused(*load_settings(path, overrides))
        assert [m.partition(":")[0] for m in caplog.messages] == told


# -- bad input


def test_no_fully_labelled_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_data(tmp_path, annotated=[("sphere",), ("box",)], num_cases=4, strategy="two_stage")
    assert errors(capsys, "run", "--input", path) == [
        "strategy: two_stage begins with the cases that are annotated for all 2 classes, but none is; the most "
        "complete one, phantom_000, lacks box. "
        "Set `strategy: both` or `strategy: marginal`, which train on every labelled case at once."
    ]
    assert run_command(["run", "--input", str(path), "--strategy", "marginal"]) == 0
    assert not (tmp_path / "work_dir" / "round_2").exists()
    assert (tmp_path / "work_dir" / "ensemble" / "ensemble.json").exists()


def test_a_class_that_nobody_annotates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = {"num_epochs": 20, "num_epochs_per_validation": 20}
    path = make_data(tmp_path, annotated=[("sphere",), ()], num_cases=4, strategy="marginal", **steps)
    assert run_command(["run", "--input", str(path)]) == 0
    assert "data set: 1 class in no training case: box. What does not occur cannot be learned." in (
        capsys.readouterr().out
    )
    # It is learned as background, not left to take any share of it.
    pred = read_label(next((tmp_path / "work_dir" / "ensemble" / "predictions").glob("*.nii.gz")))
    assert (pred.array == 2).mean() < 0.05


def test_a_class_annotated_in_one_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotated = [("sphere", "box"), ("sphere",), ("sphere",), ("sphere",)]
    path = make_data(tmp_path, annotated=annotated, num_cases=4, strategy="two_stage")
    assert run_command(["analyze", "--input", str(path)]) == 0
    assert "1 class occurs in fewer training cases than the 2 folds: box (in 1)" in capsys.readouterr().out
    assert errors(capsys, "run", "--input", path) == [
        "strategy: two_stage begins with the cases that are annotated for all 2 classes, but one patient alone is, "
        "which leaves none to validate on. "
        "Set `strategy: both` or `strategy: marginal`, which train on every labelled case at once."
    ]
    assert run_command(["run", "--input", str(path), "--strategy", "both"]) == 0
    audit = json.loads((tmp_path / "work_dir" / "round_2" / "pseudolabels" / "audit.json").read_text())
    row = next(r for r in audit["rows"] if r["name"] == "box")
    # The one fold that has it cannot know it, and no other has it to score.
    assert row["rejected"].startswith(("low score: ", "no score: "))


def test_a_declaration_that_contradicts_the_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_data(tmp_path, num_cases=4)
    listed = json.loads((tmp_path / "datalist.json").read_text())
    listed["training"][0]["annotated"] = ["box"]
    (tmp_path / "datalist.json").write_text(json.dumps(listed))
    assert errors(capsys, "run", "--input", path) == [
        "phantom_000 (labels/phantom_000.nii.gz): has sphere but is not declared as annotated for it. "
        "Add it to `annotated` in the datalist, or remove it from the label."
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["run", "--pseudolabel.exclude", "[spheer]"],
            "pseudolabel.exclude: no class spheer. Did you mean sphere?",
        ),
        (
            ["run", "--class_weights", "{bocks: 10}", "--strategy", "marginal"],
            "class_weights: no class bocks. Known: box, sphere.",
        ),
        (
            ["pseudolabel", "--strategy", "marginal"],
            "pseudolabel: there is nothing to fill in: strategy is marginal.",
        ),
        (
            ["pseudolabel"],
            "{work}/round_1: no ensemble yet to label the other cases with. Run `autoseg ensemble` or `autoseg run`.",
        ),
    ],
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    path = make_data(tmp_path, num_cases=4)
    assert run_command(["analyze", "--input", str(path)]) == 0
    capsys.readouterr()
    assert errors(capsys, *words, "--input", path) == [message.replace("{work}", str(tmp_path / "work_dir"))]
    assert not (tmp_path / "work_dir" / "round_2").exists(), "the single steps would take it for the last round"


def known(work: Path) -> dict[str, bytes]:
    """All that a run knows, but for its logs."""
    logs = {"run.log", "report.html", "commands.jsonl", "usage.jsonl", "digests.jsonl"}
    files = [p for p in work.rglob("*") if p.is_file() and p.name not in logs and ".claims" not in p.parts]
    return {str(p.relative_to(work)): p.read_bytes() for p in sorted(files)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--pseudolabel.exclude", "[spheer]"], "pseudolabel.exclude: no class spheer. Did you mean sphere?"),
        (["pseudolabel", "--strategy", "marginal"], "pseudolabel: there is nothing to fill in: strategy is marginal."),
        (["run", "--class_weights", "{bocks: 10}"], "class_weights: no class bocks. Known: box, sphere."),
        (
            ["run", "--class_weights", "{bocks: 10}", "--strategy", "marginal"],
            "class_weights: no class bocks. Known: box, sphere.",
        ),
    ],
)
def test_a_mistake_leaves_a_finished_run_as_it_was(
    copied: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    work = copied / "work_dir"
    before = known(work)
    assert errors(capsys, *words, "--input", copied / "input.yaml") == [message]
    assert known(work) == before
    assert Workspace(work).finished().root == work / "round_2"
    assert "Round 2 of 2" in status(work, STAGES)
    assert run_command(["run", "--input", str(copied / "input.yaml")]) == 0
    said = capsys.readouterr().err
    assert "earlier command line" not in said
    assert said.count("is done (Dice") == 4


def test_pseudo_labels_that_cannot_be_made_hide_no_finished_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run of one round, asked for a second one whose first is not there."""
    path = make_data(tmp_path, num_cases=4, strategy="marginal")
    work = tmp_path / "work_dir"
    assert run_command(["analyze", "--input", str(path)]) == 0
    assert run_command(["generate", "--input", str(path)]) == 0
    before = known(work)
    capsys.readouterr()
    assert errors(capsys, "pseudolabel", "--input", path, "--strategy", "both") == [
        f"{work}/round_1: no ensemble yet to label the other cases with. Run `autoseg ensemble` or `autoseg run`."
    ]
    assert known(work) == before
    assert Workspace(work).latest().root == work


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_budget_is_shared_over_the_rounds_and_kept(tmp_path: Path) -> None:
    path = make_data(tmp_path, strategy="both", num_epochs=None, num_steps_per_epoch=None, budget="100s")
    begin = time.monotonic()
    command = [sys.executable, "-m", "autoseg", "run", "--input", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    wall_s = time.monotonic() - begin
    assert done.returncode == 0, done.stderr
    assert 95 <= wall_s <= 105
    seconds = [job.seconds for n in (1, 2) for job in Workspace(tmp_path / "work_dir" / f"round_{n}").jobs()]
    assert len(seconds) == 4
    # The first job begins before it is known what predictions take, when a tenth of the time is kept for each round.
    assert max(seconds) <= 1.4 * min(seconds)
    assert done.stderr.count("budget: 1m") == 1  # once for the whole run


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_killed_anywhere_in_two_rounds_ends_with_the_same_pseudo_labels(tmp_path: Path) -> None:
    more = {"strategy": "both", "num_epochs": 4, "pseudolabel": {"min_dice": 0, "max_disagreement": 2}}
    for name in ("whole", "killed"):
        make_data(tmp_path / name, **more)
    command = [sys.executable, "-m", "autoseg", "run", "--input"]
    assert subprocess.run([*command, tmp_path / "whole" / "input.yaml"], check=False).returncode == 0
    rng = random.Random(5)
    for _ in range(12):
        process = subprocess.Popen([*command, tmp_path / "killed" / "input.yaml"], stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(2.0, 14.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run([*command, tmp_path / "killed" / "input.yaml"], check=False).returncode == 0
    whole, killed = (tmp_path / n / "work_dir" / "round_2" / "pseudolabels" / "labels" for n in ("whole", "killed"))
    names = sorted(p.name for p in whole.glob("*.nii.gz"))
    assert names
    assert names == sorted(p.name for p in killed.glob("*.nii.gz"))
    for name in names:
        np.testing.assert_array_equal(read_label(whole / name).array, read_label(killed / name).array)
