"""Long polls: requests that wait until an item is available.

The tests in the first half run on an event loop whose time jumps from timer to timer, so that they
can compare exact times. The tests in the second half use HTTP. See workpool/docs/protocol.md,
"Poll".
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

    from tests.manual_clock import ManualClock
    from tests.protocol.conftest import ApiClient
    from workpool.server import Item


class VirtualTimeEventLoop(asyncio.SelectorEventLoop):
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
    """Run `check` in virtual time, and pass it new `Operations` that use the event loop's clock."""
    with asyncio.Runner(loop_factory=VirtualTimeEventLoop) as runner:

        async def pass_new_operations_to_check() -> Any:
            loop = asyncio.get_running_loop()
            return await check(Operations([ENV], now=lambda: START + loop.time()))

        return runner.run(pass_new_operations_to_check())


def client_is_never_disconnected() -> bool:
    return False


async def poll_and_return_time_and_item(
    operations: Operations, **poll: Any
) -> tuple[float, Item | None]:
    item = await operations.long_poll(ENV, Poll(**poll), client_is_never_disconnected)
    return round(asyncio.get_running_loop().time(), 3), item


def test_poll_of_empty_queue_waits_for_milliseconds_in_block_ms_parameter() -> None:
    assert run_in_virtual_time(
        lambda operations: poll_and_return_time_and_item(operations, block_ms=250)
    ) == (
        0.25,
        None,
    )


def test_waiting_poll_returns_at_once_when_item_arrives() -> None:
    async def enqueue_during_poll(operations: Operations) -> None:
        async with asyncio.TaskGroup() as group:
            poll = group.create_task(poll_and_return_time_and_item(operations, block_ms=999))
            await asyncio.sleep(0.3)
            operations.enqueue(ENV)
        at, item = poll.result()
        assert (at, item is not None) == (0.3, True)

    run_in_virtual_time(enqueue_during_poll)


@pytest.mark.parametrize("reclaim", [0, 1, 200, 700])
def test_waiting_poll_returns_when_redelivery_becomes_due(reclaim: int) -> None:
    async def poll_until_redelivery(operations: Operations) -> None:
        operations.enqueue(ENV)
        operations.poll(ENV, Poll("a"))
        await asyncio.sleep(0.1)
        at, item = await poll_and_return_time_and_item(
            operations, block_ms=999, reclaim_older_than_ms=reclaim
        )
        assert item is not None
        assert at == max(0.1, reclaim / 1000)

    run_in_virtual_time(poll_until_redelivery)


def test_poll_receives_unacknowledged_item_of_earlier_poll_after_reclaim_window() -> None:
    async def deliver_item_twice(operations: Operations) -> None:
        async with asyncio.TaskGroup() as group:
            first = group.create_task(poll_and_return_time_and_item(operations, block_ms=999))
            second = group.create_task(
                poll_and_return_time_and_item(operations, block_ms=999, reclaim_older_than_ms=200)
            )
            await asyncio.sleep(0.1)
            operations.enqueue(ENV)
        assert [poll.result()[0] for poll in (first, second)] == [0.1, 0.3]
        assert None not in [poll.result()[1] for poll in (first, second)]

    run_in_virtual_time(deliver_item_twice)


def test_waiting_poll_ends_without_item_if_redelivery_is_due_after_end_of_poll() -> None:
    async def poll_without_due_item(operations: Operations) -> None:
        operations.enqueue(ENV)
        operations.poll(ENV, Poll("a"))
        assert await poll_and_return_time_and_item(operations, block_ms=999) == (0.999, None)

    run_in_virtual_time(poll_without_due_item)


@pytest.mark.parametrize("state", ["starting", "active"])
def test_waiting_poll_returns_when_lease_expires(state: str) -> None:
    async def poll_until_lease_expires(operations: Operations) -> None:
        (item,) = operations.enqueue(ENV)
        operations.ack_item(ENV, item.id)
        lease = 60.0
        if state == "active":
            operations.heartbeat(ENV, item.id, ttl_seconds=10)
            lease = 10.0
        await asyncio.sleep(lease - 0.5)
        at, again = await poll_and_return_time_and_item(operations, block_ms=999)
        assert again is not None
        assert (at, again.id) == (lease, item.id)

    run_in_virtual_time(poll_until_lease_expires)


