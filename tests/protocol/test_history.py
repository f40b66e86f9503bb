"""The control plane's history of calls, and its summary with the numbers of overlaps and losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.protocol.conftest import ENV
from workpool.server import APIError, History, Operations, Poll, Record, Summary, summarize
from workpool.server.timestamps import format_heartbeat_time

if TYPE_CHECKING:
    from tests.manual_clock import ManualClock


@pytest.fixture
def operations(clock: ManualClock) -> Operations:
    return Operations([ENV], now=clock)


def claim_and_heartbeat(operations: Operations, worker: str) -> str:
    """Poll an item, acknowledge it and send a heartbeat for it; return the item's id."""
    item = operations.poll(ENV, Poll(worker))
    assert item is not None
    operations.ack_item(ENV, item.id, worker)
    operations.heartbeat(ENV, item.id, "NO_HEARTBEAT", 10, worker)
    return item.id


def test_history_records_every_call_for_an_item_in_order(
    operations: Operations, clock: ManualClock
) -> None:
    operations.enqueue(ENV)
    work_id = claim_and_heartbeat(operations, "a")
    operations.update_metadata(ENV, work_id, {"k": "v"}, "a")
    clock.advance(5)
    operations.stop_item(ENV, work_id)
    with pytest.raises(APIError):
        operations.ack_item(ENV, work_id, "b")
    clock.advance(5)
    operations.queue_stats(ENV)
    facts = [(record.kind, record.worker_id, record.state) for record in operations.history]
    assert facts == [
        ("created", None, "queued"),
        ("delivered", "a", "queued"),
        ("acked", "a", "starting"),
        ("heartbeat", "a", "active"),
        ("metadata", "a", "active"),
        ("stop_requested", None, "stopping"),
        ("conflict", "b", "stopping"),
        ("lapsed", "a", "stopped"),
    ]
    start = clock.now - 10
    records = operations.history.records_of_item(work_id)
    assert [record.time - start for record in records] == [0, 0, 0, 0, 0, 5, 5, 10]
    assert [record.lease_end and record.lease_end - start for record in records] == [
        *(None, None, 60, 10, 10, 10, 10, None)
    ]
    assert records[6].op == "ack"


def test_history_does_not_record_calls_that_change_nothing(operations: Operations) -> None:
    operations.enqueue(ENV)
    work_id = claim_and_heartbeat(operations, "a")
    before = len(operations.history)
    operations.ack_item(ENV, work_id, "a")
    operations.update_metadata(ENV, work_id, {"missing": None})
    operations.get_item(ENV, work_id)
    assert len(operations.history) == before


def test_history_summary_has_no_problems_if_all_items_were_completed(
    operations: Operations,
) -> None:
    operations.enqueue(ENV, count=3)
    for _ in range(3):
        operations.stop_item(ENV, claim_and_heartbeat(operations, "a"), "a", force=True)
    assert summarize(operations.history) == Summary(3, 3, 0, 0, 0)


def test_reclaim_is_counted_if_another_worker_takes_item_with_expired_lease(
    operations: Operations, clock: ManualClock
) -> None:
    operations.enqueue(ENV)
    claim_and_heartbeat(operations, "a")
    clock.advance(10)
    operations.stop_item(ENV, claim_and_heartbeat(operations, "b"), "b", force=True)
    assert summarize(operations.history) == Summary(1, 1, 1, 0, 0)


def test_reclaim_is_counted_if_another_worker_acknowledges_redelivered_item(
    operations: Operations, clock: ManualClock
) -> None:
    operations.enqueue(ENV)
    operations.poll(ENV, Poll("a"))
    clock.advance(5)
    operations.stop_item(ENV, claim_and_heartbeat(operations, "b"), "b", force=True)
    assert summarize(operations.history) == Summary(1, 1, 1, 0, 0)


