"""The options with which a client sends one request: lease check, priority, connection."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable


class Priority(enum.IntEnum):
    """The priority of a call at the rate limiter. It also selects the connections of the call.

    Attributes:
        COMPLETION: The calls that end a session. They go before all others.
        CLAIM: Ack permits, acks and polls. They take turns with the calls of handlers.
        HANDLER: The calls of handlers, and of everybody who uses a client of their own.
    """

    COMPLETION = 0
    CLAIM = 1
    HANDLER = 2


class CallOptions(NamedTuple):
    """The options with which a client sends one request.

    Attributes:
        check: Called right before the first byte is written, with no await in between. If it raises
            an exception, the call raises it too and has sent nothing.
        priority: The call's priority in the queues for rate limit and connections.
        new_connection: Use no pooled connection: after a try without an answer, the other pooled
            connections may be dead too. Has no effect in a caller's own aiohttp session.
        permit: A permit for this call has been acquired, so it waits for no rate limit.
    """

    check: Callable[[], None] | None = None
    priority: Priority = Priority.HANDLER
    new_connection: bool = False
    permit: bool = False


DEFAULT_OPTIONS: Final = CallOptions()
CLAIM_OPTIONS: Final = CallOptions(priority=Priority.CLAIM)
