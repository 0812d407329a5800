"""The strict reader of YAML a user wrote: every fault at once, each with its file, line, finding and remedy.

A model's field types lead the reading, so YAML's own guesses never change a text: `name: 2024_01` stays that
text, `learning_rate: 1e-4` is a number, and `fold: 010` (8 to YAML) is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from autoseg.config.nodes import MAX_DEPTH, NULL_WORDS, compose, flag_node, show, where
from autoseg.config.types import allows_none, describe_type, members, nearest, strip_annotated, suggest
from autoseg.errors import ConfigError

M = TypeVar("M", bound=BaseModel)
Origins = dict[str, str]
"""Key, dotted inside a block -> FILE:LINE or command line; default for keys of the top level that were not given."""

_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,4})?")
_TRUE, _FALSE = {"true", "yes", "on"}, {"false", "no", "off"}
_TAGS = {f"tag:yaml.org,2002:{t}" for t in ("str", "int", "float", "bool", "null", "seq", "map", "timestamp", "value")}
_BROKEN: Any = object()
"""Stands for a value that was reported as a fault."""


@dataclass(kw_only=True)
class Reader:
    """Turns nodes into typed values and collects what is wrong with them."""

    without_effect: Mapping[str, str] = field(default_factory=dict)
    """Top-level keys that are accepted and left out -> why they do nothing."""
    top: type[BaseModel] | None = None
    """The model of the whole file."""
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    origins: Origins = field(default_factory=dict)

    def fault(self, node: yaml.Node, path: str, text: str) -> Any:
        """Note a fault at a node's place."""
        place = where(node)
        place = f"--{path}" if place.startswith("--") else f"{place}: {path}" if path else place
        self.faults.append(f"{place}: {text}")
        return _BROKEN

    def expected(
        self, node: yaml.Node, path: str, annotation: Any, hint: str = "", metadata: Iterable[Any] = ()
    ) -> Any:
        """Note that a value is not of its type."""
        text = f"expected {describe_type(annotation, metadata)}, found {show(node)}."
        return self.fault(node, path, f"{text} {hint}".strip())

    def value(self, annotation: Any, node: yaml.Node, path: str, metadata: Iterable[Any] = ()) -> Any:
        """Read a node as a type; `_BROKEN`, with a fault noted, where it is none of its values."""
        if node.tag not in _TAGS:
            return self.fault(node, path, f"the tag {node.tag} is not read. Remove it.")
        metadata = tuple(metadata)
        options = members(annotation)
        is_null = isinstance(node, yaml.ScalarNode) and not node.style and node.value.lower() in NULL_WORDS
        if is_null and Any not in options:
            return None if allows_none(annotation) else self.expected(node, path, annotation, metadata=metadata)
        if len(options) == 1:
            return self.one(options[0], node, path, metadata)
        for option in options:
            trial = Reader()
            value = trial.one(option, node, path, metadata)
            if value is not _BROKEN or (not isinstance(node, yaml.ScalarNode) and _takes(option, node)):
                self.faults += trial.faults
                self.origins |= trial.origins
                return value
        return self.expected(node, path, annotation, metadata=metadata)

    def one(self, annotation: Any, node: yaml.Node, path: str, metadata: tuple[Any, ...] = ()) -> Any:
        """Read a node as a type that is no union."""
        bare, limits = strip_annotated(annotation, metadata)
        origin, args = get_origin(bare), get_args(bare)
        if bare is Any:
            return self.anything(node, path)
        if isinstance(bare, type) and issubclass(bare, BaseModel) and isinstance(node, yaml.MappingNode):
            return self.model(bare, node, path)
        if origin is dict and isinstance(node, yaml.MappingNode):
            items = {k: self.value(args[1], v, f"{path}.{k}") for k, v in self.pairs(node, path).items()}
            self.origins |= {f"{path}.{k.value}": _origin(v, k) for k, v in node.value if k.value in items}
            return _BROKEN if any(v is _BROKEN for v in items.values()) else items
        if origin in (tuple, list):
            return self.items(annotation, node, path, limits)
        if isinstance(node, yaml.ScalarNode) and origin is not dict:
            value, hint = _scalar(bare, node)
            if value is not _BROKEN and _within(value, limits):
                return value
            return self.expected(node, path, annotation, hint, metadata)
        return self.expected(node, path, annotation, metadata=metadata)

    def items(self, annotation: Any, node: yaml.Node, path: str, limits: Mapping[str, Any]) -> Any:
        """Read a list; one plain value stands for a list of one where any number is allowed."""
        bare, _ = strip_annotated(annotation)
        args = get_args(bare)
        many = get_origin(bare) is list or args[-1] is Ellipsis
        if isinstance(node, yaml.ScalarNode) and many:
            nodes = [node]
        elif isinstance(node, yaml.SequenceNode) and (many or len(node.value) == len(args)):
            nodes = node.value
        else:
            return self.expected(node, path, annotation)
        if len(nodes) < limits.get("min_length", 0):
            return self.fault(node, path, "the list is empty. Give at least one value, or leave the key out.")
        if len(nodes) > limits.get("max_length", math.inf):
            return self.fault(node, path, f"a list of {len(nodes)}. Give at most {limits['max_length']} values.")
        kinds = [args[0]] * len(nodes) if many else args
        single = isinstance(node, yaml.ScalarNode)
        values = [
            self.value(k, n, path if single else f"{path}[{i}]")
            for i, (k, n) in enumerate(zip(kinds, nodes, strict=True))
        ]
        if any(v is _BROKEN for v in values):
            return _BROKEN
        return values if get_origin(bare) is list else tuple(values)

    def pairs(self, node: yaml.MappingNode, path: str) -> dict[str, yaml.Node]:
        """The entries of a mapping by key; a key given twice, or that is no plain word, is a fault."""
        lines: dict[str, int] = {}
        own: dict[str, yaml.Node] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.fault(key_node, path, f"expected a name before the colon, found {show(key_node)}.")
                continue
            key = key_node.value
            if key in own:
                here = f"{path}.{key}" if path else key
                self.fault(key_node, here, f"already given on line {lines[key]}. Keep one of the two.")
                continue
            own[key], lines[key] = value_node, key_node.start_mark.line + 1
        return own

    def model(self, model: type[M], node: yaml.MappingNode, path: str = "") -> Any:
        """Read a mapping as a model: unknown and missing keys, then each value, then what the model itself checks."""
        dot = f"{path}." if path else ""
        children = self.pairs(node, path)
        keys = {k.value: k for k, _ in node.value if isinstance(k, yaml.ScalarNode)}
        data, broken = {}, False
        for key, child in children.items():
            info = model.model_fields.get(key)
            if info is not None:
                value = self.value(info.annotation, child, dot + key, info.metadata)
                if "[" not in dot:
                    self.origins[dot + key] = _origin(child, keys.get(key, child))
                broken |= value is _BROKEN
                if value is not _BROKEN:
                    data[key] = value
            elif not path and key in self.without_effect:
                self.warnings.append(
                    f"{where(keys.get(key, child))}: {key}: has no effect: {self.without_effect[key]}."
                )
            else:
                self.unknown(keys.get(key, child), child, key, model, dot)
        for key, info in model.model_fields.items():
            if not dot:
                self.origins.setdefault(dot + key, "default")
            if info.is_required() and key not in children:
                doc = (info.description or "").split("\n")[0]
                place = node.start_mark.name if not path else where(node)
                self.faults.append(
                    f"{place}: {dot}{key}: missing. Expected {describe_type(info.annotation, info.metadata)}: {doc}"
                )
                broken = True
        try:
            instance = model.model_validate(data)
        except ValidationError as error:
            for item in error.errors():
                if item["type"] != "missing":
                    text = str(item.get("ctx", {}).get("error", item["msg"]))
                    key = next((str(p) for p in item["loc"] if str(p) in children), "")
                    self.fault(children.get(key, node), dot + key if key else path, text)
            return _BROKEN
        return _BROKEN if broken else instance

    def unknown(self, key_node: yaml.Node, child: yaml.Node, key: str, model: type[BaseModel], dot: str) -> None:
        """Note an unknown key, with the name that was probably meant."""
        known = list(model.model_fields)
        place = next((outer for outer, k, *_ in walk_fields(model) if k == key and outer), None)
        if dot and self.top and key in self.top.model_fields:
            hint = "It belongs at the top level, not in a block."
        elif place and nearest(key, known) is None:
            hint = f"It belongs under {place}: write {dot}{place}.{key}."
        else:
            hint = suggest(key, known, prefix=f"--{dot}" if where(child).startswith("--") else "")
        self.fault(child if where(child).startswith("--") else key_node, f"{dot}{key}", f"unknown key. {hint}")

    def anything(self, node: yaml.Node, path: str, depth: int = 0) -> Any:
        """Read a node that no type describes: plain data, and nothing that YAML versions read differently."""
        if depth > MAX_DEPTH:
            return self.fault(node, path, "refers to itself. Write it out.")
        if isinstance(node, yaml.MappingNode):
            return {k: self.anything(v, f"{path}.{k}", depth + 1) for k, v in self.pairs(node, path).items()}
        if isinstance(node, yaml.SequenceNode):
            return [self.anything(v, f"{path}[{i}]", depth + 1) for i, v in enumerate(node.value)]
        text: str = node.value
        if not isinstance(node, yaml.ScalarNode) or node.style:
            return text
        if text.lower() in NULL_WORDS:
            return None
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        for kind in (int, float):
            value, _ = _scalar(kind, node)
            if value is not _BROKEN:
                return value
        if node.tag != "tag:yaml.org,2002:str":
            return self.fault(
                node,
                path,
                f"{text} can be read in more than one way. Put it in quotes, or write true, false or a plain number.",
            )
        return text


