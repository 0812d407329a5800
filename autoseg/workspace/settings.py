"""settings.yaml: the settings that a run or a round was done with, each with its origin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import JsonValue

from autoseg.workspace.files import PUBLIC, write_yaml
from autoseg.workspace.stored import Stored, read_stored
from autoseg.workspace.workspace import Workspace


class StoredSetting(Stored):
    """One setting, or a block of them."""

    value: JsonValue
    origin: str = "unknown"
    """default, FILE:LINE, or command line."""


def read_settings(workspace: Workspace) -> dict[str, StoredSetting]:
    """The settings of a run or a round by key; paths are relative to its folder.

    Raises:
        WorkspaceError: There are none, or the file is damaged.
    """
    return read_stored(workspace.settings, dict[str, StoredSetting])


def read_any_settings(workspace: Workspace) -> dict[str, StoredSetting]:
    """The same; empty where there are none, as in a packed model.

    Raises:
        WorkspaceError: The file is damaged.
    """
    return read_settings(workspace) if workspace.settings.exists() else {}


def write_settings(
    workspace: Workspace, values: Mapping[str, Any], origins: Mapping[str, str], *, mode: int = PUBLIC
) -> None:
    """Store settings, plain data by key, each with its origin."""
    write_yaml(
        workspace.settings,
        {key: {"value": value, "origin": origins.get(key, "default")} for key, value in values.items()},
        mode=mode,
    )
