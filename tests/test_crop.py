"""Images are cropped to their voxels other than 0 where that is a small part of them; labels come back whole."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from plans import make_fingerprint, plan_and_origins, tiny_plan
from tiny_jobs import make_job

from autoseg import analyzer
from autoseg.algos.fit import cache_gib
from autoseg.config.load import load_settings
from autoseg.data.datalists.cases import Case, Datalist
from autoseg.data.datalists.datalist import read_datalist, write_datalist
from autoseg.data.fingerprint import Fingerprint
from autoseg.inference.predictor import Predictor
from autoseg.pipeline.run import run_input
from autoseg.plan import read_plan
from autoseg.training.cache import load_cases
from autoseg.workspace.workspace import Workspace

SHAPE = (40, 36, 32)
BODY = (slice(9, 29), slice(4, 28), slice(10, 26))
"""Where the image is other than 0: 20x24x16 of its voxels, a sixth."""
AFFINE = np.diag([-1.0, 1.0, 1.0, 1.0])
"""Stored from right to left, so that X is turned round when it is read."""


def write_case(folder: Path, name: str, *, outside: bool = False) -> Case:
    rng = np.random.default_rng(len(name))
    image, label = np.zeros(SHAPE, np.float32), np.zeros(SHAPE, np.uint8)
    image[BODY] = rng.uniform(10, 20, (20, 24, 16))
    label[12:20, 10:20, 12:20] = 1
    image[label == 1] += 100
    if outside:
        label[2:5, 2:5, 2:5] = 1
    paths = folder / f"{name}.nii.gz", folder / f"{name}_label.nii.gz"
    for path, array in zip(paths, (image, label), strict=True):
        nib.save(nib.Nifti1Image(array, AFFINE), path)  # type: ignore[attr-defined]
    return Case(name=name, images=(paths[0],), label=paths[1], fold=len(name) % 2)


def write_set(folder: Path, *, outside: int = 0) -> Path:
    """The input.yaml of four cases, some with a label outside of the body."""
    folder.mkdir(exist_ok=True)
    cases = tuple(write_case(folder, "c" * (n + 1), outside=n < outside) for n in range(4))
    write_datalist(Datalist(training=cases, labels={1: "a"}), folder / "datalist.json", folder)
    text = "modality: MRI\ndatalist: datalist.json\ndataroot: .\nalgos: [segresnet]\nlauncher: slurm\n"
    (folder / "input.yaml").write_text(text)
    return folder / "input.yaml"


def fingerprint_of(path: Path) -> Fingerprint:
    return Fingerprint.read(Workspace(path.parent / "work_dir").datastats)


def test_a_small_box_is_what_is_planned_for(tmp_path: Path) -> None:
    path = write_set(tmp_path / "data")
    run_input(("analyze", "generate"), path, {})
    fingerprint, plan = fingerprint_of(path), read_plan(Workspace(path.parent / "work_dir").job_dir("segresnet", 0))
    assert fingerprint.nonzero_size_mm_median == (20.0, 24.0, 16.0)
    assert fingerprint.nonzero_crop_ratio == pytest.approx(20 * 24 * 16 / (40 * 36 * 32))
    assert fingerprint.size_mm_seen(cropped=True) == (20.0, 24.0, 16.0)
    assert fingerprint.size_mm_seen(cropped=False) == (40.0, 36.0, 32.0)
    assert plan.crop_foreground
    assert all(r <= -(-n // 8) * 8 for r, n in zip(plan.roi_size, (20, 24, 16), strict=True))
    assert cache_gib(plan, fingerprint, 4) == pytest.approx(20 * 24 * 16 * 3 * 4 / 2**30)


def test_no_crop_where_a_class_lies_outside_and_the_cases_are_named(tmp_path: Path) -> None:
    path = write_set(tmp_path / "data", outside=2)
    settings, _ = load_settings(path)
    listed = read_datalist(settings.datalist, settings.dataroot, num_fold=2, seed=0)
    analyzer.analyze(listed, settings, Workspace(settings.work_dir), progress=False)
    fingerprint = fingerprint_of(path)
    assert fingerprint.labelled_outside == ("c", "cc")
    assert fingerprint.outside_fraction == pytest.approx(2 * 27 / (4 * 8 * 10 * 8 + 2 * 27))
    plan, origins = plan_and_origins("segresnet", fingerprint=fingerprint, classes={"a": (1,)})
    assert not plan.crop_foreground
    assert origins["crop_foreground"].rule == (
        "the box around voxels other than 0 is 0.17 of the median image, but 2.1 % of a class at most lies outside "
        "of it, in c, cc (over 0.5 %: not cropped)"
    )


def test_the_rule_and_who_may_overrule_it() -> None:
    small = make_fingerprint(nonzero_crop_ratio=0.3, nonzero_size_mm_median=(20.0, 20.0, 24.0))
    plan, origins = plan_and_origins("segresnet", fingerprint=small)
    assert plan.crop_foreground
    assert (
        "0.30 of the median image, under 0.75 (nnU-Net crops always); no class lies outside of it"
        in origins["crop_foreground"].rule
    )
    assert not plan_and_origins("segresnet", fingerprint=small, crop_foreground=False)[0].crop_foreground
    large = make_fingerprint(nonzero_crop_ratio=0.8)
    plan, origins = plan_and_origins("segresnet", fingerprint=large)
    assert not plan.crop_foreground
    assert "so there is little to crop" in origins["crop_foreground"].rule
    assert plan_and_origins("segresnet", fingerprint=large, crop_foreground=True)[0].crop_foreground
    few = replace(small, labelled_outside=tuple("abcde"), outside_fraction=0.004)
    plan, origins = plan_and_origins("segresnet", fingerprint=few)
    assert plan.crop_foreground
    assert origins["crop_foreground"].rule.endswith(
        "; 0.4 % of a class at most lies outside of it, in a, b, c and 2 more: learned from as a whole"
    )


def test_a_case_that_would_lose_labels_is_named_and_kept_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cases = [write_case(tmp_path, "c"), write_case(tmp_path, "cc", outside=True)]
    plan = tiny_plan(crop_foreground=True, classes={"a": (1,)})
    inside, whole = load_cases(tmp_path / "cache", plan, cases, num_workers=1)
    assert inside.image.shape[1:] == (20, 24, 16)
    assert whole.image.shape[1:] == SHAPE
    assert int((np.asarray(whole.target) == 1).sum()) == 8 * 10 * 8 + 27
    messages = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert messages == [
        "cc: 27 labelled voxels lie outside the box around voxels other than 0, so it is not cropped. Predictions are "
        "background there; with crop_foreground: false they are not."
    ]


@pytest.mark.parametrize("streamed", [False, True])
def test_labels_come_back_on_the_whole_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool) -> None:
    class Bright(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([50 - x, x - 50, torch.full_like(x, -1e3)], dim=1)

    case = write_case(tmp_path, "c")
    settings = {"channels": [{"mode": "none"}], "crop_foreground": True, "resample_resolution": [1.0, 1.0, 1.0]}
    job = make_job(tmp_path / "w", "segresnet", 0, **settings)
    predictor = Predictor([job], device="cpu")
    predictor.models = tuple(replace(m, network=Bright(), heads=()) for m in predictor.models)
    if streamed:
        monkeypatch.setattr("autoseg.data.streams.STREAM_VOXELS", 100)
    predictor.predict_file(case.images, tmp_path / "out.nii.gz")
    assert case.label is not None
    written, label = (nib.load(p) for p in (tmp_path / "out.nii.gz", case.label))  # type: ignore[attr-defined]
    assert np.array_equal(np.asarray(written.dataobj), np.asarray(label.dataobj))
    assert np.array_equal(written.affine, AFFINE)
