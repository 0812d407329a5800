"""Pseudo-labels: what is predicted, accepted, filled in; and that annotators always win."""

from __future__ import annotations

import json
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

from autoseg.config import Settings
from autoseg.data.cases import Case, Datalist, files_digest
from autoseg.data.datalist import read_cases, read_datalist, write_datalist
from autoseg.data.labels import LabelMap, merge_left_right
from autoseg.data.phantoms import make_phantoms
from autoseg.data.volumes import Grid, read_label, write_volume
from autoseg.ensemble.out_of_fold import score_out_of_fold
from autoseg.errors import ConfigError
from autoseg.inference.restore import Member
from autoseg.pseudolabel import build
from autoseg.pseudolabel.audit import suspicion, volume_z
from autoseg.pseudolabel.build import make_pseudolabels, missing_files, stage_inputs
from autoseg.pseudolabel.complete import complete_label, ignore_value
from autoseg.pseudolabel.evidence import ClassEvidence, choose, disagreements, predict_case
from autoseg.pseudolabel.judge import judge
from autoseg.pseudolabel.rounds import How, cases_to_fill, count_rounds, first_round, later_round
from autoseg.workspace import Workspace, changed, write_json, write_text

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
    ignored=st.sampled_from((None, 200)),
)
@settings(max_examples=200, deadline=None)
def test_annotators_win_and_only_accepted_classes_are_filled(
    label: list[int],
    predicted: list[int],
    percent: list[int],
    accepted: set[str],
    confidence: float,
    ignored: int | None,
) -> None:
    label_map = replace(FOUR, ignore_label=ignored)
    own = np.array(label, np.uint8).reshape(3, 2, 2)
    if ignored:
        own[0, 0, 0] = ignored
    value = ignore_value(label_map)
    assert value == (ignored or 255)
    done = complete_label(
        own,
        np.array(predicted, np.uint8).reshape(3, 2, 2),
        np.array(percent, np.uint8).reshape(3, 2, 2),
        label_map=label_map,
        accepted=sorted(accepted),
        confidence=confidence,
        ignore_value=value,
    )
    annotated = own != 0
    np.testing.assert_array_equal(done.label[annotated], own[annotated])
    allowed = {label_map.values[label_map.names.index(n)][0] for n in accepted} | {0, value}
    assert set(done.label[~annotated].tolist()) <= allowed
    if confidence == 0:
        assert value not in done.label[~annotated]
    assert sum(done.filled.values()) == int((~annotated & (done.label != 0) & (done.label != value)).sum())
    assert sum(done.ignored.values()) == int((~annotated & (done.label == value)).sum())


def test_a_completed_label_voxel_by_voxel() -> None:
    own = np.array([1, 0, 0, 0, 0, 0], np.uint8).reshape(6, 1, 1)
    predicted = np.array([2, 2, 2, 5, 0, 0], np.uint8).reshape(6, 1, 1)
    percent = np.array([99, 90, 60, 99, 60, 99], np.uint8).reshape(6, 1, 1)
    how = {"label_map": FOUR, "accepted": ["b"], "ignore_value": 255}
    done = complete_label(own, predicted, percent, confidence=0.7, **how)  # type: ignore[arg-type]
    assert done.label.ravel().tolist() == [1, 2, 255, 0, 255, 0]
    assert (done.filled, done.ignored) == ({"b": 1}, {"b": 1, "background": 1})
    plain = complete_label(None, predicted, percent, confidence=0.0, **how)  # type: ignore[arg-type]
    assert plain.label.ravel().tolist() == [2, 2, 2, 0, 0, 0]


def test_a_free_value_marks_ignored_voxels() -> None:
    assert ignore_value(LabelMap(names=("x",), values=((255,),))) == 256
    assert ignore_value(replace(FOUR, ignore_label=7)) == 7


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
@settings(max_examples=30, deadline=None)
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


