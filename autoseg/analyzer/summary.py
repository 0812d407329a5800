"""The statistics in Auto3DSeg's form, by case and over all cases, and what autoseg adds to it.

Auto3DSeg's keys keep their meaning: `intensity` is taken within the box around voxels above 0,
`foreground_percentage` is a share from 0 to 1, the summary of intensities is the mean over cases and channels of
each case's figure (maximum and minimum: over all). A class is matched by its label value, so a case that misses
one does not shift the others. Percentiles interpolate linearly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from autoseg.analyzer.axes import Axes
from autoseg.analyzer.case import CaseStats, ClassStats
from autoseg.analyzer.faults import Measured
from autoseg.analyzer.lateral import Lateral
from autoseg.data.histograms import QUANTILES, Stats, pool
from autoseg.data.labels import LabelMap

Plain = dict[str, Any]


def case_entry(measured: Measured, annotated: Sequence[str] | None) -> Plain:
    """A case of `stats_by_cases`."""
    stats = measured.stats
    images = measured.files[: len(measured.case.images)]
    entry: Plain = {
        "name": measured.case.name,
        "image_filepath": images[0] if len(images) == 1 else list(images),
        "label_filepath": measured.label_file or None,
        "fold": measured.case.fold,
        "orientation": stats.orientation,
        "image_stats": {
            "shape": [list(stats.shape)] * stats.num_channels,
            "channels": stats.num_channels,
            "cropped_shape": [list(s) for s in stats.cropped_shapes],
            "spacing": list(stats.spacing_mm),
            "sizemm": list(stats.size_mm),
            "intensity": [_case_leaf(s) for s in stats.intensity],
        },
    }
    if stats.classes:
        voxel_ml = float(np.prod(stats.spacing_mm)) / 1000
        foreground = [_case_leaf(s) for s in stats.foreground]
        entry["annotated"] = list(annotated or ())
        entry["image_foreground_stats"] = {"intensity": foreground}
        entry["label_stats"] = {
            "labels": [c.value for c in stats.classes],
            "image_intensity": foreground,
            "label": [
                {
                    "image_intensity": [_case_leaf(s) for s in c.intensity],
                    "foreground_percentage": c.voxels / stats.voxels,
                    "shape": [list(s) for s in c.component_shapes],
                    "ncomponents": c.num_components,
                    "volume_ml": c.voxels * voxel_ml,
                }
                for c in stats.classes
            ],
        }
    return entry


def stats_summary(measured: Sequence[Measured]) -> Plain:
    """Auto3DSeg's `stats_summary` over sound cases, at least one."""
    all_stats = [m.stats for m in measured]
    summary: Plain = {
        "image_stats": {
            "shape": spread([s.shape for s in all_stats for _ in range(s.num_channels)]),
            "channels": spread([s.num_channels for s in all_stats]),
            "cropped_shape": spread([c for s in all_stats for c in s.cropped_shapes]),
            "spacing": spread([s.spacing_mm for s in all_stats]),
            "sizemm": spread([s.size_mm for s in all_stats]),
            "intensity": mean_of([i for s in all_stats for i in s.intensity]),
        }
    }
    if any(s.classes for s in all_stats):
        foreground = mean_of([f for s in all_stats for f in s.foreground])
        summary["image_foreground_stats"] = {"intensity": foreground}
        summary["label_stats"] = _label_stats(all_stats, foreground)
    summary["n_cases"] = len(measured)
    return summary


def _label_stats(all_stats: Sequence[CaseStats], foreground: Plain) -> Plain:
    """Auto3DSeg's `label_stats`: figures of each label value over the cases that have it."""
    by_value: dict[int, list[tuple[ClassStats, int]]] = {}
    for stats in all_stats:
        for c in stats.classes:
            by_value.setdefault(c.value, []).append((c, stats.voxels))
    return {
        "labels": sorted(by_value),
        "image_intensity": foreground,
        "label": [
            {
                "foreground_percentage": spread([c.voxels / voxels for c, voxels in classes]),
                "image_intensity": mean_of([i for c, _ in classes for i in c.intensity]),
                "shape": spread([s for c, _ in classes for s in c.component_shapes]),
                "ncomponents": spread([c.num_components for c, _ in classes]),
            }
            for _, classes in sorted(by_value.items())
        ],
    }


