"""Predicted Dice, flags and volumes' intervals: what they are told by, how they are learned, and where they stand."""

from __future__ import annotations

import csv
import json
import math
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_jobs import make_job
from torch import nn

import autoseg
from autoseg.data.datalists.cases import Case
from autoseg.data.grid import Grid, Volume
from autoseg.data.labels import LabelMap
from autoseg.data.volumes import read_image, write_volume
from autoseg.ensemble.corruptions import CORRUPTIONS, DRAWN, USUAL, corrupt
from autoseg.ensemble.predict import predict_files
from autoseg.ensemble.quality import FEWEST_CASES, fit_quality
from autoseg.ensemble.quality_study import Studied
from autoseg.errors import WorkspaceError
from autoseg.evaluation.shapes import ClassShape, shapes_of
from autoseg.export.pack import pack
from autoseg.export.targets import export
from autoseg.inference.appearance import FEATURES, Appearance
from autoseg.inference.chosen import read_quality
from autoseg.inference.cost import Cost
from autoseg.inference.ensemble_spec import EnsembleSpec, check_ensemble, seal_ensemble
from autoseg.inference.held_out import predict_held_out, read_held_out
from autoseg.inference.predictor import Predictor, job_digest
from autoseg.inference.quality import ClassVerdict, QualityModel, Verdict, cv_plus, judge
from autoseg.inference.quality_file import COLUMNS, quality_rows, quality_table
from autoseg.inference.traits import FLOOR, SeenChannel, Traits, TraitsWatch, expected_dice, mirror_dice
from autoseg.inference.windows import ProbRows, WindowModel
from autoseg.workspace.files import write_json, write_yaml
from autoseg.workspace.stored import write_stored
from autoseg.workspace.workspace import Workspace

CPU = torch.device("cpu")
LABELS = LabelMap(names=("sphere", "box"), values=((1,), (2,)))
FOLDS = (0, 1)


# -- what a prediction looks like


def test_expected_dice_is_the_mean_dice_of_truths_drawn_from_the_probabilities() -> None:
    random = np.random.default_rng(0)
    probs = random.beta(0.4, 0.4, size=4000) * (random.random(4000) < 0.3)
    probs[probs < FLOOR] = 0
    label = probs > 0.5
    counts = (float(label.sum()), float(probs.sum()), float(probs[label].sum()), 0.0, 0.0)
    dice = []
    for _ in range(400):
        truth = random.random(probs.shape) < probs
        dice.append(2 * (truth & label).sum() / (truth.sum() + label.sum()))
    assert expected_dice(counts) == pytest.approx(np.mean(dice), abs=2e-3)
    assert math.isnan(expected_dice((0, 0, 0, 0, 0)))


class Each(nn.Module):
    """A network that looks at one voxel alone: a window's place changes nothing."""

    def __init__(self, outputs: int, shift: float = 0.0) -> None:
        super().__init__()
        self.outputs, self.shift = outputs, shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Odd along X: a mirrored pass says something else.
        ramp = torch.linspace(-1, 1, x.shape[2])[None, None, :, None, None]
        return torch.cat([x * (k + 1) + self.shift * k * ramp for k in range(self.outputs)], 1)


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("axis", [0, 2])
@pytest.mark.parametrize("roi", [(40, 30, 20), (16, 12, 8)])
def test_windows_count_each_voxel_once(sigmoid: bool, axis: int, roi: tuple[int, int, int]) -> None:
    image = torch.randn((1, 23, 19, 11), generator=torch.Generator().manual_seed(1)) * 2
    watch = TraitsWatch(2, 3, independent=sigmoid, sees_image=True)
    networks = [Each(3), Each(3)]
    model = WindowModel(networks, num_outputs=3, sigmoid=sigmoid, device=CPU, precision="fp32")

    def fetch(start: int, stop: int) -> torch.Tensor:
        return image.narrow(axis + 1, start, stop - start)

    rows = ProbRows(model, fetch, (23, 19, 11), axis, roi_size=roi, overlap=0.5, watch=watch)
    probs = rows.rows(0, rows.shape[axis]).movedim(1, 0)  # (K, rows, H, W)
    first, second = watch.traits()
    assert first == second
    for k in range(3 if sigmoid else 2):
        p = probs[k if sigmoid else k + 1].double()
        label = p > 0.5 if sigmoid else probs.argmax(0) == k + 1
        wanted = [label.sum(), p[p >= FLOOR].sum(), p[label].sum(), 0, 0]
        np.testing.assert_allclose(first.classes[k], [float(w) for w in wanted], rtol=1e-4, atol=1e-3)
    assert first.channels is not None
    looked = first.channels[0]
    values = image.numpy()[0]
    assert looked.quantiles[10] == pytest.approx(np.median(values), abs=1e-6)
    span = looked.quantiles[-1] - looked.quantiles[0]
    in_plane = 1 if axis == 0 else 0
    assert looked.roughness[in_plane] == pytest.approx(np.abs(np.diff(values, axis=in_plane)).mean() / span, rel=1e-5)