def test_folds_of_a_later_round() -> None:
    listed = Datalist(training=cases(*[None] * 6, *[("a",)] * 6))
    first = first_round(listed, AB, make_settings(strategy="two_stage"))
    second = later_round(listed, first, AB, TWO, number=2, seed=0)
    assert len(second.training) == 12
    for classes in (None, ("a",)):  # balanced over the label groups
        assert sorted(c.fold or 0 for c in second.training if c.annotated == classes) == [0] * 3 + [1] * 3
    again = later_round(listed, first, AB, TWO, number=2, seed=0)
    assert again == second
    assert later_round(listed, first, AB, TWO, number=2, seed=1) != second
    assert second.ignore_label is None
    # From the previous weights: who was in a fold stays there.
    kept = later_round(listed, first, AB, replace(TWO, continues=True), number=2, seed=0)
    fold_of = {c.name: c.fold for c in first.training}
    assert all(c.fold == fold_of[c.name] for c in kept.training if c.name in fold_of)
    assert sorted(c.fold or 0 for c in kept.training if c.name not in fold_of) == [0] * 3 + [1] * 3
    assert later_round(listed, listed, AB, BOTH, number=2, seed=0) == replace(listed, ignore_label=255)


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
    write_json(first.ensemble_spec, {"members": [["segresnet", 0], ["segresnet", 1]]})
    classes = [{"name": n, "mean": 0.8} for n in ("sphere", "box")]
    write_json(first.scores, {"chosen": "segresnet", "candidates": [{"name": "segresnet", "classes": classes}]})
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
        changes = set(np.unique(new.array[own.array == 0]).tolist()) - {0, 255}
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
        assert set(original.annotated or ()) < set(learned.annotated or LABELS.names)
    assert filled >= 1
    joined = [c for c in made.training if c.label is None]
    assert [c.name for c in joined] == list(result.joined)
    for fold in range(2):
        assert all(c.label is not None for c in made.train_cases(fold))
        assert not {c.name for c in joined} & {c.name for c in made.val_cases(fold)}
    assert made.ignore_label == (255 if strategy == "both" else None)
    audit = json.loads(second.audit.read_text())
    assert [r["suspicion"] for r in audit["rows"]] == sorted((r["suspicion"] for r in audit["rows"]), reverse=True)
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
        assert (weight[known] == 100).all()
        np.testing.assert_array_equal(weight[~known], percent[~known])
    assert not missing_files(second)
    learned.weight.unlink()
    assert missing_files(second) == [f"weights/{case.name}.nii.gz"]
    make_pseudolabels(first, second, listed, how, LABELS)
    assert not missing_files(second)
    make_pseudolabels(first, second, listed, open_settings(phantoms, "both", max_disagreement=2.0), LABELS)
    assert all(c.for_training().weight is None for c in read_cases(second, phantoms).training)


def test_an_excluded_class_is_never_filled(phantoms: Path, tmp_path: Path) -> None:
    first, second, listed = make_source(tmp_path, phantoms)
    how = open_settings(phantoms, "two_stage", exclude=["box"], unlabeled=True)
    make_pseudolabels(first, second, listed, how, LABELS)
    made = {c.name: c for c in read_cases(second, phantoms).training}
    assert made["phantom_003"].completed is None  # has the sphere, and the box is not filled
    for case in made.values():
        if case.completed is not None and case.name != "phantom_001":  # which annotators gave its box
            assert 2 not in read_label(case.completed.label).array
            assert case.completed.annotated == ("sphere",)


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
        make_job(second.root, "segresnet", fold, seed=fold + 5, ignore_label=255)

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
        write_volume(path, rng.choice([0, 1, 2, 255], junk.array.shape[1:]).astype(np.uint8), junk.grid)
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
    old = files_digest(listed.training[1])
    label = read_label(path)
    label.array[0, 0, 0, 0] = 2
    write_volume(path, label.array[0], label.grid)
    assert files_digest(listed.training[1]) != old
    assert changed(before, stage_inputs(first, listed, how, LABELS)) == ["case phantom_001 changed"]
    make_pseudolabels(first, second, listed, how, LABELS)
    assert read_label(second.pseudolabels / "labels" / "phantom_001.nii.gz").array[0, 0, 0, 0] == 2
