"""How autoseg and its packages are installed here, and the one piece of advice for what is missing.

Two kinds of users: those with a checkout, whose tested versions lie beside it, and those with the wheel alone.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, packages_distributions, requires, version
from pathlib import Path

NAME = "autoseg3d"
"""The distribution's name; the module's name, `autoseg`, belongs to another distribution on PyPI."""
PACKAGE = Path(__file__).resolve().parents[1]
FOR_DEVELOPERS = ("ci", "dev", "docs", "release", "test")
"""Extras that users of autoseg do not need."""


@dataclass(frozen=True, slots=True)
class Need:
    """One package that autoseg, or one of its extras, needs."""

    text: str
    """As the metadata has it, such as `numpy>=2.0`."""
    name: str
    installed: str | None
    """Its version; None: it is missing."""
    fits: bool
    """It is there, in a version that is allowed."""
    wanted: str = ""
    """The versions that are allowed, such as `>=2.0`."""


def is_checkout() -> bool:
    """Whether this autoseg is imported from its repository, installed in place or not at all."""
    return (PACKAGE.parent / "pyproject.toml").is_file()


def install_advice(extra: str = "", missing: Iterable[str] = ()) -> str:
    """What to do where packages are missing, as a sentence with a command.

    Args:
        extra: the extra that has them; empty: autoseg itself needs them.
        missing: requirements such as `numpy>=2.0`, for which who has the wheel alone asks by name.
    """
    what = f"[{extra}]" if extra else ""
    if is_checkout():
        return f"In the folder of autoseg: pip install -c constraints.txt -e {shlex.quote('.' + what) if what else '.'}"
    # With an extra, pip keeps the autoseg3d that is installed and takes what the extra names from its metadata. Without
    # one the packages are named themselves.
    words = [f"{NAME}{what}"] if extra else list(missing)
    return f"Run: pip install {' '.join(map(shlex.quote, words))}"


def needs(extra: str = "") -> list[Need] | None:
    """The packages that autoseg needs (with an extra: what this adds); None where autoseg is not installed."""
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        texts = requires(NAME) or []
    except PackageNotFoundError:
        return None
    found = []
    for text in texts:
        try:
            need = Requirement(text)
        except InvalidRequirement:
            continue
        here = need.marker is None or need.marker.evaluate({"extra": extra})
        also_without = need.marker is None or need.marker.evaluate({"extra": ""})
        if not here or (extra and also_without) or need.name == NAME:
            continue
        try:
            have = version(need.name)
        except PackageNotFoundError:
            have = None
        fits = have is not None and need.specifier.contains(have, prereleases=True)
        plain = f"{need.name}{need.specifier}"
        found.append(Need(text=plain, name=need.name, installed=have, fits=fits, wanted=str(need.specifier)))
    return found


def extras() -> dict[str, list[Need]]:
    """The extras for users, each with the packages it adds; empty where autoseg is not installed."""
    from importlib.metadata import metadata

    try:
        names = metadata(NAME).get_all("Provides-Extra") or []
    except PackageNotFoundError:
        return {}
    return {name: needs(name) or [] for name in sorted({*names} - {*FOR_DEVELOPERS, "all"})}


def rivals() -> list[str]:
    """Other distributions whose module is called autoseg, too, and surplus copies of our own, with their versions."""
    names = {*packages_distributions().get("autoseg", [])} - {NAME}
    others = [f"{name} {version(name)}" for name in sorted(names)]
    copies = sorted({d.version for d in distributions(name=NAME)})
    return [*others, *(f"{NAME} {number}" for number in copies if len(copies) > 1)]
