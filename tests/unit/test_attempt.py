"""Attempt numbers, with and without permission to write metadata."""

from __future__ import annotations

from workpool.pool.pool_item import Attempt, RunCounts


def test_attempt_counted_in_this_process_still_writes_its_number_with_mark() -> None:
    """If the credential may write after all, the earlier run must not be forgotten."""
    attempt = Attempt({}, redelivered=True)
    attempt.count_here(0)
    assert attempt.number == 1
    assert attempt.mark("draining", 0) == {"workpool.attempt": "2", "workpool.released": "draining"}


def test_attempt_counted_in_this_process_uses_greater_of_both_numbers() -> None:
    attempt = Attempt({"workpool.attempt": "3"}, redelivered=True)
    attempt.count_here(1)
    assert attempt.number == 3
    attempt.count_here(4)
    assert attempt.number == 5


def test_mark_leaves_number_of_retry_to_next_run_which_deletes_it() -> None:
    first = Attempt({}, redelivered=False)
    left = first.mark("draining", 2)
    assert left == {"workpool.released": "draining", "workpool.retries": "2"}
    assert first.closing({}) == {"workpool.released": None, "workpool.retries": None}
    following = Attempt({key: str(value) for key, value in left.items()}, redelivered=True)
    assert (following.number, following.retry) == (1, 2)
    assert following.opening() == {"workpool.released": None, "workpool.retries": None}


def test_retries_of_lost_run_and_unreadable_numbers_do_not_count() -> None:
    assert Attempt({"workpool.retries": "2"}, redelivered=True).retry == 0
    notes = {"workpool.released": "draining", "workpool.retries": "-1"}
    assert Attempt(notes, redelivered=True).retry == 0


def test_run_counts_beyond_limit_forget_items_counted_longest_ago() -> None:
    counts = RunCounts()
    for number in range(10_001):
        counts.add(f"work_{number}")
    counts.add("work_1")
    assert [counts.of(f"work_{number}") for number in (0, 1, 2)] == [0, 2, 1]
