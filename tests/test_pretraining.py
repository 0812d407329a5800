"""Encoders that learn from images alone: damage, losses, images that may be seen, and the trainer's promises."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from plans import tiny_plan
from torch import nn

from autoseg.config.settings import PretrainSettings
from autoseg.data.datalists.cases import Case, Datalist
from autoseg.errors import ConfigError
from autoseg.networks import build_network, is_encoder, network_file
from autoseg.plan import Plan
from autoseg.pretraining.images import image_sets, lesson_of
from autoseg.pretraining.network import Reconstructor, encoder_weights
from autoseg.pretraining.plan import pretraining_plan
from autoseg.pretraining.tasks import ImageBatches, ImageTask, damaged, drawing_error, image_loss
from autoseg.pretraining.views import block_mask, inner_cutout, make_view, outer_cutout, shuffle_blocks
from autoseg.training.batches import Samples
from autoseg.training.cache import CachedCase
from autoseg.training.errors import Interrupted
from autoseg.training.trainer import Trainer
from autoseg.workspace.jobs import JobDir
from autoseg.workspace.pretraining import Lesson

torch.set_num_threads(1)
CPU = torch.device("cpu")
PRETRAINED = ("segresnet", "resenc", "swinunetr", "unetr")


def lesson(method: str, **changes: Any) -> Lesson:
    values = {"mask_share": 0.75, "mask_block": 16, "temperature": 0.05, "for_all_folds": True, "all_images": False}
    names: dict[str, Any] = {"training": (), "validation": (), "roles": {}}
    return Lesson.model_validate({"method": method, **values, **names, **changes})


# -- damage


@pytest.mark.parametrize(
    ("shape", "block", "share", "edges"),
    [
        ((64, 64, 64), 16, 0.75, (16, 16, 16)),
        ((32, 16, 16), 16, 0.6, (8, 4, 4)),
        ((24, 20, 18), 5, 0.75, (5, 5, 4)),
        ((2, 2, 2), 16, 0.9, (1, 1, 1)),
        ((1, 16, 16), 16, 0.01, (1, 4, 4)),
    ],
)
def test_masks_are_blocks_and_their_share_is_kept(
    shape: tuple[int, int, int], block: int, share: float, edges: tuple[int, int, int]
) -> None:
    mask = block_mask(np.random.default_rng(3), shape, block, share)
    assert mask.shape == shape
    counts = [math.ceil(s / e) for s, e in zip(shape, edges, strict=True)]
    masked = 0
    for place in np.ndindex(*counts):
        inside = mask[tuple(slice(p * e, (p + 1) * e) for p, e in zip(place, edges, strict=True))]
        assert inside.all() or not inside.any(), "whole blocks"
        masked += bool(inside.all())
    total = math.prod(counts)
    assert masked == min(max(1, round(share * total)), total - 1)
    assert 0 < mask.sum() < mask.size
    other = block_mask(np.random.default_rng(4), shape, block, share)
    assert total < 3 or (other != mask).any()


def patch(channels: int = 2, shape: tuple[int, int, int] = (48, 40, 32)) -> np.ndarray:
    """Every voxel another number, so that what is where can be told."""
    size = channels * math.prod(shape)
    return np.random.default_rng(0).permutation(size).reshape(channels, *shape).astype(np.float32)


def test_an_inner_cutout_fills_holes_and_an_outer_one_leaves_windows() -> None:
    original = patch()
    inner = inner_cutout(np.random.default_rng(1), original)
    outer = outer_cutout(np.random.default_rng(1), original)
    for view in (inner, outer):
        assert view.min() >= original.min()
        assert view.max() <= original.max()
        assert view.dtype == np.float32
    kept_inside = (inner == original).all(0)
    kept_outside = (outer == original).all(0)
    # Six holes of a twentieth to a third of each edge cover little; six windows of a fifth to two thirds, not all.
    assert 1 - 6 / 27 - 0.01 <= kept_inside.mean() < 1
    assert 6 * 0.2**3 / 6 < kept_outside.mean() < 0.95
    assert original.tolist() == patch().tolist(), "the patch itself is not changed"


def test_shuffled_voxels_stay_near_their_place_and_channels_together() -> None:
    original = patch(shape=(96, 96, 96))
    view = shuffle_blocks(np.random.default_rng(1), original)
    assert np.array_equal(np.sort(view.ravel()), np.sort(original.ravel())), "none is lost and none is made"
    moved = (view != original).any(0)
    # Of a block of 512 voxels one stays in its place on average; these ten blocks do not overlap.
    assert 10 * 8**3 - 20 <= moved.sum() <= 10 * 8**3
    pairs = dict(zip(original[0].ravel().tolist(), original[1].ravel().tolist(), strict=True))
    assert all(pairs[a] == b for a, b in zip(view[0].ravel().tolist(), view[1].ravel().tolist(), strict=True))
    place_of = {value: place for place, value in np.ndenumerate(original[0])}
    for place in np.argwhere(moved):
        came = place_of[float(view[0][tuple(place)])]
        assert max(abs(a - b) for a, b in zip(came, place.tolist(), strict=True)) < 8


def test_a_view_is_a_function_of_its_random_state() -> None:
    views = [make_view(np.random.default_rng(seed), patch()) for seed in (5, 5, 6)]
    assert np.array_equal(views[0], views[1])
    assert not np.array_equal(views[0], views[2])


# -- losses


def nt_xent(first: np.ndarray, second: np.ndarray, temperature: float) -> float:
    """SimCLR's loss, pair by pair: of 2 N views each has one that it belongs to, and 2 N - 2 that it does not."""
    views = np.concatenate([first, second])
    views = views / np.linalg.norm(views, axis=1, keepdims=True)
    num, losses = len(first), []
    for i in range(2 * num):
        likeness = {j: math.exp(float(views[i] @ views[j]) / temperature) for j in range(2 * num) if j != i}
        losses.append(-math.log(likeness[(i + num) % (2 * num)] / sum(likeness.values())))
    return float(np.mean(losses))


