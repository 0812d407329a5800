"""A job's folder as a MONAI bundle: plan, origins, metadata, configs, scripts, README. No absolute path.

The configs are data that MONAI's client evaluates, and the scripts are copies of files of autoseg that it imports;
autoseg itself runs nothing that lies in a job's folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml

from autoseg.config.templates import fill_template, read_template_text
from autoseg.export import bundle_configs
from autoseg.export.bundle_metadata import left_out, metadata, needed, plain
from autoseg.plan import Origin, Plan
from autoseg.terminal import printable
from autoseg.version import __version__
from autoseg.workspace.files import write_json, write_text, write_yaml
from autoseg.workspace.jobs import JobDir

SCRIPTS = (
    "autoseg/data/frame.py",
    "autoseg/data/resampling.py",
    "autoseg/data/windowing.py",
    "autoseg/export/scripts/__init__.py",
    "autoseg/export/scripts/cases.py",
    "autoseg/export/scripts/check.py",
    "autoseg/export/scripts/ensemble.py",
    "autoseg/export/scripts/finishing.py",
    "autoseg/export/scripts/inferer.py",
    "autoseg/export/scripts/transforms.py",
    "autoseg/networks/dints_topology.py",
    "autoseg/networks/resenc_layers.py",
    "autoseg/networks/unetr_layers.py",
)
"""Files that a bundle carries a copy of, the same in all bundles: a client that runs several has one `scripts`."""
OWN_IMPORT = re.compile(r"^from autoseg\.(?:[a-z_]+\.)*([a-z_]+) import ", re.MULTILINE)

LOGGING = """[loggers]
keys=root

[handlers]
keys=consoleHandler

[formatters]
keys=fullFormatter

[logger_root]
level=INFO
handlers=consoleHandler

[handler_consoleHandler]
class=StreamHandler
level=INFO
formatter=fullFormatter
args=(sys.stdout,)

[formatter_fullFormatter]
format=%(asctime)s - %(name)s - %(levelname)s - %(message)s
"""
"""`configs/logging.conf`, as MONAI's bundles have it."""


def write_bundle(plan: Plan, origins: dict[str, Origin], generated: dict[str, Any], paths: JobDir) -> None:
    """Write everything of a bundle but its weights; the plan comes last, so a plan that is there is whole.

    Args:
        generated: the plan without edits, as plain data; kept as the origins' values, so that an edit can be told.
    """
    limits = left_out(plan, finished=False)
    name = f"{plan.algo}_{plan.fold}"
    described = metadata([plan], name=name, channels=outputs(plan), limits=limits)
    write_json(paths.root / "configs" / "metadata.json", described)
    write_configs(plan, paths.root)
    write_shared(paths.root)
    write_readme(paths.root, [plan], name=name, limits=limits, is_job=True)
    derived = {**generated, **{f"network.{k}": v for k, v in generated["network"].items()}}
    write_yaml(
        paths.origins,
        {key: {"value": derived[key], "origin": o.origin, "rule": o.rule} for key, o in origins.items()},
    )
    comments = {key: o.rule or o.origin for key, o in origins.items()}
    write_text(paths.plan, fill_template(plan.algo, plan.model_dump(mode="json"), comments))


def write_readme(
    root: Path, plans: Sequence[Plan], *, name: str, limits: Sequence[str], cleans: bool = False, is_job: bool = False
) -> None:
    """Write docs/README.md.

    Args:
        plans: of the bundle's networks; one alone can be trained on.
        limits: what is left out, in sentences.
        cleans: as in `bundle_metadata.needed`.
        is_job: the folder is a job's; else the bundle was exported.
    """
    plan = plans[0]
    text = _render(
        "common",
        "README.md.j2",
        version=__version__,
        name=name,
        names=[printable(c.name, one_line=True) for c in plan.classes],
        channels=len(plan.channels),
        packages=needed(plans, cleans=cleans),
        trains=len(plans) == 1,
        limits=limits,
        job=plan if is_job else None,
    )
    write_text(root / "docs" / "README.md", text)


def outputs(plan: Plan) -> list[str]:
    """Names of a network's outputs."""
    names = [plain(c.name) for c in plan.classes]
    return names if plan.sigmoid else ["background", *names]


def write_configs(
    plan: Plan, root: Path, *, lowres: Plan | None = None, rules: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Write the configs of all workflows.

    Args:
        lowres: plan of a second model at larger voxels.
        rules: how the labels are cleaned, as `bundle_configs.cleaning` takes them.
    """
    network = network_def(plan)
    finishing = bundle_configs.cleaning(plan, rules)
    configs = {
        "inference": bundle_configs.inference(plan, network, lowres=lowres, finishing=finishing),
        "train": bundle_configs.train(plan, network, lowres=lowres),
        "evaluate": bundle_configs.evaluate(),
        "multi_gpu_train": bundle_configs.multi_gpu_train(),
        "multi_gpu_evaluate": bundle_configs.multi_gpu_evaluate(),
        "inference_trt": bundle_configs.inference_trt(),
    }
    for name, config in configs.items():
        write_json(root / "configs" / f"{name}.json", config)
    (root / "configs" / "inference.yaml").unlink(missing_ok=True)  # of versions up to 0.1


def write_shared(root: Path) -> None:
    """Write what all bundles have in common: scripts, logging.conf, the licence's place."""
    package = resources.files("autoseg")
    for name in SCRIPTS:
        text = package.joinpath(*name.split("/")[1:]).read_text(encoding="utf-8")
        write_text(root / "scripts" / name.rpartition("/")[2], OWN_IMPORT.sub(r"from scripts.\1 import ", text))
    write_text(root / "configs" / "logging.conf", LOGGING)
    write_text(root / "LICENSE", "The licence of the data this model was trained on applies to the model.\n")


def _render(algo: str, file: str, **context: Any) -> str:
    """Fill a file of a template; it may include one of another network's."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda path: read_template_text(*path.split("/", 1))),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        keep_trailing_newline=True,
    )
    return environment.get_template(f"{algo}/{file}").render(**context)


def network_def(plan: Plan) -> dict[str, Any]:
    """The network as MONAI's ConfigParser builds it."""
    text = _render(
        plan.algo,
        "network_def.yaml.j2",
        net=plan.network,
        in_channels=len(plan.channels),
        out_channels=plan.num_outputs,
    )
    network: dict[str, Any] = yaml.safe_load(text)
    return network
