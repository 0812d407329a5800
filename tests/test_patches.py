import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from autoseg.algos.cache import CachedCase
from autoseg.algos.patches import case_of, cut_batch, cut_patch, draw_centre, sample_rng


def _case(shape: tuple[int, int, int], name: str = "case") -> CachedCase:
    image = np.arange(np.prod(shape), dtype=np.float32).reshape(1, *shape) + 1
    target = np.zeros((1, *shape), np.uint8)
    target[0, 0, 0, 0], target[0, -1, -1, -1] = 1, 2
    last = [s - 1 for s in shape]
    points = np.array([[0, 0, 0, 0], [1, *last]], np.int32)
    return CachedCase(name=name, image=image, target=target, points=points)


shapes = st.tuples(*[st.integers(1, 9)] * 3)


@given(shape=shapes, roi=shapes, seed=st.integers(0, 1000), centred=st.booleans())
@settings(max_examples=80, deadline=None)
def test_a_patch_is_a_window_of_the_padded_image(shape, roi, seed, centred) -> None:  # type: ignore[no-untyped-def]
    case = _case(shape)
    centre = tuple(s - 1 for s in shape) if centred else None
    image, target = cut_patch(case, roi, np.random.default_rng(seed), centre)
    assert image.shape == (1, *roi)
    assert target.shape == (1, *roi)
    inside = image[0][image[0] > 0]
    assert inside.size == np.prod([min(s, r) for s, r in zip(shape, roi, strict=True)])
    # Every value keeps its neighbours: positions of the values differ by one constant shift.
    where = np.argwhere(image[0] > 0)
    source = np.stack(np.unravel_index((inside - 1).astype(int), shape), axis=1)
    assert (where - source == (where - source)[0]).all()
    np.testing.assert_array_equal(target[0][tuple(where.T)], case.target[0][tuple(source.T)])
    if centred:
        assert image.max() == np.prod(shape)


def test_centres_are_drawn_evenly_over_classes() -> None:
    case = _case((5, 5, 5))
    centres = [draw_centre(case, sample_rng(0, step, 0), 1.0) for step in range(400)]
    share = np.mean([c == (0, 0, 0) for c in centres])
    assert 0.4 < share < 0.6
    nothing = [draw_centre(case, sample_rng(0, step, 0), 0.25) is None for step in range(400)]
    assert 0.68 < np.mean(nothing) < 0.82


def test_every_pass_sees_every_case_once() -> None:
    for start in (0, 7, 14):
        assert sorted(case_of(5, start + i, 7) for i in range(7)) == list(range(7))
    assert [case_of(5, i, 7) for i in range(7)] != [case_of(5, 7 + i, 7) for i in range(7)]


def test_a_batch_can_be_cut_in_pieces() -> None:
    cases = [_case((6, 6, 6), f"c{i}") for i in range(5)]
    common = {"seed": 1, "step": 3, "batch_size": 4, "roi": (4, 4, 4), "foreground_fraction": 0.5}
    whole = cut_batch(cases, indices=range(4), **common)  # type: ignore[arg-type]
    halves = [cut_batch(cases, indices=part, **common) for part in (range(2), range(2, 4))]  # type: ignore[arg-type]
    np.testing.assert_array_equal(whole[0], np.concatenate([h[0] for h in halves]))
    np.testing.assert_array_equal(whole[1], np.concatenate([h[1] for h in halves]))
    assert [r.random() for r in whole[2]] == [r.random() for h in halves for r in h[2]]
