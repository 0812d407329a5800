"""Left and right among the classes: by names, by places over the cases, and what plans and training make of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from analysis_data import DataSet, save
from plans import make_fingerprint, plan_and_origins, tiny_plan

from autoseg.analyzer.case import CaseStats, ClassStats
from autoseg.analyzer.faults import Measured
from autoseg.analyzer.lateral import Lateral, check_lateral, find_lateral
from autoseg.data.datalists.cases import Case
from autoseg.data.fingerprint import Fingerprint
from autoseg.data.labels import LabelMap
from autoseg.data.side_names import WORD, sided_pairs
from autoseg.data.terms import known_names
from autoseg.errors import ConfigError
from autoseg.inference.predictor import group_key
from autoseg.plan import ClassPlan
from autoseg.training.augment import augment_batch, draw_sample

# -- names


@pytest.mark.parametrize(
    ("left", "right", "shared"),
    [
        ("kidney_left", "kidney_right", "kidney"),
        ("LEFT KIDNEY", "RIGHT KIDNEY", "KIDNEY"),
        ("Left-Kidney", "right kidney", "Kidney"),
        ("ctx-lh-cuneus", "ctx-rh-cuneus", "ctx-cuneus"),
        ("lh.insula", "rh.insula", "insula"),
        ("parotid_lt", "parotid_rt", "parotid"),
        ("LHip", "RHip", "Hip"),
        ("LHIP", "RHIP", "HIP"),
        ("lkidney", "rkidney", "kidney"),
        ("kidneyLeft", "kidneyRight", "kidney"),
        ("leftkidney", "rightkidney", "kidney"),
        ("kidney_L", "kidney_R", "kidney"),
        ("rib_l_3", "rib_r_3", "rib_3"),
        ("A. carotis sin", "A. carotis dex", "A. carotis"),
        ("lobus sinister", "lobus dexter", "lobus"),
        ("left l5 root", "right l5 root", "l5 root"),
        ("left", "right", ""),
        ("rib L3", "rib R3", "rib 3"),
        ("3L", "3R", "3"),
        ("Kidney (L)", "Kidney (R)", "Kidney"),
        ("(L) Kidney", "(R) Kidney", "Kidney"),
        ("Kidney [left] cyst", "Kidney [right] cyst", "Kidney cyst"),
        ("Kidney (L, lower)", "Kidney (R, lower)", "Kidney (lower)"),
        ("Kidney (lower, L)", "Kidney (lower, R)", "Kidney (lower)"),
        ("L (lower) kidney", "R (lower) kidney", "(lower) kidney"),
        ("Parotid Lft", "Parotid Rgt", "Parotid"),
        ("Ohr links", "Ohr rechts", "Ohr"),
        ("linkes Ohr", "rechtes Ohr", "Ohr"),
        ("Linke Niere", "Rechte Niere", "Niere"),
        ("rein gauche", "rein droit", "rein"),
        ("riñón izquierdo", "riñón derecho", "riñón"),
        ("oreja izquierda", "oreja derecha", "oreja"),
        ("rene sinistro", "rene destro", "rene"),
        ("rim esquerdo", "rim direito", "rim"),
        ("左肾", "右肾", "肾"),
        ("肾\uff08左\uff09", "肾\uff08右\uff09", "肾"),
        ("Левая почка", "Правая почка", "почка"),
        ("левый глаз", "правый глаз", "глаз"),
        ("левое плечо", "правое плечо", "плечо"),
    ],
)
def test_names_that_differ_in_the_side_alone(left: str, right: str, shared: str) -> None:
    (pair,) = sided_pairs(["liver", right, left])
    assert (pair.left, pair.right) == (2, 1)
    assert sided_pairs([left, "liver", right])[0].shared == shared


@pytest.mark.parametrize(
    "names",
    [
        ("LV", "RV", "MYO"),  # a heart's chambers are two organs
        ("vertebra_L5", "vertebra_T5"),
        ("rib_l_3", "rib_r_4"),
        ("left 3", "3 right"),
        ("kidney_left", "kidney left", "kidney_right"),  # which of them?
        ("structure 1", "structure 21"),
        ("left atrium", "liver"),
        ("lung", "rung"),
        ("LIVER", "RIVER"),
        ("lobes", "robes"),
        ("L1", "R1"),  # a vertebra and a rib
        ("L_5", "R_5"),
    ],
)
def test_names_that_are_no_pair(names: tuple[str, ...]) -> None:
    assert sided_pairs(names) == ()


def test_words_of_the_table_begin_with_no_letter_of_a_side() -> None:
    words = {m.group().lower() for name in known_names() for m in WORD.finditer(name)}
    words = {word for word in words if word[0] in "lr" and len(word) > 3 and word not in ("left", "right")}
    assert {"liver", "lung", "rectum"} <= words
    for word in words:
        assert sided_pairs(("l" + word[1:], "r" + word[1:])) == (), word


# -- places


Place = tuple[float, float, float, float]
"""X, Y, Z in mm from the body's middle, and volume in mm3."""
BODY: dict[str, Place] = {
    "1": (-60, 10, 0, 9000), "2": (60, 10, 0, 9000), "3": (-40, -30, 20, 800), "4": (40, -30, 20, 800),
    "5": (-25, 30, -40, 300), "6": (25, 30, -40, 300), "7": (0, 0, 30, 5000),
    "8": (12, 25, 10, 900), "9": (-10, 11, 10, 1000),  # like an aorta and a vein: on both sides, no mirror images
}  # fmt: skip


