"""The exact times at which leases end and items are delivered again.

See workpool/docs/protocol.md, "Leases".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.manual_clock import ManualClock
    from tests.protocol.conftest import ApiClient

pytestmark = pytest.mark.usefixtures("memory_and_sqlite_stores")


@pytest.mark.parametrize("seen_by", ["poll", "get", "list", "stats", "ack", "heartbeat"])
async def test_every_call_treats_item_with_expired_lease_as_queued_item(
    api: ApiClient, clock: ManualClock, seen_by: str
) -> None:
    work_id = await api.create_item_in_state("active", "a")
    clock.advance(59.999999)
    assert (await api.get(work_id)).body["state"] == "active"
    # The lease ends in 1 µs. Advance by 2 µs, because the clock is a float and is rounded.
    clock.advance(0.000002)
    if seen_by == "poll":
        assert (await api.claim_item())["id"] == work_id
    elif seen_by == "get":
        assert await api.item_state(work_id) == "queued"
    elif seen_by == "list":
        assert (await api("GET", api.work_url())).body["data"][0]["state"] == "queued"
    elif seen_by == "stats":
        assert (await api.queue_stats())["depth"] == 1
    elif seen_by == "ack":
        assert (await api.ack(work_id, worker="b")).body["state"] == "starting"
    else:
        assert (await api.heartbeat(work_id, worker="a")).status == 409


async def test_lease_from_ack_to_first_heartbeat_lasts_60_seconds(
    api: ApiClient, clock: ManualClock
) -> None:
    work_id = await api.create_item_in_state("starting")
    clock.advance(59.999)
    assert await api.item_state(work_id) == "starting"
    clock.advance(0.001)
    assert await api.item_state(work_id) == "queued"


async def test_heartbeat_with_short_ttl_shortens_lease(api: ApiClient, clock: ManualClock) -> None:
    work_id = await api.create_item_in_state("starting")
    last = (await api.heartbeat(work_id, "NO_HEARTBEAT", 600)).body["last_heartbeat"]
    assert (await api.heartbeat(work_id, last, 10)).body["lease_extended"] is True
    clock.advance(10)
    assert await api.item_state(work_id) == "queued"


async def test_heartbeat_with_long_ttl_extends_short_lease(
    api: ApiClient, clock: ManualClock
) -> None:
    work_id = await api.create_item_in_state("starting")
    last = (await api.heartbeat(work_id, "NO_HEARTBEAT", 10)).body["last_heartbeat"]
    clock.advance(9)
    await api.heartbeat(work_id, last, 600)
    clock.advance(599)
    assert await api.item_state(work_id) == "active"
    clock.advance(1)
    assert await api.item_state(work_id) == "queued"


async def test_timestamps_of_item_remain_after_lease_expiry_until_later_calls_replace_them(
    api: ApiClient, clock: ManualClock
) -> None:
    work_id = await api.create_item_in_state("active", "a")
    clock.advance(60)
    item = await api.claim_item(worker="b")
    assert item["state"] == "queued"
    assert item["acknowledged_at"] == "2026-03-01T12:00:00Z"
    assert item["started_at"] == "2026-03-01T12:00:00Z"
    assert item["latest_heartbeat_at"] == "2026-03-01T12:00:00.000000Z"
    acked = (await api.ack(work_id, worker="b")).body
    assert acked["acknowledged_at"] == "2026-03-01T12:01:00Z"
    assert acked["latest_heartbeat_at"] == "2026-03-01T12:00:00.000000Z"
    clock.advance(2)
    former = acked["latest_heartbeat_at"]
    assert (await api.heartbeat(work_id, former, worker="a")).status == 412
    answer = await api.heartbeat(work_id, "NO_HEARTBEAT", worker="b")
    assert answer.body["last_heartbeat"] == "2026-03-01T12:01:02.000000Z"
    item = (await api.get(work_id)).body
    assert item["started_at"] == "2026-03-01T12:01:02Z"


async def test_any_worker_may_ack_item_with_expired_lease(
    api: ApiClient, clock: ManualClock
) -> None:
    work_id = await api.create_item_in_state("starting", "a")
    clock.advance(60)
    assert (await api.queue_stats())["pending"] == 0
    assert (await api.ack(work_id, worker="b")).status == 200


async def test_item_with_expired_lease_is_delivered_at_once(
    api: ApiClient, clock: ManualClock
) -> None:
    work_id = await api.create_item_in_state("active")
    clock.advance(60)
    params = {"reclaim_older_than_ms": "600000"}
    assert (await api.claim_item(params=params))["id"] == work_id
    assert (await api.poll(params=params)).body is None


async def test_item_state_changes_from_stopping_to_stopped_when_lease_expires(
    api: ApiClient, clock: ManualClock
) -> None:
    work_id = await api.create_item_in_state("stopping")
    clock.advance(3600)
    item = (await api.get(work_id)).body
    assert item["state"] == "stopped"
    # `stopped_at` is the end of the lease, although the control plane noticed this end much later.
    assert item["stopped_at"] == "2026-03-01T12:01:00Z"
    assert (await api.poll()).body is None


async def test_graceful_stop_does_not_change_lease(api: ApiClient, clock: ManualClock) -> None:
    work_id = await api.create_item_in_state("starting")
    clock.advance(50)
    await api.stop(work_id)
    clock.advance(10)
    assert await api.item_state(work_id) == "stopped"


async def test_clock_set_back_does_not_change_lease(api: ApiClient, clock: ManualClock) -> None:
    work_id = await api.create_item_in_state("active")
    clock.advance(-3600)
    assert await api.item_state(work_id) == "active"
    answer = await api.heartbeat(work_id)
    assert answer.body["last_heartbeat"] == "2026-03-01T12:00:00.000001Z"


async def test_leases_expire_in_order_of_their_end_times(
    api: ApiClient, clock: ManualClock
) -> None:
    slow, fast = (
        await api.create_item_in_state("active"),
        await api.create_item_in_state("starting"),
    )
    await api.heartbeat(fast, "NO_HEARTBEAT", 10)
    clock.advance(3600)
    assert await api.item_state(slow) == await api.item_state(fast) == "queued"
    lapsed = [record for record in api.plane.history if record.kind == "lapsed"]
    assert [record.work_id for record in lapsed] == [fast, slow]
    assert lapsed[1].time - lapsed[0].time == 50
