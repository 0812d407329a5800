"""A model in one file: it predicts the same anywhere, holds no more than it must, and hostile ones are refused."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
from test_predict import write_image
from tiny_jobs import make_job, tiny_plan

import autoseg
from autoseg.cli.main import run_command
from autoseg.ensemble.predict import load_from, predict_files
from autoseg.errors import AutosegError, ConfigError, WorkspaceError
from autoseg.export.markdown import cell
from autoseg.export.methods import read_methods
from autoseg.export.pack import pack
from autoseg.inference.ensemble_spec import EnsembleSpec, seal_ensemble
from autoseg.inference.postprocess import ClassRule
from autoseg.inference.seals import seal_job
from autoseg.version import __version__
from autoseg.workspace import archive as archive_module
from autoseg.workspace.archive import MANIFEST, opened_model
from autoseg.workspace.files import write_json, write_yaml
from autoseg.workspace.workspace import Workspace

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trained jobs of different voxel sizes, a locator, and an ensemble with postprocessing; not to be changed."""
    root = tmp_path_factory.mktemp("run") / "work"
    members = (("segresnet", 0), ("swinunetr", 0))
    for algo, fold in members:
        spacing = (1.2, 1.2, 1.6) if algo == "segresnet" else (1.0, 1.5, 1.5)
        seal_job(make_job(root, algo, fold, seed=len(algo), resample_resolution=spacing, tta=True, mirror_axes=(0,)))
    make_job(root, "locator", 0, seed=7)
    spec = EnsembleSpec(
        name="segresnet+swinunetr",
        method="auto",
        combine="mean",
        members=members,
        classes=("sphere", "box"),
        dice=0.5,
        postprocessing=(ClassRule(name="box", largest=True, dice_before=0.4, dice_after=0.5),),
        version="0",
    )
    workspace = Workspace(root)
    write_json(workspace.ensemble_spec, spec.model_dump(mode="json"))
    seal_ensemble(workspace, spec)
    inference = {"slice_run": ["sphere"], "overlap": 0.5}
    data = root.parent / "data"
    write_json(data / "dataset.json", {"licence": "CC-BY-SA 4.0", "training": []})
    stored = {"name": "phantom | organs", "modality": "CT", "datalist": str(data / "dataset.json"), "dataroot": "/data"}
    stored["codes"] = {"box": "SCT,123037004,Anatomical Structure"}  # type: ignore[assignment]
    write_yaml(
        workspace.settings,
        {key: {"value": v, "origin": f"{root}/input.yaml:3"} for key, v in {**stored, "inference": inference}.items()},
    )
    return root


