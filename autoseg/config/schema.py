"""JSON Schema of input.yaml, for editors that complete and check it while it is written."""

from __future__ import annotations

import json
from typing import Any

from autoseg.config.load import AUTO3DSEG_TRACKING, AUTO3DSEG_WITHOUT_EFFECT
from autoseg.config.settings import Settings


def input_schema() -> dict[str, Any]:
    """The schema (draft 2020-12), made from the settings' own types and docstrings."""
    schema = Settings.model_json_schema()
    _tidy(schema)
    for key, hint in AUTO3DSEG_WITHOUT_EFFECT.items():
        schema["properties"][key] = {"deprecated": True, "description": f"Auto3DSeg's, without effect here: {hint}."}
    for key, name in AUTO3DSEG_TRACKING.items():
        schema["properties"][key] = {"description": f"Auto3DSeg's name of {name}, with tool: mlflow."}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "input.yaml of autoseg",
        **{k: v for k, v in schema.items() if k != "title"},
    }


def schema_text() -> str:
    """The schema as it stands in docs/input.schema.json."""
    return json.dumps(input_schema(), indent=1) + "\n"


def _tidy(node: Any) -> None:
    """Leave out pydantic's titles, which only repeat the key, and join the lines of descriptions."""
    if isinstance(node, list):
        for part in node:
            _tidy(part)
    elif isinstance(node, dict):
        if isinstance(node.get("title"), str):
            del node["title"]
        if isinstance(node.get("description"), str):
            node["description"] = " ".join(node["description"].split())
        for part in node.values():
            _tidy(part)
