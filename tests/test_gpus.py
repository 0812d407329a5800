"""What GPUs a machine has, with torch's answers faked: whole ones, parts, and such as nvidia-smi cannot describe."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autoseg.config.settings import Settings
from autoseg.errors import ResourceError
from autoseg.hardware import facts, gpus
from autoseg.hardware.facts import find_hardware
from autoseg.hardware.gpus import Gpu, list_gpus, parse_parts, seen_here
from autoseg.launch.local import find_places

A, B = "GPU-aaaa", "GPU-bbbb"
DIVIDED = f"""GPU 0: NVIDIA A100-SXM4-40GB (UUID: {A})
  MIG 3g.20gb     Device  0: (UUID: MIG-1111)
  MIG 3g.20gb     Device  1: (UUID: MIG-2222)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: {B})
"""
Machine = Callable[..., list[dict[str, str]]]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine whose CUDA shows GPUs by their UUIDs; returns the environments of the processes that were asked."""

    def make(*uuids: str, listed: str | None = None, lost: str = "", **environment: str) -> list[dict[str, str]]:
        asked: list[dict[str, str]] = []

        def run(words: list[str], **how: Any) -> SimpleNamespace:
            if words[0] == "nvidia-smi":
                if listed is None:
                    raise FileNotFoundError(words[0])
                return SimpleNamespace(stdout=listed, returncode=0)
            assert words == [sys.executable, "-m", "autoseg.hardware.gpus"]
            asked.append(how["env"])
            visible = how["env"].get("CUDA_VISIBLE_DEVICES")
            chosen = [*uuids]
            if visible is not None:
                chosen = [w if not w.isdigit() else uuids[int(w)] for w in visible.split(",")]
                chosen = chosen[:1] if "MIG" in visible else chosen
            rows = [[str(i), uuid.replace("MIG", "GPU"), 30.0, 40.0, "A100", [8, 0]] for i, uuid in enumerate(chosen)]
            rows = [row for row in rows if row[0] != lost]
            keys = ("number", "uuid", "free_gib", "total_gib", "name", "capability")
            told = json.dumps([dict(zip(keys, row, strict=True)) for row in rows])
            return SimpleNamespace(stdout=f"a warning\n{told}\n", returncode=0)

        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(gpus, "_may_have_gpu", lambda: True)
        monkeypatch.setattr(gpus, "_ANSWERS", {})
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return asked

    return make


def test_whole_gpus_by_the_bus(machine: Machine) -> None:
    asked = machine(A, B, listed=DIVIDED.replace("MIG", "mig"))
    assert [(gpu.number, gpu.visible) for gpu in list_gpus()] == [("0", A), ("1", B)]
    assert [env["CUDA_DEVICE_ORDER"] for env in asked] == ["PCI_BUS_ID"]


def test_those_the_user_made_visible(machine: Machine) -> None:
    machine(A, B, CUDA_VISIBLE_DEVICES="1")
    assert [(gpu.number, gpu.visible) for gpu in list_gpus()] == [("1", B)]
    assert [place.name for place in find_places(Settings(modality="MRI", datalist="d", dataroot="r"))] == ["cuda:1"]


def test_a_gpu_that_cannot_be_talked_to_shifts_no_other(machine: Machine) -> None:
    machine(A, B, "GPU-cccc", lost="0", CUDA_VISIBLE_DEVICES=f"{A},{B},2")
    assert [(gpu.number, gpu.visible) for gpu in list_gpus()] == [("1", B), ("2", "GPU-cccc")]
    machine(A, B, lost="0")
    assert [(gpu.number, gpu.visible) for gpu in list_gpus()] == [("1", B)]


def test_parts_of_a_divided_gpu_are_places_of_their_own(machine: Machine) -> None:
    asked = machine(A, B, listed=DIVIDED)
    found = list_gpus()
    assert [gpu.visible for gpu in found] == ["MIG-1111", "MIG-2222", B]
    assert [gpu.number for gpu in found] == ["0", "1", "2"]
    assert all(gpu.total_gib == 40.0 for gpu in found), "nvidia-smi says [N/A] here"
    assert [env["CUDA_VISIBLE_DEVICES"] for env in asked] == ["MIG-1111", "MIG-2222", B]


def test_a_named_part(machine: Machine) -> None:
    machine(A, B, listed=DIVIDED, CUDA_VISIBLE_DEVICES="MIG-2222")
    assert [gpu.visible for gpu in list_gpus()] == ["MIG-2222"]


def test_a_part_named_by_a_number_keeps_it(machine: Machine) -> None:
    """Torch tells the UUID of the whole GPU or of the part, in neither case as CUDA_VISIBLE_DEVICES wants a part's."""
    machine(A, B, listed=DIVIDED, CUDA_VISIBLE_DEVICES="1,0")
    assert [(gpu.number, gpu.visible) for gpu in list_gpus()] == [("1", "1"), ("0", "0")]


def test_what_nvidia_smi_lists() -> None:
    assert parse_parts(DIVIDED) == ["MIG-1111", "MIG-2222", B]
    assert parse_parts(DIVIDED.replace("MIG", "mig")) == [], "no part, no need to ask for each"


def test_an_answer_is_asked_for_once_in_a_while(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = machine(A)
    list_gpus(), list_gpus()
    assert len(asked) == 1
    monkeypatch.setattr(gpus, "FRESH_S", -1.0)
    list_gpus()
    assert len(asked) == 2


@pytest.mark.parametrize(("uuid", "visible"), [("a-1", "GPU-a-1"), ("00000000-0000", "0"), (None, "0")])
def test_what_torch_says_of_a_gpu(uuid: str | None, visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Jetson's UUID is zeros, and it has no nvidia-smi that tells its memory; a Grace's neither."""
    properties = SimpleNamespace(name="Orin", major=8, minor=7, uuid=uuid)
    if uuid is None:
        del properties.uuid
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (3 * 2**30, 8 * 2**30))
    (gpu,) = seen_here()
    assert (gpu.visible, gpu.free_gib, gpu.total_gib, gpu.name, gpu.capability) == (visible, 3.0, 8.0, "Orin", (8, 7))


def test_the_planner_asks_another_process(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever gives this process a context on the GPU is not called."""
    machine(A, B)
    facts._gpus.cache_clear()
    for name in ("get_device_properties", "mem_get_info", "device_count", "init", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, lambda *given: pytest.fail("asked here"))
    try:
        hardware = find_hardware(torch.device("cuda", 1))
    finally:
        facts._gpus.cache_clear()
    assert (hardware.num_gpus, hardware.memory_gib, hardware.name) == (2, 40.0, "A100")


def test_a_gpu_that_cannot_be_asked_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "_gpus", list[Gpu])
    with pytest.raises(
        ResourceError, match=r"^device: torch finds a GPU, but another process does not. Check the driver\.$"
    ):
        find_hardware(torch.device("cuda"))
