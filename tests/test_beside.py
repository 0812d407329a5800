"""Images beside their labels, and channels in pairs of folders: which files are a case, and what is left out."""

from __future__ import annotations

import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from layout_folders import groups, message, touch

from autoseg.data.datalists.layouts import find_layout, recognise


def channels_of(root: Path) -> dict[str, list[str]]:
    """Label -> images, as paths below the folder."""
    data = recognise(root, num_fold=None)
    return {
        c.label.relative_to(root).as_posix(): [p.relative_to(root).as_posix() for p in c.images]
        for c in data.training
        if c.label
    }


def test_channels_in_a_folder_for_each_case(tmp_path: Path) -> None:
    """BraTS' layout; the last case lacks a channel, the one before a label."""
    words = ("t2", "t1ce", "flair", "t1")
    touch(tmp_path, *(f"B_{c}/B_{c}_{w}.nii.gz" for c in range(12) for w in (*words, "seg")))
    touch(tmp_path, *(f"B_12/B_12_{w}.nii.gz" for w in words), *(f"B_13/B_13_{w}.nii.gz" for w in ("t1", "t2", "seg")))
    layout = find_layout(tmp_path)
    assert layout.kind == "folder of cases with labels"
    assert channels_of(tmp_path) == {
        f"B_{c}/B_{c}_seg.nii.gz": [f"B_{c}/B_{c}_{w}.nii.gz" for w in ("flair", "t1", "t1ce", "t2")] for c in range(12)
    }
    assert [len(item["image"]) for item in layout.plain["unlabeled"]] == [4]
    assert layout.plain["modality"] == {"0": "flair", "1": "t1", "2": "t1ce", "3": "t2"}
    assert layout.notes == (
        "each case has 4 channels: flair, t1, t1ce, t2 (`image` in datalist.json).",
        "left out, cases without all channels (flair, t1, t1ce, t2), or of labels alone: B_13.",
    )


@pytest.mark.parametrize(
    "names",
    [
        ("{c}/T1.nii.gz", "{c}/FLAIR.nii.gz", "{c}/wmh.nii.gz"),  # the WMH challenge
        ("{c}/FLAIR_{c}.nii.gz", "{c}/T1_{c}.nii.gz", "{c}/mask_{c}.nii.gz"),
        ("{c}/orig/T1.nii.gz", "{c}/orig/FLAIR.nii.gz", "{c}/orig/mask.nii.gz"),
        ("{c}/brain_FLAIR.nii.gz", "{c}/brain_T1.nii.gz", "{c}/brainmask.nii.gz", "{c}/lesion.nii.gz"),
        ("{c}_flair.mha", "{c}_t1.mha", "{c}_seg.mha"),
        ("{c}-FLAIR.nrrd", "{c}-T1.nrrd", "{c}.seg.nrrd"),
        ("{c}_0000.nii.gz", "{c}_0001.nii.gz", "{c}_seg.nii.gz"),
        ("images/{c}_flair.nii.gz", "images/{c}_t1.nii.gz", "labels/{c}.nii.gz"),
        ("images/{c}_FLAIR.nii.gz", "images/{c}_T1.nii.gz", "labels/{c}_seg.nii.gz"),
        (
            "sub-{c}/anat/sub-{c}_FLAIR.nii.gz",
            "sub-{c}/anat/sub-{c}_T1w.nii.gz",
            "derivatives/lesions/sub-{c}/anat/sub-{c}_label-lesion_mask.nii.gz",
            "derivatives/bet/sub-{c}/anat/sub-{c}_desc-brain_mask.nii.gz",
            "derivatives/bet/sub-{c}/anat/sub-{c}_desc-brain_T1w.nii.gz",
        ),
        (
            "rawdata/sub-{c}/ses-1/sub-{c}_ses-1_adc.nii.gz",
            "rawdata/sub-{c}/ses-1/sub-{c}_ses-1_dwi.nii.gz",
            "derivatives/sub-{c}/ses-1/sub-{c}_ses-1_msk.nii.gz",  # ISLES 2022
        ),
    ],
    ids=lambda names: names[-1],
)
def test_two_channels_in_other_layouts(names: tuple[str, ...], tmp_path: Path) -> None:
    touch(tmp_path, *(name.format(c=c) for c in "abcde" for name in names))
    found = channels_of(tmp_path)
    assert sorted(found.values()) == [sorted(name.format(c=c) for name in names[:2]) for c in "abcde"]
    label = next(name for name in names if re.search(r"wmh|seg|label|msk|lesion|mask_|/mask", name))
    assert sorted(found) == [label.format(c=c) for c in "abcde"]
    assert find_layout(tmp_path).notes[0].startswith("each case has 2 channels: ")


