"""Coded terms of classes: each code of the table is SNOMED's, names find them, and the user's own win."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from pydicom.sr._concepts_dict import concepts
from pydicom.sr._snomed_dict import mapping

from autoseg.config.settings import ClassCodes, RunSettings
from autoseg.data import terms
from autoseg.data.terms import (
    CATEGORIES,
    LEFT,
    RIGHT,
    STRUCTURE,
    TISSUE,
    UNKNOWN,
    Code,
    Term,
    check_codes,
    find_term,
    term_of,
)
from autoseg.errors import ConfigError

ROWS = list(csv.DictReader(Path(terms.TABLE).read_text(encoding="utf-8").splitlines()))
MEANINGS: dict[str, set[str]] = {}
"""SNOMED's code -> its meanings, in lower case, as pydicom has them."""
for codes in concepts["SCT"].values():
    for value, (meaning, _) in codes.items():
        MEANINGS.setdefault(value, set()).add(meaning.lower())


def test_every_code_is_snomeds_with_its_meaning() -> None:
    assert len(ROWS) > 200
    for row in ROWS:
        assert row["meaning"].lower() in MEANINGS[row["code"]], row
    assert len({row["code"] for row in ROWS}) == len(ROWS)
    sided = {"Left": "7771000", "Right": "24028007"}
    for code in (LEFT, RIGHT):
        assert sided[code.meaning] == code.value
        assert code.value in MEANINGS
    for name, code in CATEGORIES.items():
        # Of this one pydicom has SNOMED's own words, and the code that DICOM used for it before.
        expected = "body structure (body structure)" if name == "structure" else code.meaning.lower()
        assert expected in MEANINGS[code.value]
    assert mapping["SCT"][STRUCTURE.value] == "T-D000A"
    assert mapping["SCT"][TISSUE.value] == "T-D0050"


def test_each_name_of_the_table_finds_its_own_row() -> None:
    for row in ROWS:
        for name in row["names"].split("|"):
            term = find_term(name)
            assert term is not None
            assert (term.type.value, term.category) == (row["code"], CATEGORIES[row["category"]]), name


@pytest.mark.parametrize(
    ("name", "code", "side"),
    [
        ("liver", "10200004", None),
        ("LIVER ", "10200004", None),
        ("left kidney", "64033007", LEFT),
        ("Kidney_R", "64033007", RIGHT),
        ("LKidney", "64033007", LEFT),
        ("Kidneys", "64033007", None),
        ("adrenal_gland_left", "23451007", LEFT),
        ("lung_upper_lobe_right", "45653009", RIGHT),
        ("lung_middle_lobe_right", "72481006", None),  # the code has the side in it
        ("heart_atrium_left", "82471001", None),
        ("vertebrae_T12", "23215003", None),
        ("vertebrae_L1", "66794005", None),  # no left vertebra
        ("rib_left_7", "113197003", LEFT),
        ("Head of Femur", "2812003", None),
        ("IVC", "64131007", None),
        ("oesophagus", "32849002", None),
    ],
)
def test_names_of_data_sets_are_understood(name: str, code: str, side: Code | None) -> None:
    term = find_term(name)
    assert term is not None
    assert (term.type.value, term.modifier, term.region) == (code, side, None)


def test_something_abnormal_lies_in_an_organ() -> None:
    kidney = Code("SCT", "64033007", "Kidney")
    cyst = find_term("kidney_cyst_left")
    assert cyst == Term(
        category=CATEGORIES["abnormal"], type=Code("SCT", "367643001", "Cyst"), region=kidney, region_modifier=LEFT
    )
    tumor = find_term("Pancreas Tumour")
    assert tumor is not None
    assert (tumor.type.meaning, tumor.region) == ("Neoplasm", Code("SCT", "15776009", "Pancreas"))
    assert (find_term("tumor").type.value, find_term("tumor").region) == ("108369006", None)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["sphere", "anterior", "class_1", "c1", "L", "left", "", "1", "leber", "liver map"])
def test_what_is_not_known_is_a_tissue(name: str) -> None:
    assert find_term(name) is None
    assert term_of(name, {}) == UNKNOWN == Term(category=STRUCTURE, type=TISSUE)


@given(st.text(max_size=30))
def test_no_name_is_too_odd(name: str) -> None:
    term = term_of(name, {})
    assert term.type.scheme == "SCT"


def test_the_users_codes_win() -> None:
    codes = {
        "liver": "SCT,15776009,Pancreas",
        "niere": "left kidney",
        "met": ClassCodes(type="metastasis", region="liver"),
        "own": ClassCodes(type="99ABC,X1,Thing, of mine", category="99ABC,X,Things", modifier="right"),
    }
    assert term_of("liver", codes) == Term(category=STRUCTURE, type=Code("SCT", "15776009", "Pancreas"))
    assert term_of("niere", codes) == find_term("kidney_left")
    assert term_of("met", codes) == find_term("liver metastasis")
    assert term_of("own", codes) == Term(
        category=Code("99ABC", "X", "Things"), type=Code("99ABC", "X1", "Thing, of mine"), modifier=RIGHT
    )
    check_codes(codes, ["liver", "niere", "met", "own", "other"])


def test_wrong_codes_are_all_named() -> None:
    with pytest.raises(ConfigError) as caught:
        check_codes({"livr": "liver", "spleen": "splen"}, ["liver", "spleen"])
    assert caught.value.messages == (
        "codes: livr is no class. Did you mean liver?",
        "codes.spleen: 'splen' is not in the table of codes. Did you mean spleen? Expected a name that is, or scheme, "
        "code and meaning, such as 'SCT,10200004,Liver'.",
    )
    field = TypeAdapter(RunSettings.model_fields["codes"].rebuild_annotation())
    for wrong in ("SCT,10200004", "SCT,,Liver", f"SCT,1,{'x' * 65}", "SCT,12345678901234567,x", ","):
        with pytest.raises(ValidationError):
            field.validate_python({"liver": wrong})
    assert field.validate_python({"a": {"type": "liver"}}) == {"a": ClassCodes(type="liver")}
