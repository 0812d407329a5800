"""Damaged files: no traceback, nothing that hangs, no label that changes without a word.

Every image is read by nibabel, too, from the whole, unpacked bytes: where nibabel reads it, `predict` must give the
labels that it gives for a sound file of these voxels and this affine; where the gzip stream is damaged, none.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import yaml

from campaigns.common import (
    LIMIT_S,
    Ended,
    Report,
    Row,
    autoseg,
    copy_run,
    label_digests,
    make_data,
    must,
    words_about,
)
from campaigns.mutations import (
    change_text,
    change_value,
    damage_work_dir,
    damaged_nifti,
    damaged_zip,
    nifti_seeds,
    strictly_read,
)

BATCH = 25
"""Damaged images that one command is given at once."""


def go(report: Report, folder: Path, args: argparse.Namespace) -> None:
    images, settings, work_dirs, packs = (4, 4, 3, 3) if args.tiny else (1000, 250, 500, 200)
    images = images if args.images is None else args.images
    settings = settings if args.settings is None else args.settings
    work_dirs = work_dirs if args.work_dirs is None else args.work_dirs
    path = make_data(folder / "run")
    must(autoseg("run", "--input", path, limit_s=600))
    parts = {
        "images": lambda: fuzz_images(report, folder, images, args.seed),
        "settings": lambda: fuzz_settings(report, folder, settings, args.seed),
        "lists": lambda: fuzz_lists(report, folder, settings, args.seed),
        "packs": lambda: fuzz_packs(report, folder, packs, args.seed),
        "work_dirs": lambda: fuzz_work_dirs(report, folder, work_dirs, args.seed),
    }
    for name, part in parts.items():
        if report.wants(name):
            part()


# -- images


def fuzz_images(report: Report, folder: Path, number: int, seed: int) -> None:
    with (
        report.row("images: predict") as predict,
        report.row("images: analyze --data") as analyze,
        report.row("images: run (analysis, cache, training)") as run,
        report.row("labels: evaluate") as evaluate,
        report.row("labels: merge_masks") as merge,
        report.row("labels: run") as run_labels,
    ):
        for first in range(0, number, BATCH):
            batch = Batch(folder, first, min(BATCH, number - first), seed)
            batch.predict(predict)
            batch.analyze(analyze)
            batch.run(run, "image")
            batch.evaluate(evaluate)
            batch.merge(merge)
            batch.run(run_labels, "label")
            shutil.rmtree(batch.folder)


class Batch:
    """Some damaged images and as many damaged labels, and what every command makes of them."""

    def __init__(self, folder: Path, first: int, number: int, seed: int) -> None:
        self.run_folder = folder / "run"
        self.folder = Path(tempfile.mkdtemp(prefix="batch-", dir=folder))
        self.what: dict[str, str] = {}
        self.sound: dict[str, tuple[np.ndarray, np.ndarray] | None] = {}
        self.broken: set[str] = set()
        """Names of files whose gzip stream is damaged."""
        self.files: dict[str, Path] = {}
        case = self.run_folder / "images" / "phantom_000.nii.gz"
        label = self.run_folder / "labels" / "phantom_000.nii.gz"
        seeds = {"image": nifti_seeds(case), "label": nifti_seeds(label)}
        for kind in ("image", "label"):
            (self.folder / kind).mkdir()
            for index in range(first, first + number):
                rng = random.Random(f"{seed} {kind} {index}")
                what, data, suffix = damaged_nifti(seeds[kind], rng)
                name = f"{kind[0]}{index:05d}"
                self.files[name] = self.folder / kind / f"{name}{suffix}"
                self.files[name].write_bytes(data)
                self.what[name] = what
                try:
                    self.sound[name] = strictly_read(data)
                except ValueError:
                    self.sound[name] = None
                    self.broken.add(name)

    def names(self, kind: str) -> list[str]:
        return sorted(name for name in self.files if name[0] == kind[0])

    def check(self, row: Row, ended: Ended, names: list[str]) -> None:
        """Note a command's own faults, with the files that it was given."""
        row.tried += len(names)
        for fault in ended.faults:
            row.fault(fault, words=ended.words, files={n: self.what[n] for n in names}, said=ended.tail)

    def predict(self, row: Row) -> None:
        given, twins = self.folder / "image", self.folder / "twins"
        twins.mkdir()
        for name in self.names("image"):
            if self.sound[name] is not None:
                voxels, affine = self.sound[name]
                if np.isfinite(voxels).all() and np.isfinite(affine).all() and np.abs(voxels).max(initial=0) < 3e38:
                    try:
                        twin = nibabel.Nifti1Image(voxels.astype(np.float32), affine)
                    except nibabel.spatialimages.HeaderDataError:  # no grid at all
                        continue
                    twin.header.set_xyzt_units("mm")
                    nibabel.save(twin, twins / f"{name}.nii.gz")
        words = ["predict", "--work_dir", self.run_folder / "work_dir", "--device", "cpu"]
        ended = autoseg(*words, "--image", given, "--output", self.folder / "out")
        self.check(row, ended, self.names("image"))
        if any(twins.iterdir()):
            must_end = autoseg(*words, "--image", twins, "--output", self.folder / "out_twins")
            self.check(row, must_end, [])
        for name in self.names("image"):
            self.compare(row, name, ended.stderr)

    def compare(self, row: Row, name: str, said: str) -> None:
        out, twin = (self.folder / place / f"{name}.nii.gz" for place in ("out", "out_twins"))
        about = [line for line in said.splitlines() if name in line and "->" not in line]
        if not out.exists():
            row.count("refused")
            if not about:
                row.fault("no label and no word", file=name, what_was_done=self.what[name])
            return
        if name in self.broken:
            row.fault("a damaged stream was read", file=name, what_was_done=self.what[name])
        elif twin.exists():
            both = [nibabel.load(path) for path in (out, twin)]
            voxels = [np.asarray(image.dataobj) for image in both]
            same = voxels[0].shape == voxels[1].shape and (voxels[0] == voxels[1]).all()
            same = same and np.allclose(both[0].affine, both[1].affine, rtol=1e-4, atol=1e-3)
            if same:
                row.count("labels as of the sound twin")
            elif about:
                row.count("other labels, and said")
            else:
                row.fault("labels are not those of the sound twin", file=name, what_was_done=self.what[name])
        else:
            row.count("labels; no twin")
            if not about:
                row.fault("nibabel refuses it, autoseg says nothing", file=name, what_was_done=self.what[name])

    def analyze(self, row: Row) -> None:
        ended = autoseg("analyze", "--data", self.folder / "image", cwd=self.folder)
        self.check(row, ended, self.names("image"))
        row.count(f"exit code {ended.code}")
        for name in self.broken & set(self.names("image")):
            if name not in ended.stdout + ended.stderr:
                row.fault("a damaged stream is not named", file=name, what_was_done=self.what[name])

    def run(self, row: Row, kind: str) -> None:
        """A run whose training cases are sound but for some; the faulty ones are set aside."""
        copied = self.folder / f"run_{kind}"
        copied.mkdir()
        for place in ("images", "labels"):
            shutil.copytree(self.run_folder / place, copied / place)
        listed = json.loads((self.run_folder / "datalist.json").read_text())
        image, label = "images/phantom_000.nii.gz", "labels/phantom_000.nii.gz"
        for index, name in enumerate(self.names(kind)):
            own = str(self.files[name])
            place = copied / ("images" if kind == "image" else "labels") / self.files[name].name
            shutil.copyfile(own, place)
            inner = str(place.relative_to(copied))
            pair = {"image": inner, "label": label} if kind == "image" else {"image": image, "label": inner}
            if kind == "label":  # an image of its own, or all but the first count as doubles
                own_image = copied / "images" / f"of_{name}.nii.gz"
                loaded = nibabel.load(copied / image)
                voxels = np.asarray(loaded.dataobj).copy()
                voxels[0, 0, 0] = index + 1
                nibabel.save(nibabel.Nifti1Image(voxels, loaded.affine, loaded.header), own_image)
                pair["image"] = str(own_image.relative_to(copied))
            listed["training"].append({**pair, "fold": index % 2})
        (copied / "datalist.json").write_text(json.dumps(listed))
        text = (self.run_folder / "input.yaml").read_text() + "on_fault: skip\n"
        (copied / "input.yaml").write_text(text)
        ended = autoseg("run", "--input", copied / "input.yaml", limit_s=5 * LIMIT_S)
        self.check(row, ended, self.names(kind))
        row.count(f"exit code {ended.code}")
        jobs = [json.loads(path.read_text()) for path in copied.glob("work_dir/*_?/job.json")]
        if ended.code == 1 or any(job["state"] != "done" for job in jobs):
            row.fault("a job failed of what the analysis let pass", said=ended.tail, jobs=jobs)
        faults = copied / "work_dir" / "faults.json"
        told = faults.read_text() if faults.exists() else ended.stderr
        for name in self.broken & set(self.names(kind)):
            if name not in told:
                row.fault("a damaged stream is not named", file=name, what_was_done=self.what[name])

    def evaluate(self, row: Row) -> None:
        truths = self.folder / "truths"
        truths.mkdir()
        for name in self.names("label"):
            shutil.copyfile(self.run_folder / "labels" / "phantom_000.nii.gz", truths / f"{name}.nii.gz")
        for words in (
            ("--predictions", self.folder / "label", "--labels", truths),
            ("--predictions", truths, "--labels", self.folder / "label"),
        ):
            ended = autoseg("evaluate", *words, cwd=self.folder)
            self.check(row, ended, self.names("label"))
            row.count(f"exit code {ended.code}")
            for name in self.broken & set(self.names("label")):
                if not any(name in line for line in ended.stderr.splitlines()):
                    row.fault("a damaged stream is not named", file=name, what_was_done=self.what[name])

    def merge(self, row: Row) -> None:
        masks = self.folder / "masks"
        for name in self.names("label"):
            (masks / name).mkdir(parents=True)
            target = masks / name / f"liver{''.join(self.files[name].suffixes)}"
            shutil.copyfile(self.files[name], target)
        ended = autoseg("merge_masks", masks, "--output", self.folder / "merged", cwd=self.folder)
        self.check(row, ended, self.names("label"))
        row.count(f"exit code {ended.code}")


