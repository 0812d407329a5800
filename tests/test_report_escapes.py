"""Hostile names of cases, classes, groups, errors and all other text of a run are text on the report's page."""

from __future__ import annotations

import base64
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from autoseg.config.settings import Settings
from autoseg.pipeline.stages import STAGES
from autoseg.pseudolabel.audit import audit_json, make_row
from autoseg.pseudolabel.evidence import ClassEvidence
from autoseg.pseudolabel.rounds import How
from autoseg.report import figures
from autoseg.report.page import make_report
from autoseg.report.sections import sections_of
from autoseg.terminal import printable
from autoseg.workspace.files import write_json, write_yaml
from autoseg.workspace.jobs import EpochLine
from autoseg.workspace.workspace import Workspace

EVIL = (
    '<xss onload=alert(1)>"\'><xss a="</script></style></title></textarea></svg>--><xss>]]><script>alert(2)</script>'
    "<img src=x onerror=alert(3)>{{7*7}}{% raw %}\\u003cxss>&lt;xss&gt;`${alert(4)}`\x1b[2J\u202e$a_{b$ \\frac"
)
CHANGED = ("phantom_", "sphere", "box", "segresnet+", "dints+")
"""Names of cases, classes and combinations begin like this."""
STATE = ("*.yaml", "faults.json", "ensemble/*.json", "state/*.json", "*_?/*.json", "*_?/configs/*.yaml")
LINES = ("state/commands.jsonl", "state/usage.jsonl")
KEPT = ("datalist.json", "layout.json", "rounds.json", "command_line.json")
"""Files that must be sound, so that the rest of the report is made; the list's names come from its files."""
AS_IT_IS = ("origin", "state", "algo", "method", "combine", "version", "mode", "precision", "kind", "role", "datalist")
AS_IT_IS += ("dataroot", "work_dir", "modality", "made_from")
"""Keys of choices and paths."""


def hostile(data: Any, key: str = "") -> Any:
    """State in which all names and sentences carry markup."""
    if isinstance(data, dict):
        return {(f"{EVIL}{k}" if k.startswith(CHANGED) else k): hostile(v, k) for k, v in data.items()}
    if isinstance(data, list):
        return [hostile(item, key) for item in data]
    if not isinstance(data, str) or key in AS_IT_IS or re.fullmatch("[0-9a-f]{8,64}", data):
        return data
    return f"{EVIL}{data}" if data.startswith(CHANGED) or " " in data else data