def test_mirrored_passes_that_agree_have_no_distance_and_others_do() -> None:
    image = torch.randn((1, 16, 16, 16), generator=torch.Generator().manual_seed(1))
    dice = []
    for shift in (0.0, 2.0):
        watch = TraitsWatch(1, 3, independent=False, sees_image=True)
        model = WindowModel(
            [Each(3, shift)], num_outputs=3, sigmoid=False, device=CPU, precision="fp32", mirror_axes=(0,)
        )
        ProbRows(
            model, lambda a, b: image[:, a:b], (16, 16, 16), 0, roi_size=(16, 16, 16), overlap=0.0, watch=watch
        ).rows(0, 16)
        (traits,) = watch.traits()
        dice.append(mirror_dice(traits.classes[1]))
    assert dice[0] == pytest.approx(1.0)
    assert dice[1] < 0.95


def write_case(folder: Path, seed: int = 0, shape: tuple[int, int, int] = (24, 20, 18)) -> Case:
    random = np.random.default_rng(seed)
    grid = Grid(shape=shape, affine=np.diag([1.2, 1.2, 1.6, 1.0]))
    image, label = folder / f"case_{seed}.nii.gz", folder / f"label_{seed}.nii.gz"
    import nibabel as nib

    folder.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(random.normal(size=shape).astype(np.float32), grid.affine), image)
    write_volume(label, random.integers(0, 3, shape).astype(np.uint8), grid)
    return Case(name=f"case_{seed}", images=(image,), label=label)


@pytest.mark.parametrize("heads", [2, 8])
def test_out_of_fold_and_anew_the_same_image_has_the_same_traits(tmp_path: Path, heads: int) -> None:
    """With several models each has its own, whatever others see the image with it."""
    case = write_case(tmp_path / "data")
    classes = [{"name": f"organ {i}", "values": [i]} for i in range(1, heads + 1)]
    more: dict[str, Any] = {"classes": classes, "tta": True, "mirror_axes": (0,), "overlap": 0.5}
    jobs = [make_job(tmp_path / "work", "segresnet", fold, seed=fold, **more) for fold in FOLDS]
    cost = Cost(predictor=Predictor([jobs[0]], device="cpu"))
    model = job_digest(jobs[0])
    predict_held_out(cost, case, jobs[0], kept="facts", model=model, counted=None, most_bytes=0)
    facts = json.loads((jobs[0].held_out / "case_0.json").read_text())
    kept = read_held_out(jobs[0], "case_0", facts["made_from"])
    assert kept is not None
    for chosen in (jobs[:1], jobs):
        predictor = Predictor(chosen, device="cpu")
        predictor.watches_traits = True
        predictor.predict_labels(read_image(case.images))
        anew = predictor.traits()
        assert sorted(anew) == [f"segresnet_{fold}" for fold in range(len(chosen))]
        np.testing.assert_allclose(anew["segresnet_0"].classes, kept.traits.classes, rtol=1e-5, atol=1e-3)
        assert anew["segresnet_0"].channels == kept.traits.channels
    assert anew["segresnet_1"].classes != anew["segresnet_0"].classes


