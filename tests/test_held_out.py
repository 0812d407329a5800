"""A held-out case is predicted once: what jobs keep of it, and the ensemble that reads it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tiny_jobs import TensorRows, make_job

from autoseg.cli.main import run_command
from autoseg.config.settings import Settings
from autoseg.data.datalists.cases import Datalist
from autoseg.data.datalists.datalist import read_cases, read_datalist
from autoseg.data.labels import LabelMap
from autoseg.data.volumes import read_label
from autoseg.ensemble.build import build_ensemble
from autoseg.ensemble.out_of_fold import score_out_of_fold
from autoseg.errors import ResourceError, WorkspaceError
from autoseg.evaluation.metrics import dice_per_class, mean_score
from autoseg.inference import held_out, prob_files
from autoseg.inference.held_out import label_file, merge, probs_file
from autoseg.inference.prob_files import DamagedProbs, RecordedRows, StoredRows, grid_of, pack, unpack
from autoseg.inference.restore import Member
from autoseg.inference.sides import join_sides, split_sides
from autoseg.inference.windows import WindowModel
from autoseg.launch import Task
from autoseg.pipeline import fold_tasks
from autoseg.plan import read_plan
from autoseg.training import scoring
from autoseg.training.scoring import kept_for_ensemble, score_validation
from autoseg.workspace.claims import Claim
from autoseg.workspace.files import write_json, write_yaml
from autoseg.workspace.jobs import Job, JobDir
from autoseg.workspace.workspace import Workspace

CPU = torch.device("cpu")
ALGOS = ("dints", "segresnet", "swinunetr")
TOLERANCE = 1 - prob_files.CERTAIN + 2 / prob_files.LEVELS
"""Of a stored probability: that of certain ones; the background takes the rounding of all others, too."""
WHOLE = (slice(0, 20), slice(0, 9), slice(0, 7))

# -- probabilities in a file


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def random_probs(*, independent: bool, num_outputs: int = 4, sharp: float = 9.0) -> torch.Tensor:
    """(K, 20, 9, 7), many of them certain, some exactly 0 and 1."""
    logits = torch.randn((num_outputs, 20, 9, 7), generator=torch.Generator().manual_seed(0)) * sharp
    probs = logits.sigmoid() if independent else logits.softmax(0)
    probs[:, 3] = 0.0
    probs[0, 3] = 1.0
    return probs


def stored(path: Path, probs: torch.Tensor, *, independent: bool, most_bytes: int = 1 << 30) -> RecordedRows:
    """Record rows in pieces of three that overlap by one."""
    rows = TensorRows(probs, 0)
    grid = grid_of(rows, WHOLE, independent=independent)
    with RecordedRows(rows, grid, path, most_bytes=most_bytes) as recorded:
        for start in range(0, 18, 2):
            torch.testing.assert_close(
                recorded.rows(start, start + 3), probs.movedim(1, 0)[start : start + 3], rtol=0, atol=0
            )
    return recorded


@pytest.mark.parametrize("independent", [True, False])
@pytest.mark.parametrize("member_values", [1, 1000, 1 << 22])
def test_probabilities_come_back_as_they_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, independent: bool, member_values: int
) -> None:
    monkeypatch.setattr(prob_files, "MEMBER_VALUES", member_values)
    probs = random_probs(independent=independent)
    path = tmp_path / "job" / "case.probs"
    assert stored(path, probs, independent=independent).why_not == ""
    grid = grid_of(TensorRows(probs, 0), WHOLE, independent=independent)
    with StoredRows(path, grid) as rows:
        found = torch.cat([rows.rows(start, min(start + 7, 20)) for start in range(0, 20, 5)][:1] + [rows.rows(7, 20)])
    torch.testing.assert_close(found, probs.movedim(1, 0), rtol=0, atol=TOLERANCE)
    assert (found >= 0).all()
    assert [p.name for p in path.parent.iterdir()] == ["case.probs"]


def test_rows_that_nobody_asks_for_are_written_too(tmp_path: Path) -> None:
    probs = random_probs(independent=False)
    rows = TensorRows(probs, 0)
    grid = grid_of(rows, WHOLE, independent=False)
    with RecordedRows(rows, grid, tmp_path / "a", most_bytes=1 << 30) as recorded:
        recorded.rows(4, 6)
        recorded.rows(11, 12)
    with StoredRows(tmp_path / "a", grid) as found:
        torch.testing.assert_close(found.rows(0, 20), probs.movedim(1, 0), rtol=0, atol=TOLERANCE)


def test_certain_voxels_take_next_to_nothing() -> None:
    probs = torch.zeros((8, 14, 64, 64))
    probs[:, 0] = 1.0
    assert len(pack(probs, independent=False)) < 200
    assert unpack(pack(probs, independent=False), probs.shape, independent=False).equal(probs)


class Away(torch.Tensor):
    """A tensor with values that says it lies elsewhere: what is wanted on the CPU has to be brought, and is counted."""

    brought: ClassVar[list[int]] = []

    @property
    def device(self) -> torch.device:
        return torch.device("meta")

    def cpu(self) -> torch.Tensor:
        self.brought.append(self.numel() * self.element_size())
        return self.as_subclass(torch.Tensor)

    def to(self, *where: Any) -> Away:  # type: ignore[override]
        return self if isinstance(where[0], torch.device) else super().to(*where).as_subclass(Away)

    def numpy(self) -> Any:  # type: ignore[override]
        raise TypeError("of another device: bring it first")


@pytest.mark.parametrize("independent", [True, False])
def test_what_is_stored_is_all_that_leaves_the_device(tmp_path: Path, independent: bool) -> None:
    """Probabilities are packed and counted where they lie; the files and the counts are those of the CPU."""
    probs = random_probs(independent=independent, sharp=40.0)
    names = ("a", "b", "c", "d") if independent else ("a", "b", "c")
    label_map = LabelMap(names=names, values=tuple((i,) for i in range(1, len(names) + 1)), sigmoid=independent)
    label = np.random.default_rng(0).integers(0, len(names) + 1, (20, 9, 7)).astype(np.uint8)
    found = []
    for kind in (torch.Tensor, Away):
        Away.brought.clear()
        path = tmp_path / kind.__name__
        rows = TensorRows(probs, 0)
        rows._rows = rows._rows.as_subclass(kind)
        grid = grid_of(rows, WHOLE, independent=independent)
        with RecordedRows(rows, grid, path, most_bytes=1 << 30) as recorded:
            members = [Member(rows=recorded, box=WHOLE)]
            (labels,), counts = merge(members, [(0,)], label, label_map, None)
        with zipfile.ZipFile(path) as archive:
            found.append((labels.tolist(), counts, [archive.read(name) for name in archive.namelist()]))
    assert found[0] == found[1]
    if not independent:  # of which most are certain
        assert sum(Away.brought) < 0.8 * probs.numel() * probs.element_size()


def test_too_large_a_file_is_given_up_and_rows_still_pass(tmp_path: Path) -> None:
    found = stored(tmp_path / "a", random_probs(independent=False), independent=False, most_bytes=9)
    assert found.why_not == "larger than the 0.0 MB that are left for them"
    assert [*tmp_path.iterdir()] == []


def test_a_full_disk_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("zipfile.ZipFile.writestr", full)
    found = stored(tmp_path / "a", random_probs(independent=False), independent=False)
    assert found.why_not == "No space left on device"
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("damage", ["gone", "cut", "changed", "empty"])
def test_a_damaged_file_is_said_to_be_one(tmp_path: Path, damage: str) -> None:
    probs = random_probs(independent=False)
    path = tmp_path / "a"
    stored(path, probs, independent=False)
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        data[len(data) // 3] ^= 255
        path.write_bytes({"cut": data[: len(data) // 2], "changed": data, "empty": b""}[damage])
    with (
        pytest.raises(DamagedProbs) as error,
        StoredRows(path, grid_of(TensorRows(probs, 0), WHOLE, independent=False)) as rows,
    ):
        rows.rows(0, 20)
    assert error.value.path == path


def test_sides_that_are_joined_are_as_before() -> None:
    names = LabelMap(names=("kidney left", "kidney right", "liver"), values=((5,), (2,), (1,)))
    merged = LabelMap(names=("kidney", "liver"), values=((2, 5), (1,)), origin=names)
    labels = np.random.default_rng(0).choice([0, 1, merged.painted_values[0]], size=(9, 8, 7)).astype(np.uint8)
    split = labels.copy()
    split_sides(split, merged, 4.0)
    assert {*np.unique(split)} == {0, 1, 2, 5}
    np.testing.assert_array_equal(join_sides(split, merged), labels)


# -- jobs and the ensemble


@pytest.fixture(scope="module")
def datalist(phantom_dataset: Path) -> Datalist:
    """Without testing cases: these are predicted by the ensemble, at whatever price."""
    return replace(read_datalist(phantom_dataset / "datalist.json", phantom_dataset), testing=())


@pytest.fixture(scope="module")
def scored_run(tmp_path_factory: pytest.TempPathFactory, datalist: Datalist) -> Workspace:
    """A run whose nine jobs have scored their held-out cases; not to be changed."""
    workspace = Workspace(tmp_path_factory.mktemp("scored") / "work")
    for i, algo in enumerate(ALGOS):
        for fold in range(3):
            spacing = (1.2, 1.2, 1.6) if algo != "dints" else (1.5, 1.5, 1.5)
            make_job(workspace.root, algo, fold, seed=10 * i + fold, resample_resolution=spacing)
    remember(workspace, ensemble=None)
    for algo in ALGOS:
        for fold in range(3):
            score_job(workspace, algo, fold, datalist)
    return workspace


@pytest.fixture
def run(scored_run: Workspace, tmp_path: Path) -> Workspace:
    """A copy of the run, to be changed."""
    shutil.copytree(scored_run.root, tmp_path / "work", copy_function=shutil.copy2)
    return Workspace(tmp_path / "work")


def remember(workspace: Workspace, **settings: Any) -> None:
    """Store settings as `generate` does."""
    write_yaml(workspace.settings, {k: {"value": v, "origin": "default"} for k, v in settings.items()})


def score_job(workspace: Workspace, algo: str, fold: int, datalist: Datalist) -> float:
    job = workspace.job_dir(algo, fold)
    return score_validation(read_plan(job), job, datalist.val_cases(fold), CPU)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of every pass of windows through networks from now on, the word "pass"."""
    found: list[str] = []
    call = WindowModel.__call__

    def counted(self: WindowModel, batch: torch.Tensor, *more: Any) -> torch.Tensor:
        found.append("pass")
        return call(self, batch, *more)

    monkeypatch.setattr(WindowModel, "__call__", counted)
    return found


