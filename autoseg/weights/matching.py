"""Fit the tensors of a file to a network, and account for every one of them.

A tensor of the same name and shape is copied bit by bit. The layers that depend on the numbers of channels and of
outputs are found by building the network with one more of each, so that no network needs to name them. What fits
nowhere is left random, or unused, and said to be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from autoseg.errors import ConfigError
from autoseg.networks import is_encoder, network_file
from autoseg.plan import Plan
from autoseg.weights.fitting import FitError, by_class, output_names, to_channels, to_kernel, to_positions
from autoseg.weights.layouts import Renamed, renamed
from autoseg.weights.tables import Row, State, Table

LEAST_SHARE = 0.5
"""Share of the encoder's weights that must come from the file. A choice: an encoder that is half random is no head
start; another architecture, or another width, shares next to nothing."""
POSITIONS = ("relative_position_bias_table", "position_embeddings")
"""Last parts of the names of tables by place, which are interpolated to another number of places."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """What of a file goes where in a network."""

    table: Table
    tensors: dict[str, torch.Tensor]
    """Name in the network -> what it starts with, where that is not all random."""

    def load(self, network: nn.Module) -> None:
        """Put the tensors into a network, in place."""
        state = network.state_dict()
        for name, tensor in self.tensors.items():
            state[name].copy_(tensor)


def match_network(
    network: nn.Module,
    plan: Plan,
    tensors: Mapping[str, torch.Tensor],
    *,
    source: str,
    kind: str = "",
    classes: Sequence[str] | None = None,
    prefixes: Mapping[str, str] | None = None,
) -> Match:
    """Find what each tensor of a plan's network starts with.

    Args:
        network: as the plan builds it; its random numbers stay where a row of a head has no counterpart.
        tensors: of the file.
        source, kind: what the file is called, and what it is.
        classes: what its outputs are, in their order, without the background; None: it does not say.
        prefixes: as `renamed` takes them.
    """
    fitter = _Fitter(network, plan, classes)
    rows: list[Row] = []
    taken: dict[str, torch.Tensor] = {}
    reasons: dict[str, str] = {}
    for theirs, new in renamed(plan.algo, tensors, prefixes).items():
        try:
            if new.name in taken:
                raise FitError(f"{new.name} has its weights already")
            fitted, share, notes = fitter.fit(new, tensors[theirs])
        except FitError as error:
            reasons.setdefault(new.name, str(error))
            rows.append(Row(theirs=theirs, state="unused", note=str(error)))
            continue
        taken[new.name] = fitted
        state: State = "adapted" if notes else "loaded"
        rows.append(Row(name=new.name, theirs=theirs, state=state, share=share, note="; ".join(notes)))
    missing = [name for name in fitter.own if name not in taken]
    rows += [Row(name=name, state="random", note=reasons.get(name, "not in the file")) for name in missing]
    shares = {row.name: row.share for row in rows if row.name}
    inside = is_encoder(plan.algo)
    table = Table(
        source=source,
        kind=kind,
        share=_share(fitter.own, shares),
        encoder_share=_share({n: t for n, t in fitter.own.items() if inside(n)}, shares),
        rows=tuple(rows),
    )
    return Match(table=table, tensors=taken)


def _share(own: Mapping[str, torch.Tensor], shares: Mapping[str, float]) -> float:
    """Of the numbers in some weights, those that come from the file."""
    total = sum(tensor.numel() for tensor in own.values())
    return sum(shares[name] * tensor.numel() for name, tensor in own.items()) / max(1, total)


def check_match(table: Table, plan: Plan) -> None:
    """Refuse weights of another network.

    Raises:
        ConfigError: Too few of the encoder's come from the file.
    """
    if table.encoder_share < LEAST_SHARE:
        raise ConfigError(
            f"init_weights: {table.source} has {table.encoder_share:.0%} of the weights of the encoder of "
            f"{plan.algo}_{plan.fold}, expected at least {LEAST_SHARE:.0%} ({table.counts}). Give weights of a "
            f"{plan.algo} of this width, or name the network that they are of: init_weights: {{NETWORK: FILE}}."
        )


class _Fitter:
    """Fits tensors to the weights of one network."""

    def __init__(self, network: nn.Module, plan: Plan, classes: Sequence[str] | None) -> None:
        self.plan, self.classes = plan, classes
        state = network.state_dict()
        self.own = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
        self.others = state.keys() - self.own.keys()
        """Numbers that the network computes by itself: places in windows, counts of batches."""
        channels, outputs = len(plan.channels), plan.num_outputs
        self.stem = _dimensions(self.own, plan, channels + 1, outputs)
        self.head = _dimensions(self.own, plan, channels, outputs + 1)
        transposed = [n for n, m in network.named_modules() if isinstance(m, nn.ConvTranspose3d)]
        self.transposed = {f"{name}.weight" for name in transposed}

    def fit(self, new: Renamed, tensor: torch.Tensor) -> tuple[torch.Tensor, float, list[str]]:
        """A tensor of the file as one of the network.

        Returns:
            The tensor, which share of its numbers comes from the file, and how it was changed.

        Raises:
            FitError: It is none of the network's, or cannot be made one.
        """
        if not new.name or new.name not in self.own:
            own = "the network has its own" if new.name in self.others else "no such weights here"
            raise FitError(new.why or own)
        name, target = new.name, self.own[new.name]
        notes = [new.why] if new.why else []
        tensor = (new.convert(tensor) if new.convert else tensor).to(target.dtype)
        if tensor.ndim != target.ndim:
            raise FitError(f"{_size(tensor)} in the file, {_size(target)} here")
        for dim in self.stem.get(name, ()):
            if tensor.shape[dim] != target.shape[dim]:
                tensor, note = to_channels(tensor, dim, target.shape[dim])
                notes.append(note)
        if tensor.ndim == 5 and tensor.shape[2:] != target.shape[2:]:
            tensor, note = to_kernel(tensor, target.shape[2:], is_transposed=name in self.transposed)
            notes.append(note)
        if name.rpartition(".")[2] in POSITIONS and tensor.shape != target.shape:
            tensor, note = to_positions(tensor, target.shape, self.plan.network.get("image_size", self.plan.roi_size))
            notes.append(note)
        share = 1.0
        if dims := self.head.get(name, ()):
            names = output_names([c.name for c in self.plan.classes], sigmoid=self.plan.sigmoid)
            tensor, share, note = by_class(tensor, target, dims, self.classes, names)
            notes += [note] if note else []
        if tensor.shape != target.shape:
            raise FitError(f"{_size(tensor)} in the file, {_size(target)} here")
        return tensor, share, notes


def _dimensions(own: Mapping[str, torch.Tensor], plan: Plan, channels: int, outputs: int) -> dict[str, tuple[int, ...]]:
    """Which weights, and which of their axes, change their length with the number of channels or of outputs."""
    with torch.random.fork_rng(devices=[]):
        other = network_file(plan.algo).build(channels, outputs, plan.network).state_dict()
    axes = {
        name: tuple(d for d in range(t.ndim) if t.shape[d] != other[name].shape[d])
        for name, t in own.items()
        if name in other and other[name].ndim == t.ndim
    }
    return {name: dims for name, dims in axes.items() if dims}


def _size(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "one number"
