"""A raw data set for nnU-Net: it holds what nnU-Net asks for, and reads back as the same cases, labels and folds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from tiny_jobs import make_job

from autoseg.cli.main import run_command
from autoseg.data.datalists.cases import Case, Datalist
from autoseg.data.datalists.datalist import read_datalist
from autoseg.data.labels import LabelMap
from autoseg.data.volumes import read_image, read_label
from autoseg.errors import AutosegError
from autoseg.export.nnunet_raw import dataset_json, folder_name, splits_of, value_table
from autoseg.export.pack import pack
from autoseg.export.targets import export


@pytest.fixture(scope="module")
def dataset(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (path,) = export(finished_run / "work_dir", "nnunet_raw", output=tmp_path_factory.mktemp("nnunet"))
    return path


def test_it_reads_back_as_the_same_cases_and_folds(finished_run: Path, dataset: Path) -> None:
    assert dataset.name == "Dataset900_phantoms"
    own = read_datalist(finished_run / "work_dir" / "datalist.json", finished_run)
    back = read_datalist(dataset / "dataset.json", dataset)
    assert [(c.name, c.fold) for c in back.training] == sorted((c.name, c.fold) for c in own.training)
    assert [c.name for c in back.testing] == sorted(c.name for c in own.testing)
    assert back.labels == {1: "sphere", 2: "box"}
    by_name = {c.name: c for c in (*own.training, *own.testing)}
    for case in (*back.training, *back.testing):
        image, original = read_image(case.images), read_image(by_name[case.name].images)
        np.testing.assert_allclose(image.array, original.array, rtol=1e-6)
        np.testing.assert_allclose(image.grid.affine, original.grid.affine, atol=1e-5)
    for case in back.training:
        assert case.label is not None
        label, original = read_label(case.label), read_label(by_name[case.name].label)  # type: ignore[arg-type]
        np.testing.assert_array_equal(label.array, original.array)
        # nnU-Net compares grids as they are stored.
        stored = [nib.load(path) for path in (case.label, *case.images)]
        assert len({s.shape for s in stored}) == 1
        np.testing.assert_allclose(stored[0].affine, stored[1].affine, atol=1e-5)


def test_the_splits_are_nnunets_form(dataset: Path) -> None:
    splits = json.loads((dataset / "splits_final.json").read_text())
    names = {p.name.removesuffix(".nii.gz") for p in (dataset / "labelsTr").iterdir()}
    assert len(splits) == 2
    for split in splits:
        assert {*split["train"]} | {*split["val"]} == names
        assert not {*split["train"]} & {*split["val"]}
    assert {*splits[0]["val"]} | {*splits[1]["val"]} == names


CASES = Datalist(
    training=tuple(Case(name=n, images=(), label=Path(n), fold=f) for n, f in [("b", 1), ("a", 0), ("c", 1)])
)


@pytest.mark.parametrize(
    ("label_map", "labels", "order", "table"),
    [
        (
            LabelMap(names=("liver", "tumor"), values=((3,), (7, 9)), ignore_label=255),
            {"background": 0, "liver": 1, "tumor": 2, "ignore": 3},
            None,
            {0: 0, 3: 1, 7: 2, 9: 2, 255: 3, 5: 0},
        ),
        (
            LabelMap(names=("core", "whole", "enhancing"), values=((1, 4), (1, 2, 4), (4,)), sigmoid=True),
            {"background": 0, "whole": [1, 2, 3], "core": [1, 3], "enhancing": [3]},
            [2, 1, 3],
            {0: 0, 1: 1, 2: 2, 4: 3, 3: 0},
        ),
    ],
)
def test_labels_have_no_gaps_and_regions_their_order(
    label_map: LabelMap, labels: dict[str, Any], order: list[int] | None, table: dict[int, int]
) -> None:
    data = dataset_json(CASES, label_map, ["CT"], "CC0")
    assert list(data["labels"].items()) == list(labels.items())  # the order of regions counts
    assert data.get("regions_class_order") == order
    assert data["licence"] == "CC0"
    assert data["numTraining"] == 3
    made = value_table(label_map)
    assert {value: int(made[value]) for value in table} == table


def test_nnunets_painting_of_regions_gives_the_values_back() -> None:
    """As nnU-Net's `convert_probabilities_to_segmentation` paints: region by region, the later on top."""
    label_map = LabelMap(names=("core", "whole", "enhancing"), values=((1, 4), (1, 2, 4), (4,)), sigmoid=True)
    data = dataset_json(CASES, label_map, ["MRI"])
    regions = [values for name, values in data["labels"].items() if name != "background"]
    for truth in (1, 2, 3):
        painted = 0
        for region, value in zip(regions, data["regions_class_order"], strict=True):
            painted = value if truth in region else painted
        assert painted == truth


def test_splits_name_each_case_once() -> None:
    assert splits_of(CASES.training) == [{"train": ["b", "c"], "val": ["a"]}, {"train": ["a"], "val": ["b", "c"]}]


def test_init_takes_the_folds_of_a_list_elsewhere(
    dataset: Path, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    for name in ("images", "labels"):
        (tmp_path / "data" / name).symlink_to(finished_run / name)
    names = sorted(p.name.removesuffix(".nii.gz") for p in (finished_run / "labels").iterdir())
    splits = [{"train": names[3:], "val": names[:3]}, {"train": names[:3], "val": names[3:]}]
    (tmp_path / "splits_final.json").write_text(json.dumps(splits))
    words = ["init", str(tmp_path / "data"), "--output", str(tmp_path / "run")]
    assert run_command([*words, "--splits", str(tmp_path / "splits_final.json")]) == 0
    listed = json.loads((tmp_path / "run" / "datalist.json").read_text())["training"]
    folds = {Path(item["label"]).name.removesuffix(".nii.gz"): item["fold"] for item in listed}
    assert folds == {name: int(name not in names[:3]) for name in names}
    assert run_command([*words, "--force", "--splits", str(tmp_path / "none.json")]) == 2
    assert "none.json: cannot be read" in capsys.readouterr().err


def test_the_folder_is_named_as_nnunet_looks_for_it() -> None:
    names = ("liver", "Dataset123_Liver", "Dataset12_Liver", "Große Leber")
    expected = ["Dataset900_liver", "Dataset123_Liver", "Dataset012_Liver", "Dataset900_Grosse_Leber"]
    assert [folder_name(name) for name in names] == expected


def test_what_cannot_be_written_is_said(finished_run: Path, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(AutosegError, match="is there already"):
        export(finished_run / "work_dir", "nnunet_raw", output=dataset.parent)
    with pytest.raises(AutosegError, match="expected letters and digits"):
        export(finished_run / "work_dir", "nnunet_raw", output=tmp_path, name="---")
    packed = pack(finished_run / "work_dir", tmp_path / "m.zip").path
    with pytest.raises(AutosegError, match="a packed model holds no cases"):
        export(packed, "nnunet_raw", output=tmp_path / "out")
    make_job(tmp_path / "work", "segresnet", 0)
    with pytest.raises(AutosegError, match="Run `autoseg analyze` first"):
        export(tmp_path / "work", "nnunet_raw")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.zip", "work"]
