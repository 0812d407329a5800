"""Labels for new images, with the ensemble or with chosen jobs."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from autoseg.config.networks import LOCATOR
from autoseg.config.reader import read_model
from autoseg.config.settings import FormatName, InferenceSettings
from autoseg.data.segments import Segment
from autoseg.data.streams import ImageRows
from autoseg.errors import ConfigError, WorkspaceError, counted
from autoseg.inference.chosen import (
    own_jobs,
    read_class_facts,
    read_ensemble,
    read_inference,
    read_quality,
    run_at,
)
from autoseg.inference.cost import Cost, Limits
from autoseg.inference.ensemble_spec import EnsembleSpec, accept_ensemble, check_ensemble
from autoseg.inference.files import Look, Server, format_timing, writing
from autoseg.inference.items import Item, beside, check_output, find_items, names_a_file, warn_of_lost_overlaps
from autoseg.inference.options import options_of
from autoseg.inference.postprocess import set_rules
from autoseg.inference.predictor import Predictor
from autoseg.inference.preview import draw_preview
from autoseg.inference.quality import Verdict
from autoseg.inference.quality_file import FILE as QUALITY
from autoseg.inference.quality_file import quality_rows, quality_table
from autoseg.inference.seals import accept_jobs
from autoseg.inference.statistics import AS_STORED, HU, measure, statistics_table
from autoseg.inference.statistics import FILE as STATISTICS
from autoseg.plan import Plan
from autoseg.terminal import show
from autoseg.workspace.archive import opened_model
from autoseg.workspace.files import check_inside, write_json
from autoseg.workspace.jobs import JobDir
from autoseg.workspace.workspace import Workspace

log = logging.getLogger(__name__)


def _changed(settings: InferenceSettings, changes: Mapping[str, Any]) -> InferenceSettings:
    try:
        return InferenceSettings.model_validate({**settings.model_dump(), **changes})
    except ValidationError as error:
        known = ", ".join(InferenceSettings.model_fields)
        faults = []
        for wrong in error.errors():
            key = ".".join(str(part) for part in wrong["loc"])
            if wrong["type"] == "extra_forbidden":
                faults.append(f"{key}: no such setting of inference. Known: {known}.")
            else:
                faults.append(f"{key}: {wrong['msg']}, found {wrong['input']!r}. Correct it or leave it out.")
        raise ConfigError(faults) from error


def load_predictor(
    workspace: Workspace,
    *,
    algo: str | None = None,
    fold: int | None = None,
    device: str = "auto",
    inference: Mapping[str, Any] | None = None,
) -> Predictor:
    """Load the ensemble, or the mean of the trained jobs of one algorithm, one fold, or both.

    Args:
        inference: fields of `InferenceSettings` that win over those of the run.

    Raises:
        ConfigError: There is no such field, it cannot have its value, or the locator is asked for and there is none.
        WorkspaceError: There is no ensemble, or no such trained job; or they were changed since they were made.
    """
    workspace = run_at(workspace)
    settings, facts = _changed(read_inference(workspace), inference or {}), read_class_facts(workspace)
    workspace = workspace.finished()
    trained = [job for job in workspace.jobs() if job.state == "done"]
    locators = own_jobs(workspace, [(job.algo, job.fold) for job in trained if job.algo == LOCATOR])
    options = options_of(settings, has_locator=bool(locators))
    if settings.fast and not locators:
        log.info("no locator is trained (`autoseg train --algo locator`), so the whole image is looked at")
    more: dict[str, Any] = {"device": device, "options": options, "locator": locators[0] if options.locate else None}
    more["codes"], more["colours"], more["format"] = facts.codes, facts.colours, settings.format or "auto"
    if algo is None and fold is None:
        spec = read_ensemble(workspace)
        jobs = own_jobs(workspace, spec.members)
        check_ensemble(workspace, spec)
        _check_classes(workspace, spec, jobs)
        more["quality"] = read_quality(workspace, spec)
        return Predictor(jobs, combine=spec.combine, rules=spec.postprocessing, **more)
    trained = [job for job in trained if job.algo != LOCATOR]
    chosen = [job for job in trained if algo in (None, job.algo) and fold in (None, job.fold)]
    if not chosen:
        words = [f"algorithm {algo}" if algo else "", f"fold {fold}" if fold is not None else ""]
        known = ", ".join(job.name for job in trained) or "none"
        raise WorkspaceError(
            f"{workspace.root}: no trained job of {' and '.join(w for w in words if w)}. Trained: {known}. "
            "Run `autoseg train`, or name one of these."
        )
    jobs = own_jobs(workspace, [(job.algo, job.fold) for job in chosen])
    names = read_model(jobs[0].plan, Plan).label_map.named.names
    return Predictor(jobs, rules=set_rules(names, settings.slice_run, settings.min_voxels), **more)


def load_from(path: Path, **more: Any) -> Predictor:
    """Load models from the folder of a run, or from a packed model: a zip, or a folder with a manifest.

    Args:
        more: as `load_predictor` takes them.

    Raises:
        ConfigError, WorkspaceError: As `load_predictor`, and `autoseg.workspace.archive.opened_model`.
    """
    with opened_model(Path(path)) as root:
        return load_predictor(Workspace(root), **more)


def accept_changes(work_dir: Path) -> None:
    """Take the weights and plans of a run's trained jobs, and its ensemble, as they are now.

    Raises:
        WorkspaceError: There is no run, its ensemble is damaged, links lead out of it, or it cannot be written to.
    """
    workspace = run_at(Workspace(Path(work_dir))).finished()
    check_inside(workspace.run)
    accept_jobs([workspace.job_dir(job.algo, job.fold) for job in workspace.jobs() if job.state == "done"])
    if workspace.ensemble_seal.exists():
        accept_ensemble(workspace, read_ensemble(workspace))


def _check_classes(workspace: Workspace, spec: EnsembleSpec, jobs: Sequence[JobDir]) -> None:
    """Refuse an ensemble of other classes than its first member's; that the members agree is checked elsewhere."""
    if not jobs[0].plan.exists():
        return  # said when it is loaded
    names = read_model(jobs[0].plan, Plan).label_map.named.names
    if spec.classes != names:
        raise WorkspaceError(
            f"{workspace.ensemble_spec}: classes: found {', '.join(spec.classes)}, but {jobs[0].root.name} was trained "
            f"for {', '.join(names)}. {EnsembleSpec.advice}"
        )


