"""The report: what it says, what it survives, and how it looks in a real browser."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from browser import chromium, console, requests
from processes import wait_for

from autoseg.cli.main import run_command
from autoseg.config.settings import Settings
from autoseg.errors import ConfigError, WorkspaceError
from autoseg.evaluation.intervals import case_means, compare, holm
from autoseg.pipeline.stages import PLAIN_RUN, STAGES
from autoseg.pseudolabel.audit import audit_json, make_row
from autoseg.pseudolabel.evidence import ClassEvidence
from autoseg.pseudolabel.rounds import How
from autoseg.report.filters import FILTERS
from autoseg.report.page import make_report
from autoseg.report.pictures import outline, picture_case, shown_box
from autoseg.report.sections import SECTIONS, sections_of
from autoseg.report.serve import LiveReport, make_server
from autoseg.workspace.files import write_json, write_yaml
from autoseg.workspace.workspace import Workspace


class Page(HTMLParser):
    """What the tests look at in a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def report(finished_run: Path) -> str:
    return (finished_run / "work_dir" / "report.html").read_text()


@pytest.fixture
def copied(finished_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished_run, tmp_path / "run", copy_function=shutil.copy2)
    return tmp_path / "run"


# -- the page


def test_what_nothing_counts_for_has_no_table_and_n_is_of_what_counts(copied: Path) -> None:
    """Phantoms have no small lesion; a metric that two cases count for says 2; with one fold the choice is told."""
    path = copied / "work_dir" / "ensemble" / "scores.json"
    stored = json.loads(path.read_text())
    for place, values in enumerate(stored["ensemble"].values()):
        values["lesion_sensitivity_large"] = [None, None]
        values["lesion_sensitivity_small"] = [0.5, None] if place < 2 else [None, None]
    stored["chosen_again"] = None
    path.write_text(json.dumps(stored))
    make_report(copied / "work_dir", STAGES)
    page = (copied / "work_dir" / "report.html").read_text()
    assert "Nothing to count for: " in page
    assert "sensitivity for large lesions" in page.partition("Nothing to count for: ")[2][:200]
    assert "<caption>Sensitivity for large lesions" not in page
    table = page.partition("<caption>Sensitivity for small lesions")[2].partition("</table>")[0]
    assert re.findall(r"<td>(\d+)</td></tr>", table) == ["2", "0", "2"]
    assert "there is no other fold to choose by: how much that flatters is not known" in page


def test_a_run_ends_with_a_whole_report(report: str, finished_run: Path) -> None:
    page = Page(report)
    expected = [name for name, *_ in sections_of(Workspace(finished_run / "work_dir"))]
    assert [s["id"] for s in page.all("section")] == expected
    assert {"suspicious", "calibration", "paper"} <= {*expected}
    assert not {"pretraining", "pseudolabels", "robustness", "learning-curve"} & {*expected}
    assert "could not be made" not in report
    assert ">- to -<" not in report
    assert "Not yet." not in report
    assert len([i for i in page.all("img") if (i["src"] or "").startswith("data:image/svg+xml")]) >= 9
    assert len([i for i in page.all("img") if (i["src"] or "").startswith("data:image/png")]) == 18  # 3 cases, 3 planes
    assert len(report) < 2_000_000


def test_the_page_on_the_report_lists_its_parts_in_their_order() -> None:
    page = (Path(__file__).parents[1] / "docs" / "report.md").read_text()
    table = page.partition("|---|---|---|\n")[2].partition("\n\n")[0]
    assert [row.split("|")[1].strip() for row in table.splitlines()] == [title for _, title, *_ in SECTIONS]


def test_the_median_volume_is_that_of_the_analysis(report: str, finished_run: Path) -> None:
    stats = yaml.safe_load((finished_run / "work_dir" / "datastats.yaml").read_text())
    table = report.partition("<caption>Classes</caption>")[2].partition("</table>")[0]
    for c in stats["data_set"]["classes"]:
        row = table.partition(f'<th scope="row">{c["name"]}</th>')[2].partition("</tr>")[0]
        median = float(re.findall(r"<td>([^<]*)</td>", row)[-2])
        assert median == pytest.approx(c["volume_ml"]["median"], rel=2e-3)


