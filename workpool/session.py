"""What a handler sees and says: `Session`, `Release`, `Outcome`.

A session never outlives its lease: every call that would reach the control plane first asks, with
no await between, whether the item is still ours (design §1, Finish).
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from workpool.wire.items import WorkItem

Outcome = Literal[
    "completed", "failed", "timed_out", "stopped", "released", "lease_lost", "detached"
]
"""How a session ended for this pool (design §1, Finish)."""


class Release(Exception):
    """Raise from a handler to give the item back unfinished.

    Args:
        reason: Written to the metadata `workpool.released`; leaves the process, so no secrets.
        delay: Seconds until another worker may take it; clamped to 10–600 (protocol §3.3).
    """

    def __init__(self, reason: str = "", delay: float = 10.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.delay = delay


class Held(Protocol):
    """What a session needs of its item's lease and of the connection to write through."""

    @property
    def remaining(self) -> float:
        """Seconds until the lease must be taken for lost; 0 when it is not held."""

    def check(self) -> None:
        """Raise `LeaseLost` or `SessionEnded` unless the item is ours to touch."""

    async def update_metadata(self, patch: Mapping[str, str | None]) -> WorkItem:
        """Write metadata, checked right before each send (protocol §3.5)."""


class Session:
    """One claimed session, for its handler. Belongs to the supervisor's loop.

    Attributes:
        item: The item as the acknowledgement returned it.
        redelivered: The item was held before, here or elsewhere: it may have been run before.
        log: A logger whose records carry the ids of this session.
    """

    __slots__ = (
        "_draining",
        "_held",
        "_interrupted",
        "_stopping",
        "item",
        "log",
        "redelivered",
    )

    def __init__(self, item: WorkItem, held: Held, *, redelivered: bool) -> None:
        self.item = item
        self.redelivered = redelivered
        self.log = logging.LoggerAdapter(
            logging.getLogger("workpool.session"),
            {"work_id": item.id, "session_id": item.session_id},
        )
        self._held = held
        self._stopping = False
        self._draining = False
        self._interrupted: asyncio.Event | None = None

    def __repr__(self) -> str:
        return f"<Session {self.id} of {self.item.id}>"

    @property
    def id(self) -> str:
        """The session's id, `sess_…`."""
        return self.item.session_id

    @property
    def stopping(self) -> bool:
        """An operator asked to end this session: finish, or be cancelled after `stop_grace`."""
        return self._stopping

    @property
    def draining(self) -> bool:
        """The pool is going away: finish within `drain_timeout`, or raise `Release`."""
        return self._draining

    @property
    def lease_remaining(self) -> float:
        """Seconds for which the item is certainly ours if no further heartbeat succeeds."""
        return self._held.remaining

    async def interrupted(self) -> None:
        """Wait until `stopping` or `draining` comes; returns at once if it has come."""
        if self._stopping or self._draining:
            return
        if self._interrupted is None:
            self._interrupted = asyncio.Event()
        await self._interrupted.wait()

    async def update_metadata(self, patch: Mapping[str, str | None]) -> WorkItem:
        """Merge `patch` into the item's metadata; None deletes a key (protocol §3.5).

        Retried while the answer is worth another try and the lease lasts.

        Raises:
            LeaseLost: The lease is not held; nothing was sent.
            SessionEnded: The session is over; nothing was sent.
            ControlPlaneError: The control plane refused, or did not answer in time.
        """
        self._held.check()
        return await self._held.update_metadata(patch)

    def interrupt(self, *, stopping: bool = False, draining: bool = False) -> None:
        """Tell the handler to come to an end. Called by the pool."""
        self._stopping = self._stopping or stopping
        self._draining = self._draining or draining
        if self._interrupted is not None:
            self._interrupted.set()
