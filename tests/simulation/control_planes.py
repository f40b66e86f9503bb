"""Simulated control planes that answer acks with `active`, as one existing server does.

Such a control plane accepts an ack from any worker, so its answer does not show which worker owns
the item. The first heartbeat that expects no earlier one shows the owner.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from workpool.server import APIError, Operations
from workpool.server.timestamps import SECOND
from workpool.wire.protocol import ACK_LEASE_SECONDS, ACTIVE, QUEUED, STARTING

if TYPE_CHECKING:
    from workpool.server import Poll
    from workpool.server.stored_item import Item


class OperationsThatAckForAnyWorker(Operations):
    """Operations that answer an ack with `active` even if another worker already holds the item.

    Args:
        values: The arguments of `Operations`.
        poll_leases: The lease of the ack begins with the poll already. Otherwise it begins with the
            first ack.
    """

    def __init__(self, *values: Any, poll_leases: bool, **named: Any) -> None:
        super().__init__(*values, **named)
        self._poll_leases = poll_leases

    def poll(self, environment_id: str, poll: Poll) -> Item | None:
        """Deliver an item. With `poll_leases`, also begin the lease of the item."""
        item = super().poll(environment_id, poll)
        if item is None or not self._poll_leases:
            return item
        leased = replace(self._copy_with_new_lease(item), state=STARTING)
        return self._store_changed_item(
            self.get_queue(environment_id), leased, "delivered", poll.worker_id
        )

    def ack_item(self, environment_id: str, work_id: str, worker_id: str | None = None) -> Item:
        """Acknowledge an item for any worker, even if another worker already holds it."""
        queue = self.get_queue(environment_id)
        item = queue.get_item(work_id)
        if item.state == ACTIVE:
            return item
        if item.state != (STARTING if self._poll_leases else QUEUED):
            self._add_history_record("conflict", item, worker_id, op="ack")
            raise APIError(409, f"the item is {item.state}")
        leased = item if self._poll_leases else self._copy_with_new_lease(item)
        acked = replace(leased, state=ACTIVE, acknowledged_at=self.latest_call_time)
        return self._store_changed_item(queue, acked, "acked", worker_id)

    def _copy_with_new_lease(self, item: Item) -> Item:
        return replace(
            item,
            delivered_at=None,
            lease_end=self.latest_call_time + ACK_LEASE_SECONDS * SECOND,
            ttl_seconds=ACK_LEASE_SECONDS,
        )