def test_shapes_of_a_label() -> None:
    label = np.zeros((20, 20, 20), np.uint8)
    label[2:6, 2:6, 2:6] = 1
    label[15, 15, 15] = 1
    label[10:14, 2:6, 2:6] = 2
    first, second = shapes_of(label, LABELS, (1.0, 2.0, 3.0))
    assert first.volume_ml == pytest.approx(65 * 6 / 1000)
    assert first.largest == pytest.approx(64 / 65)
    assert second.size_mm == (4.0, 8.0, 12.0)
    middle = (65 * np.array([3.5 * 64 + 15] * 3) / 65 + 64 * np.array([11.5, 3.5, 3.5])) / 129
    assert second.centre_mm == pytest.approx((np.array([11.5, 3.5, 3.5]) - middle) * (1, 2, 3), abs=1e-4)
    nothing = shapes_of(np.zeros_like(label), LABELS, (1.0, 1.0, 1.0))
    assert nothing == [ClassShape(volume_ml=0, largest=0, centre_mm=None, size_mm=None)] * 2


# -- volumes


def test_cv_plus_covers_what_it_says() -> None:
    random, inside = np.random.default_rng(0), []
    for _ in range(1500):
        bias = random.normal(0, 0.3, size=5)  # of each fold's models
        errors = {f: [abs(random.normal(0, 1) - bias[f]) for _ in range(12)] for f in range(5)}
        truth = random.normal(0, 1)
        interval = cv_plus({f: (bias[f], errors[f]) for f in range(5)}, 0.9)
        assert interval is not None
        inside.append(interval[0] <= truth <= interval[1])
    assert 0.88 <= np.mean(inside) <= 0.94
    assert cv_plus({0: (1.0, [0.1] * 8)}) is None  # of 8 cases no 90 % interval is known
    assert cv_plus({0: (1.0, [0.1] * 9)}) == pytest.approx((0.9, 1.1))


# -- the fit


def appearance(
    dice: float, random: np.random.Generator, fold: int, *, odd: float = 0.0, scale: float = 1.0
) -> Appearance:
    """A prediction whose probabilities expect somewhat more than its Dice."""
    sure = min(0.99, max(0.02, dice + 0.05 + random.normal(0, 0.01)))
    voxels = 1000.0
    alike = 1 - 0.5 * (1 - dice)
    counts = (voxels, voxels, sure * voxels, alike * voxels, voxels)
    quantiles = tuple(np.linspace(-2, 2, 21) * (1 + random.normal(0, 0.02)) + odd)
    channel = SeenChannel(quantiles=quantiles, roughness=(0.1 + 0.002 * random.normal(),) * 3)
    shapes = [
        ClassShape(
            volume_ml=scale * 10 * math.exp(random.normal(0, 0.1)),
            largest=1.0,
            centre_mm=(10.0 * i + random.normal(), random.normal(), random.normal()),
            size_mm=(20.0 + random.normal(), 20.0 + random.normal(), 20.0 + random.normal()),
        )
        for i in (-1, 1)
    ]
    traits = {f"segresnet_{fold}": Traits(classes=(counts, counts), channels=(channel,))}
    return Appearance(traits=traits, shapes=shapes, spacing_mm=(1.0, 1.0, 1.0), shape=(40, 40, 40))


