"""The differentiable search for DiNTS' topology (He et al., CVPR 2021), in MONAI's search space.

Every path between the scales and every operation on it exists at once, weighted; weights and architecture are trained
in turns on two halves of the cases, and the best topology is read off at the end. It starts from the plan's topology.
Constants are those of MONAI's DiNTS search (in Auto3DSeg's template) but where a line says otherwise: its thousand
epochs become a share of a budget.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from monai.networks.nets.dints import DiNTS, TopologySearch
from torch import nn

from autoseg.config.templates import fill_template
from autoseg.config.units import format_duration
from autoseg.errors import ResourceError
from autoseg.export.bundle import write_configs
from autoseg.hardware.device import Precision, resolve_precision, to_device
from autoseg.networks import divisor
from autoseg.networks.dints import LEARNING_RATES, path_depths, reached_nodes
from autoseg.networks.sizing import shorter_roi
from autoseg.plan import Plan
from autoseg.terminal import Progress as Bar
from autoseg.training.batches import LabelledBatches
from autoseg.training.cache import CachedCase
from autoseg.training.checkpoint import read_state, write_tensors
from autoseg.training.errors import Diverged
from autoseg.training.patches import make_sampler
from autoseg.training.schedule import learning_rate
from autoseg.training.step import batch_loss, lacks_memory
from autoseg.workspace.files import digest, write_text
from autoseg.workspace.jobs import JobDir, StoredOrigin, read_origins
from autoseg.workspace.stored import Stored, read_stored, write_stored

log = logging.getLogger(__name__)

SEARCH_SHARE = 0.3
"""Share of a job's budget, or of its steps, that the search takes: it trains every path, then one network is left. A
choice, far less than in the paper, where the search takes longer than the training."""
WARMUP_SHARE = 0.5
"""Share of the search in which weights alone are trained. Source: MONAI, 500 of 1,000 epochs."""
ARCH_RATE, ARCH_WAY = 1e-3, 10.0
"""Adam's rate for the architecture. Source: MONAI; a short search takes a larger one, so that a weight whose gradient
always had one sign would go this far: a choice. Gradients change signs: in 1,000 such steps from even odds, odds came
to lie between 0.34 and 0.84 (measured)."""
MOST_ARCH_RATE = 0.03
"""A choice: Adam at more jumps between architectures from one step to the next."""
START_ODDS = 1.0
"""Log-odds of the paths that the plan's topology has, at the start, less for the others, and more for its operations.
A choice: 0.73 and 0.27. What a short search cannot tell stays as it is; a weight can go `ARCH_WAY`."""
LEAST_FEATURES, MOST_FEATURES, GRID = 0.9, 1.0, 0.002
"""Features of the topology read off, in parts of what the plan's has, and how finely they are told apart: choices.
So time and memory stay near those that were measured for the plan. MONAI's search is drawn to 0.8 of the full network's
features by a term of its loss; here such a term moved the odds more than the segmentation did, away from the finest
scale, and what was found was worse (docs/results.md)."""
TOPOLOGY_WEIGHT = 0.001
"""Source: MONAI."""
CPU_EDGE, CPU_BATCH = 32, 1
"""Patch and batch of a search on a CPU: the space costs many times the network that is left."""
TOPOLOGY = "configs/topology.json"
"""Where a job's bundle keeps what was found."""
CHECKPOINT_S = 60.0


class Topology(Stored):
    """An architecture: what stands in topology.json."""

    origin: str
    """On what it was found, and how long that took."""
    paths: list[list[int]]
    """(blocks, 3 depths - 2) of 0 and 1: from each depth to itself and its neighbours."""
    operations: list[list[int]]
    """Same shape: index into MONAI's Cell.OPS3D."""
    nodes: list[list[int]]
    """(blocks + 1, depths) of 0 and 1: which scales hold features."""


def wants_search(plan: Plan, paths: JobDir) -> bool:
    """Whether a job's topology is still to be searched."""
    if plan.algo != "dints" or not plan.network.get("search"):
        return False
    if not (paths.root / TOPOLOGY).exists():
        return True
    topology = read_stored(paths.root / TOPOLOGY, Topology)
    return any(getattr(topology, key) != plan.network[key] for key in ("paths", "operations"))


