"""Passwords in addresses of databases: kept in the environment of the processes, never in a file of a run."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from urllib.parse import quote, unquote

from autoseg.errors import ConfigError

VARIABLE = "AUTOSEG_STORAGE_PASSWORD"
"""Environment variable that stands in files of a run for a password that was written out in an address."""
TRACK_VARIABLE = "AUTOSEG_TRACKING_PASSWORD"
"""The same for that of `track.uri`: a run may have both."""
_PASSWORDS = re.compile(
    r"(?P<before>\b\w[\w+.-]*://[^:/@\s]*:)(?P<password>(?!\$)[^@\s]+)(?=@)"
    r"|(?P<key>[?&](?:password|passwd|pwd|sslpassword)=)(?P<value>(?!\$)[^&\s\"']+)",
    re.IGNORECASE,
)
"""What follows the user's name up to the @, as SQLAlchemy reads addresses, and keys that drivers take."""
_NAME = re.compile(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))")


def without_passwords(text: str) -> str:
    """A text in which each password of an address is replaced by the variable that holds it."""

    def masked(match: re.Match[str]) -> str:
        is_tracking = unquote(match["password"] or match["value"]) == os.environ.get(TRACK_VARIABLE)
        return f"{match['before'] or match['key']}${TRACK_VARIABLE if is_tracking else VARIABLE}"

    return _PASSWORDS.sub(masked, text)


def take_password(url: str, variable: str = VARIABLE) -> str:
    """Move a password that is written out in an address into this process' environment, where its children find it.

    Returns:
        The address with `$AUTOSEG_STORAGE_PASSWORD`, or another variable, in its place; unchanged where there is none.
    """
    if match := _PASSWORDS.search(url):
        os.environ[variable] = unquote(match["password"] or match["value"])
    return without_passwords(url)


def with_environment(url: str, environment: Mapping[str, str] = os.environ, *, setting: str = "sweep.storage") -> str:
    """An address with the values of the environment variables that it names, as `$NAME` or `${NAME}`.

    Args:
        url: the address; where it is one variable alone, that holds the whole address.
        environment: the variables.
        setting: that the address is of, for the message.

    Raises:
        ConfigError: A variable is not set.
    """
    names = [braced or bare for braced, bare in _NAME.findall(url)]
    if missing := [name for name in names if not environment.get(name)]:
        taken = {VARIABLE, TRACK_VARIABLE}.intersection(missing)
        what = "sweep" if setting == "sweep.storage" else "run"
        why = f" The command that began the {what} had the password in its address." if taken else ""
        raise ConfigError(
            f"{setting}: the environment variable {missing[0]} is not set, which {without_passwords(url)} names."
            f"{why} Set it on each machine that works on the {what}."
        )
    if whole := _NAME.fullmatch(url):
        return environment[whole[1] or whole[2]]
    return _NAME.sub(lambda match: quote(environment[match[1] or match[2]], safe=""), url)
