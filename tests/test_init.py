"""`autoseg init`: the two files, what is guessed, and that nothing is overwritten."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml

from autoseg.cli.init import init_data_folder
from autoseg.config.reader import read_with_origins
from autoseg.config.settings import Settings
from autoseg.data.datalists.datalist import read_datalist
from autoseg.data.phantoms import make_phantoms
from autoseg.errors import ConfigError, DataError
from autoseg.terminal import printable


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, np.eye(4)), path)


def pairs(root: Path, *, low: float = 0.0, labels: tuple[int, ...] = (0, 1, 5), num: int = 5) -> Path:
    """A pair of folders with tiny images."""
    for i in range(num):
        save(root / "images" / f"p{i}.nii.gz", np.array([[[low, 50.0]]], np.float32))
        save(root / "labels" / f"p{i}.nii.gz", np.array([[labels]], np.uint8))
    return root


def nnunet(root: Path, channels: dict[str, str], labels: dict[str, object]) -> Path:
    for i in range(5):
        for c in range(len(channels)):
            save(root / "imagesTr" / f"n{i}_{c:04d}.nii.gz", np.zeros((1, 1, 2), np.int16))
        save(root / "labelsTr" / f"n{i}.nii.gz", np.zeros((1, 1, 2), np.uint8))
    (root / "dataset.json").write_text(
        json.dumps({"channel_names": channels, "labels": labels, "file_ending": ".nii.gz"})
    )
    return root


def settings(output: Path) -> Settings:
    return Settings(**yaml.safe_load((output / "input.yaml").read_text()))


@pytest.mark.parametrize(
    ("beside", "classes"),
    [
        ({"1": "liver", "5": "left kidney"}, {"liver": (1,), "left kidney": (5,)}),
        ([{"id": 1}], {"class_1": (1,), "class_5": (5,)}),  # a file of another tool
    ],
)
def test_names_that_merge_masks_wrote_are_taken(
    beside: object, classes: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    data = pairs(tmp_path / "data")
    (data / "labels" / "labels.json").write_text(json.dumps(beside))
    assert init_data_folder(data, tmp_path / "out").classes == classes


def test_a_pair_of_folders(tmp_path: Path) -> None:
    data, output = pairs(tmp_path / "data"), tmp_path / "out"
    result = init_data_folder(data, output)
    assert str(result) == "\n".join(
        [
            "Recognised: pair of folders images/ and labels/",
            "Cases:      5 training in 5 folds, 0 testing, 0 unlabeled",
            "Classes:    class_1 (1), class_5 (5)",
            "Modality:   MRI (guessed from 5 images, whose lowest value is 0, not below -500 as in a CT; correct it if "
            "these are not MRI)",
            "Note:       class names are made up from the values 1, 5 of 5 label files: put real ones into input.yaml.",
            f"Wrote:      {output / 'input.yaml'} and {output / 'datalist.json'}",
            f"Next:       autoseg run --input {output / 'input.yaml'}",
        ]
    )
    found = settings(output)
    assert (found.modality, str(found.datalist), str(found.dataroot)) == ("MRI", "datalist.json", "../data")
    assert [(c.name, c.index) for c in found.class_names or () if not isinstance(c, str)] == [
        ("class_1", (1,)),
        ("class_5", (5,)),
    ]
    listed = read_datalist(output / "datalist.json", output / found.dataroot)
    assert sorted(c.fold for c in listed.training if c.fold is not None) == [0, 1, 2, 3, 4]
    assert listed.labels == {1: "class_1", 5: "class_5"}


@pytest.mark.parametrize("names", [("images/p{}/v{}", "labels/p{}/v{}"), ("p{}/v{}/image", "p{}/v{}/label")])
def test_folders_of_patients_are_groups(tmp_path: Path, names: tuple[str, str]) -> None:
    for patient, visit in np.ndindex(3, 2):
        for name, dtype in zip(names, (np.float32, np.uint8), strict=True):
            values = np.array([[[0, 1, patient]]], dtype)
            save(tmp_path / "data" / f"{name.format(patient, visit)}.nii.gz", values)
    result = init_data_folder(tmp_path / "data", tmp_path / "out")
    assert (result.num_training, result.num_fold) == (6, 3)
    assert result.notes[0].startswith("6 cases lie in the folders of 3 patients, such as 2 in p0/: no fold splits one")
    listed = read_datalist(result.datalist, tmp_path / "data").training
    assert {(case.group, case.fold) for case in listed} == {(c.group, c.fold) for c in listed[::2]}
    assert {case.group for case in listed} == {"p0", "p1", "p2"}


def test_the_next_line_can_be_pasted(tmp_path: Path) -> None:
    result = init_data_folder(pairs(tmp_path / "data"), tmp_path / "my out; $x")
    assert shlex.split(result.next_command) == ["autoseg", "run", "--input", str(tmp_path / "my out; $x/input.yaml")]


def test_a_low_value_means_ct(tmp_path: Path) -> None:
    result = init_data_folder(pairs(tmp_path / "data", low=-1000.0), tmp_path / "out", num_fold=3)
    assert (result.modality, result.num_fold) == ("CT", 3)
    assert result.modality_reason == (
        "guessed from 5 images, whose lowest value is -1000, below -500 as only in Hounsfield units"
    )


def test_255_may_be_the_value_to_ignore(tmp_path: Path) -> None:
    result = init_data_folder(pairs(tmp_path / "data", labels=(0, 1, 255)), tmp_path / "out")
    assert result.notes[-1] == (
        "label value 255 often marks voxels to ignore: if so, drop its class and set ignore_label: 255."
    )


def test_msd_names_are_used(tmp_path: Path) -> None:
    pairs(tmp_path / "data")
    listed = [{"image": f"images/p{i}.nii.gz", "label": f"labels/p{i}.nii.gz"} for i in range(5)]
    head = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver", "2": "yes, tumor: [1]"}}
    (tmp_path / "data" / "dataset.json").write_text(json.dumps({**head, "training": listed, "test": []}))
    result = init_data_folder(tmp_path / "data", tmp_path / "out")
    assert (result.recognised, result.modality, result.notes) == ("MSD data set", "CT", ())
    assert result.modality_reason == "dataset.json says CT"
    assert settings(tmp_path / "out").class_names == ("liver", "yes, tumor: [1]")


def test_nnunet_regions_ignore_label_and_channels_of_one_kind(tmp_path: Path) -> None:
    labels = {"background": 0, "whole tumor": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}
    nnunet(tmp_path / "data", {"0": "T1", "1": "FLAIR"}, labels)
    result = init_data_folder(tmp_path / "data", tmp_path / "out")
    found = settings(tmp_path / "out")
    assert (result.modality, found.sigmoid, found.ignore_label, found.extra_modalities) == ("MRI", True, 4, {})
    assert [(c.name, c.index) for c in found.class_names or () if not isinstance(c, str)] == [
        ("whole tumor", (1, 2, 3)),
        ("core", (2, 3)),
        ("enhancing", (3,)),
    ]


def test_channels_of_two_kinds_become_extra_modalities(tmp_path: Path) -> None:
    nnunet(tmp_path / "data", {"0": "CT", "1": "PET"}, {"background": 0, "tumor": 1})
    init_data_folder(tmp_path / "data", tmp_path / "out")
    found = settings(tmp_path / "out")
    assert (found.modality, found.extra_modalities) == ("CT", {"image_1_pet": "pet"})
    listed = read_datalist(
        tmp_path / "out" / "datalist.json", tmp_path / "data", extra_modalities=tuple(found.extra_modalities)
    )
    assert [p.name for p in listed.training[0].images] == ["n0_0000.nii.gz", "n0_0001.nii.gz"]


HOSTILE = (
    "\n",
    "\r",
    "\r\n",
    "\u2028",
    "\u2029",
    "\x85",
    "\x0b",
    "\x0c",
    "\x1b[2J",
    "\u202e",
    "\t",
    ": ",
    " #",
    "'",
    '"',
    "]",
    "{",
    "\\n",
)
"""What ends a line, a value or a comment in YAML, or hides text from who reads it."""


@pytest.mark.parametrize("end", HOSTILE)
def test_text_of_a_data_set_is_text_in_input_yaml(tmp_path: Path, end: str) -> None:
    modality, name = f"XR{end}num_fold: 7{end}seed: 9", f"liver{end}sigmoid: true"
    root = nnunet(tmp_path / "data", {"0": modality}, {"background": 0, name: 1, "yes": 2})
    result = init_data_folder(root, tmp_path / "out")
    text = (tmp_path / "out" / "input.yaml").read_bytes().decode()
    read, origins, _ = read_with_origins(tmp_path / "out" / "input.yaml", Settings)
    given = {key for key, origin in origins.items() if origin != "default" and "." not in key}
    assert given == {"modality", "datalist", "dataroot", "class_names"}
    assert (read.modality, read.class_names) == (modality, (name, "yes"))
    assert yaml.safe_load(text)["modality"] == modality
    assert [line[:11] for line in str(result).splitlines()] == [
        "Recognised:", "Cases:     ", "Classes:   ", "Modality:  ", "Wrote:     ", "Next:      "
    ]  # fmt: skip
    assert text == printable(text).replace("\r", "")
    assert len(text.splitlines()) == text.count("\n")
    assert modality in result.modality_reason


def test_existing_files_are_kept_without_force(tmp_path: Path) -> None:
    data = pairs(tmp_path / "data")
    (data / "input.yaml").write_text("mine")
    with pytest.raises(ConfigError) as caught:
        init_data_folder(data, data)
    assert str(caught.value) == (
        f"{data / 'input.yaml'}: exists already. Give another folder with --output, or --force to replace it."
    )
    assert (data / "input.yaml").read_text() == "mine"
    assert not (data / "datalist.json").exists()
    assert init_data_folder(data, data, force=True).num_training == 5
    assert settings(data).dataroot == Path(".")


def test_force_looks_through_the_folder_anew(tmp_path: Path) -> None:
    data = pairs(tmp_path / "data")
    init_data_folder(data, data)
    pairs(data, num=7)
    assert init_data_folder(data, data, force=True).num_training == 7


def test_a_list_in_the_folder_is_the_source_for_another_folder(tmp_path: Path) -> None:
    make_phantoms(tmp_path / "data", num_cases=4, num_testing=1, shape=(24, 24, 24), num_fold=2)
    result = init_data_folder(tmp_path / "data", tmp_path / "out")
    assert (result.recognised, result.num_training, result.num_testing, result.num_fold) == ("datalist.json", 4, 1, 2)
    assert settings(tmp_path / "out").class_names == ("sphere", "box")


def test_few_cases_have_as_many_folds(tmp_path: Path) -> None:
    assert init_data_folder(pairs(tmp_path / "data", num=3), tmp_path / "out").num_fold == 3


def test_nothing_is_written_when_something_is_wrong(tmp_path: Path) -> None:
    data = pairs(tmp_path / "data", num=3)
    with pytest.raises(ConfigError) as caught:
        init_data_folder(data, tmp_path / "out", num_fold=5)
    assert str(caught.value) == ("num_fold: 5 folds cannot be made of 3 training cases. Set num_fold: 3, or add cases.")
    (data / "images" / "p0.nii.gz").write_bytes(b"broken")
    with pytest.raises(DataError, match="6 bytes are too few for a NIfTI header"):
        init_data_folder(data, tmp_path / "out", num_fold=3)
    assert not (tmp_path / "out").exists()
