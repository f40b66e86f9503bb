"""Delays between retries: ceiling, jitter and reset."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workpool.backoff import Backoff


def get_largest_float_below_one() -> float:
    return 1 - 2**-53


def test_backoff_ceiling_doubles_up_to_cap() -> None:
    backoff = Backoff(0.5, 30.0, rng=lambda: 1.0)
    assert [backoff.next_delay() for _ in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]


def test_backoff_with_full_jitter_starts_at_zero() -> None:
    assert Backoff(1.0, 30.0, rng=lambda: 0.0).next_delay() == 0.0


def test_backoff_after_success_starts_again_at_initial_delay() -> None:
    backoff = Backoff(1.0, 30.0, rng=lambda: 1.0)
    for _ in range(5):
        backoff.next_delay()
    assert backoff.failures == 5
    backoff.reset()
    assert backoff.failures == 0
    assert backoff.next_delay() == 1.0


def test_backoff_after_a_million_failures_stays_at_its_cap() -> None:
    backoff = Backoff(0.1, 30.0, rng=lambda: 1.0)
    backoff.failures = 10**6
    assert backoff.next_delay() == 30.0


@given(
    st.floats(0.001, 10),
    st.floats(0.001, 600),
    st.integers(0, 100),
    st.floats(0, get_largest_float_below_one()),
)
def test_backoff_is_never_negative_and_never_above_cap(
    initial: float, cap: float, failures: int, drawn: float
) -> None:
    backoff = Backoff(initial, cap, rng=lambda: drawn)
    backoff.failures = failures
    assert 0 <= backoff.next_delay() <= min(cap, initial * 2.0**failures)


def test_backoff_delays_of_two_workers_differ() -> None:
    first, second = (Backoff(1.0, 30.0) for _ in range(2))
    assert [first.next_delay() for _ in range(9)] != pytest.approx(
        [second.next_delay() for _ in range(9)]
    )
