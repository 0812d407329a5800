"""The Python API, for notebooks and other programs: `autoseg.run`, `autoseg.predict`, `autoseg.Segmenter`.

Imported only when one of these is used, so that `import autoseg` stays quick.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from autoseg.errors import DataError, WorkspaceError
from autoseg.hardware.user import name_user
from autoseg.pipeline.stages import PLAIN_RUN
from autoseg.workspace.layout import check_readable
from autoseg.workspace.workspace import Workspace

name_user()

if TYPE_CHECKING:
    import numpy as np

    from autoseg.config.settings import FormatName
    from autoseg.data.grid import Grid
    from autoseg.data.segments import Segment
    from autoseg.evaluation.score_files import Scores
    from autoseg.inference.quality import Verdict

Record = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a run came to, as far as it is."""

    work_dir: Path
    succeeded: bool
    """False where a training job failed; `autoseg status` says why."""
    classes: tuple[str, ...]
    chosen: str
    """The chosen combination, such as `segresnet+swinunetr`; empty before the ensemble stage."""
    dice: float | None
    """Mean out-of-fold Dice of it, postprocessing included: over cases, then classes."""
    dice_by_class: dict[str, float | None]
    nsd: float | None
    """Mean surface Dice of it."""
    records: tuple[Record, ...]
    """One for each case, class and segmenter, for `pandas.DataFrame(result.records)`: `case`, `fold`, `class`,
    `segmenter` (a network, a combination, or `ensemble`), `dice`, and for the ensemble every other metric, such as
    `nsd`; None: not counted."""
    jobs: tuple[Record, ...]
    """One for each training job: `algo`, `fold`, `state`, `dice`, `seconds`, `error`."""

    @property
    def report(self) -> Path:
        """The page that shows it all."""
        return Workspace(self.work_dir).report

    @property
    def predictions(self) -> Path:
        """Folder of the label files predicted for the testing cases."""
        return Workspace(self.work_dir).finished().predictions


def run(
    input: str | Path = "input.yaml",
    *,
    stages: Sequence[str] = PLAIN_RUN,
    accept: bool = False,
    **settings: Any,
) -> RunResult:
    """Do what `autoseg run` does; only what is missing or whose inputs changed.

    Args:
        input: the settings' file.
        stages: some stages of `autoseg.pipeline.stages.STAGES`, by name, such as `["analyze", "generate"]`; all of
            them: everything, in all rounds of training.
        accept: take trained weights and plans as they are now, where they were changed on purpose after training.
        settings: settings that win over the file's: `budget="2h"`, `segresnet={"batch_size": 2}`,
            `class_weights={"tumor": 10}`.

    Raises:
        AutosegError: What the user can repair.

    Example:
        result = autoseg.run("input.yaml", budget="10m")
        pandas.DataFrame(result.records).groupby(["segmenter", "class"]).dice.mean()
    """  # fmt: skip
    from autoseg.config.load import load_settings
    from autoseg.pipeline.run import run_input

    overrides = _texts(settings)
    code = run_input(stages, Path(input), overrides, accept=accept)
    resolved, _ = load_settings(Path(input), overrides)
    return load_result(resolved.work_dir, succeeded=code == 0)


