"""Durations and amounts of memory as people write them."""

from __future__ import annotations

import re

from autoseg.errors import ConfigError

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(text: str) -> float:
    """Turn a duration such as 90s, 10m, 1.5h, 1h30m or 1d into seconds, > 0.

    Raises:
        ConfigError: It is none; the message does not name the setting.
    """
    parts = re.findall(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([smhd])", text)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if not re.fullmatch(r"(\s*[0-9]{1,9}(\.[0-9]{1,9})?\s*[smhd])+\s*", text) or seconds <= 0:
        raise ConfigError(
            f"expected a time with its unit, such as 90s, 10m, 2h, 1h30m or 1d, found {text or 'nothing'}."
        )
    return seconds


def format_duration(seconds: float) -> str:
    """A time as people say it: 45s, 12m05s, 3h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


_SIZES = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str) -> int:
    """Turn an amount of memory such as 500MB, 4GB or 3.5GiB into bytes, > 0.

    Raises:
        ConfigError: It is none; the message does not name the setting.
    """
    match = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([KMGT]i?B)\s*", text, re.IGNORECASE)
    size = float(match[1]) * _SIZES[match[2].upper()] if match else 0.0
    if size < 1:
        raise ConfigError(
            f"expected an amount of memory with its unit, such as 500MB, 4GB or 3.5GiB, found {text or 'nothing'}."
        )
    return int(size)