def test_the_scores_are_those_of_the_ensemble_stage(report: str, finished_run: Path) -> None:
    scores = json.loads((finished_run / "work_dir" / "ensemble" / "scores.json").read_text())
    chosen = scores["dice"]
    spec = json.loads((finished_run / "work_dir" / "ensemble" / "ensemble.json").read_text())
    table = report.partition("<caption>Dice of ")[2].partition("</table>")[0]
    for c in chosen["classes"]:
        row = table.partition(f'<th scope="row">{c["name"]}</th>')[2].partition("</tr>")[0]
        assert f"<b>{c['mean']:.3f}</b>" in row
        assert f"{c['low']:.3f} to {c['high']:.3f}" in row
    assert len(scores["ensemble"]) == 8
    for name, case in scores["ensemble"].items():
        by_name = {c["name"]: c for c in scores["cases"]}
        assert case["dice"] == by_name[name]["dice"][scores["chosen"]] or spec["postprocessing"]
        assert all(v is None or 0 <= v <= 1 for v in case["nsd"])


def test_everything_is_inside(report: str) -> None:
    page = Page(report)
    for tag, attrs in page.tags:
        for key in ("src", "href", "srcset", "action", "data"):
            value = attrs.get(key)
            assert value is None or value.startswith(("data:", "#")), (tag, key, value)
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", report)
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def test_it_can_be_read_without_seeing_and_without_a_mouse(report: str) -> None:
    page = Page(report)
    assert page.all("html")[0]["lang"] == "en"
    assert all(len(i["alt"] or "") > 20 for i in page.all("img"))
    labels = {label["for"] for label in page.all("label") if "for" in label}
    assert all(i["id"] in labels for i in page.all("input") if i["type"] == "range")
    assert all(t.get("scope") in ("row", "col") for t in page.all("th"))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for link in page.all("a"):
        assert (link["href"] or "")[1:] in ids
    # A wide table scrolls, and then has to be reachable by keyboard.
    assert all(d.get("tabindex") == "0" for d in page.all("div") if d.get("class") == "scroll")


def test_names_from_the_data_are_escaped(copied: Path) -> None:
    path = copied / "work_dir" / "settings.yaml"
    evil = "<script>alert(1)</script>"
    path.write_text(path.read_text().replace("value: phantoms", f"value: '{evil}'"))
    text = make_report(copied / "work_dir", STAGES).read_text()
    assert evil not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_no_absolute_path_of_the_machine(report: str, finished_run: Path) -> None:
    assert str(finished_run) not in report


def test_intervals_that_are_not_known_are_dashes() -> None:
    assert FILTERS["signed_interval"](-0.01, 0.25) == "-0.0100 to +0.2500"
    assert [FILTERS["signed_interval"](end, end) for end in (None, math.nan)] == ["-", "-"]
    assert FILTERS["interval"]({"low": None, "high": None}) == "-"


# -- unfinished and damaged runs


def test_it_is_made_again_only_where_the_run_changed(copied: Path) -> None:
    path = copied / "work_dir" / "report.html"
    before = path.stat().st_mtime_ns
    assert run_command(["run", "--input", str(copied / "input.yaml")]) == 0
    assert path.stat().st_mtime_ns == before
    assert run_command(["ensemble", "--input", str(copied / "input.yaml")]) == 0
    assert path.stat().st_mtime_ns == before
    job = copied / "work_dir" / "dints_0" / "job.json"
    job.write_text(job.read_text().replace('"error": ""', '"error": "a remark"'))
    assert run_command(["generate", "--input", str(copied / "input.yaml")]) == 0
    assert path.stat().st_mtime_ns > before


