"""Further facts of cases: kept, read from a table, made into folds, and looked at group by group."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoseg.cli.main import run_command
from autoseg.data.datalists.cases import Case, Datalist
from autoseg.data.datalists.datalist import read_datalist, write_datalist
from autoseg.data.datalists.metadata import folds_by, misspelt
from autoseg.errors import ConfigError
from autoseg.evaluation.subgroups import factors_of, rows_to_csv, rows_to_json, table_of

Put = Callable[..., Path]
NUM = 8


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data root with small files that are only listed, not read."""
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
        for i in range(NUM + 2):
            (tmp_path / kind / f"c{i}.nii.gz").touch()
    return tmp_path


@pytest.fixture
def put(root: Path) -> Put:
    """Writes a datalist of the cases, with further keys."""

    def write(*further: dict[str, Any], **top: Any) -> Path:
        items = [
            {"image": f"images/c{i}.nii.gz", "label": f"labels/c{i}.nii.gz", **(further[i % len(further)])}
            for i in range(NUM)
        ]
        path = root / "datalist.json"
        path.write_text(json.dumps({"training": items, **top}))
        return path

    return write


def faults(call: Callable[[], Datalist]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        call()
    return list(caught.value.messages)


def test_further_keys_are_kept_and_written_again(root: Path, put: Put) -> None:
    facts = {"site": "Bern", "age": 61, "weight": 70.5, "smoker": False, "scanner": " Sola ", "note": ""}
    path = put(facts, testing=[{"image": "images/c8.nii.gz", "site": "Basel"}])
    data = read_datalist(path, root)
    assert data.training[0].meta == {"site": "Bern", "age": 61, "weight": 70.5, "smoker": False, "scanner": "Sola"}
    assert data.testing[0].meta == {"site": "Basel"}
    write_datalist(data, root / "again.json", root)
    assert read_datalist(root / "again.json", root) == data
    assert len({*data.training}) == NUM  # cases can still be kept in sets


@pytest.mark.parametrize(
    "key", ["age", "sex", "site", "scanner", "stage", "grade", "folder", "imaging_date", "labeler"]
)
def test_no_usual_fact_is_taken_for_a_misspelt_key(key: str) -> None:
    assert misspelt(key, ("image", "label", "fold", "annotated", "group")) is None


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lable", "label"), ("Image", "image"), ("images", "image"), ("imgae", "image"), ("labels", "label"),
        ("flod", "fold"), ("folds", "fold"), ("anotated", "annotated"), ("annotted", "annotated"), ("gruop", "group"),
        ("image2", "image"),
    ],
)  # fmt: skip
def test_misspelt_keys_are_still_faults(root: Path, put: Put, key: str, meant: str) -> None:
    assert misspelt(key, ("image", "label", "fold", "annotated", "group")) == meant
    path = put({key: "x"})
    assert faults(lambda: read_datalist(path, root))[0] == (
        f"{path}: training[0]: {key}: unknown key. Did you mean {meant}?"
    )


def test_what_is_not_kept_and_what_means_a_patient_is_said(
    root: Path, put: Put, caplog: pytest.LogCaptureFixture
) -> None:
    path = put({"patient_id": "7", "box": [1, 2], "t2": "images/c9.nii.gz"})
    assert faults(lambda: read_datalist(path, root))[0] == (
        f"{path}: training[0]: t2: images/c9.nii.gz is named like an image. Name the key under extra_modalities to "
        "read it as a channel, or leave it out."
    )
    path = put({"patient_id": "7", "box": [1, 2]})
    with caplog.at_level(logging.WARNING):
        assert read_datalist(path, root).training[0].meta == {"patient_id": "7"}
    assert [r.getMessage() for r in caplog.records] == [
        f"{path}: box: lists, objects and infinite numbers are not kept of further keys of a case.",
        f"{path}: patient_id is kept as metadata alone. Call it `group` for scans of one patient to stay in one fold.",
    ]


# -- a table


