"""Plots of the report as SVG: text stays text, colours tell apart in grey and for the colour-blind."""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from autoseg.terminal import printable
from autoseg.workspace.jobs import EpochLine

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4B0092", "#7F5F00")
"""Source: Okabe and Ito 2008, with two darker ones for the yellow and black that would not show."""
STYLES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MOST_POINTS = 300
"""Points drawn beside a box; with more cases only the box."""
WIDTH_IN = 7.2
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


@dataclass(frozen=True, slots=True)
class Plot:
    """One figure, to be embedded."""

    svg: str
    """Base64."""
    alt: str
    """What it shows, for those who cannot see it."""


P = ParamSpec("P")
_MOST_REMEMBERED = 64


def _remembered(make: Callable[P, Plot]) -> Callable[P, Plot]:
    """Draw the same figure once: a report is made after every stage, and most of it did not change since."""
    known: dict[str, Plot] = {}

    @functools.wraps(make)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Plot:
        key = hashlib.sha256(repr((args, kwargs)).encode()).hexdigest()
        if key not in known:
            if len(known) >= _MOST_REMEMBERED:
                known.clear()
            known[key] = make(*args, **kwargs)
        return known[key]

    return wrapped


@contextmanager
def _figure(height_in: float, alt: list[str], plots: list[Plot]) -> Iterator[Figure]:
    """A figure that becomes one of `plots`; `alt` is filled inside."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        yield figure
        buffer = io.BytesIO()
        # No date and fixed ids: the same run gives the same file.
        matplotlib.rcParams["svg.hashsalt"] = "autoseg"
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    plots.append(Plot(svg=base64.b64encode(buffer.getvalue()).decode(), alt=" ".join(alt)))


def _boxes(axes: Any, groups: Sequence[Sequence[float]], colour: str, *, at: Sequence[float], width: float) -> None:
    """Horizontal boxes (quartiles, whiskers to 1.5 times their distance), with a point for each case where few."""
    known = [[v for v in group if not math.isnan(v)] for group in groups]
    num = sum(map(len, known))
    drawn = axes.boxplot(
        known, positions=list(at), widths=width, orientation="horizontal", patch_artist=True, manage_ticks=False,
        showfliers=num > MOST_POINTS, flierprops={"marker": ".", "markersize": 3, "markeredgecolor": colour},
        medianprops={"color": "black", "linewidth": 1.4},
    )  # fmt: skip
    for box in drawn["boxes"]:
        box.set(facecolor=colour, alpha=0.45, edgecolor=colour)
    if num <= MOST_POINTS:
        rng = np.random.default_rng(0)
        for place, values in zip(at, known, strict=True):
            jitter = place + rng.uniform(-0.3, 0.3, len(values)) * width
            axes.plot(values, jitter, ".", color="black", alpha=0.35, markersize=3, markeredgewidth=0)


def _label_rows(axes: Any, names: Sequence[str], *, most: int = 26) -> None:
    axes.set_yticks(range(len(names)), [_short(n, most) for n in names])
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.grid(axis="y", visible=False)


def _short(name: str, most: int = 26) -> str:
    """A name as matplotlib draws it: no formula between dollars, and no label that it leaves out for its underscore."""
    name = printable(name, one_line=True)
    name = name if len(name) <= most else name[: most - 3] + "..."
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _median(values: Sequence[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return float(np.median(known)) if known else math.nan


# -- the data


@_remembered
def geometry(shapes: Sequence[Sequence[int]], spacings: Sequence[Sequence[float]]) -> Plot:
    """Sizes in voxels and in mm, and spacings, along X, Y, Z."""
    plots: list[Plot] = []
    alt: list[str] = []
    shape, spacing = np.asarray(shapes, float), np.asarray(spacings, float)
    panels = (("Voxels", shape), ("Spacing (mm)", spacing), ("Size (mm)", shape * spacing))
    with _figure(1.9, alt, plots) as figure:
        for axes, (title, values) in zip(figure.subplots(1, 3), panels, strict=True):
            _boxes(axes, [values[:, a].tolist() for a in range(3)], COLOURS[0], at=range(3), width=0.6)
            _label_rows(axes, ("X", "Y", "Z"))
            axes.set_title(title)
            low, high = float(values.min()), float(values.max())
            if high - low < 1e-3 * max(1.0, high):
                axes.set_xlim(low - 0.5, high + 0.5)
            words = ", ".join(f"{a} {np.median(values[:, i]):.4g}" for i, a in enumerate("XYZ"))
            alt.append(f"Box plots of {title.lower()}, medians {words}.")
    return plots[0]


@_remembered
def intensities(cases: Mapping[str, Sequence[tuple[float, float, float]]]) -> Plot:
    """The range of foreground intensities of every case, a panel for each channel.

    Args:
        cases: name -> for each channel the 0.5 percentile, median and 99.5 percentile.
    """
    plots: list[Plot] = []
    alt: list[str] = []
    num_channels = max(len(channels) for channels in cases.values())
    with _figure(0.6 + 1.7 * num_channels, alt, plots) as figure:
        for channel, axes in enumerate(figure.subplots(num_channels, 1, squeeze=False)[:, 0]):
            rows = sorted((c[channel] for c in cases.values() if len(c) > channel), key=lambda r: r[1])
            low, median, high = np.asarray(rows, float).T
            places = np.arange(len(rows))
            axes.vlines(places, low, high, color=COLOURS[0], alpha=0.5, linewidth=max(0.5, 300 / len(rows) / 4))
            axes.plot(places, median, ".", color="black", markersize=3)
            if (median > 0).all() and median.max() > 50 * median.min():
                axes.set_yscale("symlog", linthresh=max(1.0, float(median.min())))
            name = f"channel {channel}, " if num_channels > 1 else ""
            axes.set(ylabel="Intensity", xlabel=f"Cases, {name}by median (line: 0.5 to 99.5 percentile of the classes)")
            axes.grid(axis="x", visible=False)
            alt.append(
                f"Intensities of the classes for {len(rows)} cases, {name}medians from {median.min():.4g} to "
                f"{median.max():.4g}."
            )
    return plots[0]


@_remembered
def volumes(by_class: Mapping[str, Sequence[float]]) -> Plot:
    """The volume of each class in the cases where it occurs, ml."""
    plots: list[Plot] = []
    alt: list[str] = []
    with _figure(0.9 + 0.3 * len(by_class), alt, plots) as figure:
        axes = figure.subplots()
        _boxes(
            axes, [[v for v in g if v > 0] for g in by_class.values()], COLOURS[2], at=range(len(by_class)), width=0.6
        )
        positive = [v for g in by_class.values() for v in g if v > 0]
        if positive and max(positive) > 20 * min(positive):
            axes.set_xscale("log")
        _label_rows(axes, list(by_class))
        axes.set_xlabel("Volume (ml)")
        medians = ", ".join(f"{n} {_median([v for v in g if v > 0]):.4g}" for n, g in by_class.items())
        alt.append(f"Box plots of the volume of each class in ml, medians {medians}.")
    return plots[0]


# -- training


@_remembered
def learning_curves(algo: str, folds: Mapping[int, Sequence[EpochLine]]) -> Plot:
    """Loss and validation Dice over the epochs, a line for each fold."""
    plots: list[Plot] = []
    alt: list[str] = [f"Learning curves of {algo}."]
    with _figure(2.3, alt, plots) as figure:
        loss, dice = figure.subplots(1, 2)
        for i, (fold, epochs) in enumerate(sorted(folds.items())):
            look = {
                "color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)], "linewidth": 1.3,
                "marker": MARKERS[i % len(MARKERS)], "markersize": 4 if len(epochs) < 30 else 0,
                "label": f"fold {fold}",
            }  # fmt: skip
            loss.plot([e.epoch for e in epochs], [e.train_loss for e in epochs], **look)
            seen = [(e.epoch, e.val_dice) for e in epochs if e.val_dice is not None]
            if len(seen) < 30:
                look["markersize"] = 4
            dice.plot([epoch for epoch, _ in seen], [value for _, value in seen], **look)
            if seen:
                best = max(value for _, value in seen)
                alt.append(f"Fold {fold}: {epochs[-1].epoch} epochs, best validation Dice {best:.3f}.")
        loss.set(title=f"{_short(algo, 60)}: training loss", xlabel="Epoch")
        dice.set(title="Validation Dice", xlabel="Epoch")
        for axes in (loss, dice):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            last = max((e.epoch for epochs in folds.values() for e in epochs), default=1)
            axes.set_xlim(0.5, last + 0.5) if last < 10 else axes.set_xlim(0, last * 1.02)
        figure.legend(*loss.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return plots[0]


# -- scores


@_remembered
def score_boxes(
    title: str, classes: Sequence[str], groups: Mapping[str, Sequence[Sequence[float]]], *, is_share: bool = True
) -> Plot:
    """Every case's score, a box for each class and segmenter.

    Args:
        title: names the score.
        groups: segmenter -> case by class, NaN where not counted.
        is_share: whether the score lies in 0..1.
    """
    plots: list[Plot] = []
    alt: list[str] = [f"Box plots of every case's {title}."]
    num = len(groups)
    with _figure(1.0 + len(classes) * (0.12 + 0.24 * num), alt, plots) as figure:
        axes = figure.subplots()
        for k, (name, rows) in enumerate(groups.items()):
            colour = COLOURS[k % len(COLOURS)]
            at = [i + (k - (num - 1) / 2) * 0.8 / num for i in range(len(classes))]
            columns = [[row[i] for row in rows] for i in range(len(classes))]
            _boxes(axes, columns, colour, at=at, width=0.68 / num)
            axes.plot([], [], "s", color=colour, alpha=0.6, label=_short(name, 40))
            medians = ", ".join(f"{c} {_median(v):.3f}" for c, v in zip(classes, columns, strict=True))
            alt.append(f"{name}, medians: {medians}.")
        _label_rows(axes, classes)
        lowest = min((v for rows in groups.values() for row in rows for v in row if not math.isnan(v)), default=0.0)
        if is_share:
            axes.set_xlim(max(0.0, math.floor(lowest * 10 - 0.5) / 10), 1.005)
        axes.set_xlabel(_short(title, 80))
        if num > 1:
            figure.legend(loc="outside upper center", ncols=min(num, 4), fontsize=8)
    return plots[0]


@_remembered
def intervals(rows: Sequence[tuple[str, float, float, float]], chosen: str) -> Plot:
    """Mean Dice with its 95 % interval of each combination.

    Args:
        rows: name, mean, low, high; best first.
        chosen: is marked.
    """
    plots: list[Plot] = []
    alt: list[str] = ["Mean out-of-fold Dice and 95 % interval of each combination."]
    with _figure(0.8 + 0.24 * len(rows), alt, plots) as figure:
        axes = figure.subplots()
        for i, (name, mean, low, high) in enumerate(rows):
            is_chosen = name == chosen
            axes.hlines(i, low, high, color=COLOURS[1] if is_chosen else COLOURS[0], linewidth=3 if is_chosen else 2)
            axes.plot(mean, i, "D" if is_chosen else "o", color="black", markersize=6 if is_chosen else 4)
            ends = "" if math.isnan(low) else f", {low:.3f} to {high:.3f}"
            alt.append(f"{name} {mean:.3f}{ends}{', chosen' if is_chosen else ''}.")
        _label_rows(axes, [("* " if r[0] == chosen else "") + r[0] for r in rows], most=60)
        axes.set_xlabel("Dice, mean and 95 % interval; * and diamond: chosen")
    return plots[0]


@_remembered
def dice_by_volume(classes: Sequence[str], points: Mapping[str, Sequence[tuple[float, float]]]) -> Plot:
    """Dice of each case against the volume of the class, ml."""
    plots: list[Plot] = []
    alt: list[str] = ["Dice of each case against the true volume of the class."]
    with _figure(2.6, alt, plots) as figure:
        axes = figure.subplots()
        for i, name in enumerate(classes):
            pairs = [p for p in points[name] if p[0] > 0]
            if pairs:
                look: Any = {"color": COLOURS[i % len(COLOURS)], "alpha": 0.6, "markersize": 4, "markeredgewidth": 0}
                axes.plot(*zip(*pairs, strict=True), MARKERS[i % len(MARKERS)], label=_short(name), **look)
        known = [v for pairs in points.values() for v, _ in pairs if v > 0]
        if known and max(known) > 20 * min(known):
            axes.set_xscale("log")
        axes.set(xlabel="True volume (ml)", ylabel="Dice")
        if len(classes) <= 16:
            figure.legend(loc="outside right upper", fontsize=8)
    return plots[0]


@_remembered
def reliability(classes: Sequence[str], counts: Sequence[Sequence[Sequence[float]]]) -> Plot:
    """Frequency of a class over the probability given to it.

    Args:
        counts: (K, bins, 3) voxels, sum of probabilities, hits.
    """
    plots: list[Plot] = []
    alt: list[str] = ["Frequency of each class over its predicted probability; the diagonal is perfect."]
    with _figure(3.0, alt, plots) as figure:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color="#777777", linewidth=1, linestyle="--", label="perfect")
        for i, (name, bins) in enumerate(zip(classes, counts, strict=True)):
            table = np.asarray(bins, float)
            table = table[table[:, 0] >= 20]
            if len(table):
                said, came = table[:, 1] / table[:, 0], table[:, 2] / table[:, 0]
                look: Any = {
                    "color": COLOURS[i % len(COLOURS)],
                    "linestyle": STYLES[i % len(STYLES)],
                    "markersize": 3.5,
                }
                axes.plot(said, came, marker=MARKERS[i % len(MARKERS)], label=_short(name), **look)
                alt.append(f"{name}: where {said[-1]:.2f} is said, {came[-1]:.2f} is true.")
        axes.set(xlabel="Predicted probability", ylabel="Share of voxels of the class", xlim=(0, 1), ylim=(0, 1))
        if len(classes) <= 16:
            figure.legend(loc="outside right upper", fontsize=8)
    return plots[0]


@_remembered
def cases_curve(measured: Sequence[tuple[int, float]], law: Sequence[tuple[int, float, float, float]]) -> Plot:
    """Dice over the number of training cases.

    Args:
        measured: cases and Dice of each training.
        law: cases, the law's Dice, and the ends of its interval, by cases.
    """
    plots: list[Plot] = []
    alt: list[str] = ["Dice over the number of training cases, measured and by a power law with its 95 % interval."]
    with _figure(2.8, alt, plots) as figure:
        axes = figure.subplots()
        if law:
            num, dice, low, high = zip(*law, strict=True)
            axes.fill_between(num, low, high, color=COLOURS[0], alpha=0.2, linewidth=0, label="95 % interval")
            axes.plot(num, dice, color=COLOURS[0], label="power law")
            alt += [f"{n} cases: {d:.3f}, {a:.3f} to {b:.3f}." for n, d, a, b in law]
        axes.plot(*zip(*measured, strict=True), "o", color="black", markersize=4, label="trained")
        axes.set_xscale("log")
        ticks = sorted({n for n, _ in measured} | {row[0] for row in law})
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.minorticks_off()
        axes.set(xlabel="Training cases", ylabel="Mean Dice")
        figure.legend(loc="outside right upper", fontsize=8)
    return plots[0]