class Search:
    """One search, resumed from its checkpoint."""

    def __init__(
        self,
        plan: Plan,
        cases: Sequence[CachedCase],
        device: torch.device,
        *,
        seconds: float | None,
        steps: int,
        checkpoint: Path | None = None,
    ) -> None:
        """Set it up.

        Args:
            cases: training cases; halves of them train weights and architecture.
            seconds: time to take; None: `steps` decide.
            steps: most steps.
            checkpoint: where it is saved once a minute.
        """
        self.plan, self.device, self.seconds, self.steps, self.checkpoint = plan, device, seconds, steps, checkpoint
        self.halves = (cases[::2], cases[1::2] or cases)
        self.samplers = [make_sampler(half, plan) for half in self.halves]
        on_cpu = device.type == "cpu"
        # Whole steps of the network: depth halvings, one more with use_downsample.
        x, y, z = (min(r, CPU_EDGE) for r in plan.roi_size) if on_cpu else plan.roi_size
        self._cut_with((x, y, z), CPU_BATCH if on_cpu else plan.batch_size)
        # Half precision of few digits wants a scaler, which two optimizers in turns would confuse.
        precision = resolve_precision(device, plan.precision)
        self.precision: Precision = "fp32" if precision == "fp16" else precision
        self.class_weights = torch.tensor(plan.each_class("class_weights"), device=device)
        torch.manual_seed(plan.seed)
        self.paths = np.array(plan.network["paths"])
        self.operations = torch.tensor(plan.network["operations"])
        self.space = self._build_space()
        network = DiNTS(
            dints_space=self.space,
            in_channels=len(plan.channels),
            num_classes=plan.num_outputs,
            use_downsample=plan.network["use_downsample"],
        )
        self.network = to_device(network, device, self.precision, trained=True)
        architecture = [self.space.log_alpha_a, self.space.log_alpha_c]
        ours = {id(p) for p in architecture}
        weights = [p for p in self.network.parameters() if id(p) not in ours]
        # AdamW where MONAI has SGD at 0.025; a rate that is Muon's is none for it.
        planned = LEARNING_RATES.cpu if on_cpu else LEARNING_RATES.gpu
        self.rate = planned if plan.optimizer == "muon" else plan.learning_rate
        self.weights = torch.optim.AdamW(weights, lr=self.rate, weight_decay=plan.weight_decay)
        self.architecture = torch.optim.Adam(architecture, lr=ARCH_RATE, betas=(0.5, 0.999))
        self.step, self.elapsed_s = 0, 0.0

    def _build_space(self) -> TopologySearch:
        """All paths and operations at once, those of the plan the likeliest."""
        known = self.plan.network
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its size
            space = TopologySearch(
                channel_mul=known["channel_mul"],
                num_blocks=len(known["paths"]),
                num_depths=(len(known["paths"][0]) + 2) // 3,
                use_downsample=known["use_downsample"],
                device=str(self.device),
            )
        with torch.no_grad():
            planned = torch.from_numpy(self.paths).to(space.log_alpha_a)
            space.log_alpha_a.add_(START_ODDS * (2 * planned - 1))
            likelier = F.one_hot(self.operations, space.num_cell_ops).to(planned)
            space.log_alpha_c.add_(START_ODDS * likelier * planned[..., None])
        return space

    def _cut_with(self, roi: tuple[int, int, int], batch: int) -> None:
        """Set the patch and how many of them a step takes."""
        self.roi, self.batch = roi, batch
        self.batches = [
            LabelledBatches(
                self.plan, sampler, self.device, indices=range(batch), batch_size=batch, roi=roi, ahead=False
            )
            for sampler in self.samplers
        ]

    @property
    def share(self) -> float:
        """How far it is, 0..1."""
        by_time = self.elapsed_s / self.seconds if self.seconds is not None else 0.0
        return min(1.0, max(self.step / self.steps, by_time))

    def run(self) -> Topology:
        """Search to the end."""
        self._resume()
        saved = clock = time.monotonic()
        bar = Bar("search", 1.0, unit="")
        try:
            while self.share < 1.0:
                self._train_step()
                now = time.monotonic()
                self.elapsed_s += now - clock
                clock = now
                bar.to(self.share, f"step {self.step}")
                if self.checkpoint is not None and now - saved > CHECKPOINT_S:
                    self._save()
                    saved = time.monotonic()
        finally:
            bar.close()
        return self.decode()

    def decode(self) -> Topology:
        """The likeliest topology with about as many features as the plan's, and its likeliest operations.

        Without that limit it would be MONAI's. But after a short search odds are near even still, and the likeliest
        topology of such odds may be of any size (0.15 and 0.67 of the full network's features, measured).
        """
        odds = self.space.log_alpha_a.detach().double().cpu().numpy()
        operations = self.space.log_alpha_c.detach().argmax(-1).cpu()
        features = self._features(operations) / (self.paths * self._features(self.operations)).sum()
        paths = likeliest_paths(odds, features, LEAST_FEATURES, MOST_FEATURES)
        kept = paths * self.paths
        return Topology(
            origin=f"found by a differentiable search of {self.step} steps, {format_duration(self.elapsed_s)}, "
            f"{sum(map(len, self.halves))} cases, patches of {'x'.join(map(str, self.roi))}; {paths.sum()} paths, "
            f"{kept.sum()} of the {self.paths.sum()} it started from, {(paths * features).sum():.2f} of their features",
            paths=paths.tolist(),
            operations=operations.tolist(),
            nodes=reached_nodes(paths.tolist()),
        )

    def _features(self, operations: torch.Tensor) -> np.ndarray:
        """Features that each path keeps with its operation, in those of an image at the finest scale: (blocks, paths).

        As MONAI counts them: what an operation keeps, times the size of the scale it ends at.
        """
        space = self.space
        _, into = path_depths(space.num_depths)
        sizes = np.array([space.filter_nums[depth] / space.filter_nums[0] / 8**depth for depth in into])
        kept = np.take_along_axis(space.ram_cost, operations.numpy()[..., None], axis=-1)[..., 0]
        features: np.ndarray = (1 + kept) * sizes
        return features

    def _loss(self, half: int) -> torch.Tensor:
        """Segmentation loss on a batch of one half of the cases."""
        plan = self.plan
        samples = self.batches[half].samples(2 * self.step + half)
        loss = batch_loss(
            self.network, samples, plan, self.device, precision=self.precision, class_weights=self.class_weights
        )
        if not math.isfinite(float(loss.detach())):
            raise Diverged(
                f"{plan.algo}_{plan.fold}: the loss of the search became {float(loss.detach())} in step {self.step}. "
                "Lower learning_rate and train again."
            )
        return loss

    def _train_step(self) -> None:
        while lacks_memory(self._step):
            self._shrink()

    def _shrink(self) -> None:
        """Meet a lack of memory: the space of all networks takes many times what the batch was planned for.

        Raises:
            ResourceError: Nothing is left to make smaller.
        """
        roi = shorter_roi(self.roi, divisor(self.plan))
        if self.batch > 1:
            self._cut_with(self.roi, math.ceil(self.batch / 2))
        elif roi is not None:
            self._cut_with(roi, self.batch)
        else:
            raise ResourceError(
                f"{self.plan.algo}_{self.plan.fold}: out of memory in the search with one patch of "
                f"{'x'.join(map(str, self.roi))}. Set `dints: {{search: false}}`."
            )
        log.warning("search: out of memory: going on with %d patches of %s", self.batch, "x".join(map(str, self.roi)))
        self._zero()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _step(self) -> None:
        share = self.share
        for group in self.weights.param_groups:
            group["lr"] = learning_rate(self.rate, share, self.plan.warmup_fraction)
        self._zero()
        self._loss(0).backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self.plan.grad_clip)
        self.weights.step()
        if share >= WARMUP_SHARE:
            self._architecture_step((share - WARMUP_SHARE) / (1 - WARMUP_SHARE))
        self.step += 1

    def _architecture_step(self, share: float) -> None:
        done = max(1, self.step)
        arch_steps = (1 - WARMUP_SHARE) * done / max(self.share, 1e-6)
        for group in self.architecture.param_groups:
            group["lr"] = min(MOST_ARCH_RATE, max(ARCH_RATE, ARCH_WAY / arch_steps))
        self._zero()
        loss = self._loss(1)
        space = self.space
        probs_a, _ = space.get_prob_a(child=True)
        entropy_a = -(probs_a * torch.log(probs_a + 1e-5)).mean()
        log_probs_c = F.log_softmax(space.log_alpha_c, dim=-1)
        entropy_c = -(log_probs_c.exp() * log_probs_c).mean()
        topology = space.get_topology_entropy(probs_a)
        (loss + share * (entropy_a + entropy_c + TOPOLOGY_WEIGHT * topology)).backward()
        self.architecture.step()

    def _zero(self) -> None:
        self.weights.zero_grad(set_to_none=True)
        self.architecture.zero_grad(set_to_none=True)

    def _identity(self) -> str:
        return digest([self.plan.identity(), self.seconds, self.steps, [[c.name for c in h] for h in self.halves]])

    def _save(self) -> None:
        state = {
            "identity": self._identity(),
            "network": self.network.state_dict(),
            "weights": self.weights.state_dict(),
            "architecture": self.architecture.state_dict(),
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "batch": self.batch,
            "roi": list(self.roi),
        }
        assert self.checkpoint is not None
        write_tensors(self.checkpoint, state)

    def _resume(self) -> None:
        state = read_state(self.checkpoint, self._identity()) if self.checkpoint is not None else None
        if state is None:
            return
        self.network.load_state_dict(state["network"])
        self.weights.load_state_dict(state["weights"])
        self.architecture.load_state_dict(state["architecture"])
        self.step, self.elapsed_s = state["step"], state["elapsed_s"]
        x, y, z = state["roi"]
        self._cut_with((x, y, z), state["batch"])
        log.info("search: going on at step %d", self.step)


