"""The words after `autoseg`: checked against the commands' signatures before anything runs, and their help.

Fire alone runs a command before it rejects a misspelt flag, and reads `2024_01` as a number.
"""

from __future__ import annotations

import inspect
import re
import textwrap
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from autoseg.errors import ConfigError

WIDTH = 100
MOST_WIDTH = 120
"""Characters of a line: of a paragraph, and of the list of commands."""
TYPES_OF_COMMANDS = ("autoseg.config.settings", "autoseg.export.targets")
"""Modules whose names stand in the commands' signatures, looked through in this order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One checked call: which command, with which texts."""

    command: str
    arguments: dict[str, str] = field(default_factory=dict)
    """Parameter -> text, each known to be a value of the parameter's type."""
    overrides: dict[str, str] = field(default_factory=dict)
    """Setting -> text, each a known key; read with input.yaml."""


def command_names(commands: type) -> list[str]:
    """The commands: public methods, in the order they were written."""
    return [name for name, member in vars(commands).items() if inspect.isfunction(member) and not name.startswith("_")]


def parse(commands: type, takes_settings: frozenset[str], argv: Sequence[str]) -> Call:
    """Check all words of a command line.

    Args:
        commands: Class whose public methods are the commands.
        takes_settings: Commands that accept any setting of input.yaml as a flag.
        argv: Words after the program's name, none of them --help.

    Raises:
        ConfigError: All that is wrong, one line each. Nothing has run.
    """
    from autoseg.config.types import suggest

    name = argv[0].replace("-", "_")
    if argv[0].startswith("-"):
        raise ConfigError(f"{argv[0]}: expected a command first: autoseg COMMAND --flag value. See autoseg --help.")
    if name not in command_names(commands):
        raise ConfigError(f"{argv[0]}: unknown command. {suggest(name, command_names(commands))}")
    types = parameter_types(getattr(commands, name))
    settings = setting_types() if name in takes_settings else {}
    return _Parser(name=name, function=getattr(commands, name), types=types, settings=settings).parse(argv[1:])


@dataclass(kw_only=True)
class _Parser:
    """Sorts the words of one command into flags, values and positionals."""

    name: str
    function: Callable[..., Any]
    types: dict[str, Any]
    settings: dict[str, Any]
    values: dict[str, str] = field(default_factory=dict)
    """Flag or positional -> its text."""
    valueless: set[str] = field(default_factory=set)
    """Flags that stood without a value."""
    faults: list[str] = field(default_factory=list)

    def parse(self, words: Sequence[str]) -> Call:
        from autoseg.config.reader import read_value

        positionals = [p.name for p in _parameters(self.function) if p.kind is p.POSITIONAL_OR_KEYWORD]
        surplus: list[str] = []
        rest = list(words)
        while rest:
            word = rest.pop(0)
            if word.startswith("-") and not _is_number(word):
                self.flag(word, rest)
            elif positionals:
                self.put(positionals.pop(0), word)
            else:
                surplus.append(word)
        for word in surplus:
            self.faults.append(f"{word}: surplus; expected {self.usage()}. A flag is written --flag value.")
        for key in (k for k in self.types if k in self.values):
            try:
                read_value(key, self.values[key], self.types[key])
            except ConfigError as error:
                self.faults += error.messages
        for parameter in _parameters(self.function):
            if parameter.default is parameter.empty and parameter.name not in {*self.values, *self.valueless}:
                flag = parameter.kind is parameter.KEYWORD_ONLY
                what = describe_parameters(self.function)[parameter.name]
                self.faults.append(f"{'--' if flag else ''}{parameter.name}: missing. {what} Expected {self.usage()}.")
        if self.faults:
            raise ConfigError(self.faults)
        return Call(
            command=self.name,
            arguments={k: v for k, v in self.values.items() if k in self.types},
            overrides={k: v for k, v in self.values.items() if k not in self.types},
        )

    def flag(self, word: str, rest: list[str]) -> None:
        """Take one flag, and its value from the words that follow."""
        from autoseg.config.types import suggest

        name, has_value, value = word.lstrip("-").partition("=")
        key = name.replace("-", "_")
        known = {**self.settings, **self.types}
        if not word.startswith("--") or not key:
            hint = f" Write --{key}." if key in known else " A flag is written --flag value."
            self.faults.append(f"{word}: not a flag.{hint}")
        elif key not in known:
            simple = [k for k in known if "." not in k or "." in key]
            self.faults.append(f"--{name}: unknown flag. {suggest(key, simple, '--')}")
        if key not in known or not word.startswith("--"):
            if not has_value and rest and not rest[0].startswith("--"):
                rest.pop(0)
            return
        if not has_value:
            follows = bool(rest) and (not rest[0].startswith("-") or _is_number(rest[0]))
            if _is_switch(known[key]) and not (follows and self.fits(key, rest[0], known[key])):
                value = "true"
            elif follows:
                value = rest.pop(0)
            else:
                from autoseg.config.types import describe_type

                self.faults.append(f"--{key}: no value given. Expected {describe_type(known[key])}.")
                self.valueless.add(key)
                return
        self.put(key, value)

    def fits(self, key: str, word: str, annotation: Any) -> bool:
        """Whether a word after a switch is its value and not a positional."""
        from autoseg.config.reader import read_value

        try:
            read_value(key, word, annotation)
        except ConfigError:
            return False
        return True

    def put(self, key: str, value: str) -> None:
        """Note a value; a second one is a fault."""
        if key in self.values:
            self.faults.append(f"--{key}: given twice, {self.values[key]} and {value}. Give it once.")
        self.values[key] = value

    def usage(self) -> str:
        """How the command is called."""
        return usage(self.name, self.function)