def measure(
    places: dict[str, Place], num: int = 5, *, tilt: float = 0.0, change: Callable[[int, str], bool] = lambda i, n: True
) -> tuple[list[Measured], LabelMap]:
    """Cases with classes at places, a little different in each; `change` says in which cases a class occurs."""
    rng = np.random.default_rng(0)
    cases = []
    for i in range(num):
        origin, angle = rng.normal(0, 20, 3), tilt * (1 if i % 2 else -1)
        turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
        classes = []
        for value, (name, (*centre, volume)) in enumerate(places.items(), start=1):
            if change(i, name):
                x, y, z = (origin + turn @ centre + rng.normal(0, 1.0, 3)).tolist()
                width = round(1.2 * volume ** (1 / 3))
                classes.append(_stats(value, round(volume * rng.uniform(0.9, 1.1)), width, (x, y, z)))
        # The background, so that the image's middle is the body's.
        mass, num_voxels = sum(np.array(c.centre_mm) * c.voxels for c in classes), sum(c.voxels for c in classes)
        x, y, z = ((origin * 8e6 - mass) / (8e6 - num_voxels)).tolist()
        classes.insert(0, _stats(0, int(8e6) - num_voxels, 200, (x, y, z)))
        stats = CaseStats(findings=(), shape=(200, 200, 200), spacing_mm=(1.0, 1.0, 1.0), classes=tuple(classes))
        cases.append(Measured(case=Case(name=f"c{i}", images=()), role="training", stats=stats, files=()))
    return cases, LabelMap(names=tuple(places), values=tuple((v,) for v in range(1, len(places) + 1)))


def _stats(value: int, voxels: int, width: int, centre: tuple[float, float, float]) -> ClassStats:
    return ClassStats(
        value=value, voxels=voxels, intensity=(), num_components=1, component_shapes=((width,) * 3,), centre_mm=centre
    )


def test_pairs_are_found_by_places_where_no_name_has_a_side() -> None:
    found = find_lateral(*measure(BODY))
    assert found.pairs == (("1", "2"), ("3", "4"), ("5", "6"))
    assert found.pairs_rule == "3 pairs by places and volumes in 5 cases"
    assert (found.unsure, check_lateral(found, None)) == ((), [])


