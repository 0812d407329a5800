"""The documentation: it builds, no link is dead, every command in it runs, and so does the notebook."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from autoseg.cli.arguments import command_names, parse
from autoseg.cli.commands import TAKES_SETTINGS, Commands
from autoseg.cli.main import run_command
from autoseg.config.docs import setting_docs
from autoseg.config.load import AUTO3DSEG_TRACKING, AUTO3DSEG_WITHOUT_EFFECT

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])
ENDLESS = ("--serve",)
"""Commands with one of these are checked, not run."""
TINY = """
algos: [segresnet]
folds: [0]
num_epochs: 1
batch_size: 1
num_steps_per_epoch: 1
num_workers: 1
precision: fp32
roi_size: [16, 16, 16]
segresnet: {init_filters: 8, blocks_down: [1, 1]}
"""


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
    listed = re.findall(r"[\w-]+\.md", json.dumps(config["nav"]))
    assert sorted(listed) == sorted(p.name for p in (ROOT / "docs").glob("*.md"))
    assert config["theme"]["font"] is False  # nothing is fetched from elsewhere


def test_the_first_page_leads_to_every_other() -> None:
    linked = re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs" / "index.md").read_text())
    assert {"index.md", *linked} == {p.name for p in (ROOT / "docs").glob("*.md")}


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


@pytest.mark.parametrize("path", [p for p in PAGES if commands_of(p)], ids=lambda p: p.name)
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