def test_one_image_beside_its_label_in_one_folder(tmp_path: Path) -> None:
    touch(tmp_path, *(f"case_{c:04d}{e}.nii.gz" for c in range(5) for e in ("", "_seg")), "case_0007.nii.gz")
    assert channels_of(tmp_path) == {f"case_{c:04d}_seg.nii.gz": [f"case_{c:04d}.nii.gz"] for c in range(5)}
    assert find_layout(tmp_path).kind == "folder of images beside labels"
    assert [c.name for c in recognise(tmp_path).unlabeled] == ["case_0007"]


def test_frames_with_a_label_each_in_a_folder(tmp_path: Path) -> None:
    """ACDC's layout; the film has no label."""
    frames = [f"p{p}/p{p}_frame{f:02d}" for p in range(5) for f in (1, 12 - p)]
    touch(tmp_path, *(f"{f}{e}.nii.gz" for f in frames for e in ("", "_gt")))
    touch(tmp_path, *(f"p{p}/p{p}_4d.nii.gz" for p in range(5)))
    data = recognise(tmp_path)
    assert channels_of(tmp_path) == {f"{f}_gt.nii.gz": [f"{f}.nii.gz"] for f in frames}
    assert {c.group for c in data.training} == {f"p{p}" for p in range(5)}
    assert data.unlabeled == ()
    assert find_layout(tmp_path).notes[1] == (
        "left out, images without a label, beside or below some with one: p0/p0_4d.nii.gz, p1/p1_4d.nii.gz, "
        "p2/p2_4d.nii.gz, p3/p3_4d.nii.gz, p4/p4_4d.nii.gz."
    )


