import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoseg.training.augment import Draw
from autoseg.training.cache import CachedCase
from autoseg.training.patches import Sampler, case_of, cut_batch, cut_patch, place_patch, sample_rng


def _case(shape: tuple[int, int, int], name: str = "case") -> CachedCase:
    image = np.arange(np.prod(shape), dtype=np.float32).reshape(1, *shape) + 1
    target = np.zeros((1, *shape), np.uint8)
    target[0, 0, 0, 0], target[0, -1, -1, -1] = 1, 2
    last = [s - 1 for s in shape]
    points = np.array([[0, 0, 0, 0], [1, *last]], np.int32)
    return CachedCase(name=name, image=image, target=target, points=points)


shapes = st.tuples(*[st.integers(1, 9)] * 3)


@given(shape=shapes, roi=shapes, seed=st.integers(0, 1000), centred=st.booleans())
@settings(max_examples=80)
def test_a_patch_is_a_window_of_the_padded_image(shape, roi, seed, centred) -> None:  # type: ignore[no-untyped-def]
    case = _case(shape)
    centre = tuple(s - 1 for s in shape) if centred else None
    image, target = np.zeros((1, *roi), np.float32), np.zeros((1, *roi), np.uint8)
    cut_patch(case, place_patch(shape, roi, np.random.default_rng(seed), centre), image, target, weighted=False)
    inside = image[0][image[0] > 0]
    assert inside.size == np.prod([min(s, r) for s, r in zip(shape, roi, strict=True)])
    # Every value keeps its neighbours: positions of the values differ by one constant shift.
    where = np.argwhere(image[0] > 0)
    source = np.stack(np.unravel_index((inside - 1).astype(int), shape), axis=1)
    assert (where - source == (where - source)[0]).all()
    np.testing.assert_array_equal(target[0][tuple(where.T)], case.target[0][tuple(source.T)])
    if centred:
        assert image.max() == np.prod(shape)


NOTHING = np.zeros((1, 2), bool)


def test_centres_are_drawn_evenly_over_classes() -> None:
    sampler = Sampler([_case((5, 5, 5))], NOTHING, foreground_fraction=1.0)
    centres = [sampler.draw(sample_rng(0, step, 0), 0, step)[1] for step in range(400)]
    share = np.mean([c == (0, 0, 0) for c in centres])
    assert 0.4 < share < 0.6
    sampler = Sampler([_case((5, 5, 5))], NOTHING, foreground_fraction=0.25)
    nothing = [sampler.draw(sample_rng(0, step, 0), 0, step)[1] is None for step in range(400)]
    assert 0.68 < np.mean(nothing) < 0.82


def test_a_class_is_drawn_by_its_weight() -> None:
    sampler = Sampler([_case((5, 5, 5))], NOTHING, foreground_fraction=1.0, class_weights=np.array([1.0, 4.0]))
    centres = [sampler.draw(sample_rng(0, step, 0), 0, step)[1] for step in range(500)]
    assert 0.74 < np.mean([c == (4, 4, 4) for c in centres]) < 0.86
    sampler = Sampler([_case((5, 5, 5))], NOTHING, foreground_fraction=1.0, class_weights=np.array([1.0, 0.0]))
    assert {sampler.draw(sample_rng(0, step, 0), 0, step)[1] for step in range(50)} == {(0, 0, 0)}


def _cohort(num_full: int, num_partial: int) -> tuple[list[CachedCase], np.ndarray]:
    """Some cases with classes 0 and 1, many that are annotated for class 1 alone."""
    cases, unannotated = [], []
    for i in range(num_full + num_partial):
        case = _case((5, 5, 5), f"c{i}")
        full = i < num_full
        points = case.points if full else case.points[case.points[:, 0] == 1]
        cases.append(CachedCase(name=case.name, image=case.image, target=case.target, points=points))
        unannotated.append([not full, False])
    return cases, np.array(unannotated)


def test_a_class_that_few_cases_annotate_gets_its_share() -> None:
    cases, unannotated = _cohort(2, 38)
    sampler = Sampler(cases, unannotated, foreground_fraction=0.6)
    drawn = [sampler.draw(sample_rng(0, step, 0), 0, step) for step in range(2000)]
    centred = [(case, centre) for case, centre in drawn if centre is not None]
    assert 0.56 < len(centred) / len(drawn) < 0.64
    rare = [case for case, centre in centred if centre == (0, 0, 0)]
    assert 0.46 < len(rare) / len(centred) < 0.54  # case by case it would be 2 / 40 / 2
    assert set(rare) == {0, 1}
    assert {case for case, centre in centred if centre == (4, 4, 4)} == set(range(40))
    anywhere = [case for case, centre in drawn if centre is None]
    assert 0.46 < np.mean([case < 2 for case in anywhere]) < 0.60  # half for class 0, and a 20th of class 1's half


def test_half_of_a_class_patches_come_from_its_annotators() -> None:
    cases, _ = _cohort(40, 0)
    complete = np.zeros((40, 2), bool)
    filled = np.zeros((40, 2), bool)
    filled[2:, 0] = True  # two cases were annotated for class 0, all for class 1
    sampler = Sampler(cases, complete, foreground_fraction=1.0, filled=filled, annotators_share=0.5)
    drawn = [sampler.draw(sample_rng(0, step, 0), 0, step) for step in range(4000)]
    rare = [case for case, centre in drawn if centre == (0, 0, 0)]
    assert 0.47 < len(rare) / len(drawn) < 0.53
    assert 0.48 < np.mean([case < 2 for case in rare]) < 0.57  # half, and a 20th of the other half
    assert set(rare) == set(range(40))
    common = [case for case, centre in drawn if centre == (4, 4, 4)]
    assert 0.03 < np.mean([case < 2 for case in common]) < 0.07