class Drawing(nn.Module):
    """Draws what it is told, and says which features it is told."""

    def __init__(self, drawn: torch.Tensor, features: torch.Tensor) -> None:
        super().__init__()
        self.drawn, self.features = drawn, features

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert len(image) == len(self.drawn)
        return self.drawn, self.features


@pytest.mark.parametrize("num", [1, 2, 5])
def test_the_contrastive_loss_is_its_closed_form(num: int) -> None:
    rng = np.random.default_rng(num)
    target = torch.from_numpy(rng.normal(size=(num, 2, 4, 4, 4)).astype(np.float32))  # two views of one channel
    drawn = torch.from_numpy(rng.normal(size=(2 * num, 1, 4, 4, 4)).astype(np.float32))
    features = torch.from_numpy(rng.normal(size=(2 * num, 6)).astype(np.float32))
    samples = Samples(image=target, target=target)
    plan = tiny_plan()
    loss = image_loss(Drawing(drawn, features), samples, plan, CPU, lesson("contrastive", temperature=0.3))
    l1 = float((drawn.reshape(num, 2, 4, 4, 4) - target).abs().mean())
    contrast = nt_xent(features[0::2].numpy(), features[1::2].numpy(), 0.3)
    assert contrast > 0 or num == 1, "of one pair there is nothing to be unlike"
    assert float(loss) == pytest.approx(l1 * (1 + contrast), rel=1e-5)


def test_the_masked_loss_counts_masked_voxels_alone() -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(size=(3, 2, 8, 8, 8)).astype(np.float32)
    mask = (rng.random((3, 1, 8, 8, 8)) < 0.4).astype(np.float32)
    drawn = image + rng.normal(size=image.shape).astype(np.float32)
    target = torch.from_numpy(np.concatenate([image, mask], 1))
    where = np.broadcast_to(mask, image.shape) == 1
    error = (drawn - image)[where]
    samples = Samples(image=torch.from_numpy(image), target=target)
    how = lesson("mae")
    loss = image_loss(Drawing(torch.from_numpy(drawn), torch.zeros(3, 0)), samples, tiny_plan(), CPU, how)
    assert float(loss) == pytest.approx(float((error**2).mean()), rel=1e-5)
    assert float(drawing_error(how, torch.from_numpy(drawn), target)) == pytest.approx(np.abs(error).mean(), rel=1e-5)


# -- batches


def make_case(seed: int, shape: tuple[int, int, int] = (24, 22, 20)) -> CachedCase:
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(0, 1, size) for size in shape), indexing="ij")
    smooth = np.sum([np.sin(2 * np.pi * (k * axis + rng.random())) for k, axis in enumerate(axes, 1)], axis=0)
    return CachedCase(name=f"case_{seed}", image=smooth[None].astype(np.float16))