def test_tilted_heads_keep_their_pairs() -> None:
    more = BODY | {"10": (-70, -50, 40, 700), "11": (70, -50, 40, 700), "12": (-20, 60, 0, 90), "13": (20, 60, 0, 90)}
    more |= {"14": (-30, -60, -30, 200), "15": (30, -60, -30, 200)}
    found = find_lateral(*measure(more, tilt=np.radians(13)))
    assert found.pairs == (("1", "2"), ("3", "4"), ("5", "6"), ("10", "11"), ("12", "13"), ("14", "15"))


def test_two_cases_are_too_few_to_be_sure() -> None:
    found = find_lateral(*measure(BODY, num=2))
    assert found.pairs == ()
    assert {"1", "2", "3", "4", "5", "6"} <= {*found.unsure}
    (warning,) = check_lateral(found, None)
    assert check_lateral(found, ()) == []
    assert "1 and 2, 3 and 4, 5 and 6" in warning.finding
    assert "occur together in fewer than 3 cases, so a plan mirrors no image along X" in warning.finding


def test_twins_of_other_sizes_are_not_sure() -> None:
    uneven = BODY | {"2": (60.0, 10.0, 0.0, 5000.0)}
    found = find_lateral(*measure(uneven))
    assert found.pairs == (("3", "4"), ("5", "6"))
    assert found.unsure == ("1", "2")


def test_a_class_that_changes_sides_is_of_no_pair() -> None:
    """Such as the medial and lateral part of a knee, where right and left knees are in one data set."""
    sides = {"a": (-30.0, 0.0, 0.0, 500.0), "b": (30.0, 0.0, 0.0, 500.0)}
    cases, label_map = measure(sides, num=6)
    other, _ = measure({"a": sides["b"], "b": sides["a"]}, num=6)
    assert find_lateral(cases, label_map).pairs == (("a", "b"),)
    assert find_lateral([*cases[:3], *other[3:]], label_map) == Lateral()


def test_names_come_first_and_then_nothing_is_guessed() -> None:
    names = dict(zip(BODY, ("kidney L", "kidney R", "lt ear", "rt ear", "5", "6", "7", "aorta", "cava"), strict=True))
    found = find_lateral(*measure({names[k]: place for k, place in BODY.items()}))
    assert found.pairs == (("kidney L", "kidney R"), ("lt ear", "rt ear"))
    assert found.pairs_rule == "2 pairs by names"
    assert found.unsure == ("5", "6")  # not aorta and cava


def test_names_of_sides_at_two_heights_are_no_mirror_images() -> None:
    heart: dict[str, Place] = {"left ventricle": (-40, -20, 0, 9000), "right ventricle": (-10, 20, 0, 9000)}
    found = find_lateral(*measure(heart | {"left lung": (-60, 0, 0, 9000), "right lung": (60, 0, 0, 9000)}))
    assert found.pairs == (("left lung", "right lung"),)
    assert found.pairs_rule == (
        "1 pair by names; left ventricle and right ventricle are named so, but are no mirror images of each other"
    )
    few = find_lateral(*measure(heart, num=2))
    assert few.pairs == (("left ventricle", "right ventricle"),)  # two cases refute nothing


def test_a_class_of_one_side_alone() -> None:
    spleen = {"spleen": (-60.0, 0.0, 0.0, 9000.0)}
    found = find_lateral(*measure(spleen))
    assert found.unsure == ("spleen",)
    assert found.unsure_rule == "always on one side, and without a known counterpart: spleen (in 5 cases)"
    assert check_lateral(found, None) == []  # nothing to look at: the plan says what it does
    assert find_lateral(*measure(spleen, num=3)).unsure == ()
    # Where counterparts are annotated and known, one that has none among the classes has none at all.
    kidneys = {"kidney_left": (-40.0, -30.0, 20.0, 800.0), "kidney_right": (40.0, -30.0, 20.0, 800.0)}
    assert find_lateral(*measure(spleen | kidneys)).unsure == ()


