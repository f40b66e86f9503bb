"""One beat on its way, and what the leases of one keeper share."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from workpool.errors import ConflictError, PreconditionError, RefusedError, TransientError
from workpool.wire.protocol import ACTIVE

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool.errors import ControlPlaneError
    from workpool.events import Event
    from workpool.pool.calls import Calls
    from workpool.pool.clock import Clock
    from workpool.wire.items import Heartbeat


class Pulse(Protocol):
    """The keeper, as its leases see it."""

    clock: Clock
    request_timeout: float
    lease_ttl: int

    @property
    def calls(self) -> Calls:
        """The keeper's own connection."""

    @property
    def renewing(self) -> bool:
        """False while the handlers' loop has been blocked for `max_block`: nothing is sent."""

    def observe(self, event: Event) -> None:
        """Tell the observers."""

    def tell(self, callback: Callable[[], None]) -> None:
        """Run `callback` on the handlers' loop."""


class Retry(NamedTuple):
    """An attempt that settled nothing."""

    at_once: bool = False
    at_least: float = 0.0


class Sent(NamedTuple):
    """A beat on its way: sent when, for how long, under which deadline, how late, as the last?"""

    at: float
    ttl: int
    deadline: float
    lag: float
    last: bool

    def is_plain(self, beat: Heartbeat, now: float) -> bool:
        """It was answered in time, and nothing changes but the deadline."""
        return (
            beat.lease_extended and beat.state == ACTIVE and not self.last and now < self.deadline
        )


async def send(
    calls: Calls, work_id: str, expected: str, ttl: int, patience: float
) -> Heartbeat | ControlPlaneError:
    """Send one beat; an answer that is an error is returned, too (design §2)."""
    try:
        return await calls.heartbeat(work_id, expected, ttl, timeout=patience)
    except (TransientError, RefusedError, ConflictError, PreconditionError) as error:
        return error
