"""The stage `pretrain` in a run: what starts from it, its settings, its workers, its time, and the proof beside it."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from processes import autoseg
from test_pipeline import SMALL

from autoseg.config.load import load_settings
from autoseg.config.settings import TrackSettings
from autoseg.data.datalists.datalist import read_datalist
from autoseg.data.phantoms import make_phantoms
from autoseg.errors import ConfigError, WorkspaceError
from autoseg.pipeline.budget import RunBudget, pretraining_s
from autoseg.pipeline.pretraining import pretrain_jobs
from autoseg.pipeline.pretraining_plans import PretrainingPlans, likely_job_s
from autoseg.pipeline.rounds import warn_of_unused
from autoseg.pipeline.stages import STAGES
from autoseg.plan import read_plan
from autoseg.pretraining.job import is_done
from autoseg.report.page import make_report
from autoseg.tracking.tracker import metrics_of
from autoseg.weights.pretrained import keep_pretrained
from autoseg.weights.start import keep_start, read_start
from autoseg.weights.tables import read_table
from autoseg.workspace.pretraining import lesson_for, pretraining_place, read_lesson
from autoseg.workspace.scratch import scratch_place
from autoseg.workspace.workspace import Workspace


def make_data(folder: Path, num_unlabeled: int = 6, **settings: Any) -> Path:
    """Phantoms in two folds, some without labels, and an input.yaml that pretrains and trains in seconds."""
    size = {"num_cases": 4, "num_testing": 1, "num_unlabeled": num_unlabeled, "shape": (26, 24, 24), "num_fold": 2}
    path = make_phantoms(folder, **size)
    values = {**SMALL, "ensemble": False, "pretrain": {"method": "mae", "epochs": 2}, **settings}
    path.write_text(path.read_text() + yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run whose jobs started from one pretraining, and their twins did not; not to be changed."""
    folder = tmp_path_factory.mktemp("pretrained")
    done = autoseg("run", "--input", make_data(folder, compare_scratch=True))
    assert done.returncode == 0, done.stderr
    assert "pretrain: 6 images for all folds\n" in done.stderr
    assert "segresnet from weights against scratch" in done.stdout
    assert "too few cases to test" in done.stdout
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run", copy_function=shutil.copy2)
    return tmp_path / "run"


