"""The tensors of a checkpoint file, and what else it says, read as plain data: nothing in it is run."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load

from autoseg.errors import ConfigError
from autoseg.workspace.files import open_regular

WRAPPERS = ("state_dict", "net", "network_weights", "model_state_dict", "average", "network", "model")
"""Keys under which the weights of a network stand in a file. Source: Lightning and Auto3DSeg, SuPreM, nnU-Net and
nnssl, PyTorch's tutorials, autoseg's checkpoint (its moving average first, as that predicts), MONAI's handlers."""
PREFIXES = ("module.", "backbone.", "_orig_mod.")
"""What wrappers put before the names of weights: processes that share a training, SuPreM, `torch.compile`."""
SAFETENSORS = ".safetensors"
MOST_NESTED = 5
"""Wrappers around wrappers that are looked into."""
DAMAGED = (
    RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError, OverflowError,
    zipfile.BadZipFile,
)  # fmt: skip
"""What torch and zipfile raise for files that are no sound archives or pickles."""
STATE_DICT_ALONE = "Save its weights alone: torch.save(model.state_dict(), FILE)."

_NUMBERS = (np.float64(0), np.float32(0), np.int64(0), np.int32(0), np.bool_(False))
_MAKE_NUMBER = np.float64(0).__reduce__()[0]
SAFE_GLOBALS: list[Any] = [
    np.dtype,
    *(type(number.dtype) for number in _NUMBERS),
    *((_MAKE_NUMBER, f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")),
]
"""What torch's reader of plain data may make besides: single numbers of NumPy, which nnU-Net's checkpoints log their
losses by. Making one runs no code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a file holds."""

    tensors: dict[str, torch.Tensor]
    """Name -> weights, the names without what wrappers put before them."""
    facts: dict[str, Any]
    """What stands beside the weights: configuration, epoch."""


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file of weights.

    Raises:
        ConfigError: It is missing, damaged, a program (TorchScript), holds other objects than plain data and tensors,
            or no weights; in one sentence.
    """
    try:
        with open_regular(path) as file:
            content = _load_tensors(path, file) if path.suffix == SAFETENSORS else _load(path, file)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. Give a file of weights.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Give a file of weights.") from None
    state, facts = _unwrap(content)
    if unfit := [name for name, value in state.items() if not _is_plain(value)]:
        raise ConfigError(
            f"{path}: {unfit[0]} is sparse, quantized or without numbers, and weights are read as plain tensors alone. "
            "Save them as such: {name: tensor.to_dense()} of sparse ones, dequantize() of quantized ones."
        )
    tensors = {_bare(name): value for name, value in state.items()}
    if len(tensors) < len(state):
        raise ConfigError(f"{path}: two of its weights have one name once {', '.join(PREFIXES)} are left out.")
    if not tensors:
        raise ConfigError(f"{path}: holds no weights, only {_kinds(content)}. {STATE_DICT_ALONE}")
    return Checkpoint(tensors=tensors, facts=facts)


def _load_tensors(path: Path, file: IO[bytes]) -> dict[str, torch.Tensor]:
    """The content of a file that can hold nothing but tensors."""
    try:
        return load(file.read())
    except (SafetensorError, ValueError, RuntimeError):
        raise ConfigError(f"{path}: cut off, damaged, or no safetensors file. Copy it again.") from None


def _load(path: Path, file: IO[bytes]) -> Any:
    """The content of an open file, by torch's reader of plain data."""
    try:
        names: list[str] = []
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                names = archive.namelist()
        # Within the archive's one folder, which torch calls as the file is called.
        if any(re.match(r"[^/]+/(code/|constants\.pkl$)", name) for name in names):
            raise ConfigError(
                f"{path}: a TorchScript program, which is not run and holds no weights that could be fitted to another "
                "network. Give the checkpoint that it was made from."
            )
        file.seek(0)
        with torch.serialization.safe_globals(SAFE_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # of pickles that torch did not write: they are refused or read
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise ConfigError(
                f"{path}: holds an object of {found[1]}, and nothing but plain data and tensors is read. "
                f"{STATE_DICT_ALONE}"
            ) from None
        raise ConfigError(f"{path}: no file of weights, or a damaged one. Copy it again.") from None
    except DAMAGED:
        raise ConfigError(f"{path}: cut off, damaged, or no file of weights. Copy it again.") from None


def _unwrap(content: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The mapping of weights inside of a checkpoint, and all that is none of it."""
    facts: dict[str, Any] = {}
    for _ in range(MOST_NESTED):
        if not isinstance(content, Mapping):
            break
        inner = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            named = {str(name): value for name, value in content.items()}
            state = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
            rest = {name: value for name, value in named.items() if name not in state}
            return state, {**facts, **_without_tensors(rest)}
        facts |= _without_tensors({str(key): value for key, value in content.items() if key != inner})
        content = content[inner]
    return {}, facts


def _without_tensors(values: dict[str, Any]) -> dict[str, Any]:
    """Entries but those of tensors, such as an optimizer's."""
    return {key: value for key, value in values.items() if not _holds_tensor(value)}


def _holds_tensor(value: Any) -> bool:
    """Whether a tensor is in it, however deep; each part is looked at once, since lists may hold themselves."""
    left, seen = [value], set[int]()
    while left:
        part = left.pop()
        if isinstance(part, torch.Tensor):
            return True
        if isinstance(part, Mapping | list | tuple) and id(part) not in seen:
            seen.add(id(part))
            left += part.values() if isinstance(part, Mapping) else part
    return False


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor has all of its numbers, one after the other."""
    return tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_quantized or tensor.is_nested)


def _bare(name: str) -> str:
    while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name


def _kinds(content: Any) -> str:
    """What a content is, for a message."""
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    keys = [str(key) for key in content][:5]
    return f"the keys {', '.join(keys)}" if keys else "an empty mapping"