def data_set_entry(
    measured: Sequence[Measured],
    label_map: LabelMap | None,
    annotated: Mapping[str, Sequence[str]],
    lateral: Lateral,
    axes: Axes,
) -> Plain:
    """What autoseg adds: exact figures over the data set, in its axes, classes by name."""
    all_stats = [m.stats for m in measured]
    orientations = [s.orientation for s in all_stats]
    num_channels = max(s.num_channels for s in all_stats)
    return {
        "num_channels": num_channels,
        "shape": spread([s.shape for s in all_stats]),
        "spacing_mm": spread([s.spacing_mm for s in all_stats]),
        "size_mm": spread([s.size_mm for s in all_stats]),
        "orientations": {o: orientations.count(o) for o in sorted(set(orientations))},
        "frame": None if axes.frame is None else asdict(axes.frame),
        "frame_rule": axes.rule,
        "nonzero_crop_ratio": spread([s.nonzero_ratio for s in all_stats]),
        "nonzero_size_mm": spread(
            [[n * mm for n, mm in zip(s.nonzero_shape, s.spacing_mm, strict=True)] for s in all_stats]
        ),
        "labelled_outside": [m.case.name for m in measured if m.stats.outside],
        "outside_fraction": _outside_fraction(all_stats),
        "foreground_intensity": [_pooled(measured, channel) for channel in range(num_channels)],
        "background_intensity": _background(all_stats, num_channels),
        "classes": [] if label_map is None else _class_entries(measured, label_map, annotated),
        "lateral": {
            "pairs": [list(pair) for pair in lateral.pairs],
            "pairs_rule": lateral.pairs_rule,
            "unsure": list(lateral.unsure),
            "unsure_rule": lateral.unsure_rule,
        },
    }


def _outside_fraction(all_stats: Sequence[CaseStats]) -> float:
    """The largest share of any label value's voxels that lies outside the boxes around voxels other than 0."""
    outside, total = Counter[int](), Counter[int]()
    for stats in all_stats:
        outside.update(dict(stats.outside))
        total.update({c.value: c.voxels for c in stats.classes})
    return max((voxels / total[value] for value, voxels in outside.items()), default=0.0)


def _pooled(measured: Sequence[Measured], channel: int) -> Plain:
    """Intensities of all labelled voxels of all cases together."""
    histogram = pool([m.stats.pooled[channel] for m in measured if channel < len(m.stats.pooled)])
    voxels = histogram.total
    stats = histogram.stats() if voxels else Stats(*[0.0] * len(Stats._fields))
    return {"num_voxels": voxels, "is_exact": not histogram.is_rounded, **stats._asdict()}


BACKGROUND_FIGURES = ("min", "percentile_00_5", "percentile_99_5", "max")
"""Figures of a case's background that the data set's summary has: it judges bounds and new images by them."""


def _background(all_stats: Sequence[CaseStats], num_channels: int) -> list[Plain]:
    """Figures over cases of each channel's voxels that no class has; none where every voxel has one."""
    if not any(s.background for s in all_stats):
        return []
    by_channel = [
        [s.background[channel] for s in all_stats if channel < len(s.background)] for channel in range(num_channels)
    ]
    return [{key: spread([getattr(s, key) for s in stats]) for key in BACKGROUND_FIGURES} for stats in by_channel]


def _class_entries(
    measured: Sequence[Measured], label_map: LabelMap, annotated: Mapping[str, Sequence[str]]
) -> list[Plain]:
    total = sum(m.stats.voxels for m in measured if m.stats.classes)
    entries = []
    for name, values in zip(label_map.names, label_map.values, strict=True):
        voxels, volumes, components = 0, [], []
        for m in measured:
            classes = [c for c in m.stats.classes if c.value in values]
            if classes:
                here = sum(c.voxels for c in classes)
                voxels += here
                volumes.append(here * float(np.prod(m.stats.spacing_mm)) / 1000)
                components.append(sum(c.num_components for c in classes))
        entries.append(
            {
                "name": name,
                "values": list(values),
                "num_cases": len(volumes),
                "num_annotated": sum(name in annotated.get(m.case.name, ()) for m in measured),
                "voxel_fraction": voxels / total if total else 0.0,
                "volume_ml": spread(volumes) if volumes else None,
                # Components of a region made of several values are not those of its values.
                "num_components": spread(components) if components and len(values) == 1 else None,
            }
        )
    return entries


def spread(values: Sequence[Any]) -> Plain:
    """Auto3DSeg's figures over cases: of numbers, or of triples axis by axis."""
    array = np.asarray(values)
    percentiles = np.percentile(array, [100 * q for q in QUANTILES], axis=0).tolist()
    return {
        "max": array.max(axis=0).tolist(),
        "mean": array.mean(axis=0).tolist(),
        "median": np.median(array, axis=0).tolist(),
        "min": array.min(axis=0).tolist(),
        "stdev": array.std(axis=0).tolist(),
        "percentile": percentiles,
        **dict(zip(Stats._fields[5:], percentiles, strict=True)),
    }


def mean_of(stats: Sequence[Stats]) -> Plain:
    """Auto3DSeg's summary of intensities: the mean of each figure, the largest maximum and the least minimum."""
    if not stats:
        return {}
    array = np.array(stats)
    means = dict(zip(Stats._fields, array.mean(axis=0).tolist(), strict=True))
    means["max"], means["min"] = float(array[:, 0].max()), float(array[:, 3].min())
    return means


def _case_leaf(stats: Stats) -> Plain:
    leaf = stats._asdict()
    return {**dict(list(leaf.items())[:5]), "percentile": list(stats[5:]), **dict(list(leaf.items())[5:])}
