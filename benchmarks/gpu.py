"""Everything about a GPU that cannot be known without one: a table for each question, one command.

    python benchmarks/gpu.py --output OUT                             # on the GPU, minutes a part
    python benchmarks/gpu.py --output OUT --part layout precision     # some questions alone
    python benchmarks/gpu.py --output OUT --device cpu --small        # the same on a CPU, to see that all of it works

Made-up CTs of 512x512x300 voxels with 13 structures, so 14 outputs, are analysed and planned for the true card. Parts:

devices     what GPUs there are, as jobs get them
plan        patch, batch, steps, and what was measured for them, of each network
layout      a training step with channels last, contiguous, and compiled by torch
precision   a training step in bf16, fp16 and fp32 (TF32 on a GPU)
memory      the peak that was planned against the peak of a job that trained
prediction  where the time of a prediction goes; what is left for the host where the network takes no time
two_jobs    steps a second of two processes on one card against those of one

A part that fails says why, and the others go on; the command then ends with 1. Each writes OUT/<part>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from host import SPACING_MM, host_work, make_ct

from autoseg.config.networks import ALGOS
from autoseg.hardware.device import finish, pick_device, to_device
from autoseg.hardware.gpus import list_gpus
from autoseg.hardware.memory import give_back
from autoseg.networks import build_network
from autoseg.plan import Plan, read_plan
from autoseg.training.batches import Samples
from autoseg.training.measure import _measured, measured_here
from autoseg.training.step import TrainingStep, bare_step, segmentation_loss
from autoseg.workspace.files import write_json, write_yaml
from autoseg.workspace.workspace import Workspace

NUM_CLASSES = 13
NUM_CASES = 5
STEPS = 5
"""Steps of a compiled network that are timed, the least of which counts."""


def make_label(ct: Path, target: Path) -> None:
    """A slanted block for each structure, in the body, small ones and large ones."""
    shape = nib.load(ct).shape
    labels = np.zeros(shape, np.uint8)
    for value in range(1, NUM_CLASSES + 1):
        size = [max(3, int(edge * (0.04 + 0.012 * value))) for edge in shape]
        first = [
            int(edge * (0.25 + 0.035 * ((value * step) % 10))) for edge, step in zip(shape, (3, 7, 1), strict=True)
        ]
        labels[tuple(slice(f, f + s) for f, s in zip(first, size, strict=True))] = value
    nib.save(nib.Nifti1Image(labels, np.diag([*SPACING_MM, 1.0])), target)


def autoseg(*words: str | Path, log: Path, check: bool = True) -> None:
    """Run a command of autoseg; what it prints is added to a file."""
    with open(log, "a") as file:
        subprocess.run([sys.executable, "-m", "autoseg", *map(str, words)], stdout=file, stderr=file, check=check)


class Bench:
    """The folder that all parts share, and the questions."""

    def __init__(self, output: Path, device: str, *, small: bool, algos: tuple[str, ...], budget: str) -> None:
        self.output, self.small, self.algos, self.budget = output, small, algos, budget
        self.device = pick_device(device)  # which computes as jobs do: kernels searched for, TF32
        self.shape = (48, 48, 30) if small else (512, 512, 300)
        self.log = output / "log.txt"

    def prepare(self) -> Workspace:
        """The data set, analysed and planned for this card; what is there is not made again."""
        data, given = self.output / "data", self.output / "input.yaml"
        data.mkdir(parents=True, exist_ok=True)
        for i in range(NUM_CASES):
            image, label = data / f"ct_{i}.nii.gz", data / f"label_{i}.nii.gz"
            if not label.exists():
                make_label(make_ct(image, self.shape, seed=i), label)
        entries = [{"image": f"ct_{i}.nii.gz", "label": f"label_{i}.nii.gz", "fold": i % 2} for i in range(NUM_CASES)]
        write_json(data / "datalist.json", {"training": entries})
        small: dict[str, Any] = {"num_epochs": 1, "num_steps_per_epoch": 2, "roi_size": [32, 32, 32], "batch_size": 2}
        settings: dict[str, Any] = {
            "modality": "CT",
            "datalist": str((data / "datalist.json").resolve()),
            "dataroot": str(data.resolve()),
            "work_dir": str((self.output / "work").resolve()),
            "class_names": [{"name": f"class_{i}", "index": [i]} for i in range(1, NUM_CLASSES + 1)],
            "algos": list(self.algos),
            "device": "cuda" if self.device.type == "cuda" else "cpu",
        }
        write_yaml(given, {**settings, **(small if self.small else {})})
        work = Workspace(self.output / "work")
        if not all(work.job_dir(algo, 0).plan.exists() for algo in self.algos):  # type: ignore[arg-type]
            autoseg("analyze", "--input", given, log=self.log)
            autoseg("generate", "--input", given, log=self.log)
        return work

    def plan_of(self, algo: str) -> Plan:
        """A network's plan."""
        return read_plan(self.prepare().job_dir(algo, 0))  # type: ignore[arg-type]

    def devices(self) -> list[dict[str, Any]]:
        """What GPUs there are."""
        return [asdict(gpu) for gpu in list_gpus()]

    def plan(self) -> list[dict[str, Any]]:
        """What is planned for the card."""
        keys = ("roi_size", "batch_size", "num_epochs", "num_steps_per_epoch", "learning_rate", "resample_resolution")
        measured = ("step_s", "memory_gib", "channels_last")
        rows = []
        for algo in self.algos:
            plan = self.plan_of(algo)
            values = plan.model_dump(mode="json")
            rows.append({"algo": algo, **{key: values[key] for key in (*keys, *measured)}})
        return rows

    def layout(self) -> list[dict[str, Any]]:
        """A step in each layout, and compiled."""
        rows = []
        for algo in self.algos:
            plan, row = self.plan_of(algo), dict[str, Any](algo=algo)
            for name, channels_last in (("channels last", True), ("contiguous", False)):
                cost = _measured(plan, self.device, 600.0, channels_last)
                row |= {f"{name} s": cost and round(cost.step_s, 4), f"{name} GiB": cost and round(cost.memory_gib, 2)}
            try:
                row["compiled s"] = round(self._compiled_s(plan), 4)
            except Exception as error:  # noqa: BLE001 - a compiler that is missing, or a network that it cannot do
                row["compiled s"] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"
            finally:
                torch.compiler.reset()  # holds what it compiled, and so its weights
                give_back()
            rows.append(row)
        return rows

    def _compiled_s(self, plan: Plan) -> float:
        """Seconds of a step whose network is compiled; on a CPU, where that takes minutes, it is only traced."""
        torch.manual_seed(0)
        on_gpu, network = self.device.type == "cuda", build_network(plan).train()
        if on_gpu:  # a CPU's has kernels of its own, which cannot be traced
            network = to_device(network, self.device, plan.precision, trained=True, channels_last=plan.channels_last)
        compiled: Any = torch.compile(network, backend="inductor" if on_gpu else "eager")
        step = TrainingStep(plan, compiled, self.device, loss=segmentation_loss(plan, self.device))
        image = torch.randn(plan.batch_size, len(plan.channels), *plan.roi_size, device=self.device)
        shape = (plan.batch_size, 1, *plan.roi_size)
        target = torch.randint(0, plan.num_outputs, shape, device=self.device, dtype=torch.uint8)
        samples, seconds = Samples(image=image, target=target), list[float]()
        for _ in range(STEPS):
            begin = time.perf_counter()
            step.gradients(samples, plan.batch_size)
            step.update(plan.learning_rate)
            finish(self.device)
            seconds.append(time.perf_counter() - begin)
        return min(seconds)

    def precision(self) -> list[dict[str, Any]]:
        """A step in each precision."""
        rows = []
        for algo in self.algos:
            plan, row = self.plan_of(algo), dict[str, Any](algo=algo)
            for precision in ("bf16", "fp16", "fp32") if self.device.type == "cuda" else ("bf16", "fp32"):
                cost = measured_here(plan.model_copy(update={"precision": precision}), self.device, 600.0)
                row |= {
                    f"{precision} s": cost and round(cost.step_s, 4),
                    f"{precision} GiB": cost and round(cost.memory_gib, 2),
                }
            rows.append(row)
        return rows

    def memory(self) -> list[dict[str, Any]]:
        """Planned and true peaks of a job."""
        work, rows = self.prepare(), []
        for algo in self.algos:
            words = ["--input", self.output / "input.yaml", "--algo", algo, "--fold", "0"]
            # Where a job fails its row says so, and the others are trained.
            autoseg("train", *words, *([] if self.small else ["--budget", self.budget]), log=self.log, check=False)
            job, plan = work.read_job(algo, 0), self.plan_of(algo)  # type: ignore[arg-type]
            over = job.memory_gib / plan.memory_gib if job.memory_gib and plan.memory_gib else None
            rows.append({
                "algo": algo, "state": job.state, "planned GiB": plan.memory_gib, "peak GiB": job.memory_gib,
                "peak over planned": over and round(over, 3), "seconds a case": job.inference_s,
            })  # fmt: skip
        return rows

    def prediction(self) -> list[dict[str, Any]]:
        """Seconds by phase with the true network, and nanoseconds of the host with an instant one."""
        self.prepare()
        algo = self.algos[0]
        work, target = Workspace(self.output / "work"), self.output / "label.nii.gz"
        if work.read_job(algo, 0).state != "done":  # type: ignore[arg-type]
            self.memory()
        words = ["--work_dir", work.root, "--image", self.output / "data" / "ct_0.nii.gz", "--output", target]
        words += ["--algo", algo, "--device", self.device.type, "--timing"]
        autoseg("predict", *words, log=self.log)
        (case,) = json.loads((self.output / "label.timing.json").read_text())["cases"]
        roi = (32, 32, 32) if self.small else (96, 96, 96)
        return [{"network": algo, **case}, {"network": "instant", **host_work(self.device, self.shape, roi=roi)}]

    def two_jobs(self) -> list[dict[str, Any]]:
        """Steps a second of one process, and of two at once."""
        algo, seconds = self.algos[0], 2.0 if self.small else 30.0
        plan = self.plan_of(algo)
        rows = []
        for number in (1, 2):
            question = json.dumps(
                {"plan": plan.model_dump(mode="json"), "device": str(self.device), "seconds": seconds}
            )
            command = [sys.executable, __file__, "--steps"]
            running = [
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                for _ in range(number)
            ]
            for process in running:
                assert process.stdin is not None
                process.stdin.write(question)
                process.stdin.close()
            answers = []
            for process in running:
                assert process.stdout is not None
                answers.append(process.stdout.read())
                if process.wait() != 0:
                    raise RuntimeError(f"one of {number} processes failed, see above")
            rates = [float(answer.splitlines()[-1]) for answer in answers]
            rows.append({"algo": algo, "processes": number, "steps a second": round(sum(rates), 3)})
        return rows


