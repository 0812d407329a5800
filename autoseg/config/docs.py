"""The documentation of the settings: one entry each, and the manual made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from autoseg.config.hyperparameters import HyperSettings
from autoseg.config.networks import NETWORKS
from autoseg.config.reader import walk_fields
from autoseg.config.settings import Settings
from autoseg.config.types import describe_type


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingDoc:
    """What the help and the manual say of one setting."""

    key: str
    """Dotted inside a block."""
    block: str
    """The block it stands in; empty at the top level."""
    type: str
    """Its values, in words."""
    default: str
    """As it would be written in input.yaml; `planned` where the planner decides; else empty."""
    required: bool
    doc: str
    annotation: Any


def setting_docs() -> dict[str, SettingDoc]:
    """All settings by key: those of the data and the run, the hyperparameters, then each block's."""
    docs = {}
    for block, name, annotation, info in sorted(walk_fields(Settings), key=_rank):
        key = f"{block}.{name}" if block else name
        # pydantic 2.10.0 wants the data, though no default depends on any.
        default = None if info.is_required() else info.get_default(call_default_factory=True, validated_data={})
        unset = "planned" if block in NETWORKS or key in HyperSettings.model_fields else ""
        docs[key] = SettingDoc(
            key=key,
            block=block,
            type=describe_type(annotation, info.metadata),
            default=unset if default is None else _default_text(default),
            required=info.is_required(),
            doc=" ".join((info.description or "").split()),
            annotation=annotation,
        )
    return docs


def _rank(entry: tuple[str, str, Any, Any]) -> int:
    """Place of a setting in help and manual; the order within a place is that of the models."""
    block, name, _, _ = entry
    blocks = (*NETWORKS, "ensemble", "inference", "slurm", "sweep", "track", "pseudolabel", "pretrain")
    return 2 if block or name in blocks else int(name in HyperSettings.model_fields)


def _default_text(value: Any) -> str:
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return (
        "[" + ", ".join(str(v) for v in value) + "]"
        if isinstance(value, tuple)
        else str(value)
        if value != ""
        else '""'
    )


def doc_lines(doc: SettingDoc) -> list[str]:
    """What a setting is, as `autoseg explain` tells it: type and default, then meaning."""
    default = f" Default: {doc.default}." if doc.default else ""
    return [f"{doc.key}: {doc.type}.{default}", f"  {doc.doc}"]


def settings_manual() -> str:
    """The text of docs/settings.md: every setting with type, default and meaning."""
    docs = setting_docs()
    lines = [
        "# Settings",
        "",
        "Made from `autoseg/config/` by `make docs`; do not edit. Every key of `input.yaml`, which may also",
        "be given to `run`, each stage's command, `sweep`, `learning_curve`, `plan` and `retry` as",
        "a flag (`--num_epochs 50`), then wins.",
        "`planned` means: derived from the data and the machine; `autoseg explain KEY` tells how.",
    ]
    blocks = list(dict.fromkeys(doc.block for doc in docs.values() if doc.block))
    for block in ("", "hyperparameters", *blocks):
        title = {"": "Data and run", "hyperparameters": "Hyperparameters"}.get(block, block)
        lines += ["", f"## {title}", ""]
        if f"{block}.batch_size" in docs:
            lines += [f"Any hyperparameter of the top level may stand here for {block} alone, and further:", ""]
        lines += ["| Key | Values | Default | Meaning |", "|---|---|---|---|"]
        lines += [_manual_row(doc) for doc in docs.values() if _chapter(doc) == block]
    return "\n".join(lines) + "\n"


def is_inherited(doc: SettingDoc) -> bool:
    """Whether a setting is a network's own copy of a hyperparameter of the top level.

    `inference.overlap` is none, though it has the name of one: only networks have hyperparameters.
    """
    return doc.block in NETWORKS and doc.key.partition(".")[2] in HyperSettings.model_fields


def _chapter(doc: SettingDoc) -> str | None:
    """The chapter of the manual a setting stands in; None for a network's copy of a hyperparameter."""
    if doc.type == "a block of settings" or is_inherited(doc):
        return None
    if doc.block or doc.key in ("ensemble", "track"):  # a block, or one word for it
        return doc.block or doc.key
    return "hyperparameters" if doc.key in HyperSettings.model_fields else ""


def _manual_row(doc: SettingDoc) -> str:
    default = "required" if doc.required else f"`{doc.default}`" if doc.default else ""
    return f"| `{doc.key}` | {doc.type} | {default} | {doc.doc} |"