CASES = [make_case(i) for i in range(6)]


def small_plan(method: str, algo: str = "segresnet", **settings: Any) -> Plan:
    plan = tiny_plan(algo, **settings)
    settings_ = PretrainSettings(method=method, epochs=3)  # type: ignore[arg-type]
    made = pretraining_plan(plan, settings_, num_images=4, budget_s=None, on_gpu=False)
    return made.model_copy(update={"num_epochs_per_validation": 1})


def test_a_masked_patch_is_itself_where_it_is_seen_after_mirroring_too() -> None:
    batches = ImageBatches(lesson("mae"), small_plan("mae"), CASES, CPU, range(2))
    flips = set()
    for step in range(6):
        flips |= {drawn.flips for drawn in batches.cut(step).draws}
        samples = batches.samples(step)
        image, mask = samples.target[:, :1], samples.target[:, 1:]
        assert torch.equal(samples.image, image * (1 - mask))
        assert 0 < float(mask.mean()) < 1
        assert torch.equal(batches.samples(step).image, samples.image)
    assert len(flips) > 3


def test_two_views_of_a_patch_are_mirrored_with_what_they_were() -> None:
    """Each view's target is the same patch in one of its eight mirrorings."""
    batches = ImageBatches(lesson("contrastive"), small_plan("contrastive"), CASES, CPU, range(2))
    seen_apart = False
    for step in range(4):
        cut, samples = batches.cut(step), batches.samples(step)
        assert samples.image.shape == samples.target.shape == (2, 2, 16, 16, 16)
        views = samples.target.reshape(4, 16, 16, 16)
        for drawn, view, original in zip(cut.draws, views, cut.target[:, 0], strict=True):
            assert torch.equal(view.flip(drawn.flips), original)
        assert torch.equal(cut.target[0], cut.target[1]), "two views of one patch"
        assert not torch.equal(cut.image[0], cut.image[1])
        seen_apart = seen_apart or cut.draws[0].flips != cut.draws[1].flips
    assert seen_apart


# -- networks


@pytest.mark.parametrize("algo", PRETRAINED)
@pytest.mark.parametrize("method", ["mae", "contrastive"])
def test_networks_draw_images_and_all_weights_learn(algo: str, method: str) -> None:
    """Weights without gradients would stop processes that share a training."""
    plan = small_plan(method, algo)
    torch.manual_seed(0)
    network = Reconstructor(plan, compares=method == "contrastive").train()
    case = make_case(1, (40, 40, 40))
    samples = ImageBatches(lesson(method), plan, [case], CPU, range(plan.batch_size)).samples(0)
    image_loss(network, samples, plan, CPU, lesson(method)).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []
    drawn, features = network.eval()(torch.zeros(1, 1, *plan.roi_size))
    assert drawn.shape == (1, 1, *plan.roi_size)
    assert features.shape == (1, 128 if method == "contrastive" else 0)
    kept = encoder_weights(algo, network.state_dict())
    inside = is_encoder(algo)
    own = {n: t.shape for n, t in build_network(tiny_plan(algo)).state_dict().items() if inside(n)}
    assert {n: t.shape for n, t in kept.items()} == own


def test_networks_that_are_not_pretrained_say_so() -> None:
    networks = ("segresnet", "resenc", "swinunetr", "unetr", "dints", "unet", "locator")
    assert tuple(algo for algo in networks if network_file(algo).LATENT) == PRETRAINED


def test_the_plan_is_bent_by_device_and_budget() -> None:
    plan = tiny_plan(batch_size=8)
    contrastive, mae = PretrainSettings(method="contrastive"), PretrainSettings(method="mae")
    on_gpu = pretraining_plan(plan, contrastive, num_images=600, budget_s=None, on_gpu=True, processes=2)
    assert (on_gpu.batch_size, on_gpu.num_epochs, on_gpu.num_steps_per_epoch) == (4, 500, 150)
    assert (on_gpu.optimizer, on_gpu.learning_rate, on_gpu.num_epochs_per_validation) == ("adam", 1e-4, 5)
    on_cpu = pretraining_plan(plan, mae, num_images=600, budget_s=None, on_gpu=False, step_s=2.0)
    assert (on_cpu.batch_size, on_cpu.num_epochs) == (8, 24), "an hour: 75 steps of two seconds an epoch"
    assert (on_cpu.optimizer, on_cpu.learning_rate) == (plan.optimizer, plan.learning_rate)
    briefly = pretraining_plan(plan, mae, num_images=600, budget_s=60.0, on_gpu=False, step_s=2.0)
    assert (briefly.budget_s, briefly.num_epochs) == (60.0, 500), "the budget ends it"
    assert briefly.network["dsdepth"] == 1
    assert (briefly.roi_size, briefly.channels, briefly.seed) == (plan.roi_size, plan.channels, plan.seed)