# -- settings and lists


def fuzz_settings(report: Report, folder: Path, number: int, seed: int) -> None:
    with report.row("input.yaml: analyze, generate") as row:
        text = (folder / "run" / "input.yaml").read_text()
        for index in range(number):
            rng = random.Random(f"{seed} settings {index}")
            data = yaml.safe_load(text)
            if rng.random() < 0.6:
                extra = rng.choice(sorted(EXTRA))
                data[extra] = EXTRA[extra]
                what = "; ".join(change_value(data, rng) for _ in range(rng.randint(1, 2)))
                changed = yaml.safe_dump(data, allow_unicode=True).encode("utf-8", "surrogatepass")
            else:
                what, changed = change_text(text, rng)
            try_settings(row, folder, f"{index}: {what}", {"input.yaml": changed})


EXTRA = {
    "class_names": [{"name": "all", "index": [1, 2]}, "box"],
    "class_weights": {"sphere": 2.0},
    "ensemble": {"method": "best_n", "max_time": "15s"},
    "inference": {"overlap": 0.5},
    "dints": {"channel_mul": 0.5},
    "pseudolabel": {"rounds": 2},
    "budget": "1m",
    "resample_resolution": [1.0, 1.0, 1.0],
}
"""More of what may stand in an input.yaml."""


