"""The documentation: it builds, no link is dead, every command in it runs, and so does the notebook."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from plans import TINY

from autoseg.cli.arguments import command_names, parse
from autoseg.cli.commands import TAKES_SETTINGS, Commands
from autoseg.cli.main import run_command
from autoseg.config.docs import setting_docs
from autoseg.config.load import AUTO3DSEG_TRACKING, AUTO3DSEG_WITHOUT_EFFECT
from autoseg.config.reader import read_with_origins
from autoseg.config.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")])
TYPED_ELSEWHERE = "recipes"
"""A folder of docs whose pages need data sets of their own: test_recipes.py."""
ENDLESS = ("--serve", "learning_curve", "suggest")
"""Commands with one of these are checked, not run: they do not end, or need more cases than there are."""


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings."""
    heads = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^a-z0-9 -]", "", h.lower().replace("`", "")).strip().replace(" ", "-") for h in heads}


def dead_links(path: Path, text: str) -> list[str]:
    """Links of a page to files or headings that are not there; the network is left alone."""
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(f"{path.name}: {link}")
    return dead


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_no_link_is_dead(path: Path) -> None:
    assert dead_links(path, path.read_text()) == []


def test_a_dead_link_is_seen() -> None:
    path = ROOT / "docs" / "index.md"
    assert len(dead_links(path, "[a](nowhere.md) [b](report.md#nowhere) [c](report.md#pictures) [d](#autoseg)")) == 2


def test_every_page_has_its_place() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = re.findall(r"[\w/-]+\.md", json.dumps(config["nav"]))
    assert sorted(listed) == sorted(str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md"))
    assert config["theme"]["font"] is False  # nothing is fetched from elsewhere


def test_the_first_page_leads_to_every_other() -> None:
    linked = re.findall(r"\]\(([\w/-]+\.md)\)", (ROOT / "docs" / "index.md").read_text())
    assert {"index.md", *linked} == {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}


def test_nothing_is_installed_by_a_name_that_no_index_has() -> None:
    """Nothing is released: whoever had the name on an index would be trusted.

    With an extra pip keeps the autoseg3d that is installed, and reads from it what the extra needs.
    """
    texts = [*PAGES, *(ROOT / "autoseg").rglob("*.py"), *(ROOT / "examples").rglob("*.md"), ROOT / "input.yaml.example"]
    assert [
        path.name
        for path in texts
        if re.search(r"pip install\b.*\bautoseg3d(?![\w.-]*(?:\[|-[\d*]))", path.read_text())
    ] == []


def test_texts_are_ascii_and_lines_fit() -> None:
    for path in PAGES:
        lines = path.read_text(encoding="ascii").splitlines()
        assert [line for line in lines if len(line) > 160 and "|" not in line] == [], path.name


@pytest.mark.extra("zensical")
def test_the_site_builds(tmp_path: Path) -> None:
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "-f", "mkdocs.yml", "--strict"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No issues found" in done.stdout + done.stderr
    for page in (tmp_path / "site").glob("*.html"):
        assert not re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="https?://(?!example)', page.read_text()), (
            page.name
        )
    assert (tmp_path / "site" / "quickstart.html").exists()
    check_search(tmp_path / "site")


def check_search(site: Path) -> None:
    """The words of all pages, and what looks them up, lie in the site; it asks no other machine."""
    index = json.loads((site / "search.json").read_text())
    indexed = {item["location"].partition("#")[0] or "index.html" for item in index["items"]}
    assert indexed == {p.relative_to(site).as_posix() for p in site.rglob("*.html")} - {"404.html"}
    assert any("self-supervised" in item["text"] or "Pretraining" in item["title"] for item in index["items"])
    for page in {*site.rglob("*.html")} - {site / "404.html"}:  # which a server alone shows, at any address
        config = re.search(r'<script id="__config" type="application/json">(.*?)</script>', page.read_text())
        assert config, page.name
        worker = page.parent / json.loads(config[1])["search"]
        assert worker.resolve().is_relative_to(site.resolve()), page.name
        assert not re.search(r"https?://\w", worker.read_text()), page.name


# -- commands


def commands_of(path: Path) -> list[str]:
    """The lines of a page's `sh` blocks."""
    blocks = re.findall(r"^```sh\n(.*?)^```", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_every_command_in_running_text_is_one() -> None:
    """Also those within a sentence; words in capitals stand for a user's own."""
    for path in PAGES:
        for words in re.findall(r"`(?:\.\./)?(?:\.venv/bin/)?autoseg ([a-z_]+[^`]*)`", path.read_text()):
            if words.startswith("COMMAND"):
                continue
            for call in re.split(r"\)?\"? ?\|", words)[0].split("|"):
                text = re.sub(r"\bALGO\b", "segresnet", re.sub(r"\bN\b", "0", call)).replace('")', "")
                found = [w for w in shlex.split(text) if w != "..."]
                if len(found) > 1:
                    parse(Commands, TAKES_SETTINGS, found)
                else:
                    assert found[0] in command_names(Commands), words


@pytest.fixture
def home(finished_run: Path, tmp_path: Path) -> Path:
    """A folder as the pages take it: data sets, new scans, and a finished run beside them."""
    shutil.copytree(finished_run, tmp_path / "done", copy_function=shutil.copy2)
    for name in ("images", "labels"):
        shutil.copytree(finished_run / name, tmp_path / "my_data" / name)
    (tmp_path / "new_scans").mkdir()
    (tmp_path / "new_labels").mkdir()
    for source, target in (("images", "new_scans"), ("labels", "new_labels")):
        shutil.copy(finished_run / source / "phantom_000.nii.gz", tmp_path / target)
    raw = tmp_path / "Dataset123_Phantoms"
    for source, target, end in (("images", "imagesTr", "_0000"), ("labels", "labelsTr", "")):
        (raw / target).mkdir(parents=True)
        for path in sorted((finished_run / "labels").glob("*.nii.gz")):
            name = path.name.replace(".nii.gz", f"{end}.nii.gz")
            shutil.copy(finished_run / source / path.name, raw / target / name)
    listed = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "sphere": 1, "box": 2},
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps({**listed, "numTraining": 8}))
    return tmp_path


