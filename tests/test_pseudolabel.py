"""Pseudo-labels: what is predicted, accepted, filled in; and that annotators always win."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_jobs import TensorRows, make_job

from autoseg.config.settings import Settings
from autoseg.data.datalists.cases import Case, Datalist, case_digest
from autoseg.data.datalists.datalist import read_cases, read_datalist, write_datalist
from autoseg.data.grid import Grid
from autoseg.data.labels import UNSURE_VALUE, LabelMap, merge_left_right
from autoseg.data.phantoms import make_phantoms
from autoseg.data.volumes import read_label, write_volume
from autoseg.ensemble.out_of_fold import score_out_of_fold
from autoseg.errors import ConfigError, DataError
from autoseg.inference.restore import Member
from autoseg.pseudolabel import build
from autoseg.pseudolabel.audit import audit_json, make_row, suspicion, volume_z
from autoseg.pseudolabel.build import make_pseudolabels, missing_files, not_predicted, stage_inputs
from autoseg.pseudolabel.complete import complete_label
from autoseg.pseudolabel.evidence import ClassEvidence, choose, disagreements, predict_case
from autoseg.pseudolabel.judge import judge
from autoseg.pseudolabel.rounds import How, cases_to_fill, count_rounds, first_round, later_round, why_one_round
from autoseg.workspace.files import write_json, write_text
from autoseg.workspace.stamps import changed
from autoseg.workspace.workspace import Workspace

FOUR = LabelMap(names=("a", "b", "c", "d"), values=((1,), (2,), (5,), (9,)))


def make_settings(**changes: Any) -> Settings:
    values = {"modality": "CT", "datalist": "d", "dataroot": "r", "partial_labels": "declared", **changes}
    return Settings.model_validate(values)


def evidence(**changes: Any) -> ClassEvidence:
    return ClassEvidence(**{"voxels": 100, "volume_ml": 1.0, "confidence": 0.9, "disagreement": 0.2, **changes})


# -- the completed label

VALUES = st.sampled_from((0, 1, 2, 5, 9))


@given(
    label=st.lists(VALUES, min_size=12, max_size=12),
    predicted=st.lists(VALUES, min_size=12, max_size=12),
    percent=st.lists(st.integers(0, 100), min_size=12, max_size=12),
    accepted=st.sets(st.sampled_from(FOUR.names)),
    confidence=st.sampled_from((0.0, 0.5, 0.8)),
    background=st.sampled_from((0.0, 0.5, 0.95)),
    ignored=st.sampled_from((None, 200)),
)
@settings(max_examples=200)
def test_annotators_win_and_only_accepted_classes_are_filled(
    label: list[int],
    predicted: list[int],
    percent: list[int],
    accepted: set[str],
    confidence: float,
    background: float,
    ignored: int | None,
) -> None:
    label_map = replace(FOUR, ignore_label=ignored)
    own = np.array(label, np.uint8).reshape(3, 2, 2)
    if ignored:
        own[0, 0, 0] = ignored
    sureness = np.array(percent, np.uint8).reshape(3, 2, 2)
    done = complete_label(
        own,
        np.array(predicted, np.uint8).reshape(3, 2, 2),
        sureness,
        label_map=label_map,
        accepted=sorted(accepted),
        confidence=confidence,
        background_confidence=background,
    )
    annotated = own != 0
    np.testing.assert_array_equal(done.label[annotated], own[annotated])
    allowed = {label_map.values[label_map.names.index(n)][0] for n in accepted} | {0, UNSURE_VALUE}
    assert set(done.label[~annotated].tolist()) <= allowed
    limit = np.where(np.array(predicted).reshape(3, 2, 2) == 0, background, confidence)
    assert np.array_equal(done.label[~annotated] == UNSURE_VALUE, (sureness < 100 * limit)[~annotated])
    assert sum(done.filled.values()) == int((~annotated & (done.label != 0) & (done.label != UNSURE_VALUE)).sum())
    assert sum(done.unsure.values()) == int((~annotated & (done.label == UNSURE_VALUE)).sum())


def test_a_completed_label_voxel_by_voxel() -> None:
    own = np.array([1, 0, 0, 0, 0, 0, 0], np.uint8).reshape(7, 1, 1)
    # The last two lean to a class that is not accepted: background where that is sure, unsure where it is not.
    predicted = np.array([2, 2, 2, 0, 0, 5, 5], np.uint8).reshape(7, 1, 1)
    percent = np.array([99, 80, 60, 80, 99, 80, 60], np.uint8).reshape(7, 1, 1)
    how = {"label_map": FOUR, "accepted": ["b"]}
    done = complete_label(own, predicted, percent, confidence=0.7, background_confidence=0.9, **how)  # type: ignore[arg-type]
    assert done.label.ravel().tolist() == [1, 2, UNSURE_VALUE, UNSURE_VALUE, 0, 0, UNSURE_VALUE]
    assert (done.filled, done.unsure) == ({"b": 1}, {"b": 1, "background": 2})
    plain = complete_label(None, predicted, percent, confidence=0.0, background_confidence=0.0, **how)  # type: ignore[arg-type]
    assert plain.label.ravel().tolist() == [2, 2, 2, 0, 0, 0, 0]


def test_values_that_are_no_class_of_the_run_stay() -> None:
    own = np.array([300, 0, 0], np.uint16).reshape(3, 1, 1)
    predicted, percent = np.array([2, 2, 0]).reshape(3, 1, 1), np.full((3, 1, 1), 99)
    how = {"confidence": 0.7, "background_confidence": 0.9, "accepted": ["b"]}
    done = complete_label(own, predicted, percent, label_map=FOUR, **how)  # type: ignore[arg-type]
    assert done.label.ravel().tolist() == [300, 2, 0]


# -- evidence


def test_classes_are_chosen_among_those_that_are_missing() -> None:
    probs = torch.tensor([[0.2], [0.5], [0.25], [0.05], [0.0]]).reshape(5, 1, 1, 1)  # background, a, b, c, d
    # The annotators say it is not a: b is left, against background with c, which is missing but not wanted.
    values, probability = choose(probs, FOUR, [1], [1, 2], conditioned=True)
    assert values.item() == 0
    assert probability.item() == pytest.approx(0.25 / 0.5)
    values, probability = choose(probs, FOUR, [1], [1], conditioned=True)
    assert values.item() == 2
    assert probability.item() == pytest.approx(0.25 / 0.45)
    values, probability = choose(probs, FOUR, [1], [1, 2], conditioned=False)
    assert (values.item(), probability.item()) == (0, pytest.approx(0.5))  # a wins, and is not wanted
    probs[2] = 0.6
    assert choose(probs, FOUR, [1], [1], conditioned=False)[0].item() == 2


def test_regions_are_chosen_by_their_own_probability() -> None:
    label_map = replace(FOUR, sigmoid=True)
    probs = torch.tensor([[0.9, 0.9], [0.6, 0.3], [0.7, 0.4], [0.0, 0.0]]).reshape(4, 2, 1, 1)
    values, probability = choose(probs, label_map, [1, 2], [1, 2, 3], conditioned=True)
    assert values.ravel().tolist() == [5, 0]
    assert probability.ravel().tolist() == pytest.approx([0.7, 0.6])


@given(st.integers(0, 1000))
@settings(max_examples=30)
def test_disagreement_is_differing_over_foreground_voxels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    maps = [rng.choice([0, 1, 2, 5], 40).astype(np.uint8) for _ in range(3)]
    found = disagreements(maps, FOUR, [0, 2, 3])
    for k in (0, 2):
        value = FOUR.values[k][0]
        pairs = [(maps[0], maps[1]), (maps[0], maps[2]), (maps[1], maps[2])]
        each = [2 * ((a == value) != (b == value)).sum() / ((a == value).sum() + (b == value).sum()) for a, b in pairs]
        assert found[k] == pytest.approx(np.mean(each))
    assert found[3] == 0.0
    assert disagreements(maps[:1], FOUR, [0]) == {0: None}


# -- judgement

BOTH = How.of(make_settings(strategy="both"))
TWO = How.of(make_settings(strategy="two_stage"))


def test_what_models_know_as_one_class_is_filled_in_by_side(tmp_path: Path) -> None:
    named = LabelMap(names=("kidney_left", "kidney_right", "liver"), values=((1,), (2,), (3,)))
    merged = merge_left_right(named)
    shape = (24, 10, 8)
    probs = torch.zeros(3, *shape)
    probs[1, 2:6, 3:7, 2:6] = probs[1, 17:21, 3:7, 2:6] = 0.9
    probs[2, 9:14, 3:7, 2:6] = 0.9
    probs[0] = 1 - probs[1:].sum(0)
    whole = (slice(0, 24), slice(0, 10), slice(0, 8))
    predictor = SimpleNamespace(
        label_map=merged, each=lambda image: [Member(rows=TensorRows(p, 0), box=whole) for p in (probs, probs)]
    )
    image = tmp_path / "image.nii.gz"
    write_volume(image, np.full(shape, 100, np.int16), Grid(shape=shape, affine=np.eye(4)))
    label = np.zeros(shape, np.uint8)
    label[2:6, 3:7, 2:6] = 1
    found = predict_case(
        cast(Any, predictor),
        [0, 1],
        [image],
        label,
        wanted=("kidney_right", "liver"),
        annotated=("kidney_left",),
        conditioned=True,
    )
    expected = np.zeros(shape, np.uint8)
    expected[17:21, 3:7, 2:6], expected[9:14, 3:7, 2:6] = 2, 3
    assert np.array_equal(found.predicted, expected)
    assert {n: e.voxels for n, e in found.classes.items()} == {"kidney_right": 64, "liver": 80}
    assert [e.disagreement for e in found.classes.values()] == [0.0, 0.0]


def test_defaults_are_the_papers_for_two_stage() -> None:
    assert (TWO.continues, TWO.unlabeled, TWO.filters) == (False, False, False)
    assert (BOTH.continues, BOTH.unlabeled, BOTH.filters) == (True, True, True)
    given_ = How.of(make_settings(strategy="two_stage", pseudolabel={"start": "previous", "filter": True}))
    assert (given_.continues, given_.unlabeled, given_.filters) == (True, False, True)


@pytest.mark.parametrize(
    ("changes", "dice", "reason"),
    [
        ({}, 0.8, ""),
        ({}, None, "no score: the class has no out-of-fold Dice"),
        ({}, 0.2, "low score: out-of-fold Dice 0.20 of the class, below 0.3"),
        ({"voxels": 0, "confidence": None}, 0.8, "not found: the models see none of it"),
        ({"disagreement": 1.25}, 0.8, "disagreement: 1.25 between the models, above 1"),
        ({"disagreement": None}, 0.8, ""),
    ],
)
def test_each_rule_of_the_filter(changes: dict[str, Any], dice: float | None, reason: str) -> None:
    found = {"case": {"a": evidence(**changes)}}
    assert judge(found, {"a": dice}, BOTH) == {"case": {"a": reason}}
    assert judge(found, {"a": dice}, TWO) == {"case": {"a": ""}}


def test_the_worst_of_each_class_are_rejected() -> None:
    found = {f"c{i:02d}": {"a": evidence(disagreement=i / 100), "b": evidence(disagreement=0.1)} for i in range(20)}
    found["c19"]["a"] = evidence(disagreement=1.5)  # rejected by itself, so it takes no other's place
    verdicts = judge(found, {"a": 0.9, "b": 0.9}, replace(BOTH, reject=0.11))
    assert [c for c, v in verdicts.items() if v["a"].startswith("worst")] == ["c17", "c18"]
    assert [c for c, v in verdicts.items() if v["b"]] == ["c00", "c01"]
    assert verdicts["c18"]["a"] == "worst: among the 11% of the cases with most disagreement"


def test_suspicion() -> None:
    assert volume_z(10.0, [9.0, 10.0, 11.0]) == pytest.approx(0.0)
    assert volume_z(20.0, [9.0, 10.0, 11.0]) == pytest.approx(np.log(2) / 0.15)
    assert volume_z(20.0, [9.0, 10.0]) is None
    assert suspicion(evidence(disagreement=1.0, confidence=1.0), None, BOTH) == pytest.approx(1.0)
    assert suspicion(evidence(disagreement=0.0, confidence=0.7), None, BOTH) == pytest.approx(1.0)
    assert suspicion(evidence(disagreement=0.0, confidence=1.0), -6.0, BOTH) == pytest.approx(2.0)


def test_the_audit_begins_with_what_was_accepted_and_looks_worst() -> None:
    volumes = {"labelled_ml": [9.0, 10.0, 11.0], "how": BOTH, "unsure": 0}
    nothing = evidence(voxels=0, volume_ml=0.0, confidence=None, disagreement=None)
    rows = [
        make_row("c0", "a", evidence(volume_ml=10.0), rejected="", filled=7, **volumes),
        make_row("c1", "a", nothing, rejected="not found: the models see none of it", filled=0, **volumes),
        make_row("c2", "a", evidence(volume_ml=40.0), rejected="", filled=9, **volumes),
        make_row("c3", "a", evidence(disagreement=1.9), rejected="disagreement: 1.9", filled=0, **volumes),
    ]
    # Where nothing was found, no volume is odd: it was small enough to fill the first rows.
    assert (rows[1].volume_z, rows[1].suspicion) == (None, 0.0)
    found = audit_json(rows, {"a": 0.8}, BOTH, round_=2, joined=(), background={"c0": 3, "c2": 4})
    assert [row["case"] for row in found["rows"]] == ["c2", "c0", "c3", "c1"]
    assert found["background"] == {"voxels_unsure": 7, "by_case": {"c0": 3, "c2": 4}}


# -- rounds


def cases(*annotated: tuple[str, ...] | None, groups: dict[int, str] | None = None) -> tuple[Case, ...]:
    return tuple(
        Case(name=f"c{i}", images=(), label=Path(f"l{i}"), fold=i % 2, annotated=a, group=(groups or {}).get(i))
        for i, a in enumerate(annotated)
    )


AB = LabelMap(names=("a", "b"), values=((1,), (2,)))


def test_what_is_missing() -> None:
    listed = Datalist(
        training=cases(None, ("a",), ("b",), ()), unlabeled=(Case(name="u", images=()),), labels={1: "a", 2: "b"}
    )
    found = {c.name: classes for c, classes in cases_to_fill(listed, AB.names, BOTH)}
    assert found == {"c1": ("b",), "c2": ("a",), "c3": ("a", "b"), "u": ("a", "b")}
    without = {c.name: classes for c, classes in cases_to_fill(listed, AB.names, replace(BOTH, exclude=("a",)))}
    assert without == {"c1": ("b",), "c3": ("b",), "u": ("b",)}
    assert "u" not in {c.name for c, _ in cases_to_fill(listed, AB.names, TWO)}
    nobody = Datalist(training=cases(("a",), ("a",)))
    assert cases_to_fill(nobody, AB.names, BOTH) == []  # what nobody is annotated for, no model knows


def test_rounds_are_as_many_as_there_is_to_do() -> None:
    partial, full = Datalist(training=cases(None, None, ("a",))), Datalist(training=cases(None, None))
    assert count_rounds(partial, AB, make_settings(strategy="both")) == 2
    assert count_rounds(partial, AB, make_settings(strategy="both", pseudolabel={"rounds": 3})) == 3
    assert count_rounds(partial, AB, make_settings(strategy="marginal")) == 1
    assert count_rounds(partial, AB, make_settings(strategy="both", partial_labels="off")) == 1
    assert count_rounds(full, AB, make_settings(strategy="both")) == 1
    with pytest.raises(ConfigError, match=r"^pseudolabel.exclude: no class tumr. Known: a, b.$"):
        count_rounds(partial, AB, make_settings(pseudolabel={"exclude": ["tumr"]}))
    nested = LabelMap(names=("whole", "core"), values=((1, 2), (2,)), sigmoid=True)
    with pytest.raises(ConfigError) as error:
        count_rounds(Datalist(training=cases(None, ("whole",))), nested, make_settings(strategy="both"))
    assert str(error.value) == (
        "strategy: both fills in missing classes, but label value 2 belongs to several regions, so that a label file "
        "cannot hold one of them and not the others. Set `strategy: marginal`, which trains on each case's own regions."
    )


def test_why_there_is_one_round(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "autoseg")
    partial, full = Datalist(training=cases(None, None, ("a",))), Datalist(training=cases(None, None))
    excluding = make_settings(strategy="both", pseudolabel={"exclude": ["b"]})
    assert why_one_round(partial, AB, make_settings(strategy="both")) == ""
    assert why_one_round(partial, AB, make_settings(strategy="both", partial_labels="off")) == "partial_labels is off"
    assert why_one_round(partial, AB, make_settings(strategy="marginal")) == "strategy is marginal"
    assert why_one_round(full, AB, excluding) == "every case is annotated for the same classes"
    assert count_rounds(partial, AB, excluding) == 1
    assert caplog.messages == [
        "one round of training, since there is nothing to fill in: pseudolabel.exclude names all that is missing"
    ]


@pytest.mark.parametrize("role", ["validation", "testing"])
def test_a_patient_that_is_held_back_does_not_join(role: str) -> None:
    held, scan = (Case(name=n, images=(), label=Path("l"), group="p") for n in ("held", "scan"))
    listed = replace(Datalist(training=cases(None, None, ("a",)), unlabeled=(scan,)), **{role: (held,)})
    with pytest.raises(ConfigError) as error:
        count_rounds(listed, AB, make_settings(strategy="both"))
    assert str(error.value) == (
        f"patient 'p' is in unlabeled and in {role}, and unlabeled images join the training. "
        "Keep a patient's cases together, or set `pseudolabel: {unlabeled: false}`."
    )
    with pytest.raises(ConfigError):
        count_rounds(listed, AB, make_settings(strategy="two_stage", pseudolabel={"unlabeled": True}))
    for settings_ in ({"strategy": "two_stage"}, {"strategy": "both", "pseudolabel": {"unlabeled": False}}):
        assert count_rounds(listed, AB, make_settings(**settings_)) == 2
    assert count_rounds(listed, AB, make_settings(strategy="marginal")) == 1


def test_the_first_round_of_two_stage_has_the_fully_annotated_cases() -> None:
    listed = Datalist(training=cases(None, ("a",), ("a", "b"), ("b",), None, None))
    first = first_round(listed, AB, make_settings(strategy="two_stage"))
    assert [c.name for c in first.training] == ["c0", "c2", "c4", "c5"]
    assert sorted(c.fold for c in first.training if c.fold is not None) == [0, 0, 1, 1]
    assert first_round(listed, AB, make_settings(strategy="both")).training == listed.training


def test_no_fully_annotated_case_explains_itself() -> None:
    listed = Datalist(training=cases(("a",), ("a",), ("b",)))
    with pytest.raises(ConfigError) as error:
        first_round(listed, AB, make_settings(strategy="two_stage"))
    assert str(error.value) == (
        "strategy: two_stage begins with the cases that are annotated for all 2 classes, but none is; the most "
        "complete one, c0, lacks b. "
        "Set `strategy: both` or `strategy: marginal`, which train on every labelled case at once."
    )
    with pytest.raises(ConfigError) as error:
        first_round(
            Datalist(training=cases(None, None, ("b",), groups={0: "p", 1: "p"})),
            AB,
            make_settings(strategy="two_stage"),
        )
    assert str(error.value) == (
        "strategy: two_stage begins with the cases that are annotated for all 2 classes, but one patient alone is, "
        "which leaves none to validate on. "
        "Set `strategy: both` or `strategy: marginal`, which train on every labelled case at once."
    )


def test_the_most_complete_case_is_named_by_what_it_has() -> None:
    listed = Datalist(training=cases((), ("a",), ("b",)))  # the first is annotated for nothing, not for all
    with pytest.raises(ConfigError, match="the most complete one, c1, lacks b"):
        first_round(listed, AB, make_settings(strategy="two_stage"))


def test_validation_cases_that_the_list_names_stay_so_in_all_rounds() -> None:
    folds = (None, None, None, 0, 0)
    made = zip(cases(None, None, ("a",), None, ("b",)), folds, strict=True)
    listed = Datalist(training=tuple(replace(c, fold=f) for c, f in made))
    first = first_round(listed, AB, make_settings(strategy="two_stage"))
    assert [(c.name, c.fold) for c in first.training] == [("c0", None), ("c1", None), ("c3", 0)]
    for how in (TWO, replace(TWO, continues=True)):
        assert later_round(listed, first, how, number=2, seed=0) == listed
    for how in (BOTH, replace(BOTH, continues=False)):
        assert later_round(listed, listed, how, number=2, seed=0) == listed
    for kept, lacking in (((0, 1, 2, 4), "validation"), ((2, 3, 4), "training")):
        some = replace(listed, training=tuple(listed.training[i] for i in kept))
        with pytest.raises(ConfigError) as error:
            first_round(some, AB, make_settings(strategy="two_stage"))
        assert str(error.value) == (
            "strategy: two_stage begins with the cases that are annotated for all 2 classes, but none of the "
            f"{lacking} cases is. "
            "Set `strategy: both` or `strategy: marginal`, which train on every labelled case at once."
        )


@pytest.mark.parametrize("group", ["p", None])
def test_an_unlabeled_scan_joins_in_the_fold_of_its_patient(phantoms: Path, tmp_path: Path, group: str | None) -> None:
    listed = read_datalist(phantoms / "datalist.json", phantoms)
    patient, *others = listed.training
    scan = replace(listed.unlabeled[0], group=group)
    listed = replace(listed, training=(replace(patient, group="p"), *others), unlabeled=(scan,))
    place = Workspace(tmp_path)
    write_datalist(listed, place.datalist, phantoms)
    write_json(place.completed, {scan.name: {"file": f"labels/{scan.name}.nii.gz", "annotated": None}})
    made = read_cases(place, phantoms)
    assert made.num_fold == 2
    learning = [f for f in range(2) if scan.name in {c.name for c in made.train_cases(f)}]
    assert learning == [f for f in range(2) if group is None or f != patient.fold]
    assert not any(c.name == scan.name for f in range(2) for c in made.val_cases(f))


def test_folds_of_a_later_round() -> None:
    listed = Datalist(training=cases(*[None] * 6, *[("a",)] * 6))
    first = first_round(listed, AB, make_settings(strategy="two_stage"))
    second = later_round(listed, first, TWO, number=2, seed=0)
    assert len(second.training) == 12
    for classes in (None, ("a",)):  # balanced over the label groups
        assert sorted(c.fold or 0 for c in second.training if c.annotated == classes) == [0] * 3 + [1] * 3
    again = later_round(listed, first, TWO, number=2, seed=0)
    assert again == second
    assert later_round(listed, first, TWO, number=2, seed=1) != second
    # From the previous weights: who was in a fold stays there.
    kept = later_round(listed, first, replace(TWO, continues=True), number=2, seed=0)
    fold_of = {c.name: c.fold for c in first.training}
    assert all(c.fold == fold_of[c.name] for c in kept.training if c.name in fold_of)
    assert sorted(c.fold or 0 for c in kept.training if c.name not in fold_of) == [0] * 3 + [1] * 3
    assert later_round(listed, listed, BOTH, number=2, seed=0) == listed


def test_folds_by_a_key_are_its_values_in_every_round() -> None:
    settings = make_settings(strategy="two_stage", folds_by="site")
    how = How.of(settings)
    listed = Datalist(
        training=tuple(
            replace(c, fold=i % 3, meta={"site": "ABC"[i % 3]})
            for i, c in enumerate(cases(None, ("a",), None, None, ("a",), None))
        )
    )
    first = first_round(listed, AB, settings)  # site B is annotated in part
    assert [(c.meta["site"], c.fold) for c in first.training] == [("A", 0), ("C", 1), ("A", 0), ("C", 1)]
    assert later_round(listed, first, how, number=2, seed=0) == listed
    kept = later_round(listed, first, replace(how, continues=True), number=2, seed=0)
    assert {(c.meta["site"], c.fold) for c in kept.training} == {("A", 0), ("B", 0), ("C", 1)}
    alone = replace(listed, training=tuple(replace(c, annotated=("a",)) if c.fold else c for c in listed.training))
    with pytest.raises(ConfigError, match="which train first, have one value alone. Set `strategy: both` or"):
        first_round(alone, AB, settings)


# -- the stage, with networks of random weights


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("partial")
    make_phantoms(
        folder,
        num_cases=4,
        num_testing=1,
        num_unlabeled=1,
        shape=(26, 24, 24),
        num_fold=2,
        annotated=[("sphere", "box"), ("box",), (), ("sphere",)],
    )
    return folder


def make_source(work_dir: Path, data: Path) -> tuple[Workspace, Workspace, Datalist]:
    """A run whose first round is done: two models of random weights and their ensemble."""
    run = Workspace(work_dir)
    listed = read_datalist(data / "datalist.json", data)
    write_datalist(listed, run.datalist, data)
    write_text(run.datastats_by_case, "stats_by_cases: []\n")
    run.plan_rounds(2)
    first = run.begin_round(1, continues=False)
    write_datalist(listed, first.datalist, data)
    for fold in range(2):
        make_job(first.root, "segresnet", fold, seed=fold)
    spec = {"name": "segresnet", "method": "auto", "combine": "mean", "members": [["segresnet", 0], ["segresnet", 1]]}
    write_json(first.ensemble_spec, {**spec, "classes": ["sphere", "box"], "dice": 0.8, "version": "0"})
    classes = [{"name": n, "mean": 0.8} for n in ("sphere", "box")]
    figures = {"num": 4, "std": 0.0, "median": None, "q25": None, "q75": None, "low": None, "high": None}
    summary = {"classes": [{**figures, **c} for c in classes], "mean": None, "low": None, "high": None, "num_cases": 4}
    scores = {
        "version": "0",
        "metric": "dice",
        "classes": [c["name"] for c in classes],
        "chosen": "segresnet",
        "candidates": [{**summary, "name": "segresnet", "combine": "mean", "members": [["segresnet", 0]]}],
        "cases": [],
        "testing": {},
        "gaps": [],
        "failures": [],
        "tolerance_mm": 2.0,
        "dice": summary,
        "nsd": summary,
        "calibration": None,
        "calibrated": [],
        "ensemble": {},
    }
    write_json(first.scores, scores)
    return first, run.begin_round(2, continues=True), listed


LABELS = LabelMap(names=("sphere", "box"), values=((1,), (2,)))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def open_settings(data: Path, strategy: str, **pseudolabel: Any) -> Settings:
    return make_settings(strategy=strategy, dataroot=data, device="cpu", pseudolabel=pseudolabel)


@pytest.mark.parametrize("strategy", ["two_stage", "both"])
def test_the_stage_fills_what_is_missing_and_nothing_else(phantoms: Path, tmp_path: Path, strategy: str) -> None:
    first, second, listed = make_source(tmp_path, phantoms)
    how = open_settings(phantoms, strategy, max_disagreement=2.0, confidence=0.4, unlabeled=True)
    result = make_pseudolabels(first, second, listed, how, LABELS)
    assert result.failures == ()
    made = read_cases(second, phantoms)
    by_name = {c.name: c for c in made.training}
    assert by_name["phantom_000"].completed is None  # annotated for all
    filled = 0
    for original in listed.training[1:]:
        case = by_name[original.name]
        if case.completed is None:
            continue
        assert original.label is not None
        own, new = read_label(original.label), read_label(case.completed.label)
        np.testing.assert_array_equal(own.grid.affine, new.grid.affine)
        np.testing.assert_array_equal(new.array[own.array != 0], own.array[own.array != 0])
        changes = set(np.unique(new.array[own.array == 0]).tolist()) - {0, UNSURE_VALUE}
        mine = {LABELS.values[LABELS.names.index(n)][0] for n in original.annotated or ()}
        assert not changes & mine
        filled += bool(changes)
        origin = json.loads((second.pseudolabels / "labels" / f"{case.name}.json").read_text())
        assert set(origin["models"]) == {"segresnet_0", "segresnet_1"}
        assert (origin["round"], origin["settings"]["strategy"]) == (2, strategy)
        # Scored by the original, learned by the completed label.
        assert case.fold is not None
        assert made.val_cases(case.fold)[[c.name for c in made.val_cases(case.fold)].index(case.name)].label == (
            original.label
        )
        learned = {c.name: c for c in made.train_cases(1 - case.fold)}[case.name]
        assert learned.label == case.completed.label
        assert learned.by_annotators == (original.annotated or ())
        assert set(original.annotated or ()) < set(learned.annotated or LABELS.names)
    assert filled >= 1
    joined = [c for c in made.training if c.label is None]
    assert [c.name for c in joined] == list(result.joined)
    for fold in range(2):
        assert all(c.label is not None for c in made.train_cases(fold))
        assert not {c.name for c in joined} & {c.name for c in made.val_cases(fold)}
    audit = json.loads(second.audit.read_text())
    assert audit["rows"] == sorted(audit["rows"], key=lambda r: (bool(r["rejected"]), -r["suspicion"]))
    unsure = sum(int((read_label(c.completed.label).array == UNSURE_VALUE).sum()) for c in made.training if c.completed)
    assert (unsure > 0) == (strategy == "both")
    assert unsure == sum(r["voxels_unsure"] for r in audit["rows"]) + audit["background"]["voxels_unsure"]
    assert audit["background"]["voxels_unsure"] == sum(audit["background"]["by_case"].values())
    assert {(r["case"], r["name"]) for r in audit["rows"]} >= {("phantom_001", "sphere"), ("phantom_003", "box")}


def test_soft_labels_count_by_their_probability(phantoms: Path, tmp_path: Path) -> None:
    first, second, listed = make_source(tmp_path, phantoms)
    how = open_settings(phantoms, "both", max_disagreement=2.0, confidence=0.4, soft=True, unlabeled=True)
    make_pseudolabels(first, second, listed, how, LABELS)
    made = read_cases(second, phantoms)
    originals = {c.name: c for c in (*listed.training, *listed.unlabeled)}
    completed = [c for c in made.training if c.completed is not None]
    assert completed
    for case in completed:
        learned = case.for_training()
        assert learned.weight is not None
        weight = read_label(learned.weight).array[0]
        percent = read_label(second.pseudolabels / "confidence" / f"{case.name}.nii.gz").array[0]
        label = originals[case.name].label
        known = np.zeros(weight.shape, bool) if label is None else read_label(label).array[0] > 0
        known |= read_label(learned.label).array[0] == UNSURE_VALUE
        assert (weight[known] == 100).all()
        np.testing.assert_array_equal(weight[~known], percent[~known])
    assert not missing_files(second)
    learned.weight.unlink()
    assert missing_files(second) == [f"weights/{case.name}.nii.gz"]
    make_pseudolabels(first, second, listed, how, LABELS)
    assert not missing_files(second)
    make_pseudolabels(first, second, listed, open_settings(phantoms, "both", max_disagreement=2.0), LABELS)
    assert all(c.for_training().weight is None for c in read_cases(second, phantoms).training)


@pytest.mark.parametrize("strategy", ["two_stage", "both"])
def test_an_excluded_class_is_never_filled(phantoms: Path, tmp_path: Path, strategy: str) -> None:
    first, second, listed = make_source(tmp_path, phantoms)
    how = open_settings(phantoms, strategy, exclude=["box"], unlabeled=True, max_disagreement=2.0, confidence=0.4)
    make_pseudolabels(first, second, listed, how, LABELS)
    made = {c.name: c for c in read_cases(second, phantoms).training}
    assert made["phantom_003"].completed is None  # has the sphere, and the box is not filled
    del made["phantom_001"]  # which annotators gave its box
    completed = [case.completed for case in made.values() if case.completed is not None]
    assert completed
    for label in completed:
        assert 1 in read_label(label.label).array
        assert 2 not in read_label(label.label).array
        assert label.annotated == ("sphere",)


def test_labels_that_are_no_longer_named_are_taken_away(phantoms: Path, tmp_path: Path) -> None:
    first, second, listed = make_source(tmp_path, phantoms)

    def files(**pseudolabel: Any) -> list[str]:
        how = open_settings(phantoms, "two_stage", **pseudolabel)
        make_pseudolabels(first, second, listed, how, LABELS)
        kinds = (second.pseudolabels / "labels", second.pseudolabels / "weights")
        return sorted(str(p.relative_to(second.pseudolabels)) for kind in kinds for p in kind.glob("*"))

    def made(name: str, *, soft: bool = False) -> list[str]:
        return [f"labels/{name}.json", f"labels/{name}.nii.gz", *([f"weights/{name}.nii.gz"] if soft else [])]

    names = ["phantom_001", "phantom_002", "phantom_003", "phantom_005"]
    assert files(unlabeled=True, soft=True) == sorted(f for n in names for f in made(n, soft=True))
    assert files() == [f for n in names[:3] for f in made(n)]
    assert files(exclude=["box"]) == [f for n in names[:2] for f in made(n)]
    assert files() == [f for n in names[:3] for f in made(n)]


def break_a_case(patch: pytest.MonkeyPatch) -> None:
    """Let phantom_001 be unreadable, for a reason that passes."""
    real = build.predict_case

    def failing(predictor: Any, folds: Any, images: Any, *words: Any, **more: Any) -> Any:
        if "phantom_001" in images[0].name:
            raise DataError("the share is not mounted")
        return real(predictor, folds, images, *words, **more)

    patch.setattr(build, "predict_case", failing)


def test_a_case_that_could_not_be_predicted_is_told_and_tried_again(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, listed = make_source(tmp_path, phantoms)
    how = open_settings(phantoms, "two_stage")
    with monkeypatch.context() as patch:
        break_a_case(patch)
        result = make_pseudolabels(first, second, listed, how, LABELS)
    assert result.failures == ("phantom_001: the share is not mounted",)
    assert result.text.endswith("the next run tries again:\nphantom_001: the share is not mounted")
    assert not_predicted(second) == ["phantom_001"]
    assert "phantom_001" not in json.loads(second.completed.read_text())
    result = make_pseudolabels(first, second, listed, how, LABELS)
    assert (result.failures, not_predicted(second)) == ((), [])
    assert "phantom_001" in json.loads(second.completed.read_text())


def test_a_record_never_speaks_for_another_prediction(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while a case is predicted by other settings, and started again with the first ones."""
    first, second, listed = make_source(tmp_path, phantoms)
    how, other = open_settings(phantoms, "two_stage"), open_settings(phantoms, "two_stage", filter=True)
    make_pseudolabels(first, second, listed, how, LABELS)
    before = contents(second.pseudolabels)
    real = write_volume

    def dying(path: Path, array: np.ndarray, grid: Grid) -> None:
        if path.parent.name == "confidence":
            raise KeyboardInterrupt
        real(path, np.full_like(array, 2), grid)

    with monkeypatch.context() as patch:
        patch.setattr(build, "write_volume", dying)
        with pytest.raises(KeyboardInterrupt):
            make_pseudolabels(first, second, listed, other, LABELS)
    make_pseudolabels(first, second, listed, how, LABELS)
    assert contents(second.pseudolabels) == before


