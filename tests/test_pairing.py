"""Which prediction is scored against which label, and what a score leaves out."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from autoseg.cli.main import run_command
from autoseg.data.datalists.names import loose_key, unique_names
from autoseg.data.formats.table import stem_of
from autoseg.data.grid import Grid
from autoseg.data.volumes import write_volume
from autoseg.errors import ConfigError, DataError
from autoseg.evaluation.folders import evaluate
from autoseg.inference.items import find_items

SHAPE = (8, 7, 6)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (("a_T1", "a_FLAIR", "b_T1", "b_FLAIR"), {"a": "a_FLAIR a_T1", "b": "b_FLAIR b_T1"}),
        (("a_T1", "a_T2", "a_FLAIR", "a_seg"), {"a": "a_FLAIR a_T1", "a_T2": "a_T2"}),
        (("a_T1", "b_FLAIR"), {"a_T1": "a_T1", "b_FLAIR": "b_FLAIR"}),  # each lacks one, as reading it will say
        (("p1/T1", "p1/FLAIR", "p1/seg", "p2/T1", "p2/FLAIR"), {"p1": "p1/FLAIR p1/T1", "p2": "p2/FLAIR p2/T1"}),
        (("c_0001", "c_0000"), {"c": "c_0000 c_0001"}),
        (("case_0001", "case_0002"), {"case_0001": "case_0001", "case_0002": "case_0002"}),
        (("whole", "c_seg"), {"whole": "whole", "c_seg": "c_seg"}),
    ],
)
def test_files_of_an_image_are_known_by_the_words_of_training(
    files: tuple[str, ...], expected: dict[str, str], tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.nii.gz").touch()
    items = find_items(tmp_path, tmp_path / "out", 2, "nifti", ("flair", "t1"))
    found = {i.name: " ".join(str(p.relative_to(tmp_path)).removesuffix(".nii.gz") for p in i.images) for i in items}
    assert found == expected
    first = items[0]
    (alone,) = find_items(first.images[-1], tmp_path / "out", 2, "nifti", ("flair", "t1"))
    assert alone.images == first.images


def write_label(path: Path, *values: int) -> Path:
    """A label file with a block of each value."""
    label = np.zeros(SHAPE, np.uint16)
    for i, value in enumerate(values):
        label[2 * i : 2 * i + 2, 1:5, 1:5] = value
    write_volume(path, label, Grid(shape=SHAPE, affine=np.eye(4)))
    return path


def folders_of(root: Path, preds: tuple[str, ...], labels: tuple[str, ...]) -> tuple[Path, Path]:
    """Equal files in two folders, so that every pair scores 1."""
    for folder, names in (("preds", preds), ("labels", labels)):
        for name in names:
            write_label(root / folder / f"{name}.nii.gz", 1)
    return root / "preds", root / "labels"


# -- names


@pytest.mark.parametrize(
    "stem",
    ["Patient 1", "Müller_Jörg", "患者一", "scan (2) [copy]", "-x", "a.b+c=d~e", "{a}$b#c", "हिन्दी", "a'b", "[1,2]"],
)
def test_names_that_a_file_can_have_are_kept(stem: str, tmp_path: Path) -> None:
    assert unique_names([Path(f"{stem}_0000.nii.gz")]) == [stem]
    (item,) = find_items(tmp_path / f"{stem}.nii.gz", tmp_path / "out", 1)
    assert item.target.name == f"{stem}.nii.gz"


@pytest.mark.parametrize(
    ("stem", "name"),
    [("a:b", "a_b"), ("a\\b", "a_b"), ("a\nb", "a_b"), (".hidden", "hidden"), ("a\u202eb", "a_b"), ("a\udcffb", "a_b")],
)
def test_names_that_a_file_cannot_have_are_known_again(stem: str, name: str) -> None:
    """What another file system or a terminal would not stand; `evaluate` finds it by its rule."""
    assert unique_names([Path(f"{stem}.nii.gz")]) == [name]
    assert loose_key(stem) == loose_key(name)


def test_a_label_that_evaluate_will_not_find_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.nii.gz", "a.nii", "b.nii.gz"):
        write_label(tmp_path / "images" / name, 1)
    with caplog.at_level(logging.WARNING):
        items = find_items(tmp_path / "images", tmp_path / "out", 1)
    assert [item.name for item in items] == ["a_1", "a_2", "b"]
    assert [r.getMessage().split(": another image has this name")[0] for r in caplog.records] == [
        str(tmp_path / "images" / name) for name in ("a.nii", "a.nii.gz")
    ]


# -- pairs


@pytest.mark.parametrize(
    ("short", "long"), [("pat_1", "pat_1_2"), ("s_1", "s_1_1"), ("X_001", "X_001_followup"), ("a", "a_0001")]
)
def test_a_case_is_not_scored_with_another_whose_name_goes_on(tmp_path: Path, short: str, long: str) -> None:
    found = evaluate(*folders_of(tmp_path, (long,), (short, long)))
    assert found.missing == (f"{short}.nii.gz",)
    assert found.scores["dice"] == {short: [0.0], long: [1.0]}
    assert {name: path.name for name, path in found.predictions.items()} == {long: f"{long}.nii.gz"}


@pytest.mark.parametrize(
    ("pred", "label"),
    [
        ("Case_1", "case_1"),
        ("case 1", "case_1"),
        ("case_1_seg", "case_1"),
        ("case_1", "case_1_label"),
        ("la_003_image", "la_003_label"),
        ("case_1", "case_1_0000"),
        ("Mu\u0308ller", "M\u00fcller"),  # as macOS stores it
    ],
)
def test_a_pair_by_the_rule_scores_and_is_told(tmp_path: Path, pred: str, label: str, capsys) -> None:
    preds, labels = folders_of(tmp_path, (pred, "zzz"), (label,))
    out = tmp_path / "scores.json"
    assert run_command(["evaluate", "--predictions", str(preds), "--labels", str(labels), "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"{label}.nii.gz with {pred}.nii.gz" in printed
    assert "No label, not scored: zzz.nii.gz" in printed
    found = json.loads(out.read_text())
    assert found["dice"]["mean"] == 1.0
    assert found["predictions"] == {label: str(preds / f"{pred}.nii.gz")}
    assert len(found["notes"]) == 2


def test_an_exact_name_comes_first_on_both_sides(tmp_path: Path) -> None:
    found = evaluate(*folders_of(tmp_path, ("a", "A", "a_seg"), ("a", "A")))
    assert {name: path.name for name, path in found.predictions.items()} == {"a": "a.nii.gz", "A": "A.nii.gz"}
    assert not any(note.startswith("Paired") for note in found.notes)


def test_what_may_belong_to_two_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        evaluate(*folders_of(tmp_path, ("a_pred", "b_seg", "b_pred", "c"), ("a", "A", "b", "c")))
    first, second = sorted(caught.value.messages)
    assert "A.nii.gz and a.nii.gz" in first
    assert "may belong to either" in first
    assert "may both belong to it" in second


def test_no_pair_at_all_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preds, labels = folders_of(tmp_path, ("x", "患者一"), ("a", "患者二"))
    assert run_command(["evaluate", "--predictions", str(preds), "--labels", str(labels)]) == 2
    assert "none of the 2 files in" in (told := capsys.readouterr().err)
    assert "found x.nii.gz and labels such as a.nii.gz" in told


def test_two_labels_of_one_name_are_a_fault(tmp_path: Path) -> None:
    preds, labels = folders_of(tmp_path, ("a",), ("a",))
    write_label(labels / "a.nii", 1)
    with pytest.raises(DataError, match=r"a\.nii and a\.nii\.gz are labels of one case\. Keep one"):
        evaluate(preds, labels)


# -- values


def test_raw_images_are_no_labels(tmp_path: Path) -> None:
    preds, labels = folders_of(tmp_path, ("a",), ("a",))
    noise = np.random.default_rng(0).integers(0, 3000, SHAPE).astype(np.uint16)
    for folder in (preds, labels):
        write_volume(folder / "a.nii.gz", noise, Grid(shape=SHAPE, affine=np.eye(4)))
        for classes in (("1",), None):
            with pytest.raises(DataError, match="different values, .*: an image, no label map") as caught:
                evaluate(preds, labels, classes=classes)
            assert str(folder) in caught.value.messages[0]
            assert len(caught.value.messages) == 1
        write_label(folder / "a.nii.gz", 1)


def test_a_map_of_many_regions_is_no_image(tmp_path: Path) -> None:
    label = np.repeat(np.arange(1, 126, dtype=np.uint16), 27).reshape(125, 3, 3, 3)
    blocks = label.reshape(5, 5, 5, 3, 3, 3).transpose(0, 3, 1, 4, 2, 5).reshape(15, 15, 15)
    write_volume(tmp_path / "a.nii.gz", blocks, Grid(shape=blocks.shape, affine=np.eye(4)))
    assert len(evaluate(tmp_path, tmp_path).classes) == 125


def test_values_that_are_left_out_are_told(tmp_path: Path) -> None:
    preds, labels = tmp_path / "preds", tmp_path / "labels"
    write_label(labels / "a.nii.gz", 1, 2, 255)
    write_label(preds / "a.nii.gz", 1, 7)
    (left,) = evaluate(labels, labels).notes
    assert left.startswith(f"Labels hold values of no class, not scored: 255 (first in {labels / 'a.nii.gz'})")
    named, foreign, absent = evaluate(preds, labels, classes=("liver", "spleen", "kidney")).notes
    assert "not scored: 255 (first in" in named
    assert "no label and no class has, not scored: 7 (first in" in foreign
    assert absent.startswith("In no label and no prediction: kidney (3).")
    (two,) = evaluate(labels, labels, classes=("liver",)).notes
    assert "not scored: 2, 255 (first in" in two


def test_masks_of_255_say_what_to_do(tmp_path: Path) -> None:
    preds, labels = tmp_path / "preds", tmp_path / "labels"
    for folder in (preds, labels):
        write_label(folder / "a.nii.gz", 255)
    with pytest.raises(DataError, match=r"the labels hold 0, 255 alone, .* If it is a class, give --classes 255\."):
        evaluate(preds, labels)
    assert evaluate(preds, labels, classes=("255",)).scores["dice"] == {"a": [1.0]}


@pytest.mark.parametrize(("classes", "message"), [(("a", ""), "a name is empty"), (("a", "2"), "both names and label")])
def test_classes_that_are_none(tmp_path: Path, classes: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(*folders_of(tmp_path, ("a",), ("a",)), classes=classes)


@pytest.mark.parametrize("name", ["a.seg.dcm", "a.rtstruct.dcm", "a.seg.nrrd", "a.mha"])
def test_what_predict_writes_pairs_with_labels_of_the_images_name(name: str) -> None:
    assert loose_key(stem_of(Path(name))) == loose_key(stem_of(Path("A.nii.gz")))


def test_images_below_a_folder_are_told_of(tmp_path: Path) -> None:
    (tmp_path / "p1").mkdir()
    (tmp_path / "p1" / "ct.nii.gz").touch()
    with pytest.raises(ConfigError) as caught:
        find_items(tmp_path, tmp_path / "out", 1)
    assert str(caught.value).endswith(
        f"Below it are some, such as {tmp_path}/p1/ct.nii.gz: give a .txt file with the path of one on each line."
    )