def test_the_report_of_an_analysis_loads_no_torch(phantom_dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(phantom_dataset, tmp_path / "data")
    code = (
        "import sys; from autoseg.cli.main import run_command; assert run_command(['analyze']) == 0; "
        "assert 'matplotlib' not in sys.modules; assert run_command(['report']) == 0; "
        "assert 'matplotlib' in sys.modules; sys.exit(3 if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "data", capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "data" / "work_dir" / "report.html").exists()


def test_it_grows_with_the_run(phantom_dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(phantom_dataset, tmp_path / "data")
    assert run_command(["analyze", "--input", str(tmp_path / "data" / "input.yaml")]) == 0
    assert run_command(["report", "--work_dir", str(tmp_path / "data" / "work_dir")]) == 0
    text = (tmp_path / "data" / "work_dir" / "report.html").read_text()
    assert "Sizes and spacings of 6 training cases" in text
    assert "Not yet. <code>autoseg generate</code>" in re.sub(r"\s+", " ", text)
    assert "analyze</b> done" in text
    assert "train</b> not yet" in text


def test_a_missing_image_is_said(copied: Path) -> None:
    for path in (copied / "images").glob("*"):
        path.unlink()
    text = make_report(copied / "work_dir", STAGES).read_text()
    assert "The cases&#39; files cannot be shown" in text
    assert "Mean Dice" in text


def test_a_metric_that_there_is_not_is_a_fault_of_the_file(copied: Path) -> None:
    path = copied / "work_dir" / "ensemble" / "scores.json"
    path.write_text(path.read_text().replace('"metric": "dice"', '"metric": "likeness"'))
    text = make_report(copied / "work_dir", STAGES).read_text()
    assert "scores.json: metric: found &#39;likeness&#39;, expected &#39;dice&#39;" in text


def test_a_fault_of_the_report_costs_no_run(
    copied: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> Path:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("autoseg.report.page.make_report", broken)
    (copied / "work_dir" / "report.html").unlink()
    assert run_command(["run", "--input", str(copied / "input.yaml")]) == 0
    log = (copied / "work_dir" / "run.log").read_text()
    assert "report: not made; the run goes on" in log
    assert "ZeroDivisionError: a bug" in log


def test_the_audit_of_three_rounds(tmp_path: Path) -> None:
    """The last round's in full, the others' by name; and what no class of a case counts."""
    run = Workspace(tmp_path)
    run.plan_rounds(3)
    how = How.of(Settings(modality="CT", datalist=Path("d"), dataroot=Path("r"), partial_labels="declared"))
    found = ClassEvidence(voxels=9, volume_ml=1.0, confidence=0.9, disagreement=0.1)
    row = make_row("c1", "liver", found, rejected="", filled=7, unsure=2, labelled_ml=(), how=how)
    for number in (1, 2, 3):
        place = run.begin_round(number, continues=True)
        write_yaml(place.settings, {"seed": {"value": 0, "origin": "default"}})
        if number > 1:
            audit = audit_json([row], {"liver": 0.8}, how, round_=number, joined=(), background={"c1": 1234})
            write_json(place.audit, {**audit, "failures": ["c2: the share is not mounted"]})
    text = make_report(tmp_path, STAGES).read_text()
    section = text.partition('<section id="pseudolabels"')[2].partition("</section>")[0]
    assert "Earlier rounds have their own: <code>round_2/pseudolabels/audit.json</code>." in section
    assert "Another 1,234 voxels are not filled in either" in section
    assert "c2: the share is not mounted" in section
    # Of an earlier version, which called them ignored and did not count the background's.
    del audit["background"]
    older = json.loads(json.dumps(audit).replace("voxels_unsure", "voxels_ignored"))
    write_json(place.audit, {**older, "failures": []})
    text = make_report(tmp_path, STAGES).read_text()
    assert "are not filled in either" not in text
    assert text.count("<td>7</td><td>2</td>") == section.count("<td>7</td><td>2</td>") > 0


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="not a run's folder. Give a run's folder with --work_dir"):
        make_report(tmp_path, STAGES)
    assert list(tmp_path.iterdir()) == []


def test_each_stage_says_what_it_used(finished_run: Path) -> None:
    lines = [json.loads(t) for t in (finished_run / "work_dir" / "state" / "usage.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == [name for name in PLAIN_RUN if name != "pretrain"]
    for line in lines:
        assert line["ended"] == "ok"
        assert line["seconds"] >= 0
        assert 50e6 < line["peak_bytes"] < 20e9  # a Python with NumPy at least
    assert lines[-1]["disk_bytes"] > lines[0]["disk_bytes"] > 1000


def test_the_commands_are_kept(finished_run: Path) -> None:
    lines = (finished_run / "work_dir" / "state" / "commands.jsonl").read_text().splitlines()
    assert [json.loads(line)["command"] for line in lines] == ["autoseg run --input input.yaml"]


# -- comparison


def test_wilcoxon_agrees_with_a_worked_example() -> None:
    # All 8 differences of one sign: the exact two-sided p is 2 / 2^8.
    first = {f"c{i}": 0.8 + 0.01 * i for i in range(8)}
    second = {n: v - 0.001 * (i + 1) for i, (n, v) in enumerate(first.items())}
    found = compare({"a": first, "b": second}, [("a", "b")])[0]
    assert found.p == pytest.approx(2 / 2**8)
    assert (found.wins, found.losses, found.num) == (8, 0, 8)
    assert found.difference == pytest.approx(0.0045)
    assert found.low < 0.0045 < found.high
    assert found.words == "a is better"


def test_few_cases_are_not_tested_and_equal_ones_do_not_differ() -> None:
    few = {f"c{i}": 0.5 for i in range(5)}
    assert compare({"a": few, "b": few}, [("a", "b")])[0].words == "too few cases to test"
    many = {f"c{i}": 0.5 for i in range(9)}
    same = compare({"a": many, "b": many}, [("a", "b")])[0]
    assert (same.p, same.words) == (1.0, "no clear difference")


def test_only_cases_that_both_scored_are_paired() -> None:
    first = {f"c{i}": 0.5 + i / 100 for i in range(9)}
    second = {f"c{i}": 0.4 for i in range(3, 12)}
    assert compare({"a": first, "b": second}, [("a", "b")])[0].num == 6


def test_holm() -> None:
    assert holm([0.01, None, 0.04, 0.03]) == [pytest.approx(0.03), None, pytest.approx(0.06), pytest.approx(0.06)]
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_case_means_leave_out_what_does_not_count() -> None:
    assert case_means({"a": [0.5, None], "b": [None, math.nan], "c": [0.2, 0.4]}) == {"a": 0.5, "c": pytest.approx(0.3)}


# -- pictures


def filled(path: str, shape: tuple[int, int]) -> np.ndarray:
    """The pixels inside an outline, by the even-odd rule along each row."""
    crossings = np.zeros((shape[0], shape[1] + 1), int)
    for part in path.split("z")[:-1]:
        x, y = map(int, re.match(r"M(-?\d+) (-?\d+)", part).groups())  # type: ignore[union-attr]
        first = (x, y)
        moves = re.findall(r"([hv])(-?\d+)", part)
        corners = [first]
        for kind, step in moves:
            x, y = (x + int(step), y) if kind == "h" else (x, y + int(step))
            corners.append((x, y))
        for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], first], strict=True):
            if x0 == x1:
                crossings[min(y0, y1) : max(y0, y1), x0] += 1
            else:
                assert y0 == y1
    return np.cumsum(crossings, axis=1)[:, :-1] % 2 == 1


@pytest.mark.parametrize("seed", range(5))
def test_an_outline_encloses_its_mask(seed: int) -> None:
    mask = np.random.default_rng(seed).random((9, 11)) < 0.5  # holes, islands, corners that touch
    np.testing.assert_array_equal(filled(outline(mask), mask.shape), mask)


def test_an_outline_is_short() -> None:
    mask = np.zeros((6, 8), bool)
    mask[2:4, 3:7] = True
    assert sorted(re.findall(r"[hv]-?\d+", outline(mask) + "")) in (
        ["h-4", "h4", "v2"],
        ["h4", "v-2", "v2"],
        ["h-4", "v-2", "v2"],
        ["h-4", "h4", "v-2"],
    )
    assert outline(np.zeros((3, 3), bool)) == ""


def test_pictures_show_right_on_the_left_and_front_up(phantom_case, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A class in the patient's right, front, upper corner is drawn left and up, however the file is stored."""
    import base64
    import io

    from PIL import Image

    from autoseg.data.datalists.cases import Case
    from autoseg.data.grid import Grid
    from autoseg.data.labels import UNSURE_VALUE, LabelMap
    from autoseg.data.volumes import write_volume

    for signs in ((1, 1, 1), (-1, -1, 1), (1, -1, -1)):
        grid = Grid(shape=(40, 44, 48), affine=np.diag([*map(float, signs), 1.0]))
        ras = np.zeros((40, 44, 48), np.uint8)
        ras[30:36, 35:40, 40:44] = 1
        image = ras.astype(np.float32) * 100
        write_volume(tmp_path / "i.nii.gz", image, grid)
        write_volume(tmp_path / "l.nii.gz", ras, grid)
        completed = ras.astype(np.uint16)
        completed[2:9, 2:9, 2:9] = UNSURE_VALUE  # as a completed label has it; not drawn
        write_volume(tmp_path / "c.nii.gz", completed, grid)
        found = picture_case(
            Case(name="p", images=(tmp_path / "i.nii.gz",), label=tmp_path / "l.nii.gz"),
            tmp_path / "c.nii.gz",
            LabelMap(names=("a",), values=((1,),)),
        )
        for plane in found.planes:
            pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(plane.png))))
            assert pixels.shape == ((plane.height + 2) * len(plane.slices), plane.width)
            first = plane.start * (plane.height + 2) + 1
            bright = np.argwhere(pixels[first : first + plane.height] > 128)
            row, column = bright.mean(axis=0)
            assert column < plane.width / 2, plane.name
            assert row < plane.height / 2, plane.name
            contours = plane.slices[plane.start]
            assert [(c.class_index, c.is_truth) for c in contours] == [(0, True), (0, False)]
            shape = (plane.height, plane.width)
            np.testing.assert_array_equal(filled(contours[0].path, shape), pixels[first : first + plane.height] > 128)


