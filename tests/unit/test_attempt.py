"""Attempt numbers, with and without permission to write metadata."""

from __future__ import annotations

from workpool.pool.pool_item import Attempt, RunCounts


def test_attempt_counted_in_this_process_still_writes_its_number_with_mark() -> None:
    """If the credential may write after all, the earlier run must not be forgotten."""
    attempt = Attempt({}, redelivered=True)
    attempt.count_here(0)
    assert attempt.number == 1
    assert attempt.mark("draining") == {"workpool.attempt": "2", "workpool.released": "draining"}


def test_attempt_counted_in_this_process_uses_greater_of_both_numbers() -> None:
    attempt = Attempt({"workpool.attempt": "3"}, redelivered=True)
    attempt.count_here(1)
    assert attempt.number == 3
    attempt.count_here(4)
    assert attempt.number == 5


def test_run_counts_beyond_limit_forget_items_counted_longest_ago() -> None:
    counts = RunCounts()
    for number in range(10_001):
        counts.add(f"work_{number}")
    counts.add("work_1")
    assert [counts.of(f"work_{number}") for number in (0, 1, 2)] == [0, 2, 1]
