"""Items that a pool receives after another worker has lost them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workpool.testing import expire_lease

if TYPE_CHECKING:
    from workpool.server import ControlPlane


def enqueue_redelivered_item(plane: ControlPlane, **metadata: str) -> str:
    """Enqueue an item, let another worker claim it and lose the lease, and return the item's id."""
    (item,) = plane.enqueue(metadata=metadata)
    operations, environment = plane.operations, plane.environments[0]
    operations.ack_item(environment, item.id, "another")
    operations.heartbeat(environment, item.id, "NO_HEARTBEAT", worker_id="another")
    expire_lease(plane, item.id)
    return item.id
