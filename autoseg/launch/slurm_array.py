"""Slurm: each task one of a job array, by submitit. A preempted or timed-out task saves, is queued and goes on."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autoseg.config.settings import Settings
from autoseg.config.units import parse_duration
from autoseg.errors import ResourceError
from autoseg.hardware.packages import install_advice
from autoseg.launch import Ended, Task, start, stop

log = logging.getLogger(__name__)

POLL_S = 1.0
WARNING_S = 120
"""Seconds before its time limit in which a task may save."""


class Work:
    """On a node of Slurm: run a task's command; submitit calls `checkpoint` on preemption and on the time limit."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, task: Task, output: str) -> int:
        """Run the command to its end."""
        name = f"cuda:{os.environ.get('CUDA_VISIBLE_DEVICES', '0')}" if task.gpus else "cpu"
        self._process = start(task.command(), Path(output) / f"{task.name}.out", task.environment(name))
        return self._process.wait()

    def checkpoint(self, task: Task, output: str) -> Any:
        """Let the command save, and ask Slurm for it anew."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            stop([self._process])
        return DelayedSubmission(Work(), task, output)


def run(tasks: Sequence[Task], settings: Settings, ended: Ended, output: Path) -> None:
    """Submit tasks as a job array and wait; arguments and errors as `launch` has them.

    submitit's folder lies beside the work_dir, which holds no pickle.
    """
    try:
        import submitit
    except ImportError:
        raise ResourceError(f"launcher: submitit is not installed. {install_advice('slurm')}") from None
    slurm = settings.slurm
    if slurm.cluster == "slurm" and shutil.which("sbatch") is None:
        raise ResourceError(
            "launcher: slurm was set, but there is no sbatch here. Run this on a login node, or set launcher: local."
        )
    folder = settings.work_dir.with_name(f"{settings.work_dir.name}_slurm")
    executor = submitit.AutoExecutor(folder=folder, cluster=slurm.cluster)
    minutes = max(1, round(parse_duration(slurm.time) / 60))
    executor.update_parameters(
        name="autoseg", timeout_min=minutes, cpus_per_task=max(t.cpus for t in tasks), tasks_per_node=1
    )
    if gpus := max(t.gpus for t in tasks):
        executor.update_parameters(gpus_per_node=gpus)
    if slurm.memory_gib:
        executor.update_parameters(mem_gb=slurm.memory_gib)
    if slurm.cluster == "slurm":
        queue = {"partition": slurm.partition, "account": slurm.account, "qos": slurm.qos}
        executor.update_parameters(
            slurm_array_parallelism=slurm.num_parallel,
            slurm_signal_delay_s=WARNING_S,
            **{f"slurm_{key}": value for key, value in queue.items() if value},
        )
    waiting, running = list(tasks), dict[Any, Task]()
    try:
        while waiting or running:
            if waiting:
                jobs = executor.map_array(Work(), waiting, [str(output)] * len(waiting))
                log.info(
                    "slurm: submitted %s",
                    ", ".join(f"{t.name} as {j.job_id}" for t, j in zip(waiting, jobs, strict=True)),
                )
                running |= dict(zip(jobs, waiting, strict=True))
                waiting = []
            time.sleep(POLL_S)
            for job in [j for j in running if j.done()]:
                task = running.pop(job)
                error = job.exception()
                if error is not None:
                    log.error("%s: %s", task.name, str(error).strip().splitlines()[-1])
                if ended(task, 1 if error is not None else job.result()):
                    waiting.append(task)
    except BaseException:
        for job in running:
            job.cancel(check=False)
        raise


def has_gpus(settings: Settings) -> bool:
    """Slurm's nodes are taken to have some; on this machine (`slurm.cluster: local`) none is asked for."""
    return settings.slurm.cluster == "slurm"


def num_workers(settings: Settings, gpus: int, cpus: int) -> int:
    """One: how many nodes are free is known to Slurm alone."""
    return 1