def _texts(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as they would stand on a command line: key, dotted inside a block -> text.

    Only a block of settings is taken apart; any other mapping, such as that of `class_weights`, is one value.
    """
    from autoseg.config.docs import setting_docs

    blocks = {doc.block for doc in setting_docs().values() if doc.block}
    texts = {}
    for key, value in settings.items():
        if key in blocks and isinstance(value, Mapping):
            texts.update({f"{key}.{name}": _text(item) for name, item in value.items()})
        else:
            texts[key] = _text(value)
    return texts


def _text(value: Any) -> str:
    from autoseg.config.nodes import json_for_yaml

    return str(value) if isinstance(value, str | Path) else json_for_yaml(value, default=_plain)


def _plain(value: Any) -> Any:
    """What JSON knows of a value that it does not."""
    return dict(value) if isinstance(value, Mapping) else str(value)


def load_result(work_dir: str | Path = "work_dir", *, succeeded: bool | None = None) -> RunResult:
    """Read the result of a run from its folder.

    Args:
        work_dir: the run's folder.
        succeeded: as the run said; None: whether every job that was begun is done.

    Raises:
        WorkspaceError: The folder is no run's.
    """
    from autoseg.evaluation.score_files import read_scores

    workspace = Workspace(Path(work_dir))
    check_readable(workspace.run)
    if not workspace.settings.exists():
        raise WorkspaceError(f"{work_dir}: no settings.yaml, so not a run's folder. Give a run's work_dir.")
    workspace = workspace.finished()
    jobs = workspace.jobs()
    scores = read_scores(workspace)
    chosen = scores.dice if scores else None
    surface = scores.summary_of("nsd") if scores else None
    keys = ("algo", "fold", "state", "dice", "seconds", "error")
    return RunResult(
        work_dir=Path(work_dir),
        succeeded=all(j.state in ("done", "pruned") for j in jobs) if succeeded is None else succeeded,
        classes=scores.classes if scores else (),
        chosen=scores.chosen if scores else "",
        dice=chosen.mean if chosen else None,
        dice_by_class={c.name: c.mean for c in chosen.classes} if chosen else {},
        nsd=surface.mean if surface else None,
        records=tuple(_records(scores)) if scores else (),
        jobs=tuple({key: getattr(job, key) for key in keys} for job in jobs),
    )


def _records(scores: Scores) -> list[Record]:
    records = []
    for case in scores.cases:
        rows = {name: {"dice": values} for name, values in case.dice.items()}
        if case.name in scores.ensemble:
            rows["ensemble"] = scores.ensemble[case.name]
        for segmenter, values in rows.items():
            for i, name in enumerate(scores.classes):
                record: Record = {"case": case.name, "fold": case.fold, "class": name, "segmenter": segmenter}
                records.append({**record, **{m: values[m][i] if m in values else None for m in scores.metrics}})
    return records


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prediction:
    """A segmented image."""

    labels: np.ndarray
    """(X, Y, Z) label values on the image's own grid, axes as they were given."""
    grid: Grid
    """The image's grid."""
    classes: dict[str, tuple[int, ...]]
    """Class -> label values."""
    segments: tuple[Segment, ...] = ()
    """The classes with colours and coded terms, for formats that have them; their values are those of `overlaps`."""
    overlaps: np.ndarray | None = None
    """(X, Y, Z) values that stand for sets of regions, where classes may overlap; None: `labels` says all."""
    images: tuple[Path, ...] = ()
    """The files it was made from; none: an array."""
    verdict: Verdict | None = None
    """How good it is likely to be, class by class, and why it is to be doubted; None where the run does not tell."""

    @property
    def affine(self) -> np.ndarray:
        """(4, 4), voxel -> mm."""
        return self.grid.affine

    def mask(self, name: str) -> np.ndarray:
        """(X, Y, Z) bool: where a class lies.

        Raises:
            KeyError: There is no such class.
        """
        import numpy as np

        if self.overlaps is not None:
            from autoseg.data.segments import mask_of

            return mask_of(self.overlaps, next(s for s in self.segments if s.name == name))
        return np.isin(self.labels, self.classes[name])

    @property
    def volumes_ml(self) -> dict[str, float]:
        """Volume of each class."""
        import numpy as np

        voxel_ml = abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000
        return {name: int(self.mask(name).sum()) * voxel_ml for name in self.classes}

    @property
    def records(self) -> list[Record]:
        """One for each class, for pandas: `class`, `voxels`, `volume_ml`."""
        volumes = self.volumes_ml
        return [{"class": n, "voxels": int(self.mask(n).sum()), "volume_ml": volumes[n]} for n in self.classes]

    @property
    def quality(self) -> list[Record]:
        """One for each class, for pandas, with the columns of quality.csv but the case; none where nothing tells.

        Dice and volumes that are not known are None.
        """
        verdict = self.verdict
        if verdict is None:
            return []
        shared: Record = {
            "case_dice": verdict.dice,
            "like_training": not verdict.reasons,
            "reason": "; ".join(verdict.reasons),
        }
        return [
            {
                "class": c.name,
                "predicted_dice": c.dice,
                "dice_low": c.low,
                "dice_high": c.high,
                "volume_ml": c.volume_ml,
                "volume_low_ml": c.volume_low_ml,
                "volume_high_ml": c.volume_high_ml,
                **shared,
            }
            for c in verdict.classes
        ]

    def save(self, path: str | Path, *, format: FormatName = "auto") -> None:
        """Write a label file.

        Args:
            path: of the file.
            format: auto: as the suffix says (.nii.gz, .nii, .nrrd, .seg.nrrd, .mha, .dcm).

        Raises:
            DataError: The suffix is of no such format, or the label cannot be written in it; DICOM needs a DICOM image.
        """
        from autoseg.data.formats.format import LabelFile
        from autoseg.data.formats.table import writer_of

        path = Path(path)
        writer = writer_of(path, None if format == "auto" else format)
        if writer.check is not None:
            if not self.images:
                raise DataError(f"{path}: DICOM refers to the images it was made from, and this was an array.")
            writer.check(self.images)
        array = self.labels
        if writer.keeps_overlaps and self.overlaps is not None:
            array = self.overlaps
        writer.write(path, LabelFile(grid=self.grid, array=array, segments=self.segments, images=self.images))


class Segmenter:
    """The models of a run or of a packed model, loaded once to segment many images.

    Example:
        segmenter = autoseg.Segmenter("work_dir")  # or "model.zip"
        segmenter.predict("scan.nii.gz").volumes_ml
    """

    def __init__(
        self,
        work_dir: str | Path = "work_dir",
        *,
        algo: str | None = None,
        fold: int | None = None,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        accept: bool = False,
        **inference: Any,
    ) -> None:
        """Load the ensemble, or the models of one algorithm, one fold, or both.

        Args:
            work_dir: folder of a finished run, or a packed model, as `autoseg pack` writes it.
            algo, fold: as said.
            device: where the networks run.
            accept: take weights, plans and ensemble as they are now, where they were changed on purpose after the run.
            inference: settings under `inference:` that win over those of the run: `fast=True`, `overlap=0.25`.

        Raises:
            ConfigError: There is no such setting, or it cannot have this value.
            WorkspaceError: There is no ensemble yet, or no such trained job; they were changed since they were made,
                and `accept` is not given; or the packed model is damaged.
        """
        from autoseg.ensemble.predict import accept_changes, load_from

        if accept:
            accept_changes(Path(work_dir))
        self._predictor = load_from(Path(work_dir), algo=algo, fold=fold, device=device, inference=inference)

    @property
    def classes(self) -> dict[str, tuple[int, ...]]:
        """Class -> label values."""
        label_map = self._predictor.label_map
        return dict(zip(label_map.names, label_map.values, strict=True))

    def predict(
        self, image: str | Path | Sequence[str | Path] | np.ndarray, *, affine: np.ndarray | None = None
    ) -> Prediction:
        """Segment one image.

        Args:
            image: a file, a file for each channel, or an array (X, Y, Z) or (C, X, Y, Z).
            affine: (4, 4) of an array, voxel -> mm in RAS+; a spacing of 1 mm and RAS where not given. The models
                work at a spacing in mm, so give it.

        Raises:
            DataError: The image cannot be read, does not have the models' channels, or cannot be what they know.
        """
        import numpy as np

        from autoseg.data.segments import segments_of
        from autoseg.data.volumes import read_image, stored_array, volume_of

        files: tuple[Path, ...] = ()
        if isinstance(image, np.ndarray):
            pixels = image if image.dtype.kind == "f" else image.astype(np.float32)
            volume = volume_of(pixels, np.eye(4) if affine is None else np.asarray(affine, np.float64))
        elif affine is not None:
            raise DataError("affine: no effect with a file, which has its own. Leave it out.")
        else:
            paths = [image] if isinstance(image, str | Path) else list(image)
            files = tuple(Path(p) for p in paths)
            volume = read_image(files)
        predictor, plain = self._predictor, self._predictor.label_map
        predictor.check(volume, str(files[0]) if files else "the array")
        predictor.label_map = plain.with_overlaps()
        try:
            in_ras = predictor.predict_labels(volume)
            verdict = predictor.verdict(in_ras, volume.spacing_mm)
            labels = stored_array(in_ras, volume.grid)
        finally:
            full, predictor.label_map = predictor.label_map, plain
        return Prediction(
            labels=labels if full is plain else plain.decode(full.encode(labels)),
            grid=volume.grid,
            classes=self.classes,
            segments=segments_of(full.named, predictor.codes, predictor.colours),
            overlaps=None if full is plain else labels,
            images=files,
            verdict=verdict,
        )


def predict(
    image: str | Path | Sequence[str | Path] | np.ndarray,
    output: str | Path | None = None,
    *,
    work_dir: str | Path = "work_dir",
    affine: np.ndarray | None = None,
    format: FormatName = "auto",
    algo: str | None = None,
    fold: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    accept: bool = False,
    **inference: Any,
) -> Prediction:
    """Segment one image with the models of a run; for many, load them once with `Segmenter`.

    Args:
        image, affine: as `Segmenter.predict` takes them.
        output: label file to write as well.
        format: of that file, as `Prediction.save` takes it.
        work_dir, algo, fold, device, accept, inference: as `Segmenter` takes them.

    Raises:
        AutosegError: As these.

    Example:
        autoseg.predict("scan.nii.gz", "labels.nii.gz", work_dir="work_dir").volumes_ml
    """
    segmenter = Segmenter(work_dir, algo=algo, fold=fold, device=device, accept=accept, **inference)
    prediction = segmenter.predict(image, affine=affine)
    if output is not None:
        prediction.save(output, format=format)
    return prediction