@pytest.fixture(scope="module")
def packed(work_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run above in one file; not to be changed."""
    return pack(work_dir, tmp_path_factory.mktemp("packed") / "model.zip").path


# -- the same labels


def test_another_folder_without_a_home_gives_the_same_bytes(work_dir: Path, packed: Path, tmp_path: Path) -> None:
    affine = np.array([[0, 0, 1.1, 0], [-0.9, 0, 0, 4], [0, 2.5, 0, 9], [0, 0, 0, 1.0]])
    image = write_image(tmp_path / "images" / "a.nii.gz", affine, shape=(24, 20, 22))
    assert predict_files(work_dir, image, tmp_path / "run.nii.gz", device="cpu") == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(packed, elsewhere / "renamed.zip")
    environment = {key: value for key, value in os.environ.items() if key not in ("HOME", "USER", "XDG_CACHE_HOME")}
    environment["PYTHONPATH"] = str(ROOT)
    words = ["predict", "--model", "renamed.zip", "--image", str(image), "--output", "labels.nii.gz", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "autoseg", *words],
        cwd=elsewhere, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours, theirs = (nib.load(p) for p in (tmp_path / "run.nii.gz", elsewhere / "labels.nii.gz"))
    assert len(np.unique(np.asarray(ours.dataobj))) > 1
    assert (tmp_path / "run.nii.gz").read_bytes() == (elsewhere / "labels.nii.gz").read_bytes()
    assert sorted(p.name for p in elsewhere.iterdir()) == ["labels.nii.gz", "renamed.zip"]


@pytest.mark.parametrize("options", [{}, {"fast": True}, {"algo": "swinunetr"}, {"mirror": False, "overlap": 0.0}])
def test_every_way_to_predict_gives_the_same(work_dir: Path, packed: Path, options: dict[str, object]) -> None:
    image = np.random.default_rng(1).normal(size=(26, 22, 20)).astype(np.float32)
    ours, theirs = (autoseg.Segmenter(path, device="cpu", **options).predict(image) for path in (work_dir, packed))
    np.testing.assert_array_equal(ours.labels, theirs.labels)
    assert len(np.unique(ours.labels)) > 1
    assert theirs.classes == {"sphere": (1,), "box": (2,)}


def test_a_folder_in_the_layout_of_hugging_face_predicts_and_is_checked(work_dir: Path, tmp_path: Path) -> None:
    folder = pack(work_dir, tmp_path / "hub" / "model").path
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    image = np.random.default_rng(1).normal(size=(20, 20, 20)).astype(np.float32)
    ours, theirs = (autoseg.Segmenter(path, device="cpu").predict(image) for path in (work_dir, folder))
    np.testing.assert_array_equal(ours.labels, theirs.labels)
    plan = folder / "segresnet_0" / "configs" / "hyper_parameters.yaml"
    plan.write_text(plan.read_text().replace("overlap: 0.25", "overlap: 0.26"))
    with pytest.raises(WorkspaceError, match=r"segresnet_0/configs/hyper_parameters\.yaml is not what was packed"):
        load_from(folder)


def test_a_real_run_packs_and_predicts(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its datalist, statistics, scores and validation hold names of cases and paths; none of them travels."""
    target = tmp_path / "model.zip"
    work, scan = finished_run / "work_dir", next((finished_run / "images").iterdir())
    assert run_command(["pack", "--work_dir", str(work), "--output", str(target), "--licence", "CC0 1.0"]) == 0
    line = capsys.readouterr().out
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    assert re.fullmatch(rf"{target}: \d models?, \d+\.\d MB, SHA-256 {digest}\n", line)
    for model, name in ((["--work_dir", str(work)], "run"), (["--model", str(target)], "zip")):
        assert run_command(["predict", *model, "--image", str(scan), "--output", str(tmp_path / f"{name}.nii")]) == 0
    assert (tmp_path / "run.nii").read_bytes() == (tmp_path / "zip.nii").read_bytes()

    cases = [p.name.partition(".")[0].removesuffix("_0000") for p in (finished_run / "images").iterdir()]
    texts = text_parts(target)
    for word in (*cases, str(finished_run), str(Path.home()), "phantom_", "/tmp"):
        assert [name for name, text in texts.items() if word in text] == [], word
    card = texts["README.md"]
    front = yaml.safe_load(card.split("---")[1])
    assert front["license_name"] == "CC0 1.0"
    assert front["pipeline_tag"] == "image-segmentation"
    scores = json.loads((work / "ensemble" / "scores.json").read_text())
    for entry in scores["dice"]["classes"]:
        row = next(line for line in card.splitlines() if line.startswith(f"| {entry['name']} | "))
        value = {"sphere": 1, "box": 2}[entry["name"]]
        assert row.startswith(f"| {entry['name']} | {value} | {entry['num']} | {entry['mean']:.4f} (")
    assert "| Voxel size (mm) | " in card
    assert "8 cases were analysed" in card
    # What the card says beside its tables is what `autoseg methods` says, without footnotes.
    methods = re.sub(r"\[\^\d+\]", "", read_methods(work).text)
    shared = [line for line in card.splitlines() if line.startswith(("We report", "On ", "Of each model", "Networks "))]
    assert len(shared) >= 3
    assert [line for line in shared if line not in methods] == []
    assert "## Intended use\n\n**You must write**" in card
    assert "## Limits\n\n- " in card
    assert f"Software: autoseg {__version__}" in card
    assert "- [@segresnet]: Myronenko A." in card
    assert texts["LICENSE"].endswith("\nCC0 1.0\n")


# -- what it holds


def test_a_tolerance_per_class_stands_in_the_card(finished_run: Path, tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("cache", "held_out", "out_of_fold")
    work_dir = Path(shutil.copytree(finished_run / "work_dir", tmp_path / "work_dir", ignore=ignored))
    scores = work_dir / "ensemble" / "scores.json"
    stored = json.loads(scores.read_text())
    stored["tolerance_mm"] = {"sphere": 5.0, "box": 0.5}
    scores.write_text(json.dumps(stored))
    card = text_parts(pack(work_dir, tmp_path / "model.zip").path)["README.md"]
    assert "surface Dice (nsd) at a tolerance of sphere 5 mm, box 0.5 mm. Cases of another hospital" in card
    assert "Surface Dice [@nsd] accepts 5 mm for sphere and 0.5 mm for box." in card


def text_parts(path: Path) -> dict[str, str]:
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name).decode() for name in file.namelist() if not name.endswith(".safetensors")}


