"""The state machine of a work item, as tables and pure functions.

Every function gets an item and the time, and returns the item afterwards: the same object if
nothing changed. A call that the protocol forbids raises `APIError`. No clock, no I/O. See
workpool/docs/protocol.md, "States and leases" and "Calls".
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from workpool.server.api_errors import APIError
from workpool.server.timestamps import SECOND, format_heartbeat_time
from workpool.wire.protocol import (
    ACK_LEASE_SECONDS,
    ACTIVE,
    NO_HEARTBEAT,
    QUEUED,
    STARTING,
    STOPPED,
    STOPPING,
    TTL_MAX_SECONDS,
    TTL_MIN_SECONDS,
    State,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from workpool.server.stored_item import Item

# Maps `force` and the state before a stop to the state after the stop.
STOP: Final[Mapping[tuple[bool, State], State]] = {
    (False, QUEUED): STOPPED,
    (False, STARTING): STOPPING,
    (False, ACTIVE): STOPPING,
    (False, STOPPING): STOPPED,
    (False, STOPPED): STOPPED,
    (True, QUEUED): STOPPED,
    (True, STARTING): STOPPED,
    (True, ACTIVE): STOPPED,
    (True, STOPPING): STOPPED,
    (True, STOPPED): STOPPED,
}

# Maps the state before the end of a lease to the state after it. Items in other states have no
# lease.
LAPSE: Final[Mapping[State, State]] = {STARTING: QUEUED, ACTIVE: QUEUED, STOPPING: STOPPED}


def deliver_item(item: Item, worker_id: str | None, now: int) -> Item:
    """Record the delivery of an item to a poll; the item stays `queued`."""
    return replace(item, delivered_at=now, holder=worker_id)


def withdraw_delivery(item: Item) -> Item:
    """Undo a delivery that reached no client."""
    return replace(item, delivered_at=None, holder=None)


def ack_item(item: Item, worker_id: str | None, now: int) -> Item:
    """Acknowledge an item and begin its lease; a repeated ack changes nothing."""
    if item.state in {STOPPING, STOPPED}:
        raise APIError(409, f"the item is {item.state}")
    if item.holder is not None and worker_id is not None and worker_id != item.holder:
        raise APIError(409, "the item was claimed by another worker")
    if item.state != QUEUED:
        return item
    return replace(
        item,
        state=STARTING,
        acknowledged_at=now,
        holder=item.holder or worker_id,
        delivered_at=None,
        lease_end=now + ACK_LEASE_SECONDS * SECOND,
        ttl_seconds=ACK_LEASE_SECONDS,
    )


def extend_lease(
    item: Item, expected: str | None, ttl_seconds: int, now: int, *, compare_on_stop: bool = True
) -> Item:
    """Extend an item's lease to `ttl_seconds` after `now`, clamping `ttl_seconds` to its range.

    `compare_on_stop`: if it is false, every heartbeat of a `stopping` or `stopped` item is
    answered, whatever it expects; a `stopped` item does not change.
    """
    ends = item.state in {STOPPING, STOPPED}
    if item.state == STOPPED and not compare_on_stop:
        return item
    if item.state in {QUEUED, STOPPED}:
        raise APIError(409, f"the item is {item.state}")
    compared = expected is not None and (compare_on_stop or not ends)
    if compared and expected != last_heartbeat(item):
        raise APIError(
            412,
            "expected_last_heartbeat is not the lease owner's",
            "expected_last_heartbeat",
            {
                "error_code": "heartbeat_precondition_failed",
                "current_state": heartbeat_answer(item, extended=False),
            },
        )
    starts = item.state == STARTING
    ttl_seconds = min(max(ttl_seconds, TTL_MIN_SECONDS), TTL_MAX_SECONDS)
    return replace(
        item,
        state=ACTIVE if starts else item.state,
        started_at=now if starts else item.started_at,
        # A worker proves by the time of the last heartbeat that it holds the lease. So two
        # heartbeats in one microsecond need different times: with equal times, the sender of the
        # first one would still count as the holder.
        heartbeat_at=max(now, (item.heartbeat_at or 0) + 1),
        beaten=True,
        ttl_seconds=ttl_seconds,
        lease_end=now + ttl_seconds * SECOND,
    )


def last_heartbeat(item: Item) -> str:
    """Return the time of an item's last heartbeat, which the next heartbeat must repeat."""
    if not item.beaten or item.heartbeat_at is None:
        return NO_HEARTBEAT
    return format_heartbeat_time(item.heartbeat_at)


def heartbeat_answer(item: Item, *, extended: bool) -> dict[str, Any]:
    """Return the JSON answer to a heartbeat, which is also part of the details of a 412."""
    return {
        "last_heartbeat": last_heartbeat(item) if item.beaten else None,
        "lease_extended": extended,
        "state": item.state,
        "ttl_seconds": item.ttl_seconds,
    }


def stop_item(item: Item, now: int, *, force: bool) -> Item:
    """Stop an item, or request its stop; the table `STOP` gives the new state."""
    state = STOP[force, item.state]
    if state == item.state:
        return item
    if state == STOPPING:
        return replace(item, state=STOPPING, stop_requested_at=now)
    return replace(item, state=STOPPED, stopped_at=now, delivered_at=None, lease_end=None)


def end_lease(item: Item) -> Item:
    """End the lease of an item as of its `lease_end`, even if this function is called later."""
    if LAPSE[item.state] == STOPPED:
        return replace(item, state=STOPPED, stopped_at=item.lease_end, lease_end=None)
    return replace(item, state=QUEUED, holder=None, lease_end=None, beaten=False)


def merge_metadata(item: Item, patch: Mapping[str, str | None]) -> Item:
    """Merge a patch into the metadata of an item: a string sets a key, None deletes it."""
    merged = {key: value for key, value in {**item.metadata, **patch}.items() if value is not None}
    return item if merged == item.metadata else replace(item, metadata=merged)