def score_all(workspace: Workspace, datalist: Datalist, combine: Any = "auto") -> dict[str, Mapping[str, Any]]:
    """Score out of fold: case -> combination -> Dice per class."""
    found, failures = score_out_of_fold(
        workspace, datalist, dict.fromkeys(range(3), ALGOS), combine=combine, device="cpu"
    )
    assert failures == []
    return {case.name: case.dice for case in found}


def without_kept(workspace: Workspace) -> Workspace:
    for job in workspace.root.glob("*_*/held_out"):
        shutil.rmtree(job)
    return workspace


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.nii.gz"))}


def test_no_network_runs_where_jobs_kept_all(
    run: Workspace, datalist: Datalist, passes: list[str], tmp_path: Path
) -> None:
    other = Workspace(tmp_path / "anew")
    shutil.copytree(run.root, other.root, copy_function=shutil.copy2)
    kept = score_all(run, datalist)
    assert passes == []
    anew = score_all(without_kept(other), datalist)
    assert len(passes) > 20

    labels, expected = files_of(run.out_of_fold), files_of(other.out_of_fold)
    assert labels.keys() == expected.keys()
    assert len(labels) == 6 * 8
    alone = [name for name in labels if name.split("/")[0] in ALGOS]
    assert len(alone) == 6 * 3
    assert {name: labels[name] for name in alone} == {name: expected[name] for name in alone}
    votes = [name for name in labels if "_vote/" in name]
    assert {name: labels[name] for name in votes} == {name: expected[name] for name in votes}
    # Of models that know nothing, so that every voxel is close to being of another class.
    assert kept.keys() == anew.keys()
    for combination in next(iter(kept.values())):
        one, two = (mean_score([dice[combination] for dice in scored.values()]) for scored in (kept, anew))
        assert one == pytest.approx(two, abs=1e-4), combination

    for name in kept:
        records = [read(w.ensemble / "records" / f"{name}.json") for w in (run, other)]
        first, second = (record["calibration"] for record in records)
        assert first.keys() == second.keys()
        for combination in first:
            one, two = np.asarray(first[combination]), np.asarray(second[combination])
            if combination in ALGOS:
                np.testing.assert_array_equal(one, two)
            else:  # a rounded probability may fall into the next bin
                np.testing.assert_allclose(one[..., 0].sum(-1), two[..., 0].sum(-1), rtol=0.01, atol=5)