def setting_types() -> dict[str, Any]:
    """All settings that may be flags -> their types."""
    from autoseg.config.docs import setting_docs

    return {key: doc.annotation for key, doc in setting_docs().items()}


def parameter_types(function: Callable[..., Any]) -> dict[str, Any]:
    """The types of a command's parameters; names of the settings' module and of the table of exports are understood."""
    names = dict(function.__globals__)
    for module in TYPES_OF_COMMANDS:
        try:
            hints = typing.get_type_hints(function, names)
            break
        except NameError:  # importing one takes up to half of a quick command's time, so only where it is needed
            names |= vars(import_module(module))
    else:
        hints = typing.get_type_hints(function, names)
    return {p.name: hints[p.name] for p in _parameters(function)}


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return [p for p in inspect.signature(function).parameters.values() if p.name != "self"]


def _is_number(word: str) -> bool:
    return re.fullmatch(r"-[0-9.][0-9.eE+-]*", word) is not None


def _is_switch(annotation: Any) -> bool:
    from autoseg.config.types import members

    return bool in members(annotation)


# -- help


def usage(name: str, function: Callable[..., Any]) -> str:
    """One line that shows how a command is called."""
    words = [f"autoseg {name}"]
    for p in _parameters(function):
        required = p.default is p.empty
        if p.kind is p.POSITIONAL_OR_KEYWORD:
            words.append(p.name.upper() if required else f"[{p.name.upper()}]")
        elif required:
            words.append(f"--{p.name} {p.name.upper()}")
    return " ".join([*words, "[flags]"])


def summary(function: Callable[..., Any]) -> str:
    """The first line of a command's docstring."""
    return (inspect.getdoc(function) or "").split("\n")[0]


def describe_parameters(function: Callable[..., Any]) -> dict[str, str]:
    """What the docstring's `Args:` says of each parameter."""
    text = (inspect.getdoc(function) or "").partition("Args:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", text, flags=re.MULTILINE)
    return {name: " ".join(words.split()) for name, words in entries}


def program_help(commands: type, title: str, takes_settings: frozenset[str]) -> str:
    """The help of the program: a line a command."""
    lines = [title, "", "Usage: autoseg COMMAND [flags]", "", "Commands:"]
    width = max(map(len, command_names(commands)))
    entries = ((f"  {name:<{width}} ", summary(getattr(commands, name))) for name in command_names(commands))
    for head, text in entries:
        lines.append(textwrap.fill(text, MOST_WIDTH, initial_indent=head, subsequent_indent=" " * len(head)))
    shared = ", ".join(n for n in command_names(commands) if n in takes_settings)
    lines += ["", "autoseg COMMAND --help tells a command's flags; autoseg --version the version."]
    lines += ["Every command takes --quiet (warnings and errors alone) and --verbose. NO_COLOR=1 turns colours off."]
    return "\n".join([*lines, textwrap.fill(f"{shared} take every setting of input.yaml as a flag too.", MOST_WIDTH)])


def command_help(commands: type, name: str, takes_settings: frozenset[str]) -> str:
    """The help of one command: its flags with types, defaults and meaning, and an example."""
    from autoseg.config.types import describe_type

    function = getattr(commands, name)
    docs, types = describe_parameters(function), parameter_types(function)
    body = (inspect.getdoc(function) or "").partition("Args:\n")[0].partition("\n")[2].strip()
    example = (inspect.getdoc(function) or "").partition("Example:\n")[2].strip()
    lines = [summary(function), "", f"Usage: {usage(name, function)}"]
    if body:
        lines += ["", *(textwrap.fill(" ".join(part.split()), WIDTH) for part in body.split("\n\n"))]
    lines += ["", "Flags:"]
    for p in _parameters(function):
        default = "required" if p.default is p.empty else "" if p.default in (None, False) else f"default {p.default}"
        lines += _entry(p.name, describe_type(types[p.name]), default, docs[p.name])
    lines += _settings_help() if name in takes_settings else []
    return "\n".join([*lines, "", "Example:", textwrap.indent(example, "  ")])


def _entry(name: str, kind: str, default: str, doc: str) -> list[str]:
    head = f"  --{name}  {kind}{'; ' + default if default else ''}"
    return [head, textwrap.fill(doc, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)]


def _settings_help() -> list[str]:
    from autoseg.config.docs import is_inherited, setting_docs
    from autoseg.config.networks import ALGOS, LOCATOR

    lines = ["", "Settings of input.yaml, each of which may be given as a flag and then wins over the file:"]
    for key, doc in setting_docs().items():
        if not is_inherited(doc) and doc.type != "a block of settings":
            default = f"default {doc.default}" if doc.default else ""
            lines += _entry(key, doc.type, default, doc.doc)
    example = f"--{ALGOS[0]}.batch_size 2"
    return [*lines, f"Under {', '.join((*ALGOS, LOCATOR))} each hyperparameter may be set for one network: {example}."]


def parsers(function: Callable[..., Any]) -> dict[str, Callable[[str], Any]]:
    """For each parameter, what turns its text into a value."""
    from autoseg.config.reader import read_value

    def parser(key: str, annotation: Any) -> Callable[[str], Any]:
        return lambda text: read_value(key, text, annotation)

    return {key: parser(key, annotation) for key, annotation in parameter_types(function).items()}