def fuzz_lists(report: Report, folder: Path, number: int, seed: int) -> None:
    with report.row("datalist.json: analyze, generate") as row:
        text = (folder / "run" / "datalist.json").read_text()
        for index in range(number):
            rng = random.Random(f"{seed} lists {index}")
            if rng.random() < 0.7:
                data = json.loads(text)
                what = "; ".join(change_value(data, rng, ()) for _ in range(rng.randint(1, 3)))
                changed = json.dumps(data, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
            else:
                what, changed = change_text(text, rng)
            try_settings(row, folder, f"{index}: {what}", {"datalist.json": changed})


def try_settings(row: Row, folder: Path, what: str, files: dict[str, bytes]) -> None:
    """Analyse and plan with changed files; nothing may be written but in the folder itself."""
    row.tried += 1
    outer = Path(tempfile.mkdtemp(prefix="settings-", dir=folder))
    place = outer / "in" / "ner"
    place.mkdir(parents=True)
    for name in ("images", "labels", "input.yaml", "datalist.json"):
        source = folder / "run" / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, place / name)
    for name, data in files.items():
        (place / name).write_bytes(data)
    for stage in ("analyze", "generate"):
        ended = autoseg(stage, "--input", place / "input.yaml", cwd=place)
        for fault in ended.faults:
            row.fault(fault, stage=stage, what_was_done=what, said=ended.tail)
        if ended.code != 0:
            break
    row.count(f"{stage} ended with {ended.code}")
    if sorted(p.name for p in (*outer.iterdir(), *(outer / "in").iterdir())) != ["in", "ner"]:
        row.fault("written outside its folder", what_was_done=what)
    shutil.rmtree(outer)