def test_waiting_polls_receive_one_item_each_in_order() -> None:
    async def enqueue_for_five_polls(operations: Operations) -> None:
        async with asyncio.TaskGroup() as group:
            polls = []
            for _ in range(5):
                polls.append(
                    group.create_task(poll_and_return_time_and_item(operations, block_ms=999))
                )
                await asyncio.sleep(0.01)
            created = operations.enqueue(ENV, count=3)
        items = [poll.result()[1] for poll in polls]
        assert [item and item.id for item in items] == [*(item.id for item in created), None, None]

    run_in_virtual_time(enqueue_for_five_polls)


def test_thousand_waiting_polls_receive_one_item_each() -> None:
    async def enqueue_one_item_per_poll(operations: Operations) -> None:
        async with asyncio.TaskGroup() as group:
            polls = [
                group.create_task(poll_and_return_time_and_item(operations, block_ms=999))
                for _ in range(1000)
            ]
            await asyncio.sleep(0.1)
            for _ in range(1000):
                operations.enqueue(ENV)
        items = [poll.result()[1] for poll in polls]
        assert len({item.id for item in items if item is not None}) == 1000
        assert {poll.result()[0] for poll in polls} == {0.1}

    run_in_virtual_time(enqueue_one_item_per_poll)


def test_method_end_waiting_calls_ends_waiting_and_later_polls_without_item() -> None:
    async def end_waiting_calls_during_polls(operations: Operations) -> None:
        async with asyncio.TaskGroup() as group:
            polls = [
                group.create_task(poll_and_return_time_and_item(operations, block_ms=999))
                for _ in range(3)
            ]
            await asyncio.sleep(0.1)
            operations.end_waiting_calls()
        assert [poll.result() for poll in polls] == [(0.1, None)] * 3
        assert await poll_and_return_time_and_item(operations, block_ms=999) == (0.1, None)

    run_in_virtual_time(end_waiting_calls_during_polls)


async def test_server_wakes_next_poll_if_the_poll_woken_first_is_cancelled() -> None:
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


def test_item_wakes_next_waiting_poll_if_client_of_first_poll_has_disconnected() -> None:
    async def disconnect_first_of_two_polls(operations: Operations) -> None:
        left = False
        async with asyncio.TaskGroup() as group:
            poll = Poll(block_ms=999)
            first = group.create_task(operations.long_poll(ENV, poll, lambda: left))
            await asyncio.sleep(0.1)
            second = group.create_task(poll_and_return_time_and_item(operations, block_ms=999))
            await asyncio.sleep(0.1)
            left = True
            operations.enqueue(ENV)
        assert first.result() is None
        at, item = second.result()
        assert (at, item is not None) == (0.2, True)

    run_in_virtual_time(disconnect_first_of_two_polls)


def test_withdrawn_delivery_wakes_next_poll() -> None:
    async def withdraw_delivery_during_poll(operations: Operations) -> None:
        operations.enqueue(ENV)
        delivered = operations.poll(ENV, Poll("gone"))
        assert delivered is not None
        async with asyncio.TaskGroup() as group:
            poll = group.create_task(poll_and_return_time_and_item(operations, block_ms=999))
            await asyncio.sleep(0.3)
            operations.withdraw_delivery(delivered)
        at, item = poll.result()
        assert (at, item is not None) == (0.3, True)

    run_in_virtual_time(withdraw_delivery_during_poll)


def test_waiting_poll_wakes_when_another_call_notices_an_expired_lease() -> None:
    async def read_stats_during_poll(operations: Operations) -> None:
        (item,) = operations.enqueue(ENV)
        operations.ack_item(ENV, item.id)
        await asyncio.sleep(59.5)
        async with asyncio.TaskGroup() as group:
            poll = group.create_task(poll_and_return_time_and_item(operations, block_ms=999))
            await asyncio.sleep(0.5)
            operations.queue_stats(ENV)
        at, again = poll.result()
        assert (at, again is not None) == (60.0, True)

    run_in_virtual_time(read_stats_during_poll)


@pytest.mark.usefixtures("allow_polls_of_one_minute")
async def test_enqueue_over_http_wakes_waiting_poll(api: ApiClient) -> None:
    waiting = api.plane.operations.get_queue(ENV).waiting
    # Half of the poll's waiting time: a poll that is not woken fails the test.
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        poll = group.create_task(api.poll(params={"block_ms": "60000"}))
        await wait_until(lambda: len(waiting) == 1)
        created = (await api("POST", api.work_url())).body["data"][0]
    assert poll.result().body["id"] == created["id"]


@pytest.mark.usefixtures("allow_polls_of_one_minute")
async def test_waiting_poll_that_is_woken_after_lease_expiry_receives_the_item(
    api: ApiClient, clock: ManualClock
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