def test_a_table_is_joined_by_name_file_or_path(root: Path, put: Put, caplog: pytest.LogCaptureFixture) -> None:
    path = put({"site": "old"})
    table = root / "meta.csv"
    table.write_text(
        "\ufeffcase;site;age;note\nc0;Bern;61;\nc1.nii.gz;Basel;7,5;x\n./images/c2.nii.gz;Chur;;y\n"
        f"{root}/images/c3.nii.gz;Chur;50.5;\nnobody;Bern;1;\n"
    )
    with caplog.at_level(logging.WARNING):
        data = read_datalist(path, root, meta=table)
    assert [dict(c.meta) for c in data.training[:5]] == [
        {"site": "Bern", "age": 61},
        {"site": "Basel", "age": 7.5, "note": "x"},
        {"site": "Chur", "note": "y"},
        {"site": "Chur", "age": 50.5},
        {"site": "old"},
    ]
    assert [r.getMessage() for r in caplog.records] == ["meta.csv: 1 rows are of no case: nobody"]


def test_cells_are_what_they_were_written_as(root: Path, put: Put) -> None:
    """Names made of digits stay names, and what says that nothing is known says nothing."""
    table = root / "meta.csv"
    table.write_text(",scanner,case,name,visit,dose,big,age\n,007,c0,Ann,1_2,1e3,1e999,n/a\n,7,c1,Bo,-1,.5,inf,NaN\n")
    data = read_datalist(put({}), root, meta=table)
    assert dict(data.training[0].meta) == {
        "scanner": "007",
        "name": "Ann",
        "visit": "1_2",
        "dose": 1000,
        "big": "1e999",
    }
    assert dict(data.training[1].meta) == {"scanner": 7, "name": "Bo", "visit": -1, "dose": 0.5, "big": "inf"}
    write_datalist(data, root / "again.json", root)
    assert read_datalist(root / "again.json", root) == data


def test_a_row_of_two_cases_is_refused(root: Path, put: Put) -> None:
    for folder in ("a", "b"):
        (root / folder).mkdir()
        (root / folder / "scan.nii.gz").touch()
    path = put({}, testing=[{"image": "a/scan.nii.gz"}, {"image": "b/scan.nii.gz"}])
    table = root / "meta.csv"
    table.write_text("case,site\nscan.nii.gz,Bern\n")
    assert faults(lambda: read_datalist(path, root, meta=table)) == [
        f"meta: {table}: row scan.nii.gz may be of case a_scan or of b_scan. Give the case's name, or more of the "
        "image's path."
    ]
    table.write_text("case,site\na/scan.nii.gz,Bern\nb/scan.nii.gz,Chur\n")
    assert [c.meta["site"] for c in read_datalist(path, root, meta=table).testing] == ["Bern", "Chur"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case,site\nc0,Bern\nimages/c0.nii.gz,Basel\n", "c0 and images/c0.nii.gz are two rows of case c0. Keep one."),
        (
            "case,image,site\nc0,c0.png,Bern\n",
            "column image: the datalist has this for each case. Move it there, or rename it.",
        ),
        ("case,,site\nc0,9,Bern\n", "column 2 has no name, and cells such as 9. Name it, or remove it."),
        ("", "the file is empty. Expected a header and a row for each case."),
        ("id,site\nc0,Bern\n", "no column `case`. Found id, site. Name the cases in one."),
        ("case,site\nc0,Bern\nc0,Basel\n", "c0 has two rows. Keep one."),
        ("case,site\nc0\n", "row 2 has 1 cells, the header 2. Correct the row."),
        ("case,site,site\nc0,a,b\n", "column 'site' stands twice. Keep one."),
        ("case,fold\nc0,1\n", "column fold: the datalist has this for each case. Move it there, or rename it."),
        ("case,Group\nc0,1\n", "column Group: the datalist has this for each case. Move it there, or rename it."),
        (
            "case,site\nx,Bern\n",
            "none of its 1 rows is of a case. Found x, and cases such as c0. Expected names of cases, or of their "
            "images' files.",
        ),
        ('case,site\nc0,"Bern\n', "not a CSV table (unexpected end of data). Correct it."),
    ],
)
def test_faults_of_a_table(root: Path, put: Put, text: str, message: str) -> None:
    path, table = put({}), root / "meta.csv"
    table.write_text(text)
    assert faults(lambda: read_datalist(path, root, meta=table)) == [f"meta: {table}: {message}"]