def likeliest_paths(odds: np.ndarray, features: np.ndarray, least: float, most: float) -> np.ndarray:
    """The likeliest of all sets of paths that fit together and have so many features.

    They fit where each block has a path, and its paths come from exactly the depths into which those of the block
    before go (MONAI's rule). Found block by block, the best way to each set of depths with each number of features
    (Viterbi), so exactly, but that a block's features are rounded up to `GRID`.

    Args:
        odds: log-odds, (blocks, 3 depths - 2).
        features: what each path adds, same shape, 0 or more.
        least, most: sum of the features; where no set of paths lies between, the nearest to `most` is taken.

    Returns:
        The same shape, 0 and 1.
    """
    count = odds.shape[1]
    out_of, into = path_depths((count + 2) // 3)
    choices = np.array(list(itertools.product((0, 1), repeat=count))[1:])
    come, go = (
        [frozenset(depth for on, depth in zip(choice, depths, strict=True) if on) for choice in choices]
        for depths in (out_of, into)
    )
    costs = np.ceil(choices @ features.T / GRID - 1e-6).astype(int)
    size = int(costs.max(0).sum()) + 1
    nothing = np.full(size, -np.inf)
    nothing[0] = 0.0
    best = dict.fromkeys(come, nothing)  # greatest sum of log-odds, by the features that it takes
    taken: list[dict[frozenset[int], np.ndarray]] = []
    for gains, prices in zip((choices @ odds.T).T, costs.T, strict=True):
        totals = {end: np.full(size, -np.inf) for end in go}
        taken.append({end: np.zeros(size, int) for end in go})
        for index, (start, end) in enumerate(zip(come, go, strict=True)):
            total = np.full(size, -np.inf)
            total[prices[index] :] = best[start][: size - prices[index]] + gains[index]
            better = total > totals[end]
            totals[end][better] = total[better]
            taken[-1][end][better] = index
        best = totals
    sums = GRID * np.arange(size)
    reached = np.max(list(best.values()), axis=0)
    within = (sums >= least - 1e-6) & (sums <= most + 1e-6) & np.isfinite(reached)
    if within.any():
        price = int(np.where(within, reached, -np.inf).argmax())
    else:
        price = int(np.where(np.isfinite(reached), np.abs(sums - most), np.inf).argmin())
    end = max(best, key=lambda depths: float(best[depths][price]))
    paths = np.zeros_like(odds, dtype=int)
    for block in reversed(range(len(odds))):
        index = int(taken[block][end][price])
        paths[block] = choices[index]
        end, price = come[index], price - costs[index, block]
    return paths


def search_for_job(
    plan: Plan, cases: Sequence[CachedCase], paths: JobDir, device: torch.device, first_weights: Path | None = None
) -> float:
    """Search a job's topology on its share of the time, and write it into the job's bundle and plan.

    Args:
        first_weights: of the round before; the topology they belong to is taken over, without a search.

    Returns:
        Seconds it took, over all its starts.
    """
    if first_weights is not None:
        earlier = first_weights.parents[1] / TOPOLOGY
        if earlier.exists():
            keep_topology(plan, paths, read_stored(earlier, Topology))
            return 0.0
    seconds = None if plan.budget_s is None else SEARCH_SHARE * plan.budget_s
    steps = max(1, math.ceil(SEARCH_SHARE * plan.num_epochs * plan.num_steps_per_epoch))
    checkpoint = paths.root / "models" / "search.pt"
    log.info("%s: searching the topology", paths.root.name)
    search = Search(plan, cases, device, seconds=seconds, steps=steps, checkpoint=checkpoint)
    topology = search.run()
    keep_topology(plan, paths, topology)
    checkpoint.unlink(missing_ok=True)
    log.info("%s: topology %s", paths.root.name, topology.origin)
    return search.elapsed_s


def keep_topology(plan: Plan, paths: JobDir, topology: Topology) -> None:
    """Write a topology into a job's bundle: topology.json, plan, origins, configs."""
    write_stored(paths.root / TOPOLOGY, topology)
    searched = {"paths": topology.paths, "operations": topology.operations, "nodes": topology.nodes}
    new = plan.model_copy(update={"network": {**plan.network, **searched}})
    origins = read_origins(paths)
    for key, value in searched.items():
        origins[f"network.{key}"] = StoredOrigin.model_validate(
            {"value": value, "origin": "search", "rule": "configs/topology.json"}
        )
    plain = {key: origin.model_dump(mode="json") for key, origin in origins.items()}
    write_text(paths.origins, yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=120))
    write_configs(new, paths.root)
    rules = {key: o.rule or o.origin for key, o in origins.items()}
    write_text(paths.plan, fill_template(new.algo, new.model_dump(mode="json"), rules))
