"""A poller group: the number of pollers, cooldown, refused polls, and an empty queue."""

from __future__ import annotations

import asyncio
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workpool import Settings
from workpool.errors import ConflictError, RefusedError, TransientError, WorkpoolError
from workpool.events import PollersScaled
from workpool.pool.bounded_queue import BoundedQueue
from workpool.pool.poller import REFUSED_SECONDS, PollerGroup
from workpool.pool.pool_context import PoolContext
from workpool.testing.virtual_time import in_virtual_time

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool.events import Event

MINUTE = 60.0
REFUSED = RefusedError("poll", 401, "no")
THROTTLED = TransientError("poll", 429, "x", reason="throttled")
DOWN = TransientError("poll", None, "x", reason="network")


class PollerGroupTestbed:
    """A poller group with a clock that the test moves."""

    def __init__(self, pollers: int = 3, *, until_empty: bool = False) -> None:
        self.now = 1000.0
        self.events: list[Event] = []
        self.fatal: list[WorkpoolError] = []
        self.emptied = 0
        self.queue: BoundedQueue[Any] = BoundedQueue(2, 0)
        context = PoolContext(
            settings=Settings(pollers=pollers),
            client=cast("Any", None),
            plugins=cast("Any", None),
            renewer=cast("Any", None),
            queue=self.queue,
            clock=lambda: self.now,
            observe=cast("Any", lambda kind, *values: self.events.append(kind(*values))),
            start_context=copy_context(),
            threads=cast("Any", None),
        )
        self.group = PollerGroup(
            context,
            until_empty=until_empty,
            on_fatal=self.fatal.append,
            on_empty=self._count_call_of_on_empty,
        )

    def _count_call_of_on_empty(self) -> None:
        self.emptied += 1

    def record_poll_without_item(self) -> None:
        self.group.record_poll_success(self.now, null=True)

    def record_poll_with_item(self) -> None:
        self.group.record_poll_success(self.now, null=False)

    def record_throttled_poll(self) -> None:
        self.group.halve_pollers()

    def refuse_polls_for_minutes(self, minutes: float) -> None:
        """Refuse one poll now, and one every ten seconds, for the given number of minutes."""
        until = self.now + minutes * MINUTE
        while self.now <= until:
            self.group.record_poll_failure(REFUSED)
            self.now += 10
        self.now = until


def test_refused_poll_is_fatal_at_once_if_no_poll_succeeded_before() -> None:
    bench = PollerGroupTestbed()
    bench.group.record_poll_failure(REFUSED)
    assert bench.fatal == [REFUSED]


def test_transient_poll_failures_are_never_fatal() -> None:
    bench = PollerGroupTestbed()
    for error in (DOWN, THROTTLED):
        for _ in range(100):
            bench.group.record_poll_failure(error)
            bench.now += MINUTE
    assert not bench.fatal
    assert not bench.group.refused


def test_polls_refused_for_five_minutes_are_fatal() -> None:
    bench = PollerGroupTestbed()
    bench.record_poll_without_item()
    # The limit of five minutes begins with the first refused poll, not with the last success.
    bench.now += 60 * MINUTE
    assert REFUSED_SECONDS == 5 * MINUTE
    bench.refuse_polls_for_minutes(5 - 1 / MINUTE)
    assert not bench.fatal
    assert bench.group.refused
    bench.now += 1
    bench.group.record_poll_failure(REFUSED)
    assert bench.fatal == [REFUSED]


@pytest.mark.parametrize(
    "between",
    [
        lambda bench: bench.record_poll_without_item(),
        lambda bench: bench.record_poll_with_item(),
        lambda bench: bench.group.record_poll_failure(DOWN),
        lambda bench: bench.group.record_poll_failure(THROTTLED),
    ],
    ids=["null", "item", "network error", "throttled"],
)
def test_time_limit_of_refused_polls_restarts_after_any_other_poll_result(
    between: Callable[[PollerGroupTestbed], None],
) -> None:
    bench = PollerGroupTestbed()
    bench.record_poll_without_item()
    bench.refuse_polls_for_minutes(4)
    between(bench)
    assert not bench.group.refused
    bench.refuse_polls_for_minutes(4.9)
    assert not bench.fatal
    bench.refuse_polls_for_minutes(0.2)
    assert bench.fatal


def test_last_successful_poll_is_measured_on_lease_clock() -> None:
    bench = PollerGroupTestbed()
    assert bench.group.last_success_at is None
    bench.record_poll_without_item()
    bench.now += 7
    bench.group.record_poll_failure(REFUSED)
    assert bench.group.last_success_at == 1000.0


def test_consecutive_polls_without_item_are_logged_only_once_as_idle(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "workpool")
    bench = PollerGroupTestbed()
    for _ in range(5):
        bench.record_poll_without_item()
    assert [record.message for record in caplog.records] == ["idle; waiting for work"]
    bench.record_poll_with_item()
    bench.record_poll_without_item()
    assert len(caplog.records) == 2


@in_virtual_time
async def test_later_cooldown_may_extend_but_never_shortens_cooldown_of_pollers() -> None:
    group = PollerGroupTestbed().group
    loop = asyncio.get_running_loop()
    group.begin_cooldown(5)
    loop.call_later(1, group.begin_cooldown, 20)
    loop.call_later(2, group.begin_cooldown, 1)
    await group.wait_for_cooldown()
    assert loop.time() == pytest.approx(21)