# -- the trainer


def make_trainer(folder: Path, method: str = "mae", **changes: Any) -> Trainer:
    plan = small_plan(method).model_copy(update=changes)
    task = ImageTask(lesson(method))
    return Trainer(plan, CASES[:4], CASES[4:], JobDir(folder / "segresnet_0"), device=CPU, task=task)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = torch.load(folder / "segresnet_0" / "models" / "model.pt", weights_only=True)
    return loaded


def curve(folder: Path) -> list[dict[str, Any]]:
    clock = ("seconds", "samples_per_s", "time_left_s")
    lines = (folder / "segresnet_0" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize(
    ("method", "batch", "micro_batch"),
    [("mae", 2, 1), ("contrastive", 2, 2), ("contrastive", 3, 3), ("contrastive", 5, 3)],
)
def test_for_want_of_memory_views_of_two_patches_stay_together(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str, batch: int, micro_batch: int
) -> None:
    """Of one pair there is nothing to be unlike, and the contrastive loss is 0: the patch is made smaller instead."""
    trainer = make_trainer(tmp_path, method, batch_size=batch)
    forward, seen = trainer.step.network.forward, []

    def limited(image: torch.Tensor) -> Any:
        seen.append(image.shape)
        if len(seen) == 1 or (micro_batch == batch and len(seen) == 2):
            raise MemoryError
        return forward(image)

    trainer.step.network.forward = limited  # type: ignore[method-assign]
    trainer.train_step()
    assert trainer.micro_batch == micro_batch
    assert ("going on with patches of" in caplog.text) == (micro_batch == batch)
    if method == "contrastive":
        assert min(shape[0] for shape in seen) >= 4, "two views of two patches"


def test_the_best_weights_are_those_of_the_least_error_whatever_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a validation looks at a part of the images: L1 tells far less than 0.01 apart."""
    trainer = make_trainer(tmp_path, num_epochs=3, num_epochs_per_validation=1)
    scores = iter([-0.105, -0.100, -0.104])
    monkeypatch.setattr(trainer.validator, "validate", lambda before_case: next(scores))
    monkeypatch.setattr(trainer.validator, "looks_at_part", lambda: True)
    result = trainer.run()
    assert (result.best_epoch, result.best_score) == (2, -0.100)


@pytest.mark.parametrize("method", ["mae", "contrastive"])
def test_stopped_at_every_step_it_ends_with_the_same_weights(tmp_path: Path, method: str) -> None:
    result = make_trainer(tmp_path / "whole", method).run()
    for step in range(1, result.steps):
        trainer = make_trainer(tmp_path / "parts", method)
        train_step = trainer.train_step

        def one_step(share, train_step=train_step) -> None:  # type: ignore[no-untyped-def]
            train_step(share)
            os.kill(os.getpid(), signal.SIGTERM)

        trainer.train_step = one_step  # type: ignore[method-assign]
        with pytest.raises(Interrupted):
            trainer.run()
        assert trainer.progress.step == step
    make_trainer(tmp_path / "parts", method).run()
    assert result.steps == 6
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert curve(tmp_path / "whole") == curve(tmp_path / "parts")
    assert all(line["val_l1"] > 0 for line in curve(tmp_path / "whole"))


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import autoseg.training.trainer as t
from test_pretraining import make_trainer
trainer = make_trainer(Path(sys.argv[2]))
step = trainer.train_step
def until(share):
    step(share)
    if trainer.progress.step == 2:
        trainer.save()
    if trainer.progress.step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
trainer.train_step = until
trainer.run()
"""


def test_killed_between_two_checkpoints_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    """SIGKILL: nothing can be saved at the last moment."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(Path(__file__).parent), str(tmp_path / "parts")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    trainer = make_trainer(tmp_path / "parts")
    trainer.resume()
    assert 0 < trainer.progress.step < 4
    make_trainer(tmp_path / "parts").run()
    make_trainer(tmp_path / "whole").run()
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


KILLED_IN_WRITES = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_pretraining import make_trainer

def killed_in(number, folder, method):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    sync, left = os.fsync, [number]
    def half_written(file):
        left[0] -= 1
        if not left[0]:
            os.ftruncate(file, os.fstat(file).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        sync(file)
    os.fsync = half_written
    trainer = make_trainer(folder, method)
    trainer.checkpointer.is_due = lambda: True
    trainer.run()
    os._exit(0)

for method in ("mae", "contrastive"):
    number = 1
    while (code := killed_in(number, Path(sys.argv[2]) / method, method)) == -signal.SIGKILL:
        number += 1
    assert code == 0 and number > 4, (code, number)
"""


def test_killed_in_the_middle_of_any_file_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    """SIGKILL in half of a checkpoint, of weights, of the curve: in the first file that is written, the second ..."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED_IN_WRITES)
    command = [sys.executable, str(script), str(Path(__file__).parent), str(tmp_path / "parts")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for method in ("mae", "contrastive"):
        make_trainer(tmp_path / "whole" / method, method).run()
        assert same(weights(tmp_path / "whole" / method), weights(tmp_path / "parts" / method))
        assert curve(tmp_path / "whole" / method) == curve(tmp_path / "parts" / method)


def test_the_seed_decides(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_trainer(tmp_path / name, seed=seed).run()
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_it_learns_to_draw(tmp_path: Path) -> None:
    for method in ("mae", "contrastive"):
        trainer = make_trainer(tmp_path / method, method, num_epochs=40, num_epochs_per_validation=10)
        before = -trainer.validator.validate()
        trainer.run()
        errors = [line["val_l1"] for line in curve(tmp_path / method) if line["val_l1"] is not None]
        assert len(errors) == 4
        assert errors[-1] < 0.7 * before
        assert curve(tmp_path / method)[-1]["best_l1"] == min(errors)


WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch, torch.distributed as dist
torch.set_num_threads(1)
from test_pretraining import make_trainer
from autoseg.training.processes import join_processes
join_processes("cpu")
for method in ("mae", "contrastive"):
    make_trainer(Path(sys.argv[2]) / method, method, batch_size=4).run()
dist.destroy_process_group()
"""


def test_two_processes_pretrain_the_same_weights_as_one(tmp_path: Path) -> None:
    """Of masked patches; views are compared within a process, so that there both merely come to an end."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    make_trainer(tmp_path / "one", batch_size=4).run()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(
        [*command, str(Path(__file__).parent), str(tmp_path / "two")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two" / "mae")
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=1e-4, rtol=1e-3)
    assert weights(tmp_path / "two" / "contrastive").keys() == one.keys()


# -- which images


@pytest.fixture(scope="module")
def image_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve small images, each of its own content."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(12):
        nib.save(nib.Nifti1Image(np.full((4, 4, 4), number, np.int16), np.eye(4)), folder / f"{number}.nii.gz")
    return folder


def case(
    folder: Path, number: int, *, fold: int | None = None, group: str | None = None, labelled: bool = True
) -> Case:
    path = folder / f"{number}.nii.gz"
    return Case(name=f"case_{number}", images=(path,), label=path if labelled else None, fold=fold, group=group)


def names(cases: tuple[Case, ...]) -> list[str]:
    assert all(c.label is None for c in cases), "no labels"
    return sorted(c.name for c in cases)


def test_many_images_beside_the_folds_make_one_pretraining(image_files: Path) -> None:
    training = tuple(case(image_files, n, fold=n % 2, group=f"p{n}") for n in range(3))
    twin = replace(case(image_files, 1, labelled=False), name="twin_of_1")
    same_patient = case(image_files, 4, group="p2", labelled=False)
    unlabeled = (twin, same_patient, *(case(image_files, n, labelled=False) for n in (5, 6, 7)))
    testing = (case(image_files, 8), case(image_files, 9, labelled=False))
    held_back = (case(image_files, 10),)
    datalist = Datalist(training=training, unlabeled=unlabeled, testing=testing, validation=held_back)
    [images] = image_sets(datalist, (0, 1), all_images=False, has_rounds=False)
    assert images.fold is None
    assert images.scored == ()
    assert names(images.cases) == ["case_5", "case_6", "case_7", "case_9"], "neither scored, nor like what is"
    made = lesson_of(images, datalist, PretrainSettings(method="mae"), 0)
    assert made.roles == {"unlabeled": 3, "testing": 1, "training": 0, "validation": 0}
    assert len(made.validation) == 1
    assert sorted([*made.training, *made.validation]) == names(images.cases)
    assert made == lesson_of(images, datalist, PretrainSettings(method="mae"), 0)


def test_few_images_beside_the_folds_make_one_for_each(image_files: Path) -> None:
    training = tuple(case(image_files, n, fold=n % 2, group="p" if n in (0, 2) else None) for n in range(5))
    unlabeled = (case(image_files, 5, labelled=False), case(image_files, 6, group="p", labelled=False))
    datalist = Datalist(training=training, unlabeled=unlabeled, testing=(case(image_files, 8),))
    first, second = image_sets(datalist, (0, 1), all_images=False, has_rounds=False)
    assert (first.fold, second.fold) == (0, 1)
    assert names(first.cases) == ["case_1", "case_3", "case_5"], "fold 0 is scored on patient p, who is case_6, too"
    assert names(second.cases) == ["case_0", "case_2", "case_4", "case_5", "case_6"]
    [shared] = image_sets(
        replace(datalist, unlabeled=(*unlabeled, case(image_files, 7, labelled=False))),
        (0, 1),
        all_images=False,
        has_rounds=True,
    )
    assert shared.fold is None
    assert names(shared.cases) == ["case_5", "case_7"], "rounds have other folds each"


def test_all_images_are_taken_where_asked_for_and_said(image_files: Path) -> None:
    training = tuple(case(image_files, n, fold=n % 2) for n in range(3))
    twin = replace(case(image_files, 1, labelled=False), name="twin_of_1")
    unlabeled = (twin, case(image_files, 5, labelled=False))
    datalist = Datalist(training=training, unlabeled=unlabeled, testing=(case(image_files, 8),))
    [images] = image_sets(datalist, (0, 1), all_images=True, has_rounds=False)
    assert names(images.cases) == ["case_0", "case_1", "case_2", "case_5", "case_8"], "each content once"
    assert images.scored == ("case_0", "case_1", "case_2", "case_8")
    made = lesson_of(images, datalist, PretrainSettings(method="mae", all_images=True), 0)
    assert made.fold_words == (
        "It has seen, without their labels, the images of 4 cases that models are scored on (pretrain.all_images): "
        "scores on them may say a little too much."
    )


def test_too_few_images_are_said(image_files: Path) -> None:
    training = tuple(case(image_files, n, fold=n) for n in range(2))
    with pytest.raises(ConfigError) as error:
        image_sets(Datalist(training=training), (0, 1), all_images=False, has_rounds=False)
    assert str(error.value) == (
        "pretrain: found 1 image that may be learned from, expected at least 2. List images without labels under "
        "`unlabeled` in the datalist, or set pretrain.all_images: true to learn from the images of cases that models "
        "are scored on."
    )


def test_whole_patients_find_the_best_weights(image_files: Path) -> None:
    cases = tuple(case(image_files, n, group=f"p{n // 3}", labelled=False) for n in range(12))
    datalist = Datalist(training=(), unlabeled=cases)
    [images] = image_sets(datalist, (0,), all_images=False, has_rounds=False)
    made = lesson_of(images, datalist, PretrainSettings(method="contrastive"), 1)
    group_of = {c.name: c.group for c in cases}
    assert {group_of[n] for n in made.training} & {group_of[n] for n in made.validation} == set()
    assert len(made.validation) == 3


def test_a_damaged_patch_is_what_the_lesson_says() -> None:
    original = patch(1, (16, 16, 16))
    view, target = damaged(lesson("contrastive"), original, np.random.default_rng(0))
    assert target is original
    assert not np.array_equal(view, original)
    shown, masked = damaged(lesson("mae", mask_share=0.5), original, np.random.default_rng(0))
    assert np.array_equal(masked[:1], original)
    assert masked[1].mean() == 0.5
    assert np.array_equal(shown[0] == 0, (masked[1] == 1) | (original[0] == 0))