def test_a_crop_around_a_structure_says_nothing_of_the_body() -> None:
    """As of one hippocampus: its parts reach over the crop's middle, though always more to one side."""
    parts: dict[str, Place] = {"anterior": (-1.5, 12, -6, 2000), "posterior": (-4, -8, 2, 1600)}
    assert find_lateral(*measure(parts, num=20)) == Lateral()


def test_few_labels_and_none() -> None:
    assert find_lateral([], LabelMap(names=("a",), values=((1,),))) == Lateral()
    cases, label_map = measure({"a": (-60.0, 0.0, 0.0, 9000.0), "b": (60.0, 0.0, 0.0, 9000.0)})
    more = LabelMap(names=("a", "b", "in no case"), values=((1,), (2,), (3,)))
    assert find_lateral(cases, more) == find_lateral(cases, label_map)


# -- partial labels: what is asked of a class is asked of the cases that have it

OTHERS = (("3", "4"), ("5", "6"))
FEW_TOGETHER = "1 and 2 look like left and right of one structure, but occur together in fewer than 3 cases"


@pytest.mark.parametrize(("num", "every"), [(40, 3), (40, 10), (2000, 50)])
def test_a_pair_of_few_cases_is_found(num: int, every: int) -> None:
    """Of 2,000 cases 50 are compared first; one of these has the pair, and 40 of all."""
    found = find_lateral(*measure(BODY, num, change=lambda i, name: name not in "12" or i % every == 1))
    assert found.pairs == (("1", "2"), *OTHERS)
    assert found.unsure == ()


@pytest.mark.parametrize(
    "has",
    [
        lambda i, name: i < 2,  # together, but too rarely
        lambda i, name: i % 3 == int(name) % 3,  # one in a third of the cases, the other in another third
        lambda i, name: i == int(name),  # each in one case
    ],
)
def test_a_pair_that_is_rarely_seen_together_is_not_sure(has: Callable[[int, str], bool]) -> None:
    cases, label_map = measure(BODY, 40, change=lambda i, name: name not in "12" or has(i, name))
    found = find_lateral(cases, label_map)
    assert (found.pairs, found.unsure, found.unsure_rule) == (OTHERS, ("1", "2"), FEW_TOGETHER)
    assert [fault.kind for fault in check_lateral(found, None)] == ["lateral"]


def test_every_class_in_a_case_of_its_own() -> None:
    found = find_lateral(*measure(BODY, len(BODY), change=lambda i, name: i == int(name) - 1))
    assert (found.pairs, found.unsure) == ((), ("1", "2", "3", "4", "5", "6"))


def test_what_occurs_in_few_cases_and_is_no_pair_stops_nothing() -> None:
    """Another size, the same side, another height, sides that change: all in cases that lack the other one."""
    for place in ((60, 10, 0, 40000), (-50, 10, 0, 9000), (60, 90, 60, 9000)):
        found = find_lateral(
            *measure(BODY | {"2": place}, 40, change=lambda i, c: c not in "12" or i % 3 == int(c) % 3)
        )
        assert (found.pairs, found.unsure) == (OTHERS, ()), place
    usual, label_map = measure(BODY, 40, change=lambda i, name: name != "1" and (name != "2" or i % 3 == 2))
    tumor, _ = measure(BODY | {"1": BODY["2"]}, 40, change=lambda i, name: name != "2" or i % 3 == 2)
    sides, _ = measure(BODY, 40, change=lambda i, name: name != "2" or i % 3 == 2)
    mixed = [(sides if i % 6 == 1 else tumor)[i] if i % 3 == 1 else usual[i] for i in range(40)]
    assert find_lateral(mixed, label_map).unsure == ()


ABDOMEN: dict[str, Place] = {
    "liver": (71, 24, 32, 1125684), "right kidney": (74, -29, -15, 192618), "spleen": (-109, -39, 34, 261036),
    "pancreas": (-16, 28, 8, 18765), "aorta": (-13, 0, 3, 49653), "vena cava": (17, 10, -10, 61182),
    "right adrenal": (34, -12, 37, 4482), "left adrenal": (-43, -9, 41, 5670), "gallbladder": (69, 51, 3, 35613),
    "left kidney": (-74, -29, -15, 192618),
}  # fmt: skip
"""As measured in a torso; the left kidney is the mirror image of the right one."""