@pytest.mark.parametrize(
    ("names", "image", "label", "note"),
    [
        (("volume-{c}", "segmentation-{c}"), "volume-{c}", "segmentation-{c}", ""),  # LiTS
        (("{c}/{c}_ana", "{c}/{c}_seg_ana", "{c}/{c}_ana_brainmask"), "{c}/{c}_ana", "{c}/{c}_seg_ana", ""),  # IBSR
        (("{c}/my_roi", "{c}/label"), "{c}/my_roi", "{c}/label", ""),
        (("{c}", "{c}_seg", "{c}_pred"), "{c}", "{c}_seg", "left out, called like predictions: 5 files."),
        (
            ("{c}/image", "{c}/segmentation", "{c}/instances/kidney_annotation-1"),  # KiTS23
            "{c}/image",
            "{c}/segmentation",
            "left out, images without a label, beside or below some with one: 000/instances/kidney_annotation-1.nii.gz",
        ),
        (
            ("images/{c}/{c}_9_t2w", "images/{c}/{c}_9_adc", "images/{c}/{c}_9_cor", "labels/{c}_9"),  # PI-CAI
            "images/{c}/{c}_9_adc images/{c}/{c}_9_t2w",
            "labels/{c}_9",
            "left out, images without a label that lack channels, or are no channel: images/000/000_9_cor.nii.gz, ",
        ),
        (
            ("{c}/{c}_FLAIR", "{c}/{c}_T1", "{c}/{c}_T1_bias", "{c}/{c}_tumor_seg"),  # UCSF-PDGM
            "{c}/{c}_FLAIR {c}/{c}_T1",
            "{c}/{c}_tumor_seg",
            "left out, images of no known kind: t1_bias. To learn from them, list them in datalist.json.",
        ),
        (
            ("imagesTr/{c}__CT", "imagesTr/{c}__PT", "labelsTr/{c}"),
            "imagesTr/{c}__CT imagesTr/{c}__PT",
            "labelsTr/{c}",
            "",
        ),
        (("images/{c}/t1", "images/{c}/t2", "labels/{c}/seg"), "images/{c}/t1 images/{c}/t2", "labels/{c}/seg", ""),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_layouts_of_public_data_sets(names: tuple[str, ...], image: str, label: str, note: str, tmp_path: Path) -> None:
    cases = [f"00{c}" for c in range(5)]
    touch(tmp_path, *(f"{name.format(c=c)}.nii.gz" for c in cases for name in names))
    assert channels_of(tmp_path) == {
        f"{label.format(c=c)}.nii.gz": [f"{i.format(c=c)}.nii.gz" for i in image.split()] for c in cases
    }
    assert recognise(tmp_path).unlabeled == ()
    assert not note or any(n.startswith(note) for n in find_layout(tmp_path).notes)


def test_channels_of_pairs_are_in_one_order_and_nothing_is_mixed(tmp_path: Path) -> None:
    """Upper case sorts before lower case; cases that lack a channel are left out; files of two patients are none."""
    words = [("T1", "flair"), ("t1", "flair"), ("T1", "FLAIR")] * 6
    touch(tmp_path / "a", *(f"images/{c}_{w}.nii.gz" for c, pair in enumerate(words) for w in pair))
    touch(tmp_path / "a", *(f"labels/{c}.nii.gz" for c in range(19)), "images/18_t1.nii.gz", "images/18_t2.nii.gz")
    found = channels_of(tmp_path / "a")
    assert found == {
        f"labels/{c}.nii.gz": [f"images/{c}_{w}.nii.gz" for w in pair[::-1]] for c, pair in enumerate(words)
    }
    assert find_layout(tmp_path / "a").notes == (
        "each case has 2 channels: flair, t1 (`image` in datalist.json).",
        "left out, cases without all channels (flair, t1): labels/18.nii.gz.",
        "left out, images that not all cases have, or of another grid: t2.",
    )
    touch(tmp_path / "b", *(f"images/site{s}/{c}.nii.gz" for s in "AB" for c in range(3)))
    touch(tmp_path / "b", *(f"labels/{c}.nii.gz" for c in range(3)))
    assert message(tmp_path / "b").startswith(
        "ROOT/labels: several images for 0.nii.gz: images/siteA/0.nii.gz, images/s"
    )


def test_test_images_have_the_channels_of_training(tmp_path: Path) -> None:
    pairs = [f"{f}Tr/{c}_{w}.nii.gz" for f in ("images", "labels") for c in range(5) for w in ("ct", "mr")]
    touch(tmp_path / "a", *pairs, "imagesTs/9_ct.nii.gz", "imagesTs/9_mr.nii.gz")
    assert [len(c.images) for c in recognise(tmp_path / "a").testing] == [1, 1]
    touch(tmp_path / "b", *(f"imagesTr/{c}_{w}.nii.gz" for c in range(5) for w in ("CT", "PT")))
    touch(tmp_path / "b", *(f"labelsTr/{c}.nii.gz" for c in range(5)))
    touch(tmp_path / "b", "imagesTs/9_PT.nii.gz", "imagesTs/9_CT.nii.gz", "imagesTs/10_CT.nii.gz")
    assert [[p.name for p in c.images] for c in recognise(tmp_path / "b").testing] == [["9_CT.nii.gz", "9_PT.nii.gz"]]
    assert find_layout(tmp_path / "b").notes[1].endswith("lack channels, or are no channel: imagesTs/10_CT.nii.gz.")


def test_sessions_in_folders_alone_are_not_mixed(tmp_path: Path) -> None:
    """The label of one session is not that of another's image."""
    for c in range(5):
        touch(tmp_path, *(f"sub-{c}/ses-{s}/anat/sub-{c}_T1w.nii.gz" for s in (1, 2)))
        touch(tmp_path, f"sub-{c}/ses-1/anat/sub-{c}_seg.nii.gz")
    where = "sub-{}/ses-1/anat/sub-{}_{}.nii.gz"
    assert channels_of(tmp_path) == {where.format(c, c, "seg"): [where.format(c, c, "T1w")] for c in range(5)}


def test_an_image_made_of_another_is_no_channel_and_dropped_labels_are_told_of(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{c}/{n}.nii.gz" for c in range(5) for n in ("T1w", "T1w_brain", "brain_mask", "lesion_mask")))
    assert channels_of(tmp_path)["0/lesion_mask.nii.gz"] == ["0/T1w.nii.gz"]
    notes = find_layout(tmp_path).notes
    assert "left out, images of no known kind: t1w_brain. To learn from them, list them in datalist.json." in notes
    assert notes[-1].startswith("left out, labels beside others, such as masks of the brain: 0/brain_mask.nii.gz, 1/")


def test_an_image_beside_one_that_has_the_label_is_no_case_of_its_own(tmp_path: Path) -> None:
    touch(tmp_path, *(f"p{c}_{n}.nii.gz" for c in range(5) for n in ("ct", "pet", "ct_seg")), "p9_ct.nii.gz")
    assert channels_of(tmp_path) == {f"p{c}_ct_seg.nii.gz": [f"p{c}_ct.nii.gz"] for c in range(5)}
    assert [c.name for c in recognise(tmp_path).unlabeled] == ["p9_ct"]
    assert (
        find_layout(tmp_path)
        .notes[0]
        .startswith("left out, images without a label, beside or below some with one: p0_pet.nii.gz, p1_pet.nii.gz, ")
    )


def test_the_way_with_most_cases_is_taken(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{c}{e}.nii.gz" for c in range(8) for e in ("", "_seg")))
    touch(tmp_path, *(f"extra/{c}/{n}.nii.gz" for c in "ab" for n in ("ct", "seg")))
    assert len(recognise(tmp_path).training) == 8


def test_all_cases_in_one_folder_are_told_of(tmp_path: Path) -> None:
    touch(tmp_path, *(f"training/c_{c}_{name}.nii.gz" for c in range(5) for name in ("ceT1", "hrT2", "Label")))
    assert message(tmp_path) == "ROOT: all cases are in training/. Give that folder, if those in it are patients."
    assert set(map(len, channels_of(tmp_path / "training").values())) == {2}


def test_images_that_few_cases_have_are_no_channels(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{c}/{name}.nii.gz" for c in "abcde" for name in ("t1", "t2", "seg")), "a/swi.nii.gz")
    assert channels_of(tmp_path)["a/seg.nii.gz"] == ["a/t1.nii.gz", "a/t2.nii.gz"]
    assert find_layout(tmp_path).notes[1] == "left out, images that not all cases have: swi (1 case)."


def write(path: Path, shape: tuple[int, int, int] = (8, 8, 8), *, label: bool = False) -> None:
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image((values > 0).astype(np.uint8) if label else values, np.eye(4)), path)


def test_what_lies_on_another_grid_or_looks_like_a_label_is_no_channel(tmp_path: Path) -> None:
    for case in "abcde":
        for name in ("one", "two"):
            write(tmp_path / case / f"{name}.nii.gz")
        write(tmp_path / case / "three.nii.gz", (9, 9, 9))
        write(tmp_path / case / "liver.nii.gz", label=True)
        write(tmp_path / case / "seg.nii.gz", label=True)
    assert channels_of(tmp_path)["a/seg.nii.gz"] == ["a/one.nii.gz", "a/two.nii.gz"]
    assert find_layout(tmp_path).notes == (
        "each case has 2 channels: one, two (`image` in datalist.json).",
        "left out, images that hold few whole numbers, as labels do: liver. If they are masks of classes, put all of a "
        "case into a folder masks/.",
        "left out, images that do not lie on their label's grid: three, as in a/three.nii.gz (shape (9, 9, 9) against "
        "(8, 8, 8)). Resample them to it to learn from them.",
    )


def test_a_mask_is_not_taken_for_the_image_of_its_label(tmp_path: Path) -> None:
    for case in "abc":
        write(tmp_path / case / "ct.nii.gz")
        for name in ("liver", "liver_mask"):
            write(tmp_path / case / f"{name}.nii.gz", label=True)
    assert message(tmp_path) == (
        "ROOT/a/liver.nii.gz: its label would be liver_mask.nii.gz, by its name, but it looks like a label itself: it "
        "holds few whole numbers. List the cases in a datalist.json."
    )


def test_masks_in_a_folder_are_the_label_where_a_map_lies_beside_them(tmp_path: Path) -> None:
    """AbdomenAtlas' layout."""
    organs = ("liver", "spleen")
    for case in "abcde":
        touch(tmp_path, f"{case}/ct.nii.gz", f"{case}/combined_labels.nii.gz")
        touch(tmp_path, *(f"{case}/segmentations/{o}.nii.gz" for o in organs))
    assert find_layout(tmp_path).kind == "folder of cases with masks"
    assert find_layout(tmp_path).plain["training"][0] == {"image": "a/ct.nii.gz", "label": "a/segmentations"}


# -- folders of patients


def test_images_beside_their_labels(tmp_path: Path) -> None:
    visits = [f"p{p}/visit{v}" for p in range(5) for v in (1, 2)]
    touch(tmp_path, *(f"{v}/{f}.nii.gz" for v in visits for f in ("image", "label")))
    touch(tmp_path, "p5/visit1/image.nii.gz", "p6/a.nii.gz", "p6/b.nii.gz")
    data = recognise(tmp_path)
    assert find_layout(tmp_path).kind == "folder of cases with labels"
    assert groups(tmp_path) == {f"{v}/label.nii.gz": v[:2] for v in visits}
    assert all(len({c.fold for c in data.training if c.group == f"p{p}"}) == 1 for p in range(5))
    assert [c.group for c in data.unlabeled] == ["p5"]
    assert [note[:40] for note in find_layout(tmp_path).notes] == [
        "11 cases lie in the folders of 6 patient",
        "left out, folders of several images, or ",
    ]


def test_a_folder_for_each_case_is_no_group(tmp_path: Path) -> None:
    touch(tmp_path, *(f"c{c}/c{c}_{f}.nii.gz" for c in range(3) for f in ("ct", "seg")))
    assert groups(tmp_path) == {f"c{c}/c{c}_seg.nii.gz": None for c in range(3)}
    assert [p.name for p in recognise(tmp_path, num_fold=None).training[0].images] == ["c0_ct.nii.gz"]


def test_folders_of_sites_are_no_patients(tmp_path: Path) -> None:
    touch(tmp_path, *(f"site{s}/{c}/{f}.nii.gz" for s in (1, 2) for c in "abc" for f in ("image", "label")))
    assert set(groups(tmp_path).values()) == {None}
    assert find_layout(tmp_path).notes[0].startswith("the folders site1/, site2/ are not taken for patients, by their ")


def test_images_beside_labels_that_are_unclear(tmp_path: Path) -> None:
    one = touch(tmp_path / "a", *(f"data/p{p}/{f}.nii.gz" for p in (1, 2) for f in ("image", "label")))
    assert message(one) == "ROOT: all cases are in data/. Give that folder, if those in it are patients."
    several = touch(tmp_path / "b", *(f"p{p}/{f}.nii.gz" for p in (1, 2) for f in ("t1", "t1_mask", "my_seg")))
    assert message(several) == (
        "ROOT: more than one image or label of a case: p1/ (t1.nii.gz, my_seg.nii.gz, t1_mask.nii.gz), p2/ "
        "(t1.nii.gz, my_seg.nii.gz, t1_mask.nii.gz). Expected one label, and one image or images that are called "
        "alike in all cases, such as t1 and flair. Put masks of one case into a folder masks/; list other cases in a "
        "datalist.json."
    )
    unlike = touch(tmp_path / "d", *(f"p{p}/{f}.nii.gz" for p in (1, 2) for f in (f"a{p}", f"b{p}", "seg")))
    assert message(unlike).startswith("ROOT: more than one image or label of a case: p1/ (a1.nii.gz, b1.nii.gz, ")
    shares = touch(tmp_path / "c", *(f"{s}/a/{f}.nii.gz" for s in ("train", "test") for f in ("image", "label")))
    assert message(shares).startswith("ROOT: the folders test/, train/ look like shares of a data set, not like ")