@pytest.mark.parametrize(
    "path", [p for p in PAGES if commands_of(p) and p.parent.name != TYPED_ELSEWHERE], ids=lambda p: p.name
)
def test_every_command_runs(path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts_anew = "init" in "".join(commands_of(path)) or "my_data" in "".join(commands_of(path))
    monkeypatch.chdir(home if starts_anew else home / "done")
    for line in commands_of(path):
        words = shlex.split(line, comments=True)
        if words[0] == "cd":
            monkeypatch.chdir(Path.cwd() / words[1])
            continue
        assert words[0] == "autoseg", line
        parse(Commands, TAKES_SETTINGS, words[1:])
        if set(words) & set(ENDLESS):
            continue
        if "--budget" in words and not starts_anew:  # it would make the plans anew
            at = words.index("--budget")
            del words[at : at + 2]
        assert run_command(words[1:]) == 0, line
        if words[1] == "init":
            target = Path(words[words.index("--output") + 1]) / "input.yaml"
            target.write_text(target.read_text() + TINY)


def test_the_pages_for_movers_name_settings_that_exist() -> None:
    known = set(setting_docs()) | {k.rpartition(".")[2] for k in setting_docs()}
    text = (ROOT / "docs" / "from-auto3dseg.md").read_text()
    table, end, _ = text.partition("## Setting by setting")[2].partition("Keys without a setting of the same name")
    assert end
    named = set(re.findall(r"`([a-z_0-9]+)`", table))
    assert named - known - {*AUTO3DSEG_WITHOUT_EFFECT, *AUTO3DSEG_TRACKING} - {"auto"} == set()  # a value of algos
    table = (ROOT / "docs" / "from-nnunet.md").read_text().partition("## Setting by setting")[2].partition("## What")[0]
    rows = [line.split("|")[2] for line in table.splitlines() if line.startswith("| ")][1:]
    named = {w for cell in rows for w in re.findall(r"`([a-z_0-9]+)(?:: [^`]*)?`", cell)}
    assert named - known - {"fold", "index", "init"} == set()


def test_messages_in_troubleshooting_are_those_of_the_code() -> None:
    sources = "\n".join(path.read_text() for path in sorted((ROOT / "autoseg").rglob("*.py")))
    sources = re.sub(r"\"\s*\n\s*f?\"", "", sources)  # texts that go on in the next line
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), flags=re.MULTILINE)
    texts = [row for row in rows if "(doctor)" not in row]  # the doctor's lines are put together of short words
    assert len(texts) > 12
    for row in texts:
        for fragment in " ".join(re.findall(r"`([^`]*)`", row)).split("..."):
            assert fragment.strip() in sources, f"{row}: {fragment!r}"


def test_settings_in_blocks_are_valid(tmp_path: Path) -> None:
    """Each block of YAML on the pages is part of an input.yaml."""
    needed = {"modality": "CT", "datalist": "datalist.json", "dataroot": "."}
    seen = 0
    for path in PAGES:
        for block in re.findall(r"^```yaml\n(.*?)^```", path.read_text(), flags=re.MULTILINE | re.DOTALL):
            (tmp_path / "input.yaml").write_text(yaml.safe_dump(needed | yaml.safe_load(block)))
            read_with_origins(tmp_path / "input.yaml", Settings, {}, AUTO3DSEG_WITHOUT_EFFECT)
            seen += 1
    assert seen > 15


