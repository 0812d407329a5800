"""Classes merged over both sides, and told apart again."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_jobs import tiny_plan

from autoseg.data.grid import Grid, Volume
from autoseg.data.labels import LabelMap, merge_classes, merge_left_right
from autoseg.data.streams import MemoryImage
from autoseg.errors import ConfigError
from autoseg.inference.sides import BodyWatch, otsu, split_sides

NAMED = LabelMap(
    names=("liver", "kidney_right", "kidney_left", "L adrenal", "R adrenal"), values=((1,), (2,), (13,), (4,), (9, 10))
)


def test_merging_keeps_the_users_classes() -> None:
    merged = merge_left_right(NAMED)
    assert merged.names == ("liver", "kidney", "adrenal")
    assert merged.values == ((1,), (2, 13), (4, 9, 10))
    assert merged.named is NAMED
    assert merged.sided_pairs == ()
    assert merged.parts("kidney") == ("kidney_right", "kidney_left")
    assert merged.merged_sides == ((2, 13, 2), (4, 4, 9))
    assert merged.wholly(("liver", "kidney_left")) == ("liver",)
    assert merged.wholly(None) is None
    assert NAMED.wholly(("kidney_left", "liver")) == ("liver", "kidney_left")


def test_names_that_are_taken_or_empty() -> None:
    sides = LabelMap(names=("left", "right", "x", "x left", "x right"), values=((1,), (2,), (3,), (4,), (5,)))
    assert merge_left_right(sides).names == ("left+right", "x", "x left+x right")
    brackets = LabelMap(names=("Kidney (L)", "Kidney (R)"), values=((1,), (2,)))
    assert merge_left_right(brackets).names == ("Kidney",)


def test_what_cannot_be_merged() -> None:
    with pytest.raises(
        ConfigError, match="no two names of classes differ in left and right alone, and pairs .* places"
    ):
        merge_left_right(LabelMap(names=("a", "b"), values=((1,), (2,))))
    with pytest.raises(ConfigError, match="classes overlap"):
        merge_left_right(LabelMap(names=("l a", "r a"), values=((1, 2), (2,)), sigmoid=True))


def test_a_plan_brings_both_maps_back() -> None:
    merged = merge_left_right(NAMED)
    plans = [[{"name": n, "values": list(v)} for n, v in zip(m.names, m.values, strict=True)] for m in (merged, NAMED)]
    assert tiny_plan(classes=plans[0], user_classes=plans[1]).label_map == merged


def drawn(*places: tuple[slice, ...]) -> np.ndarray:
    labels = np.zeros((30, 8, 12), np.uint8)
    for place in places:
        labels[place] = 2
    return labels


def split(labels: np.ndarray, midline: float) -> np.ndarray:
    found = labels.copy()
    split_sides(found, merge_left_right(NAMED), midline)
    return found


def test_two_organs_beside_each_other_need_no_midline() -> None:
    labels = drawn(np.s_[3:8, 2:6, 2:9], np.s_[12:17, 2:6, 2:8], np.s_[25:27, 2, 2], np.s_[9, 7, 11])
    labels[20:22, 1, 1] = 1
    found = split(labels, 26.0)
    assert (found[3:8, 2:6, 2:9] == 13).all()
    assert (found[12:17, 2:6, 2:8] == 2).all()
    assert (found[25:27, 2, 2] == 2).all()  # a speck, right of the middle between the two
    assert found[9, 7, 11] == 13
    assert (found[20:22, 1, 1] == 1).all()
    assert ((found > 0) == (labels > 0)).all()


def test_one_organ_alone_goes_by_the_midline() -> None:
    labels = drawn(np.s_[3:8, 2:6, 2:9])
    assert set(np.unique(split(labels, 15.0))) == {0, 13}
    assert set(np.unique(split(labels, 1.0))) == {0, 2}
    assert set(np.unique(split(labels, 7.4))) == {0, 13}  # it reaches over by a little


def test_organs_that_touch_are_cut_at_the_midline() -> None:
    found = split(drawn(np.s_[5:25, 2:6, 2:9]), 13.5)
    assert (found[5:14, 2:6, 2:9] == 13).all()
    assert (found[14:25, 2:6, 2:9] == 2).all()


def test_nothing_to_split() -> None:
    assert not split(drawn(), 5.0).any()


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("centre", [60, 90])
def test_the_bodys_middle(axis: int, centre: int) -> None:
    shape = [140, 40, 50]
    shape[axis] = 160
    x, y, _ = np.ogrid[: shape[0], : shape[1], : shape[2]]
    body = ((x - centre) / 35) ** 2 + ((y - 20) / 15) ** 2 < 1
    rng = np.random.default_rng(0)
    array = np.where(np.broadcast_to(body, shape), 40.0, -1000.0) + rng.normal(0, 20, shape)
    grid = Grid(shape=tuple(shape), affine=np.eye(4))
    image = BodyWatch(MemoryImage(Volume(array=array[None].astype(np.float32), grid=grid)))
    assert image.axis == axis
    assert image.midline() == (shape[0] - 1) / 2  # nothing has passed yet
    for start in range(0, shape[axis], 7):
        image.rows(start, min(start + 7, shape[axis]))
    assert image.midline() == pytest.approx(centre, abs=2.5)


def test_otsu_parts_air_from_body() -> None:
    values = np.concatenate([np.random.default_rng(0).normal(-1000, 20, 5000), np.full(800, 40.0)])
    assert -950 < otsu(values) < 35
    assert np.isfinite(otsu(np.zeros(5)))


def test_a_region_of_several_classes() -> None:
    region = merge_classes(NAMED, {"organs": ("liver", "kidney_left", "kidney_right")})
    assert region.names == ("organs", "L adrenal", "R adrenal")
    assert region.values[0] == (1, 2, 13)
    assert region.merged_sides == ()