def test_it_holds_what_predicts_and_no_more(work_dir: Path, packed: Path) -> None:
    with zipfile.ZipFile(packed) as file:
        names = set(file.namelist())
        manifest = json.loads(file.read(MANIFEST))
        for name, part in manifest["parts"].items():
            data = file.read(name)
            assert part == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    jobs = [f"{job}_0/{part}" for job in ("segresnet", "swinunetr", "locator") for part in PARTS_OF_A_JOB]
    assert names == {MANIFEST, "README.md", "LICENSE", "labels.json", "settings.yaml", "ensemble/ensemble.json", *jobs}
    assert manifest["format"] == 1
    assert manifest["name"] == "phantom | organs"
    texts = text_parts(packed)
    assert [name for name, text in texts.items() if str(work_dir.parent) in text] == []
    assert texts["LICENSE"].endswith("\nCC-BY-SA 4.0\n")
    assert 'license_name: "CC-BY-SA 4.0"' in texts["README.md"]
    assert "# phantom \\| organs\n" in texts["README.md"]
    code = "SCT,123037004,Anatomical Structure"
    assert json.loads(texts["labels.json"]) == [
        {"name": "sphere", "values": [1], "written_as": 1},
        {"name": "box", "values": [2], "written_as": 2, "codes": code},
    ]
    settings = yaml.safe_load(texts["settings.yaml"])
    assert {*settings} == {"name", "modality", "codes", "inference"}
    assert settings["inference"]["value"]["slice_run"] == ["sphere"]


PARTS_OF_A_JOB = ("configs/hyper_parameters.yaml", "job.json", "models/model.safetensors")


def test_the_same_model_packs_to_the_same_bytes(work_dir: Path, packed: Path, tmp_path: Path) -> None:
    assert pack(work_dir, tmp_path / "again.zip").path.read_bytes() == packed.read_bytes()