# -- folds by site


def test_each_site_is_a_fold(root: Path, put: Put) -> None:
    data = read_datalist(put({"site": "Chur"}, {"site": "Bern"}, {"site": "Chur"}, {"site": 3}), root, folds_by="site")
    assert [c.fold for c in data.training] == [2, 1, 2, 0] * 2
    assert data.num_fold == 3
    for fold in range(3):
        seen = {c.meta["site"] for c in data.train_cases(fold)}
        assert not seen & {c.meta["site"] for c in data.val_cases(fold)}


@pytest.mark.parametrize(
    ("further", "message"),
    [
        (
            ({"site": "a", "fold": 0}, {"site": "b", "fold": 1}),
            "datalist.json has folds of its own. Leave one of the two",
        ),
        (({"site": "a"}, {"age": 3}), "site: 4 of 8 training cases do not have it: c1, c3, c5, c7. Found age, site."),
        (({},), "site: 8 of 8 training cases do not have it: c0, c1, c2, c3, c4 and 3 more. The cases have no further"),
        (({"site": "a"},), "site: all 8 training cases have a. Expected two values."),
        (
            ({"site": "St_Gall"}, {"site": "ST GALL"}, {"site": "Bern"}),
            "site: found 'ST GALL' and 'St_Gall', which seem to be one. Spell them alike: else models learn from what "
            "they are scored on.",
        ),
        (
            ({"site": "a", "group": "p"}, {"site": "b", "group": "p"}),
            "site: patient 'p' has cases of a and b. Cases of a patient must be in one fold.",
        ),
    ],
)
def test_faults_of_folds_by_site(root: Path, put: Put, further: tuple[dict[str, Any], ...], message: str) -> None:
    path = put(*further)
    (text,) = faults(lambda: read_datalist(path, root, folds_by="site"))
    assert text.startswith(f"folds_by: {message}")


def test_a_number_that_differs_in_each_case_makes_no_folds() -> None:
    def cases(num_values: int) -> list[Case]:
        return [Case(name=f"c{i}", images=(Path("x.nii.gz"),), meta={"age": i % num_values}) for i in range(22)]

    (text,) = faults(lambda: folds_by(cases(12), "age", path=Path("datalist.json")))
    assert text == (
        "folds_by: age: found 12 values in 22 training cases, such as 0, 1, 10, 11, 2 and 7 more: 12 folds, most of "
        "one case. Give a key that many cases share, such as a site."
    )
    assert len({case.fold for case in folds_by(cases(11), "age", path=Path("datalist.json"))}) == 11


# -- groups


def test_facts_become_groups() -> None:
    facts: dict[str, dict[str, Any]] = {
        f"c{i}": {"site": "AB"[i % 2], "age": 20 + 2 * i, "grade": 3 - i % 3, "id": f"x{i}", "all": 1, "old": i > 20}
        for i in range(30)
    }
    del facts["c4"]["site"]
    factors, notes = factors_of(facts)
    by_name = {f.name: f for f in factors}
    assert {name: f.levels for name, f in by_name.items()} == {
        "site": ("A", "B", "not given"),
        "age": ("up to 39.33", "39.33 to 58.67", "over 58.67"),
        "grade": ("1", "2", "3"),
        "old": ("no", "yes"),
    }
    assert notes == ("id: 30 different values of 30 cases make no groups.",)
    assert by_name["site"].level_of["c4"] == "not given"
    counts = [list(by_name["age"].level_of.values()).count(level) for level in by_name["age"].levels]
    assert counts == [10, 10, 10]


