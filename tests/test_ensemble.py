"""Out-of-fold scores, the choice of an ensemble, and what a second run does."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from other_formats import write_image, write_series
from tiny_jobs import make_job
from torch import nn

from autoseg.config.settings import EnsembleSettings, Settings
from autoseg.data.datalists.cases import Case, Datalist
from autoseg.data.datalists.datalist import read_datalist
from autoseg.data.formats.label_files import open_segmentation
from autoseg.data.formats.segmentation import on_grid
from autoseg.data.formats.table import read_grid
from autoseg.data.grid import Grid
from autoseg.data.labels import LabelMap
from autoseg.data.volumes import read_image, read_label, write_volume
from autoseg.ensemble import held_back as held_back_module
from autoseg.ensemble import out_of_fold as out_of_fold_module
from autoseg.ensemble.build import EnsembleResult, build_ensemble
from autoseg.ensemble.combine import (
    CaseCost,
    CaseScore,
    ModelCost,
    candidates,
    choose,
    combinations_of,
    costs_of,
    pareto_rows,
)
from autoseg.ensemble.predict import predict_files
from autoseg.errors import ConfigError, WorkspaceError
from autoseg.evaluation.metrics import dice_per_class, mean_score
from autoseg.evaluation.tables import format_table
from autoseg.inference import predictor as predictor_module
from autoseg.inference.chosen import read_ensemble
from autoseg.inference.predictor import Predictor
from autoseg.workspace.jobs import Job
from autoseg.workspace.workspace import Workspace

ALGOS = ("dints", "segresnet", "swinunetr")
LABELS = LabelMap(names=("sphere", "box"), values=((1,), (2,)))
JOBS = [(algo, fold) for algo in ALGOS for fold in range(3)]


@pytest.fixture
def datalist(phantom_dataset: Path) -> Datalist:
    return read_datalist(phantom_dataset / "datalist.json", phantom_dataset)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    for i, algo in enumerate(ALGOS):
        for fold in range(3):
            spacing = (1.2, 1.2, 1.6) if algo != "dints" else (1.5, 1.5, 1.5)
            make_job(tmp_path / "work", algo, fold, seed=10 * i + fold, resample_resolution=spacing)
    return Workspace(tmp_path / "work")


def settings_of(**changes: object) -> Settings:
    algos = ["segresnet", "swinunetr", "dints"]
    values = {"modality": "MRI", "datalist": "d.json", "dataroot": ".", "device": "cpu", "algos": algos, **changes}
    return Settings.model_validate(values)


def build(workspace: Workspace, datalist: Datalist, jobs=JOBS, **changes: object) -> EnsembleResult:
    return build_ensemble(workspace, datalist, settings_of(**changes), jobs)


def rescored(workspace: Workspace, folder: str, datalist: Datalist) -> float:
    """Mean Dice of the label files in a folder, read anew."""
    scores = []
    for case in datalist.training:
        path = workspace.out_of_fold / folder / f"{case.name}.nii.gz"
        assert case.label is not None
        label, pred = read_label(case.label), read_label(path)
        assert pred.grid.differs_from(label.grid) is None
        scores.append(dice_per_class(pred.array[0], label.array[0], LABELS))
    return mean_score(scores)


def test_the_whole_stage(workspace: Workspace, datalist: Datalist, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, str]] = []
    result = build_ensemble(
        workspace, datalist, settings_of(), JOBS, progress=lambda done, total, name: seen.append((done, total, name))
    )
    assert [s[0] for s in seen] == [1, 2, 3, 4, 5, 6, 1, 2]
    assert result.failures == ()
    assert result.gaps == ()
    by_name = {c.name: c for c in result.candidates}
    assert set(by_name) == {
        *ALGOS, "dints+segresnet", "dints+swinunetr", "segresnet+swinunetr", "dints+segresnet+swinunetr",
        "dints+segresnet+swinunetr_vote", "best_by_fold", "best_2",
    }  # fmt: skip
    assert all(len(c.scores) == 6 for c in result.candidates)

    # Never worse than its best member, and as good as the files it left behind.
    assert result.spec.dice is not None
    assert result.spec.dice >= max(by_name[a].mean for a in ALGOS) - 1e-6
    assert rescored(workspace, "ensemble", datalist) == pytest.approx(result.spec.dice, abs=1e-6)
    for name in (*ALGOS, "dints+segresnet", "dints+segresnet+swinunetr_vote"):
        assert rescored(workspace, name, datalist) == pytest.approx(by_name[name].mean, abs=1e-6)

    # A case is predicted by its own fold's models alone.
    case = datalist.val_cases(1)[0]
    jobs = [workspace.job_dir(a, 1) for a in ("dints", "segresnet")]
    wanted = Predictor(jobs, device="cpu").predict_labels(read_image(case.images))
    kept = read_label(workspace.out_of_fold / "dints+segresnet" / f"{case.name}.nii.gz").array[0]
    assert (kept != wanted).mean() < 1e-3

    # Testing cases come back on their own grids, with the models of all folds.
    assert read_ensemble(workspace) == result.spec
    assert len({f for _, f in result.spec.members}) == 3
    for case in datalist.testing:
        image, pred = nib.load(case.images[0]), nib.load(workspace.predictions / f"{case.name}.nii.gz")
        assert pred.shape == image.shape
        np.testing.assert_allclose(pred.affine, image.affine, atol=1e-5)

    scores = json.loads(workspace.scores.read_text())
    assert scores["chosen"] == result.spec.name
    assert len(scores["cases"]) == 6
    assert len(scores["testing"]) == 2
    text = (workspace.ensemble / "scores.txt").read_text()
    assert f"* {result.spec.name}" in text
    assert "fold 0  fold 1  fold 2    mean     std  n" in text
    assert "testing cases" in text
    assert str(workspace.root) not in workspace.scores.read_text() + workspace.ensemble_spec.read_text()

    # A second run predicts nothing and says the same.
    def never(*args: object, **more: object) -> None:
        raise AssertionError("a model was loaded")

    times = {p: p.stat().st_mtime_ns for p in workspace.ensemble.rglob("*.nii.gz")}
    monkeypatch.setattr(out_of_fold_module, "Predictor", never)
    monkeypatch.setattr(held_back_module, "Predictor", never)
    again = build(workspace, datalist)
    assert again.spec == result.spec
    assert again.tables == result.tables
    assert times == {p: p.stat().st_mtime_ns for p in workspace.ensemble.rglob("*.nii.gz")}


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the jobs whose models are loaded from now on."""
    loaded: list[str] = []

    class Counting(Predictor):
        def __init__(self, jobs, **more) -> None:
            loaded.extend(job.root.name for job in jobs)
            super().__init__(jobs, **more)

    monkeypatch.setattr(out_of_fold_module, "Predictor", Counting)
    monkeypatch.setattr(held_back_module, "Predictor", Counting)
    return loaded