def test_redelivery_to_same_worker_does_not_count_as_reclaim(
    operations: Operations, clock: ManualClock
) -> None:
    operations.enqueue(ENV)
    operations.poll(ENV, Poll("a"))
    clock.advance(5)
    claim_and_heartbeat(operations, "a")
    assert summarize(operations.history).reclaimed == 0


def test_history_summary_counts_item_that_was_never_stopped_as_lost(operations: Operations) -> None:
    operations.enqueue(ENV, count=2)
    claim_and_heartbeat(operations, "a")
    assert summarize(operations.history) == Summary(2, 0, 0, 2, 0)


def test_no_reclaim_is_counted_if_lease_expires_after_stop_request(
    operations: Operations, clock: ManualClock
) -> None:
    operations.enqueue(ENV)
    operations.stop_item(ENV, claim_and_heartbeat(operations, "a"))
    clock.advance(10)
    operations.queue_stats(ENV)
    assert summarize(operations.history) == Summary(1, 1, 0, 0, 0)


@pytest.mark.parametrize("action", ["heartbeat", "metadata", "stopped", "stop_requested"])
def test_call_for_item_leased_to_another_worker_counts_as_lease_overlap(
    operations: Operations, action: str
) -> None:
    operations.enqueue(ENV)
    work_id = claim_and_heartbeat(operations, "a")
    if action == "heartbeat":
        operations.heartbeat(ENV, work_id, None, 10, "b")
    elif action == "metadata":
        operations.update_metadata(ENV, work_id, {"k": "v"}, "b")
    else:
        operations.stop_item(ENV, work_id, "b", force=action == "stopped")
    assert summarize(operations.history).overlapping == 1


def test_operator_stops_and_refused_calls_do_not_count_as_lease_overlaps(
    operations: Operations,
) -> None:
    operations.enqueue(ENV)
    work_id = claim_and_heartbeat(operations, "a")
    for expected in ("NO_HEARTBEAT", "2026-03-01T00:00:00Z"):
        with pytest.raises(APIError):
            operations.heartbeat(ENV, work_id, expected, 10, "b")
    with pytest.raises(APIError):
        operations.ack_item(ENV, work_id, "b")
    operations.update_metadata(ENV, work_id, {"k": "v"})
    operations.stop_item(ENV, work_id)
    assert summarize(operations.history).overlapping == 0


def test_call_after_lease_lapsed_counts_as_overlap_only_once_another_worker_has_claimed_item(
    operations: Operations, clock: ManualClock
) -> None:
    operations.enqueue(ENV)
    work_id = claim_and_heartbeat(operations, "a")
    clock.advance(10)
    operations.update_metadata(ENV, work_id, {"k": "late"}, "a")
    assert summarize(operations.history).overlapping == 0
    claim_and_heartbeat(operations, "b")
    operations.update_metadata(ENV, work_id, {"k": "later"}, "a")
    assert summarize(operations.history).overlapping == 1


def test_history_beyond_limit_drops_oldest_records_and_counts_them() -> None:
    history = History(limit=2)
    for number in range(5):
        history.add(Record(number, "work_1", "created", None, "queued"))
    assert [record.time for record in history] == [3, 4]
    assert (len(history), history.forgotten) == (2, 3)


def test_handoff_of_item_to_child_process_does_not_count_as_lease_overlap(
    operations: Operations,
) -> None:
    """A child in a handoff sends the time of its parent's last heartbeat to take the item over.

    A later call of the parent counts as an overlap.
    """
    operations.enqueue(ENV)
    work_id = claim_and_heartbeat(operations, "a")
    last = format_heartbeat_time(operations.get_item(ENV, work_id).heartbeat_at or 0)
    operations.heartbeat(ENV, work_id, last, 10, "b")
    operations.update_metadata(ENV, work_id, {"k": "v"}, "b")
    assert summarize(operations.history).overlapping == 0
    operations.update_metadata(ENV, work_id, {"k": "v2"}, "a")
    assert summarize(operations.history).overlapping == 1