def test_what_an_ensemble_takes_is_as_when_predicted_anew(run: Workspace, datalist: Datalist, tmp_path: Path) -> None:
    other = Workspace(tmp_path / "anew")
    shutil.copytree(run.root, other.root, copy_function=shutil.copy2)
    score_all(run, datalist)
    score_all(without_kept(other), datalist)
    for path in (run.ensemble / "records").iterdir():
        kept, anew = (read(folder / path.name)["cost"] for folder in (path.parent, other.ensemble / "records"))
        for algo in ALGOS:
            for key in ("weights", "rows"):
                assert kept["models"][algo][key] == anew["models"][algo][key]
            assert kept["models"][algo]["window"] > 0
            assert kept["models"][algo]["seconds"] > 0
        assert kept["rest_s"] > 0
        assert kept["base"] > 10**7


def test_a_budget_chooses_by_what_jobs_measured(run: Workspace, datalist: Datalist, passes: list[str]) -> None:
    settings = {"modality": "MRI", "datalist": "d", "dataroot": ".", "device": "cpu", "algos": ALGOS}
    how = Settings.model_validate({**settings, "ensemble": {"max_time": "1d", "max_memory": "0.1GB"}})
    result = build_ensemble(run, datalist, how, [(algo, fold) for algo in ALGOS for fold in range(3)])
    assert passes == []
    assert result.spec.given_up.startswith("nothing keeps to the budget")
    assert all(row.seconds > 0 and row.gb > 0.1 for row in result.spec.pareto)


