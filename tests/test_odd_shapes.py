"""Shapes and grids that real data has and tests seldom: tiny, flat, thick, long; trained on and predicted in place."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
from test_volumes import ORIENTATIONS, stored_affine

from autoseg.cli.main import run_command
from autoseg.data.volumes import read_image, write_volume

pytestmark = pytest.mark.usefixtures("without_reports")
ODD = {
    "tiny": ((6, 5, 4), (1.0, 1.0, 1.0)),
    "two_slices": ((24, 22, 2), (1.0, 1.0, 5.0)),
    "three_slices": ((24, 22, 3), (1.0, 1.0, 5.0)),
    "thick": ((30, 28, 6), (0.7, 0.7, 10.0)),
    "long": ((8, 8, 200), (1.0, 1.0, 1.0)),
    "plain": ((24, 24, 24), (1.0, 1.0, 1.2)),
}


def test_each_of_48_axis_orders_comes_back_exactly(tmp_path: Path) -> None:
    array = np.arange(120, dtype=np.int16).reshape(6, 5, 4)
    for codes in ORIENTATIONS:
        affine = stored_affine(codes, array.shape, (0.7, 0.8, 2.0), 12.0)
        nib.save(nib.Nifti1Image(array, affine), tmp_path / "in.nii.gz")
        volume = read_image((tmp_path / "in.nii.gz",))
        write_volume(tmp_path / "out.nii.gz", volume.array[0], volume.grid)
        back = nib.load(tmp_path / "out.nii.gz")
        np.testing.assert_array_equal(np.asarray(back.dataobj), array, err_msg=str(codes))
        np.testing.assert_allclose(back.affine, affine, atol=1e-5, err_msg=str(codes))


def test_cases_of_all_odd_shapes_are_trained_on_together_and_predicted_on_their_grids(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    training = []
    for number, (name, (shape, spacing)) in enumerate(ODD.items()):
        label = np.zeros(shape, np.uint8)
        label[tuple(slice(n // 4, max(n // 4 + 1, 3 * n // 4)) for n in shape)] = 1
        image = (rng.normal(100, 10, shape) + 100 * label).astype(np.int16)
        for folder, array in (("images", image), ("labels", label)):
            (tmp_path / folder).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.diag([*spacing, 1.0])), tmp_path / folder / f"{name}.nii.gz")
        listed = {"image": f"images/{name}.nii.gz", "label": f"labels/{name}.nii.gz"}
        training.append({**listed, "fold": number % 2})
    (tmp_path / "datalist.json").write_text(json.dumps({"training": training, "testing": []}))
    settings = {
        **{"modality": "MRI", "datalist": "datalist.json", "dataroot": ".", "class_names": ["box"]},
        **{"algos": ["segresnet"], "num_epochs": 1, "num_steps_per_epoch": 2, "batch_size": 1, "num_workers": 1},
        **{"precision": "fp32", "overlap": 0, "roi_size": [16, 16, 8], "learning_rate": 0.003},
        "segresnet": {"init_filters": 8, "blocks_down": [1, 1]},
    }
    (tmp_path / "input.yaml").write_text(yaml.safe_dump(settings))
    assert run_command(["run", "--input", str(tmp_path / "input.yaml")]) == 0
    out_of_fold = tmp_path / "work_dir" / "ensemble" / "out_of_fold" / "segresnet"
    words = ["--work_dir", str(tmp_path / "work_dir"), "--device", "cpu"]
    predicted = tmp_path / "predicted"
    assert run_command(["predict", "--image", str(tmp_path / "images"), "--output", str(predicted), *words]) == 0
    for name, (shape, _) in ODD.items():
        image = nib.load(tmp_path / "images" / f"{name}.nii.gz")
        for folder in (out_of_fold, predicted):
            label = nib.load(folder / f"{name}.nii.gz")
            assert label.shape == shape
            np.testing.assert_allclose(label.affine, image.affine)
