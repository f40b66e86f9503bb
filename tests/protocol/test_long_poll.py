"""Long polls, which return as soon as an item is available.

The first half runs the calls on a loop whose time jumps from timer to timer: all times are exact.
The second half uses HTTP. See workpool/docs/protocol.md, "Poll".
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from tests.protocol.conftest import ENV, OTHER, START, wait_until
from workpool.server import Operations, Poll
from workpool.server.queue.long_polls import WaitingPolls

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.protocol.conftest import ApiClient, MovableClock
    from workpool.server import Item


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time jumps to the next timer, so that waits take no real time."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def time(self) -> float:
        return self.seconds

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]  # asyncio's own
            self.seconds = max(self.seconds, self._scheduled[0].when())  # type: ignore[attr-defined]  # asyncio's own
        super()._run_once()  # type: ignore[misc]  # asyncio's own


def run_in_virtual_time(check: Callable[[Operations], Awaitable[Any]]) -> Any:
    """Run a check in virtual time, with operations whose clock begins at `START`."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:

        async def run_check() -> Any:
            loop = asyncio.get_running_loop()
            return await check(Operations([ENV], now=lambda: START + loop.time()))

        return runner.run(run_check())


def client_has_left() -> bool:
    return False


async def measure_poll(operations: Operations, **poll: Any) -> tuple[float, Item | None]:
    item = await operations.long_poll(ENV, Poll(**poll), client_has_left)
    return round(asyncio.get_running_loop().time(), 3), item


def test_poll_of_empty_queue_waits_for_block_ms() -> None:
    assert run_in_virtual_time(lambda operations: measure_poll(operations, block_ms=250)) == (
        0.25,
        None,
    )


def test_waiting_poll_returns_at_once_when_item_arrives() -> None:
    async def check_wake_up_by_new_item(operations: Operations) -> None:
        async with asyncio.TaskGroup() as group:
            poll = group.create_task(measure_poll(operations, block_ms=999))
            await asyncio.sleep(0.3)
            operations.enqueue(ENV)
        at, item = poll.result()
        assert (at, item is not None) == (0.3, True)

    run_in_virtual_time(check_wake_up_by_new_item)


@pytest.mark.parametrize("reclaim", [0, 1, 200, 700])
def test_waiting_poll_returns_when_redelivery_becomes_due(reclaim: int) -> None:
    async def check_wake_up_by_redelivery(operations: Operations) -> None:
        operations.enqueue(ENV)
        operations.poll(ENV, Poll("a"))
        await asyncio.sleep(0.1)
        at, item = await measure_poll(operations, block_ms=999, reclaim_older_than_ms=reclaim)
        assert item is not None
        assert at == max(0.1, reclaim / 1000)

    run_in_virtual_time(check_wake_up_by_redelivery)


def test_waiting_poll_receives_item_delivered_meanwhile_once_redelivery_is_due() -> None:
    async def check_poll_of_delivered_item(operations: Operations) -> None:
        async with asyncio.TaskGroup() as group:
            first = group.create_task(measure_poll(operations, block_ms=999))
            second = group.create_task(
                measure_poll(operations, block_ms=999, reclaim_older_than_ms=200)
            )
            await asyncio.sleep(0.1)
            operations.enqueue(ENV)
        assert [poll.result()[0] for poll in (first, second)] == [0.1, 0.3]
        assert None not in [poll.result()[1] for poll in (first, second)]

    run_in_virtual_time(check_poll_of_delivered_item)


def test_waiting_poll_ends_without_item_if_redelivery_is_due_later() -> None:
    async def check_end_without_item(operations: Operations) -> None:
        operations.enqueue(ENV)
        operations.poll(ENV, Poll("a"))
        assert await measure_poll(operations, block_ms=999) == (0.999, None)

    run_in_virtual_time(check_end_without_item)


@pytest.mark.parametrize("state", ["starting", "active"])
def test_waiting_poll_returns_when_lease_expires(state: str) -> None:
    async def check_wake_up_by_expired_lease(operations: Operations) -> None:
        (item,) = operations.enqueue(ENV)
        operations.ack_item(ENV, item.id)
        lease = 60.0
        if state == "active":
            operations.heartbeat(ENV, item.id, ttl_seconds=10)
            lease = 10.0
        await asyncio.sleep(lease - 0.5)
        at, again = await measure_poll(operations, block_ms=999)
        assert again is not None
        assert (at, again.id) == (lease, item.id)

    run_in_virtual_time(check_wake_up_by_expired_lease)


def test_waiting_polls_receive_one_item_each_in_order() -> None:
    async def check_order_of_polls(operations: Operations) -> None:
        async with asyncio.TaskGroup() as group:
            polls = []
            for _ in range(5):
                polls.append(group.create_task(measure_poll(operations, block_ms=999)))
                await asyncio.sleep(0.01)
            created = operations.enqueue(ENV, count=3)
        items = [poll.result()[1] for poll in polls]
        assert [item and item.id for item in items] == [*(item.id for item in created), None, None]

    run_in_virtual_time(check_order_of_polls)


