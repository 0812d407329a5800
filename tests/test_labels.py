"""Label maps: files' values to targets and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoseg.data.labels import IGNORE, UNSURE, UNSURE_VALUE, LabelMap
from autoseg.errors import ConfigError


def brats(ignore_label: int | None = None) -> LabelMap:
    """Nested regions: whole tumor, core, enhancing."""
    return LabelMap(
        names=("whole", "core", "enhancing"), values=((1, 2, 4), (1, 4), (4,)), sigmoid=True, ignore_label=ignore_label
    )


@given(
    values=st.lists(st.integers(1, 65534), min_size=1, max_size=9, unique=True),
    ignore=st.booleans(),
    seed=st.integers(0, 100),
)
def test_exclusive_classes_come_back_with_gaps(values: list[int], ignore: bool, seed: int) -> None:
    marked = values.pop() if ignore and len(values) > 1 else None
    labels = LabelMap(names=tuple(f"c{v}" for v in values), values=tuple((v,) for v in values), ignore_label=marked)
    label = np.random.default_rng(seed).choice(sorted(labels.known_values), (3, 4, 5)).astype(labels.dtype)
    target = labels.encode(label)
    assert target.shape == (1, 3, 4, 5)
    assert target.dtype == np.uint8
    assert set(np.unique(target)) <= {*range(labels.num_outputs), IGNORE}
    np.testing.assert_array_equal(labels.decode(target), label)
    assert labels.decode(target).dtype == labels.dtype
    for i, (value, mask) in enumerate(zip(values, labels.masks(label), strict=True)):
        np.testing.assert_array_equal(mask, label == value)
        np.testing.assert_array_equal(target[0] == i + 1, mask)


@given(ignore=st.sampled_from([None, 3, 255]), seed=st.integers(0, 50))
def test_nested_regions_come_back(ignore: int | None, seed: int) -> None:
    labels = brats(ignore)
    label = np.random.default_rng(seed).choice(sorted(labels.known_values), (3, 4, 5)).astype(np.uint8)
    target = labels.encode(label)
    assert target.shape == (3, 3, 4, 5)
    np.testing.assert_array_equal(labels.decode(target), label)
    whole, core, enhancing = labels.masks(label)
    np.testing.assert_array_equal(whole, np.isin(label, (1, 2, 4)))
    assert (enhancing <= core).all()
    assert (core <= whole).all()


VALUE_SETS = st.lists(st.sets(st.integers(1, 6), min_size=1), min_size=2, max_size=5)


@given(sets=VALUE_SETS, seed=st.integers(0, 50))
def test_a_perfect_target_of_overlapping_regions_scores_one(sets: list[set[int]], seed: int) -> None:
    """Whatever the regions share: what is decoded lies in exactly the regions that the target said."""
    names = tuple(f"region_{i}" for i in range(len(sets)))
    labels = LabelMap(names=names, values=tuple(tuple(sorted(s)) for s in sets), sigmoid=True)
    label = np.random.default_rng(seed).choice(sorted(labels.known_values), (4, 5, 6)).astype(np.uint8)
    target = labels.encode(label)
    np.testing.assert_array_equal(labels.encode(labels.decode(target)), target)


def test_the_overlap_of_two_regions_is_written() -> None:
    labels = LabelMap(names=("a", "b"), values=((1, 3), (2, 3)), sigmoid=True)
    target = np.array([[0, 1, 0, 1], [0, 0, 1, 1]], np.uint8)[:, :, None, None]
    assert labels.decode(target).ravel().tolist() == [0, 1, 2, 3]
    assert labels.untold_overlaps == ()
    apart = LabelMap(names=("a", "b"), values=((1,), (2,)), sigmoid=True)
    assert apart.untold_overlaps == (("a", "b"),)
    assert apart.decode(target).ravel().tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize("labels", [brats(255), LabelMap(names=("a",), values=((255,),), ignore_label=3)])
def test_unsure_voxels_mean_the_same_whatever_the_classes_are(labels: LabelMap) -> None:
    target = labels.encode(np.array([[[0, UNSURE_VALUE]]], np.uint16))
    assert (target[..., 0] == 0).all()
    assert (target[..., 1] == UNSURE).all()
    assert not any(mask.any() for mask in labels.masks(np.full((1, 1, 1), UNSURE_VALUE)))


def test_merged_values_are_one_class_and_written_as_the_first() -> None:
    labels = LabelMap(names=("kidney", "tumor"), values=((1, 5), (2,)))
    label = np.array([[[0, 1, 5, 2]]], np.uint8)
    assert labels.encode(label).ravel().tolist() == [0, 1, 1, 2]
    assert labels.decode(labels.encode(label)).ravel().tolist() == [0, 1, 1, 2]


def test_unknown_values_become_background() -> None:
    labels = LabelMap(names=("a",), values=((7,),))
    assert labels.encode(np.array([[[7, 8, 300, -1]]])).ravel().tolist() == [1, 0, 0, 0]


def test_ignored_voxels_belong_to_no_class() -> None:
    labels = LabelMap(names=("a",), values=((1,),), ignore_label=9)
    assert labels.encode(np.array([[[0, 1, 9]]])).ravel().tolist() == [0, 1, IGNORE]
    assert labels.masks(np.array([[[0, 1, 9]]]))[0].ravel().tolist() == [False, True, False]


def test_a_region_inside_another_is_no_part_of_it() -> None:
    regions = LabelMap(names=("whole", "core"), values=((1, 2), (2,)), sigmoid=True)
    assert regions.parts("whole") == ("whole",)
    assert regions.wholly(("whole",)) == ("whole",)


def test_dtype_is_the_smallest() -> None:
    assert LabelMap(names=("a",), values=((255,),)).dtype is np.uint8
    assert LabelMap(names=("a",), values=((256,),)).dtype is np.uint16


def test_left_and_right_are_paired() -> None:
    names = ("kidney_left", "liver", "kidney_right", "Right lung", "Left lung", "rib_l_3", "rib_r_3", "left atrium")
    labels = LabelMap(names=names, values=tuple((i + 1,) for i in range(len(names))))
    assert [(p.left, p.right, p.shared) for p in labels.sided_pairs] == [
        (0, 2, "kidney"),
        (4, 3, "lung"),
        (5, 6, "rib_3"),
    ]


@pytest.mark.parametrize(
    ("names", "values", "extra", "text"),
    [
        (("a", "b"), ((1,),), {}, "class_names: 2 names for 1 sets of label values."),
        (("a", "a"), ((1,), (2,)), {}, "class_names: a is named twice. Give each class its own name."),
        (("a", " "), ((1,), (2,)), {}, "class_names: a name is empty. Give each class a name."),
        (("a",), ((70000,),), {}, "class_names: label values must lie in 0..65534, found [70000]."),
        (("a",), ((65535,),), {}, "class_names: label values must lie in 0..65534, found [65535]."),
        (
            tuple(f"c{v}" for v in range(1, 255)),
            tuple((v,) for v in range(1, 255)),
            {},
            "class_names: 254 classes. Expected at most 253.",
        ),
        (
            ("a", "b"),
            ((1, 2), (2,)),
            {},
            "class_names: label value 2 belongs to more than one class. Set sigmoid: true for overlapping regions.",
        ),
        (("a",), ((1,),), {"ignore_label": 1}, "ignore_label: 1 is also the value of a class."),
        (
            ("a",),
            ((1,),),
            {"ignore_label": 65535},
            "ignore_label: 65535 marks unsure pseudo-labels. Give a lower one.",
        ),
    ],
)
def test_faults(names: tuple[str, ...], values: tuple, extra: dict[str, int], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LabelMap(names=names, values=values, **extra)
    assert caught.value.messages == (text,)
