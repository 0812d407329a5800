"""Maps of probabilities and uncertainty beside label files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from other_formats import write_series
from tiny_jobs import make_job

from autoseg.data import streams
from autoseg.ensemble.predict import predict_files
from autoseg.inference.maps import entropy, map_names

SHAPE = (20, 18, 16)
AFFINE = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.2, 0.1, -0.3) @ np.diag([-1, -1, 1.9]), [3, -20, 5])
CLASSES = [{"name": "liver/left", "values": [1]}, {"name": "liver left", "values": [2]}]
NAMES = ["probability_liver_left", "probability_liver_left_2"]


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of two algorithms at different voxel sizes, whose names would be one in a file's name."""
    root = tmp_path_factory.mktemp("work")
    for number, algo in enumerate(("segresnet", "swinunetr")):
        spacing = (1.2, 1.2, 1.6) if number else (1.0, 1.5, 1.5)
        make_job(root, algo, 0, seed=number, classes=CLASSES, resample_resolution=spacing)
    return root


def save(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    nib.save(nib.Nifti1Image(voxels, AFFINE), path)
    return path


def predict(work_dir: Path, image: Path, output: Path, **more: Any) -> None:
    more = {"fold": 0, "device": "cpu", "probabilities": True, "uncertainty": True, **more}
    assert predict_files(work_dir, image, output, **more) == 0


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def test_labels_are_those_of_the_most_probable_class(work_dir: Path, tmp_path: Path) -> None:
    image = save(tmp_path / "a.nii.gz")
    predict(work_dir, image, tmp_path / "out")
    predict(work_dir, image, tmp_path / "plain", probabilities=False, uncertainty=False)
    assert [p.name for p in (tmp_path / "plain").iterdir()] == ["a.nii.gz"]
    folder = tmp_path / "out" / "a.maps"
    assert sorted(p.name for p in folder.iterdir()) == [*(f"{n}.nii.gz" for n in NAMES), "uncertainty.nii.gz"]
    first, second = (voxels(folder / f"{name}.nii.gz") for name in NAMES)
    assert first.dtype == np.float32
    probs = np.stack([1 - first - second, first, second])
    assert probs.min() > -1e-6
    labels = voxels(tmp_path / "out" / "a.nii.gz")
    assert {*np.unique(labels)} == {0, 1, 2}
    np.testing.assert_array_equal(labels, probs.argmax(0))
    assert (labels != voxels(tmp_path / "plain" / "a.nii.gz")).mean() < 1e-3
    np.testing.assert_allclose(nib.load(folder / f"{NAMES[0]}.nii.gz").affine, AFFINE, atol=1e-6)
    with np.errstate(divide="ignore", invalid="ignore"):
        wanted = -np.nansum(probs.clip(0) * np.log(probs.clip(0)), axis=0) / math.log(3)
    np.testing.assert_allclose(voxels(folder / "uncertainty.nii.gz"), wanted, atol=1e-4)


def test_a_large_image_has_the_same_maps(work_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = save(tmp_path / "a.nii.gz")
    predict(work_dir, image, tmp_path / "memory")
    monkeypatch.setattr(streams, "STREAM_VOXELS", 100)
    predict(work_dir, image, tmp_path / "stream")
    for name in (*NAMES, "uncertainty"):
        ours, theirs = (voxels(tmp_path / f / "a.maps" / f"{name}.nii.gz") for f in ("memory", "stream"))
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(("name", "suffix"), [("nrrd", ".nrrd"), ("seg.nrrd", ".nrrd"), ("mha", ".mha")])
def test_maps_have_the_format_of_the_labels(work_dir: Path, tmp_path: Path, name: str, suffix: str) -> None:
    image = save(tmp_path / "a.nii.gz")
    predict(work_dir, image, tmp_path / "nifti")
    predict(work_dir, image, tmp_path / "out", format=name, uncertainty=False)
    folder = tmp_path / "out" / "a.maps"
    assert sorted(p.name for p in folder.iterdir()) == [f"{n}{suffix}" for n in NAMES]
    array = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f"{NAMES[0]}{suffix}"))).T
    np.testing.assert_array_equal(array, voxels(tmp_path / "nifti" / "a.maps" / f"{NAMES[0]}.nii.gz"))


def test_segmentations_in_dicom_have_maps_as_nifti(work_dir: Path, tmp_path: Path) -> None:
    series = write_series(tmp_path / "scan", np.random.default_rng(0).integers(0, 400, SHAPE).astype(np.int16), AFFINE)
    predict(work_dir, series, tmp_path / "out", probabilities=False)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["scan.maps", "scan.seg.dcm"]
    assert [p.name for p in (tmp_path / "out" / "scan.maps").iterdir()] == ["uncertainty.nii.gz"]


def test_votes_have_the_mean_of_the_probabilities(tmp_path: Path) -> None:
    from autoseg.inference.predictor import Predictor

    jobs = [make_job(tmp_path / "work", "segresnet", fold, seed=fold) for fold in (0, 1, 2)]
    image = save(tmp_path / "a.nii.gz")
    seen: dict[str, list[np.ndarray]] = {"vote": [], "mean": []}
    from autoseg.data.streams import MemoryImage
    from autoseg.data.volumes import read_image

    for combine in ("vote", "mean"):
        predictor = Predictor(jobs, device="cpu", combine=combine)  # type: ignore[arg-type]
        rows = MemoryImage(read_image((image,)))
        for _ in predictor.labelled(rows, lambda region, probs, c=combine: seen[c].append(probs.numpy())):  # type: ignore[misc]
            pass
    votes, means = (np.concatenate(seen[c], axis=1) for c in ("vote", "mean"))
    # A vote's networks each give probabilities, of which the mean is taken; a mean's give logits.
    np.testing.assert_allclose(votes.sum(axis=0), 1, atol=1e-5)
    assert np.abs(votes - means).max() < 0.2


def test_entropy_is_a_share() -> None:
    even = torch.full((4, 2), 0.25)
    np.testing.assert_allclose(entropy(even, independent=False), [1, 1])
    sure = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    np.testing.assert_allclose(entropy(sure, independent=False), [0, 0])
    np.testing.assert_allclose(entropy(torch.tensor([[0.5, 0.0], [1.0, 0.0]]), independent=True), [1, 0])


def test_names_of_files_differ_whatever_the_classes_are_called() -> None:
    assert map_names(["a/b", "a b", "A b", "../x"]) == [
        "probability_a_b", "probability_a_b_2", "probability_A_b_3", "probability_.._x",
    ]  # fmt: skip
