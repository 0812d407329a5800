"""What planning and training ask of a GPU, on one that is faked; and measured on a true one, where there is one."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from plans import TINY, tiny_plan
from torch import nn

from autoseg.cli.main import run_command
from autoseg.config.settings import Settings
from autoseg.data.labels import LabelMap
from autoseg.data.phantoms import make_phantoms
from autoseg.hardware.memory import MemoryWatch, free_bytes
from autoseg.inference.cost import measure_rest
from autoseg.launch import Task
from autoseg.pipeline import fold_tasks, job_costs, pretraining, training_jobs
from autoseg.pipeline.run import _measured_stage
from autoseg.plan import read_plan
from autoseg.pretraining.tasks import DrawingValidator, image_loss
from autoseg.training import measure, scoring
from autoseg.training.batches import Samples
from autoseg.training.job import run_job
from autoseg.training.job_run import JobRun
from autoseg.training.measure import measure_step
from autoseg.training.processes import Processes
from autoseg.training.progress import Progress, TrainResult
from autoseg.training.task import SEGMENTATION
from autoseg.workspace.files import write_yaml
from autoseg.workspace.jobs import Job, JobDir
from autoseg.workspace.pretraining import Lesson
from autoseg.workspace.stages import Outcome, Stage
from autoseg.workspace.workspace import Workspace

CARD = torch.device("cuda", 0)


class Card:
    """A card of 8 GiB that answers as torch does: questions about its statistics are errors before CUDA is started."""

    def __init__(self) -> None:
        self.is_ready, self.held, self.peak = False, 0.0, 0.0

    def init(self) -> None:
        self.is_ready = True

    def take(self, gib: float) -> None:
        """Memory that is given back at once."""
        assert self.is_ready
        self.peak = max(self.peak, self.held + gib)

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        if not self.is_ready:
            raise RuntimeError("Invalid device argument 0: did you call init?")
        self.peak = self.held


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    """Torch with it."""
    card = Card()
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": lambda: card.is_ready,
        "init": card.init,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: None,
        "reset_peak_memory_stats": card.reset_peak_memory_stats,
        "max_memory_allocated": lambda device=None: card.peak * 2**30,
        "memory_allocated": lambda device=None: card.held * 2**30,
        "memory_reserved": lambda device=None: card.held * 2**30,
        "mem_get_info": lambda device=None: ((8 - card.held) * 2**30, 8 * 2**30),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    return card


def test_memory_may_be_watched_before_anything_else_is_asked_of_a_gpu(card: Card) -> None:
    assert free_bytes(CARD) == 8 * 2**30
    with MemoryWatch(CARD) as memory:
        card.take(3.0)
        memory.forget_warm_up()
        card.take(2.0)
    assert memory.peak_gib == 2.0


def test_the_first_step_of_a_gpu_never_counts(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts CUDA's libraries and searches kernels, with memory of its own, for longer than a short budget has."""
    now = [0.0]
    each = itertools.chain([(15.0, 6.0)], itertools.repeat((0.25, 1.0)))

    def do() -> None:
        seconds, gib = next(each)
        now[0] += seconds
        card.take(gib)

    monkeypatch.setattr(measure, "bare_step", lambda *_: do)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    cost = measure.measured_here(tiny_plan(), CARD, most_s=10.0)
    assert cost is not None
    assert (cost.step_s, cost.memory_gib, cost.channels_last) == (0.25, 1.0, None), "no time for the other layout"
    assert now[0] == 15.25