def study(num: int = 60, *, seed: int = 0) -> tuple[list[Studied], list[Studied]]:
    """Cases out of fold, and copies that are worse than they look."""
    random = np.random.default_rng(seed)
    cases, copies = [], []
    for i in range(num):
        dice = float(random.uniform(0.75, 0.95))
        seen = appearance(dice, random, i % 2)
        truth = [
            s.model_copy(update={"volume_ml": s.volume_ml * math.exp(random.normal(0, 0.05))}) for s in seen.shapes
        ]
        cases.append(Studied(case=f"case_{i}", fold=i % 2, appearance=seen, truth=truth, dice=[dice, dice]))
    for i in range(24):
        away = float(random.uniform(1, 4))
        bad = max(0.02, 0.8 - 0.2 * away)
        seen = appearance(0.85, random, i % 2, odd=away)
        copies.append(
            Studied(
                case=f"case_{i % num}",
                fold=i % 2,
                appearance=seen,
                truth=cases[i % num].truth,
                dice=[bad, bad],
                kind="shading",
            )
        )
    return cases, copies


@pytest.fixture(scope="module")
def model() -> QualityModel:
    return fit_quality(*study(), LABELS, "key")


def test_the_fit_predicts_cases_that_it_did_not_see(model: QualityModel) -> None:
    check = model.check
    assert (check.num_cases, check.num_copies) == (60, 24)
    assert check.error is not None
    assert check.error < 0.02
    assert check.spearman is not None
    assert check.spearman > 0.9
    assert check.spearman_all is not None
    assert check.spearman_all > 0.8
    assert check.covered is not None
    assert 0.85 <= check.covered <= 0.97
    assert all(weight >= 0 for weight in model.weights)
    random = np.random.default_rng(9)
    for dice in (0.78, 0.86, 0.93):
        verdict = judge(model, appearance(dice, random, 1))
        assert verdict.dice == pytest.approx(dice, abs=0.04)
        assert verdict.reasons == ()
        for of_class in verdict.classes:
            assert of_class.low is not None
            assert of_class.dice is not None
            assert of_class.high is not None
            assert of_class.low < of_class.dice < of_class.high
            assert of_class.volume_low_ml is not None
            assert of_class.volume_high_ml is not None
            assert of_class.volume_low_ml < of_class.volume_ml < of_class.volume_high_ml


def test_what_looks_like_training_but_is_not_is_flagged_and_predicted_lower(model: QualityModel) -> None:
    random = np.random.default_rng(3)
    usual = judge(model, appearance(0.85, np.random.default_rng(3), 0))
    odd = judge(model, appearance(0.85, random, 0, odd=3.0))
    assert usual.dice is not None
    assert odd.dice is not None
    assert odd.dice < usual.dice - 0.3
    (reason,) = odd.reasons
    assert reason.startswith("intensities are distributed otherwise than in the training images (")
    assert all(c.volume_low_ml is None and c.volume_high_ml is None for c in odd.classes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spacing_mm": (1.0, 1.0, 3.0)}, "voxels of 1x1x3 mm, training images have 1x1x1"),
        ({"shape": (40, 40, 80)}, "an extent of 40x40x80 mm, training images have 40x40x40"),
    ],
)
def test_grids_that_training_has_not_seen_are_flagged(model: QualityModel, changes: dict[str, Any], words: str) -> None:
    seen = replace(appearance(0.85, np.random.default_rng(3), 0), **changes)
    assert any(reason.startswith(words) for reason in judge(model, seen).reasons)


def test_classes_that_are_not_found_are_flagged(model: QualityModel) -> None:
    seen = appearance(0.85, np.random.default_rng(3), 0)
    none = ClassShape(volume_ml=0, largest=0, centre_mm=None, size_mm=None)
    verdict = judge(model, replace(seen, shapes=[none, seen.shapes[1]]))
    assert any(reason.startswith("sphere is not found (") for reason in verdict.reasons)
    usual = judge(model, seen)
    assert verdict.classes[0].dice is not None
    assert usual.classes[0].dice is not None
    assert verdict.classes[0].dice < usual.classes[0].dice


