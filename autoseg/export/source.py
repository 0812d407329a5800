"""What an exporter takes from a run or a packed model: jobs that belong together, their plans, labels and settings."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from autoseg.config.networks import LOCATOR
from autoseg.data.datalists.listfile import read_licence
from autoseg.data.labels import LabelMap
from autoseg.errors import ConfigError, WorkspaceError
from autoseg.inference.chosen import own_jobs, read_class_facts, read_ensemble, read_inference, read_quality, run_at
from autoseg.inference.ensemble_spec import EnsembleSpec, check_ensemble
from autoseg.inference.options import options_of
from autoseg.inference.postprocess import ClassRule, set_rules
from autoseg.inference.predictor import check_alike
from autoseg.inference.quality import QualityModel
from autoseg.inference.seals import check_jobs
from autoseg.plan import Plan, read_plan
from autoseg.workspace.jobs import JobDir
from autoseg.workspace.settings import StoredSetting, read_any_settings
from autoseg.workspace.workspace import Workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Trained jobs, made sure to be as training left them."""

    run: Workspace
    workspace: Workspace
    """The round that the jobs are of."""
    spec: EnsembleSpec | None
    """The ensemble; None where jobs were named instead."""
    jobs: dict[str, JobDir]
    """By name, in the ensemble's order."""
    plans: dict[str, Plan]
    """As the jobs have them."""
    settings: dict[str, StoredSetting]

    @property
    def label_map(self) -> LabelMap:
        """The networks' classes."""
        return next(iter(self.plans.values())).label_map

    def text_of(self, key: str) -> str:
        """A setting of the run that is a text; empty where it is none, or not known."""
        stored = self.settings.get(key)
        return stored.value if stored is not None and isinstance(stored.value, str) else ""

    @property
    def quality(self) -> QualityModel | None:
        """What tells how good a segmentation of the ensemble is; None where there is none."""
        return None if self.spec is None else read_quality(self.workspace, self.spec)

    @property
    def predicting(self) -> dict[str, Plan]:
        """The plans with overlap and mirroring as `autoseg predict` has them: where the run's settings say so, theirs.

        Raises:
            WorkspaceError: The settings were damaged.
        """
        settings = read_inference(self.run)
        options = options_of(settings.model_copy(update={"locate": False}), has_locator=False)
        wanted = {"overlap": options.overlap, "tta": options.mirror}
        changes = {key: value for key, value in wanted.items() if value is not None}
        return {name: plan.model_copy(update=changes) for name, plan in self.plans.items()}

    @property
    def rules(self) -> tuple[ClassRule, ...]:
        """How labels are cleaned at the end: as the ensemble was chosen; of named jobs, as the run's settings say."""
        if self.spec is not None:
            return self.spec.postprocessing
        settings = read_inference(self.run)
        return set_rules(self.label_map.named.names, settings.slice_run, settings.min_voxels)

    @property
    def title(self) -> str:
        """The run's name, else that of its networks."""
        return self.text_of("name") or "+".join(dict.fromkeys(plan.algo for plan in self.plans.values()))

    @property
    def slug(self) -> str:
        """The same as part of a file's name: lower case letters, digits and dashes."""
        return ascii_words(self.title, "-").lower() or "model"


def ascii_words(text: str, between: str) -> str:
    """Letters without their marks, and digits; what is neither becomes one `between`. Empty where nothing is left."""
    decomposed = unicodedata.normalize("NFKD", text.replace("\u00df", "ss"))  # German's sharp s
    marked = "".join(c for c in decomposed if not unicodedata.combining(c))
    return re.sub(r"[^A-Za-z0-9]+", between, marked).strip(between)


def read_source(
    workspace: Workspace, *, algo: str | None = None, fold: int | None = None, with_locator: bool = False
) -> Source:
    """Take the chosen ensemble of a run, or the trained jobs of one algorithm, one fold, or both.

    Args:
        with_locator: take the locator, too, as the last job, where one is trained.

    Raises:
        WorkspaceError: There is none, or it was changed since it was made.
    """
    run = run_at(workspace)
    workspace = run.finished()
    trained = [(job.algo, job.fold) for job in workspace.jobs() if job.state == "done"]
    if algo is None and fold is None:
        spec: EnsembleSpec | None = read_ensemble(workspace)
        assert spec is not None
        names: Sequence[tuple[str, int]] = spec.members
    else:
        spec = None
        names = [(a, f) for a, f in trained if algo in (None, a) and fold in (None, f) and (a != LOCATOR or algo == a)]
        if not names:
            known = ", ".join(f"{a}_{f}" for a, f in trained) or "none"
            raise WorkspaceError(f"{run.root}: no such trained job. Trained: {known}. Name one of these.")
    locators = [(a, f) for a, f in trained if a == LOCATOR][:1] if with_locator else []
    jobs = own_jobs(workspace, [*names, *locators])
    if spec is not None:
        check_ensemble(workspace, spec)
    check_jobs(jobs)
    plans = {job.root.name: read_plan(job) for job in jobs}
    check_alike({name: plan for name, plan in plans.items() if plan.algo != LOCATOR or algo == LOCATOR})
    return Source(
        run=run,
        workspace=workspace,
        spec=spec,
        jobs={job.root.name: job for job in jobs},
        plans=plans,
        settings=read_any_settings(run),
    )


def without_run(source: Source) -> list[str]:
    """What `autoseg predict` takes from this run that other tools do not, beside networks and rules, in sentences."""
    sentences = []
    if source.quality is not None:
        sentences.append("No quality is predicted: the run's quality model is for autoseg alone.")
    facts = read_class_facts(source.run)
    if kinds := [kind for kind in ("codes", "colours") if getattr(facts, kind)]:
        sentences.append(
            f"The run's {' and '.join(kinds)} of classes are not written: label files made here are NIfTI, which has "
            "no place for them."
        )
    return sentences


def licence_of(model: Source) -> str:
    """The licence of the training data, where the user's list names one and is still there; else empty."""
    listed = model.text_of("datalist")
    return read_licence(model.run.root / listed) if listed else ""


def refuse_frame(plan: Plan) -> None:
    """Raises: ConfigError: The network works in axes of its own, and what loads it turns images to RAS+ alone.

    Which way an image is to be turned depends on where its slices lie, and a network is given voxels without that.
    """
    if plan.frame is not None:
        raise ConfigError(
            f"{plan.algo}_{plan.fold}: its network works in axes of the data set's own (`frame` in the plan), and "
            "Slicer's script turns images to right, front and up alone. Export another format, such as bundle or onnx."
        )


def refuse_regions(label_map: LabelMap, why: str) -> None:
    """Raises: ConfigError: The classes may overlap."""
    if label_map.sigmoid:
        raise ConfigError(f"the classes are regions that may overlap, and {why}. Export another format.")