QUESTIONS = [
    "Partial labels",
    "DICOM",
    "Fine-tuning",
    "Small GPUs",
    "Imbalance",
    "Tiny lesions",
    "Anisotropy",
    "Regions",
    "Resume",
    "Own folds",
    "External validation",
    "Uncertainty",
    "Export",
    "Speed",
    "Clusters",
]


def test_fifteen_questions_have_a_name_an_answer_and_a_source() -> None:
    text = (ROOT / "docs" / "questions.md").read_text()
    parts = re.split(r"^## (\d+\. [\w -]+): .*\?.*$", text, flags=re.MULTILINE)[1:]
    assert parts[::2] == [f"{number}. {name}" for number, name in enumerate(QUESTIONS, 1)]
    for number, text in zip(parts[::2], parts[1::2], strict=True):
        answer, _, asked = text.partition("\nAsked: ")
        assert "`" in answer, number
        assert re.search(r"\]\([\w-]+\.md", answer), number
        links = re.findall(r"\[(\d+)\]\(https://github\.com/[\w-]+/[\w-]+/issues/(\d+)\)", asked)
        assert len(links) >= 3, number
        assert [shown for shown, address in links if shown != address] == []


def test_figures_of_the_comparison_are_those_of_the_results() -> None:
    known = [float(x) for x in re.findall(r"(?<![\w.])\d+\.\d+", (ROOT / "docs" / "results.md").read_text())]
    text = (ROOT / "docs" / "compare.md").read_text()
    table = text.partition("## Measured side by side")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 7
    for row in rows:
        *cells, where = row.strip("| ").split(" | ")
        assert "results.md#" in where or where == "the same"
        for figure in re.findall(r"(?<![\w.,])\d+\.\d+", " ".join(cells[1:])):
            decimals = len(figure.partition(".")[2])
            assert float(figure) in [round(x, decimals) for x in known], f"{figure} of {cells[0]}"


def test_each_cell_of_the_comparison_says_where_it_was_read() -> None:
    text = (ROOT / "docs" / "compare.md").read_text()
    table = text.partition("## What each can do")[2]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    assert {len(row) for row in rows} == {6}, "a cell for each tool"
    linked = [
        re.fullmatch(r"(?:\*\*)?\[[^\]]+\](?:\(\S+\)|\[([\w-]+)\])(?:\*\*)?|-", cell)
        for row in rows
        for cell in row[1:]
    ]
    assert None not in linked
    defined = re.findall(r"^\[([\w-]+)\]: https://\S+", table, flags=re.MULTILINE)
    assert {match[1] for match in linked if match and match[1]} == {*defined}


def test_the_tour_goes_through_the_sections_of_a_report(finished_run: Path) -> None:
    page = (finished_run / "work_dir" / "report.html").read_text()
    sections = re.findall(r'<h2 id="[\w-]+-title">([^<]+)</h2>', page)
    tour = re.findall(r"^## (.+)$", (ROOT / "docs" / "tour.md").read_text(), flags=re.MULTILINE)
    assert tour == ["At a glance", *sections, "Sections that the demo has not"]


def test_pictures_are_small_and_shown() -> None:
    pictures = list((ROOT / "docs" / "images").iterdir())
    assert sum(path.stat().st_size for path in pictures) < 300_000
    shown = (ROOT / "README.md").read_text()
    assert [path.name for path in pictures if f"](docs/images/{path.name})" not in shown] == []


def test_the_pictures_are_made_by_a_command(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not shutil.which("chromedriver"):
        pytest.skip("no Chromium with chromedriver installed: apt-get install chromium chromium-driver")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    pictures = importlib.import_module("pictures")
    monkeypatch.setattr(sys, "argv", ["pictures.py", str(finished_run), "--output", str(tmp_path)])
    pictures.main()
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in (ROOT / "docs" / "images").iterdir()}
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            assert min(image.size) > 200


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells one after the other, without a kernel, with one step of training."""
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "examples" / "phantoms.ipynb").read_text())
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)
        if cell["cell_type"] == "code":
            code = "".join(cell["source"]).replace("num_steps_per_epoch=10", "num_steps_per_epoch=1")
            exec(compile(code.replace("num_epochs=4", "num_epochs=1"), "notebook", "exec"), names)  # noqa: S102 - our own file
    assert names["result"].report.exists()  # type: ignore[attr-defined]
    assert set(names["found"].volumes_ml) == {"sphere", "box"}  # type: ignore[attr-defined]