def test_votes_need_no_probabilities(run: Workspace, datalist: Datalist, passes: list[str]) -> None:
    for path in run.root.glob("*_*/held_out/*"):
        if path.suffix == ".probs":
            path.unlink()
        else:
            write_json(path, {**read(path), "probs": None})
    score_all(run, datalist, "vote")
    assert passes == []


def damage(run: Workspace, datalist: Datalist, what: str) -> None:
    """Damage what one job kept of one case."""
    job, case = run.job_dir("segresnet", 1), datalist.val_cases(1)[0].name
    facts, probs, labels = job.held_out / f"{case}.json", probs_file(job, case), label_file(job, case)
    if what == "probabilities deleted":
        probs.unlink()
    elif what == "probabilities cut":
        probs.write_bytes(probs.read_bytes()[:100])
    elif what == "probabilities of another grid":
        found = read(facts)
        x, y, z = found["probs"]["shape"]
        write_json(facts, {**found, "probs": {**found["probs"], "shape": [x, y + 1, z]}})
    elif what == "facts deleted":
        facts.unlink()
    elif what == "facts damaged":
        facts.write_text(facts.read_text()[:50])
    elif what == "facts of another version":
        write_json(facts, {**read(facts), "news": 1})
    elif what == "labels changed":
        shutil.copy(label_file(job, datalist.val_cases(1)[1].name), labels)
    elif what == "labels deleted":
        labels.unlink()


