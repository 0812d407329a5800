"""The templates: hyperparameters, recipes and bundle files as plain data, read from the wheel or a checkout."""

from __future__ import annotations

import json
import re
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from autoseg.terminal import printable


def template_root() -> Traversable:
    """The folder of the templates: inside the installed package, or beside it in a checkout."""
    packaged = resources.files("autoseg").joinpath("templates")
    if packaged.is_dir():
        return packaged
    return Path(__file__).resolve().parents[2] / "templates"


def read_template_json(algo: str, name: str) -> Any:
    """Read a JSON file of an algorithm's template."""
    return json.loads(template_root().joinpath(algo, name).read_text(encoding="utf-8"))


def read_template_text(algo: str, name: str) -> str:
    """Read a text file of an algorithm's template; `name` may have folders."""
    return template_root().joinpath(algo, *name.split("/")).read_text(encoding="utf-8")


HYPER_PARAMETERS = "hyper_parameters.yaml"
"""A job's hyperparameters, in a template's folder; `common` has all, a network's folder those that differ."""
FILLED = "<planner>"
"""Stands in a template for a value that a rule of the planner fills in."""
TITLE, NETWORK = "<title>", "<network>"
"""Stand in the common template for the first line of the network's own, and for its name."""
LINE = re.compile(r"^([\w.]+): (.*?)(?:\s+# (.*))?$")
"""A line of a template's hyper_parameters.yaml: key, value or `<planner>`, and the rule behind a fixed value."""


def template_text(algo: str) -> str:
    """A network's hyper_parameters.yaml: the common one, with the lines of its own in place of those of their keys.

    Raises:
        ValueError: A line of its own has a key that the common template lacks.
    """
    title, *own_lines = read_template_text(algo, HYPER_PARAMETERS).splitlines()
    own = {match[1]: line for line in own_lines if (match := LINE.match(line))}
    lines = []
    for line in read_template_text("common", HYPER_PARAMETERS).splitlines():
        match = LINE.match(line)
        line = own.pop(match[1], line) if match else line
        lines.append(line.replace(TITLE, title.removeprefix("# ")).replace(NETWORK, algo))
    if own:
        raise ValueError(f"templates/{algo}/{HYPER_PARAMETERS}: templates/common has no line of {', '.join(own)}.")
    return "\n".join(lines) + "\n"


def template_values(algo: str) -> dict[str, tuple[Any, str]]:
    """The hyperparameters of a network's template in their order: value (or `FILLED`) and rule."""
    return _values(template_text(algo))


def recipe_values(algo: str, recipe: str) -> dict[str, tuple[Any, str]]:
    """What a published training says of a network: key -> value and source."""
    return _values(read_template_text(algo, f"recipes/{recipe}.yaml"))


def _values(text: str) -> dict[str, tuple[Any, str]]:
    matches = [match for line in text.splitlines() if (match := LINE.match(line))]
    return {match[1]: (yaml.safe_load(match[2]), match[3] or "") for match in matches}


def fill_template(algo: str, values: dict[str, Any], rules: dict[str, str]) -> str:
    """The template's text with every `<planner>` filled and every rule beside its value.

    Args:
        values: plain data for every key of the template.
        rules: key -> where the value came from, as a comment.
    """
    lines = []
    for line in template_text(algo).splitlines():
        match = LINE.match(line)
        if match is None:
            lines.append(line)
            continue
        key = match[1]
        comment = f"  # {printable(rules[key], one_line=True)}" if rules.get(key) else ""
        block = isinstance(values[key], dict) or (
            isinstance(values[key], list) and any(isinstance(v, dict) for v in values[key])
        )
        if block:
            text = yaml.safe_dump(values[key], sort_keys=False, default_flow_style=None, width=110)
            lines.append(f"{key}:{comment}")
            lines.extend("  " + t for t in text.splitlines())
        else:
            text = yaml.safe_dump(values[key], default_flow_style=True, width=10**6).removesuffix("...\n").strip()
            lines.append(f"{key}: {text}{comment}")
    return "\n".join(lines) + "\n"
