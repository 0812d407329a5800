"""`autoseg methods`: every figure in the text is what its source holds; what no file knows is left to the authors."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from autoseg.cli.main import run_command
from autoseg.config.networks import ALGOS
from autoseg.ensemble.corruptions import CORRUPTIONS, USUAL
from autoseg.export.checklists import CLAIM, TRIPOD_AI, YOU
from autoseg.export.markdown import plain
from autoseg.export.methods import Methods, read_methods
from autoseg.export.references import REFERENCES
from autoseg.export.traced import at, pointer, taken

CONSTANT = (
    "95 % interval", "10th to 90th percentile", "Intervals of 95 %", "intervals of 90 %", "95th percentile",
    "CLAIM 2024", "voxels other than 0", "Apache-2.0", "lesion F1",
)  # fmt: skip
"""What has digits in the text and is no figure of the run."""


@pytest.fixture
def work_dir(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run that may be changed; without images, of which methods reads none."""
    kept = shutil.ignore_patterns("cache", "*.nii.gz", "*.pt", "held_out")
    return Path(shutil.copytree(finished_run / "work_dir", tmp_path / "run" / "work_dir", ignore=kept))


def value_at(root: Path, file: str, key: str, of: str) -> Any:
    """What a figure's source holds, read with nothing of the code under test."""
    text = (root / file).read_text()
    found = [json.loads(text) if file.endswith(".json") else yaml.safe_load(text)]
    is_list = False
    for part in key.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if name == "*":
            found, is_list = [v for f in found for v in (f.values() if isinstance(f, dict) else f)], True
        else:
            found = [f[int(name)] if isinstance(f, list) else f[name] for f in found]
    if of == "distinct":
        return len(set(found))
    assert not is_list
    return len(found[0]) if of == "count" else found[0]


def check(methods: Methods, root: Path) -> None:
    """Every number of the page is followed by the footnote of its source, and equals it to the digits shown."""
    page, _, notes = re.sub(r"\\(.)", r"\1", methods.text).partition("\n[^1]: ")
    body = page.partition("## References")[0]
    shown = re.findall(r"(\S+?)\[\^(\d+)\]", body)
    assert len(shown) > 80
    for text, note in shown:
        figure = methods.figures[int(note) - 1]
        assert text.lstrip("(").endswith(figure.shown.split()[-1])
    for number, figure in enumerate(methods.figures, 1):
        value = value_at(root, figure.file, figure.key, figure.of)
        assert value == figure.value, figure
        expected = (
            str(value)
            if isinstance(value, str)
            else format(value if figure.unit == 1 else value / figure.unit, figure.form)
        )
        assert figure.shown == expected
        if isinstance(value, float) and figure.form.endswith("f"):
            digits = int(re.search(r"\.(\d)", figure.form)[1])  # type: ignore[index]
            assert math.isclose(float(figure.shown), value / figure.unit, abs_tol=0.50001 * 10**-digits)
        assert f"{figure.file}: " in (f"[^1]: {notes}".splitlines()[number - 1])
    # Nothing else on the page has digits, but for items' numbers and what is the same for all runs.
    for figure in sorted(methods.figures, key=lambda f: -len(f.shown)):
        body = re.sub(re.escape(figure.shown) + r"\[\^\d+\]", "", body)
    for words in (*CONSTANT, *(c.words for c in CORRUPTIONS.values() if c.words)):
        body = body.replace(words, "")
    body = re.sub(r"^\| \d+[a-g]? \|", "", body, flags=re.MULTILINE)
    assert re.findall(r".*\d.*", body) == []


