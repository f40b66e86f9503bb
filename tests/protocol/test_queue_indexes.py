"""The indexes of the queue have the same results as a scan of all items, at less cost."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.manual_clock import ManualClock
from tests.protocol.conftest import ENV, START
from workpool.server import APIError, Item, Operations, Poll
from workpool.server.ascending_ids import CHUNK_MAX, AscendingIdList, iterate_ids
from workpool.server.queue.deliveries import Deliveries
from workpool.server.queue.lease_ends import LeaseEndTimes
from workpool.server.stored_item import IdGenerator

if TYPE_CHECKING:
    from collections.abc import Sequence

STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "discard", "ask"]), st.integers(0, 30), st.integers(0, 3)),
    max_size=300,
)


@given(STEPS)
def test_index_of_delivered_items_has_same_results_as_full_scan(
    steps: Sequence[tuple[str, int, int]],
) -> None:
    deliveries, model, now = Deliveries(), dict[str, int](), 0
    for step, number, pause in steps:
        now += pause
        work_id = f"work_{number:02}"
        if work_id in model:
            deliveries.remove_delivery(work_id)
            del model[work_id]
        if step == "add":
            deliveries.add_delivery(work_id, now)
            model[work_id] = now
        until = now - number
        due = [name for name, at in model.items() if at <= until]
        assert deliveries.lowest_due_id(until) == min(due, default=None)
        assert deliveries.lowest_delivered_id() == min(model, default=None)
        assert deliveries.oldest_delivery_time() == min(model.values(), default=None)
        assert len(deliveries) == len(model)


IDS = st.integers(0, 4 * CHUNK_MAX).map(lambda number: f"work_{number:05}")


@given(st.sets(IDS), st.data())
@settings(max_examples=50)
def test_index_of_ascending_ids_has_same_results_as_sorted_list(
    removed: set[str], data: st.DataObject
) -> None:
    every = [f"work_{number:05}" for number in range(3 * CHUNK_MAX + 7)]
    ids = AscendingIdList(every)
    for each in removed.intersection(every):
        ids.remove(each)
    model = [each for each in every if each not in removed]
    after = data.draw(st.just("") | IDS)
    before = data.draw(st.none() | IDS)
    between = [each for each in model if each > after and (before is None or each < before)]
    if before is None:
        assert list(iterate_ids(ids, after=after)) == between
    else:
        assert list(iterate_ids(ids, after=after, before=before)) == between[::-1]
    assert list(iterate_ids(ids, after=after, before=before, newest_first=True)) == between[::-1]


def test_iteration_over_ascending_ids_continues_after_removals() -> None:
    every = [f"work_{number:05}" for number in range(3 * CHUNK_MAX)]
    for newest_first in (False, True):
        ids = AscendingIdList(every)
        walked = iterate_ids(ids, newest_first=newest_first)
        first = next(walked)
        for each in every:
            if each[-1] in "02468" or each == first:
                ids.remove(each)
        kept = [each for each in every if each[-1] in "13579" and each != first]
        assert [each for each in walked if each in kept] == (kept[::-1] if newest_first else kept)


@given(STEPS)
def test_lease_index_returns_each_expired_lease_once(
    steps: Sequence[tuple[str, int, int]],
) -> None:
    leases, model, now = LeaseEndTimes(), dict[str, int](), 0
    for step, number, pause in steps:
        now += pause
        work_id = f"work_{number % 7}"
        if step == "add":
            leases.set_end_time(work_id, now + number)
            model[work_id] = now + number
        elif step == "discard":
            leases.remove_end_time(work_id)
            model.pop(work_id, None)
        else:
            due = sorted((end, name) for name, end in model.items() if end <= now)
            assert sorted(leases.pop_expired_leases(now)) == sorted(name for _, name in due)
            for _, name in due:
                del model[name]
        first = leases.earliest_end()
        if model:
            assert first is not None
            assert first <= min(model.values())


@given(st.lists(st.tuples(st.booleans(), IDS), max_size=100), st.integers(0, 3 * CHUNK_MAX))
@settings(max_examples=50)
def test_id_list_is_in_ascending_order_after_any_insertions_and_removals(
    steps: Sequence[tuple[bool, str]], number: int
) -> None:
    model = {f"work_{each:05}" for each in range(number)}
    ids = AscendingIdList(sorted(model))
    for inserts, work_id in steps:
        if inserts and work_id not in model:
            ids.insert(work_id)
            model.add(work_id)
        elif not inserts and work_id in model:
            ids.remove(work_id)
            model.remove(work_id)
        assert ids.lowest() == min(model, default=None)
    assert list(iterate_ids(ids)) == sorted(model)


def test_id_list_is_in_ascending_order_after_insertions_in_descending_order() -> None:
    every = [f"work_{number:05}" for number in range(3 * CHUNK_MAX)]
    ids = AscendingIdList()
    for each in every[::-1]:
        ids.insert(each)
    assert list(iterate_ids(ids)) == every
    assert max(len(chunk) for chunk in ids._chunks) <= CHUNK_MAX


def test_lease_index_does_not_grow_when_one_lease_is_renewed_often() -> None:
    leases = LeaseEndTimes()
    for now in range(10_000):
        leases.set_end_time("work_1", now + 60)
        assert not list(leases.pop_expired_leases(now))
    assert len(leases._heap) <= 2


@given(st.lists(st.integers(0, 2**47 * 1000), max_size=50))
def test_generated_ids_ascend_even_if_clock_is_set_back(instants: Sequence[int]) -> None:
    ids = IdGenerator()
    made = [ids.generate_id_digits(now) for now in instants]
    again = IdGenerator(made[-1]) if made else ids
    made += [again.generate_id_digits(0) for _ in range(5)]
    assert made == sorted(set(made))
    assert all(len(digits) == 32 and digits[12] == "7" for digits in made)


WORKERS = st.sampled_from([None, "a", "b", "c"])


class QueueStateMachine(RuleBasedStateMachine):
    """Hypothesis state machine: calls in any order have the same results as a full scan."""

    retention: ClassVar[float | None] = None

    @initialize()
    def start_queue(self) -> None:
        self.clock = ManualClock(START)
        self.operations = Operations([ENV], now=self.clock, retention=self.retention)

    def list_all_items(self) -> Sequence[Item]:
        return self.operations.list_items(ENV, 1000).items

    def pick_item_by_number(self, number: int) -> Item:
        items = self.list_all_items()
        return items[number % len(items)]

    def claimable_items(self, reclaim_ms: int) -> list[str]:
        cutoff = int(self.clock.now * 1_000_000) - reclaim_ms * 1000
        return [
            item.id
            for item in self.list_all_items()
            if item.state == "queued" and (item.delivered_at is None or item.delivered_at <= cutoff)
        ]

    @rule(count=st.integers(1, 3))
    def enqueue_items(self, count: int) -> None:
        self.operations.enqueue(ENV, count=count)

    @rule(seconds=st.sampled_from([0.001, 1, 4, 5, 10, 59, 60]))
    def advance_clock(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(worker=WORKERS, reclaim_ms=st.sampled_from([0, 1000, 5000, 20_000]))
    def poll_oldest_item(self, worker: str | None, reclaim_ms: int) -> None:
        expected = min(self.claimable_items(reclaim_ms), default=None)
        item = self.operations.poll(ENV, Poll(worker, 0, reclaim_ms))
        assert (item and item.id) == expected

    @precondition(lambda self: self.list_all_items())
    @rule(
        number=st.integers(0, 50),
        call=st.sampled_from(["ack", "heartbeat", "stop", "force", "withdraw", "update"]),
        worker=WORKERS,
    )
    def call_operation_on_item(self, number: int, call: str, worker: str | None) -> None:
        item = self.pick_item_by_number(number)
        try:
            if call == "ack":
                self.operations.ack_item(ENV, item.id, worker)
            elif call == "heartbeat":
                self.operations.heartbeat(ENV, item.id, ttl_seconds=number, worker_id=worker)
            elif call == "withdraw" and item.delivered_at is not None:
                self.operations.withdraw_delivery(item)
            elif call == "update":
                self.operations.update_metadata(ENV, item.id, {"k": str(number)}, worker)
            else:
                self.operations.stop_item(ENV, item.id, worker, force=call == "force")
        except APIError as refusal:
            if refusal.status != 409:
                raise

    @invariant()
    def stats_equal_counts_of_full_scan(self) -> None:
        queued = [item for item in self.list_all_items() if item.state == "queued"]
        claimable = self.claimable_items(5000)
        stats = self.operations.queue_stats(ENV)
        assert stats.depth == len(claimable)
        assert stats.pending == len(queued) - len(claimable)
        assert stats.oldest_queued_at == min((item.created_at for item in queued), default=None)

    @invariant()
    def leases_are_unexpired_and_only_of_acknowledged_items(self) -> None:
        now = int(self.clock.now * 1_000_000)
        for item in self.list_all_items():
            held = item.state in {"starting", "active", "stopping"}
            assert held is (item.lease_end is not None)
            assert item.lease_end is None or item.lease_end > now
            assert item.delivered_at is None or item.state == "queued"


class QueueStateMachineWithRetention(QueueStateMachine):
    """The state machine of a queue that deletes stopped items after 30 s."""

    retention = 30.0

    @rule()
    def poll_and_check_deletion_of_old_items(self) -> None:
        self.operations.poll(ENV, Poll("a"))
        until = self.clock.now - self.retention
        for item in self.list_all_items():
            assert item.stopped_at is None or item.stopped_at / 1_000_000 > until
            assert self.operations.get_session(item.session_id)[1] == item


TestQueueMachine = QueueStateMachine.TestCase
TestQueueMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestQueueMachineWithRetention = QueueStateMachineWithRetention.TestCase
TestQueueMachineWithRetention.settings = TestQueueMachine.settings


def test_number_of_python_calls_in_poll_does_not_grow_with_stopped_items() -> None:
    """A stop must remove the item's id from the index of queued items.

    Otherwise the next poll would need time to skip the ids of all stopped items.
    """

    def count_python_calls_of_poll(stopped: int) -> int:
        operations = Operations([ENV], history_limit=0)
        items = operations.enqueue(ENV, count=stopped + 1)
        for item in items[:stopped][::-1]:
            operations.stop_item(ENV, item.id)
        calls = 0

        def count_call(_frame: object, event: str, _argument: object) -> None:
            nonlocal calls
            calls += event in {"call", "c_call"}

        former = sys.getprofile()
        sys.setprofile(count_call)
        try:
            found = operations.poll(ENV, Poll("a"))
        finally:
            sys.setprofile(former)
        assert found is not None
        assert found.id == items[-1].id
        return calls

    assert count_python_calls_of_poll(2000) < 2 * count_python_calls_of_poll(2)


@pytest.mark.trial
def test_time_of_calls_does_not_grow_with_queue_length() -> None:
    """With 100 times as many items, the calls take less than 10 times as long, unlike a scan."""

    def measure_seconds_of_calls(count: int) -> float:
        operations = Operations([ENV], history_limit=0)
        items = operations.enqueue(ENV, count=count)
        for _ in range(count // 2):
            operations.poll(ENV, Poll("a"))
        middle = items[count // 2].id
        best = float("inf")
        for _ in range(5):
            started = time.thread_time()
            for _ in range(50):
                operations.poll(ENV, Poll("b"))
                operations.poll(ENV, Poll("b", reclaim_older_than_ms=0))
                operations.list_items(ENV, 20, after=middle)
                operations.list_items(ENV, 20, before=middle)
                operations.queue_stats(ENV)
                operations.get_item(ENV, middle)
            best = min(best, time.thread_time() - started)
        return best

    assert measure_seconds_of_calls(50_000) < 10 * measure_seconds_of_calls(500)