@pytest.mark.parametrize("named", [True, False])
def test_an_abdomen_of_partial_labels_is_mirrored_with_its_pairs(named: bool) -> None:
    """Each case lacks half of the organs: no spleen, liver or vessel stops mirroring, with names or without."""
    names = {organ: organ if named else f"class_{i}" for i, organ in enumerate(ABDOMEN)}
    has = np.random.default_rng(0).random((60, len(ABDOMEN))) < 0.5
    column = {name: i for i, name in enumerate(names.values())}
    found = find_lateral(
        *measure({names[k]: p for k, p in ABDOMEN.items()}, 60, change=lambda i, name: bool(has[i, column[name]]))
    )
    pairs = {frozenset((names[f"left {organ}"], names[f"right {organ}"])) for organ in ("kidney", "adrenal")}
    assert {frozenset(pair) for pair in found.pairs} == pairs
    assert found.unsure == ()


@pytest.mark.parametrize("together", [True, False])
def test_names_of_no_known_side_beside_pairs_that_are_named(together: bool) -> None:
    names = dict(zip("123456", ("kidney_left", "kidney_right", "LK2", "RK2", "sol kulak", "sag kulak"), strict=True))

    def has(i: int, name: str) -> bool:
        return name.startswith("kidney") or i % 5 < 2 if together else i % 3 == (name in ("LK2", "sol kulak"))

    kidneys = ("kidney_left", "kidney_right")
    cases, label_map = measure(
        {names[k]: BODY[k] for k in names}, 40, change=lambda i, name: name in kidneys or has(i, name)
    )
    found = find_lateral(cases, label_map)
    assert found.pairs == (kidneys,)
    assert found.unsure == ("LK2", "RK2", "sol kulak", "sag kulak")
    assert found.is_warned_of


def test_a_counterpart_of_another_size_is_asked_about_beside_known_pairs() -> None:
    """Both lie wholly on their sides; a liver and a spleen, 7 apart, are asked about by nobody."""
    larger: Place = (60, 10, 0, 27000)
    found = find_lateral(*measure(BODY | {"2": larger}, 40, change=lambda i, name: name not in "12" or i % 3 == 0))
    assert (found.pairs, found.unsure) == (OTHERS, ("1", "2"))
    assert "but are not surely a pair" in found.unsure_rule
    found = find_lateral(*measure(BODY | {"1": (-60, 10, 0, 5000), "2": (60, 10, 0, 35000)}, 40))
    assert (found.pairs, found.unsure) == (OTHERS, ())


def test_a_class_of_one_side_in_few_cases() -> None:
    """Alone, it stops mirroring; beside a pair that is known, it has no counterpart."""
    spleen: dict[str, Place] = {"spleen": (-60, 0, 0, 9000), "spine": (0, 0, 0, 9000)}
    found = find_lateral(*measure(spleen, 40, change=lambda i, name: name == "spine" or i % 5 < 2))
    assert (found.pairs, found.unsure) == ((), ("spleen",))
    assert found.unsure_rule.endswith("spleen (in 16 cases)")
    more = spleen | {"1": BODY["3"], "2": BODY["4"]}
    found = find_lateral(*measure(more, 40, change=lambda i, name: name != "spleen" or i % 5 < 2))
    assert (found.pairs, found.unsure) == ((("1", "2"),), ())


def test_a_class_that_fits_two_others_is_of_no_pair() -> None:
    twice = BODY | {"2b": BODY["2"]}
    found = find_lateral(
        *measure(twice, 40, change=lambda i, name: not name.startswith("2") or (name == "2") == (i % 2 == 0))
    )
    assert found.pairs == OTHERS
    assert found.unsure == ("1", "2", "2b")


