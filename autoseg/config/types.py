"""What a type annotation allows, in words a user reads; and the known word nearest to a misspelt one."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel


def nearest(word: str, known: Iterable[str], *, likeness: float = 0.6) -> str | None:
    """The known word most like a misspelt one, or None where nothing is near."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=likeness)
    return matches[0] if matches else None


def suggest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """A sentence that names the nearest known word, or else all of them."""
    options = sorted(known)
    match = nearest(word, options)
    return f"Did you mean {prefix}{match}?" if match else f"Known: {', '.join(prefix + o for o in options)}."


def strip_annotated(annotation: Any, metadata: Iterable[Any] = ()) -> tuple[Any, dict[str, Any]]:
    """Split an annotation into the bare type and its limits (gt, ge, lt, le, multiple_of, min_length, max_length)."""
    limits = list(metadata)
    while get_origin(annotation) is Annotated:
        annotation, *extra = get_args(annotation)
        limits += extra
    limits += [inner for item in limits for inner in getattr(item, "metadata", ())]
    names = ("gt", "ge", "lt", "le", "multiple_of", "min_length", "max_length")
    return annotation, {n: v for n in names for item in limits if (v := getattr(item, n, None)) is not None}


def members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, None's type left out; the annotation itself where it is none."""
    bare, _ = strip_annotated(annotation)
    if get_origin(bare) in (Union, types.UnionType):
        return tuple(m for arg in get_args(bare) if arg is not type(None) for m in members(arg))
    return (annotation,)


def allows_none(annotation: Any) -> bool:
    """Whether null is a value of the type."""
    bare, _ = strip_annotated(annotation)
    return get_origin(bare) in (Union, types.UnionType) and type(None) in get_args(bare)


def describe_type(annotation: Any, metadata: Iterable[Any] = (), *, plural: bool = False) -> str:
    """Say in words what values a type has, such as `a whole number >= 1`."""
    parts = members(annotation)
    if len(parts) > 1:
        return " or ".join(describe_type(part, plural=plural) for part in parts)
    bare, limits = strip_annotated(parts[0], metadata)
    words = {"gt": "> {}", "ge": ">= {}", "lt": "< {}", "le": "<= {}", "multiple_of": "divisible by {}"}
    tail = " and ".join(w.format(limits[n]) for n, w in words.items() if n in limits)
    origin, args = get_origin(bare), get_args(bare)
    simple = {int: "whole number", float: "number", str: "text", Path: "path"}
    if bare in simple:
        name = simple[bare] + "s" if plural else simple[bare] if bare is str else f"a {simple[bare]}"
        return f"{name} {tail}" if tail else name
    if bare is bool:
        return "true or false"
    if origin is Literal:
        return "one of " * (not plural and len(args) > 1) + ", ".join(str(a) for a in args)
    if origin in (tuple, list):
        if origin is list or args[-1] is Ellipsis:
            most = f"at most {limits['max_length']} " if "max_length" in limits else ""
            items = f"{most}{describe_type(args[0], plural=True)}"
            return (
                f"a list out of {items}" if get_origin(strip_annotated(args[0])[0]) is Literal else f"a list of {items}"
            )
        return f"{'lists of ' * plural}{len(args)} {describe_type(args[0], plural=True)}"
    if origin is dict:
        return f"a mapping of names to {describe_type(args[1], plural=True)}"
    if isinstance(bare, type) and issubclass(bare, BaseModel):
        fields = ", ".join(bare.model_fields)
        return "{" + fields + "}" if len(bare.model_fields) <= 6 else "a block of settings"
    return "anything"


def is_text(annotation: Any) -> bool:
    """Whether every member of the type is text or a path, so that no YAML is to be seen in it."""
    return all(strip_annotated(m)[0] in (str, Path) for m in members(annotation))


def is_many(annotation: Any) -> bool:
    """Whether lists are values of the type."""
    return any(get_origin(strip_annotated(m)[0]) in (tuple, list) for m in members(annotation))