def test_jobs_start_from_what_was_learned_from_images(finished: Path) -> None:
    work = Workspace(finished / "work_dir")
    place = pretraining_place(work)
    taught = torch.load(place.job_dir("segresnet", 0).model, weights_only=True)
    assert all(name.startswith("encoder.") for name in taught), "the encoder alone"
    assert not place.job_dir("segresnet", 1).plan.exists(), "one for all folds"
    for fold in (0, 1):
        paths = work.job_dir("segresnet", fold)
        assert work.read_job("segresnet", fold).inputs.keys() >= {"init_weights"}
        table = read_table(paths)
        assert table is not None
        assert table.encoder_share == 1.0
        assert (table.source, table.kind) == ("pretraining/segresnet_0", "mae on 6 images (6 unlabeled)")
        start = read_start(work, "segresnet", fold)
        assert start is not None
        kept = torch.load(start.path, weights_only=True)
        assert kept.keys() == taught.keys()
        assert all(torch.equal(kept[n], taught[n]) for n in kept)
        plan = read_plan(paths)
        assert (plan.loaded_rate, plan.frozen_fraction) == (1.0, 0.05)
        assert plan.network["dsdepth"] == 1  # of two stages: not that of the pretraining, which is one for any
    lines = [json.loads(line) for line in place.job_dir("segresnet", 0).metrics.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert lines[-1]["best_l1"] > 0
    texts = [p for p in place.root.rglob("*") if p.suffix in (".yaml", ".json", ".jsonl")]
    assert not [p for p in texts if str(finished) in p.read_text()], "absolute paths"


def test_twins_have_the_same_plan_and_start_from_random_weights(finished: Path) -> None:
    work = Workspace(finished / "work_dir")
    twins = scratch_place(work)
    assert Workspace(twins.root).run == work.root, "a worker that is given the folder alone finds the run"
    for fold in (0, 1):
        own, twin = read_plan(work.job_dir("segresnet", fold)), read_plan(twins.job_dir("segresnet", fold))
        changed = {k for k, v in own.model_dump().items() if v != twin.model_dump()[k]}
        assert changed == {"frozen_fraction", "warmup_fraction"}
        assert (own.warmup_fraction, twin.warmup_fraction) == (0.05, 0.03), "the usual one, as without weights"
        assert twins.read_job("segresnet", fold).state == "done"
        assert "init_weights" not in twins.read_job("segresnet", fold).inputs
        assert read_table(twins.job_dir("segresnet", fold)) is None
    assert {job.name for job in work.jobs()} == {"segresnet_0", "segresnet_1"}, "no ensemble knows of them"


def test_generate_says_that_what_is_there_learned_otherwise(copied: Path) -> None:
    path, warning = copied / "input.yaml", "warning: pretrain: segresnet_0 learned by another method, or from other"
    same = autoseg("generate", "--input", path)
    assert same.returncode == 0, same.stderr
    assert warning not in same.stderr
    other = autoseg("generate", "--input", path, "--pretrain.method", "contrastive")
    assert other.returncode == 0, other.stderr
    assert warning in other.stderr
    lists = json.loads((copied / "datalist.json").read_text())
    (copied / "datalist.json").write_text(json.dumps({**lists, "unlabeled": lists["unlabeled"][:-1]}))
    assert autoseg("analyze", "--input", path, "--pretrain.method", "mae").returncode == 0
    fewer = autoseg("generate", "--input", path, "--pretrain.method", "mae")
    assert fewer.returncode == 0, fewer.stderr
    assert warning in fewer.stderr


def test_a_second_run_does_nothing(copied: Path) -> None:
    again = autoseg("run", "--input", copied / "input.yaml")
    assert again.returncode == 0, again.stderr
    assert "pretrain: segresnet_0 is done\n" in again.stderr
    assert again.stderr.count("train: segresnet_0 is done (Dice") == 2, "its twin, too"
    assert "segresnet_0: mae on" not in again.stderr


def test_status_explain_and_report_know_the_stage(copied: Path) -> None:
    work = copied / "work_dir"
    status = autoseg("status", "--work_dir", work).stdout
    assert "\nPretraining\nJob" in status
    assert "2/2" in status
    assert "\nFrom scratch (compare_scratch)\nJob" in status
    explained = autoseg("explain", "pretrain", "--work_dir", work).stdout
    assert explained.startswith("pretrain: a stage of the run.")
    assert "so far:   done" in explained
    assert "\n  pretrain.method: mae (input.yaml:" in explained
    page = make_report(work, STAGES, output=copied / "page.html").read_text()
    assert "mae on 6 images (6 unlabeled)" in page
    assert "It has seen no image of any fold&#39;s held-out cases, nor of labelled cases that were held back." in page
    assert "segresnet from scratch" in page
    assert "This part could not be made" not in page


def test_another_method_is_learned_anew_and_jobs_follow(copied: Path) -> None:
    work = Workspace(copied / "work_dir")
    before = work.read_job("segresnet", 0).inputs["init_weights"]
    words = ("--pretrain.method", "contrastive", "--compare_scratch", "false", "--folds", "0")
    done = autoseg("run", "--input", copied / "input.yaml", *words)
    assert done.returncode == 0, done.stderr
    assert "segresnet_0: contrastive on 6 images (6 unlabeled), cpu, because " in done.stderr
    assert "pretrain: method" in done.stderr
    assert "train: job 1 of 1, segresnet_0, because" in done.stderr
    assert "init_weights" in done.stderr
    assert work.read_job("segresnet", 0).inputs["init_weights"] != before
    assert read_lesson(pretraining_place(work).job_dir("segresnet", 0)).method == "contrastive"


def test_few_images_make_one_pretraining_for_each_fold_on_every_place(tmp_path: Path) -> None:
    """Two at once, as processes of the launcher; each fold's models start from that of their fold."""
    path = make_data(tmp_path, 1, device="cpu", jobs_per_device=2)
    done = autoseg("run", "--input", path)
    assert done.returncode == 0, done.stderr
    assert "segresnet_1: starting on cpu:1" in done.stderr
    work = Workspace(tmp_path / "work_dir")
    fold_of = {c["image"]: c["fold"] for c in json.loads((tmp_path / "datalist.json").read_text())["training"]}
    names = {Path(image).name.removesuffix(".nii.gz"): fold for image, fold in fold_of.items()}
    for fold in (0, 1):
        found = lesson_for(work, "segresnet", fold)
        assert found is not None
        number, lesson = found
        assert (number, lesson.for_all_folds) == (fold, False)
        seen = {*lesson.training, *lesson.validation}
        held_out = {name for name, of in names.items() if of == fold}
        assert len(seen) == 3
        assert not seen & held_out
        start = read_start(work, "segresnet", fold)
        assert start is not None
        assert start.start.source == f"pretraining/segresnet_{fold}"


def test_all_images_are_said_beside_the_scores(tmp_path: Path) -> None:
    path = make_data(tmp_path, 0, folds=[0], pretrain={"method": "mae", "epochs": 1, "all_images": True})
    done = autoseg("run", "--input", path)
    assert done.returncode == 0, done.stderr
    assert "pretrain: 5 images for all folds, 5 of them of cases that models are scored on\n" in done.stderr
    [warning] = Workspace(tmp_path / "work_dir").read_job("segresnet", 0).warnings
    assert warning == (
        "pretraining/segresnet_0 has learned from the images of 2 of the 2 cases of this fold, without their labels, "
        "so its Dice here may say a little too much."
    )
    # Another run of the same images that starts from it, and one that starts from what was trained from it.
    other = tmp_path / "other"
    shutil.copytree(tmp_path, other, ignore=shutil.ignore_patterns("work_dir", "other"))
    for number, source in enumerate(("pretraining/segresnet_0", "segresnet_0")):
        words = ["--folds", str(number), "--pretrain.method", "none", "--init_weights", tmp_path / "work_dir" / source]
        done = autoseg("run", "--input", other / "input.yaml", *words)
        assert done.returncode == 0, done.stderr
    unseen, learned = (Workspace(other / "work_dir").read_job("segresnet", fold) for fold in (0, 1))
    [warning] = unseen.warnings
    assert warning.startswith("segresnet_0/models/model.pt has learned from the images of 2 of the 2 cases of this")
    [warning] = learned.warnings
    assert warning.startswith("segresnet_0/models/model.pt has learned from 2 of the 2 cases of this fold, so its Dice")
    first = read_start(Workspace(tmp_path / "work_dir"), "segresnet", 0)
    assert first is not None
    assert {*learned.images_seen} == {*first.start.images_seen} != set()


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    path = make_data(tmp_path)
    none = autoseg("analyze", "--input", path, "--pretrain.method", "none", "--init_weights", "pretrain")
    assert none.returncode == 2
    assert "init_weights: pretrain needs a way to pretrain. Set pretrain.method: mae or contrastive" in none.stderr
    assert autoseg("analyze", "--input", path).returncode == 0
    early = autoseg("generate", "--input", path)
    assert early.returncode == 2
    assert (
        "segresnet_0 is to start from its pretraining, which is not done. Run `autoseg pretrain` or `autoseg run` "
        "first." in early.stderr
    )
    dints = autoseg("pretrain", "--input", path, "--algos", "dints")
    assert dints.returncode == 2
    assert (
        "error: pretrain: dints cannot be pretrained on images alone. Expected segresnet, resenc, swinunetr or unetr "
        "among algos.\n" in dints.stderr
    )
    unplanned = autoseg("pretrain", "--work_dir", tmp_path / "work_dir", "--algo", "segresnet", "--fold", "0")
    assert unplanned.returncode == 2
    assert "no pretraining of segresnet_0 is planned. Run `autoseg pretrain --input input.yaml`." in unplanned.stderr
    half = autoseg("pretrain", "--input", path, "--algo", "segresnet")
    assert half.returncode == 2
    assert "error: --algo and --fold: together they name one planned pretraining" in half.stderr


def test_a_run_without_a_method_leaves_the_stage_out(tmp_path: Path) -> None:
    path = make_data(tmp_path, pretrain={"method": "none"}, folds=[0])
    done = autoseg("run", "--input", path)
    assert done.returncode == 0, done.stderr
    assert "pretrain: left out (pretrain.method: none)\n" in done.stderr
    work = Workspace(tmp_path / "work_dir")
    assert not pretraining_place(work).root.exists()
    assert read_table(work.job_dir("segresnet", 0)) is None


def test_its_time_is_the_runs(copied: Path) -> None:
    path, work = copied / "input.yaml", Workspace(copied / "work_dir")
    settings, _ = load_settings(path, {"budget": "40s"})
    assert pretraining_s(settings) == 10.0
    assert pretraining_s(load_settings(path, {"budget": "40s", "pretrain.budget": "5s"})[0]) == 5.0
    assert pretraining_s(load_settings(path, {})[0]) is None
    first = RunBudget(pretraining_place(work), settings, 1)
    first.state.spent_s = 12.0
    first.save()
    left = RunBudget(work, settings, 1).left_s
    assert left < 40 - 12
    of_another_length = load_settings(path, {"budget": "50s"})[0]
    assert RunBudget(work, of_another_length, 1).left_s > 50 - 12, "a budget of another length starts anew"


def test_a_budget_ends_pretraining_and_is_kept_by_the_plan(tmp_path: Path) -> None:
    path = make_data(tmp_path, folds=[0], pretrain={"epochs": 10_000})
    early = autoseg("pretrain", "--input", path)
    assert early.returncode == 2
    assert "analyze has not been done. Run `autoseg analyze` or `autoseg run` first." in early.stderr
    assert autoseg("analyze", "--input", path).returncode == 0
    done = autoseg("pretrain", "--input", path, "--budget", "3s", "--pretrain.method", "contrastive")
    assert done.returncode == 0, done.stderr
    place = pretraining_place(Workspace(tmp_path / "work_dir"))
    plan, job = read_plan(place.job_dir("segresnet", 0)), place.read_job("segresnet", 0)
    assert plan.budget_s == 3.0, "all of the budget that the stage alone was given"
    assert job.state == "done"
    last = json.loads(place.job_dir("segresnet", 0).metrics.read_text().splitlines()[-1])
    assert last["progress"] == 1.0
    assert last["epoch"] < 10_000
    again = autoseg("pretrain", "--input", path)
    assert again.returncode == 0, again.stderr
    assert "as on an earlier command line: --pretrain.method contrastive --pretrain.budget 3s\n" in again.stderr
    assert "pretrain: segresnet_0 is done\n" in again.stderr
    both = autoseg("pretrain", "--input", path, "--budget", "3s", "--pretrain.budget", "4s")
    assert both.returncode == 2
    assert "error: --budget and --pretrain.budget: both say how long `autoseg pretrain` may take." in both.stderr


def test_a_tracker_is_told_of_it(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[Any, ...]] = []

    class Noted:
        def __init__(self, settings: TrackSettings, workspace: Workspace, name: str, kept: Path, params: Any) -> None:
            told.append((settings.tool, name, kept.relative_to(copied).as_posix(), params["cases"]))

        def begin(self, lines: Any, *, anew: bool) -> None:
            told.append(("begin", anew))

        def add(self, line: Any) -> None:
            told.append((line["epoch"], metrics_of(line).keys()))

        def attach(self, files: Any) -> None:
            told.append(tuple(file.name for file in files))

        def end(self, ending: str) -> None:
            told.append((ending,))

    monkeypatch.setattr("autoseg.training.job_run.Follower", Noted)
    monkeypatch.setattr("autoseg.training.job_run.check_tracker", lambda settings: None)
    work = Workspace(copied / "work_dir")
    pretraining_place(work).job_dir("segresnet", 0).model.unlink()
    settings, _ = load_settings(copied / "input.yaml", {"track": "tensorboard"})
    assert pretrain_jobs(work, settings, [("segresnet", 0)])
    kept = "work_dir/pretraining/segresnet_0/tracking.json"
    every = {"train/loss", "train/learning_rate"}
    assert told == [
        ("tensorboard", "pretraining/segresnet_0", kept, {"training": 5, "validation": 1}), ("begin", True),
        (1, every), (2, {*every, "val/l1"}), ("hyper_parameters.yaml", "metrics.jsonl"), ("finished",),
    ]  # fmt: skip


def test_a_job_says_why_its_pretraining_failed(copied: Path) -> None:
    work = Workspace(copied / "work_dir")
    place = pretraining_place(work)
    job = place.read_job("segresnet", 0)
    job.state, job.error = "failed", "segresnet_0: out of memory.\nTraceback"
    place.write_job(job)
    with pytest.raises(WorkspaceError, match=r"its pretraining, which failed: segresnet_0: out of memory\.$"):
        keep_pretrained(work, "segresnet", 0)


def test_what_is_done_stays_whatever_the_budget_of_the_run(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    work = Workspace(copied / "work_dir")
    paths = pretraining_place(work).job_dir("segresnet", 0)
    before = paths.plan.read_bytes()

    def plan(**words: str) -> float | None:
        settings, origins = load_settings(copied / "input.yaml", words)
        assert PretrainingPlans.of(work, settings, origins).write() == [("segresnet", 0)]
        return read_plan(paths).budget_s

    assert plan(budget="100s") is None
    assert paths.plan.read_bytes() == before
    assert "pretrain: segresnet_0 stays as it was made, for another budget of the run" in caplog.messages
    assert plan(budget="100s", **{"pretrain.epochs": "3"}) == 25.0, "no longer the same lesson"
    assert plan(**{"pretrain.budget": "7s"}) == 7.0, "time that was asked for"
    assert plan(**{"pretrain.budget": "0.01s"}) == 1.0, "too short for a plan, which the job says"
    job = pretraining_place(work).read_job("segresnet", 0)
    job.state = "pending"
    pretraining_place(work).write_job(job)
    assert plan(budget="100s", **{"pretrain.budget": "9s"}) == 9.0
    with pytest.raises(ConfigError, match=r"pretrain.budget: 2h of the run's budget of 1h leaves nothing to training"):
        plan(budget="1h", **{"pretrain.budget": "2h"})


def test_the_time_of_jobs_is_what_pretraining_leaves(copied: Path) -> None:
    def each(**words: str) -> float | None:
        return likely_job_s(load_settings(copied / "input.yaml", {"device": "cpu", **words})[0], 2)("segresnet_0")

    assert each() is None
    assert each(budget="1000s", compare_scratch="false") == pytest.approx(0.9 * 750 / 2, abs=0.1)
    assert each(budget="1000s", compare_scratch="true") == pytest.approx(0.9 * 750 / 4, abs=0.1)
    assert each(budget="1000s", compare_scratch="false", **{"pretrain.budget": "200s"}) == pytest.approx(
        0.9 * 800 / 2, abs=0.1
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({}, ""),
        (
            {"pretrain.temperature": "0.5"},
            "pretrain.temperature: without effect, since pretrain.method is mae. Leave out what belongs to another.",
        ),
        (
            {"pretrain.method": "contrastive", "pretrain.mask_share": "0.5", "pretrain.temperature": "0.1"},
            "pretrain.mask_share: without effect, since pretrain.method is contrastive. Leave out what belongs to "
            "another.",
        ),
        (
            {"pretrain.method": "none", "pretrain.budget": "5s"},
            "pretrain.budget, pretrain.epochs: without effect, since pretrain.method is none. Set pretrain.method: mae "
            "or contrastive.",
        ),
        ({"pretrain.method": "none", "pretrain.epochs": "500"}, ""),
        (
            {"init_weights": "none"},
            "pretrain.method: without effect, since init_weights names other weights. Leave out one of them.",
        ),
        ({"init_weights": "{segresnet: pretrain, unet: none}"}, ""),
    ],
)
def test_settings_without_effect_are_said(
    finished: Path, words: dict[str, str], expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings, origins = load_settings(finished / "input.yaml", words)
    warn_of_unused(settings, origins)
    assert caplog.messages == ([expected] if expected else [])


LAUNCHERS = {"slurm": ("submitit", {"slurm": {"cluster": "local"}}), "ray": ("ray", {"address": "local"})}


@pytest.mark.parametrize(
    "launcher", [pytest.param(name, marks=pytest.mark.extra(LAUNCHERS[name][0])) for name in LAUNCHERS]
)
def test_every_launcher_pretrains_and_fine_tunes(tmp_path: Path, launcher: str) -> None:
    path = make_data(tmp_path, folds=[0], device="cpu", launcher=launcher, **LAUNCHERS[launcher][1])
    done = autoseg("run", "--input", path)
    assert done.returncode == 0, done.stderr
    work = Workspace(tmp_path / "work_dir")
    for place in (pretraining_place(work), work):
        assert place.read_job("segresnet", 0).state == "done"
        assert (place.root / "state" / "launch" / "segresnet_0.out").exists(), "by a task of the launcher"
    table = read_table(work.job_dir("segresnet", 0))
    assert table is not None
    assert table.encoder_share == 1.0


def test_twins_have_their_share_of_a_budget(copied: Path, tmp_path: Path) -> None:
    path, jobs = copied / "input.yaml", [("segresnet", 0), ("segresnet", 1)]
    shares = {}
    for compared in ("true", "false"):
        settings, _ = load_settings(path, {"budget": "1000s", "compare_scratch": compared})
        budget = RunBudget(Workspace(tmp_path / compared), settings, 1)
        budget.give(read_datalist(copied / "work_dir" / "datalist.json", copied), jobs, jobs)
        shares[compared] = budget.state.jobs["segresnet_0"]
    assert shares["true"] == pytest.approx(shares["false"] / 2, rel=0.01)


def test_twins_are_no_use_without_weights_and_that_is_said(tmp_path: Path) -> None:
    path = make_data(tmp_path, pretrain={"method": "none"}, folds=[0], compare_scratch=True)
    done = autoseg("run", "--input", path)
    assert done.returncode == 0, done.stderr
    assert "warning: compare_scratch: without effect, since no job that is done started from weights\n" in done.stderr


def test_a_twin_is_trained_by_a_worker_that_knows_its_folder_alone(copied: Path) -> None:
    twins = copied / "work_dir" / "scratch"
    (twins / "segresnet_0" / "models" / "model.pt").unlink()
    done = autoseg("train", "--work_dir", twins, "--algo", "segresnet", "--fold", "0")
    assert done.returncode == 0, done.stderr
    assert (twins / "segresnet_0" / "models" / "model.pt").exists()
    assert "starts with" not in done.stderr


@pytest.mark.slow
def test_two_processes_pretrain_and_fine_tune(copied: Path) -> None:
    """torchrun with two processes, over gloo, as for several GPUs."""
    work = Workspace(copied / "work_dir")

    def torchrun(stage: str) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "autoseg"]
        command += [stage, "--work_dir", str(work.root), "--algo", "segresnet", "--fold", "0", "--device", "cpu"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]

    for stage, place in (("pretrain", pretraining_place(work)), ("train", work)):
        paths = place.job_dir("segresnet", 0)
        before = torch.load(paths.model, weights_only=True)
        paths.model.unlink()
        torchrun(stage)
        after = torch.load(paths.model, weights_only=True)
        for name, tensor in before.items():
            torch.testing.assert_close(tensor, after[name], atol=1e-4, rtol=1e-3)
        assert place.read_job("segresnet", 0).state == "done"
        assert ("segresnet_0: starts with" in paths.log.read_text()) == (stage == "train")


def test_other_runs_start_from_it_too(copied: Path, tmp_path: Path) -> None:
    """As from a file: the encoder alone, and not the number of outputs that drawing needs."""
    source = pretraining_place(Workspace(copied / "work_dir")).job_dir("segresnet", 0).root
    start = keep_start(Workspace(tmp_path / "other"), "segresnet", source)
    assert start is not None
    assert start.start.kind == "mae on 6 images (6 unlabeled)"
    assert start.start.classes is None
    assert start.start.network == {"init_filters": 8, "blocks_down": [1, 1], "norm": "INSTANCE", "resolution": None}


def test_a_lesson_of_a_case_that_is_gone_is_said(copied: Path) -> None:
    work = Workspace(copied / "work_dir")
    paths = pretraining_place(work).job_dir("segresnet", 0)
    lesson = json.loads(paths.lesson.read_text())
    paths.lesson.write_text(json.dumps({**lesson, "training": ["nobody"]}))
    with pytest.raises(ConfigError, match="nobody is not in the datalist any more"):
        is_done(work, copied, "segresnet", 0)
