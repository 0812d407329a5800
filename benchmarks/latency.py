"""The latency table: one prediction from file to file by PyTorch, onnxruntime, OpenVINO and TensorRT, side by side.

    python benchmarks/latency.py                  14 and 105 outputs, a CT of 287x287x397 voxels of 1.5 mm, as the
                                                  page of MONAI's whole-body bundle has; an hour on two cores
    python benchmarks/latency.py --small          96x80x64 voxels, windows of 64; minutes

The CT is synthetic (smooth noise, fixed seed), its voxels 0.8 of the plan's, so that both ways of resampling take part.
SegResNet with 16 filters and random weights, fp32, half overlap. PyTorch is `autoseg predict`; the others run what
`autoseg export` writes by `python -m autoseg.export.run`, whose windows, resampling and labels are numpy. Each is a
process of its own, from its start; contenders take turns, and one more run of each is for the memory (PSS). Where a GPU
and tensorrt are, engines are built by way of ONNX in fp32 and fp16 (the building is not counted), and PyTorch is on the
GPU; where not, a sentence says so. The table has medians of the rounds (the total has
the start of the process, too, `post` the way back onto the image's grid) and the share of foreground voxels whose label
is PyTorch's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from inference import make_job
from measure import Contender
from scipy import ndimage

from autoseg.errors import AutosegError
from autoseg.export import run as runner
from autoseg.export.targets import export
from autoseg.export.tensorrt import build_engine
from autoseg.hardware.system import num_cores_allowed

PHASES = ("load_models", "load", "pre", "infer", "post", "write")
SHAPE, SMALL = (287, 287, 397), (96, 80, 64)
SPACING_MM, ROI, SMALL_ROI = 1.5, 96, 64
FINER = 0.8
"""Edge of the CT's voxels over the plan's."""


def make_ct(path: Path, shape: tuple[int, int, int]) -> None:
    """Smooth noise about 40 HU in air, on a grid so fine that it has `shape` voxels at the plan's size."""
    size = [round(s / FINER) for s in shape]
    coarse = np.random.default_rng(0).normal(0, 400, [max(2, s // 8) for s in size])
    zoom = [s / c for s, c in zip(size, coarse.shape, strict=True)]
    voxels = ndimage.zoom(coarse, zoom, order=1).clip(-1000, 1500).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, np.diag([*[SPACING_MM * FINER] * 3, 1.0])), path)


# -- TensorRT


def why_no_tensorrt() -> str:
    """Why there is no column of TensorRT; empty: there is."""
    if not torch.cuda.is_available():
        return "TensorRT: not measured, since torch finds no GPU here."
    if missing := [name for name in ("tensorrt", "onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        return f"TensorRT: not measured, since {', '.join(missing)} is not installed (`pip install tensorrt`)."
    return ""


def load_engine(path: Path, threads: int = 0) -> tuple[runner.Network, runner.Description]:
    """An engine and its description, as the runner wants them; torch holds the memory on the GPU."""
    import tensorrt

    engine = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR)).deserialize_cuda_engine(path.read_bytes())
    context, stream = engine.create_execution_context(), torch.cuda.Stream()

    def network(inputs: dict[str, np.ndarray]) -> np.ndarray:
        held = {name: torch.from_numpy(np.ascontiguousarray(array)).cuda() for name, array in inputs.items()}
        torch.cuda.synchronize()
        for name, tensor in held.items():
            context.set_input_shape(name, tuple(tensor.shape))
            context.set_tensor_address(name, tensor.data_ptr())
        logits = torch.empty(tuple(context.get_tensor_shape("logits")), device="cuda")
        context.set_tensor_address("logits", logits.data_ptr())
        context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()
        return logits.cpu().numpy()

    return network, json.loads(path.with_suffix(".json").read_text())


def run_engine(path: Path, image: Path, output: Path) -> None:
    """The runner with an engine; what a process of this script does for TensorRT."""
    runner.load_model = load_engine
    print(json.dumps(runner.run([path], [image], output)))


# -- contenders


def contenders(folder: Path, work: Path, image: Path, threads: int) -> dict[str, Contender]:
    """Each by its name; its labels go to `<name>.nii.gz`, its seconds by phase to `<name>.json`."""
    env = {"OMP_NUM_THREADS": str(threads)}
    made = {}

    def add(name: str, words: list[str], more: str = "") -> None:
        command = f"exec {shlex.join([sys.executable, *words])}{more}"
        made[name] = Contender(name=name, command=["bash", "-c", command], env=env)

    where = ["--work_dir", str(work), "--algo", "segresnet", "--fold", "0", "--image", str(image)]
    add("torch", ["-m", "autoseg", "predict", *where, "--output", str(folder / "torch.nii.gz"), "--timing"])
    models = {}
    for name, target in (("onnxruntime", "onnx"), ("OpenVINO", "openvino")):
        if importlib.util.find_spec(name.lower()) is None:
            print(f"{name}: not measured, since it is not installed.")
            continue
        (models[name],) = export(work, target, output=folder / target, algo="segresnet")
        words = ["-m", "autoseg.export.run", "--model", str(models[name]), "--image", str(image), "--timing"]
        words += ["--threads", str(threads), "--output", str(folder / f"{name}.nii.gz")]
        add(name, words, f" > {shlex.quote(str(folder / f'{name}.json'))}")
    if why_no_tensorrt():
        return made
    if "onnxruntime" not in models:
        (models["onnxruntime"],) = export(work, "onnx", output=folder / "onnx", algo="segresnet")
    onnx = models["onnxruntime"]
    about: dict[str, Any] = runner.load_model(onnx)[1]
    for precision in ("fp32", "fp16"):
        plan = folder / f"{precision}.plan"
        edges = (len(about["channels"]), *about["window"])
        try:
            plan.write_bytes(build_engine(onnx.read_bytes(), edges, precision, fp16=precision == "fp16"))
        except AutosegError as error:
            print(f"TensorRT {precision}: not measured. {error}")
            continue
        plan.with_suffix(".json").write_text(json.dumps(about))
        name = f"TensorRT {precision}"
        words = [__file__, "--engine", str(plan), str(image), str(folder / f"{name}.nii.gz")]
        add(name, words, f" > {shlex.quote(str(folder / f'{name}.json'))}")
    return made


def phases_of(folder: Path, name: str) -> dict[str, float]:
    """Seconds by phase of the run that just ended."""
    if name != "torch":
        return {key: float(value) for key, value in json.loads((folder / f"{name}.json").read_text()).items()}
    told = json.loads((folder / "torch.timing.json").read_text())
    seconds = {"load_models": told["load_models"], **told["cases"][0]}
    seconds["post"] += seconds["invert"]  # the runner counts them together
    return {key: float(seconds[key]) for key in PHASES}


def measure(num_outputs: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each contender."""
    shape, roi = (SMALL, SMALL_ROI) if arguments.small else (SHAPE, ROI)
    with tempfile.TemporaryDirectory(prefix="latency-") as name:
        folder = Path(name)
        image = folder / "ct.nii.gz"
        make_ct(image, shape)
        work = make_job(folder / "work", num_outputs - 1, SPACING_MM, roi=(roi, roi, roi), precision="fp32")
        seconds: dict[str, list[dict[str, float]]] = {}
        made = contenders(folder, work, image, arguments.threads)
        for _ in range(arguments.rounds):
            for who, contender in made.items():
                contender.run()
                seconds.setdefault(who, []).append(phases_of(folder, who))
        for contender in made.values():
            contender.run(memory=True)
        labels = {who: np.asarray(nib.load(folder / f"{who}.nii.gz").dataobj) for who in made}
        rows = []
        for who, contender in made.items():
            foreground = (labels["torch"] > 0) | (labels[who] > 0)
            row = {key: statistics.median(s[key] for s in seconds[who]) for key in PHASES}
            rows.append(
                {
                    "outputs": num_outputs,
                    "engine": who,
                    **row,
                    "total": contender.median_s,
                    "ratio": contender.median_s / made["torch"].median_s,
                    "infer_ratio": row["infer"] / statistics.median(s["infer"] for s in seconds["torch"]),
                    "mib": contender.mib,
                    "equal": float((labels["torch"] == labels[who])[foreground].mean()),
                }
            )
        return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown; seconds."""
    lines = [
        "| outputs | engine | load models | load | pre | infer | post | write | total | of torch | infer of torch |"
    ]
    lines[0] += " peak MiB | equal foreground |"
    lines.append("|---" * 13 + "|")
    for row in rows:
        numbers = " | ".join(f"{row[key]:.2f}" for key in (*PHASES, "total", "ratio", "infer_ratio"))
        equal = f"{100 * row['equal']:.2f} %"
        lines.append(f"| {row['outputs']} | {row['engine']} | {numbers} | {row['mib']:.0f} | {equal} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--small", action="store_true", help="a small CT and small windows")
    parser.add_argument("--outputs", nargs="+", type=int, default=[14, 105])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=num_cores_allowed())
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    parser.add_argument("--engine", nargs=3, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        run_engine(*arguments.engine)
        return
    rows = [row for outputs in arguments.outputs for row in measure(outputs, arguments)]
    if why := why_no_tensorrt():
        print(why)
    print(f"Threads: {arguments.threads}, load {os.getloadavg()[0]:.1f}, PyTorch {torch.__version__}")
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