@pytest.mark.parametrize(
    "what",
    [
        "probabilities deleted",
        "probabilities cut",
        "probabilities of another grid",
        "facts deleted",
        "facts damaged",
        "facts of another version",
        "labels changed",
        "labels deleted",
    ],
)
def test_what_is_missing_or_damaged_is_predicted_again(
    run: Workspace, datalist: Datalist, monkeypatch: pytest.MonkeyPatch, passes: list[str], what: str
) -> None:
    loaded = counted_loads(monkeypatch)
    lost = datalist.val_cases(1)[0]
    only = replace(datalist, training=tuple(c for c in datalist.training if c.fold == 1))
    damage(run, datalist, what)
    found, failures = score_out_of_fold(run, only, {1: ALGOS}, combine="auto", device="cpu")
    assert failures == []
    assert loaded == ["segresnet_1"], "one model, for one case"
    assert passes
    dice = {case.name: case.dice for case in found}[lost.name]
    label, pred = (read_label(p).array[0] for p in (lost.label, run.out_of_fold / "segresnet" / f"{lost.name}.nii.gz"))
    expected = dice_per_class(pred, label, read_plan(run.job_dir("segresnet", 1)).label_map)
    assert dice["segresnet"] == pytest.approx(expected, abs=1e-6)


def counted_loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of jobs whose models are loaded from now on."""
    from autoseg.inference import predictor

    loaded: list[str] = []
    load = predictor.load_model

    def counted(job: JobDir, *args: Any) -> Any:
        loaded.append(job.root.name)
        return load(job, *args)

    monkeypatch.setattr(predictor, "load_model", counted)
    return loaded


def test_another_model_is_asked_anew(run: Workspace, datalist: Datalist, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = counted_loads(monkeypatch)
    make_job(run.root, "swinunetr", 2, seed=99, resample_resolution=(1.2, 1.2, 1.6))
    score_all(run, datalist)
    assert loaded == ["swinunetr_2"]
    loaded.clear()
    score_job(run, "swinunetr", 2, datalist)  # as training does, which removes what was kept of the old one
    shutil.rmtree(run.ensemble)
    loaded.clear()
    score_all(run, datalist)
    assert loaded == []


def test_other_windows_are_another_prediction(
    run: Workspace, datalist: Datalist, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = counted_loads(monkeypatch)
    plan = run.job_dir("dints", 0).plan
    plan.write_text(plan.read_text().replace("overlap: 0.25", "overlap: 0.5"))
    score_all(run, datalist)
    assert loaded == ["dints_0"]


def test_what_a_job_kept_goes_with_its_model(run: Workspace, datalist: Datalist) -> None:
    junk = run.job_dir("dints", 0).held_out / "gone.probs"
    junk.write_bytes(b"of a case that is in another fold now")
    score_job(run, "dints", 0, datalist)
    names = sorted(p.name for p in junk.parent.iterdir())
    assert names == sorted(f"{c.name}.{s}" for c in datalist.val_cases(0) for s in ("json", "probs"))


def test_no_room_for_probabilities(
    run: Workspace,
    datalist: Datalist,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    passes: list[str],
) -> None:
    before = held_out.probs_room(run.job_dir("dints", 0))
    taken = sum(p.stat().st_size for p in run.root.glob("*_*/held_out/*.probs"))
    free = shutil.disk_usage(run.root).free
    assert before == pytest.approx(held_out.DISK_SHARE * (free + taken) - taken, abs=0.01 * free)
    monkeypatch.setattr(held_out, "DISK_SHARE", 0.0)
    with caplog.at_level(logging.WARNING):
        dice = score_job(run, "dints", 0, datalist)
    assert dice == pytest.approx(read(run.job_dir("dints", 0).validation)["summary"]["mean"], abs=1e-6)
    assert caplog.messages == [
        "dints_0: the probabilities of 2 of 2 held-out cases are not kept (larger than the 0.0 MB that are left for "
        "them); the ensemble predicts these cases again. Such files may take up to 25% of the free disk."
    ]
    assert not [*run.job_dir("dints", 0).held_out.glob("*.probs")]
    passes.clear()
    loaded = counted_loads(monkeypatch)
    score_all(run, datalist)
    assert loaded == ["dints_0"]
    assert passes


@pytest.mark.parametrize(
    ("algos", "ensemble", "expected"),
    [
        (["segresnet", "dints"], None, "probabilities"),
        (["segresnet", "dints"], {"combine": "mean"}, "probabilities"),
        (["segresnet", "dints"], {"combine": "vote"}, "facts"),
        (["segresnet"], None, "facts"),
        (["segresnet", "locator"], None, "facts"),
        (["segresnet", "dints"], False, "labels"),
    ],
)
def test_what_is_kept_depends_on_the_ensemble(tmp_path: Path, algos: list[str], ensemble: Any, expected: str) -> None:
    workspace = Workspace(tmp_path)
    for algo in algos:
        workspace.write_job(Job(algo=algo, fold=0))
    job = workspace.job_dir("segresnet", 0)
    assert kept_for_ensemble(job) == "labels", "no run of its own"
    remember(workspace, ensemble=ensemble)
    assert kept_for_ensemble(job) == expected
    if "locator" in algos:
        assert kept_for_ensemble(workspace.job_dir("locator", 0)) == "labels"
    write_json(tmp_path / "trial.json", {})
    assert kept_for_ensemble(job) == "labels", "nobody makes an ensemble of trials"


def test_one_algorithm_alone_keeps_no_probabilities(
    run: Workspace, datalist: Datalist, passes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "kept_for_ensemble", lambda paths: "facts")
    for fold in range(3):
        score_job(run, "segresnet", fold, datalist)
    assert not [*run.root.glob("segresnet_*/held_out/*.probs")]
    passes.clear()
    found, _ = score_out_of_fold(run, datalist, dict.fromkeys(range(3), ["segresnet"]), combine="auto", device="cpu")
    assert len(found) == 6
    assert passes == []


# -- folds as tasks


@pytest.fixture
def finished(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run without its ensemble."""
    shutil.copytree(finished_run, tmp_path / "run", copy_function=shutil.copy2)
    shutil.rmtree(tmp_path / "run" / "work_dir" / "ensemble")
    return tmp_path / "run"


