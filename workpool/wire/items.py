"""What the control plane tells us, parsed once at the edge (protocol §2).

Parsing is strict in what the pool depends on and blind to everything else: unknown fields are
ignored, and a per-item `secret` (protocol §6) is never kept. A malformed object raises `ValueError`
that names the field; its content is never quoted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from workpool.wire.protocol import State


@dataclass(frozen=True, slots=True)
class WorkItem:
    """One item of the queue. Times are aware datetimes; `metadata` is read-only.

    `type` is `data.type` ("session", "healthcheck", …); `session_id` is `data.id`.
    `last_heartbeat` is `latest_heartbeat_at` as the control plane wrote it: what the next beat
    must expect, to the letter (protocol §3.3).
    """

    id: str
    type: str
    session_id: str
    environment_id: str
    state: State
    metadata: Mapping[str, str]
    created_at: datetime
    acknowledged_at: datetime | None
    started_at: datetime | None
    latest_heartbeat_at: datetime | None
    last_heartbeat: str | None
    stop_requested_at: datetime | None
    stopped_at: datetime | None


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The answer to a heartbeat. `last_heartbeat` is opaque: sent back as it came."""

    last_heartbeat: str
    lease_extended: bool
    state: State
    ttl_seconds: float


@dataclass(frozen=True, slots=True)
class QueueStats:
    """Protocol §2, queue stats."""

    depth: int
    pending: int
    oldest_queued_at: datetime | None
    workers_polling: int