def _line(fault: str) -> tuple[bool, int]:
    """Order of faults: the file's by line, then the command line's."""
    match = re.match(r".*?:([0-9]+): ", fault)
    return fault.startswith("--"), int(match[1]) if match else 0


def _origin(node: yaml.Node, key_node: yaml.Node) -> str:
    """Where a value was set: the line of its key."""
    if where(node).startswith("--"):
        return "command line"
    return f"{Path(node.start_mark.name).name}:{key_node.start_mark.line + 1}"


def _takes(annotation: Any, node: yaml.Node) -> bool:
    """Whether a type is made of the node's kind, mapping or list."""
    bare, _ = strip_annotated(annotation)
    is_model = isinstance(bare, type) and issubclass(bare, BaseModel)
    if isinstance(node, yaml.MappingNode):
        return is_model or get_origin(bare) is dict
    return get_origin(bare) in (tuple, list)


def _within(value: Any, limits: Mapping[str, Any]) -> bool:
    if isinstance(value, str):
        return bool(len(value) >= limits.get("min_length", 0))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    return bool(
        value > limits.get("gt", -math.inf)
        and value >= limits.get("ge", -math.inf)
        and value < limits.get("lt", math.inf)
        and value <= limits.get("le", math.inf)
        and ("multiple_of" not in limits or value % limits["multiple_of"] == 0)
    )