def test_numbers_as_texts_are_numbers_and_names_are_no_groups() -> None:
    facts: dict[str, dict[str, Any]] = {
        f"c{i}": {"age": str(20 + 3 * i) if i % 2 else 20.0 + 3 * i, "day": 20210300 + i, "date": f"2021-03-{i:02d}"}
        for i in range(9)
    }
    factors, notes = factors_of(facts)
    assert {f.name: f.levels for f in factors} == {
        "age": ("up to 28", "28 to 36", "over 36"),
        "day": ("up to 20210303", "20210303 to 20210305", "over 20210305"),
    }
    assert notes == ("date: 9 different values of 9 cases make no groups.",)
    assert factors_of({"a": {"n": 10**400}, "b": {"n": 1}, "c": {"n": 1}})[0][0].levels == ("1", str(10**400))
    # 3, 3.0 and "3" are one group.
    grades = {f"c{i}": {"grade": v} for i, v in enumerate((3, 3.0, "3", "2", 2.5, 2.5))}
    assert [f.levels for f in factors_of(grades)[0]] == [("2", "2.5", "3")]


def study(effect: float, seed: int = 0) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]], dict[str, int]]:
    """Scores of 120 scans of 60 patients of three sites, the second of which is worse, and one class many lack."""
    rng = np.random.default_rng(seed)
    facts, scores, patients = {}, {}, {}
    for p in range(60):
        site = "ABC"[p % 3]
        of_patient = rng.beta(18, 2) - effect * (site == "B")
        for s in range(2):
            name = f"c{p}_{s}"
            facts[name] = {"site": site, "sex": "mf"[p // 3 % 2]}
            hard = of_patient - 0.4 if site == "C" or p % 2 else math.nan
            scores[name] = [of_patient + 0.01 * rng.standard_normal(), hard]
            patients[name] = p
    return facts, scores, patients


def test_the_site_that_differs_is_found_and_no_other() -> None:
    facts, scores, patients = study(0.1)
    rows = {(r.factor, r.level): r for r in table_of(factors_of(facts)[0], scores, patients)}
    assert {key: row.words for key, row in rows.items() if key[0] == "sex"} == {
        ("sex", "f"): "no clear difference", ("sex", "m"): "no clear difference",
    }  # fmt: skip
    worse = rows["site", "B"]
    assert worse.words == "lower"
    assert worse.difference == pytest.approx(-0.1, abs=0.04)
    assert worse.difference_low < worse.difference < worse.difference_high < 0
    assert (worse.num, worse.num_patients) == (40, 20)
    # All cases of C have the hard class, which lowers their mean, but not what C is compared by.
    assert rows["site", "C"].mean < rows["site", "A"].mean - 0.05
    assert rows["site", "C"].words != "lower"
    # One test, shown twice.
    assert rows["sex", "m"].p == rows["sex", "f"].p
    assert rows["sex", "m"].difference == pytest.approx(-rows["sex", "f"].difference)


def test_sites_without_an_effect_are_found_in_at_most_one_of_twenty_runs() -> None:
    found = 0
    for seed in range(200):
        facts, scores, patients = study(0.0, seed)
        found += any(row.p is not None and row.p < 0.05 for row in table_of(factors_of(facts)[0], scores, patients))
    assert found <= 10


def test_the_table_as_csv() -> None:
    facts: dict[str, dict[str, Any]] = {f"c{i}": {"site": "=1+1" if i < 2 else "b, c"} for i in range(5)}
    rows = table_of(factors_of(facts)[0], {name: [0.5 + 0.1 * i] for i, name in enumerate(facts)}, {})
    table = list(csv.DictReader(io.StringIO(rows_to_csv(rows))))
    assert [(r["level"], r["num"], r["p"], r["finding"]) for r in table] == [
        ("'=1+1", "2", "", "too few to test"), ("b, c", "3", "", "too few to test"),
    ]  # fmt: skip
    assert float(table[1]["mean"]) == pytest.approx(0.8)
    assert json.dumps(rows_to_json(rows), allow_nan=False)


# -- a run


def test_a_site_spelt_twice_is_told(phantom_dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(phantom_dataset, tmp_path / "run")
    path = tmp_path / "run" / "datalist.json"
    listed = json.loads(path.read_text())
    for i, case in enumerate(listed["training"]):
        case["site"] = ("Bern", "bern ", "Chur")[i % 3]
    path.write_text(json.dumps(listed))
    assert run_command(["analyze", "--input", str(tmp_path / "run" / "input.yaml")]) == 0
    summary = json.loads((tmp_path / "run" / "work_dir" / "state" / "summary.json").read_text())
    found = [f["finding"] for f in summary["warnings"] if f["kind"] == "metadata"]
    assert found == ["site: 'Bern' (2 cases) and 'bern' (2) seem to be one"]


def test_a_finished_run_learns_of_sites_without_training_again(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "run", copy_function=shutil.copy2)
    folder, work_dir = tmp_path / "run", tmp_path / "run" / "work_dir"
    listed = json.loads((folder / "datalist.json").read_text())
    listed["testing"] = [
        {**case, "label": case["image"].replace("images", "labels"), "site": "away"} for case in listed["testing"]
    ]
    for case in listed["testing"]:  # what was predicted serves as a label
        name = Path(case["image"]).name
        shutil.copy2(work_dir / "ensemble" / "predictions" / name, folder / "labels" / name)
    (folder / "datalist.json").write_text(json.dumps(listed))
    rows = [f"{Path(case['image']).name},{'AB'[i % 2]}" for i, case in enumerate(listed["training"])]
    (folder / "facts.csv").write_text("\n".join(["case,site", *rows]))
    before = {path: path.read_bytes() for path in work_dir.glob("*_?/job.json")}
    assert before
    assert run_command(["run", "--input", str(folder / "input.yaml"), "--meta", str(folder / "facts.csv")]) == 0
    assert {path: path.read_bytes() for path in before} == before
    table = list(csv.DictReader(io.StringIO((work_dir / "ensemble" / "subgroups.csv").read_text())))
    sites = [row for row in table if row["factor"] == "site"]
    assert [(row["level"], row["num"]) for row in sites] == [("A", "4"), ("B", "4")]
    assert {row["factor"] for row in table} == {"site", "size (ml)"}
    scores = json.loads((work_dir / "ensemble" / "scores.json").read_text())
    means = {name: np.mean([v for v in case["dice"] if v is not None]) for name, case in scores["ensemble"].items()}
    expected = np.mean([means[Path(c["image"]).name.partition(".")[0]] for c in listed["training"][::2]])
    assert float(sites[0]["mean"]) == pytest.approx(expected, abs=1e-5)
    # Chosen again by one fold for the other; held-back cases with a label have every metric.
    assert scores["chosen_again"]["combinations"].keys() == {"0", "1"}
    assert scores["external"]["metrics"].keys() == scores["metrics"].keys()
    page = (work_dir / "report.html").read_text()
    for text in (
        "Out-of-fold Dice by group",
        "External validation",
        "2 cases that no model",
        "Suspicious labels",
        "Held-back cases, the worst first",
    ):
        assert text in page
    quality = list(csv.DictReader(io.StringIO((work_dir / "ensemble" / "predictions" / "quality.csv").read_text())))
    assert [row["case"] for row in quality[:: len(scores["classes"])]] == [
        case["case"] for case in scores["quality"]["held_back"]
    ]
    assert len(quality) == 2 * len(scores["classes"])
    assert all(0 <= float(row["predicted_dice"] or 0) <= 1 for row in quality)
    assert (work_dir / "ensemble" / "suspicious_labels.csv").read_text().startswith("case,class,suspicion,kind,")
    # The run's own list keeps what the table said; its folder can be moved.
    assert json.loads((work_dir / "datalist.json").read_text())["training"][0]["site"] == "A"
    assert str(folder) not in (work_dir / "settings.yaml").read_text()