class Page(HTMLParser):
    """Every element with its attributes, and the text of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, list[tuple[str, str | None]]]] = []
        self.raw: list[str] = []
        self.text: list[str] = []
        self.comments: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, attrs))

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    def handle_data(self, data: str) -> None:
        (self.raw if self.cdata_elem else self.text).append(data)


def check_page(text: str) -> Page:
    """No element, attribute, script or style comes from hostile text, in pictures neither."""
    page = Page(text)
    names = Counter(tag for tag, _ in page.elements)
    assert "xss" not in names
    assert names["script"] == 1
    assert names["style"] == 1
    attributes = {name for _, attrs in page.elements for name, _ in attrs}
    assert not [name for name in attributes if name.startswith("on") or not re.fullmatch("[a-z-]+", name.lower())]
    assert not page.comments
    assert not [raw for raw in page.raw if "xss" in raw or "alert" in raw]
    assert "49" not in re.findall(r"onerror=alert\(3\)>(\d+)", "".join(page.text))  # 7*7 was not computed
    for _, attrs in page.elements:
        for name, value in attrs:
            if name in ("src", "href", "action"):
                assert value == "data:," or (value or "").startswith(("data:image/", "#"))
            if (value or "").startswith("data:image/svg+xml;base64,"):
                tree = ElementTree.fromstring(base64.b64decode((value or "").partition(",")[2]))
                tags = {element.tag.rpartition("}")[2] for element in tree.iter()}
                assert not tags & {"xss", "script", "img", "foreignObject", "a"}
    shown = "".join(page.text)
    assert shown == printable(shown)
    return page


def change(path: Path, read: Callable[[str], Any], write: Callable[[Path, Any], None]) -> None:
    write(path, hostile(read(path.read_text(encoding="utf-8"))))


def make_hostile(work_dir: Path) -> None:
    """Change a finished run of which all names and sentences carry markup afterwards."""
    for path in {path for pattern in STATE for path in work_dir.glob(pattern)}:
        if path.name in KEPT:
            continue
        if path.suffix == ".yaml":
            if path.name != "input.yaml":
                change(path, yaml.safe_load, write_yaml)
        else:
            change(path, json.loads, write_json)
    for name in LINES:
        lines = [json.loads(line) for line in (work_dir / name).read_text().splitlines()]
        for line in lines:
            line.update({key: f"{EVIL}{line[key]}" for key in ("command", "stage", "ended") if key in line})
        (work_dir / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = yaml.safe_load((work_dir / "settings.yaml").read_text())
    settings["name"]["value"], settings["seed"]["origin"] = EVIL, EVIL
    write_yaml(work_dir / "settings.yaml", settings)
    path = sorted(work_dir.glob("*_1/job.json"))[0]
    write_json(path, {**json.loads(path.read_text()), "state": "failed", "error": f"{EVIL}\nsecond {EVIL}"})
    (work_dir / "input.yaml").write_text(f"modality: MRI  # {EVIL}\n", encoding="utf-8")
    write_json(work_dir / "state" / "environment.json", {EVIL: EVIL})


def test_no_element_comes_from_the_names_of_a_run(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "run", copy_function=shutil.copy2)
    work_dir = tmp_path / "run" / "work_dir"
    clean = Page((work_dir / "report.html").read_text(encoding="utf-8"))
    make_hostile(work_dir)
    text = make_report(work_dir, STAGES).read_text(encoding="utf-8")
    assert "could not be made" not in text
    page = check_page(text)
    sections = text.split("<section ")[1:]
    clean_sections = [name for name, *_ in sections_of(Workspace(work_dir))]
    assert len(sections) == len(clean_sections)
    for name, section in zip(clean_sections, sections, strict=True):
        assert "&lt;xss onload=alert(1)&gt;" in section, f"no hostile text came to {name}: correct this test"
    # Nothing that a name did made a section empty; pictures of cases of these names there are none.
    assert Counter(tag for tag, _ in page.elements)["tr"] >= Counter(tag for tag, _ in clean.elements)["tr"] - 20


def make_hostile_audit(work_dir: Path) -> None:
    """Write what the report shows of a run in rounds whose names and reasons carry markup."""
    run = Workspace(work_dir)
    run.plan_rounds(2)
    write_yaml(run.settings, {"seed": {"value": 0, "origin": EVIL}, "name": {"value": EVIL}})
    how = How.of(Settings(modality="CT", datalist=Path("d"), dataroot=Path("r"), partial_labels="declared"))
    found = ClassEvidence(voxels=9, volume_ml=1.0, confidence=0.9, disagreement=0.1)
    row = make_row(
        f"{EVIL}c1", f"{EVIL}liver", found, rejected=f"{EVIL}: {EVIL}", filled=7, unsure=2, labelled_ml=(), how=how
    )
    for number in (1, 2):
        place = run.begin_round(number, continues=True)
        write_yaml(place.settings, {"seed": {"value": 0, "origin": EVIL}, "name": {"value": EVIL}})
        audit = audit_json([row], {f"{EVIL}liver": 0.8}, how, round_=number, joined=(EVIL,), background={EVIL: 1234})
        write_json(place.audit, {**audit, "failures": [f"{EVIL}: the share is not mounted"]})


def test_no_element_comes_from_an_audit(tmp_path: Path) -> None:
    make_hostile_audit(tmp_path)
    text = make_report(tmp_path, STAGES).read_text(encoding="utf-8")
    check_page(text)
    section = text.partition('<section id="pseudolabels"')[2].partition("</section>")[0]
    assert section.count("&lt;xss onload=alert(1)&gt;") >= 3


@pytest.mark.parametrize(
    "name", ["$", "$$", "a$b$c", r"\$\frac{", "_hidden", "$\\badcommand$", "a\x00b\x08", "\ud800", EVIL]
)
def test_a_name_in_a_picture_is_no_formula(name: str) -> None:
    plot = figures.volumes({name: [1.0, 2.0, 30.0], "other": [1.0, 2.0]})
    tree = ElementTree.fromstring(base64.b64decode(plot.svg))
    text = "".join(tree.itertext())
    shown = name.encode("unicode_escape", "surrogatepass").decode() if not name.isprintable() else name
    assert shown[:8] in text
    rows = [[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]]
    figures.score_boxes(name, (name, "b"), {name: rows, "a": rows})
    figures.intervals([(name, 0.5, 0.4, 0.6), ("b", 0.4, 0.3, 0.5)], name)
    figures.dice_by_volume((name, "b"), {name: [(1.0, 0.5), (2.0, 0.6)], "b": [(1.0, 0.5)]})
    figures.reliability((name,), [[[50.0, 40.0, 10.0]] * 3])
    figures.learning_curves(name, {0: [EpochLine(epoch=1, train_loss=1.0, val_dice=0.5)]})
