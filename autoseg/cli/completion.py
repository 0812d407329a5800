"""Completion of commands, flags and their choices in bash, zsh and fish."""

from __future__ import annotations

import shlex
from typing import Any, Literal, get_args, get_origin

from autoseg.cli.arguments import command_names, describe_parameters, parameter_types, setting_types, summary
from autoseg.config.types import members, strip_annotated

Shell = Literal["bash", "zsh", "fish"]

_BASH = """\
# Completion of autoseg for bash. Put into ~/.bashrc: eval "$(autoseg completion bash)"
_autoseg() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}"
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W {commands} -- "$word"))
    return
  fi
  case "${{COMP_WORDS[1]}} $before" in
{choices}
  esac
  if [[ "$word" == -* ]]; then
    case "${{COMP_WORDS[1]}}" in
{flags}
    esac
  else
    COMPREPLY=($(compgen -f -- "$word"))
  fi
}}
complete -o filenames -F _autoseg autoseg
"""


def completion(commands: type, takes_settings: frozenset[str], shell: Shell) -> str:
    """The script to be evaluated by a shell.

    Args:
        commands, takes_settings: as `arguments.parse` takes them.
        shell: bash, zsh or fish.
    """
    if shell == "fish":
        return _fish(commands, takes_settings)
    flags, choices = [], []
    for name in command_names(commands):
        types = _types(commands, takes_settings, name)
        words = shlex.quote(" ".join(f"--{key}" for key in [*types, "help"]))
        flags.append(f'      {name}) COMPREPLY=($(compgen -W {words} -- "$word"));;')
        for key, options in ((k, _options(t)) for k, t in types.items()):
            if options:
                reply = f'COMPREPLY=($(compgen -W {shlex.quote(" ".join(options))} -- "$word")); return;;'
                choices.append(f'    "{name} --{key}") {reply}')
    script = _BASH.format(
        commands=shlex.quote(" ".join([*command_names(commands), "--help", "--version"])),
        choices="\n".join(choices),
        flags="\n".join(flags),
    )
    if shell == "zsh":
        head = '# Completion of autoseg for zsh. Put into ~/.zshrc: eval "$(autoseg completion zsh)"\n'
        return head + "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n" + script.partition("\n")[2]
    return script


def _types(commands: type, takes_settings: frozenset[str], name: str) -> dict[str, Any]:
    types = dict(parameter_types(getattr(commands, name)))
    return {**types, **setting_types()} if name in takes_settings else types


def _options(annotation: Any) -> list[str]:
    """The words a value may be, where there are few."""
    words: list[str] = []
    for member in members(annotation):
        bare, _ = strip_annotated(member)
        if get_origin(bare) is Literal:
            words += [str(v).lower() if isinstance(v, bool) else str(v) for v in get_args(bare)]
        elif bare is bool:
            words += ["true", "false"]
    return words


def _fish(commands: type, takes_settings: frozenset[str]) -> str:
    lines = ["# Completion of autoseg for fish. Put into ~/.config/fish/config.fish: autoseg completion fish | source"]
    for name in command_names(commands):
        function = getattr(commands, name)
        lines.append(f"complete -c autoseg -n __fish_use_subcommand -a {name} -d {shlex.quote(summary(function))}")
        docs = describe_parameters(function)
        for key, annotation in _types(commands, takes_settings, name).items():
            options = _options(annotation)
            doc = f" -d {shlex.quote(docs[key])}" if key in docs else ""
            values = f" -x -a {shlex.quote(' '.join(options))}" if options else " -r"
            lines.append(f"complete -c autoseg -n '__fish_seen_subcommand_from {name}' -l {key}{values}{doc}")
    return "\n".join(lines) + "\n"
