"""Wheels of a checkout, and commands with them outside of it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

PYTHON: str = getattr(sys, "_base_executable", sys.executable)
"""An interpreter that finds no packages of this environment by itself."""


def run(*words: str | Path, folder: Path, **environment: str) -> str:
    """What a command prints; it has to end well."""
    environment = {"PATH": os.environ["PATH"], **environment}
    done = subprocess.run(
        [str(word) for word in words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(source: Path, folder: Path) -> Path:
    """The wheel of a folder of sources, built by the packages that are installed, without the network."""
    words = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, source]
    run(sys.executable, *words, folder=folder, PYTHONPATH=os.environ.get("PYTHONPATH", ""))
    (path,) = folder.glob("*.whl")
    return path


def install(wheel: Path, folder: Path) -> tuple[Path, Path]:
    """Put a wheel into a folder that nothing may write to.

    Returns:
        That folder, and one with this environment's packages but for autoseg, whose .pth leads to the checkout.
    """
    packages, site = folder / "packages", folder / "site"
    packages.mkdir()
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(place).iterdir():
            if "autoseg3d" not in entry.name:
                (packages / entry.name).symlink_to(entry)
    words = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel]
    run(sys.executable, *words, folder=folder)
    for path in site.rglob("*"):
        path.chmod(0o555)
    return site, packages