def scores_of(folder: Path) -> Any:
    """Without predicted quality: it is learned from as many changed copies as there was time for, too."""
    scores = read(folder / "work_dir" / "ensemble" / "scores.json")
    del scores["quality"]
    return scores


def test_tasks_on_two_places_give_the_scores_of_one_process(
    finished: Path, finished_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_command(["ensemble", "--input", str(finished / "input.yaml"), "--jobs_per_device", "2"]) == 0
    heard = capsys.readouterr().err
    assert "fold_0: starting on cpu:" in heard
    assert "fold_1: starting on cpu:" in heard
    printed = (finished / "work_dir" / "state" / "launch" / "fold_0.out").read_text()
    assert "fold_0: 4 of 4 cases scored" in printed
    assert scores_of(finished) == scores_of(finished_run)
    one, two = (files_of(f / "work_dir" / "ensemble") for f in (finished, finished_run))
    assert one == two

    def never(*args: object, **more: object) -> None:
        raise AssertionError("started though nothing is left to do")

    monkeypatch.setattr(fold_tasks, "launch", never)
    work = Workspace(finished / "work_dir")
    settings = {"modality": "MRI", "datalist": "d", "dataroot": ".", "device": "cpu", "jobs_per_device": 2}
    jobs = [(job.algo, job.fold) for job in work.jobs()]
    fold_tasks.score_folds(work, read_cases(work, finished), Settings.model_validate(settings), jobs)
    next((work.ensemble / "records").iterdir()).unlink()
    with pytest.raises(AssertionError, match="started though"):
        fold_tasks.score_folds(work, read_cases(work, finished), Settings.model_validate(settings), jobs)


KILLED = """
import os, signal, sys
from pathlib import Path
from autoseg.ensemble.out_of_fold import Fold
from autoseg.pipeline.fold_tasks import Part, work_on_fold
score, done = Fold.score, []
def killed(self, case):
    if done:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(case)
    return score(self, case)
Fold.score = killed
work_on_fold(Path(sys.argv[1]), Part(fold=0), device="cpu", wait=False)
"""


def test_a_killed_worker_goes_on_where_it_was(finished: Path, finished_run: Path) -> None:
    work = finished / "work_dir"
    process = subprocess.run([sys.executable, "-c", KILLED, str(work)], capture_output=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    (record,) = (work / "ensemble" / "records").iterdir()
    before = record.stat().st_mtime_ns
    assert run_command(["ensemble", "--work_dir", str(work), "--fold", "0"]) == 0
    assert len([*(work / "ensemble" / "records").iterdir()]) == 4
    assert record.stat().st_mtime_ns == before
    dice = {p.stem: read(p)["dice"] for p in (work / "ensemble" / "records").iterdir()}
    assert dice == {c["name"]: c["dice"] for c in scores_of(finished_run)["cases"] if c["name"] in dice}


def test_a_fold_that_another_worker_has_is_left_to_it(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = finished / "work_dir"
    with Claim(work / "ensemble" / ".claims" / "fold_1", "fold_1"):
        assert run_command(["ensemble", "--work_dir", str(work), "--fold", "1"]) == 2
    assert f"fold_1: process {os.getpid()} on " in capsys.readouterr().err
    assert not (work / "ensemble" / "records").exists()


def test_parts_of_a_fold_are_all_of_it(finished: Path) -> None:
    work = finished / "work_dir"
    for part, num in (("1/3", 2), ("3/3", 3), ("2/3", 4)):
        assert run_command(["ensemble", "--work_dir", str(work), "--fold", "0", "--part", part]) == 0
        assert len([*(work / "ensemble" / "records").iterdir()]) == num
    parts = fold_tasks.parts_of({0: 4, 2: 1}, 5)
    assert [p.name for p in parts] == ["fold_0_part_1_of_3", "fold_0_part_2_of_3", "fold_0_part_3_of_3", "fold_2"]
    assert [p.name for p in fold_tasks.parts_of({0: 4, 1: 4, 2: 4}, 2)] == ["fold_0", "fold_1", "fold_2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--work_dir", "WORK", "--fold", "7"], "error: WORK: no model of fold 7 is trained; folds with one: 0, 1. "),
        (
            ["--work_dir", "WORK", "--fold", "0", "--part", "4/3"],
            "error: --part: expected a number and how many ",
        ),
        (["--work_dir", "WORK", "--fold", "-1"], "error: --fold: expected a whole number >= 0, found -1."),
        (["--input", "INPUT", "--fold", "0"], "error: --fold: works on a planned run alone, with no other settings. "),
        (["--input", "INPUT", "--part", "1/2"], "error: --part: no effect without --fold. Leave it out."),
        (["--input", "INPUT", "--wait"], "error: --wait: no effect without --fold. Leave it out."),
    ],
)
def test_a_worker_s_words(
    finished_run: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    places = {"WORK": str(finished_run / "work_dir"), "INPUT": str(finished_run / "input.yaml")}
    assert run_command(["ensemble", *(places.get(word, word) for word in words)]) == 2
    assert message.replace("WORK", places["WORK"]) in capsys.readouterr().err


def test_workers_that_fail_are_tried_again_and_given_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    attempts = fold_tasks.Attempts(Workspace(tmp_path), retries=1)
    task = Task(name="fold_0", words=())
    assert not attempts.ended(Task(name="fold_1", words=()), 0)
    attempts.raise_failure()
    assert attempts.ended(task, -9)
    assert caplog.messages == ["ensemble: fold_0: its process ended with code -9. Trying again, 1 of 1"]
    assert not attempts.ended(task, -9)
    with pytest.raises(ResourceError, match=r"^fold_0: its process ended with code -9\. .*launch holds all that"):
        attempts.raise_failure()
    attempts = fold_tasks.Attempts(Workspace(tmp_path), retries=3)
    attempts.output.mkdir(parents=True)
    (attempts.output / "fold_0.out").write_text("error: model.pt: missing.\n")
    assert not attempts.ended(task, 2), "it would say the same again"
    with pytest.raises(WorkspaceError, match=r"fold_0: its process ended with code 2: error: model\.pt: missing\. "):
        attempts.raise_failure()