def test_pictures_begin_at_the_voxel_in_question(phantom_case) -> None:  # type: ignore[no-untyped-def]
    from autoseg.data.labels import LabelMap

    case = phantom_case("p", shape=(40, 44, 48), affine=np.diag([-1.0, 1.0, 2.0, 1.0]))
    shape, spacing_mm = (40, 44, 48), (1.0, 1.0, 2.0)
    label_map = LabelMap(names=("sphere", "box"), values=((1,), (2,)))
    for at in ((20, 22, 24), (11, 30, 13), (0, 43, 47)):
        shown = picture_case(case, case.label, label_map, at)
        for plane, axis in zip(shown.planes, (2, 1, 0), strict=True):
            first, last = plane.positions_mm[0], plane.positions_mm[-1]
            wanted = float(np.clip(at[axis] * spacing_mm[axis], first, last))
            assert plane.positions_mm[plane.start] == pytest.approx(wanted), (plane.name, at, shape)


def test_the_shown_box_has_a_margin_in_mm() -> None:
    target = np.zeros((1, 60, 60, 60), np.uint8)
    target[0, 30, 30, 30] = 1
    target[0, 0, 0, 0] = 255  # ignored
    assert shown_box([target], (1.0, 3.0, 5.0)) == (slice(15, 46), slice(25, 36), slice(27, 34))
    assert shown_box([np.zeros((1, 4, 5, 6), np.uint8)], (1.0, 1.0, 1.0)) == (slice(0, 4), slice(0, 5), slice(0, 6))