# Long: each of its arguments is one of the command's, with its line in the docstring.
def predict_files(
    work_dir: Path,
    image: Path,
    output: Path,
    *,
    algo: str | None = None,
    fold: int | None = None,
    device: str = "auto",
    format: FormatName | None = None,
    statistics: bool = False,
    preview: bool = False,
    probabilities: bool = False,
    uncertainty: bool = False,
    share: bool = False,
    timing: bool = False,
    limits: Limits | None = None,
    inference: Mapping[str, Any] | None = None,
) -> int:
    """Segment an image, a folder or a list of images; a bad one is reported and skipped.

    Args:
        work_dir: folder of a finished run, or a packed model.
        image: a file, a folder, or a .txt file that names images.
        output: folder for the label files, `<case>.nii.gz`; or one label file for one image.
        algo, fold: use the trained jobs of this algorithm and fold instead of the ensemble.
        device: auto, cpu or cuda.
        format: of the label files; auto: each image's own, or as the name of one label file says; None: as the run's
            settings say, where `output` does not name a file.
        statistics: write volumes and intensities of the classes to statistics.csv beside the label files.
        preview: write a picture of each image to `<case>.preview.png` beside the label files.
        probabilities: write each class' probability to `<case>.maps/probability_<class>.nii.gz`.
        uncertainty: write the entropy of the probabilities, 0 to 1, to `<case>.maps/uncertainty.nii.gz`.
        share: leave label files that are there, and images that another process with `share` has begun; so several
            processes do a folder together, and one that was killed goes on.
        timing: print where the time goes, and write it to timing.json beside the label files.
        limits: memory and time to keep to.
        inference: fields of `InferenceSettings` that win over those of the run.

    Returns:
        Exit code: 0, or 2 where images were skipped.

    Raises:
        ConfigError: The image is missing, or the output cannot be written.
        WorkspaceError: There is no ensemble or no such job, or they were changed since they were made.
    """
    begin = time.perf_counter()
    image, output = Path(image), Path(output)
    if not image.exists():
        raise ConfigError(f"--image: {image}: no such file or folder.")
    predictor = load_from(work_dir, algo=algo, fold=fold, device=device, inference=inference)
    load_models_s = time.perf_counter() - begin
    usual: FormatName = "auto" if names_a_file(output) else predictor.format
    items = find_items(image, output, predictor.num_channels, format or usual, predictor.channel_names)
    check_output(output)
    if any(item.writer.keeps_overlaps for item in items):
        warn_of_lost_overlaps(predictor.label_map)
    images, models = counted(len(items), "image"), counted(predictor.num_models, "model")
    log.info("%s, %s on %s", images, models, predictor.device)
    limits = limits or Limits()
    if limits.device_bytes is not None and predictor.device.type == "cpu":
        log.info("--max_memory on a CPU is that of the process, as --max_ram")
    server = Server(
        predictor=predictor,
        looks=_looks(predictor, output, statistics=statistics, preview=preview, share=share),
        probabilities=probabilities,
        uncertainty=uncertainty,
        limits=limits,
        share=share,
        watched=timing or limits.are_set,
        cost=Cost(predictor=predictor),
    )
    num_failed = server.segment_all(items)
    if num_failed:
        log.error("%d of %s skipped; the messages above say why", num_failed, counted(len(items), "image"))
    if timing:
        _write_timing(
            server.timing(load_models_s, time.perf_counter() - begin, num_failed), beside(output, "timing.json")
        )
    return 2 if num_failed else 0


