"""A zip for 3D Slicer's extension MONAI Auto3DSeg: one model in the form that its script reads, and labels.csv.

The script (`Scripts/auto3dseg_segresnet_inference.py` of lassoan/SlicerMONAIAuto3DSeg at 9cdf2df) has its own
preprocessing, to which the model is fitted here. It normalises a CT as sigmoid(2 (x - low) / (high - low) - 1) without
clipping; a function before the network takes that back and does what the model was trained with. Where it normalises by
mean and deviation it takes those of voxels that are not 0.

Its windows lie elsewhere than autoseg's, which alone changed 2.2 % of the foreground of a small model. So it is given a
window of 0 voxels, which MONAI takes for the whole image, and the network lays autoseg's windows, mirrored as planned,
itself: its definition carries the source of the three modules that do so.
"""

from __future__ import annotations

import csv
import io
import re
import zipfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import IO, Any

import torch

from autoseg.data.terms import Term, term_of
from autoseg.errors import ConfigError
from autoseg.evaluation.score_files import ValidationFile
from autoseg.export.bundle import network_def
from autoseg.export.source import Source, read_source, refuse_frame, refuse_regions
from autoseg.export.targets import Request
from autoseg.inference.chosen import read_class_facts
from autoseg.inference.predictor import load_network
from autoseg.networks import divisor
from autoseg.plan import ChannelPlan, Plan
from autoseg.version import __version__
from autoseg.workspace.files import write_atomic, write_json
from autoseg.workspace.jobs import JobDir
from autoseg.workspace.stored import read_stored

MOST_IMAGES = 4
"""That the script takes."""
MOST_CLASSES = 255
"""Label values of its result, which is uint8."""
FORBIDDEN = ("brats", "whole-head")
"""In a path these words turn on other rules in the script."""
ABLE = ("segresnet", "swinunetr", "unet", "dints")
"""Networks that MONAI has, so that Slicer needs no autoseg; the first that the ensemble has is taken."""
WHOLE = 0
"""Edge of the script's window: MONAI's `fall_back_tuple` takes what is not above 0 for the image's."""
CARRIED = ("data/windowing.py", "export/scripts/inferer.py", "export/scripts/whole.py")
"""Modules whose source the network's definition carries, each after what it needs. No comment can stand in them: MONAI
reads the sign that begins one as `::`."""
OWN_IMPORT = re.compile(r"^from autoseg\.[^\n]*\n", re.MULTILINE)
STRICT = ", strict=True"
"""Of `zip`: not in Python 3.9, which Slicer 5.8 has."""
MODES = {"mri": "meanstd", "meanstd": "meanstd", "pet": "meanstd", "meanstdtanh": "meanstdtanh", "none": "none"}
"""Our modes -> the script's; its own `pet` is another."""
SEQUENCES = {
    "SegmentedPropertyCategoryCodeSequence": "category",
    "SegmentedPropertyTypeCodeSequence": "type",
    "SegmentedPropertyTypeModifierCodeSequence": "modifier",
    "AnatomicRegionSequence": "region",
    "AnatomicRegionModifierSequence": "region_modifier",
}
"""Columns of labels.csv, three each -> field of a term."""
README = """\
{title}: fold {fold} of {algo}, trained by autoseg {version}.

Differences from `autoseg predict` of the whole ensemble:
- one model, no postprocessing, no left and right told apart where they were trained as one class;
- half precision on a GPU; progress is shown of the whole image alone;
- an image is resampled only along axes whose voxels differ by more than a quarter from {spacing} mm;
- label values are the places of the classes, as labels.csv lists them: {values};
- {nonzero}
- codes of the classes are in labels.csv; colours are those that Slicer has for the codes{quality}.
The licence of the training data applies to the model. Not a medical device.
"""


def write(request: Request) -> list[Path]:
    """Write `<name>-v<release>.zip` and beside it what to add to the extension's Models.json.

    Raises:
        ConfigError: The script cannot run such a model, or the name or release is not one that it finds.
    """
    source = read_source(request.workspace, algo=request.algo, fold=request.fold)
    job_name = _choose(source)
    plan = source.predicting[job_name]
    stem = _stem(request, source)
    _check(plan)
    target = request.folder / f"{stem}.zip"
    write_atomic(target, lambda file: _write_zip(file, source, job_name))
    entry = request.folder / f"{stem}.Models.json"
    write_json(entry, {"models": [_models_entry(source, plan, target.name)]})
    return [target, entry]


def _choose(source: Source) -> str:
    """The job to export: the first of the best suited network."""
    for algo in ABLE:
        for name, plan in source.plans.items():
            if plan.algo == algo:
                return name
    found = ", ".join(source.plans)
    raise ConfigError(
        f"--format slicer: found {found}; Slicer's MONAI has none of these networks. Name a trained job of "
        f"{', '.join(ABLE)} with --algo and --fold."
    )


