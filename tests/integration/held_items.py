"""Items that another worker held before the pool under test gets them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workpool.testing import expire_lease

if TYPE_CHECKING:
    from workpool.server import ControlPlane


def enqueue_item_held_before(plane: ControlPlane, **metadata: str) -> str:
    """Enqueue an item that another worker then holds and loses; return the id of the item."""
    (item,) = plane.enqueue(metadata=metadata)
    operations, environment = plane.operations, plane.environments[0]
    operations.ack_item(environment, item.id, "another")
    operations.heartbeat(environment, item.id, "NO_HEARTBEAT", worker_id="another")
    expire_lease(plane, item.id)
    return item.id
