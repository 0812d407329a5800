"""Files of weights: what is in them is read as plain data, and what is none of that is refused in a sentence."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from autoseg.errors import ConfigError
from autoseg.weights.checkpoint import read_checkpoint

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2, dtype=torch.float16)}


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in WEIGHTS.items()}


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        (WEIGHTS, {}),
        ({"state_dict": WEIGHTS, "epoch": 3, "config": {"class_names": ["liver"]}}, {"epoch", "config"}),
        ({"net": prefixed("module."), "optimizer": {"state": {0: {"step": torch.ones(1)}}}, "epoch": 1}, {"epoch"}),
        ({"network_weights": prefixed("_orig_mod."), "logging": {"loss": [np.float64(0.5)]}}, {"logging"}),
        ({"network_weights": prefixed("module._orig_mod."), "best": np.float32(0.5)}, {"best"}),
        ({"model": prefixed("module.backbone."), "scaler": {}}, {"scaler"}),
        ({"model_state_dict": WEIGHTS}, set()),
        (
            {"identity": "d", "network": prefixed("z."), "average": WEIGHTS, "progress": {"step": 2}},
            {"identity", "progress"},
        ),
        ({"state_dict": {"model": {"net": prefixed("module.")}, "version": 2}}, {"version"}),
    ],
)
@pytest.mark.parametrize("is_zip", [True, False])
def test_every_wrapper_is_taken_off(tmp_path: Path, content: dict[str, Any], facts: set[str], is_zip: bool) -> None:
    read = read_checkpoint(saved(tmp_path / "w.pt", content, _use_new_zipfile_serialization=is_zip))
    assert read.tensors.keys() == WEIGHTS.keys()
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in WEIGHTS.items())
    assert read.tensors["a.bias"].dtype == torch.float16
    assert set(read.facts) == set(facts)


class Code:
    """Unpickling one of these writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "run")


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as error:
        read_checkpoint(path)
    [message] = error.value.messages
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("around", [lambda code: code, lambda code: {"state_dict": {**WEIGHTS, "z": code}}])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, is_zip: bool, around: Any) -> None:
    mark = tmp_path / "mark"
    path = saved(tmp_path / "w.pt", around(Code(mark)), _use_new_zipfile_serialization=is_zip)
    assert refusal(path).endswith("Save its weights alone: torch.save(model.state_dict(), FILE).")
    assert "and nothing but plain data and tensors is read" in refusal(path)
    assert not mark.exists()


def test_a_bare_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(Code(mark)))
    refusal(tmp_path / "w.pkl")
    assert not mark.exists()


def test_a_whole_module_is_refused_by_its_name(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pt", torch.nn.Linear(2, 2))
    assert refusal(path).startswith("holds an object of torch.nn.modules.linear.Linear, and nothing but plain data")


def test_torchscript_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    assert refusal(path).startswith("a TorchScript program, which is not run and holds no weights")


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, is_zip: bool, share: float) -> None:
    path = saved(tmp_path / "w.pt", WEIGHTS, _use_new_zipfile_serialization=is_zip)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert refusal(path).endswith("Copy it again.")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "holds no weights, only an empty mapping."),
        ({"state_dict": {}, "epoch": 1}, "holds no weights, only the keys state_dict, epoch."),
        ({"epoch": 1, "loss": 0.5}, "holds no weights, only the keys epoch, loss."),
        ([1, 2], "holds no weights, only a list."),
        (torch.ones(3), "holds no weights, only a Tensor."),
    ],
)
def test_a_file_without_weights_is_refused(tmp_path: Path, content: Any, words: str) -> None:
    assert refusal(saved(tmp_path / "w.pt", content)).startswith(words)


def test_no_file_a_text_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.pt") == "no such file. Give a file of weights."
    (tmp_path / "text.pt").write_text("weights: none")
    assert refusal(tmp_path / "text.pt").endswith("Copy it again.")
    assert refusal(tmp_path) == "cannot be read (Is a directory). Give a file of weights."
    shutil.make_archive(str(tmp_path / "zip"), "zip", tmp_path, "text.pt")
    assert refusal(tmp_path / "zip.zip").endswith("Copy it again.")


def test_safetensors_are_read_and_a_cut_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(prefixed("module."), path)
    assert read_checkpoint(path).tensors.keys() == WEIGHTS.keys()
    path.write_bytes(path.read_bytes()[:-3])
    assert refusal(path) == "cut off, damaged, or no safetensors file. Copy it again."


def test_a_zip_whose_table_of_contents_is_damaged_is_refused(tmp_path: Path) -> None:
    """Its end says that there is a table, and where; what stands there is none."""
    path = saved(tmp_path / "w.pt", WEIGHTS)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"PK\x01\x02", b"PK\x00\x00"))
    assert refusal(path) == "cut off, damaged, or no file of weights. Copy it again."
    # The version that is needed to unpack it, at its place in the first entry of the table.
    place = data.index(b"PK\x01\x02") + 6
    path.write_bytes(data[:place] + b"\xff" + data[place + 1 :])
    assert refusal(path) == "cut off, damaged, or no file of weights. Copy it again."


def test_weights_beside_a_list_that_holds_itself_are_read(tmp_path: Path) -> None:
    endless: list[Any] = [1]
    endless.append(endless)
    many: list[Any] = [0]
    for _ in range(100):
        many = [many] * 10  # as a tree it has 10^100 parts
    read = read_checkpoint(saved(tmp_path / "w.pt", {"state_dict": WEIGHTS, "loss": endless, "many": many}))
    assert read.tensors.keys() == WEIGHTS.keys()
    assert read.facts.keys() == {"loss", "many"}


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.empty(3, device="meta"),
        lambda: torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8),
    ],
)
def test_tensors_that_are_not_plain_are_refused(tmp_path: Path, make: Callable[[], torch.Tensor]) -> None:
    assert refusal(saved(tmp_path / "w.pt", {**WEIGHTS, "z": make()})).startswith(
        "z is sparse, quantized or without numbers, and weights are read as plain tensors alone."
    )


def test_a_sound_file_whatever_its_name_is_read(tmp_path: Path) -> None:
    """torch calls the archive's folder as the file, and that of a TorchScript program has a folder `code`."""
    path = saved(tmp_path / "code.pt", WEIGHTS)
    assert read_checkpoint(path).tensors.keys() == WEIGHTS.keys()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    assert refusal(path).startswith("a TorchScript program")