# -- from the analysis to the plan


@pytest.fixture
def paired(tmp_path: Path) -> DataSet:
    """Class 1 lies on the left of the middle, class 2 on the right."""
    data = DataSet(root=tmp_path, labels={1: "class_1", 2: "class_2"})
    for case in data.cases:
        label = np.zeros((14, 12, 10), np.uint8)
        label[1:4, 2:5, 2:5], label[10:13, 2:5, 2:5] = 1, 2
        assert case.label is not None
        save(case.label, label)
    return data


def test_the_analysis_stores_what_plans_are_made_from(paired: DataSet) -> None:
    analysis = paired.analyze()
    stored = yaml.safe_load(paired.workspace.datastats.read_text())["data_set"]["lateral"]
    assert stored["pairs"] == [["class_1", "class_2"]]
    assert Fingerprint.read(paired.workspace.datastats) == analysis.fingerprint
    assert "left and right: 1 pair by places and volumes in 6 cases" in analysis.text()


def test_the_analysis_says_what_a_class_of_one_side_leads_to(tmp_path: Path) -> None:
    data = DataSet(root=tmp_path, labels={1: "spleen"})
    label = np.zeros((14, 12, 10), np.uint8)
    label[1:4, 2:5, 2:5] = 1
    for case in data.cases:
        assert case.label is not None
        save(case.label, label)
    assert (
        "left and right: nothing is mirrored along X, unless lateral_pairs or mirror_axes say so: "
        "always on one side, and without a known counterpart: spleen (in 6 cases)" in data.analyze().text()
    )


def test_the_users_pairs_settle_a_warning(paired: DataSet) -> None:
    del paired.cases[2:]
    assert [w.kind for w in paired.analyze().warnings if w.kind == "lateral"] == ["lateral"]
    assert not [w for w in paired.analyze(lateral_pairs=(("class_1", "class_2"),)).warnings if w.kind == "lateral"]


def test_statistics_of_the_first_version_are_read(paired: DataSet) -> None:
    paired.analyze()
    path = paired.workspace.datastats
    stored = yaml.safe_load(path.read_text())
    del stored["data_set"]["lateral"]
    path.write_text(yaml.safe_dump(stored))
    assert Fingerprint.read(path).lateral_pairs is None
    named, origins = plan_and_origins("unet", classes={"L a": (1,), "R a": (2,)})
    assert named.lateral_pairs == (("L a", "R a"),)
    assert origins["lateral_pairs"].rule == "names that differ in left and right alone"


def unsure_plan(**settings: Any) -> tuple[Any, ...]:
    fingerprint = make_fingerprint(lateral_pairs=(), one_sided=("box",), one_sided_rule="box lies on one side")
    return plan_and_origins("segresnet", fingerprint=fingerprint, **settings)


def test_where_no_pair_is_sure_nothing_is_mirrored_along_x() -> None:
    plan, origins = unsure_plan()
    assert (plan.mirror_axes, plan.tta) == ((), False)
    assert "box lies on one side" in origins["mirror_axes"].rule
    assert unsure_plan(lateral_pairs=())[0].mirror_axes == (0,)
    assert unsure_plan(mirror_axes=(0, 1))[0].mirror_axes == (0, 1)
    assert unsure_plan(classes={"sphere": (1,), "merged": (2, 3)})[0].mirror_axes == (0,)
    assert plan_and_origins("segresnet")[0].tta  # as it would be


def test_the_users_pairs_replace_those_found(tmp_path: Path) -> None:
    fingerprint = make_fingerprint(lateral_pairs=(("sphere", "box"),), lateral_rule="as seen")
    plan, origins = plan_and_origins("segresnet", fingerprint=fingerprint)
    assert plan.lateral_pairs == (("sphere", "box"),)
    assert origins["lateral_pairs"].rule == "as seen"
    plan, origins = plan_and_origins("segresnet", fingerprint=fingerprint, lateral_pairs=())
    assert (plan.lateral_pairs, plan.mirrored_classes) == ((), ())
    plan, origins = plan_and_origins("segresnet", lateral_pairs=(("box", "sphere"),))
    assert plan.mirrored_classes == ((1, 0),)
    assert origins["lateral_pairs"].value == [["box", "sphere"]]


