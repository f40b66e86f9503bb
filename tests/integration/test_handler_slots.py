"""The handler limits `max_sessions` and `reserved_sessions`, and the throughput under them.

See workpool/docs/routing.md, "Limits of handlers".
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from workpool import PluginError, Session, handler
from workpool.events import ItemDeclined, SessionFinished, SessionStarted
from workpool.pool.exit_limits import ExitLimits
from workpool.pool.shared_slots import SharedPoolResources, SharedSlots
from workpool.testing import in_virtual_time

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from workpool.testing import Kit

MINUTE_SECONDS = 60.0


def list_acked_items(workpool: Kit) -> list[str]:
    return [each.work_id for each in workpool.server.history if each.kind == "acked"]


def make_session_counting_handler(
    seconds: float, running: Counter[str], *, most: int | None = None, reserved: int = 0
) -> Callable[[Session], Coroutine[Any, Any, None]]:
    """Return a handler that runs for `seconds` and counts its concurrent sessions in `running`."""

    async def count_running_sessions(_: Session) -> None:
        running["now"] += 1
        running["most"] = max(running["most"], running["now"])
        await asyncio.sleep(seconds)
        running["now"] -= 1

    handler(metadata={"kind": "limited"}, max_sessions=most, reserved_sessions=reserved)(
        count_running_sessions
    )
    return count_running_sessions


@handler
async def sleep_for_seconds(session: Session) -> None:
    await asyncio.sleep(float(session.item.metadata.get("seconds", "0")))


@pytest.mark.parametrize("seconds", [0.01, 0.2, 1.0])
@in_virtual_time
async def test_max_sessions_limits_concurrency_of_handler_without_delay_between_sessions(
    workpool: Kit, seconds: float
) -> None:
    running: Counter[str] = Counter()
    workpool.enqueue(count=40, metadata={"kind": "limited"})
    clock = asyncio.get_running_loop().time
    async with workpool.pool(make_session_counting_handler(seconds, running, most=2)):
        started = clock()
        await workpool.wait_for(SessionFinished, count=40)
        elapsed = clock() - started
    assert running["most"] == 2
    # Two at a time, the 40 sessions take 20 times `seconds`. Polls may add 10 % and 0.5 s.
    assert elapsed <= 40 * seconds / 2 * 1.1 + 0.5


@in_virtual_time
async def test_item_of_handler_at_session_limit_is_acknowledged_when_slot_becomes_free(
    workpool: Kit,
) -> None:
    workpool.enqueue(count=2, metadata={"kind": "limited"})
    async with workpool.pool(make_session_counting_handler(3.0, Counter(), most=1)):
        await workpool.wait_for(SessionStarted)
        await asyncio.sleep(2.9)
        assert len(list_acked_items(workpool)) == 1
        await workpool.wait_for(SessionFinished, count=2)
    assert len([each for each in workpool.server.history if each.kind == "delivered"]) == 2


@in_virtual_time
async def test_item_that_waits_for_busy_handler_is_declined_shortly_before_redelivery(
    workpool: Kit,
) -> None:
    workpool.enqueue(count=2, metadata={"kind": "limited"})
    clock = asyncio.get_running_loop().time
    async with workpool.pool(make_session_counting_handler(MINUTE_SECONDS, Counter(), most=1)):
        started = clock()
        declined = await workpool.wait_for(ItemDeclined)
        assert declined.reason == "busy"
        assert clock() - started == pytest.approx(4.0, abs=0.2)
        await workpool.wait_for(SessionFinished, count=2, timeout=10 * MINUTE_SECONDS)
    assert len(list_acked_items(workpool)) == 2


def make_callback_taking_one_slot(
    granted: asyncio.Event,
) -> Callable[[], Callable[[], None] | None]:
    """Return a callback for `SlotShare.next_use` that takes one slot and sets `granted`."""
    return lambda: None if granted.is_set() else granted.set


@in_virtual_time
async def test_item_of_handler_at_limit_starts_when_another_environment_frees_shared_slot(
    workpool: Kit,
) -> None:
    slots = SharedSlots(8)
    own, others = slots.add_environment_share(), slots.add_environment_share()
    assert others.take_slot()
    assert others.take_slot()
    workpool.enqueue(count=4, metadata={"seconds": str(MINUTE_SECONDS)})
    workpool.enqueue(count=2, metadata={"kind": "limited"})
    pool = workpool.pool(
        make_session_counting_handler(3, Counter(), most=1), sleep_for_seconds, concurrency=8
    )
    pool.shared = SharedPoolResources(own, ExitLimits(pool.settings), None)
    clock = asyncio.get_running_loop().time
    slot_of_poller, slot_of_session = asyncio.Event(), asyncio.Event()
    async with pool:
        await workpool.wait_for(SessionStarted, count=5)
        async with asyncio.timeout(MINUTE_SECONDS):
            while pool.live_status(show_ids=False)["queue"]["set_aside"] == 0:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.1)
        others.next_use = make_callback_taking_one_slot(slot_of_poller)
        await slot_of_poller.wait()
        others.next_use = make_callback_taking_one_slot(slot_of_session)
        await slot_of_session.wait()
        assert len(workpool.recorder.of(SessionStarted)) == 5
        freed_at = clock()
        others.return_slot()
        others.grant_free_slots()
        await workpool.wait_for(SessionStarted, count=6)
        assert clock() - freed_at < 0.1


@in_virtual_time
async def test_items_of_other_handlers_overtake_items_of_handler_at_session_limit(
    workpool: Kit,
) -> None:
    limited = make_session_counting_handler(3.0, Counter(), most=1)
    workpool.enqueue(count=4, metadata={"kind": "limited"})
    (item,) = workpool.enqueue()
    async with workpool.pool(limited, sleep_for_seconds):
        first = await workpool.wait_for(SessionFinished, timeout=1)
        assert first.session.item.id == item.id


@in_virtual_time
async def test_run_until_empty_completes_all_items_of_handler_at_session_limit(
    workpool: Kit,
) -> None:
    workpool.enqueue(count=5, metadata={"kind": "limited"})
    limited = make_session_counting_handler(0.5, Counter(), most=1)
    await workpool.pool(limited).run(until_empty=True)
    assert workpool.server.summary().stopped == 5


@in_virtual_time
async def test_paused_or_draining_pool_claims_no_item_of_handler_at_session_limit(
    workpool: Kit,
) -> None:
    workpool.enqueue(count=4, metadata={"kind": "limited"})
    limited = make_session_counting_handler(2.0, Counter(), most=1)
    async with workpool.pool(limited) as pool:
        await workpool.wait_for(SessionStarted)
        await asyncio.sleep(1)
        pool.pause("a test")
        await asyncio.sleep(MINUTE_SECONDS)
        assert len(list_acked_items(workpool)) == 1
        pool.resume()
        await workpool.wait_for(SessionStarted, count=2, timeout=10)
    assert len(list_acked_items(workpool)) == 2


@in_virtual_time
async def test_reserved_slots_stay_free_for_their_handler(workpool: Kit) -> None:
    running: Counter[str] = Counter()
    urgent = make_session_counting_handler(1.0, running, reserved=2)
    workpool.enqueue(count=8, metadata={"seconds": "600"})
    async with workpool.pool(urgent, sleep_for_seconds, concurrency=5) as pool:
        await asyncio.sleep(30)
        assert pool.status().running == 3
        workpool.enqueue(count=2, metadata={"kind": "limited"})
        await workpool.wait_for(SessionFinished, count=2, timeout=MINUTE_SECONDS)
        assert running["most"] == 2


@in_virtual_time
async def test_handler_with_reserved_slots_may_use_unreserved_slots_too(workpool: Kit) -> None:
    running: Counter[str] = Counter()
    workpool.enqueue(count=5, metadata={"kind": "limited"})
    async with workpool.pool(
        make_session_counting_handler(1.0, running, reserved=1), sleep_for_seconds, concurrency=5
    ):
        await workpool.wait_for(SessionFinished, count=5)
    assert running["most"] == 5


@pytest.mark.parametrize(
    ("reserved", "message"),
    [
        (
            3,
            "(count_running_sessions.count_running_sessions 3), and concurrency is 2",
        ),
        (2, "sleep_for_seconds.sleep_for_seconds would never run: all 2 slots are reserved"),
    ],
)
async def test_reserved_slots_that_leave_no_slot_for_other_handlers_prevent_start(
    workpool: Kit, reserved: int, message: str
) -> None:
    limited = make_session_counting_handler(0.0, Counter(), reserved=reserved)
    with pytest.raises(PluginError) as refused:
        async with workpool.pool(limited, sleep_for_seconds, concurrency=2):
            raise AssertionError("started")
    assert message in str(refused.value)


@in_virtual_time
async def test_redelivered_item_of_handler_at_session_limit_runs_once(workpool: Kit) -> None:
    workpool.enqueue(count=2, metadata={"kind": "limited"})
    async with workpool.pool(make_session_counting_handler(2.0, Counter(), most=1)) as pool:
        await workpool.wait_for(SessionStarted)
        await asyncio.sleep(1)
        assert pool._view is not None
        dispatcher, queue = pool._view.dispatcher, pool._view.context.queue
        (aside,) = queue.items_set_aside
        await queue.reserve_place()
        assert dispatcher.offer_item(aside.work_item, pool._view.context.clock()) == "not_taken"
        queue.release_reserved_place()
        assert queue.items_set_aside == [aside]
        await workpool.wait_for(SessionFinished, count=2)
    assert len(list_acked_items(workpool)) == 2
