"""A work item as the control plane stores it: a frozen value that each change replaces.

It has the public fields and those that only the server knows: the worker and time of the delivery,
and the lease. Every time is in microseconds since the epoch (`timestamps`). See
workpool/docs/protocol.md, "Work item".
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
    """A work item with its public fields, its delivery and its lease.

    Attributes:
        holder: The `Worker-ID` of the delivery or the acknowledgement; None if the request had
            none, or after a lapse.
        delivered_at: The time of the delivery that waits for an acknowledgement; only set while
            `queued`.
        lease_end: The time at which the lease lapses; only set in `starting`, `active` and
            `stopping`.
        beaten: Whether the current lease has had a heartbeat. Before that, `heartbeat_at` is that
            of a former holder, and the next heartbeat must expect NO_HEARTBEAT.
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


class IdGenerator:
    """Generates strictly ascending UUIDv7, so that the order of ids is the order of creation.

    `last` keeps the order across a restart, even if the clock was set back meanwhile.
    """

    def __init__(self, last: str = "") -> None:
        self._last = _time_and_counter_of_id(last)

    def skip_ids_up_to(self, last: str) -> None:
        """Make all further ids greater than the id `last` of another generator."""
        self._last = max(self._last, _time_and_counter_of_id(last))

    def generate_id_digits(self, now: int) -> str:
        """Return the 32 lowercase hex digits of a new id, which is greater than all earlier ids."""
        self._last = max(now // MILLISECOND << 12, self._last + 1)
        number = self._last >> 12 << 80 | 0x7 << 76 | (self._last & 0xFFF) << 64
        return f"{number | 0b10 << 62 | secrets.randbits(62):032x}"


def _time_and_counter_of_id(digits: str) -> int:
    """Return the milliseconds and the counter of a UUIDv7 as one number, without random bits."""
    number = int(digits, 16) if digits else 0
    return (number >> 80) << 12 | (number >> 64) & 0xFFF
