"""The templates: each algorithm's recipe and bundle files as plain data, read from the wheel or a checkout."""

from __future__ import annotations

import json
import re
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml


def template_root() -> Traversable:
    """The folder of the templates: inside the installed package, or beside it in a checkout."""
    packaged = resources.files("autoseg").joinpath("templates")
    if packaged.is_dir():
        return packaged
    return Path(__file__).resolve().parents[2] / "templates"


def read_template_json(algo: str, name: str) -> Any:
    """Read a JSON file of an algorithm's template."""
    return json.loads(template_root().joinpath(algo, name).read_text())


def read_template_text(algo: str, name: str) -> str:
    """Read a text file of an algorithm's template; `name` may have folders."""
    return template_root().joinpath(algo, *name.split("/")).read_text()


FILLED = "<planner>"
"""Stands in a template for a value that the planner fills in."""
LINE = re.compile(r"^([\w.]+): (.*?)(?:\s+# (.*))?$")
"""A line of a template's hyper_parameters.yaml: key, value or `<planner>`, and the rule behind a fixed value."""


def template_values(algo: str, name: str = "configs/hyper_parameters.yaml") -> dict[str, tuple[Any, str]]:
    """Keys of an algorithm's template, or of a recipe's file, in their order: value (or `FILLED`) and rule."""
    found = {}
    for line in read_template_text(algo, name).splitlines():
        if match := LINE.match(line):
            found[match[1]] = (yaml.safe_load(match[2]), match[3] or "")
    return found


def fill_template(algo: str, values: dict[str, Any], rules: dict[str, str]) -> str:
    """The template's text with every `<planner>` filled and every rule beside its value.

    Args:
        values: plain data for every key of the template.
        rules: key -> where the value came from, as a comment.
    """
    lines = []
    for line in read_template_text(algo, "configs/hyper_parameters.yaml").splitlines():
        match = LINE.match(line)
        if match is None:
            lines.append(line)
            continue
        key = match[1]
        comment = f"  # {rules[key]}" if rules.get(key) else ""
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