PARTS = ("devices", "plan", "layout", "precision", "memory", "prediction", "two_jobs")


def count_steps() -> None:
    """Do the steps of a plan from standard input for some seconds; print how many there were a second."""
    question = json.load(sys.stdin)
    plan, device = Plan.model_validate(question["plan"]), torch.device(question["device"])
    pick_device(device.type)
    step = bare_step(plan, device, plan.channels_last)
    step()
    finish(device)
    begin, number = time.perf_counter(), 0
    while number == 0 or time.perf_counter() - begin < question["seconds"]:
        step()
        finish(device)
        number += 1
    print(number / (time.perf_counter() - begin))


def run_parts(bench: Bench, parts: tuple[str, ...]) -> int:
    """Answer questions; returns how many could not be."""
    num_failed = 0
    for part in parts:
        question: Callable[[], list[dict[str, Any]]] = getattr(bench, part)
        print(f"\n## {part}: {question.__doc__}\n", flush=True)
        try:
            rows = question()
        except Exception:  # noqa: BLE001 - the others are answered all the same
            num_failed += 1
            traceback.print_exc(file=sys.stdout)
            print(f"{part} failed; see also {bench.log}", flush=True)
            continue
        write_json(bench.output / f"{part}.json", rows)
        for row in rows:
            print("; ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return num_failed


def main(words: list[str] | None = None) -> int:
    """Answer the questions; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu_results"))
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small images and patches, to see that it works")
    parser.add_argument("--algos", nargs="+", choices=ALGOS, default=["segresnet", "resenc", "swinunetr", "dints"])
    parser.add_argument("--budget", default="3m", help="of each job of the part memory")
    parser.add_argument("--steps", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.steps:
        count_steps()
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch finds no GPU here. Give --device cpu --small to see that the benchmark works.", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    print(f"torch {torch.__version__}, {os.cpu_count()} CPUs, device {options.device}")
    bench = Bench(
        options.output, options.device, small=options.small, algos=tuple(options.algos), budget=options.budget
    )
    return int(run_parts(bench, tuple(options.part)) > 0)


if __name__ == "__main__":
    sys.exit(main())