def _scalar(kind: Any, node: yaml.ScalarNode) -> tuple[Any, str]:
    """Read one plain value as text, path, truth, number or choice: (value or _BROKEN, a hint)."""
    text = node.value
    if kind in (str, Path):
        return (_BROKEN, "Remove the NUL character.") if "\0" in text else (kind(text), "")
    if get_origin(kind) is Literal:
        choices = {str(c).lower() if isinstance(c, bool) else str(c): c for c in get_args(kind)}
        if text in choices:
            return choices[text], ""
        match = nearest(text.lower(), choices, likeness=0.7)
        return _BROKEN, f"Did you mean {match}?" if match else ""
    if node.style:
        return _BROKEN, "Remove the quotes." if _scalar(kind, yaml.ScalarNode(node.tag, text))[0] is not _BROKEN else ""
    if kind is bool:
        word = text.lower()
        return (word in _TRUE, "") if word in _TRUE | _FALSE else (_BROKEN, "")
    if kind is int and _INT.fullmatch(text):
        return int(text), ""
    if kind in (int, float) and _FLOAT.fullmatch(text) and math.isfinite(number := float(text)):
        if kind is float:
            return number, ""
        return _BROKEN, f"Write {int(number)}." if number.is_integer() and abs(number) < 1e15 else ""
    return _BROKEN, _number_hint(text)


def _number_hint(text: str) -> str:
    """What to write instead of a text that YAML takes for a number in a way people do not expect."""
    if re.fullmatch(r"[-+]?[0-9][0-9_]*_[0-9_]*", text):
        return f"Write {text.replace('_', '')}, without underscores."
    if re.fullmatch(r"0[0-9]+", text):
        return f"Write {text.lstrip('0') or '0'}: a leading zero means octal to YAML."
    if re.fullmatch(r"[0-9]+(:[0-9]{1,2})+", text):
        return "YAML counts the parts of such a value in sixties; write one number."
    if re.fullmatch(r"[0-9]+,[0-9]+", text):
        return f"Write {text.replace(',', '.')}, with a point."
    return "Write null to leave it unset." if text.lower() == "none" else ""