def test_thousand_waiting_polls_receive_thousand_items() -> None:
    async def check_thousand_polls(operations: Operations) -> None:
        async with asyncio.TaskGroup() as group:
            polls = [group.create_task(measure_poll(operations, block_ms=999)) for _ in range(1000)]
            await asyncio.sleep(0.1)
            for _ in range(1000):
                operations.enqueue(ENV)
        items = [poll.result()[1] for poll in polls]
        assert len({item.id for item in items if item is not None}) == 1000
        assert {poll.result()[0] for poll in polls} == {0.1}

    run_in_virtual_time(check_thousand_polls)


def test_end_waits_answers_all_waiting_polls() -> None:
    async def check_end_of_waits(operations: Operations) -> None:
        async with asyncio.TaskGroup() as group:
            polls = [group.create_task(measure_poll(operations, block_ms=999)) for _ in range(3)]
            await asyncio.sleep(0.1)
            operations.end_waits()
        assert [poll.result() for poll in polls] == [(0.1, None)] * 3
        assert await measure_poll(operations, block_ms=999) == (0.1, None)

    run_in_virtual_time(check_end_of_waits)


async def test_wake_up_of_cancelled_poll_goes_to_next_poll() -> None:
    waiting = WaitingPolls()
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        first = group.create_task(waiting.wait_until_woken(60, reclaiming=False))
        second = group.create_task(waiting.wait_until_woken(60, reclaiming=False))
        await wait_until(lambda: len(waiting) == 2)
        waiting.wake_polls(1)
        first.cancel()
        await second
    assert first.cancelled()
    assert len(waiting) == 0


def test_wake_up_of_poll_with_disconnected_client_goes_to_next_poll() -> None:
    async def check_wake_up_of_next_poll(operations: Operations) -> None:
        left = False
        async with asyncio.TaskGroup() as group:
            poll = Poll(block_ms=999)
            first = group.create_task(operations.long_poll(ENV, poll, lambda: left))
            await asyncio.sleep(0.1)
            second = group.create_task(measure_poll(operations, block_ms=999))
            await asyncio.sleep(0.1)
            left = True
            operations.enqueue(ENV)
        assert first.result() is None
        at, item = second.result()
        assert (at, item is not None) == (0.2, True)

    run_in_virtual_time(check_wake_up_of_next_poll)


def test_withdrawn_delivery_wakes_next_poll() -> None:
    async def check_wake_up_by_withdrawal(operations: Operations) -> None:
        operations.enqueue(ENV)
        delivered = operations.poll(ENV, Poll("gone"))
        assert delivered is not None
        async with asyncio.TaskGroup() as group:
            poll = group.create_task(measure_poll(operations, block_ms=999))
            await asyncio.sleep(0.3)
            operations.withdraw_delivery(delivered)
        at, item = poll.result()
        assert (at, item is not None) == (0.3, True)

    run_in_virtual_time(check_wake_up_by_withdrawal)


def test_expired_lease_noticed_by_another_call_wakes_poll() -> None:
    async def check_wake_up_by_other_call(operations: Operations) -> None:
        (item,) = operations.enqueue(ENV)
        operations.ack_item(ENV, item.id)
        await asyncio.sleep(59.5)
        async with asyncio.TaskGroup() as group:
            poll = group.create_task(measure_poll(operations, block_ms=999))
            await asyncio.sleep(0.5)
            operations.queue_stats(ENV)
        at, again = poll.result()
        assert (at, again is not None) == (60.0, True)

    run_in_virtual_time(check_wake_up_by_other_call)


@pytest.mark.usefixtures("polls_up_to_a_minute")
async def test_enqueue_over_http_wakes_waiting_poll(api: ApiClient) -> None:
    waiting = api.plane.operations.get_queue(ENV).waiting
    async with asyncio.TaskGroup() as group:
        poll = group.create_task(api.poll(params={"block_ms": "60000"}))
        await wait_until(lambda: len(waiting) == 1)
        created = (await api("POST", api.work_url())).body["data"][0]
    assert poll.result().body["id"] == created["id"]
    delivered, made = (
        next(record for record in api.plane.history if record.kind == kind)
        for kind in ("delivered", "created")
    )
    # The clock of the control plane stands still, so no timeout delivered the item.
    assert delivered.time == made.time


@pytest.mark.usefixtures("polls_up_to_a_minute")
async def test_waiting_poll_woken_after_clock_was_moved_receives_item_with_expired_lease(
    api: ApiClient, clock: MovableClock
) -> None:
    work_id = await api.create_item_in_state("active")
    waiting = api.plane.operations.get_queue(ENV).waiting
    async with asyncio.TaskGroup() as group:
        poll = group.create_task(api.poll(params={"block_ms": "60000"}))
        await wait_until(lambda: len(waiting) == 1)
        clock.advance(60)
        api.plane.operations.wake_all_polls()
    assert poll.result().body["id"] == work_id


async def test_enqueue_in_one_environment_does_not_wake_poll_of_another(api: ApiClient) -> None:
    waiting = api.plane.operations.get_queue(ENV).waiting
    async with asyncio.TaskGroup() as group:
        poll = group.create_task(api.poll(params={"block_ms": "999"}))
        await wait_until(lambda: len(waiting) == 1)
        api.plane.enqueue(environment_id=OTHER)
        assert len(waiting) == 1
    assert poll.result().body is None