def test_a_class_that_nobody_drew_is_met_where_it_was_filled_in() -> None:
    cases, _ = _cohort(4, 0)
    filled = np.array([[True, True], [True, True], [True, False], [True, False]])
    sampler = Sampler(cases, np.zeros((4, 2), bool), foreground_fraction=1.0, filled=filled, annotators_share=0.5)
    drawn = [sampler.draw(sample_rng(0, step, 0), 0, step) for step in range(400)]
    assert {case for case, centre in drawn if centre == (0, 0, 0)} == {0, 1, 2, 3}
    assert {case for case, centre in drawn if centre == (4, 4, 4)} == {0, 1, 2, 3}


@pytest.mark.parametrize("filled", [None, np.zeros((5, 2), bool), np.ones((5, 2), bool)], ids=["no", "none", "all"])
def test_patches_are_drawn_as_ever_where_no_case_is_better_known(filled: np.ndarray | None) -> None:
    cases, complete = _cohort(5, 0)
    plain, other = (
        Sampler(cases, complete, foreground_fraction=0.5, filled=f, annotators_share=0.5) for f in (None, filled)
    )
    for step in range(50):
        assert plain.draw(sample_rng(0, step, 0), 0, step) == other.draw(sample_rng(0, step, 0), 0, step)


def test_patches_are_centred_on_annotated_classes_alone() -> None:
    cases = [_case((5, 5, 5), f"c{i}") for i in range(3)]  # all hold voxels of both classes
    sampler = Sampler(cases, np.array([[True, False], [False, True], [True, True]]), foreground_fraction=1.0)
    drawn = {sampler.draw(sample_rng(0, step, 0), 0, step) for step in range(200)}
    assert drawn == {(0, (4, 4, 4)), (1, (0, 0, 0))}


def test_cases_without_any_class_are_still_seen() -> None:
    cases = [_case((5, 5, 5), f"c{i}") for i in range(3)]
    sampler = Sampler(cases, np.ones((3, 2), bool), foreground_fraction=0.5)
    drawn = [sampler.draw(sample_rng(0, step, 0), 0, step) for step in range(30)]
    assert all(centre is None for _, centre in drawn)
    assert {case for case, _ in drawn} == {0, 1, 2}


def test_every_pass_sees_every_case_once() -> None:
    for start in (0, 7, 14):
        assert sorted(case_of(5, start + i, 7) for i in range(7)) == list(range(7))
    assert [case_of(5, i, 7) for i in range(7)] != [case_of(5, 7 + i, 7) for i in range(7)]


def test_a_batch_can_be_cut_in_pieces() -> None:
    cases = [_case((6, 6, 6), f"c{i}") for i in range(5)]
    sampler = Sampler(cases, np.zeros((5, 2), bool), foreground_fraction=0.5)

    def noise(rng: np.random.Generator, case: int) -> Draw:
        return Draw(noise=(case, rng.random()))

    common = {"seed": 1, "step": 3, "batch_size": 4, "roi": (4, 4, 4), "draw": noise}
    whole = cut_batch(sampler, indices=range(4), **common)  # type: ignore[arg-type]
    halves = [cut_batch(sampler, indices=part, **common) for part in (range(2), range(2, 4))]  # type: ignore[arg-type]
    assert torch.equal(whole.image, torch.cat([h.image for h in halves]))
    assert torch.equal(whole.target, torch.cat([h.target for h in halves]))
    assert whole.cases == halves[0].cases + halves[1].cases
    assert [d.noise for d in whole.draws] == [d.noise for h in halves for d in h.draws]


def test_weights_of_voxels_follow_the_target() -> None:
    plain, weighted = _case((6, 5, 4), "plain"), _case((6, 5, 4), "weighted")
    weight = np.arange(120, dtype=np.uint8).reshape(1, 6, 5, 4) % 100
    weighted = CachedCase(
        name="weighted", image=weighted.image, target=weighted.target, points=weighted.points, weight=weight
    )
    sampler = Sampler([plain, weighted], np.zeros((2, 2), bool), foreground_fraction=0.0)
    patches = cut_batch(sampler, seed=0, step=0, batch_size=4, indices=range(4), roi=(6, 5, 8))
    targets = patches.target.numpy()
    assert targets.shape == (4, 2, 6, 5, 8)
    assert set(patches.cases) == {0, 1}
    for target, case in zip(targets, patches.cases, strict=True):
        found = np.flatnonzero((target[1] != 100).any((0, 1)))
        if case == 0:
            assert not len(found)
        else:  # what lies beside the image counts in full, as it does without weights
            first = found[0]
            np.testing.assert_array_equal(target[1, :, :, first : first + 4], weight[0])
    alone = Sampler([plain], np.zeros((1, 2), bool), foreground_fraction=0.0)
    assert cut_batch(alone, seed=0, step=0, batch_size=1, indices=[0], roi=(6, 5, 4)).target.shape == (1, 1, 6, 5, 4)
