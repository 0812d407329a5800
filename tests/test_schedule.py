import pytest

from autoseg.algos.schedule import Schedule, ema_decay, learning_rate, validation_marks


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    assert learning_rate(1.0, 0.0, 0.1) == pytest.approx(0.1)
    assert learning_rate(1.0, 0.1, 0.1) == pytest.approx(1.0)
    assert learning_rate(1.0, 0.55, 0.1) == pytest.approx(0.5)
    assert learning_rate(1.0, 1.0, 0.1) == pytest.approx(0.0, abs=1e-12)
    assert learning_rate(1.0, 0.0, 0.0) == pytest.approx(1.0)


def test_a_budget_ends_a_job_before_its_steps() -> None:
    timed = Schedule(num_steps=1000, budget_s=100.0)
    assert timed.progress(10, 45.0, 10.0) == pytest.approx(0.5)
    assert timed.progress(10, 90.0, 10.0) == 1.0
    assert timed.progress(1000, 1.0, 10.0) == 1.0
    assert timed.progress(1, 50.0, 200.0) == 1.0
    assert Schedule(num_steps=1000, budget_s=None).progress(10, 1e9, 0.0) == pytest.approx(0.01)


def test_the_average_forgets_the_first_steps() -> None:
    assert ema_decay(0.999, 0) == pytest.approx(0.1)
    assert ema_decay(0.999, 10**6) == 0.999


def test_validations_take_a_tenth_of_the_budget() -> None:
    assert validation_marks(600, 6) == [pytest.approx(0.5 + 0.05 * (i + 1)) for i in range(10)]
    assert validation_marks(10, 60) == [1.0]
    assert validation_marks(100, 4) == [0.75, 1.0]
