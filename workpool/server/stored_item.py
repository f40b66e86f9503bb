"""One work item as the control plane keeps it: a frozen value, replaced by every change.

Holds what the wire shows and what only the server knows: who an item was delivered
to and when, and the lease. Every time is in microseconds since the epoch (`clock`).
See workpool/docs/protocol.md, "Work item".
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from workpool.server.timestamps import MILLISECOND
from workpool.wire.protocol import QUEUED, SESSION, TTL_DEFAULT_SECONDS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from workpool.wire.protocol import State

WORK_PREFIX: Final = "work_"
SESSION_PREFIX: Final = "sess_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A work item.

    Attributes:
        holder: The `Worker-ID` that it was delivered to, or that acknowledged it; None when
            nobody said, or after a lapse.
        delivered_at: Since when it waits for an acknowledgement; only ever set while `queued`.
        lease_end: When the lease lapses; only set in `starting`, `active` and `stopping`.
        beaten: Whether the present lease has had a heartbeat. While it has not, `heartbeat_at`
            is a former holder's, and the next heartbeat must expect NO_HEARTBEAT.
    """

    id: str
    environment_id: str
    session_id: str
    created_at: int
    type: str = SESSION
    state: State = QUEUED
    metadata: Mapping[str, str] = field(default_factory=dict)
    acknowledged_at: int | None = None
    started_at: int | None = None
    heartbeat_at: int | None = None
    stop_requested_at: int | None = None
    stopped_at: int | None = None
    holder: str | None = None
    delivered_at: int | None = None
    lease_end: int | None = None
    ttl_seconds: int = TTL_DEFAULT_SECONDS
    beaten: bool = False


class Ids:
    """UUIDv7 digits, strictly ascending, so that id order is creation order.

    `last` carries the order over a restart, even when the clock was set back meanwhile.
    """

    def __init__(self, last: str = "") -> None:
        number = int(last, 16) if last else 0
        self._last = (number >> 80) << 12 | (number >> 64) & 0xFFF

    def new(self, now: int) -> str:
        """32 lowercase hex digits, greater than any before."""
        self._last = max(now // MILLISECOND << 12, self._last + 1)
        number = self._last >> 12 << 80 | 0x7 << 76 | (self._last & 0xFFF) << 64
        return f"{number | 0b10 << 62 | secrets.randbits(62):032x}"