def _looks(predictor: Predictor, output: Path, *, statistics: bool, preview: bool, share: bool) -> list[Look]:
    """What is made of each image beside its label file."""
    units = [HU if channel.mode == "ct" else AS_STORED for channel in predictor.models[0].plan.channels]
    table = statistics_table(beside(output, STATISTICS), is_shared=share)
    doubts = quality_table(beside(output, QUALITY), is_shared=share)
    verdicts: dict[str, Verdict | None] = {}

    def judge(item: Item, segments: tuple[Segment, ...], image: ImageRows, labels: np.ndarray) -> None:
        verdict = predictor.verdict(labels, image.spacing_mm)
        verdicts.clear()
        verdicts[item.name] = verdict
        if verdict is not None:
            doubts.put(item.name, quality_rows(item.name, verdict))
            if verdict.reasons:
                log.warning("%s: not like the training data: %s", item.name, "; ".join(verdict.reasons))

    def tabulate(item: Item, segments: tuple[Segment, ...], image: ImageRows, labels: np.ndarray) -> None:
        table.put(item.name, measure(item.name, image, labels, segments, units, verdicts.get(item.name)))

    def picture(item: Item, segments: tuple[Segment, ...], image: ImageRows, labels: np.ndarray) -> None:
        draw_preview(item.preview, item.name, image, labels, segments)

    wanted = ((judge, predictor.quality is not None), (tabulate, statistics), (picture, preview))
    return [look for look, is_wanted in wanted if is_wanted]


def _write_timing(table: Mapping[str, Any], path: Path) -> None:
    """Print where the time went, and write it beside the label files."""
    show(format_timing(table))
    with writing(path):
        write_json(path, table)
