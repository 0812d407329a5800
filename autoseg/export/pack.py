"""One file, or one folder, with all of a run that predicts: what `autoseg predict --model` and `Segmenter` take.

`autoseg.workspace.archive` says what it holds and reads it again.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import yaml
from safetensors.torch import save

from autoseg.errors import ConfigError, WorkspaceError, counted
from autoseg.evaluation.score_files import ValidationFile
from autoseg.export.card import card_text, facts_of, weights_bytes
from autoseg.export.source import Source, licence_of, read_source
from autoseg.inference.chosen import read_inference
from autoseg.inference.ensemble_spec import EnsembleSpec
from autoseg.inference.items import check_output
from autoseg.inference.predictor import read_weights
from autoseg.version import __version__
from autoseg.workspace.archive import FORMAT, MANIFEST, MOST_TEXT, Manifest, Part, is_packed, opened_model
from autoseg.workspace.files import json_text, write_atomic, write_folder
from autoseg.workspace.jobs import Job
from autoseg.workspace.stored import read_stored
from autoseg.workspace.workspace import Workspace

ZIP = ".zip"
KEPT_SETTINGS = ("name", "modality", "extra_modalities", "codes", "colours")
"""Settings of the run that travel besides `inference`: what exporters and writers of label files ask for."""
MEMBER_TIME = (1980, 1, 1, 0, 0, 0)
"""Of every entry, the first that a zip can hold: the same model packs to the same bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A model that was packed."""

    path: Path
    num_models: int
    num_bytes: int
    sha256: str
    """Of the zip; of a folder, of its manifest."""

    def words(self) -> str:
        """What was done, in a line."""
        return f"{self.path}: {counted(self.num_models, 'model')}, {self.num_bytes / 1e6:.1f} MB, SHA-256 {self.sha256}"


def pack(work_dir: Path, output: Path, *, licence: str = "") -> Packed:
    """Pack the chosen ensemble of a run.

    Args:
        work_dir: folder of a finished run.
        output: a file that ends in .zip; any other name becomes a folder with the same parts, as Hugging Face has them.
        licence: of the training data; empty: as the user's datalist says, where it does.

    Raises:
        ConfigError: The output cannot be written there.
        WorkspaceError: There is no ensemble, or it, its weights or plans were changed since they were made.
    """
    output = Path(output)
    _check_target(output)
    if is_packed(Path(work_dir)):
        raise WorkspaceError(f"{work_dir}: packed already. Copy it, or give the folder of a run with --work_dir.")
    model = read_source(Workspace(Path(work_dir)), with_locator=True)
    licence = " ".join(licence.split()) or licence_of(model)
    to_zip = output.suffix.lower() == ZIP
    if to_zip:
        write_atomic(output, lambda file: _write_zip(file, model, licence))
    else:
        _write_folder(output, model, licence)
    with opened_model(output):  # what was written is what can be read
        pass
    files = [output] if to_zip else sorted(path for path in output.rglob("*") if path.is_file())
    with open(output if to_zip else output / MANIFEST, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Packed(
        path=output,
        num_models=len(_spec(model).members),
        num_bytes=sum(path.stat().st_size for path in files),
        sha256=digest,
    )


def _check_target(output: Path) -> None:
    if output.suffix.lower() == ZIP and output.is_dir():
        raise ConfigError(f"--output: {output} is a folder. Give a file to write, such as {output / 'model.zip'}.")
    if output.suffix.lower() != ZIP and (output.is_file() or (output.is_dir() and any(output.iterdir()))):
        raise ConfigError(f"--output: {output} is there already. Give a new folder, or a file that ends in .zip.")
    check_output(output.absolute().parent)


# -- the parts


def _parts(model: Source, licence: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of each part but the manifest; the weights of one job at a time."""
    sizes = {}
    for name, job in model.jobs.items():
        tensors = read_weights(job)
        sizes[name] = weights_bytes(tensors)
        weights = save({key: tensor.contiguous().clone() for key, tensor in tensors.items()})
        yield f"{name}/models/model.safetensors", weights
        yield f"{name}/configs/hyper_parameters.yaml", _yaml(model.plans[name].model_dump(mode="json"))
        algo, _, fold = name.rpartition("_")
        yield f"{name}/job.json", _json(Job(algo=algo, fold=int(fold), state="done").model_dump(mode="json"))
        if job.validation.exists():  # it says whether half precision changes labels; the cases' names stay behind
            scores = read_stored(job.validation, ValidationFile).model_copy(update={"dice": {}})
            yield f"{name}/validation.json", _json(scores.model_dump(mode="json"))
    yield "ensemble/ensemble.json", _json(_spec(model).model_dump(mode="json"))
    if (quality := model.quality) is not None:
        check = quality.check.model_copy(update={"points": ()})  # the cases' names stay behind
        yield "ensemble/quality.json", _json(quality.model_copy(update={"check": check}).model_dump(mode="json"))
    kept = {key: model.settings[key].value for key in KEPT_SETTINGS if key in model.settings}
    kept["inference"] = read_inference(model.run).model_dump(mode="json")
    yield "settings.yaml", _yaml({key: {"value": value, "origin": "packed"} for key, value in kept.items()})
    yield "labels.json", _json(_labels(model))
    if licence:
        yield "LICENSE", f"Licence of the training data, which applies to the model, too:\n\n{licence}\n".encode()
    yield "README.md", card_text(facts_of(model, licence, sizes)).encode()


def _spec(model: Source) -> EnsembleSpec:
    assert model.spec is not None, "no jobs were named"
    return model.spec


def _json(data: object) -> bytes:
    return json_text(data).encode()


def _yaml(data: object) -> bytes:
    return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True).encode()


def _labels(model: Source) -> list[dict[str, object]]:
    """What each value of a label file means."""
    label_map = model.label_map.named
    stored = model.settings.get("codes")
    codes = stored.value if stored is not None and isinstance(stored.value, dict) else {}
    return [
        {
            "name": name,
            "values": list(values),
            "written_as": painted,
            **({"codes": codes[name]} if name in codes else {}),
        }
        for name, values, painted in zip(label_map.names, label_map.values, label_map.painted_values, strict=True)
    ]


def _manifest(model: Source, parts: dict[str, Part]) -> bytes:
    name = model.title
    manifest = Manifest(format=FORMAT, version=__version__, name=name, parts=parts)
    return _json(manifest.model_dump(mode="json"))


def _part(name: str, data: bytes) -> Part:
    if len(data) > MOST_TEXT and not name.endswith(".safetensors"):
        raise WorkspaceError(f"{name}: {len(data)} bytes, more than the {MOST_TEXT} that a packed model may have.")
    return Part(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))


# -- where they go


def _write_zip(file: IO[bytes], model: Source, licence: str) -> None:
    parts = {}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in _parts(model, licence):
            parts[name] = _part(name, data)
            archive.writestr(_entry(name), data)
        archive.writestr(_entry(MANIFEST), _manifest(model, parts))


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, MEMBER_TIME)
    entry.create_system, entry.external_attr = 3, 0o100644 << 16  # as on Unix, on every machine
    return entry


def _write_folder(output: Path, model: Source, licence: str) -> None:
    """The parts in a folder that is there whole or not at all."""
    parts = {}
    with write_folder(output) as folder:
        for name, data in _parts(model, licence):
            parts[name] = _part(name, data)
            write_atomic(folder / name, lambda file, data=data: file.write(data))  # type: ignore[misc]
        write_atomic(folder / MANIFEST, lambda file: file.write(_manifest(model, parts)))
        if output.is_dir():
            output.rmdir()  # empty, as was made sure
