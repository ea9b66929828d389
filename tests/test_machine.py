"""The yardstick of the tests with a clock: it blames the program on a quiet machine only"""
import pytest

from machine import assert_within, crowding


def test_a_computation_takes_at_least_its_cpu_time():
    assert crowding(.05) > .99


def test_one_try_in_time_will_do():
    times = iter([3., .5])
    assert_within(1, lambda: next(times), crowding=lambda: 2.)
    assert list(times) == []


def test_too_slow_on_a_quiet_machine_fails():
    with pytest.raises(AssertionError, match="took 3.00 s, 1 s are allowed"):
        assert_within(1, lambda: 3., crowding=lambda: 1.)


def test_too_slow_on_a_busy_machine_is_skipped_with_the_figures():
    with pytest.raises(pytest.skip.Exception, match="too busy to tell .* 3.00 s where a computation took "
        "2.0 times its CPU time"):
        assert_within(1, lambda: 3., crowding=lambda: 2.)
