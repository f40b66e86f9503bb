"""The attempt number of an item, from the runs in this process and from the item's metadata."""

from __future__ import annotations

from workpool.pool.attempt_number import AttemptNumber, LocalRunCounter


def test_release_metadata_contain_attempt_number_that_only_this_process_knows() -> None:
    """The metadata are the only place where another process can read the attempt number."""
    attempt = AttemptNumber({}, redelivered=True)
    attempt.set_number_from_local_count(0)
    assert attempt.number == 1
    assert attempt.make_release_metadata("draining", 0) == {
        "workpool.attempt": "2",
        "workpool.released": "draining",
    }


def test_attempt_number_comes_from_metadata_or_counted_runs_whichever_is_greater() -> None:
    attempt = AttemptNumber({"workpool.attempt": "3"}, redelivered=True)
    attempt.set_number_from_local_count(1)
    assert attempt.number == 3
    attempt.set_number_from_local_count(4)
    assert attempt.number == 5


def test_retry_number_is_unchanged_in_next_run_after_drain_interrupts_retry() -> None:
    first = AttemptNumber({}, redelivered=False)
    left = first.make_release_metadata("draining", 2)
    assert left == {"workpool.released": "draining", "workpool.retries": "2"}
    assert first.make_session_end_metadata({}) == {
        "workpool.released": None,
        "workpool.retries": None,
    }
    following = AttemptNumber({key: str(value) for key, value in left.items()}, redelivered=True)
    assert (following.number, following.retry) == (1, 2)
    assert following.make_run_number_metadata() == {
        "workpool.released": None,
        "workpool.retries": None,
    }


def test_retry_number_is_zero_after_crash_or_with_invalid_metadata() -> None:
    assert AttemptNumber({"workpool.retries": "2"}, redelivered=True).retry == 0
    notes = {"workpool.released": "draining", "workpool.retries": "-1"}
    assert AttemptNumber(notes, redelivered=True).retry == 0


def test_count_of_runs_is_kept_for_only_the_latest_ten_thousand_items() -> None:
    counts = LocalRunCounter()
    for number in range(10_001):
        counts.count_item_run(f"work_{number}")
    counts.count_item_run("work_1")
    assert [counts.number_of_runs(f"work_{number}") for number in (0, 1, 2)] == [0, 2, 1]
