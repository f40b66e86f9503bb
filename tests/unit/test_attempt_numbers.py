"""Attempt numbers of an item, from counts of this process and from the item's metadata."""

from __future__ import annotations

from workpool.pool.pool_item import Attempt, RunCounts


def test_release_writes_attempt_number_known_only_to_this_process_into_metadata() -> None:
    """The metadata are the only place where another process can read the attempt number."""
    attempt = Attempt({}, redelivered=True)
    attempt.set_number_from_counted_runs(0)
    assert attempt.number == 1
    assert attempt.metadata_of_released_run("draining", 0) == {
        "workpool.attempt": "2",
        "workpool.released": "draining",
    }


def test_attempt_number_comes_from_metadata_or_counted_runs_whichever_is_greater() -> None:
    attempt = Attempt({"workpool.attempt": "3"}, redelivered=True)
    attempt.set_number_from_counted_runs(1)
    assert attempt.number == 3
    attempt.set_number_from_counted_runs(4)
    assert attempt.number == 5


def test_retry_interrupted_by_drain_keeps_its_number_in_next_run() -> None:
    first = Attempt({}, redelivered=False)
    left = first.metadata_of_released_run("draining", 2)
    assert left == {"workpool.released": "draining", "workpool.retries": "2"}
    assert first.metadata_at_session_end({}) == {
        "workpool.released": None,
        "workpool.retries": None,
    }
    following = Attempt({key: str(value) for key, value in left.items()}, redelivered=True)
    assert (following.number, following.retry) == (1, 2)
    assert following.metadata_before_handler() == {
        "workpool.released": None,
        "workpool.retries": None,
    }


def test_retry_number_is_zero_after_crash_or_with_invalid_metadata() -> None:
    assert Attempt({"workpool.retries": "2"}, redelivered=True).retry == 0
    notes = {"workpool.released": "draining", "workpool.retries": "-1"}
    assert Attempt(notes, redelivered=True).retry == 0


def test_count_of_runs_is_kept_for_only_the_latest_ten_thousand_items() -> None:
    counts = RunCounts()
    for number in range(10_001):
        counts.count_run(f"work_{number}")
    counts.count_run("work_1")
    assert [counts.number_of_runs(f"work_{number}") for number in (0, 1, 2)] == [0, 2, 1]
