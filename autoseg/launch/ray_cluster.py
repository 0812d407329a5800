"""A Ray cluster: Ray Core tasks with logical resources. Ray places them, and starts them again where a node dies."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autoseg.config.settings import Settings
from autoseg.errors import ResourceError
from autoseg.hardware.packages import install_advice
from autoseg.launch import Ended, Task, run_command

log = logging.getLogger(__name__)

NODE_LOSSES = 10
"""Times Ray starts a task again because its node died; failures of the job itself are counted by `retries`."""


def run(tasks: Sequence[Task], settings: Settings, ended: Ended, output: Path) -> None:
    """Run tasks on a cluster; arguments and errors as `launch` has them.

    Every node must see the work_dir and the data under the same paths, and have autoseg installed.
    """
    ray = _import()
    if not ray.is_initialized():
        _join(settings.address)
    remote = ray.remote(work)

    def submit(task: Task) -> Any:
        many = settings.jobs_per_device
        options = {
            "name": task.name,
            "num_cpus": task.cpus,
            "num_gpus": task.gpus / many if task.gpus == 1 else task.gpus,
            "max_retries": NODE_LOSSES,
            "scheduling_strategy": "SPREAD",
        }
        return remote.options(**options).remote(task, str(output))

    running = {submit(task): task for task in tasks}
    try:
        while running:
            ready, _ = ray.wait(list(running), num_returns=1)
            task = running.pop(ready[0])
            try:
                code = ray.get(ready[0])
            except ray.exceptions.RayError as error:
                log.error("%s: Ray gave it up: %s", task.name, str(error).splitlines()[0])
                code = 1
            if ended(task, code):
                running[submit(task)] = task
    except BaseException:
        for reference in running:
            ray.cancel(reference)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=60)
        raise


def has_gpus(settings: Settings) -> bool:
    """Whether the cluster has a GPU; errors as `cluster_resources`."""
    return cluster_resources(settings).get("GPU", 0) > 0


def num_workers(settings: Settings, gpus: int, cpus: int) -> int:
    """As many as the cluster has room for; errors as `cluster_resources`."""
    free = cluster_resources(settings)
    return max(1, int(free["GPU"] / gpus * settings.jobs_per_device if gpus else free.get("CPU", 1) / cpus))


def cluster_resources(settings: Settings) -> dict[str, float]:
    """What the nodes of the cluster have together: CPU, GPU, memory.

    Raises:
        ResourceError: Ray is not installed, or there is no cluster.
    """
    ray = _import()
    if not ray.is_initialized():
        _join(settings.address)
    resources: dict[str, float] = ray.cluster_resources()
    return resources


def _import() -> Any:
    try:
        import ray
    except ImportError:
        raise ResourceError(f"launcher: ray is not installed. {install_advice('ray')}") from None
    return ray


def _join(address: str) -> None:
    import ray

    try:
        # Nothing of Ray listens beyond this machine where it is started here.
        local = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        where = {"address": address} if address != "local" else local
        ray.init(**where, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ResourceError(
            f"address: no Ray cluster at {address} ({str(error).splitlines()[0]}). Start one with `ray start --head`, "
            "or set address: local."
        ) from None


def work(task: Task, output: str) -> int:
    """On a node of the cluster: run a task's command."""
    import ray

    gpus = ",".join(str(number) for number in ray.get_gpu_ids())
    name = f"cuda:{gpus}" if gpus else "cpu"
    return run_command(task.command(), Path(output) / f"{task.name}.out", task.environment(name))
