"""What a package index and who installs the wheel get: metadata, lower bounds, and a wheel that runs by itself."""

from __future__ import annotations

import os
import re
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from outside import PYTHON, build_wheel, install, run
from packaging.requirements import Requirement

from autoseg.version import __version__

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
FOR_DEVELOPERS = {"docs", "release", "test", "ci", "dev"}
MOST_WHEEL_BYTES = 2**20
"""1 MB as memory is counted; nearly all of it is source."""


def requirements(*extras: str) -> list[Requirement]:
    """What autoseg needs, and these extras; those that name other extras of autoseg are left out."""
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in EXTRAS[extra])]
    return [need for need in map(Requirement, texts) if need.name != PROJECT["name"]]


def test_all_has_every_extra_for_users() -> None:
    (all_of_them,) = map(Requirement, EXTRAS["all"])
    assert all_of_them.extras == set(EXTRAS) - FOR_DEVELOPERS - {"all"}


def test_the_lowest_versions_are_those_of_the_metadata() -> None:
    lowest = dict(
        line.split("==") for line in (ROOT / "constraints-lowest.txt").read_text().splitlines() if "#" not in line
    )
    wanted = requirements(*set(EXTRAS) - FOR_DEVELOPERS)
    assert lowest == {
        need.name: next(part.version for part in need.specifier if part.operator == ">=") for need in wanted
    }
    assert [need.name for need in wanted if not need.specifier.contains(lowest[need.name])] == []


def test_the_tested_versions_are_allowed() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.lower().split("==") for line in lines if "==" in line)
    for need in requirements(*set(EXTRAS) - {"release", "dev", "ci", "all"}):
        assert need.name.lower() in pinned, f"{need.name} is not in constraints.txt"
        assert need.specifier.contains(pinned[need.name.lower()]), need.name


def test_each_python_that_is_tested_is_in_the_metadata() -> None:
    versions = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert versions == ["3.11", "3.12", "3.13"]
    assert PROJECT["requires-python"] == f">={versions[0]}"


def test_a_package_index_shows_no_dead_links_and_no_pictures() -> None:
    """As the build makes its description; `test_what_the_wheel_holds` looks at the wheel's own."""
    hooks = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]["hooks"]
    text = (ROOT / "README.md").read_text()
    for change in hooks["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(change["pattern"], change["replacement"], text)
    check_readme(text)


def check_readme(text: str) -> None:
    assert "docs/clusters.md" in text  # the text of the link
    assert re.findall(r"\]\((?!https?:)[^)]*\)", text) == []  # dead on a package index
    assert not re.search(r"^!|^The demo's report:", text, flags=re.MULTILINE)  # nor text in a picture's place
    assert "[MONAI](https://monai.io)" in text


# -- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
@pytest.mark.extra("hatchling", "hatch_fancy_pypi_readme")
def test_what_the_wheel_holds(wheel: Path) -> None:
    assert wheel.stat().st_size < MOST_WHEEL_BYTES
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = message_from_bytes(archive.read(next(n for n in names if n.endswith("/METADATA"))))
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"autoseg", f"autoseg3d-{__version__}.dist-info"}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "autoseg").rglob("*.py")}
    templates = {f"autoseg/{p.relative_to(ROOT)}" for p in (ROOT / "templates").rglob("*") if p.is_file()}
    assert sources | templates <= set(names)
    assert metadata["Author"] == "autoseg developers"
    readme = metadata.get_payload()
    assert isinstance(readme, str)
    check_readme(readme)


@pytest.mark.slow
@pytest.mark.extra("hatchling", "hatch_fancy_pypi_readme")
def test_the_wheel_runs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site, packages = install(wheel, tmp_path)
    home = tmp_path / "home"
    home.mkdir()

    def autoseg(*words: str) -> str:
        environment = {"PYTHONPATH": f"{site}{os.pathsep}{packages}", "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
        return run(PYTHON, "-m", "autoseg", *words, folder=home, **environment)

    assert autoseg("--version") == f"autoseg {__version__}\n"
    assert "Ready for a run." in autoseg("doctor")
    assert autoseg("schema") == (ROOT / "docs" / "input.schema.json").read_text()
    autoseg("init", "--help")
    assert str(ROOT) not in run(
        PYTHON, "-c", "import autoseg; print(autoseg.__file__)",
        folder=home, PYTHONPATH=f"{site}{os.pathsep}{packages}",
    )  # fmt: skip