@in_virtual_time
async def test_poller_group_does_not_wait_for_cooldown_if_no_poll_was_refused() -> None:
    group = PollerGroupTestbed().group
    await group.wait_for_cooldown()
    assert asyncio.get_running_loop().time() == 0


@in_virtual_time
async def test_pollers_back_off_after_two_or_more_consecutive_ack_conflicts() -> None:
    group = PollerGroupTestbed().group
    loop = asyncio.get_running_loop()
    conflict = ConflictError("ack", 409, "another worker has it")
    group.record_ack_result(conflict)
    group._conflict_backoff._rng = lambda: 1.0
    waits = []
    for _ in range(7):
        before = loop.time()
        await group.wait_for_cooldown()
        waits.append(loop.time() - before)
        group.record_ack_result(conflict)
    assert waits == pytest.approx([0, 0.1, 0.2, 0.4, 0.8, 1.6, 3])
    assert not group.ack_refused
    await group.wait_for_cooldown()
    before = loop.time()
    group.record_ack_result(None)
    group.record_ack_result(conflict)
    await group.wait_for_cooldown()
    assert loop.time() == before


@in_virtual_time
async def test_pollers_wait_with_growing_delay_after_refused_acks() -> None:
    group = PollerGroupTestbed().group
    loop = asyncio.get_running_loop()
    group._ack_backoff._rng = lambda: 1.0
    waits = []
    for _ in range(7):
        group.record_ack_result(RefusedError("ack", 403, "no"))
        assert group.ack_refused
        before = loop.time()
        await group.wait_for_cooldown()
        waits.append(loop.time() - before)
    assert waits == pytest.approx([1, 2, 4, 8, 16, 30, 30])
    group.record_ack_result(None)
    assert not group.ack_refused
    await group.wait_for_cooldown()
    group.record_ack_result(RefusedError("ack", 403, "no"))
    before = loop.time()
    await group.wait_for_cooldown()
    assert loop.time() - before == pytest.approx(1)


def test_number_of_pollers_falls_after_empty_polls_and_recovers_with_items() -> None:
    bench = PollerGroupTestbed(3)
    for _ in range(4):
        bench.record_poll_without_item()
    assert bench.group.target == 1
    for _ in range(4):
        bench.record_poll_with_item()
    assert bench.group.target == 3
    assert bench.events == [
        PollersScaled("down", "nulls", 2), PollersScaled("down", "nulls", 1),
        PollersScaled("up", "hits", 2), PollersScaled("up", "hits", 3),
    ]  # fmt: skip


def test_each_throttled_poll_halves_number_of_pollers_down_to_one() -> None:
    bench = PollerGroupTestbed(9)
    for _ in range(5):
        bench.record_throttled_poll()
    assert bench.events == [PollersScaled("down", "throttled", target) for target in (4, 2, 1)]


@in_virtual_time
async def test_surplus_poller_waits_until_another_poller_receives_an_item() -> None:
    bench = PollerGroupTestbed(2)
    bench.record_poll_without_item()
    await bench.group.wait_until_poller_needed(0)
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(bench.group.wait_until_poller_needed(1))
        await asyncio.sleep(100)
        assert not waiting.done()
        bench.record_poll_with_item()


@given(
    st.integers(1, 6),
    st.lists(
        st.sampled_from(
            ["record_poll_with_item", "record_poll_without_item", "record_throttled_poll"]
        )
    ),
)
def test_number_of_pollers_stays_within_limits_and_each_change_emits_event(
    limit: int, answers: list[str]
) -> None:
    bench = PollerGroupTestbed(limit)
    group, before = bench.group, limit
    for answer in answers:
        getattr(bench, answer)()
        assert 1 <= group.target <= limit
        assert [number < group.target for number in range(limit)] == [
            number < group.target for number in range(limit)
        ]
        if group.target != before:
            change = bench.events.pop()
            assert isinstance(change, PollersScaled)
            assert change.target == group.target
            assert (change.direction == "up") == (group.target > before)
        assert not bench.events
        before = group.target


@in_virtual_time
async def test_pool_with_setting_until_empty_ends_when_queue_is_empty_and_nothing_runs() -> None:
    bench = PollerGroupTestbed(until_empty=True)
    other = PollerGroupTestbed()
    # Without until_empty, an empty queue does not end the pool.
    await other.group.end_if_queue_is_empty()
    assert (other.emptied, other.group.ended) == (0, False)
    await bench.queue.reserve_place()
    bench.queue.put_item("item")
    # The queue is not idle while one item waits for a slot.
    await bench.group.end_if_queue_is_empty()
    bench.queue.take_startable_item()
    await bench.group.end_if_queue_is_empty()  # The queue is not idle while one item runs.
    assert bench.emptied == 0
    bench.queue.release_slot()
    bench.group.record_poll_sent()
    async with asyncio.TaskGroup() as group:
        # The pool must not end, because another poll is in flight and may bring an item.
        waiting = group.create_task(bench.group.end_if_queue_is_empty())
        await asyncio.sleep(1)
        assert (waiting.done(), bench.emptied) == (False, 0)
        bench.group.record_poll_answered()
    assert (bench.emptied, bench.group.ended) == (0, False)
    await bench.group.end_if_queue_is_empty()
    assert (bench.emptied, bench.group.ended) == (1, True)
