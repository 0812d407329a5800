"""The Python API: results as the run's files have them, predictions on arrays and files alike, a quick import."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import MappingProxyType

import nibabel as nib
import numpy as np
import pytest
from processes import cpu_s

import autoseg
from autoseg.api import _texts
from autoseg.config.load import load_settings
from autoseg.errors import ConfigError, DataError, WorkspaceError


def test_run_gives_what_the_files_say(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "run", copy_function=shutil.copy2)
    result = autoseg.run(tmp_path / "run" / "input.yaml")
    scores = json.loads((tmp_path / "run" / "work_dir" / "ensemble" / "scores.json").read_text())
    chosen = scores["dice"]
    assert result.succeeded
    assert (result.dice, result.chosen) == (chosen["mean"], scores["chosen"])
    assert result.nsd == scores["nsd"]["mean"]
    assert result.report.is_file()
    assert len(list(result.predictions.glob("*.nii.gz"))) == 2
    assert [(j["algo"], j["fold"], j["state"]) for j in result.jobs] == [
        (a, f, "done") for a in ("dints", "segresnet") for f in (0, 1)
    ]
    mine = [r for r in result.records if r["segmenter"] == "ensemble"]
    assert len(mine) == 8 * len(result.classes)
    by_class = {
        name: [r["dice"] for r in mine if r["class"] == name and r["dice"] is not None] for name in result.classes
    }
    assert {n: pytest.approx(sum(v) / len(v), abs=1e-5) for n, v in by_class.items()} == result.dice_by_class
    assert set(mine[0]) == {"case", "fold", "class", "segmenter", *scores["metrics"]}


def test_settings_are_checked_like_flags(finished_run: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        autoseg.run(finished_run / "input.yaml", num_epohs=3, segresnet={"batch_size": 0})
    assert any("num_epohs" in m and "Did you mean" in m for m in caught.value.messages)
    assert any("segresnet.batch_size: expected a whole number >= 1, found 0" in m for m in caught.value.messages)


@pytest.fixture
def input_yaml(tmp_path: Path) -> Path:
    """An input.yaml without data."""
    (tmp_path / "d.json").write_text("{}")
    path = tmp_path / "input.yaml"
    path.write_text("modality: CT\ndatalist: d.json\ndataroot: .\n")
    return path


def test_mappings_arrive_as_they_were_given(input_yaml: Path) -> None:
    given = {
        "budget": "2h",
        "class_weights": {"tumor": 10},
        "class_sampling": MappingProxyType({"kidney.left": 3.5}),
        "extra_modalities": {"image2": "pet"},
        "class_names": [{"name": "whole", "index": (1, 2)}, {"name": "core", "index": [2]}],
        "inference": {"min_voxels": {"tumor": 100}, "slice_run": ["liver"], "fast": True},
        "segresnet": {"class_weights": {"tumor": 2}, "batch_size": 2},
        "sweep": {"parameters": {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}, "trials": 3},
        "ensemble": {"method": "best_n"},
        "dints": {},
        "unet.batch_size": 3,
        "work_dir": input_yaml.parent / "elsewhere",
        "folds": None,
    }
    settings, origins = load_settings(input_yaml, _texts(given))
    assert settings.budget == "2h"
    assert settings.class_weights == {"tumor": 10.0}
    assert settings.class_sampling == {"kidney.left": 3.5}
    assert settings.extra_modalities == {"image2": "pet"}
    assert [(c.name, c.index) for c in settings.class_names or ()] == [("whole", (1, 2)), ("core", (2,))]  # type: ignore[union-attr]
    assert settings.inference.min_voxels == {"tumor": 100}
    assert (settings.inference.slice_run, settings.inference.fast) == (("liver",), True)
    assert (settings.segresnet.class_weights, settings.segresnet.batch_size) == ({"tumor": 2.0}, 2)
    assert settings.sweep.parameters["learning_rate"].low == 1e-4
    assert settings.sweep.trials == 3
    assert settings.ensemble.method == "best_n"  # type: ignore[union-attr]
    assert settings.unet.batch_size == 3
    assert (settings.work_dir, settings.folds) == (input_yaml.parent / "elsewhere", None)
    assert origins["class_weights"] == origins["segresnet.class_weights"] == "command line"
    assert load_settings(input_yaml, _texts({"ensemble": False}))[0].ensemble is False


def test_faults_in_mappings_are_named(input_yaml: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        autoseg.run(input_yaml, class_weights={"tumor": -1}, inference={"min_voxels": {"tumor": 0}}, weights={"a": 1})
    assert sorted(m.partition(", found")[0] for m in caught.value.messages) == [
        "--class_weights.tumor: expected a number > 0",
        "--inference.min_voxels.tumor: expected a whole number >= 1",
        "--weights: unknown key. Did you mean --init_weights?",
    ]


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, 1), (1, -1, -1)])
def test_an_array_is_segmented_as_its_file(finished_run: Path, tmp_path: Path, signs: tuple[int, ...]) -> None:
    source = nib.load(finished_run / "images" / "phantom_000.nii.gz")
    affine = np.diag([1.0 * signs[0], 1.1 * signs[1], 1.4 * signs[2], 1.0])
    array = np.asarray(source.dataobj, dtype=np.float32)
    nib.save(nib.Nifti1Image(array, affine), tmp_path / "scan.nii.gz")
    segmenter = autoseg.Segmenter(finished_run / "work_dir", algo="segresnet", device="cpu")
    of_file = segmenter.predict(tmp_path / "scan.nii.gz")
    of_array = segmenter.predict(array, affine=affine)
    assert of_array.labels.shape == array.shape
    np.testing.assert_array_equal(of_array.labels, of_file.labels)
    of_array.save(tmp_path / "labels.nii.gz")
    saved = nib.load(tmp_path / "labels.nii.gz")
    np.testing.assert_array_equal(np.asarray(saved.dataobj), of_array.labels)
    np.testing.assert_allclose(saved.affine, affine, atol=1e-6)
    for record in of_array.records:
        assert record["volume_ml"] == pytest.approx(record["voxels"] * 1.0 * 1.1 * 1.4 / 1000)


def test_predict_writes_what_the_command_writes(finished_run: Path, tmp_path: Path) -> None:
    image = next((finished_run / "images").glob("*_008.nii.gz"))
    found = autoseg.predict(image, tmp_path / "out.nii.gz", work_dir=finished_run / "work_dir", device="cpu")
    command = nib.load(finished_run / "work_dir" / "ensemble" / "predictions" / image.name)
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "out.nii.gz").dataobj), np.asarray(command.dataobj))
    np.testing.assert_array_equal(found.labels, np.asarray(command.dataobj))


def test_bad_images_are_named(finished_run: Path, tmp_path: Path) -> None:
    segmenter = autoseg.Segmenter(finished_run / "work_dir", algo="dints", fold=0)
    with pytest.raises(DataError, match=r"an array of shape \(3, 4\). Expected \(X, Y, Z\)"):
        segmenter.predict(np.zeros((3, 4)))
    with pytest.raises(DataError, match="voxels are NaN or infinite"):
        segmenter.predict(np.full((8, 8, 8), np.nan))
    with pytest.raises(DataError, match="affine: expected a 4x4 matrix"):
        segmenter.predict(np.zeros((8, 8, 8)), affine=np.zeros((4, 4)))
    with pytest.raises(DataError, match="affine: no effect with a file"):
        segmenter.predict("scan.nii.gz", affine=np.eye(4))
    with pytest.raises(DataError, match="the array: every voxel has the value 3"):
        segmenter.predict(np.full((8, 8, 8), 3.0))
    with pytest.raises(WorkspaceError, match="no settings.yaml, so not a run's folder"):
        autoseg.load_result(tmp_path)


def test_settings_of_inference_are_checked(finished_run: Path) -> None:
    work_dir = finished_run / "work_dir"
    assert autoseg.Segmenter(work_dir, overlap=0.25)._predictor.options.overlap == 0.25
    with pytest.raises(ConfigError) as caught:
        autoseg.Segmenter(work_dir, overlap=1.5, fats=True)
    first, second = sorted(caught.value.messages)
    assert first.startswith("fats: no such setting of inference. Known: fast, locate,")
    assert second == "overlap: Input should be less than 1, found 1.5. Correct it or leave it out."


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = autoseg.trian
    assert {"run", "predict", "Segmenter"} <= set(dir(autoseg))


@pytest.mark.parametrize("words", [["--help"], ["status", "--work_dir", "work_dir"]])
def test_starting_is_quick(finished_run: Path, words: list[str]) -> None:
    """Little work beside what importing pydantic takes at the same load; an old one takes longer to make classes."""
    reference = min(cpu_s("-c", "import pydantic.main, yaml, psutil", cwd=finished_run) for _ in range(3))
    assert min(cpu_s("-m", "autoseg", *words, cwd=finished_run) for _ in range(3)) < 4 * reference
