"""A job's folder as a MONAI bundle: plan, origins, metadata, inference config, README. No code, no absolute path."""

from __future__ import annotations

from typing import Any

import jinja2
import monai
import numpy as np
import torch
import yaml

from autoseg.config.templates import fill_template, read_template_text
from autoseg.plan import Origin, Plan
from autoseg.terminal import printable
from autoseg.version import __version__
from autoseg.workspace.files import write_json, write_text, write_yaml
from autoseg.workspace.jobs import JobDir


def write_bundle(plan: Plan, origins: dict[str, Origin], generated: dict[str, Any], paths: JobDir) -> None:
    """Write everything of a bundle but its weights; the plan comes last, so a plan that is there is whole.

    Args:
        generated: the plan without edits, as plain data; kept as the origins' values, so that an edit can be told.
    """
    write_json(paths.root / "configs" / "metadata.json", metadata(plan))
    write_text(paths.root / "configs" / "inference.yaml", inference_config(plan))
    context = {"plan": plan, "version": __version__, "names": [printable(c.name, one_line=True) for c in plan.classes]}
    write_text(paths.root / "docs" / "README.md", _render("common", "README.md.j2", **context))
    write_text(paths.root / "LICENSE", "The licence of the data this model was trained on applies to the model.\n")
    derived = {**generated, **{f"network.{k}": v for k, v in generated["network"].items()}}
    write_yaml(
        paths.origins,
        {key: {"value": derived[key], "origin": o.origin, "rule": o.rule} for key, o in origins.items()},
    )
    comments = {key: o.rule or o.origin for key, o in origins.items()}
    write_text(paths.plan, fill_template(plan.algo, plan.model_dump(mode="json"), comments))


def _render(algo: str, name: str, **context: Any) -> str:
    """Fill a file of a template; it may include one of another network's."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda path: read_template_text(*path.split("/", 1))),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        keep_trailing_newline=True,
    )
    return environment.get_template(f"{algo}/{name}").render(**context)


def inference_config(plan: Plan) -> str:
    """The bundle's inference.yaml."""
    network_def = _render(
        plan.algo,
        "network_def.yaml.j2",
        net=plan.network,
        in_channels=len(plan.channels),
        out_channels=plan.num_outputs,
    )
    text = _render("common", "inference.yaml.j2", plan=plan, version=__version__, network_def=network_def.strip())
    yaml.safe_load(text)  # a template that renders to no YAML is our bug, found here and not at a user's
    return text


def metadata(plan: Plan) -> dict[str, Any]:
    """The bundle's metadata.json, by MONAI's schema."""
    names = [c.name for c in plan.classes]
    outputs = names if plan.sigmoid else ["background", *names]
    return {
        "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json",
        "version": "0.1.0",
        "changelog": {"0.1.0": f"made by autoseg {__version__}"},
        "monai_version": monai.__version__,
        "pytorch_version": torch.__version__.split("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {"pytorch-ignite": "0.5.2", "einops": "0.8.1", "nibabel": "5.3.2"},
        "task": f"segmentation of {', '.join(names)}",
        "description": f"{plan.algo}, fold {plan.fold}, trained by autoseg",
        "authors": "autoseg",
        "copyright": "as the training data",
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "magnitude",
                    "modality": "n/a",
                    "num_channels": len(plan.channels),
                    "spatial_shape": list(plan.roi_size),
                    "dtype": "float32",
                    "value_range": [],
                    "is_patch_data": True,
                    "channel_def": {str(i): c.mode for i, c in enumerate(plan.channels)},
                }
            },
            "outputs": {
                "pred": {
                    "type": "image",
                    "format": "segmentation",
                    "num_channels": plan.num_outputs,
                    "spatial_shape": list(plan.roi_size),
                    "dtype": "float32",
                    "value_range": [0, 1],
                    "is_patch_data": True,
                    "channel_def": {str(i): name for i, name in enumerate(outputs)},
                }
            },
        },
    }
