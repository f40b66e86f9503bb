"""The pool context: the objects that all parts of one pool share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from workpool.pool.admission import Admission
from workpool.pool.call_permissions import OptionalCalls
from workpool.pool.machine_pauses import wall_clock
from workpool.wire.protocol import RECLAIM_OLDER_THAN_MS

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextvars import Context

    from workpool.plugins import Plugins
    from workpool.pool.bounded_queue import BoundedQueue
    from workpool.pool.client_protocol import ClientProtocol
    from workpool.pool.handler_threads import HandlerThreads
    from workpool.pool.lease_renewer import LeaseRenewer
    from workpool.pool.machine_pauses import Clock
    from workpool.pool.pool_item import PoolItem
    from workpool.pool.telemetry import EventReporter
    from workpool.settings import Settings


@dataclass(slots=True)
class PoolContext:
    """The objects that all parts of one pool share; the supervisor creates them.

    Attributes:
        client: The client of the handlers' loop.
        clock: The lease clock.
        observe: Reports an event; called on the handlers' loop only.
        start_context: The context in which the pool was started; each session runs in a copy.
        threads: The threads of handlers that are plain functions.
        drain_deadline: Returns the time at which a drain cancels the handlers, on the loop's clock;
            infinite until it is known.
        admission: Decides whether items may be claimed.
        optional: Makes the calls that the credential may not permit.
        draining: Whether a drain has begun, so that no item is started. The dispatcher sets it.
    """

    settings: Settings
    client: ClientProtocol
    plugins: Plugins
    renewer: LeaseRenewer
    queue: BoundedQueue[PoolItem]
    clock: Clock
    observe: EventReporter
    start_context: Context
    threads: HandlerThreads
    drain_deadline: Callable[[], float] = lambda: math.inf
    admission: Admission = field(default_factory=lambda: Admission(wall_clock))
    optional: OptionalCalls = field(default_factory=OptionalCalls)
    draining: bool = False

    @property
    def redelivery_window_seconds(self) -> float:
        """Seconds from the delivery of an unacknowledged item to its delivery to another worker."""
        window = self.settings.reclaim_older_than_ms
        return (RECLAIM_OLDER_THAN_MS if window is None else window) / 1000