def test_names_are_no_markup() -> None:
    assert cell("a|b [x](http://y) <b>*\n# c") == r"a\|b \[x\](http://y) \<b\>\*\\n\# c"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root, out: pack(root / "none", out / "m.zip"), "no such work_dir"),
        (lambda root, out: pack(root, out), "is there already. Give a new folder, or a file that ends in .zip"),
        (lambda root, out: pack(out / "model.zip", out / "m.zip"), "packed already"),
        (lambda root, out: pack(root, out / "model.zip" / "m.zip"), "cannot be made"),
    ],
)
def test_what_cannot_be_packed_is_said(
    work_dir: Path, packed: Path, tmp_path: Path, make: Callable[[Path, Path], object], message: str
) -> None:
    shutil.copy(packed, tmp_path / "model.zip")
    with pytest.raises(AutosegError, match=message):
        make(work_dir, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.zip"]


def test_weights_that_were_changed_are_not_packed(work_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "work"
    shutil.copytree(work_dir, copy)
    make_job(copy, "segresnet", 0, seed=99)
    with pytest.raises(WorkspaceError, match="not the weights that training left"):
        pack(copy, tmp_path / "m.zip")
    assert not (tmp_path / "m.zip").exists()


@pytest.mark.parametrize(("flag", "value"), [("--work_dir", "elsewhere"), ("--accept", "true")])
def test_what_has_no_effect_on_a_packed_model_is_said(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str
) -> None:
    words = ["predict", "--model", str(packed), "--image", "a.nii", "--output", str(tmp_path / "b.nii"), flag, value]
    assert run_command(words) == 2
    assert "no effect together with --" in capsys.readouterr().err


# -- hostile ones

Change = Callable[[dict[str, bytes]], None]


def entries_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def zip_of(parts: dict[str, bytes], target: Path, compress: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(target, "w", compress) as file:
        for name, data in parts.items():
            file.writestr(name, data)
    return target


def with_manifest(parts: dict[str, bytes], **changes: object) -> dict[str, bytes]:
    """The parts with a manifest that fits them: whoever is hostile can compute digests, too."""
    manifest = json.loads(parts[MANIFEST]) | {"parts": {}}
    for name, data in parts.items():
        if name != MANIFEST:
            manifest["parts"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    return {**parts, MANIFEST: json.dumps(manifest | changes).encode()}


def adding(name: str, data: bytes = b"x") -> Callable[[Path, Path], Path]:
    return lambda good, target: zip_of(with_manifest({**entries_of(good), name: data}), target)


def changed(**changes: object) -> Callable[[Path, Path], Path]:
    return lambda good, target: zip_of(with_manifest(entries_of(good), **changes), target)


def replaced(name: str, data: bytes, *, honest: bool = True) -> Callable[[Path, Path], Path]:
    """A part with another content; honest: the manifest says so."""

    def make(good: Path, target: Path) -> Path:
        parts = {**entries_of(good), name: data}
        return zip_of(with_manifest(parts) if honest else parts, target)

    return make


def of_ensemble(**changes: object) -> Callable[[Path, Path], Path]:
    """Other values in ensemble.json, with a manifest that fits."""

    def make(good: Path, target: Path) -> Path:
        parts = entries_of(good)
        spec = json.loads(parts["ensemble/ensemble.json"]) | changes
        return zip_of(with_manifest({**parts, "ensemble/ensemble.json": json.dumps(spec).encode()}), target)

    return make


def whole_numbers(good: Path, target: Path) -> Path:
    """Weights that PyTorch would turn into others without a word."""
    import safetensors.torch

    name = "segresnet_0/models/model.safetensors"
    tensors = safetensors.torch.load(entries_of(good)[name])
    return replaced(name, safetensors.torch.save({key: t.long() for key, t in tensors.items()}))(good, target)


def without(name: str) -> Callable[[Path, Path], Path]:
    return lambda good, target: zip_of({n: d for n, d in entries_of(good).items() if n != name}, target)


def edited(edit: Callable[[bytes], bytes]) -> Callable[[Path, Path], Path]:
    def make(good: Path, target: Path) -> Path:
        target.write_bytes(edit(good.read_bytes()))
        return target

    return make


def twice(good: Path, target: Path) -> Path:
    shutil.copy(good, target)
    with zipfile.ZipFile(target, "a") as file, pytest.warns(UserWarning, match="Duplicate name"):
        file.writestr("README.md", b"another")
    return target


def a_link(good: Path, target: Path) -> Path:
    parts = with_manifest({**entries_of(good), "LICENSE": b"/etc/passwd"})
    with zipfile.ZipFile(target, "w") as file:
        for name, data in parts.items():
            entry = zipfile.ZipInfo(name)
            entry.create_system, entry.external_attr = 3, (0o120777 if name == "LICENSE" else 0o100644) << 16
            file.writestr(entry, data)
    return target


def a_bomb(good: Path, target: Path) -> Path:
    parts = with_manifest({**entries_of(good), "LICENSE": bytes(40 << 20)})
    return zip_of(parts, target, zipfile.ZIP_DEFLATED)


def directory_entry(data: bytes, name: str) -> int:
    """Where the entry of a name lies in the table of contents."""
    place = data.rindex(name.encode()) - 46
    assert data[place : place + 4] == b"PK\1\2"
    return place


def encrypted(data: bytes) -> bytes:
    place = directory_entry(data, "README.md") + 8
    return data[:place] + struct.pack("<H", 1) + data[place + 2 :]


def larger(data: bytes) -> bytes:
    """An entry that says it has 4 GB, both compressed and not."""
    place = directory_entry(data, "README.md") + 20
    return data[:place] + struct.pack("<II", 0xF0000000, 0xF0000000) + data[place + 8 :]


def overlapping(data: bytes) -> bytes:
    """All weights say that they lie over each other, so that together they have more bytes than the file."""
    names = [f"{job}_0/models/model.safetensors" for job in ("segresnet", "swinunetr")]
    for name in names:
        place = directory_entry(data, name) + 20
        data = data[:place] + struct.pack("<II", len(data) - 1, len(data) - 1) + data[place + 8 :]
    return data


def many(good: Path, target: Path) -> Path:
    return zip_of({f"{n}.txt": b"" for n in range(archive_module.MOST_PARTS + 1)}, target)


def hidden_table(data: bytes) -> bytes:
    """The second record, for files of over 4 GiB, says that the table of contents has a gigabyte."""
    record = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, 1 << 30, 0)
    return data[:-22] + record + struct.pack("<4sIQI", b"PK\6\7", 0, len(data) - 22, 1) + data[-22:]


def newer_autoseg(good: Path, target: Path) -> Path:
    return changed(version="99.0.0")(good, target)


def nothing_but_text(good: Path, target: Path) -> Path:
    target.write_text("no zip\n")
    return target


def a_pickle() -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, buffer)
    return buffer.getvalue()


HOSTILE: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "slip": (adding("../../evil.py"), "leads out of the folder"),
    "slip inside": (adding("segresnet_0/../../evil.py"), "leads out of the folder"),
    "absolute": (adding("/tmp/evil.py"), "has an absolute path"),
    "drive": (adding("C:/evil.py"), "has an absolute path"),
    "backslash": (adding("..\\evil.py"), "has a backslash in its path"),
    "control character": (adding("a\nb"), "has no name, or a control character in it"),
    "link": (a_link, "'LICENSE' is a link"),
    "bomb": (a_bomb, "is compressed; parts of a model are stored as they are"),
    "size that is none": (edited(larger), "says it has 4026531840 bytes, more than the file holds"),
    "overlapping": (edited(overlapping), "so they lie over each other"),
    "too many": (many, "2001 entries in a table of [0-9]+ bytes, expected at most 2000"),
    "hidden table": (edited(hidden_table), "1 entries in a table of 1073741824 bytes"),
    "twice": (twice, "'README.md' is there 2 times"),
    "encrypted": (edited(encrypted), "'README.md' is encrypted"),
    "other content": (replaced("labels.json", b"[]", honest=False), "labels.json has 2 bytes, but [0-9]+ when"),
    "other digest": (
        lambda good, target: replaced("labels.json", entries_of(good)["labels.json"].swapcase(), honest=False)(
            good, target
        ),
        "labels.json is not what was packed: its SHA-256 differs",
    ),
    "missing part": (without("segresnet_0/job.json"), "segresnet_0/job.json is missing"),
    "part that is not named": (
        lambda good, target: zip_of({**entries_of(good), "autoseg/run.py": b"x"}, target),
        "holds 'autoseg/run.py', which manifest.json does not name",
    ),
    "part of nothing": (adding("segresnet_0/models/model.pt", a_pickle()), "which is no part of a model"),
    "job of nothing": (adding("evil_0/job.json"), "which is no part of a model"),
    "no manifest": (without(MANIFEST), "a zip without manifest.json"),
    "manifest that is none": (replaced(MANIFEST, b"{", honest=False), "manifest.json: not valid JSON"),
    "manifest nested too deep": (replaced(MANIFEST, b"[" * 100_000, honest=False), "manifest.json: not valid JSON"),
    "manifest of other keys": (changed(run="import os"), "manifest.json: unknown key run"),
    "newer format": (changed(format=2, version="9.9"), "a packed model of format 2, made by autoseg 9.9; .*Install"),
    "newer autoseg": (newer_autoseg, "written by autoseg 99.0.0, which is newer"),
    "cut off": (edited(lambda data: data[: len(data) // 2]), "not a zip, cut off, or with something behind its end"),
    "more behind it": (edited(lambda data: data + b"x" * 100), "not a zip, cut off, or with something behind its end"),
    "no zip": (nothing_but_text, "not a zip, cut off"),
    "empty": (edited(lambda data: b""), "not a zip, cut off"),
    "empty zip": (lambda good, target: zip_of({}, target), "a zip without manifest.json"),
    "damaged byte": (
        edited(lambda data: data[:2000] + bytes([data[2000] ^ 1]) + data[2001:]),
        "damaged \\(Bad CRC-32|not what was packed",
    ),
    "pickle as weights": (
        replaced("segresnet_0/models/model.safetensors", a_pickle()),
        r"m\.zip/segresnet_0/models/model\.safetensors: not readable as weights",
    ),
    "weights of another kind": (
        whole_numbers,
        r"segresnet_0/models/model\.\w+: [\w.]+ is int64, expected float32",
    ),
    "member many times": (
        of_ensemble(members=[["segresnet", 0]] * 10_000),
        r"ensemble\.json: members: segresnet_0 is there more than once",
    ),
    "rule for no class": (
        of_ensemble(postprocessing=[{"name": "lung", "largest": True}]),
        r"ensemble\.json: postprocessing: a rule for lung, which is none of the classes",
    ),
    "class without a value": (
        replaced(
            "segresnet_0/configs/hyper_parameters.yaml",
            json.dumps(tiny_plan(classes=[{"name": "sphere", "values": [1]}]).model_dump(mode="json"))
            .replace("[1]}", "[]}")
            .encode(),
        ),
        r"hyper_parameters\.yaml:1: classes\[0\]\.values: the list is empty\. Give at least one value",
    ),
    "number without end": (
        replaced("settings.yaml", b"name: {value: " + b"1:" * 100_000 + b"1, origin: packed}\n"),
        r"settings\.yaml: .*line 1: a number of 200001 signs",
    ),
    "long text": (
        replaced("README.md", bytes(archive_module.MOST_TEXT + 1)),
        "README.md has 16777217 bytes, expected at most 16777216",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_in_a_sentence(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    make, message = HOSTILE[kind]
    hostile = make(packed, tmp_path / "m.zip")
    write_image(tmp_path / "a.nii.gz")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    words = ["--model", str(hostile), "--image", str(tmp_path / "a.nii.gz"), "--output", str(tmp_path / "out")]
    assert run_command(["predict", *words, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.startswith(f"error: {hostile}")
    assert "Traceback" not in error
    assert len(error.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii.gz", "m.zip", "scratch"]
    assert [*scratch.iterdir()] == []


def test_a_pipe_is_no_model(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.zip")
    with pytest.raises(OSError, match="is a pipe"):
        load_from(tmp_path / "m.zip")


def test_the_unpacked_folder_is_the_users_alone_and_goes(packed: Path) -> None:
    with opened_model(packed) as folder:
        assert folder != packed
        assert folder.stat().st_mode & 0o077 == 0
        assert (folder / "segresnet_0" / "models" / "model.safetensors").stat().st_mode & 0o077 == 0
    assert not folder.exists()


def test_links_out_of_a_packed_folder_are_refused(work_dir: Path, tmp_path: Path) -> None:
    folder = pack(work_dir, tmp_path / "model").path
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to("/etc/hostname")
    with pytest.raises(WorkspaceError, match="a link that leads out"):
        load_from(folder)


def test_an_output_that_cannot_be_is_a_fault_of_the_user(work_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "m.zip").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        pack(work_dir, tmp_path / "m.zip")