def test_only_what_changed_is_done_again(
    workspace: Workspace, datalist: Datalist, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [("segresnet", f) for f in range(3)]
    first = build(workspace, datalist, jobs)
    loaded = counted(monkeypatch)
    make_job(workspace.root, "segresnet", 1, seed=99)
    second = build(workspace, datalist, jobs)
    # Fold 1 is scored again; the ensemble of all folds predicts the testing cases again.
    assert loaded == ["segresnet_1", "segresnet_0", "segresnet_1", "segresnet_2"]
    old, new = first.candidates[0].scores, second.candidates[0].scores
    for case in datalist.training:
        assert (old[case.name] == new[case.name]) == (case.fold != 1)
    loaded.clear()
    lost = datalist.val_cases(2)[0]
    (workspace.out_of_fold / "segresnet" / f"{lost.name}.nii.gz").unlink()
    build(workspace, datalist, jobs)
    assert loaded == ["segresnet_2"]


def test_gaps_are_said_and_filled_by_the_others(workspace: Workspace, datalist: Datalist) -> None:
    jobs = [("segresnet", 0), ("segresnet", 1), ("segresnet", 2), ("dints", 0)]
    result = build(workspace, datalist, jobs, algos=["segresnet", "dints"])
    assert result.gaps == (
        "not trained, so left out: dints_1, dints_2. `autoseg status` says why; `autoseg train` tries again.",
    )
    by_name = {c.name: c for c in result.candidates}
    assert len(by_name["dints"].scores) == 2
    assert len(by_name["dints+segresnet"].scores) == 6
    assert by_name["dints+segresnet"].members == (("dints", 0), ("segresnet", 0), ("segresnet", 1), ("segresnet", 2))
    # dints alone covers two cases, so it is not comparable and not chosen.
    assert result.spec.name in ("segresnet", "dints+segresnet")
    workspace.write_job(Job(algo="dints", fold=1, state="pruned", error="dropped after fold 0"))
    assert build(workspace, datalist, jobs, algos=["segresnet", "dints"]).gaps == (
        "not trained, since the budget went to better algorithms: dints_1.",
        "not trained, so left out: dints_2. `autoseg status` says why; `autoseg train` tries again.",
    )


def test_a_faulty_case_is_reported_and_left_out(workspace: Workspace, datalist: Datalist, tmp_path: Path) -> None:
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(b"nothing")
    training = (Case(name="bad", images=(bad,), label=datalist.training[0].label, fold=0), *datalist.training)
    gone = (Case(name="gone", images=(tmp_path / "gone.nii.gz",)), *datalist.testing[:1])
    result = build(workspace, Datalist(training=training, testing=gone), [("segresnet", f) for f in range(3)])
    assert len(result.failures) == 2
    assert result.failures[0].startswith(f"bad: {bad}: 7 bytes are too few for a NIfTI header")
    assert (
        result.failures[1]
        == f"gone: {tmp_path / 'gone.nii.gz'}: no such file. Check the path in the datalist and dataroot."
    )
    assert len(result.candidates[0].scores) == 6
    assert (workspace.predictions / f"{datalist.testing[0].name}.nii.gz").exists()


def test_no_trained_job(workspace: Workspace, datalist: Datalist) -> None:
    with pytest.raises(WorkspaceError, match=r"no trained job to make an ensemble of\. Run `autoseg train`"):
        build(workspace, datalist, [])


# -- choosing


def scored(fold: int, name: str, **dice: list[float]) -> CaseScore:
    return CaseScore(name=name, fold=fold, dice={k.replace("_and_", "+"): v for k, v in dice.items()})


CASES = [
    scored(0, "x", a=[0.9], b=[0.5], a_and_b=[0.8]),
    scored(1, "y", a=[0.4], b=[0.7], a_and_b=[0.8]),
]
BOTH = {0: ("a", "b"), 1: ("a", "b")}


def test_auto_takes_the_highest_and_in_a_tie_the_smaller() -> None:
    made = candidates(CASES, BOTH, EnsembleSettings())
    assert choose(made, EnsembleSettings()).candidate.name == "a+b"
    level = [scored(0, "x", a=[0.8], b=[0.1], a_and_b=[0.8])]
    assert choose(candidates(level, {0: ("a", "b")}, EnsembleSettings()), EnsembleSettings()).candidate.name == "a"


def test_best_by_fold_is_scored_but_chosen_only_where_asked_for() -> None:
    cases = [scored(0, "x", a=[0.9], b=[0.5], a_and_b=[0.6]), scored(1, "y", a=[0.4], b=[0.7], a_and_b=[0.6])]
    made = candidates(cases, BOTH, EnsembleSettings())
    best = next(c for c in made if c.name == "best_by_fold")
    assert best.mean == pytest.approx(0.8)
    assert best.members == (("a", 0), ("b", 1))
    assert choose(made, EnsembleSettings()).candidate.name == "a"
    assert choose(made, EnsembleSettings(method="best_by_fold")).candidate is best


def test_best_n() -> None:
    how = EnsembleSettings(method="best_n", num_best=2)
    assert choose(candidates(CASES, BOTH, how), how).members == (("a", 0), ("b", 0), ("a", 1), ("b", 1))


@pytest.mark.parametrize(("combine", "votes", "means"), [("auto", 1, 4), ("mean", 0, 4), ("vote", 4, 0)])
def test_what_is_scored(combine, votes: int, means: int) -> None:
    found = combinations_of(("a", "b", "c"), combine)
    assert [c.name for c in found[:3]] == ["a", "b", "c"]
    assert sum(c.combine == "vote" for c in found) == votes
    assert sum(c.combine == "mean" for c in found[3:]) == means


def test_table() -> None:
    rows = [(0, [0.9, math.nan]), (0, [0.7, 0.5]), (1, [0.5, math.nan]), (1, [math.nan, math.nan])]
    assert format_table("Dice of a", ["liver", "tumor"], rows).splitlines() == [
        "Dice of a",
        "class  fold 0  fold 1    mean     std  n",
        "----------------------------------------",
        "liver  0.8000  0.5000  0.7000  0.1500  3",
        "tumor  0.5000       -  0.5000  0.0000  1",
        "mean   0.6500  0.5000  0.6000  0.0750  3",
    ]


# -- with what it costs


def model_cost(seconds: float, gb: float) -> ModelCost:
    return ModelCost(seconds=seconds, weights=int(gb * 1e9), window=0, rows=0)


def costly(*cases: CaseScore) -> list[CaseScore]:
    """Scores with the cost of a: 1 s, 1 GB, and of b: 4 s, 2 GB; 0.5 s and 1 GB beside them."""
    models = {"a": model_cost(1.0, 1.0), "b": model_cost(4.0, 2.0)}
    return [replace(case, cost=CaseCost(rest_s=0.5, base=10**9, models=models)) for case in cases]


GOOD_B = costly(scored(0, "x", a=[0.7], b=[0.8], a_and_b=[0.9]), scored(1, "y", a=[0.7], b=[0.8], a_and_b=[0.9]))


def test_the_cost_of_every_candidate() -> None:
    rows = {row.name: row for row in pareto_rows(candidates(GOOD_B, BOTH, EnsembleSettings()), costs_of(GOOD_B))}
    assert [*rows][0] == "a+b"
    assert (rows["a"].seconds, rows["a"].gb, rows["a"].models) == (2.5, 3.0, 2)
    assert (rows["b"].seconds, rows["b"].gb) == (8.5, 5.0)
    assert (rows["a+b"].seconds, rows["a+b"].gb, rows["a+b"].models) == (11.0, 7.0, 4)
    assert {name for name, row in rows.items() if row.on_front} == {"a", "b", "a+b", "best_by_fold"}
    worse = costly(scored(0, "x", a=[0.7], b=[0.6], a_and_b=[0.65]))
    rows = {r.name: r for r in pareto_rows(candidates(worse, {0: ("a", "b")}, EnsembleSettings()), costs_of(worse))}
    assert {name for name, row in rows.items() if row.on_front} == {"a", "best_by_fold"}
    assert pareto_rows(candidates(CASES, BOTH, EnsembleSettings()), costs_of(CASES)) == ()


@pytest.mark.parametrize(
    ("limits", "name", "members", "given_up"),
    [
        ({}, "a+b", 4, ""),
        ({"max_s": 11.0}, "a+b", 4, ""),
        ({"max_s": 7.0}, "a+b", 2, "2 of the 4 models of a+b"),
        (
            {"max_s": 4.9},
            "b",
            1,
            "a+b with a Dice of 0.9000, which does not keep to the budget; 1 of the 2 models of b",
        ),
        ({"max_gb": 3.0}, "b", 1, "a+b with a Dice of 0.9000"),
        ({"max_s": 3.0, "max_gb": 4.0}, "a", 2, "a+b with a Dice of 0.9000, which does not keep to the budget"),
        ({"max_s": 0.1}, "a", 1, "nothing keeps to the budget; the cheapest, one fold of a, takes 1.5 s and 2.00 GB"),
    ],
)
def test_the_best_within_a_budget(limits, name: str, members: int, given_up: str) -> None:
    made = candidates(GOOD_B, BOTH, EnsembleSettings())
    found = choose(made, EnsembleSettings(), costs_of(GOOD_B), **limits)
    assert (found.candidate.name, len(found.members)) == (name, members)
    assert found.given_up.startswith(given_up)
    assert bool(found.given_up) == bool(given_up)


def test_a_budget_of_the_stage(workspace: Workspace, datalist: Datalist) -> None:
    result = build(workspace, datalist, JOBS[:6], ensemble={"max_time": "1d", "max_memory": "0.1GB"})
    assert result.spec.given_up.startswith("nothing keeps to the budget")
    assert len(result.spec.members) < 6
    assert {row.name for row in result.spec.pareto} == {c.name for c in result.candidates}
    assert all(row.seconds > 0 and row.gb > 0.1 for row in result.spec.pareto)
    assert f"Given up for the budget: {result.spec.given_up}." in result.tables[0]
    assert "s/image" in result.tables[0]


# -- formats of predictions


def test_predictions_of_testing_cases_come_in_the_format_that_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    voxels = np.random.default_rng(0).normal(size=(20, 18, 16)).astype(np.float32)
    affine = np.diag([-1.0, -1.0, 1.9, 1.0])
    series = write_series(tmp_path / "scan", np.rint(voxels * 100).astype(np.int16), affine)
    plain = write_image(tmp_path / "plain.nrrd", voxels, affine)
    regions = [{"name": "whole", "values": [1]}, {"name": "core", "values": [2]}]
    for fold in range(2):
        make_job(tmp_path / "work", "segresnet", fold, classes=regions, sigmoid=True, seed=fold)
    write_image(tmp_path / "label.nrrd", (voxels > 1).astype(np.uint8), affine)
    training = tuple(
        Case(name=str(i), images=(plain,), label=tmp_path / "label.nrrd", fold=i, segment_values=()) for i in range(2)
    )
    datalist = Datalist(
        training=training, testing=(Case(name="scan", images=(series,)), Case(name="plain", images=(plain,)))
    )
    workspace = Workspace(tmp_path / "work")
    jobs = [("segresnet", 0), ("segresnet", 1)]

    def files() -> list[str]:
        return sorted(p.name for p in workspace.converted.iterdir()) if workspace.converted.exists() else []

    build(workspace, datalist, jobs)
    assert files() == []  # DICOM names the patient: only where it is asked for
    before = (workspace.predictions / "scan.nii.gz").read_bytes()
    build(workspace, datalist, jobs, inference={"format": "auto"})
    assert files() == ["plain.nrrd", "scan.seg.dcm"]
    assert (workspace.predictions / "scan.nii.gz").read_bytes() == before
    masks = on_grid(open_segmentation(workspace.converted / "scan.seg.dcm"), read_grid(series)[0])
    both = {names for names in masks.counts if len(names) == 2}
    assert both, "overlaps are kept"
    array = np.asarray(nib.load(workspace.predictions / "scan.nii.gz").dataobj)
    np.testing.assert_array_equal(array > 0, masks.index > 0)
    stamp = (workspace.converted / "scan.seg.dcm").stat().st_mtime_ns
    build(workspace, datalist, jobs, inference={"format": "auto"})
    assert (workspace.converted / "scan.seg.dcm").stat().st_mtime_ns == stamp  # what was done is left
    build(workspace, datalist, jobs, inference={"format": "rtstruct"})
    assert files() == ["scan.rtstruct.dcm"]
    assert "plain.nrrd: no DICOM series, and RTSTRUCT refers to" in caplog.text
    assert "The label is there as NIfTI alone." in caplog.text
    build(workspace, datalist, jobs, inference={"format": "nifti"})
    assert read_grid(workspace.predictions / "plain.nii.gz")[0].shape == voxels.shape


# -- postprocessing


class Bright(nn.Module):
    """Says sphere where the image is brighter than a threshold; specks of noise come with it."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        spheres = 50 * (image - 0.5)
        return torch.cat([torch.zeros_like(image), spheres, torch.full_like(image, -99.0)], 1)


def specked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Workspace, Datalist]:
    """Cases whose image is the sphere and a speck that is none, and models that see both."""
    cases = []
    for i in range(4):
        label = np.zeros((24, 24, 24), np.uint8)
        label[4:14, 4:14, 4:14] = 1
        label[20:22, 20:22, 20] = 2  # the models never see the box
        image = (label == 1).astype(np.float32)
        image[18:21, 2 + i, 18:20] = 1
        grid = Grid(shape=(24, 24, 24), affine=np.diag([1.0, -1.0, 1.0, 1.0]))
        paths = [folder / kind / f"{i}.nii.gz" for kind in ("images", "labels")]
        for path, array in zip(paths, (image, label), strict=True):
            write_volume(path, array, grid)
        cases.append(Case(name=str(i), images=(paths[0],), label=paths[1], fold=i % 2))
    plan = {"channels": [{"mode": "none"}], "resample_resolution": (1.0, 1.0, 1.0)}
    for fold in range(2):
        make_job(folder / "work", "segresnet", fold, **plan)
    monkeypatch.setattr(predictor_module, "build_network", lambda plan: Loadable())
    monkeypatch.setattr(predictor_module, "heads", lambda algo, network: ())
    return Workspace(folder / "work"), Datalist(training=tuple(cases), testing=(replace(cases[0], name="held"),))


class Loadable(Bright):
    """The same, that takes any weights."""

    def load_state_dict(self, *args: object, **more: object) -> None:  # type: ignore[override]
        """Take none."""


def test_what_raises_the_score_is_done_to_every_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, datalist = specked(tmp_path, monkeypatch)
    jobs = [("segresnet", 0), ("segresnet", 1)]
    result = build(workspace, datalist, jobs)
    (rule,) = result.spec.postprocessing
    assert (rule.name, rule.min_mm3, rule.largest, rule.fill_holes) == ("sphere", 10.0, False, False)
    assert rule.dice_before == pytest.approx(2 * 1000 / 2006, abs=1e-5)
    assert rule.dice_after == 1.0
    assert result.spec.dice == 0.5  # of the sphere 1, of the box 0
    assert result.spec.dice_raw == pytest.approx(1000 / 2006, abs=1e-5)
    assert result.candidates[0].mean == pytest.approx(1000 / 2006, abs=1e-5)
    assert rescored(workspace, "ensemble", datalist) == 0.5
    assert any("components of 10 mm3 and more" in table for table in result.tables)
    assert any(table.startswith("Dice of the ensemble (segresnet), postprocessing included") for table in result.tables)
    # The testing case is cleaned, too, and so is whatever `predict` is given.
    assert read_label(workspace.predictions / "held.nii.gz").array.sum() == 1000
    assert predict_files(workspace.root, datalist.testing[0].images[0], tmp_path / "out", device="cpu") == 0
    assert read_label(tmp_path / "out" / "0.nii.gz").array.sum() == 1000
    scores = json.loads(workspace.scores.read_text())
    assert scores["dice"]["mean"] == 0.5
    assert scores["ensemble"]["0"]["dice"] == [1.0, 0.0]

    off = build(workspace, datalist, jobs, ensemble={"postprocess": "off"})
    assert off.spec.postprocessing == ()
    assert off.spec.dice == off.spec.dice_raw == result.spec.dice_raw
    assert read_label(workspace.out_of_fold / "ensemble" / "0.nii.gz").array.sum() == 1006
    again = build(workspace, datalist, jobs)
    assert again.spec == result.spec
    assert read_label(workspace.out_of_fold / "ensemble" / "0.nii.gz").array.sum() == 1000


def test_rules_that_were_set_are_kept_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, datalist = specked(tmp_path, monkeypatch)
    jobs = [("segresnet", 0), ("segresnet", 1)]
    result = build(workspace, datalist, jobs, inference={"min_voxels": {"sphere": 5000}})
    (rule,) = result.spec.postprocessing
    assert (rule.min_voxels, rule.dice_before) == (5000, None)
    assert result.spec.dice == 0.0
    with pytest.raises(ConfigError, match=r"inference\.min_voxels: spher is no class\. Did you mean sphere\?"):
        build(workspace, datalist, jobs, inference={"min_voxels": {"spher": 5000}})
