"""What has to hold before a version is tagged; `make release-check` runs it. Exit code 1 where something does not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_ADDRESS = "no public address yet"
"""Stands wherever the address of the repository is missing."""
BY_HAND = """
By hand:
1. `make test`, `make test-extras`, `make test-slow`, and `make test-gpu` on a GPU, all pass on this commit.
2. `autoseg demo` from the wheel in dist/, in a new environment; look at report.html.
3. docs/results.md: figures that this version changed are measured anew.
4. CHANGELOG.md says what changes for input.yaml and for a work_dir of the version before.
5. git tag -s vX.Y.Z, push the tag; another maintainer approves the environment pypi.
6. Set the next version, X.Y+1.0.dev0, in autoseg/version.py and CITATION.cff, and begin its part of CHANGELOG.md.
"""


def version_of(root: Path) -> str:
    """The version, as autoseg/version.py has it."""
    found = re.search(r'__version__ = "(.+)"', (root / "autoseg" / "version.py").read_text())
    assert found, "autoseg/version.py names no version"
    return found[1]


def faults_of(root: Path) -> list[str]:
    """What is wrong in the files of a checkout, a line each."""
    version, faults = version_of(root), []
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        faults.append(f"autoseg/version.py: {version} is no release. Expected a version such as 0.2.0.")
    if not re.search(
        rf"^## {re.escape(version)} - \d{{4}}-\d\d-\d\d$", (root / "CHANGELOG.md").read_text(), re.MULTILINE
    ):
        faults.append(f"CHANGELOG.md: no heading `## {version} - YYYY-MM-DD`. Give the version its date.")
    if not re.search(rf"^version: {re.escape(version)}$", (root / "CITATION.cff").read_text(), re.MULTILINE):
        faults.append(f"CITATION.cff: another version than {version}.")
    places = [*root.glob("*.md"), root / "pyproject.toml", root / "CITATION.cff", *(root / ".github").rglob("*.yml")]
    faults += [
        f"{path.relative_to(root)}: says `{WITHOUT_ADDRESS}`. Put the repository's address there."
        for path in sorted(places)
        if WITHOUT_ADDRESS in " ".join(path.read_text().split()).replace(" # ", " ")
    ]
    return faults


def main() -> int:
    """Print what is wrong, or what is left to do by hand."""
    faults = faults_of(ROOT)
    changed = subprocess.run(
        ["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    if changed:
        faults.append(f"git: files that are not committed:\n{changed.rstrip()}")
    print("\n".join(faults) if faults else BY_HAND)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