def test_another_version_of_the_rules_makes_pseudo_labels_stale(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _, listed = make_source(tmp_path, phantoms)
    before = stage_inputs(first, listed, open_settings(phantoms, "both"), LABELS)
    monkeypatch.setattr(build, "VERSION", build.VERSION + 1)
    after = stage_inputs(first, listed, open_settings(phantoms, "both"), LABELS)
    assert changed(before, after) == ["version of pseudo-labels changed"]


@pytest.mark.parametrize("killed_in", ["predict", "write", "list"])
def test_killed_and_started_again_it_ends_with_the_same_labels(
    phantoms: Path, tmp_path: Path, killed_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = open_settings(phantoms, "both", max_disagreement=2.0, confidence=0.4)
    first, second, listed = make_source(tmp_path / "whole", phantoms)
    make_pseudolabels(first, second, listed, how, LABELS)
    whole = contents(second.pseudolabels)
    first, second, listed = make_source(tmp_path / "parts", phantoms)
    # Same weights, another time of writing: a digest of the models that differs is not what this is about.
    monkeypatch.setattr(build, "model_digest", lambda *_: "same")
    with monkeypatch.context() as patch:
        calls = 0
        name = {"predict": "predict_case", "write": "write_volume", "list": "write_datalist"}[killed_in]
        real = getattr(build, name)

        def dying(*words: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == {"predict": 3, "write": 8, "list": 1}[killed_in]:
                raise KeyboardInterrupt
            return real(*words, **more)

        patch.setattr(build, name, dying)
        with pytest.raises(KeyboardInterrupt):
            make_pseudolabels(first, second, listed, how, LABELS)
    # A case's record is written last, so the case at hand may have files and no record.
    records = {p.stem for p in (second.pseudolabels / "evidence").glob("*.json")}
    files = [p for p in (second.pseudolabels / "predicted").glob("*") if p.name.split(".")[0] in records]
    before = {p: p.stat().st_mtime_ns for p in files}
    assert len(before) >= 2
    make_pseudolabels(first, second, listed, how, LABELS)
    assert {p: p.stat().st_mtime_ns for p in before} == before, "what was whole is not made again"
    parts = contents(second.pseudolabels)
    volumes = [name for name in whole if name.endswith(".nii.gz")]
    assert sorted(parts) == sorted(whole)
    assert {name: parts[name] for name in volumes} == {name: whole[name] for name in volumes}
    for name in ("audit.json", "completed.json"):
        assert parts[name] == whole[name]


def test_scores_are_unchanged_by_what_pseudo_labels_say(phantoms: Path, tmp_path: Path) -> None:
    first, second, listed = make_source(tmp_path, phantoms)
    how = open_settings(phantoms, "both", max_disagreement=2.0, confidence=0.4)
    make_pseudolabels(first, second, listed, how, LABELS)
    for fold in range(2):
        make_job(second.root, "segresnet", fold, seed=fold + 5)

    def scores() -> list[Any]:
        made = read_cases(second, phantoms)
        found, failures = score_out_of_fold(
            second, made, {0: ["segresnet"], 1: ["segresnet"]}, combine="mean", device="cpu"
        )
        assert failures == []
        return [(c.name, c.fold, str(dict(c.dice))) for c in found]

    before = scores()
    assert len(before) == 4
    assert [dice for name, _, dice in before if name == "phantom_002"] == ["{'segresnet': [nan, nan]}"]
    rng = np.random.default_rng(0)
    for path in (second.pseudolabels / "labels").glob("*.nii.gz"):
        junk = read_label(path)
        write_volume(path, rng.choice([0, 1, 2, UNSURE_VALUE], junk.array.shape[1:]).astype(np.uint16), junk.grid)
    (second.ensemble / "records" / "phantom_001.json").unlink()
    for record in (second.ensemble / "records").glob("*.json"):
        record.unlink()
    assert scores() == before


def test_an_original_label_that_changed_is_noticed(phantoms: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    make_phantoms(
        data, num_cases=4, num_testing=0, shape=(26, 24, 24), num_fold=2, annotated=[("sphere", "box"), ("box",)]
    )
    first, second, listed = make_source(tmp_path / "work", data)
    how = open_settings(data, "two_stage")
    before = stage_inputs(first, listed, how, LABELS)
    make_pseudolabels(first, second, listed, how, LABELS)
    second.stamp("pseudolabel", before)
    assert second.stale("pseudolabel", stage_inputs(first, listed, how, LABELS)) == []
    path = listed.training[1].label
    assert path is not None
    old = case_digest(listed.training[1])
    label = read_label(path)
    label.array[0, 0, 0, 0] = 2
    write_volume(path, label.array[0], label.grid)
    assert case_digest(listed.training[1]) != old
    assert changed(before, stage_inputs(first, listed, how, LABELS)) == ["case phantom_001 changed"]
    make_pseudolabels(first, second, listed, how, LABELS)
    assert read_label(second.pseudolabels / "labels" / "phantom_001.nii.gz").array[0, 0, 0, 0] == 2