# -- live


def test_the_live_page_is_served_to_this_machine_alone(finished_run: Path) -> None:
    server = make_server(finished_run / "work_dir", STAGES, 0)
    host, port = server.server_address[:2]
    assert host == "127.0.0.1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        base = f"http://127.0.0.1:{port}"
        with urllib.request.urlopen(base + "/") as answer:
            assert "data-live" in answer.read().decode()
        with urllib.request.urlopen(base + "/version") as answer:
            assert len(answer.read()) == 16
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(base + "/../../etc/passwd")
        foreign = urllib.request.Request(base + "/", headers={"Host": f"evil.example:{port}"})
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(foreign)
        with pytest.raises(ConfigError, match="--port: .* cannot be used"):
            make_server(finished_run / "work_dir", STAGES, int(port))
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_the_live_page_is_made_anew_only_where_the_run_went_on(copied: Path) -> None:
    live = LiveReport(copied / "work_dir", STAGES)
    first = live.page()
    assert live.page() is first
    metrics = copied / "work_dir" / "segresnet_0" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + metrics.read_text().splitlines()[-1] + "\n")
    assert live.page() is not first


# -- in a browser

ALL_LOADED = "return [...document.images].filter(i => !i.complete || i.naturalWidth === 0).length"


def check_in_browser(page: Path, profile: Path) -> None:
    """The checks of the issue: quiet console, nothing asked for, all pictures, the slider, the print view."""
    with chromium(profile) as driver:
        requests(driver)
        # Without it a click may miss while the page still scrolls smoothly.
        still = {"features": [{"name": "prefers-reduced-motion", "value": "reduce"}]}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", still)
        driver.get(page.as_uri())
        assert driver.execute_script(ALL_LOADED) == 0
        assert driver.execute_script("return document.images.length") >= 15

        # The slider: by keyboard, as a user would.
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        plane = driver.find_element(By.CSS_SELECTOR, ".plane")
        slider = plane.find_element(By.CSS_SELECTOR, "input[type=range]")
        state = (
            "const p = document.querySelector('.plane'), top = e => p.querySelector(e).getBoundingClientRect().top;"
            " return [top('img') - top('.frame'),"
            " [...p.querySelectorAll('svg')].findIndex(s => !s.hidden && !s.hasAttribute('hidden')),"
            " p.querySelector('output').textContent]"
        )
        before = driver.execute_script(state)
        at = int(slider.get_attribute("value"))
        slider.send_keys(Keys.ARROW_LEFT if at else Keys.ARROW_RIGHT)
        after = driver.execute_script(state)
        assert abs(after[1] - before[1]) == 1
        assert after[0] != before[0]
        assert after[2] != before[2]
        one = driver.execute_script("return document.querySelector('.frame').getBoundingClientRect().height")
        assert abs(after[0] - before[0]) == pytest.approx(one, rel=0.15)

        # Contours can be hidden.
        box = driver.find_element(By.ID, "show-truth")
        driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", box)
        box.click()
        hidden = "return getComputedStyle(document.querySelector('.frame .truth')).display"
        assert driver.execute_script(hidden) == "none"

        # On a phone nothing is wider than the screen.
        phone = {"width": 380, "height": 800, "deviceScaleFactor": 2, "mobile": True}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 380
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

        # On paper every section is there, and every folded part unfolds.
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        driver.execute_script("dispatchEvent(new Event('beforeprint'))")
        heights = driver.execute_script("return [...document.querySelectorAll('section')].map(s => s.offsetHeight)")
        assert len(heights) == len(sections_of(Workspace(page.parent)))
        assert min(heights) > 20
        assert driver.execute_script("return document.querySelectorAll('details:not([open])').length") == 0
        assert len(driver.print_page()) > 10_000
        assert console(driver) == []
        assert requests(driver) == [page.as_uri()]


