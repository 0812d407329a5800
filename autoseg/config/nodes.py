"""YAML as nodes that know their file and line, or the flag they came from; our own files as plain data.

No object is ever built from it.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from typing import Any

import yaml

from autoseg.config.types import allows_none, is_many, is_text
from autoseg.errors import ConfigError

MAX_DEPTH = 30
"""Deepest nesting that is read: far above any real file, far below where libyaml overflows the C stack."""
MAX_REPEATED = 100_000
"""Values that the aliases (*name) of a file may stand for in all: a few lines of aliases of aliases are billions."""
LONG_NUMBER = re.compile(r"[-+0-9_:.]{1000,}")
"""Such a text without quotes is a number to YAML; one of base 60 (1:30:00) takes time with the square of its length."""
NULL_WORDS = frozenset({"", "~", "null"})
"""Plain texts that mean no value."""
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The safe loader: plain data alone; in C where libyaml is there, which `yaml.safe_load` never takes."""


def load_plain(text: str) -> Any:
    """Plain data out of YAML that this package wrote, by libyaml where there is one: datastats may be megabytes.

    Raises:
        yaml.YAMLError: It is none, asks for anything but plain data, or is nested or repeated absurdly.
    """
    try:
        _check_size(text, "line")
    except ConfigError as error:
        raise yaml.YAMLError(error.messages[0].replace("line:", "line ", 1)) from None
    return yaml.load(text, Loader=_LOADER)


HALVES = re.compile(r"(?<!\\)((?:\\\\)*)\\u(d[89ab][0-9a-f]{2})\\u(d[c-f][0-9a-f]{2})")
LONE_HALF = re.compile(r"(?<!\\)((?:\\\\)*)\\ud[89a-f][0-9a-f]{2}")
"""JSON's two escapes of a letter outside the Basic Multilingual Plane, and one without the other."""


def json_for_yaml(value: Any, default: Callable[[Any], Any] | None = None) -> str:
    """Plain data as JSON that a YAML reader takes for the same.

    JSON writes an emoji as two halves of an escape, which YAML refuses. A half alone, of a file name that is no UTF-8,
    is no text at all and becomes the sign for that.
    """
    text = json.dumps(value, default=default)
    if "\\ud" not in text:
        return text

    def whole(match: re.Match[str]) -> str:
        high, low = int(match[2], 16), int(match[3], 16)
        return f"{match[1]}\\U{0x10000 + (high - 0xD800) * 0x400 + low - 0xDC00:08x}"

    return LONE_HALF.sub(r"\1\\ufffd", HALVES.sub(whole, text))


class _Source(io.StringIO):
    """A text that tells the YAML parser its name, which then stands in every node's mark."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.name = name


def _check_size(text: str, name: str) -> None:
    """Look through YAML, before anything is built from it, for what nobody could read to the end.

    Raises:
        ConfigError: It is nested deeper than `MAX_DEPTH`, an alias stands within what it refers to, aliases stand for
            more than `MAX_REPEATED` values, or a number is a `LONG_NUMBER`.
        yaml.YAMLError: It is no YAML.
    """
    open_blocks: list[tuple[str | None, int]] = []  # each anchor, and how many values came before it
    sizes: dict[str, int] = {}
    count = repeated = 0
    for event in yaml.parse(_Source(text, name), Loader=_LOADER):
        if isinstance(event, yaml.AliasEvent):
            if any(event.anchor == anchor for anchor, _ in open_blocks):
                raise ConfigError(f"{where(event, name)}: *{event.anchor} refers to itself. Write it out.")
            size = sizes.get(str(event.anchor), 0)
            count, repeated = count + size, repeated + size
            if repeated > MAX_REPEATED:
                raise ConfigError(
                    f"{where(event, name)}: *{event.anchor} and the aliases before it repeat more than {MAX_REPEATED} "
                    "values. Write them out, or leave them out."
                )
        elif isinstance(event, yaml.CollectionStartEvent):
            open_blocks.append((event.anchor, count))
            if len(open_blocks) > MAX_DEPTH:
                raise ConfigError(f"{where(event, name)}: nested deeper than {MAX_DEPTH} levels. Flatten it.")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_blocks.pop()
            count += 1
            if anchor is not None:
                sizes[anchor] = count - before
        elif isinstance(event, yaml.ScalarEvent):
            if not event.style and LONG_NUMBER.fullmatch(event.value):
                raise ConfigError(
                    f"{where(event, name)}: a number of {len(event.value)} signs. Shorten it; a text stands in quotes."
                )
            count += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1


def compose(text: str, name: str) -> yaml.Node | None:
    """Parse YAML into nodes that know their place. No object is built.

    Raises:
        ConfigError: The text is not YAML, is nested or repeated absurdly, or carries a tag such as !!python/object.
    """
    try:
        _check_size(text, name)
        return yaml.compose(_Source(text, name), Loader=_LOADER)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}" if mark and not name.startswith("--") else name
        if "maximum nesting depth" in (error.problem or ""):  # PyYAML's own limit, from 6.0.4 on, comes before ours
            raise ConfigError(f"{place}: nested deeper than {MAX_DEPTH} levels. Flatten it.") from None
        advice = (
            "Indent with spaces."
            if "cannot start any token" in str(error)
            else "Check colons, quotes, brackets and indentation."
        )
        raise ConfigError(f"{place}: not valid YAML: {error.problem or error.context}. {advice}") from None
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{name}: not valid YAML: {' '.join(str(error).split())}. Save it as plain text in UTF-8."
        ) from None


def where(node: Any, name: str = "") -> str:
    """The place of a node: FILE:LINE, or --flag."""
    name = getattr(node.start_mark, "name", name)
    return name if name.startswith("--") else f"{name}:{node.start_mark.line + 1}"


def flag_node(key: str, text: str, annotation: Any) -> yaml.Node:
    """The node of a value given on the command line, read as YAML unless the key takes text.

    Raises:
        ConfigError: It is not YAML.
    """
    name = f"--{key}"
    if is_text(annotation):
        mark = yaml.Mark(name, 0, 0, 0, None, 0)
        style = None if text in NULL_WORDS and allows_none(annotation) else "'"
        return yaml.ScalarNode("tag:yaml.org,2002:str", text, mark, mark, style=style)
    if is_many(annotation) and "," in text and text.strip()[:1] not in "[{":
        text = f"[{text}]"
    node = compose(text, name)
    return node if node is not None else flag_node(key, "null", annotation)


def show(node: yaml.Node) -> str:
    """A node as a person wrote it, short enough for a message."""
    if isinstance(node, yaml.ScalarNode):
        text = node.value if len(node.value) <= 60 else node.value[:57] + "..."
        if node.style and not where(node).startswith("--"):
            return f'the text "{text}"'
        return "nothing" if text in NULL_WORDS else text
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if all(isinstance(item, yaml.ScalarNode) for item in node.value) and len(node.value) <= 8:
        return "[" + ", ".join(item.value for item in node.value) + "]"
    return f"a list of {len(node.value)}"
