import pytest

from autoseg.training import schedule
from autoseg.training.schedule import Schedule, ema_decay, learning_rate, validation_plan


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
    assert timed.progress(1, 10.0, 200.0) == pytest.approx(0.5)  # a fifth is trained even so
    assert timed.progress(1, 40.0, 20.0, begun_s=20.0) == pytest.approx(1 / 3)
    assert timed.is_kept(80.0)
    assert not timed.is_kept(81.0)
    assert Schedule(num_steps=1000, budget_s=None).progress(10, 1e9, 0.0) == pytest.approx(0.01)


def test_the_average_forgets_the_first_steps() -> None:
    assert ema_decay(0.999, 0) == pytest.approx(0.1)
    assert ema_decay(0.999, 10**6) == 0.999


def test_ways_of_the_learning_rate() -> None:
    assert learning_rate(1.0, 0.9, 0.1, "constant") == 1.0
    assert learning_rate(1.0, 0.05, 0.1, "constant") == pytest.approx(0.55)
    assert learning_rate(1.0, 0.5, 0.0, "poly") == pytest.approx(0.5**0.9)
    assert learning_rate(1.0, 1.0, 0.0, "poly") == 0.0


def test_validations_take_a_twentieth_of_the_budget() -> None:
    for budget_s, all_s in ((600.0, 3.0), (600.0, 6.0), (60.0, 30.0), (300.0, 9.0)):
        marks, num_cases = validation_plan(budget_s, all_s, 40)
        assert len(marks) * all_s * num_cases / 40 <= 0.05 * budget_s
    assert validation_plan(600.0, 3.0, 40) == (schedule.MANY_MARKS, 40)
    assert validation_plan(600.0, 6.0, 40)[0] == schedule.FEW_MARKS
    assert validation_plan(600.0, 12.0, 40)[1] == 20
    assert validation_plan(60.0, 400.0, 40) == ((), 0)  # a case takes 10 s
    assert validation_plan(600.0, 400.0, 40) == ((0.75, 0.9, 1.0), 1)
    assert validation_plan(600.0, 640.0, 40) == ((), 0)  # one alone would compare nothing


def test_divergence_can_be_told_at_a_quarter() -> None:
    assert schedule.FEW_MARKS[0] == schedule.MANY_MARKS[0] == 0.25