def test_pairs_of_classes_that_there_are_not() -> None:
    with pytest.raises(ConfigError, match=r"lateral_pairs: no class bax\. Did you mean box\?"):
        plan_and_origins("segresnet", lateral_pairs=(("sphere", "bax"),))
    with pytest.raises(ValueError, match="box is given more than once"):
        plan_and_origins("segresnet", lateral_pairs=(("sphere", "box"), ("box", "x")))
    values = tiny_plan().model_dump() | {"lateral_pairs": (("sphere", "bax"),)}
    with pytest.raises(ValueError, match="lateral_pairs: no class bax"):
        type(tiny_plan()).model_validate(values)


def test_a_plan_of_the_first_version_goes_by_names() -> None:
    classes = (ClassPlan(name="left x", values=(1,)), ClassPlan(name="right x", values=(2,)))
    plan = tiny_plan().model_copy(update={"classes": classes, "lateral_pairs": None})
    assert plan.mirrored_classes == ((0, 1),)


# -- what the pairs do


def test_mirrored_samples_swap_the_plans_pairs() -> None:
    plan = tiny_plan(lateral_pairs=(("sphere", "box"),), augment="light", mirror_axes=(0,))
    image = torch.arange(2.0).repeat(1, 1, 2, 2, 1).movedim(-1, 2)  # rises along X
    target = torch.ones((1, 1, 2, 2, 2), dtype=torch.uint8)
    none = np.zeros(2, bool)
    seen = set()
    for seed, pairs in itertools.product(range(20), ((("sphere", "box"),), ())):
        one = plan.model_copy(update={"lateral_pairs": pairs})
        drawn = draw_sample(one, np.random.default_rng(seed), none, none)
        out, labels = image.clone(), target.clone()
        augment_batch(out, labels, [drawn], {}, lateral_pairs=one.mirrored_classes, sigmoid=False)
        seen.add((len(pairs), bool(out[0, 0, 0].mean() < out[0, 0, 1].mean()), int(labels.max())))
    assert seen == {(1, True, 1), (1, False, 2), (0, True, 1), (0, False, 1)}


def test_models_of_other_pairs_do_not_share_mirrored_windows() -> None:
    plan = tiny_plan(tta=True)
    other = plan.model_copy(update={"lateral_pairs": (("sphere", "box"),)})
    assert group_key(plan) != group_key(other)
    unmirrored = [p.model_copy(update={"tta": False}) for p in (plan, other)]
    assert group_key(unmirrored[0]) == group_key(unmirrored[1])


def test_each_uncertain_couple_has_its_own_reason() -> None:
    """1 and 2 occur together in all cases and differ in size; 3 and 4 in two cases alone."""
    uneven = BODY | {"2": (60.0, 10.0, 0.0, 5000.0)}
    found = find_lateral(*measure(uneven, 20, change=lambda i, name: name not in "34" or i < 2))
    assert found.unsure == ("1", "2", "3", "4")
    assert found.unsure_rule == (
        "1 and 2 look like left and right of one structure, but are not surely a pair; "
        "3 and 4 look like left and right of one structure, but occur together in fewer than 3 cases"
    )


def test_a_spleen_and_a_large_gallbladder_beside_named_kidneys_stop_nothing() -> None:
    body: dict[str, Place] = {
        "kidney_left": (-60, -20, 0, 160_000),
        "kidney_right": (60, -20, 0, 160_000),
        "spleen": (-80, 0, 60, 200_000),
        "gallbladder": (75, 10, 55, 60_000),
    }
    found = find_lateral(*measure(body, 20))
    assert (found.pairs, found.unsure) == ((("kidney_left", "kidney_right"),), ())