def _stem(request: Request, source: Source) -> str:
    if not re.fullmatch(r"[0-9]+\.[0-9]+\.[0-9]+", request.release):
        raise ConfigError(f"--release: found {request.release!r}, expected three numbers such as 1.0.0.")
    if request.name and not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", request.name):
        raise ConfigError(f"--name: found {request.name!r}, expected lower case letters, digits and dashes.")
    name = request.name or source.slug
    if word := next((word for word in FORBIDDEN if word in name), ""):
        raise ConfigError(f"--name: {name!r} holds {word!r}, for which Slicer's script has other rules. Give another.")
    return f"{name}-v{request.release}"


def _check(plan: Plan) -> None:
    refuse_frame(plan)
    refuse_regions(plan.label_map, "Slicer's script writes one of them alone")
    faults = []
    if len(plan.channels) > MOST_IMAGES:
        faults.append(f"--format slicer: {len(plan.channels)} channels. Slicer's script takes {MOST_IMAGES} at most.")
    if len(plan.classes) > MOST_CLASSES:
        faults.append(f"--format slicer: {len(plan.classes)} classes. Slicer's script writes {MOST_CLASSES} at most.")
    if faults:
        raise ConfigError(faults)


# -- model.pt


def _write_zip(file: IO[bytes], source: Source, name: str) -> None:
    plan, job = source.predicting[name], source.jobs[name]
    buffer = io.BytesIO()
    torch.save(_checkpoint(plan, job), buffer)
    classes = ", ".join(f"{place} {c.name}" for place, c in enumerate(plan.classes, 1))
    differs = any(c.mode in MODES and c.mode != "none" and not c.nonzero for c in plan.channels)
    readme = README.format(
        title=source.title,
        fold=plan.fold,
        algo=plan.algo,
        version=__version__,
        spacing=" x ".join(f"{mm:g}" for mm in plan.resample_resolution),
        values=classes,
        nonzero="voxels of value 0 do not count for mean and deviation, though they did in training;"
        if differs
        else "intensities are normalised as in training;",
        quality="; no quality is predicted" if source.quality is not None else "",
    )
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.pt", buffer.getvalue())
        archive.writestr("labels.csv", _labels(plan, source))
        archive.writestr("README.txt", readme)


def _checkpoint(plan: Plan, job: JobDir) -> dict[str, Any]:
    """What the script reads: plain types alone, since it loads them so."""
    state = {key: tensor.contiguous() for key, tensor in load_network(job, plan).state_dict().items()}
    dice = read_stored(job.validation, ValidationFile).summary.mean if job.validation.exists() else None
    return {"state_dict": state, "config": script_config(plan), "epoch": plan.num_epochs, "best_metric": dice or 0.0}


def script_config(plan: Plan) -> dict[str, Any]:
    """The script's settings for a plan."""
    low, high = _script_bounds(plan.channels)
    first, *others = [MODES.get(channel.mode, "ct") for channel in plan.channels]
    return {
        "network": _with_windows(plan, _undo(plan.channels, low, high)),
        "normalize_mode": first,
        "extra_modalities": {f"image{place}": mode for place, mode in enumerate(others, 2)},
        "intensity_bounds": [low, high],
        "resample_resolution": list(plan.resample_resolution),
        "roi_size": [WHOLE] * 3,
        "orientation_ras": True,
        # Its crop is to what is above 0 once normalised, so that it would cut off what is darker than the mean.
        "crop_foreground": False,
        "sigmoid": False,
    }


def _network(plan: Plan) -> dict[str, Any]:
    """The network by MONAI's own components alone, and plain numbers."""
    if plan.algo != "dints":
        return network_def(plan)
    net = plan.network
    return {
        "_target_": "DiNTS",
        "in_channels": len(plan.channels),
        "num_classes": plan.num_outputs,
        "use_downsample": net["use_downsample"],
        "node_a": f"$np.array({net['nodes']})",
        "dints_space": {
            "_target_": "TopologyInstance",
            "arch_code": [f"$np.array({net['paths']})", f"$np.array({net['operations']})"],
            "channel_mul": net["channel_mul"],
            "num_blocks": len(net["paths"]),
            "num_depths": (len(net["paths"][0]) + 2) // 3,
            "use_downsample": net["use_downsample"],
        },
    }


def _script_bounds(channels: Sequence[ChannelPlan]) -> tuple[float, float]:
    """The interval that the script scales to -1..1 in all channels that it calls ct."""
    bounds = [channel.bounds for channel in channels if channel.bounds is not None and channel.mode in ("ct", "range")]
    if not bounds:
        return 0.0, 1.0
    return min(b[0] for b in bounds), max(b[1] for b in bounds)


