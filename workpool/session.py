"""What a handler sees and says: `Session`, `Release`, `release_on_exhaustion`, `Outcome`.

A session never outlives its lease: every call that would reach the control plane first asks, with
no await between, whether the item is still ours (design §1, Finish).
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from workpool.errors import exhausted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractAsyncContextManager

    from workpool.wire.items import WorkItem
    from workpool.wire.session_events import SessionEvents

Outcome = Literal[
    "completed", "failed", "timed_out", "stopped", "released", "lease_lost", "detached"
]
"""How a session ended for this pool (design §1, Finish)."""


_log = logging.getLogger("workpool.session")


class Release(Exception):
    """Raise from a handler to give the item back unfinished.

    An exception group that holds nothing else, at any depth, counts as its release with the longest
    delay.

    Args:
        reason: Written to the metadata `workpool.released`; leaves the process, so no secrets.
        delay: Seconds until another worker may take it; clamped to 10–600 (protocol §3.3).
    """

    def __init__(self, reason: str = "", delay: float = 10.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.delay = delay


@contextmanager
def release_on_exhaustion() -> Iterator[None]:
    """Give the item back if the machine runs out of what the block needs.

    A session does not fail because its worker has no descriptor, disk space, memory, process or
    thread left: another worker may have them. Other errors pass unchanged.

    Raises:
        Release: `workpool.errors.exhausted` is true of the block's error, which is its cause.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, Release) or not exhausted(error):
            raise
        raise Release("the worker's machine has run out of resources") from error


@dataclass(frozen=True, slots=True)
class HandedLease:
    """What a child must know to take an item over (`Session.handover`).

    Attributes:
        work_id: The item, `work_…`.
        environment_id: Its environment, `env_…`.
        last_heartbeat: What the child's first beat sends as `expected_last_heartbeat`.
        ttl: Seconds that our last beat was granted: the child should ask for as much.
        base_url: Where the control plane is.
        dialect: What it speaks.
    """

    work_id: str
    environment_id: str
    last_heartbeat: str
    ttl: int
    base_url: str
    dialect: str

    @property
    def variables(self) -> dict[str, str]:
        """All of it as environment variables for `workpool hold`; the token it needs besides."""
        return {
            "WORKPOOL_BASE_URL": self.base_url,
            "WORKPOOL_DIALECT": self.dialect,
            "WORKPOOL_ENVIRONMENT_ID": self.environment_id,
            "WORKPOOL_HOLD_WORK_ID": self.work_id,
            "WORKPOOL_HOLD_LAST_HEARTBEAT": self.last_heartbeat,
            "WORKPOOL_HOLD_TTL": str(self.ttl),
        }


class Held(Protocol):
    """What a session needs of its item's lease and of the connection to write through."""

    @property
    def remaining(self) -> float:
        """Seconds until the lease must be taken for lost; 0 when it is not held."""

    def check(self) -> None:
        """Raise `LeaseLost` or `SessionEnded` unless the item is ours to touch."""

    async def update_metadata(self, patch: Mapping[str, str | None]) -> WorkItem:
        """Write metadata, checked right before each send (protocol §3.5)."""

    def hand_over(self) -> AbstractAsyncContextManager[HandedLease]:
        """Hand the item over to a child."""

    def events(self) -> SessionEvents:
        """The session's events, read and sent only while the item is ours to touch."""


class Session:
    """One claimed session, for its handler. Belongs to the supervisor's loop.

    Attributes:
        item: The item as the acknowledgement returned it.
        redelivered: The item was held before, here or elsewhere: it may have been run before.
        attempt: The number of this run: 1, and one more for each earlier run that ended with
            neither a release (by a drain or by `Release`) nor a stop.
    """

    __slots__ = (
        "_draining",
        "_held",
        "_interrupted",
        "_stopping",
        "attempt",
        "item",
        "redelivered",
    )

    def __init__(self, item: WorkItem, held: Held, *, redelivered: bool, attempt: int = 1) -> None:
        self.item = item
        self.redelivered = redelivered
        self.attempt = attempt
        self._held = held
        self._stopping = False
        self._draining = False
        self._interrupted: asyncio.Event | None = None

    @property
    def log(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger whose records carry the ids of this session."""
        return logging.LoggerAdapter(
            _log, {"work_id": self.item.id, "session_id": self.item.session_id}
        )

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

    @property
    def events(self) -> SessionEvents:
        """What is said in the session: `list()`, `send(…)` and `stream()` (protocol §5).

        All of it raises `LeaseLost` or `SessionEnded` once the item is not ours any more, and sends
        nothing then.
        """
        return self._held.events()

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

    def handover(self) -> AbstractAsyncContextManager[HandedLease]:
        """Hand the item over to a program of its own, which keeps the lease from then on.

            async with session.handover() as lease:
                await start_container(lease)  # runs `workpool hold`, say

        Inside the block no heartbeat of ours is sent, nor anything else, so start the child and
        leave. Leaving waits for the child's first beat, about two thirds of `lease.ttl` after
        entering at the most; then the session's outcome is `detached`, whatever the handler
        returns, and nothing more is sent for the item. If the block raises, our heartbeats go on,
        and a child that has not sent its first one by then is refused.

        Raises:
            HandoverError: No child's beat came in time; the item is ours again.
            LeaseLost: The item is not ours any more, nor a child's.
            SessionEnded: The session is over, or an operator has asked to end it.
        """
        return self._held.hand_over()

    def interrupt(self, *, stopping: bool = False, draining: bool = False) -> None:
        """Tell the handler to come to an end. Called by the pool."""
        self._stopping = self._stopping or stopping
        self._draining = self._draining or draining
        if self._interrupted is not None:
            self._interrupted.set()