def test_every_figure_equals_its_source(work_dir: Path) -> None:
    check(read_methods(work_dir), work_dir)


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change a JSON file in place."""
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))


def of_folds(stored: Any) -> None:
    """All models are of one fold, and nothing could be chosen again."""
    stored["members"] = [member for member in stored["members"] if member[1] == 0]
    stored["postprocessing"] = [{"name": "sphere", "largest": True, "gain": 0.1}, {"name": "box", "largest": True}]


def with_validation(stored: Any) -> None:
    """The list names validation cases, and so has no folds."""
    stored["validation"] = stored["training"][:3]
    for case in (*stored["training"], *stored["validation"]):
        case.pop("fold", None)


def of_patients(stored: Any) -> None:
    """Cases of fewer patients, two of whom lack a class; groups with figures in their names; a rare metric decided."""
    stored["dice"]["num_patients"] = 5
    stored["tolerance_mm"] = {"sphere": 5, "box": 0.5}
    stored["metric"] = "lesion_f1"
    stored["volume_error"]["num_cases"] = 6
    stored["volume_error"]["classes"][0].update(num=0, mean=None, low=None, high=None)
    group = {"num": 9, "num_patients": 7, "mean": 0.5, "low": None, "high": None, "difference": -0.1, "p": 0.00001}
    ends = {"difference_low": None, "difference_high": None, "finding": "lower"}
    names = [("size (ml)", "up to 1.304"), ('a "quoted", key', 'He said "3_T|1, 2"')]
    stored["subgroups"] = [{"factor": factor, "level": level, **group, **ends} for factor, level in names]


@pytest.mark.parametrize(
    ("file", "change", "said", "not_said"),
    [
        (
            "ensemble/ensemble.json", of_folds,
            ["Models were trained for 1 of them, and cases of the others were not scored. Each of theirs was scored by",
             "Labels are cleaned by rules that surely raised the out-of-fold score, for sphere. Labels of box are "
             "cleaned by rules that were set."],
            ["Each case was scored", "1 models"],
        ),
        (
            "ensemble/scores.json", lambda stored: stored.update(chosen_again=None),
            ["With one fold there are no others to choose by"], ["chosen again", "Chosen again"],
        ),
        (
            "datalist.json", with_validation,
            ["8 labelled cases were learned from and 3 validated on, as the data list names them; no case names a "
             "patient, so that cases count as independent. Each of the latter was scored by models"],
            ["folds;"],
        ),
        (
            "ensemble/scores.json", of_patients,
            ["over 8 cases of 5 patients, the mean Dice was", "accepts 5 mm for sphere and 0.5 mm for box.",
             "average symmetric surface distance (mm), relative volume error and lesion F1", "not counted; n 0 |",
             "the one with the best out-of-fold lesion F1", "size (ml): up to 1.304 | 7 | 0.500 | -0.100 | 1e-05 |",
             'a "quoted", key: He said "3_T|1, 2" | 7'],
            [],
        ),
        (
            "ensemble/scores.json", lambda stored: stored.update(external=None),
            ["no external cases with a label were scored"], ["cases held back the mean", "no file says: if not"],
        ),
        (
            "settings.yaml", "folds_by: {value: site, origin: x}",
            ["into 2 folds by site, so that models were scored on values of it that they had not seen; no case names a "
             "patient, so", "Scans of one patient, if there are any, count as independent"], [],
        ),
        (
            "datalist.json", lambda stored: [case.update(group="p") for case in stored["training"]],
            ["into 2 folds; no patient is in two of them. Each case"], ["Scans of one patient"],
        ),
        (
            "state/summary.json", lambda stored: stored.update(quarantined=["x"]),
            ["All 8 labelled cases were used but those that were set aside for a fault"], [],
        ),
    ],
)  # fmt: skip
def test_odd_runs_say_what_is_so_and_every_figure_equals_its_source(
    work_dir: Path, file: str, change: Callable[[Any], object] | str, said: list[str], not_said: list[str]
) -> None:
    if isinstance(change, str):  # a setting
        lines = [line for line in (work_dir / file).read_text().splitlines() if not line.startswith(change[:8])]
        (work_dir / file).write_text("\n".join([*lines, change, ""]))
    else:
        edit(work_dir / file, change)
    methods = read_methods(work_dir)
    check(methods, work_dir)
    text = re.sub(r"\[\^\d+\]", "", re.sub(r"\\(.)", r"\1", methods.text))
    assert [words for words in said if words not in text] == []
    assert [words for words in not_said if words in text] == []


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("null", "Networks started with random weights. The seed was 0."),
        ("none", "Networks started with random weights. The seed was 0."),
        ("a.pt", "Networks started with weights of an earlier training. The seed was 0."),
        (
            "{segresnet: a.pt}",
            "SegResNet started with weights of an earlier training. DiNTS started with random weights.",
        ),
        ("{swinunetr: a.pt}", "Networks started with random weights. The seed was 0."),
    ],
)
def test_what_networks_started_with(work_dir: Path, value: str, said: str) -> None:
    edit(work_dir / "ensemble" / "ensemble.json", lambda spec: spec.update(members=[["segresnet", 0], ["dints", 0]]))
    settings = work_dir / "settings.yaml"
    settings.write_text(
        re.sub(r"init_weights:.*", f"init_weights: {{value: {value}, origin: x}}", settings.read_text())
    )
    assert said in re.sub(r"\[\^\d+\]", "", read_methods(work_dir).text)


FINITE = st.floats(0, 1, allow_nan=False)


@settings(max_examples=6)
@given(data=st.data())
def test_every_figure_equals_its_source_whatever_the_scores_are(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory, finished_run: Path
) -> None:
    """Figures of scores.json, datastats.yaml and a plan are drawn anew; some scores are not counted."""
    root = tmp_path_factory.mktemp("drawn") / "work_dir"
    kept = shutil.ignore_patterns("cache", "*.nii.gz", "*.pt", "held_out", "records")
    shutil.copytree(finished_run / "work_dir", root, ignore=kept)
    scores = json.loads((root / "ensemble" / "scores.json").read_text())
    for metric in ("dice", "nsd", "hd95"):
        for entry in (scores[metric], *scores[metric]["classes"]):
            entry["mean"] = data.draw(st.none() | FINITE)
            entry["low"], entry["high"] = data.draw(st.tuples(st.none(), st.none()) | st.tuples(FINITE, FINITE))
            if "num" in entry:
                entry["num"] = data.draw(st.integers(0, 999))
    (root / "ensemble" / "scores.json").write_text(json.dumps(scores))
    plan = root / "segresnet_0" / "configs" / "hyper_parameters.yaml"
    rate = data.draw(st.floats(1e-6, 1, allow_nan=False))
    plan.write_text(re.sub(r"^learning_rate: \S+", f"learning_rate: {rate!r}", plan.read_text(), flags=re.MULTILINE))
    check(read_methods(root), root)


def test_what_changed_images_cost_is_traced_too(work_dir: Path) -> None:
    change = {"dice": 0.5123, "difference": -0.1, "low": None, "high": None}
    changes = [{"name": name, "words": words, **change} for name in USUAL for words in [CORRUPTIONS[name].words]]
    stored = {"made_from": "", "cases": ["a", "b", "c"], "dice": 0.6123, "changes": changes}
    (work_dir / "ensemble" / "robustness.json").write_text(json.dumps(stored))
    methods = read_methods(work_dir)
    check(methods, work_dir)
    assert "On 3[^" in methods.text
    assert "turned by 10 degrees 0.512[^" in methods.text


def test_how_well_quality_is_predicted_is_traced_too(work_dir: Path) -> None:
    scores = work_dir / "ensemble" / "scores.json"
    stored = json.loads(scores.read_text())
    known = {"error": 0.0123, "spearman": None, "spearman_all": 0.71, "covered": 0.913, "points": []}
    stored["quality"] = {"check": {"num_cases": 8, "num_copies": 5, **known}, "held_back": []}
    scores.write_text(json.dumps(stored))
    methods = read_methods(work_dir)
    check(methods, work_dir)
    assert re.search(r"it was 0\.012\[\^\d+\] off on average, and a share of 0\.91\[\^\d+\] of the", methods.text)
    stored["quality"]["check"]["spearman"] = 0.5
    scores.write_text(json.dumps(stored))
    check(read_methods(work_dir), work_dir)
    stored["quality"] = None
    scores.write_text(json.dumps(stored))
    assert "is itself predicted" not in read_methods(work_dir).text


@pytest.mark.parametrize("method", ["mae", "contrastive"])
@pytest.mark.parametrize("scored", [[], ["c", "d"]])
def test_what_encoders_learned_from_is_traced_too(work_dir: Path, method: str, scored: list[str]) -> None:
    assert "The encoder of" not in read_methods(work_dir).text
    lesson = {
        "method": method, "mask_share": 0.75, "mask_block": 16, "temperature": 0.05, "for_all_folds": bool(scored),
        "all_images": bool(scored), "training": ["a", "b", "c"], "validation": ["d"],
        "roles": {"unlabeled": 4}, "scored": scored,
    }  # fmt: skip
    path = work_dir / "pretraining" / "segresnet_0" / "lesson.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(lesson))
    methods = read_methods(work_dir)
    check(methods, work_dir)
    assert re.search(r"first learned, without labels, to .* from 3\[\^\d+\] images; 1\[\^\d+\] others", methods.text)
    assert ("so that scores may be a little too high" in methods.text) == bool(scored)
    # A run that names other weights does not start from it.
    settings = work_dir / "settings.yaml"
    settings.write_text(re.sub(r"init_weights:.*", "init_weights: {value: none, origin: x}", settings.read_text()))
    assert "The encoder of" not in read_methods(work_dir).text


def test_cases_held_back_have_a_table_of_all_metrics(work_dir: Path) -> None:
    scores = work_dir / "ensemble" / "scores.json"
    stored = json.loads(scores.read_text())
    metrics = {name: stored[name] for name in stored["metrics"]}
    metrics["hd95"] = {**metrics["hd95"], "mean": 3.25, "num_cases": 1}
    stored["external"] = {"metrics": metrics, "difference": None, "low": None, "high": None, "p": None, "subgroups": []}
    scores.write_text(json.dumps(stored))
    methods = read_methods(work_dir)
    check(methods, work_dir)
    page = re.sub(r"\[\^\d+\]", "", methods.text)
    table = page.partition("cases held back the mean Dice was")[2].partition("Dice was compared")[0]
    assert [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")] == [
        "| Class", "| sphere", "| box", "| mean",
    ]  # fmt: skip
    assert "| 3.250 (95 % interval" in table or "| 3.250; n 1 |" in table


def test_the_check_can_fail(work_dir: Path) -> None:
    methods = read_methods(work_dir)
    path = work_dir / "ensemble" / "scores.json"
    path.write_text(path.read_text().replace('"num_cases": 8', '"num_cases": 7'))
    with pytest.raises(AssertionError):
        check(methods, work_dir)


def test_the_command_writes_the_page_and_its_sources(work_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["methods", "--work_dir", str(work_dir)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[:2] == [str(work_dir / "methods.md"), str(work_dir / "methods.json")]
    assert re.fullmatch(r"CLAIM 2024: \d+ of 44 items answered, wholly or in part", told[2])
    assert re.fullmatch(r"TRIPOD\+AI: \d+ of 52 items answered, wholly or in part", told[3])
    text = (work_dir / "methods.md").read_text()
    sources = json.loads((work_dir / "methods.json").read_text())
    assert f"{len(sources['figures'])} figures" in told[4]
    mean = next(f for f in sources["figures"] if (f["file"], f["key"]) == ("ensemble/scores.json", "/dice/mean"))
    assert f"the mean Dice was {mean['shown']}[^{mean['note']}]" in text
    for number in ("4", "14", "34", "44"):  # what no file of a run can know
        assert re.search(rf"^\| {number} \| [^|]+ \| \*\*You must write\*\*: ", text, re.MULTILINE), number
    for name in (p.name for p in work_dir.glob("ensemble/records/*.json")):
        assert name.removesuffix(".json") not in text


def test_an_output_that_cannot_be_is_refused(work_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["methods", "--work_dir", str(work_dir), "--output"]
    assert run_command([*words, str(work_dir / "paper.json")]) == 2
    assert "paper.json: the sources get this name. Expected one such as methods.md." in capsys.readouterr().err
    assert not (work_dir / "paper.json").exists()
    (work_dir / "folder").mkdir()
    assert run_command([*words, str(work_dir / "folder")]) == 2
    assert "folder cannot be written (" in capsys.readouterr().err


def test_without_an_ensemble_it_says_what_to_run(
    phantom_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["methods", "--work_dir", str(tmp_path)]) == 2
    assert "no settings.yaml, so not a run's folder. Give a run's folder with --work_dir." in capsys.readouterr().err
    (tmp_path / "settings.yaml").write_text("{}")
    assert run_command(["methods", "--work_dir", str(tmp_path)]) == 2
    assert "no scores yet. Run `autoseg run` or `autoseg ensemble` first." in capsys.readouterr().err


def test_the_checklists_are_whole() -> None:
    assert [item.number for item in CLAIM] == [str(n) for n in range(1, 45)]
    numbers = [item.number for item in TRIPOD_AI]
    assert len(numbers) == len(set(numbers)) == 52
    assert list(dict.fromkeys(int(re.match(r"\d+", n)[0]) for n in numbers)) == [*range(1, 28)]  # type: ignore[index]
    assert all(item.answers or item.left for item in (*CLAIM, *TRIPOD_AI))
    assert YOU == "**You must write**"


def test_every_network_has_a_source() -> None:
    assert {*ALGOS} <= {*REFERENCES}, "its row in autoseg/config/networks.py lacks a `reference`"


def test_keys_lead_through_mappings_and_lists() -> None:
    data = {"a/b": [{"c": 3}, {"c": 4}, {"c": 3}], "d": {"x": {"c": 1}}}
    assert pointer("a/b", 0, "c") == "/a~1b/0/c"
    assert at(data, "/a~1b/1/c") == 4
    assert taken(data, "/a~1b/*/c", "distinct") == 2
    assert taken(data, "/d/*/c", "distinct") == 1
    assert taken(data, "/a~1b", "count") == 3
    assert at(data, "/a~1b/7/c") is None
    assert at(data, "/d/y") is None


def test_plain_sentences_have_no_markup() -> None:
    assert plain("**You** used `x` of a\\_b [@muon], 3[^12].") == "You used x of a_b, 3."
