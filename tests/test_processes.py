"""Several processes train one job: whatever the network, they end with the weights of one; short of memory, too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_trainer import make_trainer

from autoseg.config.networks import ALGOS
from autoseg.training.processes import join_processes

WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import psutil
import torch
import torch.distributed as dist
from test_processes import short_of_memory, train
from autoseg.config.networks import ALGOS
from autoseg.training.processes import join_processes
torch.set_num_threads(1)
threads = psutil.Process().num_threads()
join_processes("cpu")
folder, first = Path(sys.argv[2]), dist.get_rank() == 0
for algo in ALGOS:
    found = train(folder / algo, algo)
    if first:
        torch.save(found, folder / f"{algo}.pt")
    else:  # they agree without a word from the first
        torch.save(found, folder / f"{algo}_second.pt")
trainer = short_of_memory(folder / "memory", lacking=not first)
torch.save([trainer.micro_batch, *trainer.step.network.parameters()], folder / f"memory_{dist.get_rank()}.pt")
dist.destroy_process_group()
assert psutil.Process().num_threads() <= threads, "threads of the group would outlive Python, and might abort it"
"""


def train(folder: Path, algo: str) -> list[torch.Tensor]:
    """The weights after two steps of gradient descent, in one vector, and before.

    Its steps are the gradients times a number. Adam's are not: of a gradient that is nothing but rounding it makes a
    whole step, so that the order of a sum would decide. Patches pass one at a time, as in two processes: a DiNTS that
    ends at two voxels gives them together gradients that differ by a thousandth, in one process, too (measured).
    """
    trainer = make_trainer(folder, algo=algo, optimizer="sgd", learning_rate=0.01)
    trainer.micro_batch = 1
    before = torch.cat([p.detach().flatten() for p in trainer.step.network.parameters()])
    for _ in range(2):
        trainer.train_step(0.3)
    return [torch.cat([p.detach().flatten() for p in trainer.step.network.parameters()]), before]


def short_of_memory(folder: Path, *, lacking: bool):  # type: ignore[no-untyped-def]
    """A trainer after a step in which a process has no memory for two patches at a time."""
    trainer = make_trainer(folder, batch_size=4, optimizer="sgd", learning_rate=0.01)
    forward = trainer.step.network.forward

    def limited(x):  # type: ignore[no-untyped-def]
        if lacking and len(x) > 1:
            raise torch.OutOfMemoryError("no memory")
        return forward(x)

    trainer.step.network.forward = limited
    trainer.train_step(0.3)
    return trainer


@pytest.mark.timeout(600)
def test_two_processes_train_every_network_as_one_does(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    words = [str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for algo in ALGOS:
        one, before = train(tmp_path / f"one_{algo}", algo)
        two, other = (torch.load(tmp_path / f"{algo}{which}.pt", weights_only=True)[0] for which in ("", "_second"))
        assert torch.equal(two, other), algo
        change = (one - before).norm()
        assert change > 0
        # The two gradients are added in float32 in both; what is between is the order, and the scale of the loss.
        assert (two - one).norm() < 1e-4 * change, algo
    alone = short_of_memory(tmp_path / "alone", lacking=False)
    micro_batches, weights = [], []
    for rank in (0, 1):
        micro_batch, *parameters = torch.load(tmp_path / f"memory_{rank}.pt", weights_only=True)
        micro_batches.append(micro_batch)
        weights.append(torch.cat([p.detach().flatten() for p in parameters]))
    assert micro_batches == [1, 1], "the one that has memory takes as little as the one that lacks it"
    assert torch.equal(*weights)
    wanted = torch.cat([p.detach().flatten() for p in alone.step.network.parameters()])
    torch.testing.assert_close(weights[0], wanted, atol=1e-6, rtol=1e-4)


def test_processes_on_gpus_take_one_each_before_they_join(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("autoseg.training.processes.pick_device", lambda device: torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: done.append(backend))
    join_processes("auto")
    assert done == [torch.device("cuda", 1), "cpu:gloo,cuda:nccl"]
