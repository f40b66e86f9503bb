"""`run(until_empty=True)` runs every item of the queue once and then ends."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from workpool import Release, Session, handler
from workpool.events import ItemDeclined, SessionFinished
from workpool.testing import Hold, delay, literal

if TYPE_CHECKING:
    from workpool.server import ControlPlane
    from workpool.testing import Faults, Recorder

EARLY_SECONDS = 0.09
"""Seconds for which a poll without an item waits, a little less than its `block_ms` of 0.1 s."""


@handler
async def return_at_once(_: Session) -> None:
    await asyncio.sleep(0)


@pytest.mark.parametrize(("pollers", "prefetch"), [(1, 0), (2, 0), (4, 4)])
async def test_run_until_empty_costs_four_requests_per_item(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder, pollers: int,
    prefetch: int,
) -> None:  # fmt: skip
    items = control_plane.enqueue(200)
    sizes = {"pollers": pollers, "prefetch": prefetch, "reclaim_older_than_ms": 600_000}
    pool = make_pool(return_at_once, block_ms=20, **sizes)
    await pool.run(until_empty=True)
    assert control_plane.summary() == (200, 200, 0, 0, 0)
    assert [event.outcome for event in recorder.of(SessionFinished)] == ["completed"] * 200
    assert {event.session.item.id for event in recorder.of(SessionFinished)} == {
        item.id for item in items
    }
    delivered = [record for record in control_plane.history if record.kind == "delivered"]
    assert len(delivered) == 200
    sent = Counter(request.op for request in faults.seen)
    assert set(sent) == {"poll", "ack", "heartbeat", "stop"}
    assert sent["ack"] == sent["heartbeat"] == sent["stop"] == 200
    assert pool.abandoned == 0


async def test_run_until_empty_on_empty_queue_ends_at_first_poll_without_item(
    faults: Faults, make_pool: Any
) -> None:
    await make_pool(return_at_once, pollers=1, block_ms=20).run(until_empty=True)
    assert len(faults.of("poll")) == 1


async def test_run_until_empty_waits_for_running_sessions_and_takes_new_items(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    @handler
    async def enqueue_last_item(session: Session) -> None:
        if "last" not in session.item.metadata:
            # During this sleep, several polls return no item, but the pool must not end.
            await asyncio.sleep(0.1)
            control_plane.enqueue(metadata={"last": "yes"})

    control_plane.enqueue()
    async with asyncio.timeout(20):
        await make_pool(enqueue_last_item, pollers=2, block_ms=20).run(until_empty=True)
    assert len(recorder.of(SessionFinished)) == 2


async def test_run_until_empty_does_not_end_while_another_poll_is_in_flight(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder
) -> None:
    """One poller receives no item while an answer with an item for the other one is in flight."""
    hold = Hold(applied=True)
    faults.add(hold, "poll", times=1)
    control_plane.enqueue()
    pool = make_pool(return_at_once, pollers=2, block_ms=20)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(pool.run(until_empty=True))
        await hold.reached()
        await faults.wait_for("poll", count=2)
        await faults.wait_for("poll", answered=True)
        assert not running.done()
        hold.release()
    assert len(recorder.of(SessionFinished)) == 1


async def test_run_until_empty_ends_although_two_pollers_poll_alternately(
    control_plane: ControlPlane, faults: Faults, make_pool: Any
) -> None:
    """Each poll is answered before `block_ms` has passed.

    The poller pauses for the rest of that time, and the other poller polls during this pause.
    """

    @handler
    async def wait_until_seventh_poll(_: Session) -> None:
        await faults.wait_for("poll", count=7)

    control_plane.enqueue()
    faults.add(delay(EARLY_SECONDS / 2), "poll", skip=2, times=1)
    faults.add(delay(EARLY_SECONDS), "poll", skip=1)
    faults.add(literal(b"null"), "poll", skip=1)
    async with asyncio.timeout(20):
        await make_pool(wait_until_seventh_poll, pollers=2, block_ms=100).run(until_empty=True)


async def test_run_until_empty_ends_although_unwanted_items_are_queued(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    control_plane.enqueue(work_type="for_others")
    async with asyncio.timeout(20):
        await make_pool(return_at_once, pollers=2, block_ms=20).run(until_empty=True)
    assert recorder.of(ItemDeclined)


async def test_run_until_empty_ends_although_handler_released_its_item(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    @handler
    async def release_with_long_delay(_: Session) -> None:
        raise Release(delay=600)

    control_plane.enqueue()
    async with asyncio.timeout(20):
        await make_pool(release_with_long_delay, pollers=2, block_ms=20).run(until_empty=True)
    assert [event.outcome for event in recorder.of(SessionFinished)] == ["released"]