def walk_fields(model: type[BaseModel], outer: str = "") -> Iterator[tuple[str, str, Any, Any]]:
    """All settings of a model and of its blocks, in order: (block or "", name, annotation, field)."""
    for key, info in model.model_fields.items():
        yield outer, key, info.annotation, info
        for member in members(info.annotation):
            bare, _ = strip_annotated(member)
            if not outer and isinstance(bare, type) and issubclass(bare, BaseModel):
                yield from walk_fields(bare, key)


def read_with_origins(
    path: Path,
    model: type[M],
    overrides: Mapping[str, str] | None = None,
    without_effect: Mapping[str, str] | None = None,
    prepare: Callable[[yaml.MappingNode], None] = lambda root: None,
) -> tuple[M, Origins, list[str]]:
    """Read a YAML file as a model, with the origin of each value, and warnings.

    Args:
        path: The file.
        model: What it must hold.
        overrides: Key, dotted where nested -> text from the command line; wins over the file.
        without_effect: Top-level keys that are accepted with a warning -> why they do nothing.
        prepare: Changes the whole file, with the overrides in it, before it is read.

    Raises:
        ConfigError: All that is wrong, one line each.
    """
    root = _read_root(path)
    reader = Reader(without_effect=without_effect or {}, top=model)
    fields = {f"{outer}.{key}" if outer else key: annotation for outer, key, annotation, _ in walk_fields(model)}
    for key, text in (overrides or {}).items():
        try:
            node = flag_node(key, text, fields.get(key, str))
        except ConfigError as error:
            reader.faults += error.messages
            continue
        _put(root, key.split("."), node)
    prepare(root)
    instance = reader.model(model, root)
    if reader.faults:
        raise ConfigError(sorted(reader.faults, key=_line))
    return instance, reader.origins, reader.warnings


def read_model(path: Path, model: type[M], overrides: Mapping[str, str] | None = None) -> M:
    """Read a YAML file as a model.

    Raises:
        ConfigError: All that is wrong, one line each, with file, line, finding and remedy.
    """
    return read_with_origins(path, model, overrides)[0]


def read_plain(path: Path) -> dict[str, Any]:
    """Read a YAML file of `key: value` lines as plain data.

    Raises:
        ConfigError: All that is wrong, one line each.
    """
    reader = Reader()
    data: dict[str, Any] = reader.anything(_read_root(path), "")
    if reader.faults:
        raise ConfigError(reader.faults)
    return data


def read_value(key: str, text: str, annotation: Any) -> Any:
    """Read the value of one flag as a type.

    Raises:
        ConfigError: It is no value of the type; the message names the flag.
    """
    reader = Reader()
    value = reader.value(annotation, flag_node(key, text, annotation), key)
    if reader.faults:
        raise ConfigError(reader.faults)
    return value


def _read_root(path: Path) -> yaml.MappingNode:
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ConfigError(f"{path}: a pipe or a device; expected a YAML file.")
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file.") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; expected a YAML file.") from None
    except PermissionError:
        raise ConfigError(f"{path}: may not be read. Check its permissions.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8. Save it as plain text in UTF-8.") from None
    root = compose(text, str(path))
    if root is None:
        mark = yaml.Mark(str(path), 0, 0, 0, None, 0)
        return yaml.MappingNode("tag:yaml.org,2002:map", [], mark, mark)
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{where(root)}: expected lines of `key: value`, found {show(root)}.")
    return root


def _put(root: yaml.MappingNode, keys: list[str], node: yaml.Node) -> None:
    """Set a value in a tree of nodes; what stood there goes."""
    first, *rest = keys
    if rest:
        inner = next((v for k, v in root.value if k.value == first and isinstance(v, yaml.MappingNode)), None)
        block = yaml.MappingNode(
            "tag:yaml.org,2002:map", list(inner.value) if inner else [], node.start_mark, node.end_mark
        )
        if inner is not None:
            block.start_mark = inner.start_mark
        _put(block, rest, node)
        node = block
    key = next((k for k, v in root.value if k.value == first and rest and isinstance(v, yaml.MappingNode)), None)
    key = key or yaml.ScalarNode("tag:yaml.org,2002:str", first, node.start_mark, node.end_mark)
    root.value = [*((k, v) for k, v in root.value if k.value != first), (key, node)]