def test_a_step_is_measured_as_jobs_compute(
    card: Card, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []

    def measured(plan: Any, device: torch.device, most_s: float) -> None:
        seen.extend([device, torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision(), card.is_ready])

    monkeypatch.setattr(measure, "measured_here", measured)
    question = {"plan": tiny_plan().model_dump(mode="json"), "device": "cuda:1", "most_s": 5.0}
    monkeypatch.setattr(sys, "stdin", StringIO(json.dumps(question)))
    before = torch.get_float32_matmul_precision()
    try:
        measure._answer()
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [torch.device("cuda", 1), True, "high", True]
    assert json.loads(capsys.readouterr().out)["cost"] is None


def test_the_peak_of_a_job_has_no_search_for_kernels(card: Card, tmp_path: Path) -> None:
    """So that it can be set against what was planned, which has none either."""

    class Run(JobRun):
        def work(self) -> None:
            raise NotImplementedError

    def peak(*epochs: tuple[float, bool]) -> float | None:
        processes = Processes(rank=0, world=1, device=CARD)
        job = Job(algo="segresnet", fold=0)
        run = Run(job, workspace=Workspace(tmp_path), processes=processes, claim=None, track=None, started=0.0)

        def train() -> TrainResult:
            for step, (gib, ended) in enumerate(epochs, 1):
                card.take(gib)
                run.epoch_ended(Progress(step=step, ended=ended), 0.5)
            return TrainResult(best_score=0.5, best_epoch=1, epochs=1, steps=len(epochs), seconds=1.0)

        with run.memory:
            run.train_or_restart(tiny_plan(), lambda changes, started: SimpleNamespace(run=train))  # type: ignore[arg-type,return-value]
        return job.memory_gib

    assert peak((6.0, False), (2.0, False), (3.0, True)) == 3.0
    assert peak((6.0, True)) == 6.0, "there is no other epoch"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_images_to_be_drawn_lie_as_the_networks_weights(layout: torch.memory_format) -> None:
    """Which were measured on a GPU to be faster that way."""
    seen: list[torch.Tensor] = []

    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv3d(2, 2, 3, padding=1)

        def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            seen.append(image)
            return self.layer(image), image.new_zeros(len(image), 0)

    model: Any = Drawing().to(memory_format=layout)  # type: ignore[call-overload]
    lesson = Lesson(
        method="mae", mask_share=0.75, mask_block=4, temperature=0.05, for_all_folds=True, all_images=False,
        training=(), validation=(), roles={},
    )  # fmt: skip
    samples = Samples(image=torch.randn(1, 2, 8, 8, 8), target=torch.ones(1, 3, 8, 8, 8))
    plan, cpu = tiny_plan(), torch.device("cpu")
    image_loss(model, samples, plan, cpu, lesson)
    case = SimpleNamespace(name="a", image=np.ones((2, 12, 12, 12), np.float32))
    processes = Processes(rank=0, world=1, device=cpu)
    DrawingValidator(lesson, plan, [case], model, Progress(), processes, (8, 8, 8), "a").score(case)  # type: ignore[arg-type]
    assert [image.is_contiguous(memory_format=layout) for image in seen] == [True, True]


def test_what_a_stage_predicted_with_is_given_back(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the next trains in other processes; where no GPU was used nothing is asked of it."""
    emptied: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(ran[-1]))
    ran: list[str] = []

    def predict(run: Any, place: Any) -> Outcome:
        ran.append("predict")
        card.init()
        raise ValueError("damaged")

    def analyze(run: Any, place: Any) -> Outcome:
        ran.append("analyze")
        return Outcome()

    monkeypatch.setattr("autoseg.pipeline.run.measured", lambda *given, **how: nullcontext())
    place: Any = SimpleNamespace(root=Path("work"))
    asked = SimpleNamespace(as_json=False)
    run: Any = SimpleNamespace(workspace=place, budgets={}, complete=True, request=asked, budget_in=lambda place: None)
    stage: dict[str, Any] = {"needs": (), "inputs": None, "how_far": lambda place: "", "where": "each round"}
    stage |= dict.fromkeys(("doc", "example", "reads", "writes"), "")
    _measured_stage(run, place, Stage(name="a", run=analyze, **stage))
    with pytest.raises(ValueError, match="damaged"):
        _measured_stage(run, place, Stage(name="b", run=predict, **stage))
    assert emptied == ["predict"]


def test_a_forecast_waits_for_the_gpu(card: Card, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Which is only told what to do. What its first step and its first window take for kernels does not count."""
    now, queued = [0.0], [0.0]
    steps = itertools.chain([(20.0, 6.0)], itertools.repeat((2.0, 1.0)))
    scores = itertools.chain([9.0], itertools.repeat(3.0))
    closed: list[bool] = []

    def train_step() -> None:
        seconds, gib = next(steps)
        queued[0] += seconds
        card.take(gib)

    def score(case: object) -> None:
        queued[0] += next(scores)

    def synchronize(device: Any = None) -> None:
        now[0], queued[0] = now[0] + queued[0], 0.0

    trainer = SimpleNamespace(
        train_step=train_step,
        validator=SimpleNamespace(score=score),
        batches=SimpleNamespace(close=lambda: closed.append(True)),
        step=SimpleNamespace(network=nn.Identity()),
    )
    monkeypatch.setattr("autoseg.training.trainer.Trainer", lambda *given, **how: trainer)
    monkeypatch.setattr("autoseg.training.cache.load_cases", lambda *given, **how: [object()])
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(job_costs.time, "monotonic", lambda: now[0])
    step_s, predict_s, memory_gib, *_ = job_costs._measure(Workspace(tmp_path), tiny_plan(), [], CARD, SEGMENTATION)
    assert (step_s, predict_s, memory_gib, closed) == (2.0, 3.0, 1.0, [True])


@pytest.mark.parametrize(
    ("device", "budget_s", "seconds"), [("cuda", 600.0, 2.0), ("cpu", 600.0, 9.0), ("cpu", 1000.0, 2.0)]
)
def test_a_final_score_is_timed_with_kernels_at_hand(
    device: str, budget_s: float, seconds: float, card: Card, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else a budget would keep the time of a search for each case; on a CPU where it has the time to look twice."""
    now, each = [0.0], itertools.chain([9.0], itertools.repeat(2.0))

    class Scorer:
        def __init__(self, *given: Any) -> None:
            pass

        def score(self, case: object, most_bytes: int) -> None:
            now[0] += next(each)

    monkeypatch.setattr(scoring, "_Scorer", Scorer)
    monkeypatch.setattr(scoring, "save_weights", lambda *given: None)
    monkeypatch.setattr(scoring, "kept_for_ensemble", lambda paths: "labels")
    monkeypatch.setattr(scoring.time, "monotonic", lambda: now[0])
    paths = JobDir(tmp_path / "segresnet_0")
    write_yaml(paths.plan, {})
    trainer: Any = SimpleNamespace(plan=tiny_plan(budget_s=budget_s), device=torch.device(device), average=None)
    case: Any = None
    assert scoring.time_scoring(trainer, paths, case) == seconds


@pytest.mark.parametrize(("gpus", "device"), [(1, "cuda"), (0, "auto")])
def test_what_is_given_a_gpu_takes_no_cpu(gpus: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would train what was planned for a GPU for days, and nobody would know."""
    settings = Settings(modality="MRI", datalist=Path("d"), dataroot=Path("r"))
    for module in (training_jobs, fold_tasks, pretraining):
        monkeypatch.setattr(module, "job_resources", lambda settings: (gpus, 8))
    tasks = [module._task(Workspace(Path("w")), settings, "segresnet", 0) for module in (training_jobs, pretraining)]
    tasks.append(fold_tasks._task(Workspace(Path("w")), settings, fold_tasks.Part(fold=0), predicts=True))
    assert [task.words[task.words.index("--device") + 1] for task in tasks] == [device] * 3


def test_a_worker_that_cannot_begin_is_given_up(tmp_path: Path) -> None:
    """Such as one that finds no GPU: it was not stopped, and would say the same for ever."""
    workspace, task = Workspace(tmp_path), Task(name="segresnet_0", words=())
    workspace.write_job(Job(algo="segresnet", fold=0))
    output = tmp_path / "state" / "launch"
    output.mkdir(parents=True)
    (output / "segresnet_0.out").write_text("error: device: cuda was asked for\n")
    attempts = training_jobs.Attempts(workspace, retries=1)
    assert attempts.ended(task, 130), "it was stopped, and goes on"
    assert workspace.read_job("segresnet", 0).state == "pending"
    assert attempts.ended(task, 2)
    workspace.write_job(Job(algo="segresnet", fold=0))
    assert not attempts.ended(task, 2)
    job = workspace.read_job("segresnet", 0)
    assert (job.state, "device: cuda was asked for" in job.error) == ("failed", True)


def test_the_way_back_is_measured_on_the_device(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shown on `meta`, from which nothing but the labels can be brought back. The first time, which loads kernels,
    does not count."""
    meta, taken = torch.device("meta"), list[torch.device]()

    def brought_back(tensor: torch.Tensor) -> torch.Tensor:
        taken.append(tensor.device)
        return torch.zeros(tensor.shape, dtype=tensor.dtype)

    monkeypatch.setattr(torch.Tensor, "cpu", brought_back)
    now = iter((0.0, 50.0, 60.0, 68.0))
    monkeypatch.setattr("autoseg.inference.cost.time.perf_counter", lambda: next(now))
    label_map = LabelMap(names=("a", "b"), values=((1,), (2,)))
    assert measure_rest(label_map, meta) == 8.0 / (32 * 128 * 128)
    assert {device.type for device in taken} == {"meta"}


def test_the_benchmark_computes_as_jobs_do(card: Card, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import gpu

    before = torch.get_float32_matmul_precision()
    seen: list[bool] = []
    try:
        bench = gpu.Bench(tmp_path, "cuda", small=True, algos=("segresnet",), budget="1m")
        assert bench.device == CARD
        assert torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = False
        monkeypatch.setattr(gpu, "bare_step", lambda *_: lambda: seen.append(torch.backends.cudnn.benchmark))
        question = {"plan": tiny_plan().model_dump(mode="json"), "device": "cuda:0", "seconds": 0.0}
        monkeypatch.setattr(sys, "stdin", StringIO(json.dumps(question)))
        gpu.count_steps()
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [True, True]


def test_the_benchmark_compiles_a_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of more than one channel; on a CPU it is traced alone."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import gpu

    bench = gpu.Bench(tmp_path, "cpu", small=True, algos=("segresnet",), budget="1m")
    plan = tiny_plan()
    plan = plan.model_copy(update={"channels": plan.channels * 2, "batch_size": 1})
    assert 0 < bench._compiled_s(plan) < 60


@pytest.mark.gpu
def test_a_true_step_is_measured() -> None:
    cost = measure_step(tiny_plan(precision="auto"), CARD, most_s=0.0)
    assert cost is not None
    assert cost.step_s > 0
    assert 0 < cost.memory_gib < 1.0
    assert cost.start_s > 0.1
    both = measure_step(tiny_plan(precision="auto"), CARD)
    assert both is not None
    assert both.channels_last is not None


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [None, "2m"])
def test_a_true_run(budget: str | None, tmp_path: Path) -> None:
    """Its steps are measured, its jobs trained and its folds scored in processes that use the GPU first for that."""
    path = make_phantoms(tmp_path, num_cases=6, num_testing=1, shape=(28, 26, 24), num_fold=2)
    path.write_text(path.read_text() + TINY.replace("fp32", "auto") + "device: cuda\n")
    assert run_command(["run", "--input", str(path), *([] if budget is None else ["--budget", budget])]) == 0
    workspace = Workspace(tmp_path / "work_dir")
    plan, job = read_plan(workspace.job_dir("segresnet", 0)), workspace.read_job("segresnet", 0)
    assert plan.step_s is not None
    assert plan.memory_gib is not None
    assert plan.channels_last is not None
    assert job.state == "done"
    assert job.memory_gib is not None
    assert workspace.ensemble_spec.exists()


@pytest.mark.gpu
def test_a_true_job_of_this_process(tmp_path: Path) -> None:
    path = make_phantoms(tmp_path, num_cases=4, num_testing=0, shape=(28, 26, 24), num_fold=2)
    path.write_text(path.read_text() + TINY.replace("fp32", "auto") + "device: cuda\n")
    for stage in ("analyze", "generate"):
        assert run_command([stage, "--input", str(path)]) == 0
    job = run_job(Workspace(tmp_path / "work_dir"), tmp_path, "segresnet", 0, device="cuda", num_workers=1)
    assert (job.state, job.error) == ("done", "")