def test_the_report_in_a_browser(finished_run: Path, tmp_path: Path) -> None:
    check_in_browser(finished_run / "work_dir" / "report.html", tmp_path / "profile")


@pytest.mark.skipif("AUTOSEG_REPORT" not in os.environ, reason="AUTOSEG_REPORT names no report of a real run")
def test_a_real_run_s_report_in_a_browser(tmp_path: Path) -> None:
    """AUTOSEG_REPORT=hippocampus/work_dir/report.html: the same checks on real data, and its size."""
    page = Path(os.environ["AUTOSEG_REPORT"]).resolve()
    assert page.stat().st_size < 15e6
    check_in_browser(page, tmp_path / "profile")


@pytest.mark.slow
def test_the_live_page_follows_the_run_in_a_browser(copied: Path, tmp_path: Path) -> None:
    server = make_server(copied / "work_dir", STAGES, 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    base = f"http://127.0.0.1:{server.server_address[1]}/"
    try:
        with chromium(tmp_path / "profile") as driver:
            driver.get(base)
            time.sleep(1)  # the first look at the version
            driver.execute_script("window.marker = 1")
            metrics = copied / "work_dir" / "segresnet_0" / "metrics.jsonl"
            metrics.write_text(metrics.read_text() + metrics.read_text().splitlines()[-1] + "\n")
            wait_for(lambda: driver.execute_script("return window.marker === undefined"))
            assert console(driver) == []
            assert all(url.startswith(base) for url in requests(driver))
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_serving_ends_with_ctrl_c(finished_run: Path) -> None:
    words = [sys.executable, "-m", "autoseg", "report", "--serve", "--port", "0"]
    with subprocess.Popen(words, cwd=finished_run, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+/", line)
        assert address, line
        with urllib.request.urlopen(address[0] + "version") as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait() == 0
        assert "report: ended" in process.stderr.read()


def test_the_browser_checks_can_fail(tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text("<img src='missing.png'><script>console.error('oops')</script>")
    with chromium(tmp_path / "profile") as driver:
        driver.get((tmp_path / "bad.html").as_uri())
        assert driver.execute_script(ALL_LOADED) == 1
        assert any("oops" in line for line in console(driver))
        assert (tmp_path / "missing.png").as_uri() in requests(driver)