def test_worse_features_never_raise_the_prediction(model: QualityModel) -> None:
    base = appearance(0.85, np.random.default_rng(3), 0)
    job, traits = next(iter(base.traits.items()))
    last = 1.0
    for sure in (0.95, 0.8, 0.5, 0.2):
        voxels, probability, _, *rest = traits.classes[0]
        counts = (voxels, probability, sure * voxels, *rest)
        worse = Traits(classes=(counts, traits.classes[1]), channels=traits.channels)  # type: ignore[arg-type]
        dice = judge(model, replace(base, traits={job: worse})).classes[0].dice
        assert dice is not None
        assert dice <= last
        last = dice
    assert last < 0.6


def test_a_class_that_may_be_absent_and_is_not_found_is_not_judged() -> None:
    cases, copies = study()
    none = ClassShape(volume_ml=0, largest=0, centre_mm=None, size_mm=None)
    cases = [replace(s, truth=[none if i % 3 else s.truth[0], s.truth[1]]) for i, s in enumerate(cases)]
    model = fit_quality(cases, copies, LABELS, "key")
    seen = appearance(0.85, np.random.default_rng(3), 0)
    verdict = judge(model, replace(seen, shapes=[none, seen.shapes[1]]))
    assert (verdict.classes[0].dice, verdict.classes[0].low) == (None, None)
    assert verdict.classes[1].dice is not None
    assert verdict.reasons == ()


def test_few_cases_give_predictions_without_intervals() -> None:
    cases, _ = study(FEWEST_CASES + 2)
    model = fit_quality([replace(s, dice=[s.dice[0], math.nan]) for s in cases[:FEWEST_CASES]], [], LABELS, "key")
    verdict = judge(model, cases[9].appearance)
    assert verdict.dice is not None
    assert [c.low for c in verdict.classes] == [None, None]
    assert [c.volume_low_ml for c in verdict.classes] == [None, None]


def test_one_trained_fold_is_enough() -> None:
    """What conformal intervals then are is split conformal."""
    cases, copies = study()
    model = fit_quality([s for s in cases if s.fold == 0], [s for s in copies if s.fold == 0], LABELS, "key")
    assert model.check.error is not None
    assert model.check.error < 0.02
    verdict = judge(model, appearance(0.85, np.random.default_rng(3), 0))
    assert verdict.classes[0].volume_low_ml is not None
    assert {fold for c in model.classes for fold in c.volumes} == {0}


def test_models_of_other_classes_are_refused(work_dir: Path) -> None:
    model = QualityModel.model_validate_json(Workspace(work_dir).quality.read_text())
    wrong = [c.model_copy(update={"network_index": 1 - c.network_index}) for c in model.classes]
    job = Workspace(work_dir).job_dir("segresnet", 0)
    with pytest.raises(WorkspaceError, match=r"quality\.json: not of the classes of segresnet_0\."):
        Predictor([job], device="cpu", quality=model.model_copy(update={"classes": tuple(wrong)}))


def test_corrupted_copies_differ_and_keep_their_labels() -> None:
    random = np.random.default_rng(0)
    array = random.normal(size=(1, 20, 18, 16)).astype(np.float32)
    image = Volume(array=array, grid=Grid(shape=(20, 18, 16), affine=np.eye(4)))
    label = random.integers(0, 3, (20, 18, 16)).astype(np.uint8)
    assert {*DRAWN} | {*USUAL} == {*CORRUPTIONS}
    for kind, strength in [*((name, None) for name in DRAWN), *USUAL.items()]:
        copy, kept = corrupt(kind, image, label, np.random.default_rng(1), strength)
        again, _ = corrupt(kind, image, label, np.random.default_rng(1), strength)
        np.testing.assert_array_equal(copy.array, again.array)
        assert copy.array.dtype == np.float32
        assert np.isfinite(copy.array).all()
        assert (copy.spacing_mm != image.spacing_mm) == (kind == "spacing")
        assert np.array_equal(copy.array, array) == (kind == "spacing")
        assert np.array_equal(kept, label) == (kind not in ("flip", "rotation"))


