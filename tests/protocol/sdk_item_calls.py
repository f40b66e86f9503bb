"""The calls for one item that have the same names and parameters in the SDKs of both vendors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.protocol.conftest import ENV

if TYPE_CHECKING:
    from tests.manual_clock import ManualClock
    from workpool.server import Item


async def check_item_calls_of_sdk(work: Any, created: Item, clock: ManualClock) -> None:
    """Acknowledge a delivered item, send a heartbeat for it, update it and read it."""
    acked = await work.ack(created.id, environment_id=ENV)
    assert (acked.state, acked.acknowledged_at) == ("starting", "2026-03-01T12:00:00Z")
    first = await work.heartbeat(
        created.id,
        environment_id=ENV,
        expected_last_heartbeat="NO_HEARTBEAT",
        desired_ttl_seconds=30,
    )
    assert (first.state, first.ttl_seconds, first.lease_extended) == ("active", 30, True)
    clock.advance(1)
    again = await work.heartbeat(
        created.id, environment_id=ENV, expected_last_heartbeat=first.last_heartbeat
    )
    assert again.last_heartbeat == "2026-03-01T12:00:01.000000Z"

    updated = await work.update(created.id, environment_id=ENV, metadata={"job": None, "k": "v"})
    assert updated.metadata == {"k": "v"}
    read = await work.retrieve(created.id, environment_id=ENV)
    assert (read.id, read.state) == (created.id, "active")
    stats = await work.stats(ENV)
    assert (stats.depth, stats.pending, stats.workers_polling) == (0, 0, 1)