def _undo(channels: Sequence[ChannelPlan], low: float, high: float) -> str:
    """An expression of x (B, C, X, Y, Z), the script's intensities, that makes the model's; empty: they are these."""
    if all(channel.mode in MODES for channel in channels):
        return ""
    parts = []
    for place, channel in enumerate(channels):
        part = f"x[:, {place}:{place + 1}]" if len(channels) > 1 else "x"
        if channel.mode not in MODES:
            assert channel.bounds is not None
            own_low, own_high = channel.bounds
            if channel.mode == "ct":
                minus, over = channel.mean, max(channel.std, 1e-6)
            else:
                minus, over = own_low, max(own_high - own_low, 1e-6)
            raw = f"{low!r} + {(high - low) / 2!r} * (torch.logit({part}.float()) + 1)"
            # A sigmoid of 0 or 1 is infinity here, and a bound once clamped.
            part = f"(torch.clamp({raw}, {own_low!r}, {own_high!r}) - {minus!r}) / {over!r}"
        parts.append(part)
    return f"torch.cat([{', '.join(parts)}], 1)" if len(parts) > 1 else parts[0]


def _with_windows(plan: Plan, undo: str) -> dict[str, Any]:
    """The network, which lays windows itself and does not have to be known to who loads it."""
    package = resources.files("autoseg")
    sources = [package.joinpath(*name.split("/")).read_text(encoding="utf-8") for name in CARRIED]
    sources = [OWN_IMPORT.sub("", source).replace(STRICT, "") for source in sources]
    # Slicer's script evaluates what begins with $ in a config, and no file of ours lies beside it, so our own three
    # files travel as text. Nothing of the user's is in them, and autoseg itself runs no text of a config.
    taken = "([exec(source, space) for source in sources], space['take_whole_images'])[1]"
    return {
        "_target_": f"$(lambda sources, space: {taken})({sources!r}, {{'__name__': 'autoseg_windows'}})",
        "network": _network(plan),
        **({"undo": f"$lambda x: {undo}"} if undo else {}),
        "crop": _crops(plan),
        "roi_size": list(plan.roi_size),
        "overlap": plan.overlap,
        "divisor": list(divisor(plan)),
        "mirror_axes": list(plan.mirror_axes) if plan.tta else [],
        "mirrored_pairs": [[a + 1, b + 1] for a, b in plan.mirrored_classes] if plan.tta else [],
    }


def _crops(plan: Plan) -> bool:
    """Whether the network cuts off what is 0 around the image, as in training; what the script made of it is 0 then."""
    return plan.crop_foreground and all(c.mode == "none" or (c.mode in MODES and c.nonzero) for c in plan.channels)


# -- labels.csv and Models.json


def _labels(plan: Plan, source: Source) -> str:
    """Each class with its codes; its value is its place among the outputs."""
    own = read_class_facts(source.run).codes
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    parts = ("CodingSchemeDesignator", "CodeValue", "CodeMeaning")
    writer.writerow(["LabelValue", "Name", *(f"{sequence}.{part}" for sequence in SEQUENCES for part in parts)])
    for place, named in enumerate(plan.classes, 1):
        writer.writerow([place, named.name, *_code_cells(term_of(named.name, own))])
    return text.getvalue()


def _code_cells(term: Term) -> list[str]:
    cells = []
    for field in SEQUENCES.values():
        code = getattr(term, field)
        cells += ["", "", ""] if code is None else [code.scheme, code.value, code.meaning]
    return cells


def _models_entry(source: Source, plan: Plan, file_name: str) -> dict[str, Any]:
    """An entry of the extension's Models.json; the address is to be filled in by whoever uploads the zip."""
    title = source.title
    entry: dict[str, Any] = {
        "title": title,
        "license": "to be filled in: that of the training data applies",
        "description": f"{plan.algo}, fold {plan.fold}, {' x '.join(f'{mm:g}' for mm in plan.resample_resolution)} mm. "
        f"Trained by autoseg {__version__}.",
        "subject": "human",
        "imagingModality": source.text_of("modality") or "to be filled in",
        "versions": [{"url": f"https://example.org/{file_name}"}],
        "segmentNames": [c.name for c in plan.classes],
    }
    if len(plan.channels) > 1:
        extra = source.settings.get("extra_modalities")
        names = [*extra.value] if extra is not None and isinstance(extra.value, dict) else []
        names = ["image", *names][: len(plan.channels)]
        names += [f"image{place}" for place in range(len(names) + 1, len(plan.channels) + 1)]
        entry["inputs"] = [{"title": f"Input {name} volume", "namePattern": f"*{name}*"} for name in names]
    return entry
