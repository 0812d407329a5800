"""Engines for a network on a CPU: PyTorch as it comes, autoseg's choice of kernels, torch.compile, OpenVINO.

    pip install openvino            # where it is not installed, its row is left out
    python benchmarks/engines.py --shared ../shared

SegResNet with 16 filters and 14 outputs, fixed random weights, one window of 96x96x96 out of the torso CT. Engines
take turns, so that a busy moment meets all alike; the table has the median of the rounds, the seconds until the first
result, and the share of foreground voxels whose label is that of PyTorch in fp32. Where the CPU multiplies bfloat16,
the same in bf16.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.networks.nets.segresnet_ds import SegResNetDS

from autoseg.export.run import import_openvino
from autoseg.hardware.device import cpu_has_bf16, pick_device, to_device

ROI, ROUNDS = 96, 7
Engine = Callable[[torch.Tensor], torch.Tensor]


def window_of(path: Path) -> torch.Tensor:
    """The middle of a CT, its voxels doubled along each axis; (1, 1, X, Y, Z), about 0 with deviation 1."""
    voxels = np.asarray(nib.load(path).dataobj, np.float32)
    middle = tuple(slice(s // 2 - ROI // 4, s // 2 + ROI // 4) for s in voxels.shape)
    window = (voxels[middle].clip(-160, 240) - 40) / 100
    for axis in range(3):
        window = window.repeat(2, axis)
    return torch.from_numpy(window)[None, None].contiguous()


def engines(network: torch.nn.Module, window: torch.Tensor) -> dict[str, tuple[Engine, float]]:
    """Each engine by its name, and the seconds until its first result."""
    device = torch.device("cpu")
    last = torch.channels_last_3d
    made: dict[str, Callable[[], Engine]] = {"PyTorch as it comes": lambda: network}

    def channels_last() -> Engine:
        model = copy.deepcopy(network).to(memory_format=last)
        return lambda x: model(x.to(memory_format=last))

    def chosen(precision: str) -> Callable[[], Engine]:
        def make() -> Engine:
            model = to_device(copy.deepcopy(network), device, precision, trained=False)  # type: ignore[arg-type]

            def go(x: torch.Tensor) -> torch.Tensor:
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    found: torch.Tensor = model(x.to(memory_format=last))
                return found.float()

            return go

        return make

    def compiled() -> Engine:
        model = torch.compile(copy.deepcopy(network).to(memory_format=last))
        return lambda x: model(x.to(memory_format=last))

    def openvino(hint: str) -> Callable[[], Engine]:
        def make() -> Engine:
            ov = import_openvino()
            config = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
            model = ov.Core().compile_model(ov.convert_model(network, example_input=window), "CPU", config)
            return lambda x: torch.from_numpy(model(x.numpy())[0])

        return make

    made |= {"channels-last": channels_last, "autoseg": chosen("fp32"), "torch.compile, channels-last": compiled}
    if importlib.util.find_spec("openvino"):
        made["OpenVINO f32"] = openvino("f32")
    if cpu_has_bf16():
        made["autoseg, bf16"] = chosen("bf16")
        if importlib.util.find_spec("openvino"):
            made["OpenVINO bf16"] = openvino("bf16")
    ready = {}
    for name, make in made.items():
        begin = time.perf_counter()
        engine = make()
        engine(window)
        ready[name] = engine, time.perf_counter() - begin
    return ready


def main() -> None:
    """Measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/torso")
    path = parser.parse_args().shared / "data" / "torso" / "ct.nii.gz"
    pick_device("cpu")  # the allocator is tuned for all alike
    torch.manual_seed(0)
    network = SegResNetDS(init_filters=16, blocks_down=(1, 2, 2, 4), dsdepth=1, out_channels=14, norm="INSTANCE")
    network.eval().requires_grad_(False)
    window = window_of(path)
    times: dict[str, list[float]] = {}
    with torch.inference_mode():
        ready = engines(network, window)
        truth = network(window).argmax(1)
        found = {name: engine(window).argmax(1) for name, (engine, _) in ready.items()}
        for _ in range(ROUNDS):
            for name, (engine, _) in ready.items():
                begin = time.perf_counter()
                engine(window)
                times.setdefault(name, []).append(time.perf_counter() - begin)
    plain = statistics.median(times["PyTorch as it comes"])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, a window of {ROI}^3\n")
    print("| engine | s a window | of PyTorch as it comes | s to the first | equal foreground labels |")
    print("|---|---|---|---|---|")
    for name, (_, first_s) in ready.items():
        either = (truth > 0) | (found[name] > 0)
        equal = float((truth == found[name])[either].double().mean())
        median = statistics.median(times[name])
        print(f"| {name} | {median:.3f} | {median / plain:.2f} | {first_s:.1f} | {equal:.4%} |")


if __name__ == "__main__":
    main()