# -- files


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folds' models and what tells of their quality, as the ensemble stage leaves them; not to be changed."""
    root = tmp_path_factory.mktemp("run") / "work"
    for fold in FOLDS:
        make_job(root, "segresnet", fold, seed=fold, tta=True, mirror_axes=(0,))
    workspace = Workspace(root)
    members = tuple(("segresnet", fold) for fold in FOLDS)
    spec = EnsembleSpec(
        name="segresnet", method="auto", combine="mean", members=members, classes=LABELS.names, dice=0.5, version="0"
    )
    write_json(workspace.ensemble_spec, spec.model_dump(mode="json"))
    write_stored(workspace.quality, fit_quality(*study(), LABELS, spec.key))
    seal_ensemble(workspace, spec)
    stored = {"name": "phantom", "modality": "MRI", "datalist": "d.json", "dataroot": "/data"}
    write_yaml(workspace.settings, {key: {"value": v, "origin": "input.yaml:1"} for key, v in stored.items()})
    return root


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [*csv.DictReader(file)]


def test_predict_writes_quality_the_worst_first_and_a_packed_model_the_same(
    work_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = tmp_path / "images"
    for seed in range(3):
        write_case(images, seed).label.unlink()  # type: ignore[union-attr]
    assert predict_files(work_dir, images, tmp_path / "run", device="cpu", statistics=True) == 0
    rows = table(tmp_path / "run" / "quality.csv")
    assert tuple(rows[0]) == COLUMNS
    assert [row["class"] for row in rows] == ["sphere", "box"] * 3
    means = [float(row["case_dice"]) for row in rows]
    assert means == sorted(means)
    assert {row["like_training"] for row in rows} == {"no"}
    assert "not like the training data: " in caplog.text
    for row in rows:
        assert float(row["dice_low"]) <= float(row["predicted_dice"]) <= float(row["dice_high"])
        assert (row["volume_low_ml"], row["volume_high_ml"]) == ("", "")
    measured = table(tmp_path / "run" / "statistics.csv")
    assert {(r["case"], r["class"]): float(r["volume_ml"]) for r in measured} == pytest.approx(
        {(r["case"], r["class"]): float(r["volume_ml"]) for r in rows}, rel=1e-4
    )

    packed = pack(work_dir, tmp_path / "model.zip").path
    with zipfile.ZipFile(packed) as archive:
        assert "case_1" not in archive.read("ensemble/quality.json").decode()  # whose cases it was learned from
    assert predict_files(packed, images, tmp_path / "packed", device="cpu", statistics=True) == 0
    for name in ("quality.csv", "statistics.csv"):
        assert (tmp_path / "packed" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()

    one = images / "case_0.nii.gz"
    assert predict_files(work_dir, one, tmp_path / "one.nii.gz", device="cpu") == 0
    assert table(tmp_path / "one.quality.csv") == [row for row in rows if row["case"] == "case_0"]
    prediction = autoseg.Segmenter(work_dir, device="cpu").predict(one)
    for record, row in zip(prediction.quality, table(tmp_path / "one.quality.csv"), strict=True):
        assert f"{record['predicted_dice']:.4f}" == row["predicted_dice"]
        assert record["like_training"] is False
        assert record["reason"] == row["reason"]
    # Models that are no ensemble have nothing that tells of them.
    assert predict_files(work_dir, one, tmp_path / "fold" / "a.nii.gz", fold=0, device="cpu") == 0
    assert [p.name for p in (tmp_path / "fold").iterdir()] == ["a.nii.gz"]


def test_a_bundle_and_a_zip_for_slicer_say_that_they_predict_no_quality(work_dir: Path, tmp_path: Path) -> None:
    root = tmp_path / "work"
    shutil.copytree(work_dir, root)
    facts = {"codes": {"box": "liver"}, "colours": {"box": [200, 10, 10]}}
    write_yaml(root / "settings.yaml", {key: {"value": value, "origin": "input"} for key, value in facts.items()})
    (bundle,) = export(root, "bundle", name="torso")
    told = [
        "No quality is predicted: the run's quality model is for autoseg alone.",
        "The run's codes and colours of classes are not written: label files made here are NIfTI, which has no place "
        "for them.",
    ]
    readme = (bundle / "docs" / "README.md").read_text()
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    for sentence in told:
        assert f"- {sentence}\n" in readme
        assert sentence in metadata["description"]
    with zipfile.ZipFile(export(root, "slicer", name="torso")[0]) as file:
        assert "no quality is predicted" in file.read("README.txt").decode()
    (other,) = export(root, "bundle", name="one", algo="segresnet", fold=0)
    assert "No quality" not in (other / "docs" / "README.md").read_text(), "it is of the ensemble"


def changed(work_dir: Path, root: Path, **changes: Any) -> Workspace:
    """A run with another quality.json, and no seal."""
    workspace = Workspace(root)
    data = json.loads(Workspace(work_dir).quality.read_text())
    write_json(workspace.quality, {**data, **changes})
    return workspace


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"made_from": "other"}, "belongs to another ensemble than ensemble.json."),
        ({"weights": [-1.0] * len(FEATURES)}, "weights.0: found -1.0, expected greater than or equal to 0"),
        ({"weights": [math.nan] * len(FEATURES)}, "weights.0: found nan, expected a finite number"),
        ({"weights": [1.0]}, f"features: found 10 with 1 weights, expected {FEATURES}."),
        ({"weights": "high"}, "weights: found 'high', expected a valid tuple."),
        ({"power": 3}, "unknown key power"),
    ],
)
def test_edited_files_are_refused(work_dir: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    spec = EnsembleSpec.model_validate_json(Workspace(work_dir).ensemble_spec.read_text())
    workspace = changed(work_dir, tmp_path, **changes)
    with pytest.raises(WorkspaceError) as caught:
        read_quality(workspace, spec)
    assert str(caught.value).startswith(f"{workspace.quality}: {message}")
    assert str(caught.value).endswith("Undo the edit, or delete the file and run `autoseg ensemble` again.")


def test_the_seal_covers_it(work_dir: Path, tmp_path: Path) -> None:
    spec = EnsembleSpec.model_validate_json(Workspace(work_dir).ensemble_spec.read_text())
    workspace = changed(work_dir, tmp_path)
    seal_ensemble(workspace, spec)
    check_ensemble(workspace, spec)
    data = json.loads(workspace.quality.read_text())
    write_json(workspace.quality, {**data, "weights": [0.0] * len(FEATURES)})
    with pytest.raises(WorkspaceError, match=r"quality\.json: edited since the ensemble was chosen"):
        check_ensemble(workspace, spec)
    workspace.quality.unlink()
    with pytest.raises(WorkspaceError, match=r"quality\.json: removed since the ensemble was chosen"):
        check_ensemble(workspace, spec)


def test_the_table_has_the_worst_first_and_flagged_unknowns_above_all(tmp_path: Path) -> None:
    def verdict(dice: float | None, *reasons: str) -> Verdict:
        known = ClassVerdict(
            name="a", dice=dice, low=None, high=None, volume_ml=1.0, volume_low_ml=None, volume_high_ml=None
        )
        return Verdict(classes=(known,), reasons=reasons)

    verdicts = {
        "good": verdict(0.9), "unknown": verdict(None), "odd": verdict(0.5, "far"), "bad": verdict(0.1),
        "unknown and odd": verdict(None, "far"),
    }  # fmt: skip
    table = quality_table(tmp_path / "quality.csv")
    table.hold(row for name, each in verdicts.items() for row in quality_rows(name, each))
    assert [row["case"] for row in table.read()] == ["unknown and odd", "bad", "odd", "good", "unknown"]
    table.put("late", quality_rows("late", verdict(0.3)))
    assert [row["case"] for row in table.read()][:3] == ["unknown and odd", "bad", "late"]