# -- packed models


def fuzz_packs(report: Report, folder: Path, number: int, seed: int) -> None:
    with report.row("packed model: predict") as row:
        pack, image = folder / "model.zip", folder / "run" / "images" / "phantom_001.nii.gz"
        must(autoseg("pack", "--work_dir", folder / "run" / "work_dir", "--output", pack))
        sound, output = pack.read_bytes(), folder / "packed" / "a.nii.gz"
        words = ["predict", "--model", pack, "--image", image, "--output", output]
        must(autoseg(*words))
        expected = label_digests(output.parent)
        for index in range(number):
            shutil.rmtree(output.parent)
            what, data = damaged_zip(sound, random.Random(f"{seed} pack {index}"))
            pack.write_bytes(data)
            row.tried += 1
            ended = autoseg(*words)
            row.count(f"{ended.code}")
            for fault in ended.faults:
                row.fault(fault, what_was_done=f"{index}: {what}", said=ended.tail)
            output.parent.mkdir(exist_ok=True)
            if ended.code == 0 and label_digests(output.parent) != expected:
                row.fault("other labels", what_was_done=f"{index}: {what}", said=ended.tail)


# -- work_dirs


def fuzz_work_dirs(report: Report, folder: Path, number: int, seed: int) -> None:
    with (
        report.row("work_dir: status") as status,
        report.row("work_dir: predict") as predict,
        report.row("work_dir: run") as run,
        report.row("work_dir: predict after the run") as after,
        report.row("work_dir: report, explain") as shown,
    ):
        image = folder / "run" / "images" / "phantom_001.nii.gz"
        clean = copy_run(folder / "run", folder / "damaged")
        usual = {name: trial(clean, image, name) for name in ("predict", "run")}
        expected = label_digests(clean / "work_dir") | label_digests(clean / "out")
        for index in range(number):
            rng = random.Random(f"{seed} work_dir {index}")
            place = copy_run(folder / "run", folder / "damaged")
            what = "; ".join(damage_work_dir(place / "work_dir", rng) for _ in range(rng.choice((1, 1, 1, 2))))
            what = f"{index}: {what}"
            trials = [("status", status), ("predict", predict), ("run", run), ("predict", after)]
            if index % 5 == 0:
                trials += [("report", shown), ("explain", shown)]
            for name, row in trials:
                shutil.rmtree(place / "out", ignore_errors=True)
                row.tried += 1
                ended = trial(place, image, name)
                row.count(f"{ended.code}")
                for fault in ended.faults:
                    row.fault(fault, words=ended.words, what_was_done=what, said=ended.tail)
                if name in ("predict", "run") and ended.code == 0:
                    compare_labels(row, place, expected, ended, usual[name], what, name)


def trial(place: Path, image: Path, name: str) -> Ended:
    work_dir = place / "work_dir"
    words = {
        "status": ["status", "--work_dir", work_dir],
        "predict": ["predict", "--work_dir", work_dir, "--image", image, "--output", place / "out" / "a.nii.gz"],
        "run": ["run", "--input", place / "input.yaml"],
        "report": ["report", "--work_dir", work_dir],
        "explain": ["explain", "--work_dir", work_dir],
    }[name]
    return autoseg(*words, cwd=place, limit_s=LIMIT_S)


def compare_labels(
    row: Row, place: Path, expected: dict[str, str], ended: Ended, usual: Ended, what: str, name: str
) -> None:
    """A label that is another than without the damage needs a word."""
    actual = label_digests(place / ("out" if name == "predict" else "work_dir"))
    own = {key for key in expected if (key == "a.nii.gz") == (name == "predict")}
    other = sorted(key for key in own if actual.get(key) != expected[key])
    if not other:
        row.count("labels equal")
        return
    if all(key in what for key in other):  # a result that nothing is made from; the damage is in it and nowhere else
        row.count("the damaged label itself")
        return
    said = words_about(ended.stderr, usual.stderr)
    if said:
        row.count("labels differ, and said")
        row.details.append({"what_was_done": what, "labels": other[:5], "said": list(said)[:8]})
    else:
        row.fault("labels differ without a word", what_was_done=what, labels=other[:5])
