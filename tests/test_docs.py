"""The texts a user reads first agree with the code."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from autoseg.cli.arguments import parse
from autoseg.cli.commands import TAKES_SETTINGS, Commands
from autoseg.config.docs import is_inherited, setting_docs, settings_manual
from autoseg.config.load import load_settings
from autoseg.config.networks import ALGOS, LOCATOR
from autoseg.config.settings import Settings

ROOT = Path(__file__).resolve().parents[1]


def test_settings_manual_is_current() -> None:
    assert (ROOT / "docs" / "settings.md").read_text() == settings_manual(), "run `make docs`"


def test_settings_manual_names_every_setting() -> None:
    manual = settings_manual()
    for key, doc in setting_docs().items():
        assert is_inherited(doc) or doc.type == "a block of settings" or f"| `{key}` |" in manual, key
    assert "| `segresnet.overlap` |" not in manual


def test_only_networks_inherit() -> None:
    inherited = {key for key, doc in setting_docs().items() if is_inherited(doc)}
    assert {key.partition(".")[0] for key in inherited} == {*ALGOS, LOCATOR}
    assert {"segresnet.overlap", "locator.batch_size"} <= inherited
    assert not {"overlap", "inference.overlap", "sweep.folds", "segresnet.init_filters"} & inherited


def test_the_example_loads_and_is_the_default(tmp_path: Path) -> None:
    shutil.copy(ROOT / "input.yaml.example", tmp_path / "input.yaml")
    (tmp_path / "datalist.json").write_text("{}")
    (tmp_path / "data").mkdir()
    settings, _ = load_settings(tmp_path / "input.yaml")
    paths = {key: getattr(settings, key) for key in ("datalist", "dataroot", "work_dir")}
    assert settings == Settings(modality="CT", **paths)


def test_the_example_names_every_setting() -> None:
    example = yaml.safe_load((ROOT / "input.yaml.example").read_text())
    for key, doc in setting_docs().items():
        name = key.partition(".")[2]
        assert key in example if not doc.block else is_inherited(doc) or name in example[doc.block], key


def test_the_example_explains_every_setting() -> None:
    lines = (ROOT / "input.yaml.example").read_text().splitlines()
    values = [line for line in lines if re.match(r" *[a-z_]+: .", line)]
    assert [line for line in values if "#" not in line] == []


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/settings.md", "input.yaml.example"])
def test_texts_are_ascii_and_lines_fit(name: str) -> None:
    text = (ROOT / name).read_text(encoding="ascii")
    assert [line for line in text.splitlines() if len(line) > 140 and "|" not in line] == []


def test_commands_and_files_in_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text()
    for line in re.findall(r"^(?:\.\./)?\.venv/bin/autoseg (.*?)(?:  .*)?$", text, flags=re.MULTILINE):
        parse(Commands, TAKES_SETTINGS, line.split())
    for path in re.findall(r"`(autoseg/[\w/]+\.py)`", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\((?!http)([^)]+)\)", text):
        assert (ROOT / path).exists(), path


def test_make_targets_in_the_texts_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md"):
        assert set(re.findall(r"\bmake ([a-z-]+)\b", (ROOT / name).read_text())) - {"it"} <= targets
